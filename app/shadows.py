"""Shadow answers: what another release would have said, put on record beside the answer that was shown.

The main rule: nobody pays for them. A shadow starts when its primary has been sent, so few at a time run as the limit
says, and none where the service is busy: then those that run are dropped first. What becomes of one is on its record.
"""

import asyncio
import logging
from contextlib import aclosing

from app.calls import StopReason
from app.errors import ServiceError
from app.gateway import Answering, Gateway
from app.releases import Choice, Release
from observability.traces import RequestTrace

log = logging.getLogger(__name__)


class Shadows:
    """Lets the shadows of a gateway's answers run in the background.

    Args:
        gateway: answers them, without a place among the answers in flight.
        limit: how many run at once; one more is dropped.
        busy_at: from so many requests in flight on there are none.
        timeout_seconds: the longest life of one.
    """

    def __init__(self, gateway: Gateway, *, limit: int = 4, busy_at: int = 64, timeout_seconds: float = 60.0) -> None:
        self._gateway = gateway
        self._limit = limit
        self._busy_at = busy_at
        self._timeout_seconds = timeout_seconds
        self._running: dict[asyncio.Task[None], Answering | None] = {}
        """Each with its task; None once it was told to end."""
        self.dropped = 0
        """How many were sampled and did not run, or not to their end, because there was no room."""

    async def aclose(self) -> None:
        """Cut what runs."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def make_room(self) -> None:
        """Drop what runs if the service has become busy; costs a comparison where it has not."""
        if self._running and self._gateway.admission.in_flight >= self._busy_at:
            for task in tuple(self._running):
                self.dropped += self._cut(task, "dropped")

    def offer(self, primary: Answering) -> None:
        """Start the shadow of a finished answer, if it was to have one and there is room."""
        release = primary.choice.shadow
        if release is None or primary.prediction.outcome != "finished":
            return
        if len(self._running) >= self._limit or self._gateway.admission.in_flight >= self._busy_at:
            self.dropped += 1
            return
        shadow = self._beside(primary, release)
        task = asyncio.create_task(self._run(shadow), name="shadow")
        self._running[task] = shadow
        timer = asyncio.get_running_loop().call_later(self._timeout_seconds, self._cut, task, "timeout")

        def ended(_: asyncio.Task[None]) -> None:
            timer.cancel()
            del self._running[task]

        task.add_done_callback(ended)

    def _beside(self, primary: Answering, release: Release) -> Answering:
        shown, body = primary.prediction, primary.prediction.request
        shadow = Answering(
            self._gateway,
            primary.request,
            body,
            primary.caller,
            Choice(release, "shadow"),
            RequestTrace(primary.trace.trace_id),
        )
        shadow.prediction.conversation = shown.conversation
        shadow.headers = primary.headers
        shadow.prediction.shadow_of = shown.id
        return shadow

    async def _run(self, shadow: Answering) -> None:
        try:
            async with aclosing(shadow.events()) as events:
                async for _ in events:
                    pass
        except ServiceError:
            pass  # It is on the record.
        except Exception:
            log.exception("The shadow %s failed by a defect of ours", shadow.prediction.id)

    def _cut(self, task: asyncio.Task[None], reason: StopReason) -> bool:
        """Cancel a shadow unless it is complete or was told before; say whether it was cancelled."""
        shadow = self._running[task]
        if shadow is None or not shadow.stop(reason):
            return False
        self._running[task] = None
        return task.cancel()
