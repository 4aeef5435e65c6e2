"""Any process may open the database and finds it migrated; a data directory has one owner."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from app import database
from app.database import DataDirectoryBusy, MigrationFailed, SchemaTooNew, connect, migrate, own_directory
from app.predictions import Prediction


def _python(program: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_migrations_make_exactly_the_tables_that_the_code_declares(tmp_path):
    url = f"sqlite:///{tmp_path / 'new.db'}"
    migrate(url)
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, database.metadata) == []
        indexes = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'index'").scalars()
        assert {"ix_predictions_tenant_id", "ix_predictions_open"} <= set(indexes)
    engine.dispose()


def test_the_schema_version_is_the_last_migration():
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
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
