"""Keeps the figures of the serving releases on `/metrics`: the last day's answers of all tenants, by share alone."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Self

from app.errors import ServiceError
from app.quality.answers import MAX_RELEASES
from app.quality.figures import Report
from app.quality.quality import Quality
from app.rollouts import Rollout
from observability.collectors import QualitySample

log = logging.getLogger(__name__)

WINDOW = timedelta(days=1)
EVERY_SECONDS = 300.0
FIRST_AFTER_SECONDS = 30.0
REST = 4.0
"""Seconds of rest for each second of work while a report is made."""
MAX_PART = 0.05
"""The part of all time that reports may take: where one takes long, the next comes later."""

Show = Callable[[Sequence[QualitySample], float], None]


class Gauges:
    """Computes figures again and again; use it in an `async with` block.

    Args:
        quality: makes the reports, and should rest between its pages.
        rollouts: gives the rollouts that there are.
        show: gets the figures, and when they were computed.
        every_seconds: from one report to the next.
        first_after_seconds: a start has better things to do.
    """

    def __init__(
        self,
        quality: Quality,
        *,
        rollouts: Callable[[], Awaitable[Collection[Rollout]]],
        show: Show,
        every_seconds: float = EVERY_SECONDS,
        first_after_seconds: float = FIRST_AFTER_SECONDS,
    ) -> None:
        self._quality = quality
        self._rollouts = rollouts
        self._show = show
        self._every_seconds = every_seconds
        self._first_after_seconds = first_after_seconds

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="quality gauges")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def refresh(self) -> None:
        """Compute the figures now; raises ServiceError, and what is shown then stays."""
        serving = {f"{rollout.name}@{number}" for rollout in await self._rollouts() for number in rollout.serving}
        report = await self._quality.of_releases(sorted(serving)[:MAX_RELEASES], window=WINDOW)
        self._show(samples_of(report), report.computed_at.timestamp())

    async def _run(self) -> None:
        wait_seconds = self._first_after_seconds
        while True:
            await asyncio.sleep(wait_seconds)
            started = time.monotonic()
            try:
                await self.refresh()
            except ServiceError as error:
                log.warning("Quality could not be computed: %s", error.code)
            except Exception:
                log.exception("Quality could not be computed")
            wait_seconds = max(self._every_seconds, (time.monotonic() - started) / MAX_PART)


def samples_of(report: Report) -> list[QualitySample]:
    """Give the shares that are about no single class: what is named by users must not become a label."""
    return [
        QualitySample(each.release, found.name, found.value, found.low, found.high, found.n)
        for each in report.releases
        for found in each.figures
        if found.unit == "share" and found.class_name is None
    ]
