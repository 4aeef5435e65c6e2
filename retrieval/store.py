"""What was ingested: documents, their source text and their passages, in one SQLite file.

The main rule: the store is the truth and the index follows it. A document is replaced or deleted in one transaction,
which is the moment its new passages appear and its old ones vanish for everyone. A *generation* numbers each written
version; points of a generation that the store does not hold count for nothing. A *cut* is a generation as the passages
of one index version, which `retrieval.versions` keeps a list of; without the number of one, the live one is meant.
"""

import asyncio
import json
import sqlite3
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from retrieval.documents import Document, ParsedDocument, Passage, Scope
from retrieval.errors import DocumentNotFound
from retrieval.scoping import visible
from retrieval.sqlite_file import SqliteFile, fetch, transaction
from retrieval.store_tables import MIGRATIONS

Cuts = Mapping[int, int]
"""How many passages a generation had in each index version, by the number of that."""
Note = Callable[[sqlite3.Connection], None]
"""What else is written in the transaction that a change of a document is made in."""

_LIVE = "coalesce((SELECT number FROM index_versions WHERE state = 'live'), 1)"
"""The number of the live index version: what is asked without one is asked of it."""
_PASSAGES = f"SELECT * FROM passage_rows WHERE generation = ? AND index_number = coalesce(?, {_LIVE})"  # noqa: S608
_GENERATIONS = (
    "SELECT d.generation, d.tenant, d.id, c.passages, d.for_groups FROM documents d"  # noqa: S608 - our own words.
    f" JOIN cuts c ON c.generation = d.generation AND c.index_number = coalesce(?, {_LIVE})"
)


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document and the generation its passages are numbered by."""

    document: Document
    generation: int


class Generation(NamedTuple):
    """Whose document a generation is of, and how many passages it has."""

    tenant: str
    id: str
    passages: int
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of a deleted document."""

    tenant: str
    id: str
    version: str
    deleted_at: datetime


class DocumentStore:
    """The SQLite file, with one writing thread and a few reading ones; one process owns it."""

    def __init__(self, path: Path, *, readers: int = 2) -> None:
        self.store_id = ""
        self.file = SqliteFile(path, MIGRATIONS, readers=readers)

    async def open(self) -> None:
        """Take ownership, and make or migrate the file.

        Raises:
            IndexUnavailable: Another process owns the store, or the file cannot be used.
        """
        await self.file.open()
        try:
            self.store_id = await self.file.write(_store_id)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the file and give up ownership; closing twice is fine."""
        await self.file.close()

    async def generations(self, index_number: int | None = None) -> dict[int, Generation]:
        """Every generation that is cut for an index version, of all tenants."""
        rows = await self.file.read(fetch, _GENERATIONS, (index_number,))
        return {
            number: Generation(tenant, id_, passages, tuple(json.loads(groups)))
            for number, tenant, id_, passages, groups in rows
        }

    async def find(self, scope: Scope, document_id: str) -> StoredDocument | None:
        """Get a document, or None where the scope sees none of that id."""
        return await self.file.read(_find, scope, document_id)

    async def documents(self, scope: Scope, *, limit: int, after: str | None) -> list[Document]:
        """List the documents that the scope sees by id, from the one after `after`."""
        condition, parameters = visible(scope)
        rows = await self.file.read(
            fetch,
            f"SELECT * FROM documents WHERE {condition} AND id > :after ORDER BY id LIMIT :limit",  # noqa: S608
            {**parameters, "after": after or "", "limit": limit},
        )
        return [stored_document(row).document for row in rows]

    async def passages(self, generation: int, index_number: int | None = None) -> list[Passage]:
        """All passages of a generation, in order; none when it is gone."""
        rows = await self.file.read(fetch, f"{_PASSAGES} ORDER BY n", (generation, index_number))
        return [_passage(row) for row in rows]

    async def passages_of(
        self, keys: Sequence[tuple[int, int]], index_number: int | None = None
    ) -> dict[tuple[int, int], Passage]:
        """The passages of these (generation, n) keys that exist, as of one moment."""
        return await self.file.read(_passages_of, keys, index_number)

    async def source(self, generation: int) -> str | None:
        """The source text of a generation, or None when it is gone."""
        rows = await self.file.read(fetch, "SELECT text_zlib FROM sources WHERE generation = ?", (generation,))
        return str(await asyncio.to_thread(zlib.decompress, rows[0][0]), "utf-8") if rows else None

    async def parsed(self, generation: int) -> ParsedDocument | None:
        """A generation as it was parsed; None when it is gone, or was ingested before its structure was kept."""
        query = "SELECT text_zlib, structure_zlib FROM sources WHERE generation = ?"
        for text, structure in await self.file.read(fetch, query, (generation,)):
            return await asyncio.to_thread(_unpacked, text, structure) if structure else None
        return None

    async def put(
        self,
        stored: StoredDocument,
        parsed: ParsedDocument,
        passages: Sequence[Passage],
        *,
        index_number: int = 1,
        note: Note | None = None,
    ) -> Cuts:
        """Write a document's new generation, cut for an index version, and drop its old one, in one transaction.

        Gives how the old one was cut.
        """
        packed = await asyncio.to_thread(_packed, parsed)
        return await self.file.write(_put, stored, packed, passages, index_number, note)

    async def keep(self, document: Document, *, source: str, note: Note | None = None) -> None:
        """Leave a document as it is, but for whose it is."""
        await self.file.write(_keep, document, source, note)

    async def remove(self, scope: Scope, document_id: str, *, note: Note | None = None) -> tuple[StoredDocument, Cuts]:
        """Delete a document's content in one durable transaction, and leave a tombstone; gives how it was cut.

        Raises:
            DocumentNotFound: The scope sees no such document.
        """
        return await self.file.write(_remove, scope, document_id, note)

    async def tombstones(self, tenant: str) -> list[Tombstone]:
        """The tenant's deletions, oldest first."""
        rows = await self.file.read(
            fetch, "SELECT tenant, id, version, deleted_at FROM tombstones WHERE tenant = ? ORDER BY rowid", (tenant,)
        )
        return [Tombstone(tenant, id_, version, datetime.fromisoformat(at)) for tenant, id_, version, at in rows]


def _packed(parsed: ParsedDocument) -> tuple[bytes, bytes]:
    structure = msgspec.msgpack.encode(replace(parsed, text=""))
    return zlib.compress(parsed.text.encode(), 6), zlib.compress(structure, 6)


def _unpacked(text: bytes, structure: bytes) -> ParsedDocument:
    parsed = msgspec.msgpack.decode(zlib.decompress(structure), type=ParsedDocument)
    return replace(parsed, text=str(zlib.decompress(text), "utf-8"))


def _passages_of(
    connection: sqlite3.Connection, keys: Sequence[tuple[int, int]], index_number: int | None
) -> dict[tuple[int, int], Passage]:
    if not keys:
        return {}
    wanted = ", ".join(["(?, ?)"] * len(keys))
    query = (
        f"WITH wanted (generation, n) AS (VALUES {wanted})"  # noqa: S608 - marks alone.
        " SELECT found.* FROM wanted CROSS JOIN passage_rows AS found USING (generation, n)"
        f" WHERE index_number = coalesce(?, {_LIVE})"
    )
    found = {
        (row[0], row[1]): _passage(row) for row in fetch(connection, query, (*chain.from_iterable(keys), index_number))
    }
    return {key: found[key] for key in keys if key in found}


def _store_id(connection: sqlite3.Connection) -> str:
    connection.execute("INSERT OR IGNORE INTO facts VALUES ('store_id', ?)", (str(uuid4()),))
    return str(connection.execute("SELECT value FROM facts WHERE name = 'store_id'").fetchone()[0])


def _put(
    connection: sqlite3.Connection,
    stored: StoredDocument,
    packed: tuple[bytes, bytes],
    passages: Sequence[Passage],
    index_number: int,
    note: Note | None,
) -> Cuts:
    document, generation = stored.document, stored.generation
    with transaction(connection):
        _, cuts = _drop(connection, Scope.whole(document.tenant), document.id)
        connection.execute(
            "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _document_row(stored)
        )
        connection.execute("INSERT INTO sources VALUES (?, ?, ?)", (generation, *packed))
        insert_passages(connection, index_number, generation, passages)
        if note:
            note(connection)
    return cuts


def insert_passages(
    connection: sqlite3.Connection, index_number: int, generation: int, passages: Sequence[Passage]
) -> None:
    """Write inside a transaction how a generation is cut for an index version."""
    connection.execute("INSERT INTO cuts VALUES (?, ?, ?)", (index_number, generation, len(passages)))
    connection.executemany(
        "INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        ((generation, index_number, p.n, p.text, p.start, p.end, p.page, json.dumps(p.heading_path)) for p in passages),
    )


def _keep(connection: sqlite3.Connection, document: Document, source: str, note: Note | None) -> None:
    with transaction(connection):
        if source != document.source:
            connection.execute(
                "UPDATE documents SET source = ? WHERE tenant = ? AND id = ?", (source, document.tenant, document.id)
            )
        if note:
            note(connection)


def _remove(
    connection: sqlite3.Connection, scope: Scope, document_id: str, note: Note | None
) -> tuple[StoredDocument, Cuts]:
    with transaction(connection):
        stored, cuts = _drop(connection, scope, document_id)
        if stored is None:
            raise DocumentNotFound(f"There is no document {document_id!r}.")
        connection.execute(
            "INSERT INTO tombstones VALUES (?, ?, ?, ?)",
            (scope.tenant, document_id, stored.document.version, datetime.now(UTC).isoformat()),
        )
        connection.execute("DELETE FROM origins WHERE tenant = ? AND document_id = ?", (scope.tenant, document_id))
        if note:
            note(connection)
    return stored, cuts


def find_document(connection: sqlite3.Connection, scope: Scope, document_id: str) -> Document | None:
    """A document as of a transaction; None where the scope sees none of that id."""
    stored = _find(connection, scope, document_id)
    return stored.document if stored else None


def _find(connection: sqlite3.Connection, scope: Scope, document_id: str) -> StoredDocument | None:
    condition, parameters = visible(scope)
    query = f"SELECT * FROM documents WHERE {condition} AND id = :id"  # noqa: S608
    rows = fetch(connection, query, {**parameters, "id": document_id})
    return stored_document(rows[0]) if rows else None


def _drop(connection: sqlite3.Connection, scope: Scope, document_id: str) -> tuple[StoredDocument | None, Cuts]:
    stored = _find(connection, scope, document_id)
    if stored is None:
        return None, {}
    query = "SELECT index_number, passages FROM cuts WHERE generation = ?"
    cuts = dict(fetch(connection, query, (stored.generation,)))
    connection.execute("DELETE FROM cuts WHERE generation = ?", (stored.generation,))
    connection.execute("DELETE FROM passages WHERE generation = ?", (stored.generation,))
    connection.execute("DELETE FROM sources WHERE generation = ?", (stored.generation,))
    connection.execute("DELETE FROM documents WHERE generation = ?", (stored.generation,))
    return stored, cuts


def _document_row(stored: StoredDocument) -> tuple[Any, ...]:
    d = stored.document
    facts = (d.id, d.tenant, d.name, d.version, d.media_type, d.title, d.length, d.size_bytes, d.passages, d.pages)
    moments = (d.created_at.isoformat(), d.updated_at.isoformat())
    return (
        stored.generation,
        *facts,
        d.index_version,
        json.dumps(d.metadata),
        *moments,
        d.source,
        json.dumps(d.groups),
    )


def stored_document(row: tuple[Any, ...]) -> StoredDocument:
    """A row of `documents`."""
    generation, *facts, metadata, created_at, updated_at, source, groups = row
    moments = (datetime.fromisoformat(created_at), datetime.fromisoformat(updated_at))
    values: list[Any] = [*facts, json.loads(metadata), *moments, source, tuple(json.loads(groups))]
    return StoredDocument(Document(*values), generation)


def _passage(row: tuple[Any, ...]) -> Passage:
    _, n, document_id, version, text, start, end, page, heading_path, name, title, _ = row
    return Passage(document_id, version, n, text, start, end, page, tuple(json.loads(heading_path)), name, title)
