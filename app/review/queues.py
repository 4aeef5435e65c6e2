"""The queues of each tenant: their rules, what is added to them on purpose, and the one way an item gets into one.

The main rule: whoever changes a queue, its items or their reviews locks the queue's row first. So two changes of one
queue never meet, whichever replicas they come from.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, case, func, or_, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, feedback, predictions, review_boosts, review_items, review_queues
from app.errors import Conflict, InvalidRequest, NotFound
from app.feedback.calls import canonical_id
from app.predictions import Where, conditions, uuid7
from app.review.rules import Candidate, Offer, Policy, Rules, chosen, reviews_wanted

MAX_QUEUES = 100
MAX_BOOSTS = 100
MAX_NAMED = 1_000
"""Predictions that one boost may name."""

Clock = Callable[[], int]

_p = predictions.c
CANDIDATE = (_p.id, _p.release_name, _p.verdict, _p.citations, _p.passages)
"""The columns of a `Candidate`."""


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as it is on record; times are milliseconds since 1970."""

    id: str
    tenant: str
    name: str
    revision: int
    rules: Rules
    created_at: int
    created_by: str
    updated_at: int
    updated_by: str
    position: int | None
    position_id: str | None
    """The last prediction that was considered, by its place in the record."""
    feedback_position: int


class Boost(msgspec.Struct, frozen=True, kw_only=True):
    """A share of a slice that a queue takes on top; times are milliseconds since 1970."""

    id: str
    queue_id: str
    rate: float
    reason: str
    where: Where | None
    """The slice, which is followed; None where predictions were named one by one."""
    created_at: int
    created_by: str
    ended_at: int | None
    position: int | None
    position_id: str | None


def population(tenant: str, where: Where) -> list[ColumnElement[bool]]:
    """Say in SQL which predictions a queue considers: finished, kept, and no shadows or chores unless named."""
    meant = list(conditions(tenant, msgspec.structs.replace(where, outcome="finished")))
    meant.append(_p.store)
    if where.assignment is None:
        meant.append(or_(_p.assignment.is_(None), _p.assignment.not_in(("shadow", "chore"))))
    return meant


class Queues:
    """The queues of all tenants.

    Args:
        database: shared by all replicas.
        clock: the time in milliseconds since 1970.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self.changed = asyncio.Event()
        """Set when there may be something to fill at once."""

    async def define(self, tenant: str, name: str, rules: Rules, *, who: str) -> tuple[Queue, bool]:
        """Make a queue, or give one other rules from now on; tells whether it is new.

        What it considers stays: without `since` that is what is predicted from the moment it is made.

        Raises:
            Conflict: the queue considers other predictions, or there are too many queues.
        """
        defined = await self._define(tenant, name, rules, who)
        self.changed.set()
        return defined

    async def _define(self, tenant: str, name: str, rules: Rules, who: str) -> tuple[Queue, bool]:
        now = self._clock()
        async with self._database.writing() as connection:
            row = await _find(connection, tenant, name, lock=True)
            if row is None:
                return await self._make(connection, tenant, name, rules, who, now), True
            before = _queue(row)
            if rules.where.since is None:
                where = msgspec.structs.replace(rules.where, since=before.rules.where.since)
                rules = msgspec.structs.replace(rules, where=where)
            if rules.where != before.rules.where:
                raise Conflict(
                    f"The queue {name!r} considers other predictions: what it has found so far stands for those. "
                    "Make another queue, under another name.",
                    param="where",
                )
            changed = {
                "revision": before.revision + 1,
                "rules": _written(rules),
                "updated_at": now,
                "updated_by": who,
            }
            await connection.execute(review_queues.update().where(review_queues.c.id == before.id).values(**changed))
            return _queue({**row._asdict(), **changed}), False

    async def _make(
        self, connection: AsyncConnection, tenant: str, name: str, rules: Rules, who: str, now: int
    ) -> Queue:
        await self._database.one_at_a_time(connection, review_queues.name)
        if await _find(connection, tenant, name):
            raise Conflict(f"The queue {name!r} was made at this moment by another call: look at it.")
        mine = select(func.count()).select_from(review_queues).where(review_queues.c.tenant == tenant)
        if (await connection.execute(mine)).scalar_one() >= MAX_QUEUES:
            raise Conflict(f"There are {MAX_QUEUES} queues already: give one of them other rules.", param="name")
        where = rules.where
        if where.since is None:
            where = msgspec.structs.replace(where, since=datetime.fromtimestamp(now / 1000, UTC))
        heard = (await connection.execute(select(func.max(feedback.c.row)))).scalar_one()
        made = {
            "id": uuid7(),
            "tenant": tenant,
            "name": name,
            "revision": 1,
            "rules": _written(msgspec.structs.replace(rules, where=where)),
            "created_at": now,
            "created_by": who,
            "updated_at": now,
            "updated_by": who,
            "position": None,
            "position_id": None,
            "feedback_position": heard or 0,  # What was said before is asked for when its prediction is considered.
        }
        await connection.execute(review_queues.insert(), made)
        return _queue(made)

    async def get(self, tenant: str, name: str) -> Queue:
        """One queue of the tenant; raises NotFound."""
        async with self._database.reading() as connection:
            return await self.read(connection, tenant, name)

    async def find(self, tenant: str) -> list[Queue]:
        """All queues of the tenant, by name."""
        query = select(review_queues).where(review_queues.c.tenant == tenant).order_by(review_queues.c.name)
        async with self._database.reading() as connection:
            return [_queue(row) for row in await connection.execute(query)]

    async def read(self, connection: AsyncConnection, tenant: str, name: str, *, lock: bool = False) -> Queue:
        """One queue of the tenant, locked against every other change until the transaction ends if so wished."""
        row = await _find(connection, tenant, name, lock=lock)
        if row is None:
            raise NotFound(f"There is no review queue {name!r}.")
        return _queue(row)

    async def of_id(self, connection: AsyncConnection, queue_id: str, *, lock: bool = False) -> Queue:
        """The queue that an item belongs to."""
        query = select(review_queues).where(review_queues.c.id == queue_id)
        return _queue((await connection.execute(query.with_for_update() if lock else query)).one())

    async def fillable(self, connection: AsyncConnection) -> list[Queue]:
        """The queues of all tenants that are to be filled and have room."""
        rows = await connection.execute(select(review_queues).order_by(review_queues.c.id))
        queues = [queue for queue in map(_queue, rows) if not queue.rules.paused]
        item = review_items.c
        waiting = select(item.queue_id, func.count()).where(item.state == "waiting").group_by(item.queue_id)
        counted = await connection.execute(waiting.where(item.queue_id.in_([queue.id for queue in queues])))
        counts = {row[0]: row[1] for row in counted}
        return [queue for queue in queues if counts.get(queue.id, 0) < queue.rules.capacity]

    # --- what is added on purpose ---

    async def boost(self, tenant: str, name: str, *, rate: float, reason: str, where: Where, who: str) -> Boost:
        """Take a larger share of a slice, of what was predicted in it already and of what will be.

        It applies to predictions that the queue considers, and only ever raises how likely one is taken.

        Raises:
            NotFound: there is no such queue.
            Conflict: too many boosts of it have not ended.
        """
        async with self._database.writing() as connection:
            queue = await self.read(connection, tenant, name, lock=True)
            if len([each for each in await self.boosts_of(connection, [queue.id]) if not each.ended_at]) >= MAX_BOOSTS:
                raise Conflict(f"{MAX_BOOSTS} boosts of this queue have not ended: end one.")
            made = await self.note_boost(connection, queue, rate, reason, where, who)
        self.changed.set()
        return made

    async def boost_named(
        self, tenant: str, name: str, *, rate: float, reason: str, prediction_ids: Sequence[str], who: str
    ) -> tuple[Boost, int]:
        """Take a larger share of these predictions, at most `MAX_NAMED`; tells how many of them the queue considers."""
        ids = sorted({canonical_id(each) for each in prediction_ids})
        async with self._database.writing() as connection:
            queue = await self.read(connection, tenant, name, lock=True)
            meant = (*population(tenant, queue.rules.where), _p.id.in_(ids[:MAX_NAMED]))
            rows = await connection.execute(select(*CANDIDATE).where(*meant))
            said: list[tuple[float, Policy]] = [(rate, "drift")]
            found = [(Candidate(**row._asdict()), said) for row in rows]
            await self.take(connection, queue, chosen(queue.id, found))
            boost = await self.note_boost(connection, queue, rate, reason, None, who)
        return boost, len(found)

    async def boosts(self, tenant: str, name: str) -> list[Boost]:
        """The boosts of a queue, the newest first."""
        async with self._database.reading() as connection:
            queue = await self.read(connection, tenant, name)
            return await self.boosts_of(connection, [queue.id])

    async def one_boost(self, tenant: str, name: str, boost_id: str) -> Boost:
        """One boost of a queue; raises NotFound."""
        async with self._database.reading() as connection:
            queue = await self.read(connection, tenant, name)
            return await _found_boost(connection, queue, boost_id)

    async def boosts_of(self, connection: AsyncConnection, queue_ids: Sequence[str]) -> list[Boost]:
        """The boosts of some queues, the newest first."""
        b = review_boosts.c
        query = select(review_boosts).where(b.queue_id.in_(queue_ids)).order_by(b.id.desc())
        return [_boost(row) for row in await connection.execute(query)]

    async def end_boost(self, tenant: str, name: str, boost_id: str) -> Boost:
        """Follow a slice no more; what was taken from it stays. Raises NotFound."""
        b = review_boosts.c
        async with self._database.writing() as connection:
            queue = await self.read(connection, tenant, name, lock=True)
            still = (b.queue_id == queue.id, b.id == boost_id, b.ended_at.is_(None))
            await connection.execute(review_boosts.update().where(*still).values(ended_at=self._clock()))
            return await _found_boost(connection, queue, boost_id)

    async def add_gold(self, tenant: str, name: str, prediction_id: str, class_name: str) -> str:
        """Make a prediction one whose right class is known, to see whether reviewers find it; gives the item's id.

        Raises:
            NotFound: there is no such queue, or no such prediction that was kept.
            InvalidRequest: the queue has no such class.
        """
        prediction_id = canonical_id(prediction_id)
        async with self._database.writing() as connection:
            queue = await self.read(connection, tenant, name, lock=True)
            check_class(queue.rules, class_name)
            is_kept = (_p.tenant == tenant, _p.id == prediction_id, _p.outcome == "finished", _p.store)
            found = (await connection.execute(select(_p.release_name).where(*is_kept))).one_or_none()
            if found is None:
                raise NotFound(
                    f"There is no finished prediction {prediction_id!r} that was kept.", param="prediction_id"
                )
            row = {**self._item(queue, prediction_id, found.release_name), "policy": "gold", "state": "gold"}
            insert = self._database.insert(review_items)
            known = [review_items.c.queue_id, review_items.c.prediction_id]
            stated = {"gold_class": insert.excluded.gold_class}
            again = insert.on_conflict_do_update(index_elements=known, set_=stated)
            await connection.execute(again, {**row, "gold_class": class_name})
            mine = (review_items.c.queue_id == queue.id, review_items.c.prediction_id == prediction_id)
            return str((await connection.execute(select(review_items.c.id).where(*mine))).scalar_one())

    async def take(self, connection: AsyncConnection, queue: Queue, offers: Sequence[Offer]) -> None:
        """Put predictions into a queue that is locked; one that is there gets the higher of its probabilities."""
        if not offers:
            return
        rows = [
            {**self._item(queue, each.prediction_id, each.release_name), "policy": each.policy, "state": "waiting"}
            | {"probability": each.probability, "gold_class": None}
            for each in offers
        ]
        insert = self._database.insert(review_items)
        new, item = insert.excluded, review_items.c
        is_enough = case((item.done >= item.wanted, "done"), else_="waiting")
        raised = insert.on_conflict_do_update(
            index_elements=[item.queue_id, item.prediction_id],
            set_={
                "policy": new.policy,
                "probability": new.probability,
                "risen": true(),
                "state": case((item.state == "gold", is_enough), else_=item.state),
            },
            where=new.probability > func.coalesce(item.probability, 0.0),
        )
        await connection.execute(raised, rows)

    def _item(self, queue: Queue, prediction_id: str, release_name: str | None) -> dict[str, Any]:
        return {
            "id": uuid7(),
            "tenant": queue.tenant,
            "queue_id": queue.id,
            "prediction_id": prediction_id,
            "release_name": release_name,
            "wanted": reviews_wanted(queue.id, queue.rules, prediction_id),
            "done": 0,
            "skipped": 0,
            "risen": False,
            "created_at": self._clock(),
        }

    async def note_boost(
        self, connection: AsyncConnection, queue: Queue, rate: float, reason: str, where: Where | None, who: str
    ) -> Boost:
        """Write a boost of a queue that is locked."""
        now = self._clock()
        made = {
            "id": uuid7(),
            "tenant": queue.tenant,
            "queue_id": queue.id,
            "rate": rate,
            "reason": reason,
            "slice": None if where is None else msgspec.json.encode(where).decode(),
            "created_at": now,
            "created_by": who,
            "ended_at": now if where is None else None,
            "position": None,
            "position_id": None,
        }
        await connection.execute(review_boosts.insert(), made)
        return _boost(made)


def check_class(rules: Rules, class_name: str) -> None:
    """Raise InvalidRequest if a queue's reviewers could not choose this class."""
    if rules.classes and class_name not in rules.classes:
        raise InvalidRequest(
            f"`class`: {class_name!r} is none of this queue's: {', '.join(map(repr, rules.classes))}.", param="class"
        )


async def _find(connection: AsyncConnection, tenant: str, name: str, *, lock: bool = False) -> Row[Any] | None:
    q = review_queues.c
    query = select(review_queues).where(q.tenant == tenant, q.name == name)
    return (await connection.execute(query.with_for_update() if lock else query)).one_or_none()


async def _found_boost(connection: AsyncConnection, queue: Queue, boost_id: str) -> Boost:
    b = review_boosts.c
    query = select(review_boosts).where(b.queue_id == queue.id, b.id == boost_id)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"The queue {queue.name!r} has no boost {boost_id!r}.")
    return _boost(row)


def _written(rules: Rules) -> str:
    return msgspec.json.encode(rules).decode()


_rules = msgspec.json.Decoder(Rules).decode
_where = msgspec.json.Decoder(Where).decode


def _queue(row: Row[Any] | dict[str, Any]) -> Queue:
    facts = row if isinstance(row, dict) else row._asdict()
    return Queue(**{**facts, "rules": _rules(facts["rules"])})


def _boost(row: Row[Any] | dict[str, Any]) -> Boost:
    facts = dict(row if isinstance(row, dict) else row._asdict())
    written = facts.pop("slice")
    del facts["tenant"]
    return Boost(**facts, where=_where(written) if written else None)
