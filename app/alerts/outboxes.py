"""Each replica says in the shared database how full its outbox of predictions is: nobody else can see its disk.

The main rule: a replica that is stopped in good order takes its row away. So a row that grows old tells of one that was
killed and has not come back, with whatever records are on its disk.
"""

import asyncio
import time
from contextlib import suppress
from typing import Protocol, Self

import msgspec
from sqlalchemy import delete, select

from app.database import Database, outboxes
from app.errors import ServiceError
from app.repeating import Repeating

EVERY_SECONDS = 20.0
SILENT_SECONDS = 600.0
FORGOTTEN_SECONDS = 7 * 86_400
"""A replica that said nothing for so long is not expected back."""
MAX_REPLICAS = 1_000

_o = outboxes.c


class Waiting(Protocol):
    """An outbox, as its shipper sees it."""

    rows: int

    @property
    def lag_seconds(self) -> float:
        """The age of the oldest row."""
        ...


class OutboxRow(msgspec.Struct, frozen=True):
    """What a replica said last."""

    replica: str
    rows: int
    lag_seconds: float
    at: int


class OutboxReports:
    """Reports on one outbox again and again; use it in an `async with` block inside the shipper's."""

    def __init__(
        self, database: Database, outbox: Waiting, replica: str, *, every_seconds: float = EVERY_SECONDS
    ) -> None:
        """`replica` is a name that the next process on the same data directory has too."""
        self._database = database
        self._outbox = outbox
        self._replica = replica
        self._reporting = Repeating(self._say, failing="The outbox is not reported on", every_seconds=every_seconds)

    async def __aenter__(self) -> Self:
        await self._reporting.__aenter__()
        return self

    async def __aexit__(self, *of: object) -> None:
        await self._reporting.__aexit__(*of)
        with suppress(ServiceError):
            await asyncio.shield(self._take_away())

    async def report(self) -> None:
        """Say how full the outbox is; raises Unavailable."""
        said = {"rows": self._outbox.rows, "lag_seconds": self._outbox.lag_seconds, "at": _now()}
        row = self._database.insert(outboxes).values(replica=self._replica, **said)
        async with self._database.writing() as connection:
            await connection.execute(row.on_conflict_do_update(index_elements=["replica"], set_=said))
            await connection.execute(delete(outboxes).where(_o.at < _now() - FORGOTTEN_SECONDS * 1000))

    async def _take_away(self) -> None:
        if not self._outbox.rows:
            async with self._database.writing() as connection:
                await connection.execute(delete(outboxes).where(_o.replica == self._replica))

    async def _say(self) -> None:
        with suppress(ServiceError):  # The shipper says so already.
            await self.report()


async def outboxes_of(database: Database) -> list[OutboxRow]:
    """What every replica said last."""
    async with database.reading() as connection:
        rows = await connection.execute(select(outboxes).order_by(_o.replica).limit(MAX_REPLICAS))
        return [OutboxRow(**row._asdict()) for row in rows]


def _now() -> int:
    return time.time_ns() // 1_000_000
