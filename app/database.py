"""The service's tables, how to reach them, and who may own them.

The tables are declared here once. A database is brought to the current schema by Alembic when it is opened, and
Alembic (half a second of import) is loaded only when there is something to migrate. Several processes may use one
database; the data directory around it has one owner.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError

SCHEMA_VERSION = "0001"
"""The revision that `app/migrations/versions` ends with."""

BUSY_SECONDS = 5.0
"""How long a statement waits for another process's write before it fails as locked."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite's rowid is the cheapest key there is: an id as primary key of its own costs twice the time for each row.
_row_number = BigInteger().with_variant(Integer(), "sqlite")
_id = LargeBinary(16).with_variant(Uuid(as_uuid=False), "postgresql")
# SQLite would give a column of type JSON the affinity of a number.
_json = Text().with_variant(JSON(), "postgresql")

# Small facts stand before large content, so that counting and listing never read SQLite's overflow pages.
predictions = Table(
    "predictions",
    metadata,
    Column("row", _row_number, primary_key=True),
    Column("id", _id, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("key_id", Text),
    Column("user", Text),
    Column("conversation", Text),
    Column("model", Text),
    Column("release_name", Text),
    Column("release_digest", Text),
    Column("base_model", Text),
    Column("adapter", Text),
    Column("prompt_version", Text),
    Column("index_version", Text),
    Column("retrieval_mode", Text),
    Column("retrieval_outcome", Text),
    Column("stream", Boolean, nullable=False),
    Column("store", Boolean, nullable=False),
    Column("finish_reason", Text),
    Column("error_code", Text),
    Column("verdict", Text),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("retrieve_seconds", Float),
    Column("queue_seconds", Float),
    Column("first_token_seconds", Float),
    Column("engine_seconds", Float),
    Column("total_seconds", Float),
    Column("trace_id", Text),
    Column("metadata", _json),
    Column("passages", _json),
    Column("citations", _json),
    Column("tool_calls", _json),
    Column("request", _json),
    Column("messages", _json),
    Column("question", Text),
    Column("answer", Text),
    # One index both keeps an id unique and lists a tenant's predictions by time.
    Index("ix_predictions_tenant_id", "tenant", "id", unique=True),
)
# At start the rows that a dead process left open are found without reading the table.
Index(
    "ix_predictions_open",
    predictions.c.row,
    sqlite_where=predictions.c.outcome == "open",
    postgresql_where=predictions.c.outcome == "open",
)

# Times are milliseconds since 1970 in UTC: the same integer in every database.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("secret_sha256", LargeBinary(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("scopes", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("last_used_at", BigInteger),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
)

# Which number a release's digest has under its name: given once, kept for ever.
releases = Table(
    "releases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("canonical", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_releases_name_digest", "name", "digest", unique=True),
)


class DataDirectoryBusy(Exception):
    """Another process owns the data directory."""


class MigrationFailed(Exception):
    """The database could not be brought to the current schema, and is as it was."""


class SchemaTooNew(MigrationFailed):
    """A newer Hallmark has migrated this database."""


CONNECT_ERRORS = (sqlite3.Error, OSError, MigrationFailed)


@contextmanager
def own_directory(directory: Path) -> Iterator[Path]:
    """Own `directory`, made if absent, until the block ends or the process dies, however it dies.

    Raises:
        DataDirectoryBusy: another process owns it.
    """
    with exclusive(directory / "hallmark.lock"):
        yield directory


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Hold the lock that `lock_file` stands for; raises DataDirectoryBusy at once if somebody else does."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
            raise DataDirectoryBusy(
                f"{str(lock_file.parent)!r} belongs to a running Hallmark (process {owner}). "
                "Stop that process, or give this one a data directory of its own."
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # Closing releases the lock. The file stays: removing it would let two processes lock two files of one name.
        os.close(descriptor)


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


def migrate(url: str | URL) -> None:
    """Bring the database at the SQLAlchemy `url` to the current schema, in one transaction or not at all.

    Several processes may try at once: one migrates, the others wait and find it done.

    Raises:
        MigrationFailed: it cannot be reached or changed.
        SchemaTooNew: it is ahead of this code.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    parsed = make_url(url)
    engine = create_engine(parsed)
    if parsed.get_backend_name() == "sqlite":
        _serialise_sqlite(engine, Path(parsed.database or ""))
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaTooNew(
            f"The database {parsed.render_as_string()!r} has a schema this version does not know: {error}. "
            "Install the Hallmark that wrote it, or a newer one."
        ) from error
    except SQLAlchemyError as error:
        raise MigrationFailed(f"The database {parsed.render_as_string()!r} cannot be migrated: {error}") from error
    finally:
        engine.dispose()


def _serialise_sqlite(engine: Engine, path: Path) -> None:
    """Make a migration of SQLite one transaction that excludes every other writer from its first statement."""
    _open(path).close()

    @event.listens_for(engine, "connect")
    def _no_implicit_begin(connection: DBAPIConnection, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin_immediate(connection: Connection) -> None:
        connection.execute(text("BEGIN IMMEDIATE"))


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
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
