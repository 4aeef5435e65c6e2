"""Starts are measured, and nobody waits for one in vain."""

import asyncio

import pytest

from app.engines.startup import GIVEN_UP_AFTER, IDLE_SECONDS, USUAL_SECONDS, Startup
from app.errors import EngineUnavailable


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def after_a_start(clock: Clock, seconds: float, **options: float) -> Startup:
    startup = Startup(clock=clock, **options)  # type: ignore[arg-type]
    startup.went_away()
    clock.now += seconds
    startup.came_up()
    return startup


async def refused(startup: Startup) -> float:
    with pytest.raises(EngineUnavailable) as caught:
        await startup.wait()
    assert caught.value.retry_after_seconds is not None
    return caught.value.retry_after_seconds


async def test_whoever_waits_goes_on_when_the_engine_is_up(clock):
    startup = Startup(wait_seconds=5.0, clock=clock)
    startup.went_away()
    waiting = [asyncio.create_task(startup.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    assert startup.waiting == 3
    startup.came_up()
    await asyncio.gather(*waiting)
    assert startup.waiting == 0


async def test_the_room_is_bounded_and_one_more_is_refused_at_once(clock):
    startup = Startup(wait_seconds=5.0, room=2, clock=clock)
    startup.went_away()
    waiting = [asyncio.create_task(startup.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    assert await refused(startup) == USUAL_SECONDS
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    assert startup.waiting == 1
    startup.came_up()
    await waiting[1]


async def test_who_waited_as_long_as_may_be_is_told_when_to_come_back(clock):
    startup = Startup(wait_seconds=0.02, clock=clock)
    startup.went_away()
    assert await refused(startup) == USUAL_SECONDS
    assert startup.waiting == 0


async def test_without_a_wait_everybody_is_refused_at_once(clock):
    startup = Startup(wait_seconds=0.0, clock=clock)
    startup.went_away()
    assert await refused(startup) == USUAL_SECONDS


async def test_retry_after_is_what_is_left_of_a_start_as_measured(clock):
    startup = after_a_start(clock, 40.0, wait_seconds=10.0)
    startup.went_away()
    assert await refused(startup) == 40.0
    clock.now += 25.0
    assert await refused(startup) == 15.0


async def test_the_median_of_the_last_starts_counts(clock):
    startup = Startup(clock=clock)
    for seconds in (500.0, 20.0, 30.0, 25.0, 900.0, 22.0):
        startup.went_away()
        clock.now += seconds
        startup.came_up()
    assert startup.usual_seconds == 25.0


async def test_an_outage_of_hours_is_not_taken_for_a_start(clock):
    startup = after_a_start(clock, 20.0, wait_seconds=0.0)
    startup.went_away()
    for _ in range(8 * 60):
        clock.now += 60.0
        assert await refused(startup) <= 60.0  # Somebody asks all the time, so that it is never taken for idle.
    startup.came_up()
    assert startup.usual_seconds == 20.0
    startup.went_away()
    assert await refused(startup) == 20.0


async def test_a_start_that_ends_soon_by_experience_is_waited_for(clock):
    startup = after_a_start(clock, 40.0, wait_seconds=10.0)
    startup.went_away()
    clock.now += 31.0
    waiting = asyncio.create_task(startup.wait())
    await asyncio.sleep(0)
    startup.came_up()
    await waiting


async def test_an_engine_that_is_overdue_is_expected_after_as_long_again(clock):
    startup = after_a_start(clock, 10.0, wait_seconds=0.0)
    startup.went_away()
    clock.now += 10.5
    assert await refused(startup) == 1.0
    clock.now += 7.5
    assert await refused(startup) == 8.0
    clock.now += 250.0
    assert await refused(startup) == 60.0


async def test_an_engine_that_does_not_come_is_not_waited_for(clock):
    startup = Startup(wait_seconds=5.0, clock=clock)
    startup.went_away()
    clock.now += 1.0
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(Startup(wait_seconds=0.0, clock=clock).wait(), 1)
    clock.now += GIVEN_UP_AFTER * USUAL_SECONDS
    async with asyncio.timeout(20):
        await refused(startup)


async def test_an_engine_that_sleeps_until_it_is_asked_for_starts_when_it_is(clock):
    startup = after_a_start(clock, 40.0, wait_seconds=0.0)
    startup.went_away()
    clock.now += IDLE_SECONDS + 3_000.0
    assert await refused(startup) == 40.0
    clock.now += 35.0
    assert await refused(startup) == 5.0
    startup.came_up()
    assert startup.usual_seconds == pytest.approx(37.5)
