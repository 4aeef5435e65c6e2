"""What every replica does about erasures: it destroys the keys it has itself, and takes turns at the rest.

The main rule: keys in a replica's own file are known to nobody else, so each looks at what was erased, at its start
from the first on, and then every second.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from sqlalchemy import func, select

from app.database import Database, erasures
from app.erasure.erasing import Eraser
from app.leases import Leases
from app.predictions.erased import erased_since

WORK = "erasure"
LEASE_SECONDS = 30.0


class OwnKeys(Protocol):
    """The keys in this replica's file."""

    async def destroy_erased(self, erased: Mapping[str, int]) -> int:
        """Destroy keys of subjects by digest that were made by the moment each was erased. Raises Unavailable.

        Called again, for nobody too, it removes what stayed on the disk because somebody read the file.
        """
        ...


class ErasureFollower:
    """Follows erasures, a turn at a time.

    Args:
        database: shared by all replicas.
        eraser: does what there is to do.
        leases: of this process.
        keys: in this replica's own file, where content is sealed.
        drop_unused: does a piece of destroying those in it that nothing is sealed by, where nobody else can.
        scrub: leaves nothing in the replica's outbox of what was shipped; False if it is to be asked again.
    """

    EVERY_SECONDS = 1.0

    def __init__(
        self,
        database: Database,
        eraser: Eraser,
        leases: Leases,
        *,
        keys: OwnKeys | None = None,
        drop_unused: Callable[[], Awaitable[bool]] | None = None,
        scrub: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._database = database
        self._eraser = eraser
        self._leases = leases
        self._keys = keys
        self._drop_unused = drop_unused
        self._scrub = scrub
        self._scrubbed_after = 0
        self._seen: tuple[int, int | None] = (0, None)

    async def turn(self) -> bool:
        """Look for erasures and do a piece; tells whether there may be more at once. Raises Unavailable."""
        table = erasures.c
        async with self._database.reading() as connection:
            known = select(func.count(), func.max(table.requested_at), func.count(table.finished_at).label("finished"))
            newest = (await connection.execute(known.select_from(erasures))).one()
            running = select(table.id).where(table.state == "running").limit(1)
            is_running = (await connection.execute(running)).first() is not None
            erased = (
                await erased_since(connection) if tuple(newest[:2]) != self._seen and self._keys is not None else {}
            )
        if self._keys is not None:
            await self._keys.destroy_erased(erased)
        self._seen = (newest[0], newest[1])
        if self._scrub is not None and newest.finished != self._scrubbed_after and await self._scrub():
            self._scrubbed_after = newest.finished
        if self._drop_unused is not None:
            await self._drop_unused()
        if not is_running or not await self._leases.take(WORK, seconds=LEASE_SECONDS):
            return False
        return await self._eraser.step()
