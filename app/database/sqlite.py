"""SQLite as the service uses it: every commit on the disk, readers that never wait for a writer."""

import asyncio
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import URL, Select
from sqlalchemy.dialects import sqlite

from app.database.journal import write_ahead
from app.database.migrating import SCHEMA_VERSION, MigrationFailed, migrate

BUSY_SECONDS = 5.0
"""How long a statement waits for another process's write before it fails as locked."""

CONNECT_ERRORS = (sqlite3.Error, OSError, MigrationFailed)


def connect(path: Path) -> sqlite3.Connection:
    """Open the SQLite database at `path`, made and migrated if need be, in autocommit mode.

    Every commit is on the disk when it returns (`synchronous=FULL`); readers never wait for a writer (WAL).
    What can go wrong is one of `CONNECT_ERRORS`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = _open(path)
    if _schema_version(connection) == SCHEMA_VERSION:
        return connection
    connection.close()
    migrate(URL.create("sqlite", database=str(path)))
    return _open(path)


class Glances:
    """Reads single numbers of the database at `path` by a connection of its own, in a thread of its own."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._connection: sqlite3.Connection | None = None
        self._statements: dict[Select[int], str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="glances")

    async def number(self, query: Select[int]) -> int:
        """Read the one number that a query without parameters gives; raises sqlite3.Error."""
        statement = self._statements.get(query)
        if statement is None:
            statement = self._statements[query] = str(query.compile(dialect=sqlite.dialect()))
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, statement)

    def close(self) -> None:
        """Close the connection, when the thread has done what it is at."""
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    def _read(self, statement: str) -> int:
        if self._connection is None:
            self._connection = sqlite3.connect(self._path, timeout=self._timeout_seconds, isolation_level=None)
        return int(self._connection.execute(statement).fetchone()[0])

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()


_PAGES = ("page_size", "page_count", "freelist_count")


class _Pages(NamedTuple):
    """What a database is made of, in its file or still in the log that is written ahead of it."""

    page_bytes: int
    total: int
    empty: int
    """How many of `total` hold nothing."""


def _pages(connection: sqlite3.Connection) -> _Pages:
    return _Pages(*(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in _PAGES))


def room_bytes(connection: sqlite3.Connection, path: Path) -> int:
    """What the database at `path` can still grow by: its disk's free bytes, and the pages that stand empty in it.

    Less what is its already: pages that were written ahead are to get a place in the file too. While somebody reads
    they wait for it, and if the log has taken that room by then, neither can the file grow nor the log be emptied, and
    deleting writes to the log.
    """
    pages = _pages(connection)
    owed = max(0, pages.total * pages.page_bytes - path.stat().st_size)
    return _free_bytes(path) + pages.empty * pages.page_bytes - owed


def _free_bytes(path: Path) -> int:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def shorten_journal(connection: sqlite3.Connection) -> bool:
    """Put what was written ahead into its place and give the journal's room back; False if somebody is in the way.

    Commits do the first by themselves when they succeed, but not while somebody reads, and on a disk that the journal
    has filled by then none succeeds. Nobody is waited for: whoever wants to write would wait too. Raises sqlite3.Error.
    """
    connection.execute("PRAGMA busy_timeout=0")
    try:
        (is_busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return False
    finally:
        connection.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")
    return not is_busy


SCRUBBED_BYTES = 32 << 20
"""A file with more in it than this is not written anew while its writer is waited for."""


def scrubbed(connection: sqlite3.Connection, path: Path) -> bool:
    """Write the file anew, so that nothing of what was deleted is left in free pages or in the log.

    False if there is too much in it or too little room, or if somebody reads or the disk refuses: try again later.
    """
    try:
        pages = _pages(connection)
        used_bytes = (pages.total - pages.empty) * pages.page_bytes
        # All that is written anew is written ahead first. What was begun and does not fit would stay in the journal.
        if used_bytes > min(SCRUBBED_BYTES, _free_bytes(path)):
            return False
        # While somebody reads, each attempt would add as much to the journal.
        if not shorten_journal(connection):
            return False
        connection.execute("VACUUM")
        return shorten_journal(connection)
    except (sqlite3.Error, OSError):
        return False


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        write_ahead(connection, BUSY_SECONDS)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA secure_delete=ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _schema_version(connection: sqlite3.Connection) -> str | None:
    try:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:
        return None  # There is no such table yet.
    return str(row[0]) if row else None
