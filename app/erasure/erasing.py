"""Does an erasure: a piece at a time, each in one transaction with how far it is, so that it goes on after any end.

The main rule: keys first, then content, and the record last. What is found in a piece is blanked together with all that
was said of it, so that nothing is left over that could not be found again.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from sqlalchemy import Row, and_, delete, func, null, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import (
    Database,
    dataset_rows,
    drift_reference_rows,
    erasures,
    feature_values,
    feature_views,
    feedback,
    labels,
    predictions,
    review_boosts,
    review_items,
    reviews,
)
from app.feedback.words import prediction_subject
from app.predictions import first_id
from app.predictions.erased import blank
from app.predictions.rows import FIGURES

GRACE_SECONDS = 10.0
"""How long after it was asked for an erasure looks once more at least: what was being written has come by then."""

_ROWS_AT_ONCE = 20_000
"""Rows of the predictions that are looked through in a piece."""

_IDS_AT_ONCE = 200
ERASED_AUTHOR = "erased"

_e, _p, _f, _l = erasures.c, predictions.c, feedback.c, labels.c
_FIGURES = [_p[name] for name in FIGURES]


class Shredder(Protocol):
    """Destroys keys."""

    async def destroy(self, tenant: str, subjects: Sequence[str], *, made_until: int) -> int:
        """Destroy the keys of subjects that were made by that moment; gives how many there were. Raises Unavailable."""
        ...

    async def empty_log(self) -> bool:
        """Leave nothing of them on the disk; False if that has to be tried again later. Raises Unavailable."""
        ...


class DatasetErasure(Protocol):
    """What an erasure in datasets came to."""

    @property
    def rows(self) -> Collection[str]:
        """The digests of the rows that have no content any more."""
        ...

    @property
    def versions(self) -> Collection[tuple[str, int, str]]:
        """The versions that had them: name, number, digest."""
        ...


class DatasetRows(Protocol):
    """Erases the content of datasets' rows, in every version."""

    async def erase(
        self, tenant: str, *, prediction_ids: Collection[str] = (), subjects: Collection[str] = ()
    ) -> DatasetErasure:
        """Erase what was made of predictions, or is of subjects; a second time it finds nothing."""
        ...


class Eraser:
    """Does what `Erasures` has on record.

    Args:
        database: shared by all replicas.
        clock: milliseconds since 1970.
        shredder: has the keys; None where content is not sealed.
        datasets: the versions of datasets, where there are some.
        longest_wait_seconds: a request may wait for a place before its row is there; the last look is after that.
    """

    def __init__(
        self,
        database: Database,
        clock: Callable[[], int],
        *,
        shredder: Shredder | None = None,
        datasets: DatasetRows | None = None,
        longest_wait_seconds: float = 0.0,
        rows_at_once: int = _ROWS_AT_ONCE,
    ) -> None:
        self._database = database
        self._clock = clock
        self._shredder = shredder
        self._datasets = datasets
        self._grace_ms = round(max(GRACE_SECONDS, longest_wait_seconds + 1) * 1000)
        self._rows_at_once = rows_at_once

    async def step(self) -> bool:
        """Do a piece of the oldest erasure that is not done; tells whether there may be more at once.

        Raises:
            Unavailable: the database, or where the keys are, does not answer.
        """
        running = select(erasures).where(_e.state == "running").order_by(_e.id)
        async with self._database.reading() as connection:
            rows = (await connection.execute(running)).all()
        # One that waits for its last look does not hold up the next.
        return any([await self._advance(row) for row in rows[:10]])

    async def _advance(self, erasure: Row[Any]) -> bool:
        """Look through the next rows; where there are none, begin once more or be done."""
        if erasure.names is None:
            return await self._finish(erasure)
        names = json.loads(erasure.names)
        last = min(await self._last_row(), erasure.position + self._rows_at_once)
        if last > erasure.position:
            await self._erase_rows(erasure, names, last)
            return True
        if self._clock() < erasure.requested_at + self._grace_ms:
            return False
        if erasure.found:
            await self._note(erasure, position=0, found=0)
            return False
        await self._erase_names(erasure, names)
        return True

    async def _last_row(self) -> int:
        async with self._database.reading() as connection:
            return (await connection.execute(select(func.max(_p.row)))).scalar_one() or 0

    def _mine(self, erasure: Row[Any], names: Sequence[str]) -> tuple[Any, ...]:
        column = _p.user if erasure.kind == "user" else _p.conversation
        end = first_id(_moment(erasure.requested_at + 1))
        # A shadow is made when its answer has ended, and holds the request of before.
        return (_p.tenant == erasure.tenant, column.in_(names), or_(_p.id < end, _p.shadow_of < end))

    # --- predictions, and what was said of them ---

    async def _erase_rows(self, erasure: Row[Any], names: Sequence[str], last: int) -> None:
        window = (_p.row > erasure.position, _p.row <= last, *self._mine(erasure, names))
        query = select(_p.row, _p.id, _p.outcome, *_FIGURES).where(*window).order_by(_p.row)
        async with self._database.reading() as connection:
            seen = (await connection.execute(query.limit(_IDS_AT_ONCE))).all()
        # An answer that is under way brings its content when it ends: it is seen, so all is looked through once more.
        found = [row for row in seen if row.outcome != "open"]
        ids = [row.id for row in found]
        counts: Counter[str] = Counter(predictions=len(ids))
        counts["keys"] = await self._shred(erasure, names, ids)
        made_of: set[str] = set()
        if self._datasets is not None and ids:
            erased = await self._datasets.erase(erasure.tenant, prediction_ids=ids)
            counts["dataset_rows"] += len(erased.rows)
            made_of |= {digest for _, _, digest in erased.versions}
        to = seen[-1].row if len(seen) == _IDS_AT_ONCE else last
        async with self._database.writing() as connection:
            for row in found:
                values = {name: null() if value is None else value for name, value in blank(row._asdict()).items()}
                await connection.execute(predictions.update().where(_p.row == row.row).values(**values))
            if ids:
                counts += await _erase_about(connection, erasure.tenant, ids)
                made_of |= await _datasets_of(connection, erasure.tenant, ids)
            await _write(connection, erasure, counts, made_of, position=to, found=erasure.found + len(seen))

    async def _shred(self, erasure: Row[Any], names: Sequence[str], ids: Sequence[str]) -> int:
        if self._shredder is None:
            return 0
        own = names if erasure.kind == "user" else [f"conversation:{name}" for name in names]
        subjects = [*own, *map(prediction_subject, ids)]
        return await self._shredder.destroy(erasure.tenant, subjects, made_until=erasure.requested_at)

    # --- the end ---

    async def _erase_names(self, erasure: Row[Any], names: Sequence[str]) -> None:
        """Erase what was said under the subject's name, and the names in the record."""
        counts: Counter[str] = Counter(keys=await self._shred(erasure, names, ()))
        made_of: set[str] = set()
        if self._datasets is not None and erasure.kind == "user":
            erased = await self._datasets.erase(erasure.tenant, subjects=names)
            counts["dataset_rows"] += len(erased.rows)
            made_of |= {digest for _, _, digest in erased.versions}
        async with self._database.writing() as connection:
            counts += await _erase_named(connection, erasure, names, self._clock())
            await _write(connection, erasure, counts, made_of, names=None)

    async def _finish(self, erasure: Row[Any]) -> bool:
        """Be done, if the keys' log and the database's could be emptied: what was erased stands in them until then."""
        if self._shredder is not None and not await self._shredder.empty_log():
            return False
        if not await self._database.empty_log():
            return False
        await self._note(erasure, state="done", finished_at=self._clock())
        return True

    async def _note(self, erasure: Row[Any], **values: Any) -> None:
        async with self._database.writing() as connection:
            await connection.execute(update(erasures).where(_e.id == erasure.id).values(**values))


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


async def _write(
    connection: AsyncConnection, erasure: Row[Any], counts: Mapping[str, int], made_of: set[str], **values: Any
) -> None:
    """Add to the record; what another process added meanwhile stays."""
    now = (await connection.execute(select(_e.counts, _e.datasets).where(_e.id == erasure.id).with_for_update())).one()
    total = Counter(json.loads(now.counts)) + Counter(counts)
    values |= {"counts": json.dumps(total), "datasets": json.dumps(sorted(made_of | set(json.loads(now.datasets))))}
    await connection.execute(update(erasures).where(_e.id == erasure.id).values(**values))


async def _erase_about(connection: AsyncConnection, tenant: str, ids: Sequence[str]) -> Counter[str]:
    """Erase what was said of predictions, and what was copied from them."""
    said = feedback.update().where(_f.tenant == tenant, _f.prediction_id.in_(ids))
    stated = labels.update().where(_l.tenant == tenant, _l.prediction_id.in_(ids))
    embedded = drift_reference_rows.c
    copies = drift_reference_rows.update().where(
        embedded.tenant == tenant, embedded.prediction_id.in_(ids), embedded.embedding.is_not(None)
    )
    item, review = review_items.c, reviews.c
    its = (item.tenant == tenant, item.prediction_id.in_(ids))
    notes = reviews.update().where(review.item_id.in_(select(item.id).where(*its)), review.reason.is_not(None))
    counts = Counter(
        feedback=(await connection.execute(said.values(**WORDLESS_FEEDBACK))).rowcount,
        labels=(await connection.execute(stated.values(**WORDLESS_LABEL))).rowcount,
        embeddings=(await connection.execute(copies.values(embedding=None))).rowcount,
        review_notes=(await connection.execute(notes.values(reason=None))).rowcount,
    )
    # Nobody holds or gets any more what has no content. What some have reviewed is done with their findings.
    waiting = (*its, item.state == "waiting")
    untouched = select(item.id).where(*waiting, item.done == 0)
    is_held = and_(review.item_id.in_(select(item.id).where(*its)), review.state.in_(("leased", "expired", "returned")))
    await connection.execute(delete(reviews).where(or_(is_held, review.item_id.in_(untouched))))
    gone = await connection.execute(delete(review_items).where(*waiting, item.done == 0))
    await connection.execute(update(review_items).where(*waiting).values(wanted=item.done, state="done"))
    counts["review_items"] = gone.rowcount
    return counts


WORDLESS_FEEDBACK = {"comment": None, "correction": None, "metadata": None, "said": None}
WORDLESS_LABEL = {"comment": None, "answer": None, "said": None}


async def _erase_named(connection: AsyncConnection, erasure: Row[Any], names: Sequence[str], now: int) -> Counter[str]:
    """Erase what goes by the subject's own name: feedback, labels, slices of review queues, and features."""
    mine = [_f.author.in_(names)] if erasure.kind == "user" else [_f.conversation.in_(names)]
    gone = WORDLESS_FEEDBACK | ({"author": ERASED_AUTHOR} if erasure.kind == "user" else {"conversation": None})
    said = feedback.update().where(_f.tenant == erasure.tenant, *mine)
    counts = Counter(feedback=(await connection.execute(said.values(**gone))).rowcount)
    if erasure.kind == "user":
        stated = labels.update().where(_l.tenant == erasure.tenant, _l.author.in_(names))
        changed = await connection.execute(stated.values(**WORDLESS_LABEL, author=ERASED_AUTHOR))
        counts["labels"] += changed.rowcount
    boost = review_boosts.c
    names_it = or_(*(boost.slice.contains(json.dumps(name), autoescape=True) for name in names))
    slices = review_boosts.update().where(boost.tenant == erasure.tenant, and_(boost.slice.is_not(None), names_it))
    ended = await connection.execute(slices.values(slice=None, ended_at=func.coalesce(boost.ended_at, now)))
    counts["review_slices"] += ended.rowcount
    views = select(feature_views.c.name).where(feature_views.c.subject == erasure.kind)
    known = feature_values.c
    features = delete(feature_values).where(
        known.tenant == erasure.tenant, known.entity.in_(names), known.view.in_(views)
    )
    counts["features"] += (await connection.execute(features)).rowcount
    return counts


async def _datasets_of(connection: AsyncConnection, tenant: str, ids: Sequence[str]) -> set[str]:
    """The registered datasets that have rows made of predictions."""
    rows = dataset_rows.c
    query = select(rows.dataset_digest).where(rows.tenant == tenant, rows.prediction_id.in_(ids)).distinct()
    return set((await connection.execute(query)).scalars())
