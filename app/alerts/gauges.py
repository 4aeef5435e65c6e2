"""Keeps the alerts on `/metrics`: how many of each kind fire, what could not be told, and whether anybody looks."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from app.alerts.store import tally
from app.database import Database
from app.errors import ServiceError
from observability.collectors import AlertSample, AlertTally

log = logging.getLogger(__name__)

EVERY_SECONDS = 15.0


class AlertGauges:
    """Reads the alerts again and again, and shows them; use it in an `async with` block."""

    def __init__(
        self, database: Database, show: Callable[[AlertTally], None], *, every_seconds: float = EVERY_SECONDS
    ) -> None:
        self._database = database
        self._show = show
        self._every_seconds = every_seconds

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="alert gauges")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def refresh(self) -> None:
        """Read them now; raises Unavailable, and what is shown then stays."""
        async with self._database.reading() as connection:
            rows, told, at = await tally(connection)
        samples = [AlertSample(row.kind, row.severity, row.state, row.release, row.number) for row in rows]
        waiting, dead = told.get("waiting", 0), told.get("dead", 0)
        self._show(AlertTally(samples, waiting, dead, at / 1000 if at is not None else None))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_seconds)
            try:
                await self.refresh()
            except ServiceError as error:
                log.warning("Alerts could not be read: %s", error.code)
            except Exception:
                log.exception("Alerts could not be read")
