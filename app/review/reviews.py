"""What reviewers do: they lease items, and complete, skip or give back each one.

The main rule: an item has as many leases and reviews at a time as it wants, and a reviewer gets it once. A lease that
has expired holds nothing, yet what comes late is taken if nobody else has the place.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import Row, and_, case, exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, predictions, review_items, reviews
from app.errors import Conflict, Forbidden, InvalidRequest, NotFound
from app.feedback import LabelLog, Speaker, Stated
from app.predictions import History, Prediction, uuid7
from app.review.queues import Clock, Queue, Queues, check_class
from app.review.rules import draw

MAX_LEASED = 20
"""Items that a reviewer holds of one queue at a time."""

MAX_SKIPS = 3
"""Reviewers who skip an item before it is set aside."""

State = Literal["leased", "expired", "returned", "skipped", "done"]
SkipReason = Literal["unclear", "cannot_know", "not_for_me", "other"]

_i, _r, _p = review_items.c, reviews.c, predictions.c

_IS_KEPT = exists().where(_p.tenant == _i.tenant, _p.id == _i.prediction_id, _p.store)
"""The condition that there is something to show of an item: neither its prediction nor the content of it is gone."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a reviewer finds: at least one of class, right answer and relevant passages."""

    class_name: str | None = None
    answer: str | None = None
    passages: Sequence[str] | None = None
    comment: str | None = None


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """A reviewer's turn at an item; times are milliseconds since 1970."""

    id: str
    queue_id: str
    item_id: str
    reviewer: str
    state: State
    leased_at: int
    expires_at: int
    finished_at: int | None
    reason: str | None
    class_name: str | None
    label_id: str | None


class Leased(msgspec.Struct, frozen=True, kw_only=True):
    """An item in a reviewer's hands."""

    review: Review
    queue: Queue
    prediction: Prediction


class Reviews:
    """The reviews of all tenants.

    Args:
        database: shared by all replicas.
        queues: what is reviewed.
        history: the predictions that are shown.
        labels: where what is found is stated.
        clock: the time in milliseconds since 1970.
    """

    def __init__(self, database: Database, queues: Queues, history: History, labels: LabelLog, clock: Clock) -> None:
        self._database = database
        self._queues = queues
        self._history = history
        self._labels = labels
        self._clock = clock

    async def lease(self, speaker: Speaker, queue_name: str, *, count: int = 1) -> list[Leased]:
        """Give a reviewer items of a queue, oldest first: those they hold already, and others up to `count` in all.

        Raises:
            NotFound: there is no such queue.
        """
        now, count = self._clock(), min(count, MAX_LEASED)
        async with self._database.writing() as connection:
            queue = await self._queues.read(connection, speaker.tenant, queue_name, lock=True)
            mine = (_r.queue_id == queue.id, _r.reviewer == speaker.author)
            await connection.execute(
                update(reviews).where(*mine, _r.state == "leased", _r.expires_at <= now).values(state="expired")
            )
            # A lease is left over where its prediction was erased while it was given.
            held = select(reviews).join(review_items, _i.id == _r.item_id).where(*mine, _r.state == "leased", _IS_KEPT)
            held = held.order_by(_r.id).limit(count)
            found = [review_of(row) for row in await connection.execute(held)]
            had = (await connection.execute(select(func.count()).where(*mine))).scalar_one()
            for turn in range(had, had + count - len(found)):
                item_id = await self._next(connection, queue, speaker.author, turn, now)
                if item_id is None:
                    break
                found.append(await self._give(connection, queue, speaker, item_id, now))
            shown = select(_i.id, _i.prediction_id).where(_i.id.in_({review.item_id for review in found}))
            about = {row.id: row.prediction_id for row in await connection.execute(shown)}
        leased = []
        for review in found:
            prediction = await self._history.get(queue.tenant, about[review.item_id])
            if prediction is not None and prediction.store:  # It may have been erased at this moment.
                leased.append(Leased(review=review, queue=queue, prediction=prediction))
        return leased

    async def _next(self, connection: AsyncConnection, queue: Queue, reviewer: str, turn: int, now: int) -> str | None:
        """The item that comes next for a reviewer; now and then one whose class is known."""
        other = reviews.alias()
        is_held = and_(other.c.state == "leased", other.c.expires_at > now)
        of_item = select(func.count()).where(other.c.item_id == _i.id, is_held).scalar_subquery()
        seen = exists().where(
            other.c.item_id == _i.id,
            other.c.reviewer == reviewer,
            or_(other.c.state.in_(("done", "skipped")), is_held),
        )
        base = select(_i.id).where(_i.queue_id == queue.id, ~seen, _IS_KEPT).order_by(_i.id).limit(1)
        regular = base.where(_i.state == "waiting", _i.done + of_item < _i.wanted)
        if draw(queue.id, f"{reviewer} {turn}", "gold") < queue.rules.gold_share:
            gold = (await connection.execute(base.where(_i.gold_class.is_not(None)))).scalar_one_or_none()
            if gold is not None:
                return str(gold)
        found: str | None = (await connection.execute(regular)).scalar_one_or_none()
        return found

    async def _give(
        self, connection: AsyncConnection, queue: Queue, speaker: Speaker, item_id: str, now: int
    ) -> Review:
        row = {
            "id": uuid7(),
            "tenant": queue.tenant,
            "queue_id": queue.id,
            "item_id": item_id,
            "reviewer": speaker.author,
            "key_id": speaker.key_id,
            "state": "leased",
            "leased_at": now,
            "expires_at": now + queue.rules.lease_seconds * 1000,
            "finished_at": None,
            "reason": None,
            "class": None,
            "label_id": None,
        }
        await connection.execute(reviews.insert(), row)
        return review_of(row)

    async def complete(self, speaker: Speaker, review_id: str, finding: Finding) -> Review:
        """State what was found, as the reviewer's label; a review that is done may be completed anew.

        Raises:
            NotFound: the tenant has no such review.
            Forbidden: it is another reviewer's.
            InvalidRequest: nothing is stated, or a class that the queue does not have.
            Conflict: the lease expired, and others have the item now; or it was skipped.
        """
        now = self._clock()
        async with self._database.writing() as connection:
            queue, row, item = await self._taken(connection, speaker, review_id)
            if row.state != "done":
                await self._hold(connection, row, item, now)
            stated = statement(queue, item, finding)
            author = Speaker(tenant=queue.tenant, key_id=speaker.key_id, user=row.reviewer)
            (written,) = await self._labels.state_in(connection, [(author, stated)])
            done = {
                "state": "done",
                "finished_at": now,
                "key_id": speaker.key_id,
                "class": finding.class_name,
                "label_id": written.row["id"],
                "probability": item.probability,
            }
            return await self._change(connection, row, done)

    async def skip(self, speaker: Speaker, review_id: str, reason: SkipReason) -> Review:
        """Leave an item to others; it does not come back to this reviewer. Raises as `complete` does."""
        now = self._clock()
        async with self._database.writing() as connection:
            _, row, _ = await self._taken(connection, speaker, review_id)
            if row.state == "done":
                raise Conflict("This review is done: complete it anew, or withdraw its label.")
            if row.state == "returned":
                raise Conflict("This item was given back: lease it anew to skip it.")
            return await self._change(connection, row, {"state": "skipped", "finished_at": now, "reason": reason})

    async def give_back(self, speaker: Speaker, review_id: str) -> Review:
        """End a lease, so that the item can be had at once, also by the same reviewer. Raises as `complete` does."""
        return await self._extend(speaker, review_id, "returned")

    async def renew(self, speaker: Speaker, review_id: str) -> Review:
        """Begin the time of a lease anew. Raises as `complete` does."""
        return await self._extend(speaker, review_id, "leased")

    async def _extend(self, speaker: Speaker, review_id: str, state: State) -> Review:
        now = self._clock()
        async with self._database.writing() as connection:
            queue, row, item = await self._taken(connection, speaker, review_id)
            if row.state in ("done", "skipped"):
                raise Conflict(f"This review is {row.state} already.")
            if state == "returned":
                return await self._change(connection, row, {"state": state, "finished_at": now})
            await self._hold(connection, row, item, now)
            return await self._change(
                connection, row, {"state": state, "expires_at": now + queue.rules.lease_seconds * 1000}
            )

    async def get(self, tenant: str, review_id: str) -> Review:
        """One review of the tenant; raises NotFound."""
        async with self._database.reading() as connection:
            return review_of(await _find(connection, tenant, review_id))

    async def _taken(
        self, connection: AsyncConnection, speaker: Speaker, review_id: str
    ) -> tuple[Queue, Row[Any], Row[Any]]:
        """A review that the speaker may change, with its queue, which is locked, and its item."""
        row = await _find(connection, speaker.tenant, review_id)
        queue = await self._queues.of_id(connection, row.queue_id, lock=True)
        row = await _find(connection, speaker.tenant, review_id)
        if speaker.author != row.reviewer and not speaker.is_admin:
            raise Forbidden(
                "This is another reviewer's. Name in `reviewer` the one you speak for, or use a key with the scope "
                "'admin'.",
                param="reviewer",
            )
        item = (await connection.execute(select(review_items).where(_i.id == row.item_id))).one_or_none()
        if item is None:
            raise NotFound("What this review was about has been erased: lease another item.")
        return queue, row, item

    async def _hold(self, connection: AsyncConnection, row: Row[Any], item: Row[Any], now: int) -> None:
        """Make sure that a review has its place, also where its lease is over; raises Conflict if it has not."""
        if row.state == "skipped":
            raise Conflict("This item was skipped: lease another.")
        if row.state == "leased" and row.expires_at > now:
            return
        others = (_r.item_id == row.item_id, _r.id != row.id)
        in_use = or_(_r.state == "done", and_(_r.state == "leased", _r.expires_at > now))
        taken = (await connection.execute(select(func.count()).where(*others, in_use))).scalar_one()
        again = select(func.count()).where(*others, in_use, _r.reviewer == row.reviewer)
        is_full = item.state != "gold" and taken >= item.wanted
        if is_full or (await connection.execute(again)).scalar_one():
            raise Conflict("The lease expired, and the item is in other hands or done: lease another.")

    async def _change(self, connection: AsyncConnection, row: Row[Any], changes: Mapping[str, Any]) -> Review:
        await connection.execute(update(reviews).where(_r.id == row.id).values(**changes))
        await recount(connection, [row.item_id])
        return review_of({**row._asdict(), **changes})


def statement(queue: Queue, item: Row[Any], finding: Finding) -> Stated:
    """The label that a finding makes; raises InvalidRequest where the queue asks for another."""
    if finding.class_name is not None:
        check_class(queue.rules, finding.class_name)
    elif queue.rules.classes:
        raise InvalidRequest(f"`class`: choose one of {', '.join(map(repr, queue.rules.classes))}.", param="class")
    return Stated(
        prediction_id=item.prediction_id,
        source="review_queue",
        class_name=finding.class_name,
        answer=finding.answer,
        passages=finding.passages,
        comment=finding.comment,
        policy=f"{queue.name}/{item.policy}",
        sampling_probability=item.probability,
    )


async def recount(connection: AsyncConnection, item_ids: Collection[str]) -> None:
    """Bring items to what their reviews say; a reviewer counts once, however often they leased an item."""

    def count(state: State) -> Any:
        return (
            select(func.count(_r.reviewer.distinct())).where(_r.item_id == _i.id, _r.state == state).scalar_subquery()
        )

    mine = _i.id.in_(item_ids)
    counted = update(review_items).where(mine).values(done=count("done"), skipped=count("skipped"))
    await connection.execute(counted)
    state = case((_i.done >= _i.wanted, "done"), (_i.skipped >= MAX_SKIPS, "set_aside"), else_="waiting")
    await connection.execute(update(review_items).where(mine, _i.state != "gold").values(state=state))


def review_of(row: Row[Any] | Mapping[str, Any]) -> Review:
    """Read a review."""
    facts = row if isinstance(row, Mapping) else row._asdict()
    same = {name: facts[name] for name in Review.__struct_fields__ if name in facts}
    return Review(**same, class_name=facts["class"])


async def _find(connection: AsyncConnection, tenant: str, review_id: str) -> Row[Any]:
    query = select(reviews).where(_r.tenant == tenant, _r.id == review_id)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"There is no review {review_id!r}.")
    return row
