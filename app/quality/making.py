"""Makes a report from the rows on record, page by page, in a process of its own (`app.quality.apart`)."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Row

from app.database import Database
from app.predictions import Where, first_id
from app.privacy.envelopes import Ring
from app.quality.answers import Answers, ReleaseTallies
from app.quality.figures import DEFAULT_DAYS, Asked, Figure, ReleaseQuality, Report, figure
from app.quality.guesses import LABELLED_DAYS, Signals, fits, guesses, signals_of
from app.quality.labels import Labelled, label_figures
from app.quality.rows import MAX_LABELLED, Rows
from observability.estimates import Moments, proportion

PAGE_ROWS = 500
"""Few enough that no read is open for long: what is open keeps SQLite from using its write-ahead log anew."""
MAX_CALIBRATED = 10_000
"""Labelled answers that guesses are fitted to at most: the newest."""

Page = TypeVar("Page")
Drifted = Callable[[str, Collection[str]], Awaitable[Collection[str]]]
"""Says of which of a tenant's releases the questions are other than before."""


class Maker:
    """Makes reports on the answers in the database that all replicas share.

    Args:
        database: where predictions, feedback and labels are.
        rest: for each second of work so many seconds of rest between pages.
        keys: open what was sealed.
        drifted: says which releases' questions have changed, so that guesses are doubted; by default none have.
    """

    def __init__(
        self,
        database: Database,
        *,
        rest: float = 0.0,
        keys: Ring | None = None,
        drifted: Drifted | None = None,
    ) -> None:
        self._rows = Rows(database, keys)
        self._rest = rest
        self._drifted = drifted

    async def make(self, asked: Asked) -> Report:
        """Make a report; by default on the last seven days.

        Raises:
            InvalidRequest: the window has answers of too many releases.
            Unavailable: the database does not answer.
        """
        now = datetime.now(UTC)
        until = min(_aware(asked.where.until) or now, now)
        since = _aware(asked.where.since) or until - timedelta(days=DEFAULT_DAYS)
        where = msgspec.structs.replace(asked.where, since=since, until=until)
        found = _Found(Answers(asked.only), first_id(since))
        for tenant in await self._rows.tenants() if asked.tenant is None else [asked.tenant]:
            await self._read(tenant, where, found)
        found.answers.finish()
        guessed = await self._guessed(asked.tenant, found, until.timestamp())
        releases = await asyncio.to_thread(found.releases, guessed)
        return Report(since=since, until=until, computed_at=now, labels_are_cut=found.is_cut, releases=releases)

    async def _read(self, tenant: str, where: Where, found: "_Found") -> None:
        async for page in self._resting(self._rows.answers(tenant, where, page_rows=PAGE_ROWS)):
            await asyncio.to_thread(found.answers.add, tenant, page)
        async for page in self._resting(self._rows.thumbs(tenant, where, page_rows=PAGE_ROWS)):
            await asyncio.to_thread(found.answers.add_thumbs, tenant, page)
        partial = await self._rows.partial_queues(tenant)
        since = min(where.since, where.until - timedelta(days=LABELLED_DAYS)) if where.since and where.until else None
        async for groups in self._resting(self._rows.labelled(tenant, msgspec.structs.replace(where, since=since))):
            await asyncio.to_thread(found.add_labels, tenant, groups, partial)
            if found.has_enough(groups[-1][0].id if groups else None):
                break
        found.add_reviewed(await self._rows.reviewed(tenant, where))
        if found.labelled:
            async for page in self._resting(self._rows.judged(tenant, where, page_rows=PAGE_ROWS)):
                await asyncio.to_thread(found.judged.add, page)
        if self._drifted is not None:
            found.drifted |= set(await self._drifted(tenant, list(found.answers.releases)))

    async def _guessed(self, tenant: str | None, found: "_Found", until: float) -> dict[str, list[Figure]]:
        """Guess by release what labels would say."""
        guessed = {}
        for release, rows in found.calibrated.items():
            made = await asyncio.to_thread(fits, rows, until)
            signals: list[Signals] = []
            if any(each.calibration is not None for each in made):
                some = found.answers.releases[release].some()
                async for page in self._resting(self._rows.signals(tenant, some)):
                    signals += map(signals_of, page)
            guessed[release] = list(guesses(made, signals, drifted=release in found.drifted))
        return guessed

    async def _resting(self, pages: AsyncIterator[Page]) -> AsyncIterator[Page]:
        """Rest after each page as long as it took, times `rest`."""
        started = time.monotonic()
        async for page in pages:
            yield page
            await asyncio.sleep(self._rest * (time.monotonic() - started))
            started = time.monotonic()


class _Found:
    """What was read so far."""

    def __init__(self, answers: Answers, first: str) -> None:
        self.answers = answers
        self.labelled: dict[str, list[Labelled]] = {}
        self.calibrated: dict[str, list[Labelled]] = {}
        """Labelled answers of the window and before it."""
        self.judged = Judged()
        self.drifted: set[str] = set()
        self.is_cut = False
        self._first = first
        self._reviewed: dict[str, tuple[int, int]] = {}
        self._labels_read = self._calibrated = 0

    def has_enough(self, last: str | None) -> bool:
        """Whether labels of older answers than the last would be of no use."""
        return last is not None and (self.is_cut or last < self._first) and self._calibrated >= MAX_CALIBRATED

    def add_labels(self, tenant: str, groups: Sequence[Sequence[Row[Any]]], partial: Collection[str]) -> None:
        for labels in groups:
            release = labels[0].release_name
            if release not in self.answers.releases:
                continue
            session = self.answers.session(tenant, labels[0])
            row = Labelled.of(labels, session, signals_of(labels[0]), tenant=tenant, partial=partial)
            if self._calibrated < MAX_CALIBRATED:
                self._calibrated += 1
                self.calibrated.setdefault(release, []).append(row)
            if labels[0].id < self._first:
                continue
            if self._labels_read == MAX_LABELLED:
                self.is_cut = True
                continue
            self._labels_read += 1
            self.labelled.setdefault(release, []).append(row)

    def add_reviewed(self, rows: Sequence[Row[Any]]) -> None:
        for row in rows:
            done, n = self._reviewed.get(row.release_name, (0, 0))
            self._reviewed[row.release_name] = done + int(row.done), n + row.n

    def releases(self, guessed: dict[str, list[Figure]]) -> list[ReleaseQuality]:
        return [
            self._release(name, tallies, guessed.get(name, []))
            for name, tallies in sorted(self.answers.releases.items())
        ]

    def _release(self, name: str, tallies: ReleaseTallies, guessed: Sequence[Figure]) -> ReleaseQuality:
        labels = label_figures(self.labelled.get(name, []), tallies.answers, self.judged.moments(name))
        reviewed = self._reviewed.get(name)
        return ReleaseQuality(
            release=name,
            answers=tallies.answers,
            labelled=labels.labelled,
            labels_left_out=labels.left_out,
            sampled=labels.sampled,
            figures=[
                *tallies.figures(),
                *([figure("reviewed", proportion(*reviewed))] if reviewed else []),
                *labels.figures,
                *guessed,
            ],
        )


class Judged:
    """What judges say of each release's answers, summed up: each answer counts once, with its mean score."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, float, float]] = {}
        self._current: tuple[str, str, list[float]] | None = None

    def add(self, page: Sequence[Row[Any]]) -> None:
        """Add scores; those of one answer follow one another."""
        for row in page:
            if self._current is None or self._current[0] != row.id:
                self._close()
                self._current = row.id, row.release_name, []
            self._current[2].append(float(row.rating))

    def moments(self, release: str) -> Moments | None:
        """Give the moments of a release's scores; None without any."""
        self._close()
        n, total, squares = self._sums.get(release, (0, 0.0, 0.0))
        return Moments(n, total / n, max(0.0, squares / n - (total / n) ** 2)) if n else None

    def _close(self) -> None:
        if self._current is None:
            return
        _, release, scores = self._current
        score = sum(scores) / len(scores)
        n, total, squares = self._sums.get(release, (0, 0.0, 0.0))
        self._sums[release] = n + 1, total + score, squares + score * score
        self._current = None


def _aware(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
