"""Ends an answer that nobody waits for any more: the client hung up, or its time ran out."""

import asyncio
from collections.abc import Callable

from starlette.types import Receive

from app.calls import StopReason

PATIENCE_SECONDS = 0.05
"""How long an answer may take before its client is watched: a shorter one is not worth a task of its own."""


class Watch:
    """Cancels the current task when the client leaves or after `timeout_seconds`; close it when the answer is out."""

    def __init__(self, receive: Receive, timeout_seconds: float, *, stop: Callable[[StopReason], bool]) -> None:
        """`stop` is told why before the task is cancelled, and may say that it is not to be."""
        task = asyncio.current_task()
        assert task is not None, "an answer is given inside a task"
        self.task = task
        self._receive = receive
        self._timeout_seconds = timeout_seconds
        self._stop = stop
        self._watcher: asyncio.Task[None] | None = None
        self._timer = task.get_loop().call_later(min(PATIENCE_SECONDS, timeout_seconds), self._begin)
        self.reason: StopReason | None = None
        """Why the task was cancelled; None when it was not, or by somebody else."""

    def close(self) -> None:
        """Stop watching."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
            # A cancelled task keeps the frame that was cancelled, and through it all that the request held: with a
            # way back to the task only the collector would free them.
            self._watcher = None

    def _begin(self) -> None:
        loop = self.task.get_loop()
        self._watcher = loop.create_task(self._watch())
        self._timer = loop.call_later(max(0.0, self._timeout_seconds - PATIENCE_SECONDS), self._expire)

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
