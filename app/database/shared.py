"""The tables that several processes read and change: releases, rollouts, feedback, labels, the review queue.

The main rule: the same statements on SQLite and on PostgreSQL, and one transaction for what must be true together. A
database that is away is `Unavailable` to whoever asks and costs nobody else anything: it is reached, and brought to the
current schema, at its first use, and again at every later one until that has worked. The log of predictions, which
every request waits for, writes to its own SQLite by hand (`app.predictions`).
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, Select, Table, event, func, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.database.journal import LONGEST_BYTES
from app.database.migrating import MIGRATION_SECONDS, MigrationFailed, is_current, upgrade
from app.database.sqlite import BUSY_SECONDS, Glances, shorten_journal
from app.errors import Unavailable

_CONNECTIONS = 5
_WRITES = "hallmark_writes"


class Database:
    """A database by its URL: `sqlite:////path/to/file` or `postgresql://user:password@host/name`."""

    def __init__(self, url: str | URL, *, timeout_seconds: float = BUSY_SECONDS) -> None:
        """Connect to nothing yet; `timeout_seconds` bounds connecting, waiting for a lock, and each statement.

        Raises:
            ValueError: neither SQLite nor PostgreSQL.
        """
        try:
            self.url = make_url(url)
            self.kind = self.url.get_backend_name()
        except ArgumentError:
            raise ValueError("the database's URL cannot be read: give postgresql://user:password@host/name") from None
        if self.kind not in ("sqlite", "postgresql"):
            raise ValueError(f"a database of the kind {self.kind!r} is not supported: give a postgresql: URL")
        self.name = self.url.render_as_string()  # Without the password.
        self._timeout_seconds = timeout_seconds
        self._is_current = False

    @property
    def secret_url(self) -> str:
        """The URL with the password, for another process of ours."""
        return self.url.render_as_string(hide_password=False)

    @classmethod
    def of_file(cls, path: Path, *, timeout_seconds: float = BUSY_SECONDS) -> Self:
        """The SQLite database at `path`."""
        return cls(URL.create("sqlite", database=str(path)), timeout_seconds=timeout_seconds)

    async def __aenter__(self) -> Self:
        """Get ready to connect, which the first use does; raises MigrationFailed where the driver is not installed."""
        self._engine = self._make_engine(self._timeout_seconds)
        self._glances = Glances(Path(self.url.database or ""), self._timeout_seconds) if self.kind == "sqlite" else None
        self._preparing = asyncio.Lock()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection."""
        if self._glances is not None:
            self._glances.close()
        await asyncio.shield(self._engine.dispose())

    async def prepare(self) -> None:
        """Bring the tables to the current schema, unless that was done.

        Raises:
            MigrationFailed: it cannot be changed, or is ahead of this code.
            Unavailable: the database does not answer.
        """
        if self._is_current:
            return
        async with self._preparing:
            if not self._is_current:
                await self._migrate()
                self._is_current = True

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Read, in one transaction.

        Raises:
            Unavailable: the database does not answer, or cannot be brought to the current schema.
        """
        await self._prepared()
        with _told():
            async with self._engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """Change, in one transaction: all of it is there when the block has ended, or nothing if it raises.

        SQLite has one writer, and waits for its turn at the start; PostgreSQL's transactions run beside each other,
        so that what must not change between reading and writing is read `with_for_update`.

        Raises:
            Unavailable: the database does not answer, or cannot be brought to the current schema. If the block had
                ended it is not known whether the change was made.
        """
        await self._prepared()
        with _told():
            async with _transaction(self._engine) as connection:
                yield connection

    async def empty_log(self) -> bool:
        """Empty SQLite's write-ahead log, in which what was overwritten stands until then.

        False if somebody reads or writes just then: nobody is waited for, so try again later.

        Raises:
            Unavailable: the database does not answer.
        """
        if self.kind != "sqlite":
            return True
        await self._prepared()

        def checkpoint() -> bool:
            with closing(sqlite3.connect(self.url.database or "")) as connection:
                return shorten_journal(connection)

        try:
            return await asyncio.to_thread(checkpoint)
        except sqlite3.Error as error:
            raise _unavailable() from error

    async def number(self, query: Select[int]) -> int:
        """Read one number that is asked for again and again: on SQLite at a fifth of what `reading` it costs.

        Raises:
            Unavailable: as `reading` does.
        """
        await self._prepared()
        with _told():
            if self._glances is not None:
                return await self._glances.number(query)
            async with self._engine.connect() as connection:
                found: int = (await connection.execute(query)).scalar_one()
                return found

    async def one_at_a_time(self, connection: AsyncConnection, what: str) -> None:
        """Wait until no other transaction of any process does `what`, and keep others from it until this one ends.

        What such transactions write then becomes visible in the order of their row numbers. SQLite has one writer.
        """
        if self.kind == "postgresql":
            await connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(what, 0))))

    async def not_while_one(self, connection: AsyncConnection, what: str) -> None:
        """Keep transactions that do `what` one at a time out until this one ends; others of this kind run beside it.

        Whoever gets its turn at `what` then sees all that such transactions have begun to write.
        """
        if self.kind == "postgresql":
            await connection.execute(select(func.pg_advisory_xact_lock_shared(func.hashtextextended(what, 0))))

    def insert(self, table: Table) -> Any:
        """An INSERT of this database's own dialect, which knows `on_conflict_do_nothing` and its like."""
        return postgresql.insert(table) if self.kind == "postgresql" else sqlite.insert(table)

    async def _prepared(self) -> None:
        try:
            await self.prepare()
        except MigrationFailed as error:
            raise _unavailable() from error

    async def _migrate(self) -> None:
        with _told():
            async with self._engine.connect() as connection:
                if await connection.run_sync(is_current):
                    return
        # By an engine of its own: another process's migration may take longer than any other statement should.
        engine = self._make_engine(MIGRATION_SECONDS)
        try:
            async with _transaction(engine) as connection:
                await connection.run_sync(upgrade)
        except SQLAlchemyError as error:
            raise MigrationFailed(f"The database {self.name!r} cannot be migrated: {error}") from error
        except (OSError, TimeoutError) as error:
            raise _unavailable() from error
        finally:
            await asyncio.shield(engine.dispose())

    def _make_engine(self, timeout_seconds: float) -> AsyncEngine:
        if self.kind == "postgresql":
            try:
                return create_async_engine(
                    self.url.set(drivername="postgresql+asyncpg"),
                    connect_args={"timeout": timeout_seconds, "command_timeout": timeout_seconds},
                    hide_parameters=True,
                    json_deserializer=str,  # What is JSON there is its text here.
                    pool_size=_CONNECTIONS,
                    max_overflow=0,
                    pool_timeout=timeout_seconds,
                    pool_pre_ping=True,
                )
            except ModuleNotFoundError as error:
                raise MigrationFailed("PostgreSQL needs asyncpg: pip install 'hallmark[postgres]'.") from error
        engine = create_async_engine(
            self.url.set(drivername="sqlite+aiosqlite"),
            connect_args={"timeout": timeout_seconds},
            hide_parameters=True,  # They may be content, and errors are logged.
            pool_size=_CONNECTIONS,
            max_overflow=0,
            pool_timeout=timeout_seconds,
        )
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        await connection.execution_options(**{_WRITES: True})
        async with connection.begin():
            yield connection


def _prepare_sqlite(connection: DBAPIConnection, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    journal = "journal_mode=WAL", f"journal_size_limit={LONGEST_BYTES}", "synchronous=FULL"
    # What is deleted or shortened is overwritten: content that was erased must not be found in the file.
    for pragma in (*journal, "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _told() -> Iterator[None]:
    """Turn what a driver raises when its server is away into what a caller may be told.

    A statement that breaks a rule of the tables (IntegrityError) or is wrong is for the code that wrote it.
    """
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError):
        raise
    except (SQLAlchemyError, sqlite3.Error, OSError, TimeoutError) as error:
        # SQLAlchemy knows asyncpg's errors about data only by their code, of SQL's class 22.
        if isinstance(error, DBAPIError) and str(getattr(error.orig, "sqlstate", "")).startswith("22"):
            raise
        raise _unavailable() from error
    except Exception as error:
        # What asyncpg thinks of an answer that makes no sense, SQLAlchemy hands on as it is.
        if type(error).__module__.partition(".")[0] != "asyncpg":
            raise
        raise _unavailable() from error


def _unavailable() -> Unavailable:
    # Which database it is, the caller need not know; whoever runs the service does.
    return Unavailable("The database does not answer. Try again shortly.", retry_after_seconds=1.0)
