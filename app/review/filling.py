"""Fills the queues of all tenants, beside the requests, on as many replicas as there are.

The main rule: a step reads what has settled behind a queue's position, decides, and then writes the new position with
what was taken, in one transaction that does nothing if another replica was quicker. So nothing is left out or taken
twice, and a step that is done again changes nothing. What fails in one queue holds up no other.
"""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import Any, Self

import msgspec
from sqlalchemy import Table, and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, feedback, predictions, review_boosts, review_items, review_queues, reviews
from app.errors import Unavailable
from app.feedback import LabelLog
from app.predictions import History, Settled, conditions
from app.review.queues import CANDIDATE, Boost, Queue, Queues, population
from app.review.rules import Candidate, Negative, Offer, Policy, chosen, rates

log = logging.getLogger(__name__)

ITEMS_AT_ONCE = 100

_QUEUES = select(func.count()).select_from(review_queues)
_p = predictions.c


class _Source(msgspec.Struct, frozen=True):
    """Predictions that a queue considers, and how far it has."""

    queue: Queue
    boost: Boost | None

    @property
    def table(self) -> Table:
        return review_queues if self.boost is None else review_boosts

    @property
    def id(self) -> str:
        return (self.boost or self.queue).id

    @property
    def position(self) -> Settled | None:
        at = self.boost or self.queue
        return None if at.position is None or at.position_id is None else Settled(at.position, at.position_id)

    @property
    def meant(self) -> list[Any]:
        meant = population(self.queue.tenant, self.queue.rules.where)
        if self.boost is not None and self.boost.where is not None:
            meant += conditions(self.queue.tenant, self.boost.where)
        return meant

    def said(self, candidate: Candidate, *, is_negative: bool) -> Sequence[tuple[float, Policy]]:
        if self.boost is not None:
            return [(self.boost.rate, "drift")]
        return list(rates(self.queue.rules, candidate, is_negative=is_negative))


class Filler:
    """Fills queues in the background; use it in an `async with` block.

    Args:
        database: shared by all replicas.
        history: the predictions there.
        labels: where what was reviewed is stated.
        batch_rows: predictions looked at in one step.
        poll_seconds: how often new ones are looked for.
    """

    def __init__(
        self,
        database: Database,
        queues: Queues,
        history: History,
        labels: LabelLog,
        *,
        batch_rows: int = 200,
        poll_seconds: float = 2.0,
    ) -> None:
        self._database = database
        self._queues = queues
        self._history = history
        self._labels = labels
        self._batch_rows = batch_rows
        self._poll_seconds = poll_seconds
        self._failed: set[str] = set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="review-filler")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        failing = False
        while True:
            pause = self._poll_seconds
            try:
                if await self.step():
                    pause = 0.05  # A long history is read in the background, and leaves others their turns.
            except Unavailable as error:
                if not failing:
                    log.warning("The review queues are not filled for now: %s", error)
                failing = True
            except Exception as error:  # noqa: BLE001 - what a driver says may quote content.
                if not failing:
                    log.error("The review queues are not filled: %s", type(error).__name__)  # noqa: TRY400
                failing = True
            else:
                failing = False
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._queues.changed.wait()
            self._queues.changed.clear()

    async def step(self) -> bool:
        """Take every queue a batch further; tells whether there was anything to do.

        Raises:
            Unavailable: the database does not answer.
        """
        if not await self._database.number(_QUEUES):
            return False
        async with self._database.reading() as connection:
            queues = {queue.id: queue for queue in await self._queues.fillable(connection)}
            boosts = await self._queues.boosts_of(connection, list(queues))
        did = await self._restate()
        if queues:
            sources = [_Source(queue, None) for queue in queues.values()]
            sources += [_Source(queues[each.queue_id], each) for each in boosts if each.ended_at is None]
            settled = await self._history.settled()
            for source in sources:
                if settled is not None:
                    did |= await self._alone(f"the predictions for {source.id}", self._scan(source, settled))
            for queue in queues.values():
                did |= await self._alone(f"the feedback for {queue.id}", self._hear(queue))
        return did

    async def _alone(self, what: str, work: Awaitable[bool]) -> bool:
        """Do the work of one queue: if that fails it is logged, once until it works again, and the others go on.

        Raises:
            Unavailable: the database does not answer.
        """
        try:
            did = await work
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 - what a driver says may quote content.
            if what not in self._failed:
                log.error("The review queues go on without %s: %s", what, type(error).__name__)  # noqa: TRY400
            self._failed.add(what)
            return False
        self._failed.discard(what)
        return did

    # --- predictions ---

    async def _scan(self, source: _Source, settled: Settled) -> bool:
        if source.position == settled:
            return False
        async with self._database.reading() as connection:
            after = await self._start(connection, source, settled)
            query = select(_p.row, *CANDIDATE).where(*source.meant, _p.row > after, _p.row <= settled.row)
            rows = (await connection.execute(query.order_by(_p.row).limit(self._batch_rows))).all()
            negative = await _negative(connection, source.queue, [row.id for row in rows])
        end = Settled(rows[-1].row, rows[-1].id) if len(rows) == self._batch_rows else settled

        def decide() -> list[Offer]:
            found = [Candidate(**{name: getattr(row, name) for name in Candidate.__struct_fields__}) for row in rows]
            return chosen(
                source.queue.id, [(each, source.said(each, is_negative=each.id in negative)) for each in found]
            )

        offers = await asyncio.to_thread(decide)  # The citations of many answers take milliseconds to read.
        return await self._advance(source, {"position": end.row, "position_id": end.id}, offers)

    async def _start(self, connection: AsyncConnection, source: _Source, settled: Settled) -> int:
        """The row after which a source goes on."""
        at = source.position
        if at is not None and self._database.kind == "sqlite":
            there = (await connection.execute(select(_p.id).where(_p.row == at.row))).scalar_one_or_none()
            # If it was erased, SQLite may have given its number to another: looking at all of them again is harmless.
            at = at if there == at.id else None
        if at is not None:
            return at.row
        first = (await connection.execute(select(func.min(_p.row)).where(*source.meant))).scalar_one()
        return settled.row if first is None else min(first - 1, settled.row)

    async def _advance(self, source: _Source, to: dict[str, Any], offers: Sequence[Offer]) -> bool:
        """Write what was taken and how far that goes, unless another replica did or the rules are others now."""
        async with self._database.writing() as connection:
            queue = await self._queues.of_id(connection, source.queue.id, lock=True)
            if queue.revision != source.queue.revision:
                return True
            at = source.table.c
            before = source.boost or source.queue
            same = [at[name].is_not_distinct_from(getattr(before, name)) for name in to]
            moved = await connection.execute(source.table.update().where(at.id == source.id, *same).values(**to))
            if moved.rowcount:
                await self._queues.take(connection, queue, offers)
        return True

    # --- feedback ---

    async def _hear(self, queue: Queue) -> bool:
        """Consider again what was rated badly since the last time: it may have been passed over."""
        after, wanted = queue.feedback_position, queue.rules.negative_feedback
        async with self._database.reading() as connection:
            last = (await connection.execute(select(func.max(feedback.c.row)))).scalar_one() or 0
            if last == after:
                return False
            end, offers = last, []
            if wanted is not None and last > after:
                heard = await self._heard(connection, queue, wanted, after)
                end = heard[-1][0] if len(heard) == self._batch_rows else last
                # Asked for after the feedback was read: one that comes only now asks for its feedback itself.
                meant = (*population(queue.tenant, queue.rules.where), _p.id.in_({id_ for _, id_ in heard}))
                found = [
                    Candidate(**row._asdict()) for row in await connection.execute(select(*CANDIDATE).where(*meant))
                ]
                said: list[tuple[float, Policy]] = [(wanted.rate, "negative_feedback")]
                offers = chosen(queue.id, [(each, said) for each in found])
        return await self._advance(_Source(queue, None), {"feedback_position": end}, offers)

    async def _heard(
        self, connection: AsyncConnection, queue: Queue, wanted: Negative, after: int
    ) -> list[tuple[int, str]]:
        """What was rated badly since a row of the feedback: its rows and what they are about."""
        f = feedback.c
        query = select(f.row, f.prediction_id).where(f.row > after, f.tenant == queue.tenant, _is_negative(wanted))
        query = query.where(f.prediction_id.is_not(None)).order_by(f.row).limit(self._batch_rows)
        return [(row.row, row.prediction_id) for row in await connection.execute(query)]

    # --- labels ---

    async def _restate(self) -> bool:
        """Correct the labels of items whose probability has risen since they were reviewed."""
        i = review_items.c
        risen = select(i.id, i.queue_id).where(i.risen).limit(ITEMS_AT_ONCE)
        async with self._database.reading() as connection:
            rows = (await connection.execute(risen)).all()
        for row in rows:
            what = f"the probabilities of the labels of {row.id}"
            if not await self._alone(what, self._restate_item(row.queue_id, row.id)):
                # It would come first in every step: its labels keep the probability that they were stated with.
                self._failed.discard(what)
                async with self._database.writing() as connection:
                    await connection.execute(review_items.update().where(i.id == row.id).values(risen=False))
        return bool(rows)

    async def _restate_item(self, queue_id: str, item_id: str) -> bool:
        i, r = review_items.c, reviews.c
        async with self._database.writing() as connection:
            queue = await self._queues.of_id(connection, queue_id, lock=True)
            item = (await connection.execute(select(review_items).where(i.id == item_id))).one_or_none()
            if item is None:  # It has been erased.
                return True
            is_old = func.coalesce(r.probability, 0.0) < item.probability
            told = select(r.id, r.label_id).where(r.item_id == item.id, r.state == "done", is_old)
            for review in (await connection.execute(told)).all():
                await connection.execute(reviews.update().where(r.id == review.id).values(probability=item.probability))
                policy = f"{queue.name}/{item.policy}"
                await self._labels.resample_in(
                    connection, queue.tenant, review.label_id, policy=policy, sampling_probability=item.probability
                )
            await connection.execute(review_items.update().where(i.id == item.id).values(risen=False))
        return True


def _is_negative(wanted: Negative) -> Any:
    """Say in SQL that a revision of feedback holds against an answer."""
    f = feedback.c
    against = and_(f.rating_type == "boolean", f.rating == 0)
    if wanted.below is not None:
        against = or_(against, and_(f.rating_type == "number", f.rating < wanted.below))
    return and_(f.withdrawn.is_(False), against)


async def _negative(connection: AsyncConnection, queue: Queue, ids: Sequence[str]) -> set[str]:
    """Which of these predictions anybody has ever rated badly: what was taken back later makes no difference."""
    wanted, f = queue.rules.negative_feedback, feedback.c
    if wanted is None or not ids:
        return set()
    query = select(f.prediction_id).where(f.tenant == queue.tenant, f.prediction_id.in_(ids), _is_negative(wanted))
    return set((await connection.execute(query)).scalars())
