"""Sends what is to be told, one at a time, again and again until somebody took it or a day has passed.

The main rule: whoever sends first moves the row's next attempt ahead, by compare and set. So two workers do not send
the same at once; and a worker that is killed after sending leaves a row that is sent again under the same id, by which
a receiver knows it.
"""

import logging
import random
from collections.abc import Callable

from sqlalchemy import ColumnElement, delete, select

from app.alerts.store import Notification, notification_of
from app.alerts.webhook import TIMEOUT_SECONDS, NotDelivered, Webhook
from app.database import Database, alert_notifications

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 3_600.0
GIVE_UP_SECONDS = 86_400.0
KEPT_SECONDS = 30 * 86_400.0
"""How long what was told, or could not be, is kept."""

_n = alert_notifications.c


class Notifier:
    """Empties the outbox of notifications; whoever calls `step` is the worker."""

    def __init__(
        self,
        database: Database,
        webhook: Webhook,
        clock: Callable[[], int],
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        """`clock` gives milliseconds since 1970; the webhook's answer is due within `timeout_seconds`."""
        self._database = database
        self._webhook = webhook
        self._clock = clock
        self._claim_ms = round(timeout_seconds * 1000) + 5_000
        self._first_pause_seconds = first_pause_seconds

    async def step(self) -> bool:
        """Send what is due next; tells whether there was anything.

        Raises:
            Unavailable: the database does not answer.
        """
        claimed = await self._claim()
        if claimed is None:
            return False
        try:
            await self._webhook.send(claimed.id, claimed.body.encode())
        except NotDelivered as error:
            await self._failed(claimed, str(error), for_good=error.for_good)
        else:
            await self._end(claimed, "delivered", None)
        return True

    async def _claim(self) -> Notification | None:
        now = self._clock()
        due = (_n.state == "waiting", _n.next_at <= now)
        async with self._database.reading() as connection:
            query = select(alert_notifications).where(*due).order_by(_n.next_at, _n.id).limit(1)
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        found = notification_of(row)
        mine = (_n.id == found.id, _n.attempts == found.attempts, *due)
        values = {"attempts": found.attempts + 1, "next_at": now + self._claim_ms}
        async with self._database.writing() as connection:
            done = await connection.execute(alert_notifications.update().where(*mine).values(**values))
        return found if done.rowcount else None

    async def _failed(self, claimed: Notification, why: str, *, for_good: bool) -> None:
        now = self._clock()
        if for_good or now - claimed.created_at >= GIVE_UP_SECONDS * 1000:
            await self._end(claimed, "dead", why)
            log.error("The notification %s of an alert is given up: %s", claimed.id, why)
            return
        longest = min(LONGEST_PAUSE_SECONDS, self._first_pause_seconds * 3 ** min(claimed.attempts, 20))
        pause = random.uniform(longest / 2, longest)  # noqa: S311 - so that many do not come back all at once.
        if not claimed.attempts:
            log.warning("The notification %s of an alert was not taken, and is tried again: %s", claimed.id, why)
        async with self._database.writing() as connection:
            values = {"next_at": now + round(pause * 1000), "problem": why}
            await connection.execute(alert_notifications.update().where(*_still_mine(claimed)).values(**values))

    async def _end(self, claimed: Notification, state: str, problem: str | None) -> None:
        now = self._clock()
        old = (_n.state != "waiting", _n.ended_at < now - KEPT_SECONDS * 1000)
        async with self._database.writing() as connection:
            values = {"state": state, "ended_at": now, "problem": problem}
            await connection.execute(alert_notifications.update().where(*_still_mine(claimed)).values(**values))
            await connection.execute(delete(alert_notifications).where(*old))


def _still_mine(claimed: Notification) -> tuple[ColumnElement[bool], ...]:
    return _n.id == claimed.id, _n.state == "waiting", _n.attempts == claimed.attempts + 1
