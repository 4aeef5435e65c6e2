"""What fails in the engine fails alone, and makes room."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app.engines.local.metrics import Metrics
from app.engines.local.model import LoadedModel
from app.engines.local.protocol import Fault
from app.engines.local.sampler import SamplingOptions
from app.engines.local.scheduler import Delta, Job, Scheduler
from app.engines.local.text import TextStream
from tests.app.engines.local.tiny_engine import chat, metric, running_service, text_of


class Breaking(TextStream):
    """Text of which one token cannot be written."""

    def __init__(self, vocabulary: Any, stops: Sequence[str] = (), *, at: int) -> None:
        super().__init__(vocabulary, stops)
        self._left = at

    def push(self, token: int) -> str:
        self._left -= 1
        if not self._left:
            raise ValueError("no such text")
        return super().push(token)


def job(tiny: LoadedModel, max_tokens: int, text: TextStream | None = None) -> Job:
    return Job(
        model=tiny.model,
        prompt=[5, 6, 7],
        options=SamplingOptions(temperature=0.0),
        max_tokens=max_tokens,
        text=text or TextStream(tiny.vocabulary, ()),
    )


async def last_of(each: Job) -> Delta:
    async with asyncio.timeout(20):
        while not (delta := await each.deltas.get()).is_last:
            pass
    return delta


@pytest.mark.parametrize("at", [1, 2, 5])
async def test_a_request_whose_text_cannot_be_written_fails_alone_and_makes_room(tiny: LoadedModel, at: int) -> None:
    scheduler = Scheduler(end_token_ids=tiny.end_token_ids, max_batch=3, max_queue=0, metrics=Metrics())
    scheduler.start(asyncio.get_running_loop())
    try:
        for _ in range(3):
            # One ends with the token that breaks, in the same step; one goes on after it.
            jobs = job(tiny, at), job(tiny, 30), job(tiny, 30, Breaking(tiny.vocabulary, at=at))
            for each in jobs:
                scheduler.submit(each)
            with pytest.raises(Fault, match="overloaded"):
                scheduler.submit(job(tiny, 1))
            ends = [await last_of(each) for each in jobs]
            assert [end.finish_reason for end in ends] == ["length", "length", None]
            fault = ends[2].fault
            assert fault is not None
            assert (fault.status, "ValueError" in fault.message) == (424, True)
    finally:
        scheduler.stop()


def test_tiny_temperatures_are_greedy_and_cost_their_neighbours_nothing(serve_tiny: Callable[..., Any]) -> None:
    with serve_tiny(max_batch=2, max_queue=2) as client, ThreadPoolExecutor(1) as pool:
        alone, long = text_of(client), text_of(client, max_tokens=400)
        neighbour = pool.submit(text_of, client, max_tokens=400)
        for temperature in (1e-40, 1e-300, 1e-6, 1e-40, 1e-40):  # More than there is room for at once.
            assert text_of(client, temperature=temperature) == alone
        assert neighbour.result() == long
        assert metric(client, "tgi_batch_current_size") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_drawn_is_a_424_for_its_own_request(serve_tiny: Callable[..., Any], stream: bool) -> None:
    hopeless = chat(temperature=1e308, structured_outputs={"choice": ["a", "b"]}, stream=stream)
    with serve_tiny(max_batch=2, max_queue=0) as client, ThreadPoolExecutor(1) as pool:
        long = text_of(client, max_tokens=400)
        neighbour = pool.submit(text_of, client, max_tokens=400)
        failed = [client.post("/v1/chat/completions", json=hopeless) for _ in range(4)]
        assert [(each.status_code, each.json()["error_type"]) for each in failed] == [(424, "generation")] * 4
        assert neighbour.result() == long
        assert metric(client, "tgi_batch_current_size") == 0


class BrokenReader:
    """Rates nothing: what it raises is no error of torch's."""

    def prompt(self, query: str, text: str) -> list[int]:
        return [len(query), len(text)]

    def rate(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        raise ValueError(f"{len(prompts)} prompts are too odd")


def test_texts_that_cannot_be_rated_are_a_424_and_are_not_tried_for_ever(tiny: LoadedModel) -> None:
    with running_service(tiny, reader=BrokenReader(), max_batch=1, max_queue=1) as client:  # type: ignore[arg-type]
        for _ in range(3):
            response: httpx.Response = client.post("/v1/rerank", json={"query": "q", "documents": ["a"]}, timeout=5)
            assert (response.status_code, response.json()["error_type"]) == (424, "generation")
        assert text_of(client)
