"""The front door: a report over a window, one at a time, kept for a short while."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from app.predictions import Where
from app.quality.figures import Asked, Report

KEPT_SECONDS = 60.0
"""How long a report is given again to whoever asks for the same."""
MAX_KEPT = 64

Make = Callable[[Asked], Awaitable[Report]]
"""Makes a report; in the service by a process of its own (`app.quality.apart`)."""


class Quality:
    """Reports on the answers in the database that all replicas share; `make` makes a report."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._turn = asyncio.Lock()
        self._kept: dict[Asked, tuple[float, Report]] = {}

    async def report(self, tenant: str, where: Where) -> Report:
        """Report on the tenant's answers; by default on those of the last seven days.

        One report is made at a time, and given again for a minute.

        Raises:
            InvalidRequest: the window has answers of too many releases.
            Unavailable: the database does not answer, or the report takes too long.
        """
        asked = Asked(tenant=tenant, where=where)
        async with self._turn:
            kept = self._kept.get(asked)
            if kept is not None and time.monotonic() - kept[0] < KEPT_SECONDS:
                return kept[1]
            report = await self._make(asked)
            self._kept.pop(asked, None)
            self._kept[asked] = time.monotonic(), report
            while len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            return report
