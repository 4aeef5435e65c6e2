"""No answer without its record, unless the settings say that answers go first."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from app.predictions import PredictionLog
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import LiveGateway, live_gateway, size_with_room
from tests.stopwatch import Stopwatch

QUESTION = "What is a release?"
FILLER = "word " * 4_000


def log_on_a_small_disk(tmp_path: Path, *, commit_seconds: float) -> PredictionLog:
    path = tmp_path / "hallmark.db"
    room = size_with_room(path, 200_000)
    return PredictionLog(path, max_bytes=room, commit_seconds=commit_seconds, drain_seconds=0.2)


@asynccontextmanager
async def on_a_full_disk(
    tmp_path: Path, tgi: FakeTGI, *, record_required: bool = True, commit_seconds: float = 0.2
) -> AsyncIterator[LiveGateway]:
    """A gateway whose log just met the end of its disk."""
    predictions = log_on_a_small_disk(tmp_path, commit_seconds=commit_seconds)
    async with live_gateway(
        tmp_path, engine_url=tgi.url, predictions=predictions, record_required=record_required
    ) as live:
        async with asyncio.timeout(50):
            while predictions.healthy:
                await live.api.ask(QUESTION + FILLER, store=True)
        tgi.requests.clear()
        yield live


@pytest.mark.parametrize("stream", [False, True])
async def test_on_a_full_disk_the_engine_is_not_asked_and_nobody_gets_an_unrecorded_answer(tmp_path, stream):
    async with FakeTGI() as tgi, on_a_full_disk(tmp_path, tgi) as live:
        for _ in range(3):
            response = await live.api.ask(QUESTION + FILLER, stream=stream)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "record_unavailable")
            assert int(response.headers["retry-after"]) >= 1
        assert tgi.bodies == []
        assert live.counts["503", "failed"] >= 3
        # What is refused does not pile up in memory.
        assert live.gateway.predictions.backlog <= 2
        assert live.gateway.admission.in_flight == 0


async def test_the_answer_that_finds_the_disk_full_is_not_given(tmp_path):
    predictions = log_on_a_small_disk(tmp_path, commit_seconds=0.8)
    async with (
        FakeTGI() as tgi,
        live_gateway(tmp_path, engine_url=tgi.url, predictions=predictions) as live,
    ):
        statuses = []
        while predictions.healthy:
            response = await live.api.ask(QUESTION + FILLER)
            statuses.append(response.status_code)
        assert statuses[:-1] == [200] * (len(statuses) - 1)
        assert statuses[-1] == 503
        given = {record.id for record in await live.records(len(statuses) - 1)}
        assert len(given) == len(statuses) - 1


async def test_a_stream_that_finds_the_disk_full_at_its_end_ends_in_an_error_event(tmp_path):
    predictions = log_on_a_small_disk(tmp_path, commit_seconds=0.8)
    answer = Tokens("word " * 60_000, " and more")  # Its opening row has room on the disk, its closing one has not.
    async with (
        FakeTGI(answer) as tgi,
        live_gateway(tmp_path, engine_url=tgi.url, predictions=predictions) as live,
    ):
        stream = await live.api.stream(QUESTION)
        assert stream.response.status_code == 200
        assert not stream.done
        assert stream.error is not None
        assert stream.error["code"] == "record_unavailable"


@pytest.mark.parametrize("stream", [False, True])
async def test_with_records_at_best_effort_answers_go_on_without_delay(tmp_path, stream):
    async with FakeTGI() as tgi, on_a_full_disk(tmp_path, tgi, record_required=False, commit_seconds=1.0) as live:
        for _ in range(3):
            watch = Stopwatch()
            if stream:
                streamed = await live.api.stream(QUESTION + FILLER)
                assert (streamed.text, streamed.done) == ("Hello world.", True)
            else:
                answer = await live.api.answer(QUESTION + FILLER)
                assert answer["choices"][0]["message"]["content"] == "Hello world."
            assert watch.seconds < 0.8  # The disk is not waited for: that would take a second.
        assert len(tgi.bodies) == 3
        # What is not recorded does not pile up in memory.
        assert live.gateway.predictions.backlog <= 2


async def test_with_records_at_best_effort_a_healthy_disk_still_has_them_all(tmp_path):
    async with FakeTGI() as tgi, live_gateway(tmp_path, engine_url=tgi.url, record_required=False) as live:
        for _ in range(3):
            await live.api.answer(QUESTION)
        assert {record.outcome for record in await live.records(3)} == {"finished"}


async def test_a_caller_that_leaves_on_a_full_disk_breaks_nothing(tmp_path):
    async with FakeTGI() as tgi, on_a_full_disk(tmp_path, tgi, record_required=False) as live:
        tgi.script(Tokens("Hello", gate=asyncio.Event()))
        asking = asyncio.create_task(live.api.ask(QUESTION))
        await tgi.until(lambda: len(tgi.bodies) == 1)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await tgi.until(lambda: tgi.cancelled == 1)
        assert (await live.api.answer(QUESTION))["choices"]
        assert live.gateway.admission.in_flight == 0
