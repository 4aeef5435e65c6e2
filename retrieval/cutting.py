"""Documents cut into passages as an index version wants them: of its length, in its embedder's tokens."""

import asyncio
from dataclasses import replace
from typing import Protocol

from retrieval.documents import Document, ParsedDocument, Passage
from retrieval.errors import LimitExceeded
from retrieval.giving_way import giving_way
from retrieval.index import MOST_PASSAGES
from retrieval.library import Shelf
from retrieval.splitting import CountTokens


class Split(Protocol):
    """What cuts a document into passages: `retrieval.splitting.split`, or a test's stand-in."""

    def __call__(
        self,
        parsed: ParsedDocument,
        /,
        *,
        document_id: str,
        document_version: str,
        document_name: str,
        count_tokens: CountTokens,
        target_tokens: int,
        max_tokens: int,
    ) -> list[Passage]:
        """Return the passages in order, numbered from 1."""
        ...


def cut(
    split: Split,
    parsed: ParsedDocument,
    *,
    passage_tokens: int,
    count_tokens: CountTokens,
    document_id: str = "",
    document_version: str = "",
    document_name: str = "",
) -> list[Passage]:
    """Return the passages of a document in order, of about so many tokens and at most a fifth more.

    Raises:
        LimitExceeded: There are more than an index can number.
    """
    passages = split(
        parsed,
        document_id=document_id,
        document_version=document_version,
        document_name=document_name,
        count_tokens=count_tokens,
        target_tokens=passage_tokens,
        max_tokens=passage_tokens * 6 // 5,
    )
    if len(passages) > MOST_PASSAGES:
        raise LimitExceeded(f"the document has more than {MOST_PASSAGES:,} passages: split it", "passages")
    return [replace(passage, document_title=parsed.title or "") for passage in passages]


class Cutter:
    """Cuts documents beside an event loop."""

    def __init__(self, split: Split) -> None:
        self._split = split

    async def cut(self, parsed: ParsedDocument, document: Document, shelf: Shelf) -> list[Passage]:
        """Return the passages that an index version wants, in order."""
        return await asyncio.to_thread(self._cut, parsed, document, shelf)

    def _cut(self, parsed: ParsedDocument, document: Document, shelf: Shelf) -> list[Passage]:
        with giving_way:
            return cut(
                self._split,
                parsed,
                passage_tokens=shelf.schema.passage_tokens,
                count_tokens=shelf.embedder.count_tokens,
                document_id=document.id,
                document_version=document.version,
                document_name=document.name,
            )
