"""One row for each id, on the disk before anyone is told so, and nothing in it that should not be there."""

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from uuid import RFC_4122, UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import database
from app.database import DataDirectoryBusy
from app.database.journal import LONGEST_BYTES
from app.errors import RecordUnavailable
from app.messages import Message
from app.predictions import Prediction, PredictionLog, uuid7
from app.predictions.writer import ROOM_SECONDS
from tests.migrated import migrated
from tests.properties import examples
from tests.service import size_with_room, until
from tests.small_disk import SmallDisk, reading
from tests.stopwatch import Stopwatch

SECRETS = ("sapphire", "obsidian", "malachite", "tourmaline", "chrysoberyl", "carnelian", "alexandrite", "lapis")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return migrated(tmp_path / "hallmark.db")


@pytest.fixture
async def log(path: Path) -> AsyncIterator[PredictionLog]:
    async with PredictionLog(path) as log:
        yield log


def _prediction(**facts) -> Prediction:
    return Prediction(**{"id": uuid7(), "tenant": "acme", **facts})


def _large() -> Prediction:
    return _prediction(answer="x" * 20_000, outcome="finished")


def _rows(path: Path) -> list[tuple[str, str]]:
    """Read ids and outcomes as another process would: only what is committed."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT id, outcome FROM predictions ORDER BY id").fetchall()
    return [(str(UUID(bytes=key)), outcome) for key, outcome in rows]


# --- ids ---


def test_ids_rise_within_the_process_and_hold_the_time():
    before = time.time_ns() // 1_000_000
    ids = [uuid7() for _ in range(20_000)]
    after = time.time_ns() // 1_000_000 + 1
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    for text in (ids[0], ids[-1]):
        value = UUID(text)
        assert str(value) == text
        assert (value.version, value.variant) == (7, RFC_4122)
        assert before <= value.int >> 80 <= after
        assert int(_prediction(id=text).created_at.timestamp() * 1000) == value.int >> 80


def test_ids_of_several_threads_never_meet():
    with ThreadPoolExecutor(4) as threads:
        batches = list(threads.map(lambda _: [uuid7() for _ in range(2_000)], range(8)))
    assert all(batch == sorted(batch) for batch in batches)
    ticks = {text[:18] for batch in batches for text in batch}
    assert len(ticks) == 16_000


# --- one row, whatever happens ---


async def test_a_closed_prediction_is_read_back_whole(log):
    prediction = _prediction(
        key_id="k",
        user="ann",
        conversation="c-1",
        model="handbook",
        release_name="handbook@3",
        release_digest="d" * 64,
        assignment="fallback",
        shadow_of="01900000-0000-7000-8000-000000000000",
        base_model="smollm2",
        adapter="legal",
        prompt_version="p1",
        index_version="i1",
        retrieval_mode="auto",
        retrieval_outcome="found",
        stream=True,
        trace_id="t" * 32,
        kept="full",
        subject_key="k",
        metadata={"ticket": 7},
        request=b'{"messages":[{"role":"user","content":"Wie gr\xc3\xb6\xc3\x9fer?"}]}',
        question="Wie größer?",
    )
    log.open(prediction)
    prediction.messages = [Message(role="user", content="Wie größer? \N{MUSICAL SYMBOL G CLEF}")]
    prediction.passages = [{"document_id": "d1", "n": 1, "text": "So.", "score": 0.5}]
    prediction.citations = [{"n": 1, "quote": "So.", "support": "supported"}]
    prediction.tool_calls = [{"id": "call", "function": {"name": "f", "arguments": "{}"}}]
    prediction.features = [{"feature": "customer:plan", "entity": "c-1", "value": "pro", "state": "read"}]
    prediction.answer = "So. [1]"
    prediction.outcome, prediction.finish_reason, prediction.verdict = "finished", "stop", "supported"
    prediction.predicted_class, prediction.valid = "refund", True
    prediction.prompt_tokens, prediction.completion_tokens = 12, 3
    prediction.retrieve_seconds, prediction.queue_seconds, prediction.first_token_seconds = 0.1, 0.2, 0.3
    prediction.engine_seconds, prediction.total_seconds = 0.4, 0.5
    await log.close(prediction)

    read = await log.get("acme", prediction.id)
    as_json = json.loads(msgspec.json.encode(read.as_dict()))
    assert as_json == json.loads(msgspec.json.encode(prediction.as_dict()))
    assert as_json["request"]["messages"][0]["content"] == "Wie größer?"
    assert as_json["created_at"].startswith(prediction.created_at.strftime("%Y-%m-%dT%H:%M:%S"))
    assert None not in {
        value for key, value in as_json.items() if key != "error_code" and not isinstance(value, dict | list)
    }


@pytest.mark.parametrize("outcome", ["finished", "failed", "cancelled", "interrupted"])
@pytest.mark.parametrize("visible", [True, False], ids=["id shown before", "id not shown"])
async def test_every_outcome_is_one_row(path, log, outcome, visible):
    prediction = _prediction()
    log.open(prediction)
    if visible:
        await log.opened(prediction)
        assert _rows(path) == [(prediction.id, "open")]
    prediction.outcome = outcome
    await log.close(prediction)
    assert _rows(path) == [(prediction.id, outcome)]
    assert log.backlog == 0


async def test_the_first_closing_counts_however_often_it_is_closed(path, log):
    prediction = _prediction()
    log.open(prediction)
    prediction.outcome = "finished"
    log.close_nowait(prediction)
    prediction.outcome = "failed"
    await log.close(prediction)
    log.close_nowait(prediction)
    await log.close(prediction)
    copied_anew = _prediction(id=prediction.id, outcome="cancelled")
    await log.close(copied_anew)
    assert _rows(path) == [(prediction.id, "finished")]


async def test_a_cancelled_request_is_recorded_though_nothing_can_be_awaited_any_more(path):
    started = asyncio.Event()
    predictions = [_prediction() for _ in range(10)]

    async def request(log: PredictionLog, prediction: Prediction) -> None:
        log.open(prediction)
        try:
            await log.opened(prediction)
            started.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            prediction.outcome = "cancelled"
            raise
        finally:
            log.close_nowait(prediction)

    async with PredictionLog(path) as log:
        tasks = [asyncio.create_task(request(log, prediction)) for prediction in predictions]
        await started.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert _rows(path) == [(prediction.id, "cancelled") for prediction in predictions]


async def test_a_waiter_that_is_cancelled_takes_nobody_along(path, log):
    prediction, other = _prediction(), _prediction()
    for each in (prediction, other):
        log.open(each)
        each.outcome = "finished"
    waiting = log.close(prediction)
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(log.close(other), log.close(prediction))
    assert [outcome for _, outcome in _rows(path)] == ["finished", "finished"]


async def test_a_prediction_closed_without_an_outcome_is_interrupted(path, log):
    prediction = _prediction()
    log.open(prediction)
    await log.close(prediction)
    assert _rows(path) == [(prediction.id, "interrupted")]


async def test_facts_changed_after_the_closing_are_not_recorded(log):
    prediction = _prediction(outcome="finished", answer="then")
    log.close_nowait(prediction)
    prediction.answer = "now"
    await log.close(prediction)
    assert (await log.get("acme", prediction.id)).answer == "then"


async def test_a_fast_answer_is_written_once_and_a_slow_one_is_open_meanwhile(path):
    async with PredictionLog(path, linger_seconds=30.0) as log:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE writes (id)")
            connection.execute(
                "CREATE TRIGGER count_writes BEFORE INSERT ON predictions BEGIN INSERT INTO writes VALUES (new.id); END"
            )
        fast, slow = _prediction(), _prediction()
        log.open(fast)
        log.open(slow)
        fast.outcome = "finished"
        await log.close(fast)
        assert _rows(path) == [(fast.id, "finished")]
        assert log.backlog == 1
    with closing(sqlite3.connect(path)) as connection:
        writes = [str(UUID(bytes=key)) for (key,) in connection.execute("SELECT id FROM writes")]
    assert writes == [fast.id, slow.id]


async def test_an_opening_row_that_somebody_waits_for_does_not_linger(path):
    async with PredictionLog(path, linger_seconds=30.0, commit_seconds=5.0) as log:
        prediction = _prediction()
        log.open(prediction)
        await log.opened(prediction)
        await log.opened(prediction)
        assert _rows(path) == [(prediction.id, "open")]


async def test_a_closing_row_is_waited_for_though_the_opening_one_arrives_first(path, log):
    prediction = _prediction()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # The writer is held up with the opening row in its hands.
        log.open(prediction)
        opened = log.opened(prediction)
        await asyncio.sleep(0.02)
        prediction.outcome = "finished"
        log.close_nowait(prediction)
        other.execute("ROLLBACK")
    await opened
    await log.close(prediction)
    assert _rows(path) == [(prediction.id, "finished")]


async def test_an_opening_row_nobody_waits_for_is_written_soon_all_the_same(path):
    async with PredictionLog(path, linger_seconds=0.001) as log:
        prediction = _prediction()
        log.open(prediction)
        assert await _until(lambda: (prediction.id, "open") in _rows(path))


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["open", "opened", "nowait", "close"])), max_size=30))
@examples(40)
def test_any_order_of_calls_leaves_one_row_for_each_id_that_was_opened(tmp_path_factory, calls):
    path = migrated(tmp_path_factory.mktemp("any") / "hallmark.db")

    async def run() -> dict[str, str]:
        expected: dict[str, str] = {}
        predictions = [_prediction() for _ in range(6)]
        async with PredictionLog(path, linger_seconds=0.0005) as log:
            for number, call in calls:
                prediction = predictions[number]
                if call == "open" and prediction.id not in expected:
                    log.open(prediction)
                    expected[prediction.id] = "interrupted"
                elif prediction.id in expected and call == "opened":
                    await log.opened(prediction)
                elif prediction.id in expected:
                    if not prediction.handed_over:
                        expected[prediction.id] = prediction.outcome = "finished"
                    log.close_nowait(prediction)
                    if call == "close":
                        await log.close(prediction)
        return expected

    expected = asyncio.run(run())
    assert dict(_rows(path)) == expected


async def test_thousands_at_once_are_all_there(path):
    predictions = [_prediction(answer="a" * 100) for _ in range(2_000)]

    async def request(log: PredictionLog, prediction: Prediction) -> None:
        log.open(prediction)
        await asyncio.sleep(0)
        prediction.outcome = "finished"
        await log.close(prediction)

    async with PredictionLog(path) as log:
        await asyncio.gather(*(request(log, prediction) for prediction in predictions))
        assert _rows(path) == [(prediction.id, "finished") for prediction in predictions]


# --- what must not be written ---


def _full_of_content(**facts) -> Prediction:
    question, answer, text, quote, tool, message, title, heading = SECRETS
    return _prediction(
        request=json.dumps({"messages": [{"content": question}]}).encode(),
        question=question,
        messages=[Message(role="user", content=message)],
        answer=answer,
        tool_calls=[{"function": {"name": tool}}],
        passages=[
            {
                "document_id": "doc-1",
                "n": 4,
                "score": 0.7,
                "text": text,
                "document_title": title,
                "page": None,
                "heading_path": [heading],
            }
        ],
        citations=[{"n": 1, "start": 3, "end": 9, "quote": quote, "status": "weak", "passage_id": "doc-1/4"}],
        metadata={"ticket": "kept"},
        completion_tokens=5,
        **facts,
    )


@pytest.mark.parametrize("store", [True, False])
async def test_without_store_no_content_reaches_any_file(path, store):
    prediction = _full_of_content(store=store)
    async with PredictionLog(path) as log:
        log.open(prediction)
        await log.opened(prediction)
        prediction.outcome = "finished"
        await log.close(prediction)
        files = [file.read_bytes() for file in path.parent.iterdir()]
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        files += [file.read_bytes() for file in path.parent.iterdir()]
        read = await log.get("acme", prediction.id)
    found = {secret for secret in SECRETS if any(secret.encode() in content for content in files)}
    assert found == (set(SECRETS) if store else set())
    assert (read.store, read.completion_tokens, read.metadata) == (store, 5, {"ticket": "kept"})
    if not store:
        assert read.passages == [{"document_id": "doc-1", "n": 4, "score": 0.7, "page": None}]
        assert read.citations == [{"n": 1, "start": 3, "end": 9, "status": "weak", "passage_id": "doc-1/4"}]
        assert (read.request, read.messages, read.question, read.answer, read.tool_calls) == (None,) * 5


def test_printing_a_prediction_shows_no_content():
    prediction = _full_of_content()
    assert not [secret for secret in SECRETS if secret in f"{prediction} {prediction!r}"]
    assert prediction.id in repr(prediction)


async def test_content_that_cannot_be_written_costs_the_content_and_nothing_else(log, caplog):
    bad = [
        _prediction(answer="lone \udcff surrogate", model="m", completion_tokens=5),
        _prediction(metadata={"x": object()}, model="m", completion_tokens=5),
        _prediction(request=b"\xff\xfe", model="m", completion_tokens=5),
        _prediction(prompt_tokens=1 << 80, model="m", completion_tokens=5),
        _prediction(user="odd \udcff", model="m", completion_tokens=5),
    ]
    good = _prediction(answer="fine")
    for prediction in (*bad, good):
        prediction.outcome = "finished"
        log.close_nowait(prediction)
    await asyncio.gather(*(log.close(prediction) for prediction in (*bad, good)))
    assert (await log.get("acme", good.id)).answer == "fine"
    for prediction in bad:
        read = await log.get("acme", prediction.id)
        assert (read.outcome, read.model, read.completion_tokens) == ("finished", "m", 5)
        assert (read.error_code, read.answer, read.request) == ("record_incomplete", None, None)
        assert prediction.id in caplog.text
    assert log.healthy


# --- reading ---


async def test_a_tenant_sees_only_its_own(log):
    mine, theirs = _prediction(tenant="acme", outcome="finished"), _prediction(tenant="other", outcome="failed")
    await asyncio.gather(log.close(mine), log.close(theirs))
    assert (await log.get("acme", mine.id)).id == mine.id
    assert await log.get("acme", theirs.id) is None


async def test_what_is_no_id_is_not_found(log):
    assert await log.get("acme", "'; DROP TABLE predictions") is None
    assert await log.get("acme", uuid7()) is None


@pytest.mark.parametrize("bad", [{"answer": "\ud800"}, {"prompt_tokens": 1 << 64}])
async def test_of_rows_written_by_one_statement_one_that_cannot_be_costs_its_content_alone(path, log, bad):
    made = [_prediction(answer="said") for _ in range(5)]
    for prediction in made:
        log.open(prediction)
        prediction.outcome = "finished"
    for name, value in bad.items():
        setattr(made[2], name, value)
    await asyncio.gather(*(log.close(prediction) for prediction in made))
    kept = [await log.get("acme", prediction.id) for prediction in made]
    assert [each and (each.outcome, each.answer) for each in kept] == [
        ("finished", None if number == 2 else "said") for number in range(5)
    ]


# --- being emptied ---


async def test_only_closed_rows_are_read_and_go_when_their_outcome_is_still_the_same(path, log):
    done, cut, running = (_prediction(outcome=outcome) for outcome in ("finished", "interrupted", "open"))
    log.open(running)
    await log.opened(running)
    await log.close(done)
    await log.close(cut)
    rows = await log.closed(10)
    assert [str(UUID(bytes=row[1])) for row in rows] == [done.id, cut.id]
    assert await log.closed(10, but=[row[0] for row in rows]) == []
    assert await log.outbox() == (2, done.id)
    await log.close(_prediction(id=cut.id, outcome="finished"))
    await log.remove({"finished": [rows[0][0]], "interrupted": [rows[1][0]]})
    assert _rows(path) == [(cut.id, "finished"), (running.id, "open")]


async def test_rows_go_along_with_others_though_nobody_else_writes(path, log):
    predictions = [_prediction(outcome="finished") for _ in range(50)]
    await asyncio.gather(*(log.close(prediction) for prediction in predictions))
    numbers = [row[0] for row in await log.closed(100)]
    await asyncio.gather(log.remove({"finished": numbers[:20]}), log.remove({"finished": numbers[20:49]}))
    assert _rows(path) == [(predictions[49].id, "finished")]
    assert await log.outbox() == (1, predictions[49].id)


# --- refusing ---


async def test_a_full_queue_refuses_new_predictions_and_takes_what_it_promised(path):
    async with PredictionLog(path, capacity=3, linger_seconds=30.0) as log:
        taken = [_prediction() for _ in range(3)]
        for prediction in taken:
            log.open(prediction)
        refused = _prediction()
        with pytest.raises(RecordUnavailable, match="as many records") as refusal:
            log.open(refused)
        assert refusal.value.retry_after_seconds
        assert log.healthy
        for prediction in taken:
            prediction.outcome = "finished"
        await asyncio.gather(*(log.close(prediction) for prediction in taken))
        log.open(refused)
    assert [outcome for _, outcome in _rows(path)] == ["finished"] * 3 + ["interrupted"]


async def test_a_full_disk_refuses_new_predictions_keeps_those_in_flight_and_recovers(path, caplog):
    async with PredictionLog(path, max_bytes=size_with_room(path, 130_000), commit_seconds=0.2) as log:
        filler = []
        while log.healthy:
            prediction = _prediction(answer="x" * 20_000)
            try:
                log.open(prediction)
                prediction.outcome = "finished"
                await log.close(prediction)
            except RecordUnavailable:
                break
            filler.append(prediction)
        assert 2 < len(filler) < 20
        stuck = prediction
        assert await _until(lambda: not log.healthy)
        with pytest.raises(RecordUnavailable, match="cannot write to its disk"):
            log.open(_prediction())
        assert dict(_rows(path)) == {each.id: "finished" for each in filler}

        with closing(sqlite3.connect(path)) as connection:  # Somebody makes room.
            connection.execute("DELETE FROM predictions WHERE id = ?", (UUID(filler[0].id).bytes,))
            connection.commit()
        assert await _until(lambda: log.healthy)
        later = _prediction(outcome="finished")
        await log.close(later)
        assert dict(_rows(path)) == {each.id: "finished" for each in (*filler[1:], stuck, later)}
    assert "database or disk is full" in caplog.text


async def test_a_disk_that_the_journal_filled_while_somebody_read_is_written_to_again(tmp_path, caplog):
    with SmallDisk(tmp_path / "disk", megabytes=16) as disk:
        path = migrated(disk.folder / "predictions.db")
        async with PredictionLog(path, commit_seconds=1.0) as log:
            await asyncio.gather(*(log.close(_large()) for _ in range(350)))
            await log.remove({"finished": [row[0] for row in await log.closed(350)]})
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            disk.fill(but_bytes=4_000_000)
            size, given = path.stat().st_size, []
            with reading(path):  # There is room in the file, to which nothing of the journal can be moved.
                while "database or disk is full" not in caplog.text:
                    given += (batch := [_large() for _ in range(10)])
                    await asyncio.gather(*(log.close(each) for each in batch), return_exceptions=True)
            assert await _until(lambda: log.healthy)
            later = _prediction(outcome="finished")
            await log.close(later)
        assert dict(_rows(path)) == {each.id: "finished" for each in (*given, later)}
        assert path.stat().st_size == size


async def test_the_room_of_a_long_journal_is_given_back_while_requests_are_refused(tmp_path):
    with SmallDisk(tmp_path / "disk", megabytes=48) as disk:
        path = migrated(disk.folder / "predictions.db")
        async with PredictionLog(path, reserve_bytes=16_000_000, commit_seconds=3.0) as log:
            with reading(path):  # Rows that come and go leave the file as it is, and its journal grows.
                while log.healthy:
                    await asyncio.gather(*(log.close(_large()) for _ in range(10)))
                    await log.remove({"finished": [row[0] for row in await log.closed(100)]})
                for _ in range(50):
                    await log.close(_prediction(outcome="finished"))  # None of what runs waits for the reader.

            async def is_healthy() -> bool:
                return log.healthy

            await until(is_healthy)
            assert disk.free_bytes > 20_000_000


async def test_a_file_is_not_written_anew_where_there_is_no_room_for_two_of_it(tmp_path):
    with SmallDisk(tmp_path / "disk", megabytes=32) as disk:
        path = migrated(disk.folder / "predictions.db")
        async with PredictionLog(path) as log:
            await asyncio.gather(*(log.close(_large()) for _ in range(300)))
            disk.fill(but_bytes=4_000_000)
            assert not await log.scrub()
            assert disk.free_bytes == 4_000_000 // 4096 * 4096
            disk.free()
            assert await log.scrub()


async def test_a_file_that_somebody_reads_is_written_anew_later_and_written_to_meanwhile(path, log):
    await asyncio.gather(*(log.close(_large()) for _ in range(10)))
    journal = path.with_name(f"{path.name}-wal")
    with reading(path):
        size = journal.stat().st_size
        assert await asyncio.gather(*(log.scrub() for _ in range(3))) == [False] * 3
        assert journal.stat().st_size == size
        await asyncio.gather(*(log.scrub() for _ in range(3)), log.close(_prediction(outcome="finished")))
    assert await log.scrub()


async def test_a_journal_that_grew_while_somebody_read_takes_no_room_for_good(path, log):
    journal = path.with_name(f"{path.name}-wal")
    with reading(path):
        while journal.stat().st_size <= LONGEST_BYTES:
            await log.close(_prediction(answer="x" * 1_000_000, outcome="finished"))

    async def is_short() -> bool:
        await log.close(_prediction(outcome="finished"))
        return journal.stat().st_size <= LONGEST_BYTES

    await until(is_short)


async def test_under_its_reserve_the_disk_is_for_what_was_promised_and_for_nothing_new(path, caplog):
    room = 1_000_000
    async with PredictionLog(path, reserve_bytes=1_000_000, room_bytes=lambda *_: room) as log:
        running, refused, later = _prediction(), _prediction(), _prediction()
        log.open(running)
        await log.opened(running)
        room = 999_999
        assert await _until(lambda: not log.healthy)
        with pytest.raises(RecordUnavailable, match="too little room") as refusal:
            log.open(refused)
        assert refusal.value.retry_after_seconds
        running.outcome = "finished"
        await log.close(running)
        assert not log.healthy  # That a row was written does not mean that there is room.
        room = 1_050_000  # Nor does a little more.
        other = _prediction(outcome="finished")
        await log.close(other)
        await log.remove({"finished": [row[0] for row in await log.closed(1)]})
        assert not log.healthy
        room = 1_125_000
        assert await _until(lambda: log.healthy)
        log.open(later)
    assert dict(_rows(path)) == {other.id: "finished", later.id: "interrupted"}
    told = [entry.message for entry in caplog.records if entry.name == "app.predictions.log"]
    assert told == [
        "Requests are refused: the disk has less than 1000000 bytes left",
        "There is room for predictions again",
    ]


async def test_a_disk_with_much_room_is_not_asked_for_it_after_every_commit(path):
    looks = 0

    def much(*_: object) -> int:
        nonlocal looks
        looks += 1
        return 2_000_000_000  # Two seconds of whatever is written.

    async with PredictionLog(path, reserve_bytes=1_000_000, room_bytes=much) as log:
        began = time.monotonic()
        while time.monotonic() < began + 0.3:
            await log.close(_prediction(outcome="finished"))
        assert looks <= 2 + (time.monotonic() - began) / ROOM_SECONDS


async def test_a_disk_with_little_room_is_asked_for_it_while_rows_are_written(path):
    looks = 0

    def little(*_: object) -> int:
        nonlocal looks
        looks += 1
        return 2_000_000

    async with PredictionLog(path, reserve_bytes=1_000_000, room_bytes=little) as log:
        watch = Stopwatch()
        while looks < 10:
            await log.close(_prediction(outcome="finished"))
        assert watch.seconds < 10 * ROOM_SECONDS


async def test_a_disk_that_does_not_tell_its_room_is_written_to(path):
    def fails(*_: object) -> int:
        raise OSError("stale file handle")

    async with PredictionLog(path, reserve_bytes=1_000_000, room_bytes=fails) as log:
        prediction = _prediction(outcome="finished")
        await log.close(prediction)
        assert log.healthy


async def test_a_database_locked_by_another_only_delays(path, log):
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        prediction = _prediction()
        log.open(prediction)
        prediction.outcome = "finished"
        closing_it = log.close(prediction)
        assert not (await asyncio.wait([closing_it], timeout=0.05))[0]
        other.execute("ROLLBACK")
    await closing_it
    assert _rows(path) == [(prediction.id, "finished")]


async def test_closing_gives_up_on_a_dead_disk_in_time_and_tells_who_waits(path, caplog):
    watch = Stopwatch()
    with closing(database.connect(path)) as other:
        async with PredictionLog(path, commit_seconds=60.0, drain_seconds=0.2) as log:
            prediction = _prediction(outcome="finished", answer="x" * 50_000)
            other.execute("DROP TABLE predictions")
            waiting = log.close(prediction)
            await asyncio.sleep(0)
    with pytest.raises(RecordUnavailable):
        await waiting
    assert watch.seconds < 5
    assert "1 records not on the disk" in caplog.text


async def test_a_closed_log_takes_nothing(path):
    async with PredictionLog(path) as log:
        pass
    with pytest.raises(RecordUnavailable, match="closed"):
        log.open(_prediction())
    assert not log.healthy


async def test_an_id_that_is_none_is_refused_at_once(log):
    with pytest.raises(ValueError, match="prediction-7"):
        log.open(_prediction(id="prediction-7"))
    assert log.backlog == 0


# --- starting and stopping ---


async def test_closing_the_log_writes_what_is_left_and_ends_what_is_open(path):
    done, left = _prediction(), _prediction()
    async with PredictionLog(path, linger_seconds=30.0) as log:
        log.open(done)
        log.open(left)
        done.outcome = "finished"
        log.close_nowait(done)
    assert _rows(path) == [(done.id, "finished"), (left.id, "interrupted")]


async def test_one_log_at_a_time_has_the_database(path, log):
    with pytest.raises(DataDirectoryBusy, match=rf"belongs to a running Hallmark \(process {os.getpid()}\)"):
        async with PredictionLog(path):
            pass
    assert log.healthy


async def test_a_file_that_is_no_database_is_said_to_be_unusable(path):
    path.write_bytes(b"not a database, and long enough that nobody takes it for an empty one" * 20)
    with pytest.raises(RecordUnavailable, match="cannot be opened: file is not a database"):
        async with PredictionLog(path):
            pass
    path.unlink()
    async with PredictionLog(path) as log:
        assert log.healthy


async def _until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True
