"""Ends an answer that nobody waits for any more: the client hung up, or its time ran out."""

import asyncio
from collections.abc import Callable

from starlette.types import Receive

from app.calls import StopReason

PATIENCE_SECONDS = 0.05
"""How long an answer may take before its client is watched, at most twice as long: a shorter one is not worth a task
of its own."""


class Patience:
    """The answers of an event loop whose clients are not watched yet.

    One timer rings for all of them: one for each would cost an answer more than the rest of its watch.
    """

    def __init__(self) -> None:
        self._fresh: set[Watch] = set()
        """Those that came since the timer rang."""
        self._others: set[Watch] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, watch: "Watch") -> None:
        """Have this watch begin when the patience is over."""
        self._fresh.add(watch)
        if self._timer is None:
            self._timer = watch.task.get_loop().call_later(PATIENCE_SECONDS, self._ring)

    def discard(self, watch: "Watch") -> None:
        """Forget a watch: its answer is out."""
        self._fresh.discard(watch)
        self._others.discard(watch)

    def _ring(self) -> None:
        over, self._others, self._fresh = self._others, self._fresh, set()
        for watch in over:
            watch.begin()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PATIENCE_SECONDS, self._ring) if self._others else None


class Watch:
    """Cancels the current task when the client leaves or after `timeout_seconds`; close it when the answer is out."""

    def __init__(
        self, receive: Receive, timeout_seconds: float, *, stop: Callable[[StopReason], bool], patience: Patience
    ) -> None:
        """`stop` is told why before the task is cancelled, and may say that it is not to be."""
        task = asyncio.current_task()
        assert task is not None, "an answer is given inside a task"
        self.task = task
        self.reason: StopReason | None = None
        """Why the task was cancelled; None when it was not, or by somebody else."""
        self._receive = receive
        self._stop = stop
        self._patience = patience
        self._ends_at = task.get_loop().time() + timeout_seconds
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if timeout_seconds > 2 * PATIENCE_SECONDS:
            patience.add(self)
        else:
            self.begin()

    def begin(self) -> None:
        """Watch the client from now on, and the clock."""
        loop = self.task.get_loop()
        self._watcher = loop.create_task(self._watch())
        self._timer = loop.call_at(self._ends_at, self._expire)

    def close(self) -> None:
        """Stop watching."""
        self._patience.discard(self)
        if self._watcher is not None and self._timer is not None:
            self._timer.cancel()
            self._watcher.cancel()
            # A cancelled task keeps the frame that was cancelled, and through it all that the request held: with a
            # way back to the task only the collector would free them.
            self._watcher = None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._cancel("client_left")

    def _expire(self) -> None:
        self._cancel("timeout")

    def _cancel(self, reason: StopReason) -> None:
        if self.reason is None and self._stop(reason):
            self.reason = reason
            self.task.cancel()
