"""One SQLite file that one process owns: a thread that writes, a few that read, and the file's migrations.

The main rule: whoever keeps tables in it hands over functions of a connection, which run on those threads; what one
function writes within `transaction` is there as a whole or not at all.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from retrieval.errors import IndexUnavailable

_T = TypeVar("_T")

_LONGEST_JOURNAL_BYTES = 16 << 20
"""What is left of a journal that grew by a large document, or while somebody read, once it begins anew."""


class SqliteFile:
    """The file and its threads; every call may raise IndexUnavailable."""

    def __init__(self, path: Path, migrations: Sequence[str], *, readers: int = 2) -> None:
        self.path = path
        self._migrations = migrations
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
            await self.write(self._open)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the file and give up ownership; closing twice is fine."""
        pools = [pool for pool in (self._writer_pool, self._reader_pool) if pool]
        self._writer_pool = self._reader_pool = None
        await asyncio.to_thread(_close, pools, self._connections)

    async def write(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a function of a connection on the thread that writes."""
        return await self._run(self._writer_pool, function, arguments)

    async def read(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a function of a connection on a thread that reads."""
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
            raise IndexUnavailable(f"The document store {self.path} failed: {error}.") from error

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._of_thread, "connection", None)
        if connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connect(self.path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA journal_size_limit = {_LONGEST_JOURNAL_BYTES}")
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
        for number, script in enumerate(self._migrations[version:], version + 1):
            connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")

    def _take_ownership(self) -> None:
        """Hold an exclusive transaction on a file beside the store: it ends with the process, however that ends."""
        lock = self._connect(self.path.with_suffix(".lock"), timeout_seconds=0)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise IndexUnavailable(
                f"Another process has {self.path} open: one process owns a retrieval directory. "
                "Run one worker, or give each its own directory and collection."
            ) from error


def fetch(connection: sqlite3.Connection, query: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
    """All rows of a query."""
    return connection.execute(query, parameters).fetchall()


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """Do what is inside as a whole: an exception takes it all back."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def as_a_whole(connection: sqlite3.Connection, function: Callable[[sqlite3.Connection], None]) -> None:
    """Do what a function does as a whole."""
    with transaction(connection):
        function(connection)


def _close(pools: Iterable[ThreadPoolExecutor], connections: list[sqlite3.Connection]) -> None:
    for pool in pools:
        pool.shutdown(wait=True)
    while connections:
        connections.pop().close()
