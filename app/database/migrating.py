"""Brings a database to the schema of this code, or refuses one that is ahead of it.

Alembic (half a second of import) is loaded only when there is something to migrate.
"""

from pathlib import Path

from sqlalchemy import URL, create_engine, event, inspect, make_url, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError

from app.database.journal import write_ahead

SCHEMA_VERSION = "0016"
"""The revision that `app/migrations/versions` ends with."""

MIGRATION_SECONDS = 120.0
"""How long a process waits for another one's migration, and how long its own may take."""

# Any number will do, as long as every process asks for the same lock.
_MIGRATION_LOCK = 0x6861_6C6C


class MigrationFailed(Exception):
    """The database could not be brought to the current schema, and is as it was."""


class SchemaTooNew(MigrationFailed):
    """A newer Hallmark has migrated this database."""


def migrate(url: str | URL) -> None:
    """Bring the SQLite database at `url` to the current schema, in one transaction or not at all.

    Several processes may try at once: one migrates, the others wait and find it done.

    Raises:
        MigrationFailed: it cannot be reached or changed.
        SchemaTooNew: it is ahead of this code.
    """
    parsed = make_url(url)
    engine = create_engine(parsed, connect_args={"timeout": MIGRATION_SECONDS})
    _serialise_sqlite(engine)
    try:
        with engine.begin() as connection:
            upgrade(connection)
    except SQLAlchemyError as error:
        raise MigrationFailed(f"The database {parsed.render_as_string()!r} cannot be migrated: {error}") from error
    finally:
        engine.dispose()


def is_current(connection: Connection) -> bool:
    """Whether a connection's database has the schema of this code."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [SCHEMA_VERSION]


def upgrade(connection: Connection) -> None:
    """Bring the database of a connection, which is in a transaction, to the current schema.

    Raises:
        SchemaTooNew: it is ahead of this code.
        SQLAlchemyError: it cannot be changed.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaTooNew(
            f"The database {connection.engine.url.render_as_string()!r} has a schema this version does not know: "
            f"{error}. Install the Hallmark that wrote it, or a newer one."
        ) from error


def _serialise_sqlite(engine: Engine) -> None:
    """Make a migration of SQLite one transaction that excludes every other writer from its first statement."""

    @event.listens_for(engine, "connect")
    def _prepare(connection: DBAPIConnection, _record: object) -> None:
        # A way of keeping a journal cannot be chosen inside a transaction.
        write_ahead(connection.cursor(), MIGRATION_SECONDS)
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin_immediate(connection: Connection) -> None:
        connection.execute(text("BEGIN IMMEDIATE"))
