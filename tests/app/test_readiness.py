"""Readiness: every part asked at once, none for too long, and no more often than once a moment."""

import asyncio
import logging

import pytest

from app.readiness import Problem, Readiness
from tests.stopwatch import Stopwatch


async def fine() -> Problem | None:
    return None


async def hangs() -> Problem | None:
    await asyncio.Event().wait()
    return None


async def breaks() -> Problem | None:
    raise RuntimeError("the password is hunter2")


async def test_each_part_tells_why_it_is_not_ready():
    async def down() -> Problem | None:
        return Problem("does not answer", "http://inside:6333 refused")

    assert await Readiness({"a": fine, "b": down, "c": breaks}).problems() == {
        "a": None,
        "b": "does not answer",
        "c": "failed while it was checked",
    }


async def test_parts_that_hang_are_given_up_together():
    watch = Stopwatch()
    found = await Readiness({"a": hangs, "b": hangs, "c": fine}, patience_seconds=0.2).problems()
    assert watch.seconds < 0.39
    assert found == {"a": "did not answer in 0.2 s", "b": "did not answer in 0.2 s", "c": None}


async def test_however_many_ask_the_parts_are_asked_once_a_moment():
    asked = 0

    async def counting() -> Problem | None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return None

    readiness = Readiness({"a": counting}, believed_seconds=60)
    await asyncio.gather(*(readiness.problems() for _ in range(50)))
    assert asked == 1
    eager = Readiness({"a": counting}, believed_seconds=0)
    assert [await eager.problems() for _ in range(3)] == [{"a": None}] * 3
    assert asked == 4


async def test_who_leaves_while_parts_are_asked_takes_nothing_from_the_next():
    gate = asyncio.Event()

    async def slow() -> Problem | None:
        await gate.wait()
        return None

    readiness = Readiness({"a": slow})
    first, second = (asyncio.create_task(readiness.problems()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    gate.set()
    assert await second == {"a": None}


async def test_a_change_is_logged_once_with_its_detail(caplog: pytest.LogCaptureFixture):
    problem: Problem | None = Problem("does not answer", "http://inside:6333 refused")

    async def check() -> Problem | None:
        return problem

    readiness = Readiness({"retrieval": check}, believed_seconds=0)
    with caplog.at_level(logging.INFO, logger="app.readiness"):
        for _ in range(3):
            await readiness.problems()
        problem = None
        for _ in range(3):
            await readiness.problems()
    assert caplog.messages == [
        "retrieval is not ready: does not answer - http://inside:6333 refused",
        "retrieval is ready again",
    ]
