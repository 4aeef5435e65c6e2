"""A file becomes a document: parsed, split, embedded, and put in place of what there was.

The main rule: one document's changes happen one after the other, and each is seen whole or not at all. What else is to
be written with a change (that a job has done it) is a note, written in the same transaction.
"""

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol
from uuid import UUID, uuid5
from weakref import WeakValueDictionary

from retrieval.documents import Document, Ingested, ParsedDocument, Passage, Scope
from retrieval.embedder import Embedder
from retrieval.errors import DocumentOwned
from retrieval.library import Library
from retrieval.parsers import media_type_of
from retrieval.splitting import CountTokens
from retrieval.store import DocumentStore, Note

_DOCUMENT_IDS = UUID("8f0f6c52-6f7e-5d0a-9a53-2c8f0a2f4c11")
_CONCURRENT_INGESTS = 2

Stage = Literal["parsing", "splitting", "embedding", "writing"]
Tell = Callable[[Stage, int, int], None]
"""Is told the stage of a document, and how many of its passages are embedded, of how many."""
NoteIngested = Callable[[sqlite3.Connection, Ingested], None]


class Parser(Protocol):
    """What reads a file: `retrieval.parsers.Parser`, or a test's stand-in."""

    async def parse(self, content: bytes, *, name: str, media_type: str | None = None) -> ParsedDocument:
        """Return the text and structure of a file."""
        ...


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


def document_id_of(tenant: str, name: str) -> str:
    """The id of the document that goes by this name."""
    return str(uuid5(_DOCUMENT_IDS, f"{tenant}\0{name}"))


def version_of(content: bytes) -> str:
    """The version that these bytes are: their SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def is_same(old: Document, new: Document) -> bool:
    """Whether ingesting `new` in place of `old` would change nothing that anybody finds."""

    def facts(document: Document) -> tuple[Any, ...]:
        return document.version, document.name, document.media_type, document.index_version, document.metadata

    return facts(old) == facts(new)


class Ingester:
    """Adds and deletes documents; `version` gives the index version that answers, or raises while none does."""

    def __init__(
        self,
        store: DocumentStore,
        library: Library,
        *,
        embedder: Embedder,
        parser: Parser,
        split: Split,
        passage_tokens: int,
        version: Callable[[], str],
    ) -> None:
        self._store = store
        self._library = library
        self._embedder = embedder
        self._parser = parser
        self._split = split
        self._passage_tokens = passage_tokens
        self._version = version
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._places = asyncio.Semaphore(_CONCURRENT_INGESTS)

    def check(self) -> None:
        """Raise IndexUnavailable while there is no index."""
        self._version()

    def draft(
        self,
        scope: Scope,
        *,
        name: str,
        content: bytes,
        version: str,
        media_type: str | None,
        metadata: dict[str, Any] | None,
        document_id: str | None = None,
    ) -> Document:
        """What a file would be as a document, before anybody has looked into it.

        Raises:
            UnsupportedType: Nothing reads files of this type.
            IndexUnavailable: There is no index at present.
        """
        now = datetime.now(UTC)
        return Document(
            id=document_id or document_id_of(scope.tenant, name),
            tenant=scope.tenant,
            name=name,
            version=version,
            media_type=media_type_of(content, name=name, media_type=media_type),
            title="",
            length=0,
            size_bytes=len(content),
            passages=0,
            pages=0,
            index_version=self._version(),
            metadata=metadata or {},
            created_at=now,
            updated_at=now,
        )

    async def add(
        self,
        scope: Scope,
        *,
        name: str,
        content: bytes,
        media_type: str | None = None,
        document_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        source: str = "",
        note: NoteIngested | None = None,
        tell: Tell | None = None,
    ) -> Ingested:
        """Ingest a file; the same id, or without one the same name, again replaces it in one step.

        Same bytes, name and metadata change nothing. Of a changed document only changed passages are embedded. A
        document that came without a source may be taken over by one.

        Raises:
            UnreadableDocument: The file cannot be turned into text.
            DocumentOwned: The document is of another source.
            IndexUnavailable: The index, the embedder or the store does not answer; nothing was changed.
        """
        tell = tell or _tell_nobody
        version = await asyncio.to_thread(version_of, content)
        facts = {"name": name, "media_type": media_type, "metadata": metadata, "document_id": document_id}
        document = self.draft(scope, content=content, version=version, **facts)  # type: ignore[arg-type]
        async with self._lock(scope.tenant, document.id):
            old = await self._store.find(scope.tenant, document.id)
            if old and source and old.document.source not in ("", source):
                raise DocumentOwned(
                    f"Document {name!r} belongs to the source {old.document.source!r}, not to {source!r}: "
                    "give it another name, or delete it first."
                )
            if old:
                its = source or old.document.source
                document = replace(document, created_at=old.document.created_at, source=its)
                if is_same(old.document, document):
                    unchanged = Ingested(replace(old.document, source=its), "unchanged")
                    if note or its != old.document.source:
                        await self._store.keep(old.document, source=its, note=_of(note, unchanged))
                    return unchanged
            else:
                document = replace(document, source=source)
            async with self._places:
                tell("parsing", 0, 0)
                parsed = await self._parser.parse(content, name=name, media_type=media_type)
                tell("splitting", 0, 0)
                passages = await asyncio.to_thread(self._cut, parsed, document)
                document = replace(
                    document,
                    title=parsed.title or "",
                    length=len(parsed.text),
                    passages=len(passages),
                    pages=len(parsed.pages),
                )
                outcome: Literal["created", "replaced"] = "replaced" if old else "created"
                embedded = await self._library.put(
                    document,
                    parsed.text,
                    passages,
                    old,
                    note=lambda embedded: _of(note, Ingested(document, outcome, embedded)),
                    tell=lambda done: tell("writing" if done == len(passages) else "embedding", done, len(passages)),
                )
            return Ingested(document, outcome, embedded)

    async def delete(self, scope: Scope, document_id: str, *, note: Note | None = None) -> None:
        """Delete a document; from the return on nothing finds it, and a tombstone says when it went.

        Raises:
            DocumentNotFound: The tenant has no such document.
            IndexUnavailable: The index does not answer; nothing was changed.
        """
        self._version()
        async with self._lock(scope.tenant, document_id):
            await self._library.remove(scope.tenant, document_id, note=note)

    def _cut(self, parsed: ParsedDocument, document: Document) -> list[Passage]:
        passages = self._split(
            parsed,
            document_id=document.id,
            document_version=document.version,
            document_name=document.name,
            count_tokens=self._embedder.count_tokens,
            target_tokens=self._passage_tokens,
            max_tokens=self._passage_tokens * 6 // 5,
        )
        return [replace(passage, document_title=parsed.title or "") for passage in passages]

    def _lock(self, tenant: str, document_id: str) -> asyncio.Lock:
        """One document's writes happen one after the other."""
        return self._locks.setdefault((tenant, document_id), asyncio.Lock())


def _tell_nobody(stage: Stage, done: int, passages: int) -> None:
    """Nobody wants to know."""


def _of(note: NoteIngested | None, ingested: Ingested) -> Note | None:
    return (lambda connection: note(connection, ingested)) if note else None
