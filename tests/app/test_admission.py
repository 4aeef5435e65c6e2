"""Places are never idle while somebody waits, nobody is forgotten, and a refusal says when to come back."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.admission import FIRST_GUESS_SECONDS, SHARES, Admission, Place
from app.errors import Overloaded
from app.messages import Priority
from tests.properties import examples


@asynccontextmanager
async def taken(place: Place) -> AsyncIterator[None]:
    """Have a place while the block runs."""
    if not place.take():
        await place.wait()
    try:
        yield
    finally:
        place.leave()


@dataclass
class Guest:
    """One request's use of a place, as a task of its own."""

    admission: Admission
    priority: Priority = "normal"
    order: list["Guest"] = field(default_factory=list)
    """Those who got a place, in the order they did."""

    def __post_init__(self) -> None:
        self.may_leave = asyncio.Event()
        self.is_in = False
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with taken(self.admission.place(self.priority)):
            self.is_in = True
            self.order.append(self)
            try:
                await self.may_leave.wait()
            finally:
                self.is_in = False


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(6):
        await asyncio.sleep(0)


async def full(admission: Admission) -> list[Guest]:
    """Take every place."""
    guests = [Guest(admission) for _ in range(admission.places)]
    await settled()
    assert all(guest.is_in for guest in guests)
    return guests


async def test_as_many_as_there_are_places_are_in_at_once_and_the_next_takes_the_first_that_is_left():
    admission = Admission(places=2)
    first, second = await full(admission)
    third, fourth = Guest(admission), Guest(admission)
    await settled()
    assert admission.in_flight == 2
    assert admission.waiting == {"high": 0, "normal": 2, "low": 0}
    second.may_leave.set()
    await settled()
    assert (first.is_in, third.is_in, fourth.is_in) == (True, True, False)
    for guest in (first, third, fourth):
        guest.may_leave.set()
    await asyncio.gather(first.task, third.task, fourth.task)
    assert (admission.in_flight, sum(admission.waiting.values())) == (0, 0)


async def test_a_place_tells_how_long_it_was_waited_for():
    admission = Admission(places=1)
    (first,) = await full(admission)
    place = admission.place("normal")
    assert place.waited_seconds is None

    async def wait() -> None:
        async with taken(place):
            pass

    task = asyncio.create_task(wait())
    started = time.perf_counter()
    await asyncio.sleep(0.02)
    first.may_leave.set()
    await task
    assert 0.015 < place.waited_seconds <= time.perf_counter() - started


async def test_places_go_to_the_priorities_in_shares_and_to_the_first_of_each():
    admission, order = Admission(places=1, room=100, wait_seconds=1e6), []
    (first,) = await full(admission)
    guests = [Guest(admission, priority, order) for priority in ("low", "normal", "high") for _ in range(40)]
    await settled()
    first.may_leave.set()
    while len(order) < 42:
        await settled()
        order[-1].may_leave.set()
    served = order[:42]
    assert Counter(guest.priority for guest in served[:21]) == SHARES
    assert Counter(guest.priority for guest in served) == {name: 2 * share for name, share in SHARES.items()}
    assert served[0].priority == "high"
    for priority in SHARES:
        own = [guest for guest in guests if guest.priority == priority]
        assert [guest for guest in served if guest.priority == priority] == own[: 2 * SHARES[priority]]
    for guest in guests:
        guest.task.cancel()
    await asyncio.gather(*(guest.task for guest in guests), return_exceptions=True)


async def test_a_priority_that_was_away_does_not_make_up_for_it():
    admission, order = Admission(places=1, room=1000, wait_seconds=1e6), []
    (first,) = await full(admission)
    high = [Guest(admission, "high", order) for _ in range(200)]
    await settled()
    first.may_leave.set()
    while len(order) < 100:
        await settled()
        order[-1].may_leave.set()
    low = [Guest(admission, "low", order) for _ in range(10)]
    while len(order) < 100 + 36:
        await settled()
        order[-1].may_leave.set()
    assert Counter(guest.priority for guest in order[100:136]) == {"high": 34, "low": 2}
    for guest in (*high, *low):
        guest.task.cancel()
    await asyncio.gather(*(guest.task for guest in (*high, *low)), return_exceptions=True)


async def test_one_more_than_may_wait_is_refused_at_once_and_another_priority_still_has_room():
    admission = Admission(places=1, room=2)
    (first,) = await full(admission)
    waiting = [Guest(admission) for _ in range(2)]
    await settled()
    with pytest.raises(Overloaded) as refusal:
        admission.check("normal")
    assert refusal.value.retry_after_seconds >= 1
    with pytest.raises(Overloaded):
        await asyncio.wait_for(admission.enter("normal"), 1)
    assert admission.waiting["normal"] == 2
    admission.check("high")
    for guest in (first, *waiting):
        guest.may_leave.set()
    await asyncio.gather(first.task, *(guest.task for guest in waiting))


async def test_without_room_nobody_waits():
    admission = Admission(places=1, room=0)
    (first,) = await full(admission)
    with pytest.raises(Overloaded):
        admission.check("high")
    first.may_leave.set()
    await first.task
    admission.check("high")


async def answered(admission: Admission, seconds: float) -> None:
    """Let an answer have taken so long."""
    admission.leave(await admission.enter("normal") - seconds)


async def test_whoever_is_expected_to_wait_too_long_is_refused_with_the_time_it_would_take():
    admission = Admission(places=2, room=100, wait_seconds=20)
    for _ in range(10):
        await answered(admission, 7.9)
    guests = await full(admission)
    assert admission.expected_seconds("normal") == pytest.approx(3.95, rel=0.01)  # Two places, eight seconds each.
    guests += [Guest(admission), Guest(admission)]
    await settled()
    with pytest.raises(Overloaded) as refusal:
        admission.check("normal")
    assert refusal.value.retry_after_seconds == 12  # It would be the third.
    # Of four places that become free the normal lane gets one fifth beside the high one.
    assert admission.expected_seconds("high") == pytest.approx(3.95 * 20 / 16, rel=0.01)
    assert admission.expected_seconds("low") == pytest.approx(3.95 * 5, rel=0.01)
    for guest in guests:
        guest.may_leave.set()
    await asyncio.gather(*(guest.task for guest in guests))


async def test_before_anything_was_measured_there_is_a_guess_and_then_the_mean():
    admission = Admission(places=1)
    (first,) = await full(admission)
    assert admission.expected_seconds("normal") == pytest.approx(FIRST_GUESS_SECONDS, rel=0.01)
    first.may_leave.set()
    await first.task
    for seconds in (1.0, 3.0):
        await answered(admission, seconds)
    (last,) = await full(admission)
    assert admission.expected_seconds("normal") == pytest.approx(4 / 3, rel=0.01)
    last.may_leave.set()
    await last.task


async def test_answers_that_hang_make_the_wait_longer_than_it_was():
    admission = Admission(places=2, wait_seconds=20)
    for _ in range(10):
        await answered(admission, 1.0)
    # They were let in 60 seconds ago: whatever answers took before, these take longer.
    taken = [admission._take(time.perf_counter() - 60.0) for _ in range(2)]
    assert admission.expected_seconds("normal") == pytest.approx(30.0, rel=0.01)
    with pytest.raises(Overloaded) as refusal:
        admission.check("normal")
    assert refusal.value.retry_after_seconds == 31
    for since in taken:
        admission.leave(since)
    assert admission.in_flight == 0


async def test_whoever_waited_as_long_as_may_be_is_refused_and_leaves_no_trace():
    admission = Admission(places=1, wait_seconds=0.05)
    await answered(admission, 0.001)
    (first,) = await full(admission)
    with pytest.raises(Overloaded):
        await asyncio.wait_for(admission.enter("low"), 5)
    assert sum(admission.waiting.values()) == 0
    first.may_leave.set()
    await first.task
    assert admission.in_flight == 0


async def test_a_place_given_in_the_moment_its_waiter_is_cancelled_goes_to_the_next():
    admission = Admission(places=1)
    (first,) = await full(admission)
    given, next_one = Guest(admission), Guest(admission)
    await settled()
    first.may_leave.set()
    await asyncio.sleep(0)
    await first.task  # It has left, and `given` has the place but has not run yet.
    given.task.cancel()
    await settled()
    assert (given.is_in, next_one.is_in, admission.in_flight) == (False, True, 1)
    next_one.may_leave.set()
    await next_one.task
    assert admission.in_flight == 0


STEPS = st.lists(
    st.tuples(st.sampled_from(["come", "leave", "cancel", "cancel_and_leave"]), st.integers(0, 99)), max_size=60
)


@examples(150)
@given(places=st.integers(1, 4), room=st.integers(0, 4), steps=STEPS)
async def test_whatever_happens_no_place_is_idle_while_somebody_waits_and_none_is_lost(places, room, steps):
    admission = Admission(places=places, room=room, wait_seconds=1e6)
    guests: list[Guest] = []
    for step, number in steps:
        if step == "come":
            guests.append(Guest(admission, list(SHARES)[number % 3]))
        inside = [guest for guest in guests if guest.is_in]
        if step in ("leave", "cancel_and_leave") and inside:
            inside[number % len(inside)].may_leave.set()
        running = [guest for guest in guests if not guest.task.done()]
        if step in ("cancel", "cancel_and_leave") and running:
            running[number % len(running)].task.cancel()
        await settled()
        waiting = sum(admission.waiting.values())
        assert admission.in_flight == sum(guest.is_in for guest in guests) <= places
        assert waiting == 0 or admission.in_flight == places
        assert max(admission.waiting.values()) <= room
        assert waiting == sum(not guest.is_in and not guest.task.done() for guest in guests)
    for guest in guests:
        guest.may_leave.set()
        guest.task.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.gather(*(guest.task for guest in guests), return_exceptions=True)
    assert (admission.in_flight, sum(admission.waiting.values())) == (0, 0)
    assert admission._entered_total == 0
