"""Every prediction gets into the shared database once, whatever breaks in between, and none waits for another."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from app.database import Database, prediction_documents, predictions
from app.errors import RecordUnavailable, Unavailable
from app.predictions import History, Prediction, PredictionLog, Shipper, uuid7
from tests.migrated import migrated
from tests.postgres import Postgres
from tests.service import until
from tests.small_disk import SmallDisk, reading
from tests.stopwatch import Stopwatch


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return migrated(tmp_path / "outbox" / "hallmark.db")


@pytest.fixture
async def source(outbox) -> AsyncIterator[PredictionLog]:
    async with PredictionLog(outbox) as source:
        yield source


@pytest.fixture
async def database(database_url) -> AsyncIterator[Database]:
    async with Database(database_url, timeout_seconds=2.0) as database:
        yield database


def prediction(**facts: Any) -> Prediction:
    return Prediction(**{"id": uuid7(), "tenant": "acme", "outcome": "finished", **facts})


async def record(source: PredictionLog, *given: Prediction) -> list[str]:
    await asyncio.gather(*(source.close(each) for each in given))
    return sorted(each.id for each in given)


async def arrived(database: Database) -> dict[str, str]:
    async with database.reading() as connection:
        rows = await connection.execute(select(predictions.c.id, predictions.c.outcome).order_by(predictions.c.id))
        return {row.id: row.outcome for row in rows}


def left(outbox: Path) -> int:
    with closing(sqlite3.connect(outbox)) as connection:
        return int(connection.execute("SELECT count(*) FROM predictions").fetchone()[0])


class Flaky(Database):
    """A database that is away while it is told so, and that fails when it was to commit."""

    away = False
    fails_after_commits = 0

    def writing(self) -> Any:
        if self.away:
            raise Unavailable("The database does not answer.")
        return super().writing()

    def reading(self) -> Any:
        if self.away:
            raise Unavailable("The database does not answer.")
        return super().reading()


async def test_closed_predictions_leave_the_outbox_for_the_database_and_open_ones_stay(source, outbox, database):
    running = prediction(outcome="open")
    source.open(running)
    await source.opened(running)
    passages = [{"document_id": "d1", "document_version": "v1", "n": 1}]
    ids = await record(source, *(prediction(passages=passages) for _ in range(25)))
    async with Shipper(source, database, batch_rows=10, poll_seconds=0.01) as shipper:

        async def shipped() -> bool:
            return len(await arrived(database)) == 25 and left(outbox) == 1

        await until(shipped)
        running.outcome = "finished"
        await source.close(running)

        async def followed() -> bool:
            return left(outbox) == 0

        await until(followed)
        assert (shipper.rows, shipper.lag_seconds) == (0, 0.0)
    assert await arrived(database) == dict.fromkeys([*ids, running.id], "finished")
    async with database.reading() as connection:
        noted = (await connection.execute(select(func.count()).select_from(prediction_documents))).scalar_one()
    assert noted == 25


async def test_what_a_crash_ships_again_is_there_once(source, outbox, database):
    ids = await record(source, *(prediction(answer="whole") for _ in range(5)))
    shipper = Shipper(source, database)
    rows = await source.closed(10)
    await shipper._store([row[0] for row in rows], _facts(rows))  # And then the process died.
    async with shipper:
        pass
    assert await arrived(database) == dict.fromkeys(ids, "finished")
    assert left(outbox) == 0


async def test_a_finished_row_is_not_overwritten_and_an_interrupted_one_is(source, database):
    one, other = uuid7(), uuid7()
    shipper = Shipper(source, database)

    async def ship(*given: Prediction) -> None:
        await record(source, *given)
        await shipper._ship()

    await ship(prediction(id=one, answer="whole"), prediction(id=other, outcome="interrupted"))
    await ship(prediction(id=one, outcome="interrupted"), prediction(id=other, answer="late"))
    assert await arrived(database) == {one: "finished", other: "finished"}
    history = History(database)
    assert (await history.get("acme", one)).answer == "whole"
    assert (await history.get("acme", other)).answer == "late"


async def test_while_the_database_is_away_the_outbox_grows_and_requests_do_not_notice(
    source, outbox, database_url, caplog
):
    async with Flaky(database_url) as database:
        database.away = True
        async with Shipper(source, database, poll_seconds=0.01) as shipper:
            watch = Stopwatch()
            ids = await record(source, *(prediction() for _ in range(30)))
            assert watch.seconds < 2

            async def waiting() -> bool:
                return shipper.rows == 30 and shipper.lag_seconds > 0

            await until(waiting)
            database.away = False

            async def shipped() -> bool:
                return left(outbox) == 0 and shipper.rows == 0  # It has noticed itself.

            await until(shipped)
        assert sorted(await arrived(database)) == ids
    told = [entry.message for entry in caplog.records if entry.name == "app.predictions.shipper"]
    assert told[0].startswith("Predictions stay in the outbox until the database takes them")
    assert told[1:] == ["Predictions are shipped to the database again"]


async def test_a_server_that_dies_and_comes_back_gets_everything(source, outbox):
    with Postgres() as server:
        async with (
            # A server that dies closes its connections, so nothing waits so long; one that is slow refuses no row.
            Database(server.create_database(), timeout_seconds=30.0) as database,
            Shipper(source, database, poll_seconds=0.01, batch_rows=20) as shipper,
        ):
            ids = await record(source, *(prediction() for _ in range(50)))
            await asyncio.to_thread(server.stop)
            ids += await record(source, *(prediction() for _ in range(50)))

            async def noticed() -> bool:
                return shipper.rows > 0

            await until(noticed)
            await asyncio.to_thread(server.start)

            async def shipped() -> bool:
                return left(outbox) == 0

            await until(shipped)
            assert sorted(await arrived(database)) == sorted(ids)


@pytest.mark.parametrize("is_read", [False, True], ids=["while nobody reads it", "while somebody reads it"])
async def test_an_outbox_that_filled_its_disk_is_emptied_when_the_database_is_back(tmp_path, is_read):
    with Postgres() as server, SmallDisk(tmp_path / "disk", megabytes=48) as disk:
        path = migrated(disk.folder / "hallmark.db")
        async with (
            PredictionLog(path, reserve_bytes=24_000_000) as source,
            Database(server.create_database(), timeout_seconds=30.0) as database,
            Shipper(source, database, poll_seconds=0.01) as shipper,
        ):
            await record(source, prediction())

            async def shipped() -> bool:
                return not await source.closed(1) and not shipper.rows

            await until(shipped)
            await asyncio.to_thread(server.stop)
            ids = []
            with reading(path) if is_read else nullcontext():
                while source.healthy:
                    given = [prediction(answer="a" * 20_000) for _ in range(10)]
                    with suppress(RecordUnavailable):
                        for each in given:
                            source.open(each)
                    ids += await record(source, *given)  # What was opened is recorded, whatever came in between.
            assert len(ids) > 100
            await asyncio.to_thread(server.start)
            await until(shipped)
            assert set(ids) <= set(await arrived(database))

            async def has_room() -> bool:
                return source.healthy  # Though the file is as large as before: its pages are empty.

            await until(has_room)


ODD = {
    "a NUL in the answer": {"answer": "a\0b"},
    "a NUL in a name": {"user": "a\0b", "conversation": "\0"},
    "a NUL in JSON": {"metadata": {"a\0": "\0"}, "passages": [{"document_id": "\0", "document_version": "v"}]},
    "a number too large": {"prompt_tokens": 1 << 40, "completion_tokens": 5},
    "a request that is no JSON": {"request": b'{"a": "\\q"}'},
    "half a surrogate pair": {"request": b'{"a": "\\ud800"}'},
    "very deep JSON": {"request": b"[" * 50_000 + b"]" * 50_000},
}


@pytest.mark.parametrize("odd", ODD)
async def test_content_that_a_database_refuses_arrives_in_a_form_that_it_takes(source, outbox, database, odd):
    strange, plain = prediction(**ODD[odd]), prediction(answer="plain")
    ids = await record(source, strange, plain)
    async with Shipper(source, database):
        pass
    assert await arrived(database) == dict.fromkeys(ids, "finished")
    assert left(outbox) == 0
    read = await History(database).get("acme", strange.id)
    as_json = json.loads(json.dumps(read.as_dict(), default=str))
    assert as_json["id"] == strange.id
    if odd == "a NUL in the answer":
        assert read.answer == "a\ufffdb"  # As long as before: citations count characters.
    if odd == "a number too large":
        assert (read.prompt_tokens, read.completion_tokens) == (None, 5)
    if odd == "a request that is no JSON":
        assert json.loads(bytes(read.request)) == '{"a": "\\q"}'


async def test_a_row_that_is_refused_all_the_same_stays_and_the_others_go(source, outbox, database, caplog):
    bad, *good = prediction(answer="sapphire"), prediction(), prediction()
    await record(source, bad, *good)
    async with database.writing() as connection:
        await connection.execute(predictions.insert(), _refusing(bad))
        await connection.run_sync(_refuse_others_of, bad)
    async with Shipper(source, database, poll_seconds=0.01) as shipper:

        async def the_others_went() -> bool:
            return left(outbox) == 1 and shipper.rows == 1

        await until(the_others_went)
        later = await record(source, prediction())
        await until(the_others_went)
    assert set(await arrived(database)) >= {*later, *(each.id for each in good)}
    assert (await source.get("acme", bad.id)).answer == "sapphire"
    assert bad.id in caplog.text
    assert "stays in the outbox of this replica" in caplog.text
    assert "sapphire" not in caplog.text


async def test_the_end_ships_what_was_just_closed_and_gives_up_in_time(source, outbox, database_url):
    async with Flaky(database_url) as database:
        async with Shipper(source, database, poll_seconds=60.0):
            await record(source, *(prediction() for _ in range(450)))
        assert len(await arrived(database)) == 450
        database.away = True
        watch = Stopwatch()
        async with Shipper(source, database, drain_seconds=0.5):
            await record(source, prediction())
        assert watch.seconds < 3
        assert left(outbox) == 1


def _facts(rows: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    from app.predictions.shipper import shippable

    return [shippable(row[1:]) for row in rows]


def _refusing(bad: Prediction) -> dict[str, Any]:
    """A row of another prediction, which only makes sure that the table is there."""
    return {"id": uuid7(), "tenant": "other", "outcome": "finished", "stream": False, "store": True}


def _refuse_others_of(connection: Any, bad: Prediction) -> None:
    """Make the database refuse one row for its content."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"ALTER TABLE predictions ADD CONSTRAINT refuses CHECK (id <> '{bad.id}')")
    else:
        key = bad.id.replace("-", "")
        connection.exec_driver_sql(
            "CREATE TRIGGER refuses BEFORE INSERT ON predictions "
            f"WHEN new.id = x'{key}' BEGIN SELECT raise(ABORT, 'refused'); END"
        )
