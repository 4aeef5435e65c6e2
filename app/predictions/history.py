"""What was predicted, asked of the database that all replicas share: the same queries on SQLite and on PostgreSQL.

The main rule: pages by id, which rises with time, so that no page costs more than another; and nothing is asked
without naming the tenant.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, Row, Select, Table, false, func, or_, select

from app.database import Database, feedback, is_latest, labels, predictions, review_items, review_queues
from app.predictions.keeping import Pseudonym
from app.predictions.prediction import Outcome, Prediction
from app.predictions.rows import COLUMNS, from_facts
from app.predictions.sealed import Keys
from app.privacy.sealing import DataKey, is_pseudonym

LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"

_table = predictions.c
_whole = [_table[name] for name in COLUMNS if name != "question_embedding"]
_brief = [_table.id, _table.outcome, _table.release_name, _table.release_digest, _table.assignment]

LabelState = Literal["labelled", "unlabelled"]
FeedbackState = Literal["given", "none", "positive", "negative", "corrected"]


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """Which predictions are meant; what is None makes no difference."""

    release: str | None = None
    """`name`, or one of its releases as `name@3`."""
    release_digest: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    """Made before that moment."""
    outcome: Outcome | None = None
    user: str | None = None
    conversation: str | None = None
    model: str | None = None
    adapter: str | None = None
    verdict: str | None = None
    """With its reason, as `abstained:nothing_relevant`, or without: then whatever the reason."""
    assignment: str | None = None
    label_state: LabelState | None = None
    """Whether a label says what is true of it; one that was withdrawn says nothing."""
    feedback_state: FeedbackState | None = None
    """Whether anybody thinks something of it, and what: where several do, one of them is enough."""
    review_queue: str | None = None
    """The name of a review queue that has taken it."""


ANY = Where()


class Mention(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction in brief."""

    id: str
    outcome: Outcome
    release_name: str | None
    release_digest: str | None
    assignment: str | None


class Settled(msgspec.Struct, frozen=True):
    """A row, and the prediction in it: SQLite gives the number of one that is erased to another."""

    row: int
    id: str


class Traced(msgspec.Struct, frozen=True):
    """Where a prediction is in the traces, and what it was if its release classifies."""

    trace_id: str | None = None
    has_generation: bool = False
    """Whether an engine was called."""
    predicted_class: str | None = None


class History:
    """The predictions of the shared database, as far as they have come there.

    Args:
        database: shared by all replicas.
        keys: open what was sealed.
        pseudonym: the name that a user is kept by.
    """

    def __init__(self, database: Database, *, keys: Keys | None = None, pseudonym: Pseudonym | None = None) -> None:
        self._database = database
        self._keys = keys
        self._pseudonym = pseudonym

    async def get(self, tenant: str, prediction_id: str) -> Prediction | None:
        """Read one prediction of the tenant, by its id as text; None if there is none."""
        query = select(*_whole).where(_table.tenant == tenant, _table.id == prediction_id)
        found = await self._read(query)
        return found[0] if found else None

    async def find(
        self, tenant: str, where: Where = ANY, *, limit: int = 50, before: str | None = None
    ) -> list[Prediction]:
        """List the tenant's predictions, the newest first, from the id `before` on backwards."""
        query = select(*_whole).where(*self._conditions(tenant, where), _table.id < (before or LAST_ID))
        return await self._read(query.order_by(_table.id.desc()).limit(limit))

    async def count(self, tenant: str, where: Where = ANY) -> int:
        """Count the tenant's predictions."""
        query = select(func.count()).select_from(predictions).where(*self._conditions(tenant, where))
        async with self._database.reading() as connection:
            return int((await connection.execute(query)).scalar_one())

    async def pages(
        self, tenant: str, where: Where = ANY, *more: ColumnElement[bool], page_rows: int = 500
    ) -> AsyncIterator[list[Prediction]]:
        """Give all there are up to now, the oldest first, page by page; between two pages nothing is held open."""
        now = datetime.now(UTC)
        where = msgspec.structs.replace(where, until=min(_aware(where.until or now), now))
        query = select(*_whole).where(*self._conditions(tenant, where), *more).order_by(_table.id).limit(page_rows)
        page = await self._read(query)
        while page:
            yield page
            page = await self._read(query.where(_table.id > page[-1].id)) if len(page) == page_rows else []

    async def of_releases(
        self, tenant: str, digests: Collection[str], *, limit: int, before: str | None = None
    ) -> list[Mention]:
        """List what the releases of these digests answered, the newest first."""
        async with self._database.reading() as connection:
            found: list[Mention] = []
            # One release after the other: each is a walk along the index, which a list of them is not.
            for digest in digests:
                mine = (_table.tenant == tenant, _table.release_digest == digest, _table.id < (before or LAST_ID))
                query = select(*_brief).where(*mine).order_by(_table.id.desc()).limit(limit)
                found += map(mention_of, await connection.execute(query))
        return sorted(found, key=lambda each: each.id, reverse=True)[:limit]

    async def mentions(self, tenant: str, ids: Collection[str]) -> dict[str, Mention]:
        """Find those there are of these ids."""
        found: dict[str, Mention] = {}
        wanted = sorted(ids)
        async with self._database.reading() as connection:
            for at in range(0, len(wanted), 500):
                query = select(*_brief).where(_table.tenant == tenant, _table.id.in_(wanted[at : at + 500]))
                found |= {row.id: mention_of(row) for row in await connection.execute(query)}
        return found

    async def traced(self, tenant: str, prediction_id: str) -> Traced | None:
        """Find the trace of one prediction of the tenant; None if there is no such prediction."""
        query = select(_table.trace_id, _table.engine_seconds, _table.predicted_class)
        async with self._database.reading() as connection:
            found = await connection.execute(query.where(_table.tenant == tenant, _table.id == prediction_id))
            row = found.one_or_none()
        return None if row is None else Traced(row.trace_id, row.engine_seconds is not None, row.predicted_class)

    async def settled(self) -> Settled | None:
        """Find the row up to which every row of every tenant has come and is closed; None if there is none.

        Waits for what replicas are shipping at the moment, so that a row with a lower number cannot appear later.
        """
        async with self._database.reading() as connection:
            await self._database.one_at_a_time(connection, predictions.name)
            open_row = select(func.min(_table.row)).where(_table.outcome == "open")
            first_open = (await connection.execute(open_row)).scalar_one()
            query = select(_table.row, _table.id).order_by(_table.row.desc()).limit(1)
            if first_open is not None:
                query = query.where(_table.row < first_open)
            row = (await connection.execute(query)).one_or_none()
        return Settled(row=row.row, id=row.id) if row else None

    def _conditions(self, tenant: str, where: Where) -> Iterator[ColumnElement[bool]]:
        if self._pseudonym is not None and where.user is not None and not is_pseudonym(where.user):
            where = msgspec.structs.replace(where, user=self._pseudonym(tenant, where.user))
        return conditions(tenant, where)

    async def _read(self, query: Select[Any]) -> list[Prediction]:
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
        keys: Mapping[str, DataKey] | None = None
        if self._keys is not None:
            sealed_by = {row.subject_key for row in rows if row.sealed is not None}
            keys = await self._keys.opening(sorted(sealed_by)) if sealed_by else {}
        # Fifty long answers take milliseconds to decode.
        return await asyncio.to_thread(_predictions, rows, keys) if len(rows) > 1 else _predictions(rows, keys)


def mention_of(row: Row[Any]) -> Mention:
    """Read a prediction in brief."""
    return Mention(
        id=row.id,
        outcome=row.outcome,
        release_name=row.release_name,
        release_digest=row.release_digest,
        assignment=row.assignment,
    )


def _predictions(rows: Sequence[Row[Any]], keys: Mapping[str, DataKey] | None) -> list[Prediction]:
    return [from_facts(row._asdict(), keys) for row in rows]


def conditions(tenant: str, where: Where) -> Iterator[ColumnElement[bool]]:
    """Say in SQL which predictions of the tenant are meant."""
    yield _table.tenant == tenant
    if where.since is not None:
        yield _table.id >= first_id(where.since)
    if where.until is not None:
        yield _table.id < first_id(where.until)
    if where.release is not None:
        label = _table.release_name
        yield label == where.release if "@" in where.release else label.startswith(f"{where.release}@", autoescape=True)
    if where.verdict is not None:
        exact = _table.verdict == where.verdict
        yield or_(exact, _table.verdict.startswith(f"{where.verdict}:", autoescape=True))
    for name in ("release_digest", "outcome", "user", "conversation", "model", "adapter", "assignment"):
        if (value := getattr(where, name)) is not None:
            yield _table[name] == value
    if where.label_state is not None:
        labelled = _is_spoken_of(labels)
        yield labelled if where.label_state == "labelled" else ~labelled
    if where.feedback_state is not None:
        yield _FEEDBACK_STATES[where.feedback_state]
    if where.review_queue is not None:
        yield _is_taken_by(tenant, where.review_queue)


def speaks_of(*, labelled: bool = True, corrected: bool = True) -> ColumnElement[bool]:
    """The condition that somebody says now what is right in a prediction: by a label, or by a correction."""
    said = [_is_spoken_of(labels)] * labelled + [_FEEDBACK_STATES["corrected"]] * corrected
    return or_(false(), *said)


def _is_taken_by(tenant: str, queue: str) -> ColumnElement[bool]:
    """The condition that a prediction is in a review queue."""
    named = select(review_queues.c.id).where(review_queues.c.tenant == tenant, review_queues.c.name == queue)
    taken = select(review_items.c.id).where(review_items.c.prediction_id == _table.id)
    mine = (review_items.c.tenant == tenant, review_items.c.queue_id == named.scalar_subquery())
    return taken.where(*mine).exists()


def _is_spoken_of(table: Table, *that: ColumnElement[bool]) -> ColumnElement[bool]:
    """The condition that an author says something of a prediction now, looked up by index for each in turn.

    A list of all that are spoken of, made first, would cost every page as much as there are labels.
    """
    about = (table.c.tenant == _table.tenant, table.c.prediction_id == _table.id)
    said = select(table.c.row).where(*about, table.c.withdrawn.is_(False), is_latest(table), *that)
    return said.exists()


_is_word = feedback.c.rating_type == "boolean"  # What a number means only its application knows.
_FEEDBACK_STATES: dict[FeedbackState, ColumnElement[bool]] = {
    "given": _is_spoken_of(feedback),
    "none": ~_is_spoken_of(feedback),
    "positive": _is_spoken_of(feedback, _is_word, feedback.c.rating > 0),
    "negative": _is_spoken_of(feedback, _is_word, feedback.c.rating == 0),
    "corrected": _is_spoken_of(feedback, feedback.c.correction.is_not(None)),
}


def first_id(moment: datetime) -> str:
    """The smallest id that a prediction made at `moment` or later can have; without a time zone it is one in UTC."""
    digits = f"{max(0, round(_aware(moment).timestamp() * 1000)):012x}"
    return f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000"


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
