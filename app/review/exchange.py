"""Takes items to Label Studio and brings what was said there back.

The main rule: what comes in is written whole or not at all, and the same again changes nothing. An annotation is known
by its item and its author; the later word of the two counts, whether it was said there or here. One that was cancelled
after it was taken in withdraws its label.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Row, bindparam, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, review_items, reviews
from app.errors import InvalidRequest
from app.feedback import LabelLog, Speaker, Stated
from app.feedback.calls import KEY_PREFIX
from app.predictions import History, uuid7
from app.review.findings import Findings, Item, ItemState
from app.review.labelstudio import MAX_TOLD, Annotation, read_tasks, task_of
from app.review.queues import Clock, Queue, Queues
from app.review.reviews import Review, recount, review_of, statement

PAGE_ITEMS = 100
AHEAD_MILLISECONDS = 300_000
"""How far ahead of ours another clock may be."""

_i, _r = review_items.c, reviews.c


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What an import did, in annotations."""

    done: int
    """Reviews that are new or were changed."""
    skipped: int
    """Skips that are new."""
    unchanged: int
    """Known already, or older than what is known."""


class Exchange:
    """Label Studio's JSON, out and in."""

    def __init__(
        self,
        database: Database,
        queues: Queues,
        findings: Findings,
        history: History,
        labels: LabelLog,
        clock: Clock,
    ) -> None:
        self._database = database
        self._queues = queues
        self._findings = findings
        self._history = history
        self._labels = labels
        self._clock = clock

    async def tasks(
        self, tenant: str, name: str, *, state: ItemState | None = None, annotations: bool = True
    ) -> AsyncIterator[list[Any]]:
        """Give a queue's items as tasks, page by page, the newest first; none that is only gold, or erased.

        Raises:
            NotFound: there is no such queue.
        """
        queue = await self._queues.get(tenant, name)
        before: str | None = None
        while True:
            page = await self._findings.items(tenant, name, state=state, limit=PAGE_ITEMS, before=before)
            shown = [item for item in page if item.state != "gold"]
            said = await self._said(tenant, shown) if annotations else {}
            tasks = []
            for item in shown:
                prediction = await self._history.get(tenant, item.prediction_id)
                if prediction is not None and prediction.store:  # Else there is nothing to show of it any more.
                    tasks.append(task_of(item, prediction, said.get(item.id, ()), queue.rules.classes))
            yield tasks
            if len(page) < PAGE_ITEMS:
                return
            before = page[-1].id

    async def _said(self, tenant: str, items: Sequence[Item]) -> dict[str, list[tuple[Review, Any]]]:
        """What reviewers said of each item, with their labels."""
        finished = _r.state.in_(("done", "skipped"))
        query = select(reviews).where(_r.item_id.in_([item.id for item in items]), finished).order_by(_r.id)
        async with self._database.reading() as connection:
            found = [review_of(row) for row in await connection.execute(query)]
        labels = await self._labels.some(tenant, [review.label_id for review in found if review.label_id])
        said: dict[str, list[tuple[Review, Any]]] = {}
        for review in found:
            said.setdefault(review.item_id, []).append((review, labels.get(review.label_id or "")))
        return said

    async def bring(self, tenant: str, name: str, body: Any, *, key_id: str) -> Imported:
        """Take in the annotations of exported tasks.

        Raises:
            NotFound: there is no such queue.
            InvalidRequest: entries that cannot be taken; the message names each, and none was written.
        """
        now = self._clock()
        annotations, problems = await asyncio.to_thread(read_tasks, body, now=now + AHEAD_MILLISECONDS)
        async with self._database.writing() as connection:
            queue = await self._queues.read(connection, tenant, name, lock=True)
            items = await _known_items(connection, queue, {each.item_id for each in annotations})
            before = await _known_reviews(connection, items)
            later = _latest(annotations)
            fresh = [each for each in later if each.at > _finished_at(before.get((each.item_id, each.reviewer)))]
            stated: list[tuple[Annotation, Stated | None]] = []
            for each in fresh:
                try:
                    there = before.get((each.item_id, each.reviewer))
                    stated.append((each, _statement(queue, items, each, there)))
                except InvalidRequest as error:
                    problems.append(f"{each.entry}: {error.message}")
            if problems:
                raise _refused(problems)
            await self._write(connection, queue, items, before, stated, key_id)
        skipped = sum(said.finding is None for said, _ in stated)
        return Imported(done=len(stated) - skipped, skipped=skipped, unchanged=len(annotations) - len(stated))

    async def _write(
        self,
        connection: AsyncConnection,
        queue: Queue,
        items: Mapping[str, Row[Any]],
        before: Mapping[tuple[str, str], Row[Any]],
        stated: Sequence[tuple[Annotation, Stated | None]],
        key_id: str,
    ) -> None:
        calls = [
            (Speaker(tenant=queue.tenant, key_id=key_id, user=said.reviewer), each) for said, each in stated if each
        ]
        written = iter(await self._labels.state_in(connection, calls) if calls else ())
        rows: list[dict[str, Any]] = []
        known: list[dict[str, Any]] = []
        for said, each in stated:
            label_id = next(written).row["id"] if each else None
            row = _row(queue, items[said.item_id], said, key_id, label_id if said.finding else None)
            there = before.get((said.item_id, said.reviewer))
            if there is None:
                rows.append(row)
            else:
                known.append({**row, "known": there.id})
        if rows:
            await connection.execute(reviews.insert(), rows)
        if known:
            columns = ("state", "finished_at", "class", "label_id", "probability", "key_id")
            values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in columns}
            changes = [{"known": row["known"], **{f"new_{name}": row[name] for name in columns}} for row in known]
            await connection.execute(update(reviews).where(_r.id == bindparam("known")).values(values), changes)
        if stated:
            await recount(connection, {said.item_id for said, _ in stated})


async def _known_items(connection: AsyncConnection, queue: Queue, ids: set[str]) -> dict[str, Row[Any]]:
    query = select(review_items).where(_i.queue_id == queue.id, _i.id.in_(ids))
    return {row.id: row for row in await connection.execute(query)}


async def _known_reviews(connection: AsyncConnection, items: Mapping[str, Row[Any]]) -> dict[tuple[str, str], Row[Any]]:
    """What each reviewer has of each item: a review that is done or skipped, else a lease."""
    query = select(reviews).where(_r.item_id.in_(items)).order_by(_r.finished_at.is_not(None), _r.id)
    return {(row.item_id, row.reviewer): row for row in await connection.execute(query)}


def _latest(annotations: Sequence[Annotation]) -> list[Annotation]:
    """The last that each author said of each item."""
    found: dict[tuple[str, str], Annotation] = {}
    for each in sorted(annotations, key=lambda each: each.at):
        found[each.item_id, each.reviewer] = each
    return list(found.values())


def _finished_at(row: Row[Any] | None) -> int:
    return row.finished_at if row is not None and row.state in ("done", "skipped") else -1


def _statement(queue: Queue, items: Mapping[str, Row[Any]], said: Annotation, there: Row[Any] | None) -> Stated | None:
    """What an annotation states: its label, or for a skip that it withdraws the one there; raises InvalidRequest."""
    item = items.get(said.item_id)
    if item is None:
        raise InvalidRequest(f"`data.hallmark_item`: the queue {queue.name!r} has no item {said.item_id}.")
    if said.reviewer.startswith(KEY_PREFIX):
        raise InvalidRequest(f"`completed_by`: a name that begins with {KEY_PREFIX!r} stands for that key.")
    if said.finding is None:
        if there is None or there.label_id is None:
            return None
        return Stated(prediction_id=item.prediction_id, source="review_queue", withdrawn=True, said_at=said.at)
    return msgspec.structs.replace(statement(queue, item, said.finding), said_at=said.at)


def _row(queue: Queue, item: Row[Any], said: Annotation, key_id: str, label_id: str | None) -> dict[str, Any]:
    return {
        "id": uuid7(),
        "tenant": queue.tenant,
        "queue_id": queue.id,
        "item_id": item.id,
        "reviewer": said.reviewer,
        "key_id": key_id,
        "state": "done" if said.finding else "skipped",
        "leased_at": said.at,
        "expires_at": said.at,
        "finished_at": said.at,
        "reason": None,
        "class": said.finding.class_name if said.finding else None,
        "label_id": label_id,
        "probability": item.probability if said.finding else None,
    }


def _refused(problems: Sequence[str]) -> InvalidRequest:
    told = "; ".join(problems[:MAX_TOLD])
    rest = f"; and {len(problems) - MAX_TOLD} more" if len(problems) > MAX_TOLD else ""
    return InvalidRequest(f"Nothing was imported. {told}{rest}", param=problems[0].split(":")[0].split(" ")[0])
