"""Lets go of what is older than it may get: content first, then records, each class by a term of its own.

The main rule: batches by the row's number, each in one transaction with how far it is, so that nothing is long and
nothing is looked at twice. Terms count from when something was made.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Table, and_, delete, func, null, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import (
    Database,
    drift_reference_rows,
    feature_values,
    feedback,
    labels,
    prediction_documents,
    predictions,
    retention_positions,
    review_items,
    reviews,
)
from app.erasure.erasing import WORDLESS_FEEDBACK, WORDLESS_LABEL
from app.predictions import first_id
from app.predictions.erased import blank
from app.predictions.rows import FIGURES

BATCH_ROWS = 500
PACE_SECONDS = 60.0
"""From one look with nothing to do to the next."""

FEATURES_PACE_SECONDS = 3600.0
"""From one look through all features to the next: whether one was replaced changes with time."""

_DAY_MS = 24 * 3600 * 1000
_p, _f, _l, _r = predictions.c, feedback.c, labels.c, retention_positions.c
_figures = [_p[name] for name in FIGURES]
_v = feature_values.c


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How many days each class is kept; None is for ever."""

    content_days: float | None = None
    """What was said in requests and answers; figures stay."""
    predictions_days: float | None = None
    """Whole records of predictions."""
    feedback_days: float | None = None
    """Words of feedback and labels; ratings and classes stay."""
    embeddings_days: float | None = None
    """Questions' embeddings, also those in drift's references."""
    review_days: float | None = None
    """Items of review queues, with who reviewed them."""
    features_days: float | None = None
    """Features since newer ones took their place: what holds now stays."""


class Retention:
    """Lets go of what is too old; `step` is a worker's.

    Args:
        database: shared by all replicas.
        clock: milliseconds since 1970.
        terms: how long each class is kept.
        batch_rows: rows of a transaction.
    """

    def __init__(
        self, database: Database, clock: Callable[[], int], terms: Terms, *, batch_rows: int = BATCH_ROWS
    ) -> None:
        self._database = database
        self._clock = clock
        self._terms = terms
        self._batch_rows = batch_rows
        self._rest_until = 0
        self._has_let_go = False
        self._features_after = 0
        self._features_rest_until = 0

    async def step(self) -> bool:
        """Let go of a batch of each class; tells whether there may be more at once.

        Raises:
            Unavailable: the database does not answer.
        """
        if self._clock() < self._rest_until:
            return False
        more = False
        for name, table, let_go in (
            ("content", predictions, _content),
            ("embeddings", predictions, _embeddings),
            ("predictions", predictions, _predictions),
            ("feedback", feedback, _feedback),
            ("labels", labels, _labels),
            ("review", review_items, _review),
        ):
            days = getattr(self._terms, f"{'feedback' if name == 'labels' else name}_days")
            if days is not None:
                more |= await self._batch(name, table, let_go, self._clock() - round(days * _DAY_MS))
        if self._terms.features_days is not None:
            more |= await self._features(self._clock() - round(self._terms.features_days * _DAY_MS))
        if not more:
            if self._has_let_go and not await self._database.empty_log():
                return False  # Somebody reads: it is tried again.
            self._has_let_go = False
            self._rest_until = self._clock() + round(PACE_SECONDS * 1000)
        return more

    async def _batch(self, name: str, table: Table, let_go: Any, until: int) -> bool:
        """Do the rows of a batch that are older than `until`; whether it was a full one."""
        by_row = "row" in table.c
        at = table.c.row if by_row else table.c.id
        async with self._database.writing() as connection:
            query = select(_r.position).where(_r.name == name).with_for_update()
            position = (await connection.execute(query)).scalar_one_or_none()
            after: Any = (int(position or 0)) if by_row else (position or "00000000-0000-0000-0000-000000000000")
            following = [at > after]
            if table is predictions:
                # The last row stays where it is: SQLite would give its number to another, and followers would miss it.
                following.append(at < select(func.max(_p.row)).scalar_subquery())
            found = (
                await connection.execute(select(at, table.c.id).where(*following).order_by(at).limit(self._batch_rows))
            ).all()
            limit = first_id(datetime.fromtimestamp(until / 1000, UTC))
            old = []
            for row in found:
                if row.id >= limit:
                    break
                old.append(row)
            if not old:
                return False
            await let_go(connection, [row[0] for row in old])
            insert = self._database.insert(retention_positions).values(name=name, position=str(old[-1][0]))
            await connection.execute(
                insert.on_conflict_do_update(index_elements=["name"], set_={"position": str(old[-1][0])})
            )
        self._has_let_go = True
        return len(old) == self._batch_rows

    async def _features(self, until: int) -> bool:
        """Let go of a batch of features that were replaced before `until`; whether there are more rows to look at."""
        if self._clock() < self._features_rest_until:
            return False
        window = select(_v.row).where(_v.row > self._features_after).order_by(_v.row).limit(self._batch_rows)
        async with self._database.writing() as connection:
            rows = list((await connection.execute(window)).scalars())
            gone = delete(feature_values).where(_v.row.in_(rows), _replaced_before(until))
            self._has_let_go |= bool(rows) and (await connection.execute(gone)).rowcount > 0
        is_full = len(rows) == self._batch_rows
        self._features_after = rows[-1] if is_full else 0
        if not is_full:
            self._features_rest_until = self._clock() + round(FEATURES_PACE_SECONDS * 1000)
        return is_full


def _replaced_before(until: int) -> ColumnElement[bool]:
    """The condition that a newer row was known by then: whoever asks for a moment since has no use for this one."""
    newer = feature_values.alias("newer").c
    same = (newer.tenant == _v.tenant, newer.view == _v.view, newer.entity == _v.entity)
    follows = or_(newer.event_at > _v.event_at, and_(newer.event_at == _v.event_at, newer.created_at > _v.created_at))
    return select(newer.row).where(*same, newer.event_at < until, newer.created_at < until, follows).exists()


async def _content(connection: AsyncConnection, rows: list[int]) -> None:
    await _forget_copies(connection, _p.row.in_(rows))
    is_there = or_(*(_p[name].is_not(None) for name in ("request", "question", "answer", "metadata", "sealed")))
    query = select(_p.row, *_figures, _p.user, _p.conversation).where(_p.row.in_(rows), is_there)
    for row in (await connection.execute(query)).all():
        values = {**blank(row._asdict()), "user": row.user, "conversation": row.conversation, "kept": "expired"}
        written = {name: null() if value is None else value for name, value in values.items()}
        await connection.execute(predictions.update().where(_p.row == row.row).values(**written))


async def _embeddings(connection: AsyncConnection, rows: list[int]) -> None:
    mine = (_p.row.in_(rows), _p.question_embedding.is_not(None))
    await connection.execute(predictions.update().where(*mine).values(question_embedding=None))
    await _forget_copies(connection, _p.row.in_(rows))


async def _predictions(connection: AsyncConnection, rows: list[int]) -> None:
    await _forget_copies(connection, _p.row.in_(rows))
    used = prediction_documents.c
    ids = select(_p.id).where(_p.row.in_(rows))
    await connection.execute(delete(prediction_documents).where(used.prediction_id.in_(ids)))
    await connection.execute(delete(predictions).where(_p.row.in_(rows)))


async def _forget_copies(connection: AsyncConnection, which: ColumnElement[bool]) -> None:
    copy = drift_reference_rows.c
    whose = select(_p.id).where(which, _p.tenant == copy.tenant)
    gone = drift_reference_rows.update().where(copy.prediction_id.in_(whose), copy.embedding.is_not(None))
    await connection.execute(gone.values(embedding=None))


async def _feedback(connection: AsyncConnection, rows: list[int]) -> None:
    await connection.execute(feedback.update().where(_f.row.in_(rows)).values(**WORDLESS_FEEDBACK))


async def _labels(connection: AsyncConnection, rows: list[int]) -> None:
    await connection.execute(labels.update().where(_l.row.in_(rows)).values(**WORDLESS_LABEL))


async def _review(connection: AsyncConnection, ids: list[str]) -> None:
    await connection.execute(delete(reviews).where(reviews.c.item_id.in_(ids)))
    await connection.execute(delete(review_items).where(review_items.c.id.in_(ids)))
