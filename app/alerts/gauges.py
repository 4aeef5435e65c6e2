"""Keeps the alerts on `/metrics`: how many of each kind fire, what could not be told, and whether anybody looks."""

from collections.abc import Callable

from app.alerts.store import tally
from app.database import Database
from observability.collectors import AlertSample, AlertTally


class AlertGauges:
    """Reads the alerts, and shows them."""

    EVERY_SECONDS = 15.0

    def __init__(self, database: Database, show: Callable[[AlertTally], None]) -> None:
        self._database = database
        self._show = show

    async def refresh(self) -> None:
        """Read them now; raises Unavailable, and what is shown then stays."""
        async with self._database.reading() as connection:
            rows, told, at = await tally(connection)
        samples = [AlertSample(row.kind, row.severity, row.state, row.release, row.number) for row in rows]
        waiting, dead = told.get("waiting", 0), told.get("dead", 0)
        self._show(AlertTally(samples, waiting, dead, at / 1000 if at is not None else None))
