"""A table that is only ever appended to: calls that arrive together are written in one transaction.

What gathers while a transaction runs goes into the next, without lingering. Transactions of all processes follow one
another, so that a call always meets the revision before it, and rows become visible in the order of their numbers.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

import msgspec
from sqlalchemy import Select, Table, and_, or_, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, Id, is_latest, predictions
from app.errors import Conflict, NotFound, Overloaded, Unavailable
from app.feedback.calls import Call, Row, revised
from app.feedback.words import Words

MAX_BATCH = 256
"""Calls in one transaction: enough that its commit is a small part of it."""

CLOSING_SECONDS = 10.0

Waiter = asyncio.Future["Written"]
Kept = tuple[Call, Call]
"""A call, and as its words are kept."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a call."""

    row: Row
    is_new: bool
    """Whether it was written now; else the same call was here before, and this is its revision."""
    is_stored: bool
    """Whether the prediction it is about is on record in the shared database yet."""


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """One call in the history of what was said; times are milliseconds since 1970."""

    revision: int
    at: int
    """When it arrived."""
    said_at: int
    key_id: str
    said: dict[str, Any]
    """The columns it set."""


class Ledger:
    """The door to one such table; use it in an `async with` block.

    Args:
        database: shared by all replicas.
        table: with the columns that `calls.revised` fills.
        noun: what a row of it is called.
        identity: the columns that never change for an id.
        words_in: the columns that hold words.
        words: keeps and shows those.
        capacity: calls that may wait at a time before others are refused.
    """

    def __init__(
        self,
        database: Database,
        table: Table,
        *,
        noun: str,
        identity: Sequence[str],
        words_in: Sequence[str],
        words: Words,
        capacity: int,
    ) -> None:
        self.table = table
        self.database = database
        self.columns = [column for column in table.c if not column.primary_key]
        self._noun = noun
        self._identity = identity
        self._words_in = words_in
        self._words = words
        self._capacity = capacity
        kept = {"id", "revision", "tenant", "slot", "key_id", "at", "said_at", "digest", "idempotency_key", "stamps"}
        self._says = [column.name for column in self.columns if column.name not in {*kept, *identity, "said"}]
        self._blank: Row = {column.name: None for column in self.columns} | {"withdrawn": False}
        self._queue: deque[tuple[Kept, Waiter]] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._is_open = False

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write what waits; whoever still waits after `CLOSING_SECONDS` is told."""
        self._is_open = False
        if self._writer is not None:
            await asyncio.shield(asyncio.wait({self._writer}, timeout=CLOSING_SECONDS))
            self._writer.cancel()
        self._refuse(self._taken(len(self._queue)), _closing())

    async def write(self, call: Call) -> Written:
        """Write a call, and return when it is on the disk.

        Raises:
            Conflict: its idempotency key came with another content before.
            Overloaded: too many wait already.
            Unavailable: the database does not answer; sent again with the same idempotency key it is written once.
        """
        kept = (call, await self._words.sealed(call, self._words_in))
        if not self._is_open:
            raise _closing()
        if len(self._queue) >= self._capacity:
            raise Overloaded(f"More than {self._capacity} calls wait to be written.", retry_after_seconds=1.0)
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._queue.append((kept, waiter))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting(), name=f"{self.table.name}-writer")
        return (await self._shown([await waiter]))[0]

    async def write_in(self, connection: AsyncConnection, calls: Sequence[Call]) -> list[Written]:
        """Write calls in a transaction of the caller's, which holds up every other writer until it ends.

        Raises:
            Conflict: an idempotency key came with another content before.
        """
        written: list[Written] = []
        kept = [(call, await self._words.sealed(call, self._words_in)) for call in calls]
        for outcome in await self._append_in(connection, kept):
            if isinstance(outcome, Conflict):
                raise outcome
            written.append(outcome)
        return await self._shown(written)

    async def _shown(self, written: Sequence[Written]) -> list[Written]:
        rows = await self._words.opened([each.row for each in written], self._words_in)
        return [msgspec.structs.replace(each, row=row) for each, row in zip(written, rows, strict=True)]

    # --- reading ---

    def current(self, tenant: str) -> Select[Any]:
        """The query for what a tenant's authors say now."""
        return select(*self.columns).where(self.table.c.tenant == tenant, self.is_latest)

    @property
    def is_latest(self) -> Any:
        """The condition that no revision follows a row."""
        return is_latest(self.table)

    async def read(self, query: Select[Any]) -> list[Row]:
        """Run a query."""
        async with self.database.reading() as connection:
            rows = [dict(row) for row in (await connection.execute(query)).mappings()]
        return await self._words.opened(rows, self._words_in) if rows and "slot" in rows[0] else rows

    async def get(self, tenant: str, id_: str) -> Row:
        """The latest revision of an id of the tenant; raises NotFound if there is none."""
        found = await self.read(self._revisions(tenant, id_).order_by(self.table.c.revision.desc()).limit(1))
        if not found:
            raise NotFound(f"There is no {self._noun} {id_!r}.")
        return found[0]

    async def history(self, tenant: str, id_: str) -> list[Revision]:
        """Every call about an id of the tenant, in the order of arrival."""
        return [self._revision(row) for row in await self.read(self._revisions(tenant, id_).order_by("revision"))]

    async def page(self, query: Select[Any], *, limit: int, before: str | None) -> list[Row]:
        """The rows of a query for what is current, newest id first, from the id `before` on backwards."""
        if before is not None:
            query = query.where(self.table.c.id < before)
        return await self.read(query.order_by(self.table.c.id.desc()).limit(limit))

    async def after(self, number: int, *, limit: int) -> list[tuple[int, Row]]:
        """The revisions of all tenants whose row's number is higher, in order: none is ever added in between."""
        query = select(self.table).where(self.table.c.row > number).order_by(self.table.c.row).limit(limit)
        return [(row.pop("row"), row) for row in await self.read(query)]

    def identity_of(self, row: Row) -> dict[str, Any]:
        """The columns of a row that never change."""
        return {name: row[name] for name in self._identity}

    def _revisions(self, tenant: str, id_: str) -> Select[Any]:
        return select(*self.columns).where(self.table.c.tenant == tenant, self.table.c.id == id_)

    def _revision(self, row: Row) -> Revision:
        said = msgspec.json.decode(row["said"]) if row["said"] else {name: row[name] for name in self._says}
        return Revision(revision=row["revision"], at=row["at"], said_at=row["said_at"], key_id=row["key_id"], said=said)

    # --- writing ---

    def _taken(self, limit: int) -> list[tuple[Kept, Waiter]]:
        """Take the first calls from the queue, without those whose caller has left."""
        first = [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]
        return [(kept, waiter) for kept, waiter in first if not waiter.done()]

    def _refuse(self, waiting: Sequence[tuple[Kept, Waiter]], error: Exception) -> None:
        for _, waiter in waiting:
            if not waiter.done():
                # Each gets an error of its own: a traceback grows with everyone who raises it.
                waiter.set_exception(_again(error))

    async def _write_waiting(self) -> None:
        batch: list[tuple[Kept, Waiter]] = []
        try:
            while self._queue:
                batch = self._taken(MAX_BATCH)
                if batch:
                    await self._write_batch(batch)
        finally:
            self._refuse(batch, _closing())

    async def _write_batch(self, batch: Sequence[tuple[Kept, Waiter]]) -> None:
        try:
            outcomes = await self._append([kept for kept, _ in batch])
        except Unavailable as error:
            # Whoever waits behind them would learn the same, only later.
            self._refuse([*batch, *self._taken(len(self._queue))], error)
        except Exception as error:  # noqa: BLE001 - it is told to the one whose call it is.
            if len(batch) == 1:
                self._refuse(batch, error)
                return
            for each in batch:
                await self._write_batch([each])
        else:
            for (_, waiter), outcome in zip(batch, outcomes, strict=True):
                if waiter.done():
                    continue
                if isinstance(outcome, Conflict):
                    waiter.set_exception(outcome)
                else:
                    waiter.set_result(outcome)

    async def _append(self, kept: Sequence[Kept]) -> list[Written | Conflict]:
        """Write calls in one transaction, in the order they came."""
        async with self.database.writing() as connection:
            return await self._append_in(connection, kept)

    async def _append_in(self, connection: AsyncConnection, kept: Sequence[Kept]) -> list[Written | Conflict]:
        await self.database.one_at_a_time(connection, self.table.name)
        calls = await self._words.lasting(connection, kept, self._words_in)
        known = await self._known(connection, calls)
        latest = await self._latest(connection, calls)
        fresh: list[Row] = []
        decided: list[tuple[Row, bool] | Conflict] = []
        for call in calls:
            repeated = known.get((call.tenant, call.idempotency_key)) if call.idempotency_key else None
            if repeated is None:
                row = revised(latest.get(call.slot), call, blank=self._blank, now=time.time_ns() // 1_000_000)
                latest[call.slot] = row
                if call.idempotency_key:
                    known[call.tenant, call.idempotency_key] = row
                fresh.append(row)
                decided.append((row, True))
            elif repeated["digest"] == call.digest:
                decided.append((repeated, False))
            else:
                decided.append(_other_content())
        if fresh:
            await connection.execute(self.table.insert(), fresh)
        stored = await _stored(connection, {(call.tenant, call.identity["prediction_id"]) for call in calls})
        return [
            outcome
            if isinstance(outcome, Conflict)
            else Written(
                row=outcome[0], is_new=outcome[1], is_stored=(call.tenant, call.identity["prediction_id"]) in stored
            )
            for call, outcome in zip(calls, decided, strict=True)
        ]

    async def _known(self, connection: AsyncConnection, calls: Sequence[Call]) -> dict[tuple[str, str], Row]:
        """The revisions that calls with the same idempotency keys have made, by tenant and key."""
        keys = [(call.tenant, call.idempotency_key) for call in calls if call.idempotency_key]
        if not keys:
            return {}
        rows = self.table
        query = select(*self.columns).where(_any_of(rows.c.tenant, rows.c.idempotency_key, keys))
        found = (await connection.execute(query)).mappings()
        return {(row["tenant"], row["idempotency_key"]): dict(row) for row in found}

    async def _latest(self, connection: AsyncConnection, calls: Sequence[Call]) -> dict[bytes, Row]:
        """The latest revisions of what the calls are about, by slot."""
        slots = {call.slot for call in calls}
        query = select(*self.columns).where(self.table.c.slot.in_(slots), self.is_latest)
        return {row["slot"]: dict(row) for row in (await connection.execute(query)).mappings()}

    async def stored(self, tenant: str, prediction_id: str) -> bool:
        """Whether a prediction of the tenant is on record in the shared database."""
        async with self.database.reading() as connection:
            return bool(await _stored(connection, {(tenant, prediction_id)}))


async def _stored(connection: AsyncConnection, wanted: set[tuple[str, str | None]]) -> set[tuple[str, str]]:
    """Which of these predictions, by tenant and id, are on record."""
    pairs = [(tenant, id_) for tenant, id_ in wanted if id_ is not None]
    if not pairs:
        return set()
    id_ = type_coerce(predictions.c.id, Id())
    query = select(predictions.c.tenant, id_.label("id")).where(_any_of(predictions.c.tenant, id_, pairs))
    return {(row.tenant, row.id) for row in await connection.execute(query)}


def _any_of(tenant: Any, name: Any, pairs: Sequence[tuple[str, str]]) -> Any:
    """The condition that a row is one of these pairs, so that SQLite uses its index: for tuples it would not."""
    by_tenant: dict[str, list[str]] = {}
    for owner, value in pairs:
        by_tenant.setdefault(owner, []).append(value)
    return or_(*(and_(tenant == owner, name.in_(values)) for owner, values in by_tenant.items()))


def _other_content() -> Conflict:
    return Conflict(
        "This idempotency key came with another content before: choose a new one for each thing that is said.",
        param="idempotency_key",
    )


def _closing() -> Unavailable:
    return Unavailable("The service is closing. Try again shortly.", retry_after_seconds=1.0)


def _again(error: Exception) -> Exception:
    if isinstance(error, Unavailable):
        return Unavailable(error.message, retry_after_seconds=error.retry_after_seconds)
    return error
