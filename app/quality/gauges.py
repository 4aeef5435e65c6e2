"""Shows on `/metrics` what a worker computed of the serving releases: shares alone, and when that was."""

from collections.abc import Callable, Sequence

from app.quality.figures import Report
from app.quality.keeping import Kept
from observability.collectors import QualitySample

Show = Callable[[Sequence[QualitySample], float], None]


class Gauges:
    """Looks for a newer report, and shows it.

    Args:
        kept: where the report is.
        show: gets the figures, and when they were computed in seconds since 1970.
    """

    EVERY_SECONDS = 15.0
    """To look for a newer report reads one number."""

    def __init__(self, kept: Kept, *, show: Show) -> None:
        self._kept = kept
        self._show = show
        self._shown: int | None = None

    async def refresh(self) -> None:
        """Show the report if it is newer than what is shown; raises Unavailable, and what is shown then stays."""
        computed_at = await self._kept.computed_at()
        if computed_at == self._shown:
            return
        report = await self._kept.report()
        if report is not None:
            self._show(samples_of(report), report.computed_at.timestamp())
        self._shown = computed_at


def samples_of(report: Report) -> list[QualitySample]:
    """Give the shares that are about no single class, since what users name must not become a label, nor doubtful."""
    return [
        QualitySample(each.release, found.name, found.value, found.low, found.high, found.n)
        for each in report.releases
        for found in each.figures
        if found.unit == "share" and found.class_name is None and not found.doubts
    ]
