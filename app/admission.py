"""Who is answered now, who waits for a place, and who is told to come back.

The main rule: places are never idle while somebody waits, and who cannot get one soon is told at once and when to come
back. A place that becomes free goes to the priorities in shares, so that the high one waits least and the low one is
never forgotten; among requests of one priority, the first that came is the next.
"""

import asyncio
from collections.abc import Mapping
from math import ceil
from time import perf_counter

import msgspec

from app.errors import Overloaded
from app.messages import Priority

SHARES: Mapping[Priority, int] = {"high": 16, "normal": 4, "low": 1}
"""Of so many places that become free while all priorities wait, each gets that many."""

FIRST_GUESS_SECONDS = 1.0
"""What an answer is taken to last before one has been measured."""

HOPEFUL = 0.5
"""The part of the longest wait that may be expected of one: who is let in to wait should not have waited in vain."""

_REMEMBERED = 64
"""About how many answers the mean of their durations remembers."""


class _Lane:
    """The requests of one priority that wait, in the order in which they came."""

    __slots__ = ("share", "turn", "waiters")

    def __init__(self, share: int) -> None:
        self.share = share
        self.waiters: dict[asyncio.Future[float], None] = {}
        self.turn = 0.0
        """When the lane's next place is due, counted in places by its share: the lane that is due first gets it."""


class Admission:
    """Gives out places among the answers in flight.

    Args:
        places: how many answers may be in flight.
        room: how many requests of each priority may wait for a place.
        wait_seconds: how long one may wait at most; who is expected to wait half as long is refused at once.
    """

    def __init__(self, *, places: int = 256, room: int = 64, wait_seconds: float = 10.0) -> None:
        self.places = places
        self.in_flight = 0
        self._room = room
        self._wait_seconds = wait_seconds
        self._lanes: dict[Priority, _Lane] = {priority: _Lane(share) for priority, share in SHARES.items()}
        self._turn = 0.0
        self._left = 0
        self._mean_seconds = FIRST_GUESS_SECONDS
        self._entered_total = 0.0
        """The sum of the moments at which those in flight got their places: it gives their mean age at any moment."""

    @property
    def waiting(self) -> dict[str, int]:
        """How many requests wait, by priority."""
        return {priority: len(lane.waiters) for priority, lane in self._lanes.items()}

    def place(self, priority: Priority) -> "Place":
        """A place to be taken, or waited for, and left."""
        return Place(self, priority)

    def check(self, priority: Priority) -> None:
        """Raise Overloaded if a request of this priority would get no place soon; costs a comparison where it would."""
        if self.in_flight < self.places:
            return
        lane = self._lanes[priority]
        expected = self.expected_seconds(priority)
        if len(lane.waiters) >= self._room or expected > self._wait_seconds * HOPEFUL:
            raise _overloaded(expected)

    def expected_seconds(self, priority: Priority) -> float:
        """How long one more request of this priority would wait, all places being taken.

        By Little's law `places` answers that last so long on average free one place each `mean / places`. Where
        those in flight are older than answers usually become, it is their age that tells how long answers take now.
        """
        age = perf_counter() - self._entered_total / self.in_flight if self.in_flight else 0.0
        lane = self._lanes[priority]
        contending = sum(other.share for other in self._lanes.values() if other.waiters or other is lane)
        places = self.places * lane.share / contending
        return (len(lane.waiters) + 1) * max(self._mean_seconds, age) / places

    def take(self) -> float | None:
        """Take a place that is free; gives the moment, for `leave`, or None where all are taken."""
        # While one is free nobody waits: a place that becomes free is handed on at once.
        return self._take(perf_counter()) if self.in_flight < self.places else None

    async def enter(self, priority: Priority) -> float:
        """Take a place, waiting for it if need be; gives the moment it was taken, for `leave`.

        Raises:
            Overloaded: there will be none soon, or there was none in time.
        """
        if (taken := self.take()) is not None:
            return taken
        self.check(priority)
        loop, lane = asyncio.get_running_loop(), self._lanes[priority]
        waiter: asyncio.Future[float] = loop.create_future()
        if not lane.waiters:  # What was due to a lane while nobody waited in it is forfeited.
            lane.turn = max(lane.turn, self._turn + 1 / lane.share)
        lane.waiters[waiter] = None
        timer = loop.call_later(self._wait_seconds, self._give_up, waiter, priority)
        try:
            return await waiter
        except asyncio.CancelledError:
            lane.waiters.pop(waiter, None)
            if not waiter.cancelled() and waiter.exception() is None:  # It was given a place in the same moment.
                self.leave(waiter.result())
            raise
        finally:
            timer.cancel()

    def leave(self, since: float) -> None:
        """Give back the place taken at the moment `since`, to whoever is next."""
        now = perf_counter()
        self._left += 1
        self._mean_seconds += (now - since - self._mean_seconds) / min(self._left, _REMEMBERED)
        were_all_taken = self.in_flight == self.places  # Where one was free nobody waits.
        self.in_flight -= 1
        self._entered_total = self._entered_total - since if self.in_flight else 0.0
        if were_all_taken and (waiter := self._next()) is not None:
            waiter.set_result(self._take(now))

    def _next(self) -> asyncio.Future[float] | None:
        """Take the waiter who is next out of its lane."""
        while waiting := [lane for lane in self._lanes.values() if lane.waiters]:
            lane = min(waiting, key=lambda each: each.turn)
            waiter = next(iter(lane.waiters))
            del lane.waiters[waiter]
            if not waiter.done():  # One that was cancelled this moment has not left its lane yet.
                self._turn = lane.turn
                lane.turn += 1 / lane.share
                return waiter
        return None

    def _take(self, now: float) -> float:
        self.in_flight += 1
        self._entered_total += now
        return now

    def _give_up(self, waiter: asyncio.Future[float], priority: Priority) -> None:
        if not waiter.done():
            del self._lanes[priority].waiters[waiter]
            waiter.set_exception(_overloaded(self.expected_seconds(priority)))


class Place(msgspec.Struct, eq=False):
    """One request's place among the answers in flight: take it, or wait for it, and leave it in any case."""

    _admission: Admission
    priority: Priority
    waited_seconds: float | None = None
    """How long the place was waited for; None as long as there is none."""
    _since: float = 0.0

    def take(self) -> bool:
        """Take a place if one is free, which costs no coroutine; else `wait` for one."""
        since = self._admission.take()
        if since is None:
            return False
        self._since, self.waited_seconds = since, 0.0
        return True

    async def wait(self) -> None:
        """Take a place as soon as it is this one's turn; raises as `Admission.enter` says."""
        asked = perf_counter()
        self._since = await self._admission.enter(self.priority)
        self.waited_seconds = self._since - asked

    def leave(self) -> None:
        """Give the place back."""
        self._admission.leave(self._since)


def _overloaded(expected_seconds: float) -> Overloaded:
    seconds = max(1, ceil(expected_seconds))
    return Overloaded(
        f"More requests have come than can be answered now; try again in {seconds} s.", retry_after_seconds=seconds
    )
