"""What a queue has come to: its items, who reviewed how many, how far they agree, and what it says of all answers."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import Row, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, review_items, reviews
from app.errors import NotFound
from app.review.agreement import Agreement, PairAgreement, krippendorff_alpha, pairwise
from app.review.estimates import Estimate, hajek
from app.review.queues import Clock, Queue, Queues
from app.review.reviews import Review, review_of
from app.review.rules import Policy
from observability.estimates import wilson

MAX_ITEMS = 50_000
"""Items that figures are made of at most: the newest."""

ItemState = Literal["waiting", "done", "set_aside", "gold"]

_i, _r = review_items.c, reviews.c


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction in a queue."""

    id: str
    queue_id: str
    prediction_id: str
    release_name: str | None
    policy: Policy
    probability: float | None
    """How likely chance was to take it; None where it was put there on purpose, and stands for nothing else."""
    state: ItemState
    wanted: int
    done: int
    skipped: int
    gold_class: str | None
    created_at: int


class ItemCount(msgspec.Struct, frozen=True, kw_only=True):
    """Items of one policy and state."""

    policy: Policy
    state: ItemState
    items: int


class Reviewer(msgspec.Struct, frozen=True, kw_only=True):
    """What one reviewer did in a queue."""

    reviewer: str
    done: int
    skipped: int
    leased: int
    """Leases that have not expired."""
    mean_seconds: float | None
    """From lease to completion; of a review that was imported no lease is known."""
    gold: int
    """Items done whose right class is known."""
    gold_right: int
    gold_share: float | None
    gold_low: float | None
    gold_high: float | None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a queue is."""

    queue: Queue
    items: list[ItemCount]
    reviewers: list[Reviewer]


class QueueAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """How far the reviewers of a queue agree."""

    alpha: Agreement
    pairs: list[PairAgreement]


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """How often a class is right, over all that a queue considers or what one release answered of it."""

    class_name: str
    release: str | None
    estimate: Estimate


class Findings:
    """Answers what the queues of a tenant have come to."""

    def __init__(self, database: Database, queues: Queues, clock: Clock) -> None:
        self._database = database
        self._queues = queues
        self._clock = clock

    async def items(
        self,
        tenant: str,
        name: str,
        *,
        state: ItemState | None = None,
        policy: Policy | None = None,
        prediction_id: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[Item]:
        """List the items of a queue, the newest first, from the id `before` on backwards; raises NotFound."""
        async with self._database.reading() as connection:
            queue = await self._queues.read(connection, tenant, name)
            query = select(review_items).where(_i.queue_id == queue.id).order_by(_i.id.desc()).limit(limit)
            for column, value in ((_i.state, state), (_i.policy, policy), (_i.prediction_id, prediction_id)):
                if value is not None:
                    query = query.where(column == value)
            if before is not None:
                query = query.where(_i.id < before)
            return [item_of(row) for row in await connection.execute(query)]

    async def item(self, tenant: str, item_id: str) -> tuple[Item, list[Review]]:
        """One item of the tenant with its reviews, the oldest first; raises NotFound."""
        async with self._database.reading() as connection:
            mine = select(review_items).where(_i.tenant == tenant, _i.id == item_id)
            row = (await connection.execute(mine)).one_or_none()
            if row is None:
                raise NotFound(f"There is no review item {item_id!r}.")
            of_item = select(reviews).where(_r.item_id == item_id).order_by(_r.id)
            return item_of(row), [review_of(each) for each in await connection.execute(of_item)]

    async def progress(self, tenant: str, name: str) -> Progress:
        """Count the items of a queue and what each reviewer did; raises NotFound."""
        now = self._clock()
        async with self._database.reading() as connection:
            queue = await self._queues.read(connection, tenant, name)
            counted = select(_i.policy, _i.state, func.count().label("items")).where(_i.queue_id == queue.id)
            items = await connection.execute(counted.group_by(_i.policy, _i.state).order_by(_i.policy, _i.state))
            counts = [ItemCount(**row._asdict()) for row in items]
            people = await connection.execute(_by_reviewer(queue, now))
            reviewers = [_reviewer(row) for row in people]
        return Progress(queue=queue, items=counts, reviewers=reviewers)

    async def agreement(self, tenant: str, name: str) -> QueueAgreement:
        """Compare the classes that reviewers gave to the same items; raises NotFound."""
        async with self._database.reading() as connection:
            queue = await self._queues.read(connection, tenant, name)
            given: dict[str, dict[str, str]] = {}
            for row in await _classed(connection, queue):
                given.setdefault(row.id, {})[row.reviewer] = row[-1]
        shared = [each for each in given.values() if len(each) > 1]

        def compare() -> QueueAgreement:
            return QueueAgreement(
                alpha=krippendorff_alpha([list(each.values()) for each in shared]), pairs=pairwise(shared)
            )

        return await asyncio.to_thread(compare)

    async def shares(self, tenant: str, name: str) -> list[Share]:
        """Estimate how often each class is right, over all that the queue considers and by release; raises NotFound.

        An item on which reviewers differ counts for each class in part. What waits, was skipped or set aside does not
        count, as if chance had decided that too.
        """
        async with self._database.reading() as connection:
            queue = await self._queues.read(connection, tenant, name)
            rows = [row for row in await _classed(connection, queue) if row.probability is not None]
        return await asyncio.to_thread(_shares, queue.rules.classes, rows)


async def _classed(connection: AsyncConnection, queue: Queue) -> list[Any]:
    """What reviewers chose for the newest items."""
    query = select(_i.id, _i.probability, _i.release_name, _r.reviewer, _r["class"])
    query = query.where(_i.queue_id == queue.id, _r.item_id == _i.id, _r.state == "done", _r["class"].is_not(None))
    return list(await connection.execute(query.order_by(_i.id.desc()).limit(MAX_ITEMS)))


def _shares(classes: Iterable[str], rows: Sequence[Any]) -> list[Share]:
    facts: dict[str, tuple[float, str | None]] = {}
    votes: dict[str, list[str]] = {}
    for row in rows:
        facts[row.id] = (row.probability, row.release_name)
        votes.setdefault(row.id, []).append(row[-1])
    names = dict.fromkeys([*classes, *sorted({name for each in votes.values() for name in each})])
    releases = sorted({release for _, release in facts.values() if release is not None})
    shares = []
    for release in (None, *releases):
        meant = [id_ for id_, (_, made_by) in facts.items() if release in (None, made_by)]
        probabilities = [facts[id_][0] for id_ in meant]
        for name in names:
            found = hajek([votes[id_].count(name) / len(votes[id_]) for id_ in meant], probabilities)
            if found is not None:
                shares.append(Share(class_name=name, release=release, estimate=found))
    return shares


def _by_reviewer(queue: Queue, now: int) -> Any:
    is_done, is_gold = _r.state == "done", _i.gold_class.is_not(None)
    # What is imported was leased for no time, or was done elsewhere before its reviewer leased it here.
    is_timed = is_done & (_r.expires_at > _r.leased_at) & (_r.finished_at >= _r.leased_at)

    def count(condition: Any) -> Any:
        return func.count().filter(condition)

    return (
        select(
            _r.reviewer,
            count(is_done).label("done"),
            count(_r.state == "skipped").label("skipped"),
            count((_r.state == "leased") & (_r.expires_at > now)).label("leased"),
            func.avg(_r.finished_at - _r.leased_at).filter(is_timed).label("milliseconds"),
            count(is_done & is_gold).label("gold"),
            count(is_done & (_i.gold_class == _r["class"])).label("gold_right"),
        )
        .where(_r.queue_id == queue.id, _r.item_id == _i.id)
        .group_by(_r.reviewer)
        .order_by(_r.reviewer)
    )


def _reviewer(row: Row[Any]) -> Reviewer:
    facts = row._asdict()
    milliseconds = facts.pop("milliseconds")
    share = row.gold_right / row.gold if row.gold else None
    low, high = wilson(share, row.gold) if share is not None else (None, None)
    return Reviewer(
        **facts,
        mean_seconds=None if milliseconds is None else float(milliseconds) / 1000,
        gold_share=share,
        gold_low=low,
        gold_high=high,
    )


def item_of(row: Row[Any]) -> Item:
    """Read an item."""
    return Item(**{name: getattr(row, name) for name in Item.__struct_fields__})
