"""What was ingested: documents, their source text and their passages, in one SQLite file.

The main rule: the store is the truth and the index follows it. A document is replaced or deleted in one transaction,
which is the moment its new passages appear and its old ones vanish for everyone. A *generation* numbers each written
version; points of a generation that the store does not hold count for nothing.
"""

import asyncio
import json
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from retrieval.documents import Document, Passage
from retrieval.errors import DocumentNotFound, IndexUnavailable

_T = TypeVar("_T")

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
        self._path = path
        self._readers = readers
        self._connections: list[sqlite3.Connection] = []
        self._of_thread = threading.local()
        self._writer_pool: ThreadPoolExecutor | None = None
        self._reader_pool: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Take ownership, and make or migrate the file.

        Raises:
            IndexUnavailable: Another process owns the store, or the file cannot be used.
        """
        self._writer_pool = ThreadPoolExecutor(1, thread_name_prefix="documents-writer")
        self._reader_pool = ThreadPoolExecutor(self._readers, thread_name_prefix="documents-reader")
        try:
            await self._write(self._open)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the file and give up ownership; closing twice is fine."""
        pools = [pool for pool in (self._writer_pool, self._reader_pool) if pool]
        self._writer_pool = self._reader_pool = None
        await asyncio.to_thread(_close, pools, self._connections)

    async def generations(self) -> dict[int, tuple[str, str, int]]:
        """Every generation: its tenant, document id and number of passages."""
        rows = await self._read(_fetch, "SELECT generation, tenant, id, passages FROM documents", ())
        return {generation: (tenant, id_, passages) for generation, tenant, id_, passages in rows}

    async def find(self, tenant: str, document_id: str) -> StoredDocument | None:
        """Get a document, or None where the tenant has none of that id."""
        rows = await self._read(_fetch, _FIND, (tenant, document_id))
        return _stored_document(rows[0]) if rows else None

    async def documents(self, tenant: str, *, limit: int, after: str | None) -> list[Document]:
        """List a tenant's documents by id, from the one after `after`."""
        rows = await self._read(
            _fetch,
            "SELECT * FROM documents WHERE tenant = ? AND id > ? ORDER BY id LIMIT ?",
            (tenant, after or "", limit),
        )
        return [_stored_document(row).document for row in rows]

    async def passages(self, generation: int) -> list[Passage]:
        """All passages of a generation, in order; none when it is gone."""
        rows = await self._read(_fetch, "SELECT * FROM passage_rows WHERE generation = ? ORDER BY n", (generation,))
        return [_passage(row) for row in rows]

    async def passages_of(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Passage]:
        """The passages of these (generation, n) keys that exist, as of one moment."""
        return await self._read(_passages_of, keys)

    async def source(self, generation: int) -> str | None:
        """The source text of a generation, or None when it is gone."""
        rows = await self._read(_fetch, "SELECT text_zlib FROM sources WHERE generation = ?", (generation,))
        return str(await asyncio.to_thread(zlib.decompress, rows[0][0]), "utf-8") if rows else None

    async def put(self, stored: StoredDocument, source: str, passages: Sequence[Passage]) -> None:
        """Write a document's new generation and drop its old one, in one durable transaction."""
        await self._write(_put, stored, source, passages)

    async def remove(self, tenant: str, document_id: str) -> StoredDocument:
        """Delete a document's content in one durable transaction, and leave a tombstone.

        Raises:
            DocumentNotFound: The tenant has no such document.
        """
        return await self._write(_remove, tenant, document_id)

    async def tombstones(self, tenant: str) -> list[Tombstone]:
        """The tenant's deletions, oldest first."""
        rows = await self._read(
            _fetch, "SELECT tenant, id, version, deleted_at FROM tombstones WHERE tenant = ? ORDER BY rowid", (tenant,)
        )
        return [Tombstone(tenant, id_, version, datetime.fromisoformat(at)) for tenant, id_, version, at in rows]

    async def _write(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await self._run(self._writer_pool, function, arguments)

    async def _read(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await self._run(self._reader_pool, function, arguments)

    async def _run(
        self, pool: ThreadPoolExecutor | None, function: Callable[..., _T], arguments: tuple[Any, ...]
    ) -> _T:
        if pool is None:
            raise IndexUnavailable("The document store is not open.")
        return await asyncio.get_running_loop().run_in_executor(pool, self._call, function, arguments)

    # What follows runs on the pools' threads.

    def _call(self, function: Callable[..., _T], arguments: tuple[Any, ...]) -> _T:
        try:
            return function(self._connection(), *arguments)
        except (sqlite3.Error, OSError) as error:
            raise IndexUnavailable(f"The document store {self._path} failed: {error}.") from error

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._of_thread, "connection", None)
        if connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connect(self._path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._of_thread.connection = connection
        return connection

    def _connect(self, path: Path, *, timeout_seconds: float = 5.0) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=timeout_seconds, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        return connection

    def _open(self, connection: sqlite3.Connection) -> None:
        self._take_ownership()
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
        connection.execute("INSERT OR IGNORE INTO facts VALUES ('store_id', ?)", (str(uuid4()),))
        (self.store_id,) = connection.execute("SELECT value FROM facts WHERE name = 'store_id'").fetchone()

    def _take_ownership(self) -> None:
        """Hold an exclusive transaction on a file beside the store: it ends with the process, however that ends."""
        lock = self._connect(self._path.with_suffix(".lock"), timeout_seconds=0)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise IndexUnavailable(
                f"Another process has {self._path} open: one process owns a retrieval directory. "
                "Run one worker, or give each its own directory and collection."
            ) from error


def _close(pools: Iterable[ThreadPoolExecutor], connections: list[sqlite3.Connection]) -> None:
    for pool in pools:
        pool.shutdown(wait=True)
    while connections:
        connections.pop().close()


@contextmanager
def _transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _fetch(connection: sqlite3.Connection, query: str, parameters: Sequence[Any]) -> list[Any]:
    return connection.execute(query, parameters).fetchall()


def _passages_of(connection: sqlite3.Connection, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Passage]:
    query = "SELECT * FROM passage_rows WHERE generation = ? AND n = ?"
    with _transaction(connection, "DEFERRED"):
        rows = ((key, connection.execute(query, key).fetchone()) for key in keys)
        return {key: _passage(row) for key, row in rows if row}


def _put(connection: sqlite3.Connection, stored: StoredDocument, source: str, passages: Sequence[Passage]) -> None:
    document, generation = stored.document, stored.generation
    compressed = zlib.compress(source.encode(), 6)
    with _transaction(connection):
        _drop(connection, document.tenant, document.id)
        connection.execute(
            "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _document_row(stored)
        )
        connection.execute("INSERT INTO sources VALUES (?, ?)", (generation, compressed))
        connection.executemany(
            "INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((generation, p.n, p.text, p.start, p.end, p.page, json.dumps(p.heading_path)) for p in passages),
        )


def _remove(connection: sqlite3.Connection, tenant: str, document_id: str) -> StoredDocument:
    with _transaction(connection):
        stored = _drop(connection, tenant, document_id)
        if stored is None:
            raise DocumentNotFound(f"There is no document {document_id!r}.")
        connection.execute(
            "INSERT INTO tombstones VALUES (?, ?, ?, ?)",
            (tenant, document_id, stored.document.version, datetime.now(UTC).isoformat()),
        )
    return stored


def _drop(connection: sqlite3.Connection, tenant: str, document_id: str) -> StoredDocument | None:
    rows = _fetch(connection, _FIND, (tenant, document_id))
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
    return (stored.generation, *facts, d.index_version, json.dumps(d.metadata), *moments)


def _stored_document(row: tuple[Any, ...]) -> StoredDocument:
    generation, *facts, metadata, created_at, updated_at = row
    moments = (datetime.fromisoformat(created_at), datetime.fromisoformat(updated_at))
    values: list[Any] = [*facts, json.loads(metadata), *moments]
    return StoredDocument(Document(*values), generation)


def _passage(row: tuple[Any, ...]) -> Passage:
    _, n, document_id, version, text, start, end, page, heading_path, name, title = row
    return Passage(document_id, version, n, text, start, end, page, tuple(json.loads(heading_path)), name, title)
