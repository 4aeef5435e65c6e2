"""Keeps on `/metrics` for how many tenants a serving release has drifted: numbers, no tenant's name or questions."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Self

from app.drift.states import KINDS, Drift
from app.errors import ServiceError
from app.rollouts import Rollout
from observability.collectors import DriftSample

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
MAX_RELEASES = 50


class DriftGauges:
    """Reads again and again what the worker has found; use it in an `async with` block.

    Args:
        drift: asks the database.
        rollouts: gives the rollouts that there are.
        show: gets the numbers of the releases that serve.
    """

    def __init__(
        self,
        drift: Drift,
        *,
        rollouts: Callable[[], Awaitable[Collection[Rollout]]],
        show: Callable[[Sequence[DriftSample]], None],
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self._drift = drift
        self._rollouts = rollouts
        self._show = show
        self._every_seconds = every_seconds

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="drift gauges")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def refresh(self) -> None:
        """Read the numbers now; raises ServiceError, and what is shown then stays."""
        serving = {f"{rollout.name}@{number}" for rollout in await self._rollouts() for number in rollout.serving}
        alarmed, compared = await self._drift.counts()
        shown = [release for release in sorted(serving)[:MAX_RELEASES] if release in compared]
        self._show(
            [
                DriftSample(release, compared[release], {kind: alarmed.get((release, kind), 0) for kind in KINDS})
                for release in shown
            ]
        )

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_seconds)
            try:
                await self.refresh()
            except ServiceError as error:
                log.warning("Drift could not be read: %s", error.code)
            except Exception:
                log.exception("Drift could not be read")
