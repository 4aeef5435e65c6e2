"""A file becomes a document: parsed, split, embedded, and put in place of what there was.

The main rule: one document's changes happen one after the other, and each is seen whole or not at all. What else is to
be written with a change (that a job has done it) is a note, written in the same transaction.
"""

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol
from uuid import UUID, uuid5
from weakref import WeakValueDictionary

from retrieval.cutting import Cutter
from retrieval.documents import Document, Ingested, ParsedDocument, Scope
from retrieval.errors import DocumentOwned
from retrieval.index import Vector
from retrieval.library import Library, LiveVersionChanged, Shelf
from retrieval.parsers import media_type_of
from retrieval.preparing import Prepared
from retrieval.scoping import may_see
from retrieval.store import DocumentStore, Note, StoredDocument

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


def document_id_of(tenant: str, name: str) -> str:
    """The id of the document that goes by this name."""
    return str(uuid5(_DOCUMENT_IDS, f"{tenant}\0{name}"))


def version_of(content: bytes) -> str:
    """The version that these bytes are: their SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def is_same(old: Document, new: Document) -> bool:
    """Whether ingesting `new` in place of `old` would change nothing that anybody finds."""

    def facts(document: Document) -> tuple[Any, ...]:
        its = document.version, document.name, document.media_type, document.index_version, document.metadata
        return *its, frozenset(document.groups)

    return facts(old) == facts(new)


def require_visible(scope: Scope, name: str, groups: Sequence[str]) -> None:
    """Raise DocumentOwned where a name is taken by a document of the tenant that the scope does not see."""
    if not may_see(scope, scope.tenant, groups):
        raise DocumentOwned(f"The name {name!r} is taken by a document that is for others: give it another name.")


class Ingester:
    """Adds and deletes documents; `live` gives the index version that answers, or raises while none does."""

    def __init__(
        self,
        store: DocumentStore,
        library: Library,
        *,
        parser: Parser,
        cutter: Cutter,
        live: Callable[[], Shelf],
    ) -> None:
        self._store = store
        self._library = library
        self._parser = parser
        self._cutter = cutter
        self._live = live
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._places = asyncio.Semaphore(_CONCURRENT_INGESTS)

    def check(self) -> None:
        """Raise IndexUnavailable while there is no index."""
        self._live()

    def draft(
        self,
        scope: Scope,
        *,
        name: str,
        content: bytes | Prepared,
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
        its_type, size_bytes = (
            (content.media_type, content.size_bytes)
            if isinstance(content, Prepared)
            else (media_type_of(content, name=name, media_type=media_type), len(content))
        )
        return Document(
            id=document_id or document_id_of(scope.tenant, name),
            tenant=scope.tenant,
            name=name,
            version=version,
            media_type=its_type,
            title="",
            length=0,
            size_bytes=size_bytes,
            passages=0,
            pages=0,
            index_version=self._live().id,
            metadata=metadata or {},
            created_at=now,
            updated_at=now,
        )

    async def add(
        self,
        scope: Scope,
        *,
        name: str,
        content: bytes | Prepared,
        media_type: str | None = None,
        document_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        groups: Sequence[str] | None = None,
        source: str = "",
        note: NoteIngested | None = None,
        tell: Tell | None = None,
    ) -> Ingested:
        """Ingest a file; the same id, or without one the same name, again replaces it in one step.

        One that was prepared elsewhere for the live index version is neither parsed, cut nor embedded here.

        Same bytes, name, metadata and groups change nothing. Of a changed document only changed passages are embedded.
        A document that came without a source may be taken over by one. Without `groups` it is for whom the one was that
        it replaces, and a new one for all of the tenant; without `metadata` it keeps what that one had.

        Raises:
            UnreadableDocument: The file cannot be turned into text, or was prepared by another model than the index's.
            DocumentOwned: The document is of another source, or the scope does not see it.
            IndexUnavailable: The index, the embedder or the store does not answer; nothing was changed.
        """
        tell = tell or _tell_nobody
        prepared = content if isinstance(content, Prepared) else None
        version = content.version if isinstance(content, Prepared) else await asyncio.to_thread(version_of, content)
        facts = {"name": name, "media_type": media_type, "metadata": metadata, "document_id": document_id}
        document = self.draft(scope, content=content, version=version, **facts)  # type: ignore[arg-type]
        async with self._lock(scope.tenant, document.id):
            old = await self._store.find(Scope.whole(scope.tenant), document.id)
            if old:
                require_visible(scope, name, old.document.groups)
            its_groups = groups if groups is not None else old.document.groups if old else ()
            document = replace(document, groups=tuple(its_groups))
            if old and source and old.document.source not in ("", source):
                raise DocumentOwned(
                    f"Document {name!r} belongs to the source {old.document.source!r}, not to {source!r}: "
                    "give it another name, or delete it first."
                )
            if old:
                its = source or old.document.source
                its_facts = old.document.metadata if metadata is None else metadata
                document = replace(document, created_at=old.document.created_at, source=its, metadata=its_facts)
                if is_same(old.document, document):
                    unchanged = Ingested(replace(old.document, source=its), "unchanged")
                    if note or its != old.document.source:
                        await self._store.keep(old.document, source=its, note=_of(note, unchanged))
                    return unchanged
            else:
                document = replace(document, source=source)
            async with self._places:
                if isinstance(content, Prepared):
                    parsed = content.parsed
                else:
                    tell("parsing", 0, 0)
                    parsed = await self._parser.parse(content, name=name, media_type=media_type)
                title, length = parsed.title or "", len(parsed.text)
                document = replace(document, title=title, length=length, pages=len(parsed.pages))
                while True:
                    with suppress(LiveVersionChanged):
                        return await self._put(document, parsed, old, note, tell, prepared)

    async def _put(
        self,
        document: Document,
        parsed: ParsedDocument,
        old: StoredDocument | None,
        note: NoteIngested | None,
        tell: Tell,
        prepared: Prepared | None,
    ) -> Ingested:
        """Cut a document for the live index version, and put it in place; raises LiveVersionChanged."""
        shelf = self._live()
        given: dict[str, Vector] = {}
        if prepared and prepared.index_version == shelf.id:
            await prepared.check(shelf.embedder)
            passages = prepared.passages(document.id, document.name)
            given = prepared.vectors_of(passages)
        else:
            tell("splitting", 0, 0)
            passages = await self._cutter.cut(parsed, document, shelf)
        document = replace(document, passages=len(passages), index_version=shelf.id)
        outcome: Literal["created", "replaced"] = "replaced" if old else "created"
        embedded = await self._library.put(
            shelf,
            document,
            parsed,
            passages,
            old,
            given=given,
            note=lambda embedded: _of(note, Ingested(document, outcome, embedded)),
            tell=lambda done: tell("writing" if done == len(passages) else "embedding", done, len(passages)),
        )
        return Ingested(document, outcome, embedded)

    async def delete(self, scope: Scope, document_id: str, *, note: Note | None = None) -> None:
        """Delete a document; from the return on nothing finds it, and a tombstone says when it went.

        Raises:
            DocumentNotFound: The scope sees no such document.
            IndexUnavailable: The index does not answer; nothing was changed.
        """
        self._live()
        async with self._lock(scope.tenant, document_id):
            await self._library.remove(scope, document_id, note=note)

    def _lock(self, tenant: str, document_id: str) -> asyncio.Lock:
        """One document's writes happen one after the other."""
        return self._locks.setdefault((tenant, document_id), asyncio.Lock())


def _tell_nobody(stage: Stage, done: int, passages: int) -> None:
    """Nobody wants to know."""


def _of(note: NoteIngested | None, ingested: Ingested) -> Note | None:
    return (lambda connection: note(connection, ingested)) if note else None
