"""The front door of retrieval: documents in, passages out.

The main rule: what a search returns is what the document store holds at that moment, never both versions of a document
and never a deleted one. Points are written before the store's transaction and removed after it, and hidden meanwhile.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retrieval.cutting import Cutter, Split
from retrieval.documents import Document, Ingested, Passage, Scope, SearchMode, SearchResult
from retrieval.embedder import Embedder
from retrieval.errors import DocumentChanged, DocumentNotFound, IndexOutOfRoom, IndexUnavailable, RetrievalError
from retrieval.fusion import Fusion
from retrieval.index import Index, Vector
from retrieval.indexes import Indexes
from retrieval.ingesting import Ingester, Parser
from retrieval.library import Library, Shelf
from retrieval.looking import Asked, Looking
from retrieval.making import Making, Makings
from retrieval.reranking import SecondLook
from retrieval.scoping import tenant_filter
from retrieval.sparse import Bm25Settings, SparseEncoder
from retrieval.splitting import split as split_by_structure
from retrieval.store import DocumentStore, StoredDocument
from retrieval.variety import Variety

MAX_QUERY_CHARACTERS = 2_000
_log = logging.getLogger(__name__)
_SEARCH_ATTEMPTS = 5
_FULL_DISK_SECONDS = 5.0


class Retriever:
    """Ingests documents and finds their passages; open it with `async with`.

    It opens the embedder and the index it is given, and owns `directory` alone: a second process is refused. An
    embedder that is not the live index version's raises IndexMismatch; `coming` is for the next version.
    `retry_seconds` is for an index on a server: when that is down at the start, retrieval opens without it, says so to
    whoever asks, and tries again at that interval; None has the start fail, but on a disk that is full. A `second_look`
    orders anew what was found. `words_alone` has hybrid searches go on by BM25 while the embedder does not answer.
    """

    def __init__(
        self,
        directory: Path,
        *,
        embedder: Embedder,
        index: Index,
        parser: Parser,
        split: Split = split_by_structure,
        passage_tokens: int = 200,
        coming: Making | None = None,
        fusion: Fusion = "dbsf",
        depth: int = 50,
        bm25: Bm25Settings | None = None,
        retry_seconds: float | None = None,
        second_look: SecondLook | None = None,
        words_alone: bool = False,
    ) -> None:
        self._store = DocumentStore(directory / "documents.db")
        self._embedders = [embedder, *([coming.embedder] if coming and coming.embedder is not embedder else [])]
        self._fusion = fusion
        self._sparse = SparseEncoder(bm25)
        self._retry_seconds = retry_seconds
        self._second_look = second_look
        self._is_attached = False
        self._absence = IndexUnavailable("Retrieval is not open.")
        self._library = Library(self._store, self._sparse)
        self._looking = Looking(self._store, self._library, depth=depth, words_alone=words_alone)
        cutter = Cutter(split)
        self.indexes = Indexes(
            self._store,
            self._library,
            index,
            makings=Makings(Making(embedder, passage_tokens), coming, self._sparse.settings.name),
            cutter=cutter,
            parser=parser,
        )
        self.ingester = Ingester(self._store, self._library, parser=parser, cutter=cutter, live=self._live)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._store.open()
            stack.push_async_callback(self._store.close)
            for embedder in self._embedders:
                await stack.enter_async_context(embedder)
            if self._second_look is not None:
                await stack.enter_async_context(self._second_look)
            stack.push_async_callback(self.indexes.close)
            stack.push_async_callback(self._library.close)
            try:
                await self._attach()
            except IndexUnavailable as error:
                if self._retry_seconds is None and not isinstance(error, IndexOutOfRoom):
                    raise
                self._absence = error
                _log.warning("Retrieval starts without its index and tries again: %s", error)
                stack.push_async_callback(_cancel, asyncio.create_task(self._keep_attaching()))
            self._stack = stack.pop_all()
        return self

    async def _attach(self) -> None:
        """Open the index and bring it in step with the store: from then on retrieval answers."""
        await self.indexes.attach()
        self._is_attached = True

    async def _keep_attaching(self) -> None:
        while not self._is_attached:
            await asyncio.sleep(self._retry_seconds or _FULL_DISK_SECONDS)
            await self.indexes.close()
            try:
                await self._attach()
            except IndexUnavailable as error:
                self._absence = error
            except RetrievalError as error:
                self._absence = IndexUnavailable(str(error))
                _log.error("Retrieval stays without its index: %s", error)
                return
        _log.info("Retrieval has its index now.")

    def _live(self) -> Shelf:
        """The index version that answers; raises IndexUnavailable while none does."""
        live = self._library.live
        if live is None or not self._is_attached:
            raise IndexUnavailable(str(self._absence)) from self._absence
        return live

    def _live_embedder(self) -> Embedder:
        """The live version's embedder; while there is none the settings'."""
        live = self._library.live
        return live.embedder if live else self._embedders[0]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_attached = False
        await self._stack.aclose()

    @property
    def store(self) -> DocumentStore:
        """Where the documents are."""
        return self._store

    @property
    def embedding_model(self) -> str:
        """The live version's embedder, by its model id."""
        return self._live_embedder().model_id

    @property
    def embeddings_cached(self) -> int:
        """How many vectors did not have to be computed, by any of the embedders."""
        return sum(embedder.cache.hits for embedder in self._embedders)

    @property
    def embeddings_computed(self) -> int:
        """How many had to be."""
        return sum(embedder.cache.misses for embedder in self._embedders)

    @property
    def searches_by_words_alone(self) -> int:
        """How many hybrid searches went on by BM25 because the embedder did not answer."""
        return self._looking.by_words_alone

    @property
    def rerankings_failed(self) -> int:
        """How often hits stayed in the order of the fusion because the reranker did not answer."""
        return self._second_look.failures if self._second_look else 0

    @property
    def index_version(self) -> str:
        """Which embedding model, splitting and schema answer; empty until open."""
        return self._library.live.id if self._library.live and self._is_attached else ""

    async def ready(self) -> None:
        """Return if searches can be answered.

        Raises:
            IndexUnavailable: They cannot.
        """
        await self._live().index.check()

    async def add(
        self,
        scope: Scope,
        *,
        name: str,
        content: bytes,
        media_type: str | None = None,
        document_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        groups: Sequence[str] | None = None,
    ) -> Ingested:
        """Ingest a file now, as `Ingester.add` says; the service does so by `retrieval.jobs`."""
        facts: dict[str, Any] = {"media_type": media_type, "metadata": metadata, "groups": groups}
        return await self.ingester.add(scope, name=name, content=content, document_id=document_id, **facts)

    async def delete(self, scope: Scope, document_id: str) -> None:
        """Delete a document now, as `Ingester.delete` says."""
        await self.ingester.delete(scope, document_id)

    async def documents(self, scope: Scope, *, limit: int = 50, after: str | None = None) -> list[Document]:
        """List the documents that the scope sees by id, from the one after the id `after`."""
        return await self._store.documents(scope, limit=limit, after=after)

    async def document(self, scope: Scope, document_id: str) -> Document:
        """Get one document.

        Raises:
            DocumentNotFound: The scope sees no such document.
        """
        return (await self._find(scope, document_id)).document

    async def passage(self, scope: Scope, document_id: str, n: int, *, version: str | None = None) -> Passage:
        """Get passage `n` of a document, in the version asked for by its first digits or all of them.

        Raises:
            DocumentNotFound: The scope sees no such document or passage.
            DocumentChanged: The document has another version by now.
        """
        stored = await self._find(scope, document_id)
        if version is not None and not stored.document.version.startswith(version):
            raise DocumentChanged(
                f"Document {document_id!r} was replaced: it now is version {stored.document.version!r}."
            )
        key = (stored.generation, n)
        found = await self._store.passages_of([key])
        if key not in found:
            raise DocumentNotFound(f"Document {document_id!r} has no passage {n}.")
        return found[key]

    async def passages(self, scope: Scope, document_id: str) -> list[Passage]:
        """Get all passages of a document, in order.

        Raises:
            DocumentNotFound: The scope sees no such document.
        """
        return await self._store.passages((await self._find(scope, document_id)).generation)

    async def source(self, scope: Scope, document_id: str) -> str:
        """Get the text that passages and citations are spans of.

        Raises:
            DocumentNotFound: The scope sees no such document.
        """
        text = await self._store.source((await self._find(scope, document_id)).generation)
        if text is None:
            raise DocumentNotFound(f"Document {document_id!r} was just replaced or deleted.")
        return text

    async def search(
        self,
        scope: Scope,
        query: str,
        *,
        top_k: int = 5,
        mode: SearchMode = "hybrid",
        fusion: Fusion | None = None,
        rerank: bool = True,
        variety: Variety | None = None,
        index_version: str | None = None,
    ) -> SearchResult:
        """Find the passages nearest to a question, best first; `fusion` and `rerank` can differ from the settings.

        With `variety` there may be fewer, and their order is not that of their scores. A question over 2,000 characters
        is searched by its first and last 1,000: what is asked stands at an end. With `index_version` that version is
        searched, in place of the live one.

        Raises:
            InvalidFilter: The scope's filter is not of the supported form.
            IndexUnavailable: The index or the embedder does not answer.
            IndexVersionNotFound, IndexVersionState: There is no such version, or it cannot be searched.
        """
        shelf = self._live()
        if index_version is not None:
            shelf = await self.indexes.searchable(index_version)
        tenant_filter(scope)  # A bad filter is refused before anything is computed.
        text = _shorten(query)
        if not text:
            return SearchResult((), shelf.id)
        sparse = self._sparse.query(text) if mode != "dense" else None
        # What a second look may bring to the front must be found.
        second_look = self._second_look if rerank else None
        variety = variety or Variety()
        wanted = max(variety.pool(top_k), second_look.depth if second_look else 0)
        asked = Asked(scope, text, mode, sparse, wanted, fusion or self._fusion, variety.per_document)
        for attempt in range(1, _SEARCH_ATTEMPTS + 1):
            try:
                found = await self._looking.look(shelf, asked)
            except IndexUnavailable:
                # A version that was just replaced may be gone.
                if index_version is not None or shelf is self._live() or attempt == _SEARCH_ATTEMPTS:
                    raise
            else:
                if found.is_steady:
                    break
            # A document replaced meanwhile would be missed in both versions: then look again.
            shelf = shelf if index_version is not None else self._live()
        result = found.result
        if second_look:
            result = await second_look.order(text, result, variety.pool(top_k))
        return result if variety.mmr is None else await self._looking.spread(result, found, top_k, variety.mmr)

    async def embed(self, texts: list[str]) -> Vector:
        """Embed texts as documents; (n, dimension) float32, L2-normalised. What is long lets questions pass."""
        is_much = sum(map(len, texts)) > MAX_QUERY_CHARACTERS
        return await self._live_embedder().embed(texts, "document", bulk=is_much)

    async def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the embedder's tokens per text, special tokens left out."""
        return await asyncio.to_thread(self._live_embedder().count_tokens, texts)

    async def similarity(self, text: str, texts: Sequence[str]) -> list[float]:
        """Compare one text with others: a cosine each, -1 to 1."""
        if not texts:
            return []
        vectors = await self._live_embedder().embed([text, *texts], "document")
        return [float(cosine) for cosine in vectors[1:] @ vectors[0]]

    async def _find(self, scope: Scope, document_id: str) -> StoredDocument:
        stored = await self._store.find(scope, document_id)
        if stored is None:
            raise DocumentNotFound(f"There is no document {document_id!r}.")
        return stored


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _shorten(query: str) -> str:
    text = query.strip()
    if len(text) <= MAX_QUERY_CHARACTERS:
        return text
    half = MAX_QUERY_CHARACTERS // 2
    return f"{text[:half]} {text[-half:]}"
