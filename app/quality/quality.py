"""The front door: a report over a window, kept for a short while, and what the service's own releases come to."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Row

from app.database import Database
from app.predictions import Where
from app.quality.answers import Answers, ReleaseTallies
from app.quality.figures import ReleaseQuality, Report
from app.quality.labels import Labelled, label_figures
from app.quality.rows import MAX_LABELLED, Rows
from observability.estimates import Moments

DEFAULT_DAYS = 7
KEPT_SECONDS = 60.0
"""How long a report is given again to whoever asks for the same."""
MAX_KEPT = 64
PAGE_ROWS = 1_000

Page = TypeVar("Page")
_Asked = tuple[str, Where]


class Quality:
    """Reports on the answers in the database that all replicas share.

    Args:
        database: where predictions, feedback and labels are.
        rest: for each second of work so many seconds of rest between pages, so that the event loop's thread and what it
            answers go first.
    """

    def __init__(self, database: Database, *, rest: float = 0.0) -> None:
        self._rows = Rows(database)
        self._rest = rest
        self._turn = asyncio.Lock()
        self._kept: dict[_Asked, tuple[float, Report]] = {}

    async def report(self, tenant: str, where: Where) -> Report:
        """Report on the tenant's answers; by default on those of the last seven days.

        One report is made at a time, and given again for a minute.

        Raises:
            InvalidRequest: the window has answers of too many releases.
            Unavailable: the database does not answer.
        """
        asked = (tenant, where)
        async with self._turn:
            kept = self._kept.get(asked)
            if kept is not None and time.monotonic() - kept[0] < KEPT_SECONDS:
                return kept[1]
            report = await self._make([tenant], where)
            self._kept.pop(asked, None)
            self._kept[asked] = time.monotonic(), report
            while len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            return report

    async def tenants(self) -> list[str]:
        """Everybody who ever had a key."""
        return await self._rows.tenants()

    async def of_releases(self, releases: Collection[str], *, window: timedelta) -> Report:
        """Report on what these releases answered to all tenants together."""
        return await self._make(await self._rows.tenants(), Where(since=datetime.now(UTC) - window), only=releases)

    async def _make(self, tenants: list[str], where: Where, only: Collection[str] | None = None) -> Report:
        now = datetime.now(UTC)
        until = min(_aware(where.until) or now, now)
        since = _aware(where.since) or until - timedelta(days=DEFAULT_DAYS)
        where = msgspec.structs.replace(where, since=since, until=until)
        found = _Found(Answers(only))
        for tenant in tenants:
            async for page in self._resting(self._rows.answers(tenant, where, page_rows=PAGE_ROWS)):
                await asyncio.to_thread(found.answers.add, tenant, page)
            async for page in self._resting(self._rows.thumbs(tenant, where, page_rows=PAGE_ROWS)):
                await asyncio.to_thread(found.answers.add_thumbs, tenant, page)
            async for groups in self._resting(self._rows.labelled(tenant, where)):
                await asyncio.to_thread(found.add_labels, tenant, groups)
                if found.is_cut:
                    break
            if found.labelled:
                found.add_judged(await self._rows.judged(tenant, where))
        releases = await asyncio.to_thread(found.releases)
        return Report(since=since, until=until, computed_at=now, labels_are_cut=found.is_cut, releases=releases)

    async def _resting(self, pages: AsyncIterator[Page]) -> AsyncIterator[Page]:
        """Rest after each page as long as it took, times `rest`."""
        started = time.monotonic()
        async for page in pages:
            yield page
            await asyncio.sleep(self._rest * (time.monotonic() - started))
            started = time.monotonic()


class _Found:
    """What was read so far."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.labelled: dict[str, list[Labelled]] = {}
        self.is_cut = False
        self._judged: dict[str, list[Moments]] = {}
        self._labels_read = 0

    def add_labels(self, tenant: str, groups: Sequence[Sequence[Row[Any]]]) -> None:
        for labels in groups:
            release = labels[0].release_name
            if release not in self.answers.releases:
                continue
            if self._labels_read == MAX_LABELLED:
                self.is_cut = True
                return
            self._labels_read += 1
            self.labelled.setdefault(release, []).append(Labelled.of(labels, self.answers.session(tenant, labels[0])))

    def add_judged(self, rows: Sequence[Row[Any]]) -> None:
        for row in rows:
            mean = float(row.mean)
            moments = Moments(row.n, mean, max(0.0, float(row.square) - mean**2))
            self._judged.setdefault(row.release_name, []).append(moments)

    def releases(self) -> list[ReleaseQuality]:
        self.answers.finish()
        return [self._release(name, tallies) for name, tallies in sorted(self.answers.releases.items())]

    def _release(self, name: str, tallies: ReleaseTallies) -> ReleaseQuality:
        judged = _together(self._judged.get(name, []))
        labels = label_figures(self.labelled.get(name, []), tallies.answers, judged)
        return ReleaseQuality(
            release=name,
            answers=tallies.answers,
            labelled=labels.labelled,
            labels_left_out=labels.left_out,
            sampled=labels.sampled,
            figures=[*tallies.figures(), *labels.figures],
        )


def _together(parts: list[Moments]) -> Moments | None:
    """The moments of all parts' rows."""
    n = sum(part.n for part in parts)
    if not n:
        return None
    mean = sum(part.n * part.mean for part in parts) / n
    square = sum(part.n * (part.variance + part.mean**2) for part in parts) / n
    return Moments(n, mean, max(0.0, square - mean**2))


def _aware(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
