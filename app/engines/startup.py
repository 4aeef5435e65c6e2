"""What is known of an engine that is away: since when, how long its starts took, and who waits for it.

The main rule: nobody waits in vain. A request waits only in a bounded room, only for so long, and not at all when the
starts measured so far say that the engine will not be there in time; who is sent away is told when it will be.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from statistics import median
from time import monotonic

from app.errors import EngineUnavailable

USUAL_SECONDS = 30.0
"""What a start is taken to last before one was measured."""

IDLE_SECONDS = 300.0
"""An engine that nobody asked for so long is started when somebody does: its start counts from there."""

GIVEN_UP_AFTER = 3
"""An engine away for so many times its usual start is not starting: nobody waits for it."""

LONGEST_START_SECONDS = 900.0
"""What was away for longer was down, which says nothing of its next start."""

LONGEST_RETRY_SECONDS = 60.0
"""For an engine that is late."""


class Startup:
    """Times the starts of one group's engines, and lets requests wait for them.

    Args:
        wait_seconds: the longest wait of a request; 0 lets none wait.
        room: how many may wait at once.
    """

    def __init__(self, *, wait_seconds: float = 10.0, room: int = 64, clock: Callable[[], float] = monotonic) -> None:
        self._wait_seconds = wait_seconds
        self._room = room
        self._clock = clock
        self._up = asyncio.Event()
        self._up.set()
        self._away_since = 0.0
        self._asked_at: float | None = None
        self._measured: deque[float] = deque(maxlen=5)
        self.waiting = 0
        """Requests in the room."""

    @property
    def is_up(self) -> bool:
        """Whether the engine is there."""
        return self._up.is_set()

    @property
    def usual_seconds(self) -> float:
        """What a start takes: the median of those measured last, or a guess before the first."""
        return median(self._measured) if self._measured else USUAL_SECONDS

    def went_away(self) -> None:
        """The engine takes no requests any more."""
        if self._up.is_set():
            self._up.clear()
            self._away_since, self._asked_at = self._clock(), None

    def came_up(self) -> None:
        """The engine takes requests: those that wait go on."""
        if not self._up.is_set():
            seconds = self._clock() - self._away_since
            if seconds <= LONGEST_START_SECONDS:
                self._measured.append(seconds)
            self._up.set()

    async def wait(self) -> None:
        """Return when the engine is up.

        Raises:
            EngineUnavailable: no start as measured so far would end in time, it did not, or the room is full.
        """
        left = self._left()
        is_late = bool(self._measured) and left > self._wait_seconds
        if self._wait_seconds <= 0 or self.waiting >= self._room or is_late or self._is_given_up:
            raise self.unavailable()
        self.waiting += 1
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._up.wait()
        except TimeoutError as error:
            raise self.unavailable() from error
        finally:
            self.waiting -= 1

    def unavailable(self) -> EngineUnavailable:
        """The error for who is not waited with: its Retry-After is when the engine should be there."""
        left = self._left()
        if left <= 0:
            # It takes longer than it ever did. What has lasted so long may well last as long again.
            left = min(-left, LONGEST_RETRY_SECONDS)
        return EngineUnavailable(
            "the engine is not available: it is starting, or down", retry_after_seconds=max(1.0, left)
        )

    @property
    def _is_given_up(self) -> bool:
        return self._clock() - self._away_since > GIVEN_UP_AFTER * self.usual_seconds

    def _left(self) -> float:
        """Seconds until the engine is up by experience; negative where that moment has passed."""
        now = self._clock()
        if now - (self._asked_at or self._away_since) > IDLE_SECONDS:
            self._away_since = now
        self._asked_at = now
        return self._away_since + self.usual_seconds - now
