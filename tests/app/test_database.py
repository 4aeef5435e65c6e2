"""Any process may open the database and finds it migrated, SQLite or PostgreSQL; a data directory has one owner."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from app import database
from app.database import Database, DataDirectoryBusy, MigrationFailed, SchemaTooNew, connect, migrate, own_directory
from app.errors import Unavailable
from app.predictions import Prediction
from tests.migrated import migrated
from tests.postgres import Postgres
from tests.small_disk import reading


def _python(program: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _of(dialect: str) -> dict:
    """Options to compare with what is declared for a kind of database: some indexes are PostgreSQL's alone."""

    def belongs(thing, name, kind, reflected, other) -> bool:
        return kind != "index" or thing._ddl_if is None or thing._ddl_if.dialect == dialect

    return {"compare_type": True, "include_object": belongs}


def test_the_migrations_make_exactly_the_tables_that_the_code_declares(tmp_path):
    url = f"sqlite:///{tmp_path / 'new.db'}"
    migrate(url)
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=_of("sqlite"))
        assert compare_metadata(context, database.metadata) == []
        indexes = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'index'").scalars()
        assert {"ix_predictions_tenant_id", "ix_predictions_open"} <= set(indexes)
    engine.dispose()


def test_the_schema_version_is_the_last_migration():
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parents[1] / "migrations"))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [database.SCHEMA_VERSION]


def test_every_fact_of_a_prediction_has_its_column_in_the_same_order():
    columns = [column.name for column in database.predictions.columns]
    assert columns == ["row", *Prediction.__struct_fields__[:-1]]


def test_migrating_again_changes_nothing(tmp_path):
    path = tmp_path / "a.db"
    migrate(f"sqlite:///{path}")
    with closing(connect(path)) as connection:
        before = connection.execute("SELECT * FROM sqlite_master").fetchall()
        migrate(f"sqlite:///{path}")
        assert connection.execute("SELECT * FROM sqlite_master").fetchall() == before


def test_a_current_database_is_opened_without_alembic(tmp_path):
    path = tmp_path / "a.db"
    connect(path).close()
    program = "import sys, pathlib; from app.database import connect; connect(pathlib.Path(sys.argv[1])).close(); "
    process = _python(program + "print('alembic' in sys.modules)", path)
    output, errors = process.communicate(timeout=30)
    assert output == "False\n", errors


def test_processes_that_open_a_new_database_at_once_all_find_it_migrated(tmp_path):
    path = tmp_path / "some folder" / "100% new?.db"
    program = (
        "import sys, pathlib; from app.database import connect; "
        "print(connect(pathlib.Path(sys.argv[1])).execute('SELECT count(*) FROM predictions').fetchone())"
    )
    processes = [_python(program, path) for _ in range(4)]
    for process in processes:
        output, errors = process.communicate(timeout=50)
        assert (output, errors) == ("(0,)\n", "")


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path):
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE api_keys (surprise)")  # The last table that the first migration makes.
    with pytest.raises(MigrationFailed, match="api_keys already exists"):
        connect(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("api_keys",)]


def test_an_older_database_keeps_its_rows_when_it_is_migrated(tmp_path):
    path = tmp_path / "a.db"
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parents[1] / "migrations"))
    config.set_main_option("path_separator", "os")
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for number in (1, 2):
            connection.exec_driver_sql(
                'INSERT INTO predictions ("row", id, tenant, outcome, stream, store, answer, request) '
                "VALUES (?, ?, 't', ?, 1, 0, 'So.', '{\"a\": 1}')",
                (number * 7, bytes([number] * 16), ("open", "finished")[number - 1]),
            )
        connection.exec_driver_sql(
            "INSERT INTO api_keys (id, secret_sha256, name, tenant, scopes, created_at) "
            "VALUES ('k', x'00', 'n', 't', '', 5)"
        )
        connection.exec_driver_sql("INSERT INTO releases VALUES ('hallmark', 1, 'd', '{}', 5)")
    engine.dispose()
    with closing(connect(path)) as connection:
        found = connection.execute(
            'SELECT "row", id, outcome, stream, store, assignment, answer, request FROM predictions ORDER BY "row"'
        ).fetchall()
        assert found == [
            (7, bytes([1] * 16), "open", 1, 0, None, "So.", '{"a": 1}'),
            (14, bytes([2] * 16), "finished", 1, 0, None, "So.", '{"a": 1}'),
        ]
        (approved,) = connection.execute("SELECT approved_at FROM releases").fetchone()
        assert approved is None
        limits = "priority, requests_per_minute, tokens_per_minute"
        assert connection.execute(f"SELECT {limits} FROM api_keys").fetchall() == [("normal", None, None)]
        plan = connection.execute("EXPLAIN QUERY PLAN SELECT row FROM predictions WHERE outcome = 'open'").fetchall()
        assert "ix_predictions_open" in str(plan)
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(
                "INSERT INTO predictions (id, tenant, outcome, stream, store) VALUES (?, 't', 'open', 1, 1)",
                (bytes([1] * 16),),
            )


def test_a_newer_schema_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "a.db"
    with closing(connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaTooNew, match=r"9999.*newer"):
        connect(path)


def test_a_connection_keeps_what_it_commits_and_reads_beside_a_writer(tmp_path):
    path = tmp_path / "a.db"
    with closing(connect(path)) as writer, closing(connect(path)) as reader:
        settings = [writer.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        assert settings == ["wal", 2]
        assert writer.execute("PRAGMA foreign_keys").fetchone() == (1,)
        assert writer.execute("PRAGMA busy_timeout").fetchone() == (5000,)
        writer.execute("BEGIN IMMEDIATE")
        assert reader.execute("SELECT count(*) FROM predictions").fetchone() == (0,)
        writer.execute("ROLLBACK")


def test_a_data_directory_has_one_owner_and_is_free_when_that_dies(tmp_path):
    directory = tmp_path / "data"
    program = (
        "import sys, pathlib; from app.database import own_directory\n"
        "with own_directory(pathlib.Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, directory], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "mine\n"
        with pytest.raises(DataDirectoryBusy) as refusal, own_directory(directory):
            pass
        message = str(refusal.value)
        assert str(directory) in message
        assert f"process {owner.pid}" in message
        assert "Stop that process" in message
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with own_directory(directory):
        assert (directory / "hallmark.lock").read_text() == f"{os.getpid()}\n"
    with own_directory(directory):
        pass


# --- the database that several processes share, of either kind ---

KEY = {"id": "a", "secret_sha256": b"x" * 32, "name": "n", "tenant": "t", "scopes": "chat", "created_at": 1}


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request, tmp_path) -> str:
    """The URL of a database without any table, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'hallmark.db'}"
    return request.getfixturevalue("postgres").create_database(migrated=False)


async def count(shared: Database) -> int:
    async with shared.reading() as connection:
        return int((await connection.execute(select(func.count()).select_from(database.api_keys))).scalar_one())


async def test_a_number_is_as_the_last_transaction_left_it(database_url):
    query = select(func.count()).select_from(database.api_keys)
    async with Database(database_url) as shared:
        assert await shared.number(query) == 0
        async with shared.writing() as connection:
            await connection.execute(database.api_keys.insert(), KEY)
            assert await shared.number(query) == 0
        assert await shared.number(query) == 1


async def test_a_number_that_sqlite_cannot_give_is_unavailable(tmp_path):
    path = tmp_path / "hallmark.db"
    async with Database.of_file(path) as shared:
        await shared.prepare()
        with closing(sqlite3.connect(path)) as other:
            other.execute("DROP TABLE api_keys")
        with pytest.raises(Unavailable):
            await shared.number(select(func.count()).select_from(database.api_keys))


async def test_the_first_use_makes_exactly_the_tables_that_the_code_declares(empty_database_url):
    async with Database(empty_database_url) as shared:
        async with shared.reading() as connection:

            def differences(bound) -> list:
                options = {"target_metadata": database.metadata, **_of(shared.kind)}
                return compare_metadata(MigrationContext.configure(bound, opts=options), database.metadata)

            assert await connection.run_sync(differences) == []
        assert await count(shared) == 0


async def test_what_is_written_is_there_for_others_once_the_block_has_ended(database_url):
    async with Database(database_url) as one, Database(database_url) as other:
        async with one.writing() as connection:
            await connection.execute(database.api_keys.insert(), [KEY, {**KEY, "id": "b"}])
            assert await count(other) == 0
        assert await count(other) == 2


async def test_a_block_that_raises_leaves_nothing(database_url):
    async with Database(database_url) as shared:
        with pytest.raises(IntegrityError):
            await _write_twice(shared)
        assert await count(shared) == 0
        await asyncio.wait_for(_cancelled_write(shared), 5)
        assert await count(shared) == 0


async def _write_twice(shared: Database) -> None:
    async with shared.writing() as connection:
        await connection.execute(database.api_keys.insert(), KEY)
        await connection.execute(database.api_keys.insert(), KEY)


async def _cancelled_write(shared: Database) -> None:
    written = asyncio.Event()

    async def write() -> None:
        async with shared.writing() as connection:
            await connection.execute(database.api_keys.insert(), KEY)
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_log_is_emptied_when_nobody_reads_and_nobody_is_waited_for(tmp_path):
    path = migrated(tmp_path / "a.db")
    async with Database.of_file(path, timeout_seconds=120.0) as shared:
        with reading(path):
            async with shared.writing() as connection:
                await connection.execute(database.api_keys.insert(), KEY)
            async with asyncio.timeout(30):
                assert not await shared.empty_log()
        assert await shared.empty_log()
        assert path.with_name(f"{path.name}-wal").stat().st_size == 0


async def test_a_row_that_is_there_already_can_be_left_alone(database_url):
    async with Database(database_url) as shared:
        statement = shared.insert(database.api_keys).on_conflict_do_nothing(index_elements=["id"])
        for expected in (1, 0):
            async with shared.writing() as connection:
                assert (await connection.execute(statement, KEY)).rowcount == expected
        assert await count(shared) == 1


async def test_a_wrong_statement_is_no_outage(database_url):
    async with Database(database_url) as shared:
        # SQLite calls it an operational error, as it does a locked database.
        expected = ProgrammingError if shared.kind == "postgresql" else Unavailable
        with pytest.raises(expected):
            async with shared.reading() as connection:
                await connection.execute(text("SELECT nothing FROM nowhere"))


async def test_writers_beside_each_other_lose_no_change(database_url):
    async with Database(database_url) as one, Database(database_url) as other:
        async with one.writing() as connection:
            await connection.execute(database.api_keys.insert(), {**KEY, "created_at": 0})

        async def add_one(shared: Database) -> None:
            async with shared.writing() as connection:
                query = select(database.api_keys.c.created_at).with_for_update()
                now = (await connection.execute(query)).scalar_one()
                await asyncio.sleep(0)
                await connection.execute(database.api_keys.update().values(created_at=now + 1))

        await asyncio.gather(*(add_one(shared) for shared in (one, other) for _ in range(10)))
        async with one.reading() as connection:
            assert (await connection.execute(select(database.api_keys.c.created_at))).scalar_one() == 20


_USE = """
import asyncio, sys
from sqlalchemy import text
from app.database import Database
if sys.argv[2] == "together":
    import alembic.command
    print("ready", flush=True)
    sys.stdin.readline()
async def main():
    async with Database(sys.argv[1]) as shared, shared.reading() as connection:
        found = await connection.execute(text("SELECT count(*) FROM predictions"))
        print(found.scalar_one(), "alembic" in sys.modules)
asyncio.run(main())
"""


def test_processes_that_share_a_new_database_at_once_all_find_it_migrated(empty_database_url):
    processes = [_python(_USE, empty_database_url, "together") for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert {process.communicate(timeout=50) for process in processes} == {("0 True\n", "")}
    later = _python(_USE, empty_database_url, "alone").communicate(timeout=50)
    assert later == ("0 False\n", "")  # A current one is used without Alembic.


async def test_a_shared_migration_that_fails_leaves_the_database_as_it_was(empty_database_url):
    async with Database(empty_database_url) as shared:
        async with database.shared._transaction(shared._engine) as connection:
            await connection.execute(text("CREATE TABLE api_keys (surprise TEXT)"))
        with pytest.raises(MigrationFailed, match="api_keys"):
            await shared.prepare()
        with pytest.raises(Unavailable):
            await count(shared)
        async with database.shared._transaction(shared._engine) as connection:
            await connection.execute(text("DROP TABLE api_keys"))
        assert await count(shared) == 0  # And it is mended without starting again.


async def test_a_newer_shared_schema_is_refused_with_the_way_out(database_url):
    async with Database(database_url) as shared, shared.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    async with Database(database_url) as shared:
        with pytest.raises(SchemaTooNew, match=r"9999.*newer"):
            await shared.prepare()


async def test_a_locked_sqlite_is_unavailable_after_the_timeout_and_then_works(tmp_path):
    path = tmp_path / "a.db"
    async with Database.of_file(path, timeout_seconds=0.05) as shared:
        with closing(connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable) as raised:
                async with shared.writing():
                    pass
            other.execute("ROLLBACK")
        assert raised.value.retry_after_seconds == 1.0
        async with shared.writing() as connection:
            await connection.execute(database.api_keys.insert(), KEY)
        assert await count(shared) == 1


async def test_a_lock_in_postgresql_is_unavailable_after_the_timeout_and_then_works(postgres):
    async with Database(postgres.create_database(), timeout_seconds=0.3) as shared:
        async with shared.writing() as connection:
            await connection.execute(text("LOCK TABLE api_keys"))
            with pytest.raises(Unavailable):
                await count(shared)
        assert await count(shared) == 0


async def test_a_postgresql_that_is_away_is_unavailable_and_used_again_when_it_is_back():
    with Postgres() as server:
        async with Database(server.create_database(), timeout_seconds=2.0) as shared:
            server.stop()
            with pytest.raises(Unavailable, match="does not answer"):
                await count(shared)
            server.start()  # Also where it was away when the service started.
            async with shared.writing() as connection:
                await connection.execute(database.api_keys.insert(), KEY)
            server.stop()
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await count(shared)
            server.start()
            assert await count(shared) == 1


async def test_an_answer_that_makes_no_sense_to_the_driver_is_unavailable(postgres):
    async with Database(postgres.create_database()) as shared:
        with pytest.raises(Unavailable):
            async with shared.reading():
                raise asyncpg.InternalClientError("cannot switch to state 12")


@pytest.mark.parametrize("url", ["mysql://host/name", "nonsense", ""])
def test_another_kind_of_database_is_refused(url):
    with pytest.raises(ValueError, match="postgresql"):
        Database(url)


def test_no_password_is_shown():
    assert "hunter2" not in Database("postgresql://me:hunter2@host/name").name
