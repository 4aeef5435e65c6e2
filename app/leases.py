"""Who does a kind of work at present: one row for each, which its holder renews and anybody takes when it has expired.

The main rule: a lease saves work and promises nothing. Two processes may hold one for a moment, where a clock is wrong
or a process was stopped for longer than the lease; whatever work does must be right all the same.
"""

from collections.abc import Callable

from sqlalchemy import delete, or_

from app.database import Database, leases

_l = leases.c


class Leases:
    """The leases of one process; `clock` gives milliseconds since 1970."""

    def __init__(self, database: Database, holder: str, clock: Callable[[], int]) -> None:
        self._database = database
        self._holder = holder
        self._clock = clock

    async def take(self, work: str, *, seconds: float) -> bool:
        """Hold a kind of work for so long from now; False where another process does.

        Raises:
            Unavailable: the database does not answer.
        """
        now = self._clock()
        until = {"holder": self._holder, "expires_at": now + round(seconds * 1000)}
        free = or_(_l.holder == self._holder, _l.expires_at <= now)
        async with self._database.writing() as connection:
            renewed = await connection.execute(leases.update().where(_l.work == work, free).values(**until))
            if renewed.rowcount:
                return True
            row = self._database.insert(leases).values(work=work, **until).on_conflict_do_nothing()
            return bool((await connection.execute(row)).rowcount)

    async def give_back(self, work: str) -> None:
        """Let another process take it at once.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self._database.writing() as connection:
            await connection.execute(delete(leases).where(_l.work == work, _l.holder == self._holder))
