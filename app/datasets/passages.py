"""The text of the passages that predictions were given, as long as that version of their document is there."""

from collections import OrderedDict
from typing import Any, Protocol

from app.predictions import Prediction
from retrieval.documents import Document, Scope
from retrieval.errors import RetrievalError

MAX_DOCUMENTS = 32
"""Documents whose text is remembered from one prediction to the next."""


class Documents(Protocol):
    """Where documents are kept."""

    async def document(self, scope: Scope, document_id: str) -> Document:
        """Get one document, as it is now."""
        ...

    async def source(self, scope: Scope, document_id: str) -> str:
        """Get the text that passages are spans of."""
        ...


class DocumentTexts:
    """Looks passages up in their documents."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._known: OrderedDict[tuple[str, str, str], str | None] = OrderedDict()

    async def texts(self, tenant: str, prediction: Prediction) -> dict[str, str]:
        """Give the texts of a prediction's passages by their ids, as far as they are still there."""
        found = {}
        for passage in prediction.passages or ():
            source = await self._source(tenant, passage)
            if source is not None:
                found[str(passage.get("id"))] = source[passage["start"] : passage["end"]]
        return found

    async def _source(self, tenant: str, passage: dict[str, Any]) -> str | None:
        key = tenant, str(passage.get("document_id")), str(passage.get("document_version"))
        if key not in self._known:
            self._known[key] = await self._read(*key)
            if len(self._known) > MAX_DOCUMENTS:
                self._known.popitem(last=False)
        return self._known[key]

    async def _read(self, tenant: str, document_id: str, version: str) -> str | None:
        scope = Scope.whole(tenant)
        try:
            if (await self._documents.document(scope, document_id)).version != version:
                return None
            text = await self._documents.source(scope, document_id)
            # While the text was read the document may have been replaced.
            return text if (await self._documents.document(scope, document_id)).version == version else None
        except RetrievalError:
            return None
