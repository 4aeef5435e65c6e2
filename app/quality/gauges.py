"""Shows on `/metrics` what a worker computed of the serving releases: shares alone, and when that was."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from app.errors import Unavailable
from app.quality.figures import Report
from app.quality.keeping import Kept
from observability.collectors import QualitySample

log = logging.getLogger(__name__)

POLL_SECONDS = 15.0

Show = Callable[[Sequence[QualitySample], float], None]


class Gauges:
    """Looks for a newer report again and again; use it in an `async with` block.

    Args:
        kept: where the report is.
        show: gets the figures, and when they were computed in seconds since 1970.
        poll_seconds: how often a newer one is looked for, which reads one number.
    """

    def __init__(self, kept: Kept, *, show: Show, poll_seconds: float = POLL_SECONDS) -> None:
        self._kept = kept
        self._show = show
        self._poll_seconds = poll_seconds
        self._shown: int | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="quality gauges")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def refresh(self) -> None:
        """Show the report if it is newer than what is shown; raises Unavailable, and what is shown then stays."""
        computed_at = await self._kept.computed_at()
        if computed_at == self._shown:
            return
        report = await self._kept.report()
        if report is not None:
            self._show(samples_of(report), report.computed_at.timestamp())
        self._shown = computed_at

    async def _run(self) -> None:
        is_failing = False
        while True:
            try:
                await self.refresh()
                is_failing = False
            except Unavailable as error:
                if not is_failing:
                    log.warning("The report on quality cannot be read: %s", error.code)
                is_failing = True
            except Exception as error:  # noqa: BLE001 - what a driver says may quote content.
                if not is_failing:
                    log.error("The report on quality cannot be read: %s", type(error).__name__)  # noqa: TRY400
                is_failing = True
            await asyncio.sleep(self._poll_seconds)


def samples_of(report: Report) -> list[QualitySample]:
    """Give the shares that are about no single class, since what users name must not become a label, nor doubtful."""
    return [
        QualitySample(each.release, found.name, found.value, found.low, found.high, found.n)
        for each in report.releases
        for found in each.figures
        if found.unit == "share" and found.class_name is None and not found.doubts
    ]
