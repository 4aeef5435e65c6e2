"""The report on the serving releases that is computed again and again, and kept for whoever shows it or alerts on it.

The main rule: one worker computes (`Keeper.step`), and every replica reads what is kept (`Kept`). A report that is old
says so by its own time.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import select

from app.database import Database, quality_reports
from app.predictions import Where
from app.quality.apart import LONGEST_SECONDS
from app.quality.figures import MAX_RELEASES, Asked, Report
from app.quality.quality import Make
from app.registry import all_rollouts

log = logging.getLogger(__name__)

WINDOW = timedelta(days=1)
EVERY_SECONDS = 300.0
REST = 1.0
"""Seconds of rest for each second of work while a report is made."""
MAX_PART = 0.2
"""The part of all time that reports may take: where one takes long, the next comes later."""
AGAIN_SECONDS = 60.0
"""After a failure."""

_LONGEST_REST_MILLISECONDS = round(max(EVERY_SECONDS, LONGEST_SECONDS / MAX_PART) * 1000)
_SERVING = "serving"
_q = quality_reports.c
_read = msgspec.json.Decoder(Report).decode


class Kept:
    """Reads and replaces the report on the serving releases: the last day's answers of all tenants together."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def computed_at(self) -> int | None:
        """When the report was computed, in milliseconds since 1970; None while there is none. Costs next to nothing.

        Raises:
            Unavailable: the database does not answer.
        """
        found: int | None = await self._one(_q.computed_at)
        return found

    async def due_at(self) -> int | None:
        """When the next one is due; raises Unavailable."""
        found: int | None = await self._one(_q.due_at)
        return found

    async def report(self) -> Report | None:
        """Read the report; raises Unavailable."""
        text = await self._one(_q.report)
        return None if text is None else _read(text)

    async def replace(self, report: Report, *, due_at: int) -> None:
        """Keep this report instead, unless a later one is kept; raises Unavailable."""
        computed_at = round(report.computed_at.timestamp() * 1000)
        values = {
            "computed_at": computed_at,
            "due_at": due_at,
            "report": msgspec.json.encode(report).decode(),
        }
        row = self._database.insert(quality_reports).values(name=_SERVING, **values)
        row = row.on_conflict_do_update(index_elements=["name"], set_=values, where=_q.computed_at <= computed_at)
        async with self._database.writing() as connection:
            await connection.execute(row)

    async def _one(self, column: Any) -> Any:
        async with self._database.reading() as connection:
            return (await connection.execute(select(column).where(_q.name == _SERVING))).scalar_one_or_none()


class Keeper:
    """Keeps the report up to date; whoever calls `step` again and again is the worker.

    Args:
        database: shared by all replicas and workers.
        make: makes a report; a worker has it made by a process of its own.
        clock: milliseconds since 1970.
        every_seconds: from one report to the next.
    """

    def __init__(
        self,
        database: Database,
        make: Make,
        clock: Callable[[], int],
        *,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self._database = database
        self._kept = Kept(database)
        self._make = make
        self._clock = clock
        self._every_seconds = every_seconds
        self._not_before = 0

    async def step(self) -> bool:
        """Compute the report if it is due; there is never more to do at once.

        Raises:
            ServiceError: it could not be computed, and is not tried again for a minute.
        """
        if not await self._is_due():
            return False
        self._not_before = self._clock() + round(AGAIN_SECONDS * 1000)
        async with self._database.reading() as connection:
            rollouts = await all_rollouts(connection)
        serving = sorted({f"{rollout.name}@{number}" for rollout in rollouts for number in rollout.serving})
        started = time.monotonic()
        where = Where(since=datetime.now(UTC) - WINDOW)
        report = await self._make(Asked(tenant=None, where=where, only=tuple(serving[:MAX_RELEASES])))
        seconds = time.monotonic() - started
        rest_seconds = max(self._every_seconds, seconds / MAX_PART)
        await self._kept.replace(report, due_at=self._clock() + round(rest_seconds * 1000))
        log.info("Quality of %d releases computed in %.1f s", len(report.releases), seconds)
        return False

    async def _is_due(self) -> bool:
        now = self._clock()
        if now < self._not_before:
            return False
        due_at = await self._kept.due_at()
        # A clock that was once far ahead must not stop it for good.
        return due_at is None or not now < due_at <= now + _LONGEST_REST_MILLISECONDS
