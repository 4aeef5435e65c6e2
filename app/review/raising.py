"""Has more answers of a release reviewed for a while, because something was noticed about it.

The main rule: what is raised ends by itself, by the slice's last moment, whoever is still running then.
"""

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, review_boosts, review_queues
from app.drift import Noticed
from app.predictions import Where
from app.review.queues import MAX_BOOSTS, Boost, Queues

WHO = "worker:drift"

_q, _b = review_queues.c, review_boosts.c


class Raising:
    """Raises the share that the queues of a tenant take; `clock` gives milliseconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], int]) -> None:
        self._queues = Queues(database, clock)
        self._clock = clock

    async def __call__(self, connection: AsyncConnection, noticed: Noticed) -> None:
        """Boost every queue of the tenant that considers the release, unless it is boosted for the same already."""
        names = select(_q.name).where(_q.tenant == noticed.tenant).order_by(_q.name)
        for name in (await connection.execute(names)).scalars().all():
            await self._raise(connection, name, noticed)

    async def _raise(self, connection: AsyncConnection, name: str, noticed: Noticed) -> None:
        queue = await self._queues.read(connection, noticed.tenant, name, lock=True)
        now = self._clock()
        active = [each for each in await self._queues.boosts_of(connection, [queue.id]) if each.ended_at is None]
        ours = [each for each in active if each.created_by == WHO]
        past = [each for each in ours if _until(each) * 1000 <= now]
        for boost in past:
            await connection.execute(review_boosts.update().where(_b.id == boost.id).values(ended_at=now))
        same = [each for each in ours if each not in past and each.where and each.where.release == noticed.release]
        has_room = len(active) - len(past) < MAX_BOOSTS
        if not same and has_room and _considers(queue.rules.where, noticed.release):
            where = Where(release=noticed.release, since=noticed.since, until=noticed.until)
            await self._queues.note_boost(connection, queue, noticed.rate, noticed.reason, where, WHO)


def _until(boost: Boost) -> float:
    """The last moment of a slice, in seconds since 1970."""
    return boost.where.until.timestamp() if boost.where and boost.where.until else float("inf")


def _considers(where: Where, release: str) -> bool:
    """Whether a queue considers answers of a release, as `name@3`."""
    return where.release is None or where.release in (release, release.partition("@")[0])
