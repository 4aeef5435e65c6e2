"""What was ingested: documents, their source text and their passages, in one SQLite file.

The main rule: the store is the truth and the index follows it. A document is replaced or deleted in one transaction,
which is the moment its new passages appear and its old ones vanish for everyone. A *generation* numbers each written
version; points of a generation that the store does not hold count for nothing.
"""

import asyncio
import json
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from retrieval.documents import Document, Passage
from retrieval.errors import DocumentNotFound
from retrieval.sqlite_file import SqliteFile, fetch, transaction

Note = Callable[[sqlite3.Connection], None]
"""What else is written in the transaction that a change of a document is made in."""

_MIGRATIONS = (
    """
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE documents (
        generation INTEGER PRIMARY KEY,
        id TEXT NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL, version TEXT NOT NULL, media_type TEXT NOT NULL,
        title TEXT NOT NULL, length INTEGER NOT NULL, size_bytes INTEGER NOT NULL, passages INTEGER NOT NULL,
        pages INTEGER NOT NULL, index_version TEXT NOT NULL, metadata TEXT NOT NULL,
        created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
        UNIQUE (tenant, id)
    );
    CREATE TABLE sources (generation INTEGER PRIMARY KEY, text_zlib BLOB NOT NULL);
    CREATE TABLE passages (
        generation INTEGER NOT NULL, n INTEGER NOT NULL, text TEXT NOT NULL, start INTEGER NOT NULL,
        "end" INTEGER NOT NULL, page INTEGER, heading_path TEXT NOT NULL,
        PRIMARY KEY (generation, n)
    ) WITHOUT ROWID;
    CREATE VIEW passage_rows AS
        SELECT p.generation, p.n, d.id, d.version, p.text, p.start, p."end", p.page, p.heading_path, d.name, d.title
        FROM passages p JOIN documents d ON d.generation = p.generation;
    CREATE TABLE tombstones (
        tenant TEXT NOT NULL, id TEXT NOT NULL, version TEXT NOT NULL, deleted_at TEXT NOT NULL
    );
    CREATE INDEX tombstones_of ON tombstones (tenant, id);
    """,
    """
    ALTER TABLE documents ADD COLUMN source TEXT NOT NULL DEFAULT '';
    CREATE INDEX documents_of_source ON documents (tenant, source) WHERE source != '';
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, kind TEXT NOT NULL, source TEXT NOT NULL,
        created_by TEXT NOT NULL, state TEXT NOT NULL, unchanged INTEGER NOT NULL,
        files_left INTEGER NOT NULL, deletions_left INTEGER NOT NULL, failed INTEGER NOT NULL,
        created_at TEXT NOT NULL, touched_at TEXT NOT NULL, finished_at TEXT
    );
    CREATE INDEX jobs_of ON jobs (tenant, number);
    CREATE INDEX jobs_open ON jobs (number) WHERE finished_at IS NULL;
    CREATE TABLE job_items (
        job INTEGER NOT NULL, n INTEGER NOT NULL,
        tenant TEXT NOT NULL, action TEXT NOT NULL, name TEXT NOT NULL, document_id TEXT NOT NULL,
        version TEXT NOT NULL, media_type TEXT, metadata TEXT NOT NULL, size_bytes INTEGER NOT NULL, spool TEXT,
        state TEXT NOT NULL, outcome TEXT, embedded INTEGER NOT NULL, reused INTEGER NOT NULL,
        error TEXT, message TEXT, attempts INTEGER NOT NULL, finished_at TEXT,
        PRIMARY KEY (job, n)
    ) WITHOUT ROWID;
    CREATE INDEX job_items_waiting ON job_items (n, job) WHERE state = 'waiting';
    CREATE INDEX job_items_open ON job_items (tenant, document_id) WHERE state IN ('waiting', 'running');
    CREATE INDEX job_items_named ON job_items (job, name);
    CREATE TABLE failures (
        tenant TEXT NOT NULL, document_id TEXT NOT NULL, name TEXT NOT NULL, source TEXT NOT NULL,
        version TEXT NOT NULL, error TEXT NOT NULL, message TEXT NOT NULL, job_id TEXT NOT NULL,
        failed_at TEXT NOT NULL,
        PRIMARY KEY (tenant, document_id)
    ) WITHOUT ROWID;
    """,
)
_FIND = "SELECT * FROM documents WHERE tenant = ? AND id = ?"


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document and the generation its passages are numbered by."""

    document: Document
    generation: int


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
        self.file = SqliteFile(path, _MIGRATIONS, readers=readers)

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

    async def generations(self) -> dict[int, tuple[str, str, int]]:
        """Every generation: its tenant, document id and number of passages."""
        rows = await self.file.read(fetch, "SELECT generation, tenant, id, passages FROM documents", ())
        return {generation: (tenant, id_, passages) for generation, tenant, id_, passages in rows}

    async def find(self, tenant: str, document_id: str) -> StoredDocument | None:
        """Get a document, or None where the tenant has none of that id."""
        rows = await self.file.read(fetch, _FIND, (tenant, document_id))
        return _stored_document(rows[0]) if rows else None

    async def documents(self, tenant: str, *, limit: int, after: str | None) -> list[Document]:
        """List a tenant's documents by id, from the one after `after`."""
        rows = await self.file.read(
            fetch,
            "SELECT * FROM documents WHERE tenant = ? AND id > ? ORDER BY id LIMIT ?",
            (tenant, after or "", limit),
        )
        return [_stored_document(row).document for row in rows]

    async def passages(self, generation: int) -> list[Passage]:
        """All passages of a generation, in order; none when it is gone."""
        rows = await self.file.read(fetch, "SELECT * FROM passage_rows WHERE generation = ? ORDER BY n", (generation,))
        return [_passage(row) for row in rows]

    async def passages_of(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Passage]:
        """The passages of these (generation, n) keys that exist, as of one moment."""
        return await self.file.read(_passages_of, keys)

    async def source(self, generation: int) -> str | None:
        """The source text of a generation, or None when it is gone."""
        rows = await self.file.read(fetch, "SELECT text_zlib FROM sources WHERE generation = ?", (generation,))
        return str(await asyncio.to_thread(zlib.decompress, rows[0][0]), "utf-8") if rows else None

    async def put(
        self, stored: StoredDocument, source: str, passages: Sequence[Passage], *, note: Note | None = None
    ) -> None:
        """Write a document's new generation and drop its old one, in one durable transaction."""
        await self.file.write(_put, stored, source, passages, note)

    async def keep(self, document: Document, *, source: str, note: Note | None = None) -> None:
        """Leave a document as it is, but for whose it is."""
        await self.file.write(_keep, document, source, note)

    async def remove(self, tenant: str, document_id: str, *, note: Note | None = None) -> StoredDocument:
        """Delete a document's content in one durable transaction, and leave a tombstone.

        Raises:
            DocumentNotFound: The tenant has no such document.
        """
        return await self.file.write(_remove, tenant, document_id, note)

    async def tombstones(self, tenant: str) -> list[Tombstone]:
        """The tenant's deletions, oldest first."""
        rows = await self.file.read(
            fetch, "SELECT tenant, id, version, deleted_at FROM tombstones WHERE tenant = ? ORDER BY rowid", (tenant,)
        )
        return [Tombstone(tenant, id_, version, datetime.fromisoformat(at)) for tenant, id_, version, at in rows]


def _passages_of(connection: sqlite3.Connection, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Passage]:
    query = "SELECT * FROM passage_rows WHERE generation = ? AND n = ?"
    with transaction(connection, "DEFERRED"):
        rows = ((key, connection.execute(query, key).fetchone()) for key in keys)
        return {key: _passage(row) for key, row in rows if row}


def _store_id(connection: sqlite3.Connection) -> str:
    connection.execute("INSERT OR IGNORE INTO facts VALUES ('store_id', ?)", (str(uuid4()),))
    return str(connection.execute("SELECT value FROM facts WHERE name = 'store_id'").fetchone()[0])


def _put(
    connection: sqlite3.Connection, stored: StoredDocument, source: str, passages: Sequence[Passage], note: Note | None
) -> None:
    document, generation = stored.document, stored.generation
    compressed = zlib.compress(source.encode(), 6)
    with transaction(connection):
        _drop(connection, document.tenant, document.id)
        connection.execute(
            "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _document_row(stored)
        )
        connection.execute("INSERT INTO sources VALUES (?, ?)", (generation, compressed))
        connection.executemany(
            "INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((generation, p.n, p.text, p.start, p.end, p.page, json.dumps(p.heading_path)) for p in passages),
        )
        if note:
            note(connection)


def _keep(connection: sqlite3.Connection, document: Document, source: str, note: Note | None) -> None:
    with transaction(connection):
        if source != document.source:
            connection.execute(
                "UPDATE documents SET source = ? WHERE tenant = ? AND id = ?", (source, document.tenant, document.id)
            )
        if note:
            note(connection)


def _remove(connection: sqlite3.Connection, tenant: str, document_id: str, note: Note | None) -> StoredDocument:
    with transaction(connection):
        stored = _drop(connection, tenant, document_id)
        if stored is None:
            raise DocumentNotFound(f"There is no document {document_id!r}.")
        connection.execute(
            "INSERT INTO tombstones VALUES (?, ?, ?, ?)",
            (tenant, document_id, stored.document.version, datetime.now(UTC).isoformat()),
        )
        if note:
            note(connection)
    return stored


def find_document(connection: sqlite3.Connection, tenant: str, document_id: str) -> Document | None:
    """A document as of a transaction; None where the tenant has none of that id."""
    rows = fetch(connection, _FIND, (tenant, document_id))
    return _stored_document(rows[0]).document if rows else None


def _drop(connection: sqlite3.Connection, tenant: str, document_id: str) -> StoredDocument | None:
    rows = fetch(connection, _FIND, (tenant, document_id))
    if not rows:
        return None
    stored = _stored_document(rows[0])
    connection.execute("DELETE FROM passages WHERE generation = ?", (stored.generation,))
    connection.execute("DELETE FROM sources WHERE generation = ?", (stored.generation,))
    connection.execute("DELETE FROM documents WHERE generation = ?", (stored.generation,))
    return stored


def _document_row(stored: StoredDocument) -> tuple[Any, ...]:
    d = stored.document
    facts = (d.id, d.tenant, d.name, d.version, d.media_type, d.title, d.length, d.size_bytes, d.passages, d.pages)
    moments = (d.created_at.isoformat(), d.updated_at.isoformat())
    return (stored.generation, *facts, d.index_version, json.dumps(d.metadata), *moments, d.source)


def _stored_document(row: tuple[Any, ...]) -> StoredDocument:
    generation, *facts, metadata, created_at, updated_at, source = row
    moments = (datetime.fromisoformat(created_at), datetime.fromisoformat(updated_at))
    values: list[Any] = [*facts, json.loads(metadata), *moments, source]
    return StoredDocument(Document(*values), generation)


def _passage(row: tuple[Any, ...]) -> Passage:
    _, n, document_id, version, text, start, end, page, heading_path, name, title = row
    return Passage(document_id, version, n, text, start, end, page, tuple(json.loads(heading_path)), name, title)
