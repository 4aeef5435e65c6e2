"""Which predictions used a document is known of every closed one, though nobody told it when."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

from app.database import Database, followed, predictions
from app.errors import Unavailable
from app.predictions import DocumentUses, Prediction, PredictionLog, uuid7
from app.predictions import documents as module
from tests.migrated import migrated
from tests.service import until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return migrated(tmp_path / "hallmark.db")


@pytest.fixture
async def log(path) -> AsyncIterator[PredictionLog]:
    async with PredictionLog(path) as log:
        yield log


@pytest.fixture
async def database(path) -> AsyncIterator[Database]:
    async with Database.of_file(path) as database:
        yield database


def prediction(*used: tuple[str, str], cited: tuple[tuple[str, str], ...] = (), **facts: Any) -> Prediction:
    def items(pairs: Any) -> list[dict[str, Any]]:
        return [{"document_id": document, "document_version": version, "n": 1} for document, version in pairs]

    return Prediction(
        **{"id": uuid7(), "tenant": "acme", "outcome": "finished", **facts},
        passages=items(used),
        citations=items(cited),
    )


async def record(log: PredictionLog, *given: Prediction) -> list[str]:
    await asyncio.gather(*(log.close(each) for each in given))
    return sorted((each.id for each in given), reverse=True)


def uses(database: Database, **options: Any) -> DocumentUses:
    """Never entered: it follows when it is asked, and only then."""
    return DocumentUses(database, follows=True, **options)


async def ids(found: DocumentUses, document: str = "d1", **options: Any) -> list[str]:
    return [use.prediction_id for use in await found.find("acme", document, **{"limit": 100, **options})]


async def test_a_document_is_followed_to_the_predictions_that_were_given_it(log, database):
    given = prediction(("d1", "v1"), ("d1", "v2"), ("d2", "v1"), cited=(("d1", "v2"),))
    plain = prediction(("d1", "v1"), ("d1", "v1"))
    await record(log, given, plain, prediction(("d1", "v1"), tenant="other"), prediction())
    found = uses(database)
    assert [
        (use.prediction_id, use.document_version, use.cited) for use in await found.find("acme", "d1", limit=9)
    ] == [
        (plain.id, "v1", False),
        (given.id, "v1", False),
        (given.id, "v2", True),
    ]
    assert await ids(found, version="v2") == [given.id]
    assert await ids(found, cited=True) == [given.id]
    assert await ids(found, "d2", cited=False) == [given.id]
    assert await ids(found, "d3") == []


async def test_pages_keep_the_versions_of_a_prediction_together(log, database):
    expected = await record(log, *(prediction(("d1", "v1"), ("d1", "v2")) for _ in range(10)))
    found, seen, before = uses(database, batch_rows=4), [], None
    while page := await found.find("acme", "d1", limit=5, before=before):
        seen += [use.prediction_id for use in page]
        before = page[-1].prediction_id
    assert seen == [each for each in expected for _ in range(2)]


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
async def test_an_answer_that_is_open_when_it_is_met_is_noted_when_it_closes(log, database, batch_rows):
    found = uses(database, batch_rows=batch_rows)
    slow = prediction(("d1", "v1"), outcome="open")
    log.open(slow)
    await log.opened(slow)
    fast = await record(log, *(prediction(("d1", "v1")) for _ in range(5)))
    assert await ids(found) == fast
    assert await ids(found) == fast
    slow.outcome = "failed"
    await log.close(slow)
    assert await ids(found) == sorted([*fast, slow.id], reverse=True)
    assert (await _state(database))["still_open"] == "[]"


async def test_a_crash_between_two_steps_leaves_nothing_out_and_notes_nothing_twice(log, database):
    expected = await record(log, *(prediction(("d1", "v1")) for _ in range(10)))
    broken = uses(database, batch_rows=3)
    assert await broken._step() == 3  # And then the process died.
    assert await ids(uses(database, batch_rows=3)) == expected
    async with database.writing() as connection:
        await connection.execute(followed.update().values(row=0, prediction_id=None))
    assert await ids(uses(database)) == expected


async def test_what_was_given_no_documents_is_passed(log, database):
    found = uses(database, batch_rows=2)
    slow = Prediction(id=uuid7(), tenant="acme")
    log.open(slow)
    await log.opened(slow)
    plain = [Prediction(id=uuid7(), tenant="acme", outcome="finished") for _ in range(5)]
    await record(log, *plain)
    assert await ids(found) == []
    assert (await _state(database))["prediction_id"] in {each.id for each in plain}
    slow.passages, slow.outcome = [{"document_id": "d1", "document_version": "v1"}], "finished"
    await log.close(slow)
    await record(log, Prediction(id=uuid7(), tenant="acme", outcome="finished"))
    assert await ids(found) == [slow.id]


@pytest.mark.parametrize("erased", [1, 4, 5])
async def test_numbers_that_sqlite_gives_a_second_time_are_not_missed(log, database, erased):
    found = uses(database)
    before = await record(log, *(prediction(("d1", "v1")) for _ in range(5)))
    assert await ids(found) == before
    async with database.writing() as connection:
        await connection.execute(delete(predictions).where(predictions.c.id.in_(before[:erased])))
    later = await record(log, *(prediction(("d2", "v1")) for _ in range(2)))
    assert await ids(found, "d2") == later


@pytest.mark.parametrize("gap", [module.MAX_ROWS_PASSED - 1, 3 * module.MAX_ROWS_PASSED])
async def test_what_comes_after_many_that_were_erased_is_found(log, database, gap):
    found = uses(database)
    before = await record(log, prediction(("d1", "v1")))
    assert await ids(found) == before
    async with database.writing() as connection:
        await connection.execute(predictions.update().values(row=predictions.c.row + gap))
        await connection.execute(followed.update().values(row=1, prediction_id=None))
    after = await record(log, *(prediction(("d1", "v1")) for _ in range(3)))
    assert await ids(found) == [*after, *before]


async def test_nothing_is_written_where_nothing_is_new(log, database, path):
    found = uses(database)
    await record(log, prediction(("d1", "v1")))
    await ids(found)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # Whoever wants to write has to wait.
        async with asyncio.timeout(30):
            assert len(await ids(found)) == 1
        other.execute("ROLLBACK")


async def test_a_long_history_is_told_to_be_read_yet_and_read_in_the_background(log, database):
    expected = await record(log, *(prediction(("d1", "v1")) for _ in range(module.MAX_BATCHES_AT_ONCE + 10)))
    behind = uses(database, batch_rows=1)
    with pytest.raises(Unavailable) as told:
        await ids(behind)
    assert told.value.retry_after_seconds
    async with DocumentUses(database, follows=True, batch_rows=1, poll_seconds=0.01):

        async def caught_up() -> bool:
            return (await _state(database))["prediction_id"] == expected[0]

        await until(caught_up)
    assert await ids(behind) == expected


async def test_a_database_that_is_away_is_followed_again_when_it_is_back(log, path, caplog):
    class Flaky(Database):
        away = True

        def reading(self) -> Any:
            if self.away:
                raise Unavailable("It is away.")
            return super().reading()

    expected = await record(log, prediction(("d1", "v1")))
    async with Flaky.of_file(path) as database, DocumentUses(database, follows=True, poll_seconds=0.01):

        async def told() -> bool:
            return "cannot be noted for now" in caplog.text

        await until(told)
        database.away = False

        async def noted() -> bool:
            return (await _state(database))["prediction_id"] == expected[0]

        await until(noted)
    assert caplog.text.count("cannot be noted") == 1


async def _state(database: Database) -> dict[str, Any]:
    async with database.reading() as connection:
        row = (await connection.execute(select(followed))).one()
        assert isinstance(json.loads(row.still_open), list)
        return dict(row._mapping)
