"""A SQLite file is written ahead from its first opening, also where others open it at once, and emptied in passing."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.database import shorten_journal
from app.database.journal import write_ahead
from tests.small_disk import reading


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new.db"


@pytest.fixture
def other(path: Path) -> Iterator[sqlite3.Connection]:
    """Another process's connection, at the moment in which it makes the file."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield connection
    connection.close()


class Impatient:
    """A connection that waits for nobody, and after whose first refusal the other one is done."""

    def __init__(self, path: Path, other: sqlite3.Connection) -> None:
        self.connection = sqlite3.connect(path, timeout=0.0, isolation_level=None)
        self.refused = 0
        self._other = other

    def execute(self, statement: str) -> Any:
        try:
            return self.connection.execute(statement)
        except sqlite3.OperationalError:
            self.refused += 1
            self._other.execute("COMMIT")
            raise


def test_who_meets_another_at_a_new_file_asks_again(path: Path, other: sqlite3.Connection) -> None:
    second = Impatient(path, other)
    write_ahead(second, busy_seconds=60.0)
    assert second.refused == 1
    assert second.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    second.connection.close()


@pytest.mark.usefixtures("other")
def test_a_file_that_stays_locked_is_given_up(path: Path) -> None:
    second = sqlite3.connect(path, timeout=0.0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        write_ahead(second, busy_seconds=0.0)
    second.close()


def test_what_is_no_database_is_refused_at_once(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        write_ahead(connection, busy_seconds=60.0)
    connection.close()


def test_a_journal_is_emptied_when_nobody_is_in_the_way_and_nobody_is_waited_for(path: Path) -> None:
    journal = path.with_name(f"{path.name}-wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        write_ahead(connection, busy_seconds=60.0)
        connection.execute("CREATE TABLE a (b)")
        with reading(path), closing(sqlite3.connect(path, timeout=60.0)) as patient:
            connection.execute("INSERT INTO a VALUES (1)")
            assert not shorten_journal(patient)
            assert journal.stat().st_size > 0
        assert shorten_journal(connection)
        assert journal.stat().st_size == 0


@pytest.mark.usefixtures("other")
def test_a_journal_of_a_file_that_somebody_has_to_himself_is_not_emptied(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        assert not shorten_journal(connection)
