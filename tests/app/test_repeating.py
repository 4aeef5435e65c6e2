"""What is done again and again goes on whatever happens, and an outage is told once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from app.errors import Unavailable
from app.repeating import Repeating

OUTAGE = Unavailable("The database is away.", retry_after_seconds=1.0)


def steps(*outcomes: bool | Exception) -> tuple[Callable[[], Awaitable[bool]], asyncio.Event]:
    """A step that has these outcomes one after the other, and the event that it has had them all."""
    left, done = list(outcomes), asyncio.Event()

    async def step() -> bool:
        if not left:
            done.set()
            return False
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return step, done


async def repeated(*outcomes: bool | Exception, every_seconds: float = 0.0) -> None:
    step, done = steps(*outcomes)
    async with Repeating(step, failing="Alerts cannot be read", every_seconds=every_seconds):
        await asyncio.wait_for(done.wait(), 20)


async def test_an_outage_is_one_line_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "app.repeating"):
        await repeated(False, OUTAGE, OUTAGE, OUTAGE, False, False, OUTAGE)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "Alerts cannot be read; tried again every 0 s (unavailable: The database is away.)"),
        ("INFO", "No longer: Alerts cannot be read"),
        ("WARNING", "Alerts cannot be read; tried again every 0 s (unavailable: The database is away.)"),
        ("INFO", "No longer: Alerts cannot be read"),
    ]


async def test_of_a_defect_only_the_type_is_told(caplog: pytest.LogCaptureFixture) -> None:
    await repeated(ValueError("a row of Anna's"), False)
    assert "ValueError" in caplog.text
    assert "Anna" not in caplog.text


async def test_a_step_that_has_more_to_do_is_not_kept_waiting() -> None:
    await repeated(True, True, every_seconds=3600.0)
