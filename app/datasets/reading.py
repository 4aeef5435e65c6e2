"""What a build reads: predictions of which somebody says what is right, what was said, and what other datasets ask.

The main rule: every query names the tenant, and between two pages nothing is held open.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import and_, select

from app.database import Database, dataset_examples, dataset_members, dataset_series, feedback, is_latest, labels
from app.datasets.opinions import Opinion
from app.datasets.recipes import LabelPolicy, Purpose, Recipe
from app.datasets.sealing import opened
from app.feedback import Words
from app.feedback.calls import latest_word_at
from app.predictions import History, Prediction
from app.predictions.history import speaks_of
from app.privacy.envelopes import Ring

PAGE_ROWS = 200

_l, _f = labels.c, feedback.c
_s, _m, _e = dataset_series.c, dataset_members.c, dataset_examples.c
_passages = msgspec.json.Decoder(list[str]).decode


class Asked(msgspec.Struct, frozen=True):
    """A question in another dataset."""

    dataset: str
    question: str
    session: str
    conversation: str | None
    """Where the session is a user's; rows of before it was kept have none."""


class Reading:
    """Reads for builds."""

    def __init__(self, database: Database, history: History, *, ring: Ring | None = None) -> None:
        self._database = database
        self._history = history
        self._ring = ring
        self._words = Words(ring=ring)

    async def count(self, tenant: str, recipe: Recipe) -> int:
        """Count the predictions that a recipe means, whether anybody speaks of them or not."""
        return await self._history.count(tenant, recipe.query.where())

    async def pages(self, tenant: str, recipe: Recipe) -> AsyncIterator[list[tuple[Prediction, Sequence[Opinion]]]]:
        """Give the predictions that somebody speaks of, the oldest first, each with what is said."""
        spoken = speaks_of(labelled=bool(recipe.labels.sources), corrected=recipe.labels.corrections)
        async for page in self._history.pages(tenant, recipe.query.where(), spoken, page_rows=PAGE_ROWS):
            said = await self._opinions(tenant, recipe.labels, [each.id for each in page])
            yield [(each, said.get(each.id, ())) for each in page]

    async def _opinions(self, tenant: str, policy: LabelPolicy, ids: Sequence[str]) -> dict[str, list[Opinion]]:
        found: dict[str, list[Opinion]] = defaultdict(list)
        about = (_l.tenant == tenant, _l.prediction_id.in_(ids), is_latest(labels), _l.withdrawn.is_(False))
        stated = select(labels).where(*about, _l.source.in_(policy.sources))
        given = (_f.tenant == tenant, _f.prediction_id.in_(ids), is_latest(feedback), _f.withdrawn.is_(False))
        corrected = select(feedback).where(*given, _f.source.in_(policy.correction_sources))
        async with self._database.reading() as connection:
            if policy.sources:
                rows = [dict(row) for row in (await connection.execute(stated)).mappings()]
                for row in await self._words.opened(rows, ("comment", "answer")):
                    found[row["prediction_id"]].append(_stated(row))
            if policy.corrections and policy.correction_sources:
                query = corrected.where(_f.correction.is_not(None))
                rows = [dict(row) for row in (await connection.execute(query)).mappings()]
                for row in await self._words.opened(rows, ("comment", "correction", "metadata")):
                    if row["correction"] is not None:  # Its key may be gone.
                        found[row["prediction_id"]].append(_corrected(row))
        return found

    async def asked(self, tenant: str, purpose: Purpose, *, but: str) -> AsyncIterator[list[Asked]]:
        """Give the questions of all versions of all datasets for a purpose, but for the one of this name."""
        belongs = and_(_e.tenant == _s.tenant, _e.digest == _m.digest)
        tables = dataset_series.join(dataset_members, _m.series_id == _s.id).join(dataset_examples, belongs)
        query = select(_s.name, _m.digest, _e.content).select_from(tables)
        meant = (_s.tenant == tenant, _s.purpose == purpose, _s.name != but, _m.v_from <= _s.revision)
        names = select(_s.name).where(_s.tenant == tenant, _s.purpose == purpose, _s.name != but).order_by(_s.name)
        async with self._database.reading() as connection:
            found = list((await connection.execute(names)).scalars())
        for name in found:
            after = ""
            while True:
                page = query.where(*meant, _s.name == name, _m.digest > after).order_by(_m.digest).limit(500)
                async with self._database.reading() as connection:
                    rows = (await connection.execute(page)).all()
                if rows:
                    shown = await opened(self._ring, tenant, rows)
                    yield [_asked(name, row.content) for row in shown if row.content is not None]
                if len(rows) < 500:
                    break
                after = rows[-1].digest


class _Content(msgspec.Struct):
    question: str
    session: str
    conversation: str | None = None


_content = msgspec.json.Decoder(_Content).decode


def _asked(name: str, content: str) -> Asked:
    said: _Content = _content(content)
    return Asked(name, said.question, said.session, said.conversation)


def _stated(row: dict[str, Any]) -> Opinion:
    return Opinion(
        said_at=latest_word_at(row),
        id=row["id"],
        source=row["source"],
        class_name=row["class"],
        answer=row["answer"],
        passages=_passages(row["passages"]) if row["passages"] else None,
        policy=row["policy"],
        sampling_probability=row["sampling_probability"],
    )


def _corrected(row: dict[str, Any]) -> Opinion:
    return Opinion(
        said_at=latest_word_at(row),
        id=row["id"],
        source=row["source"],
        answer=row["correction"],
        is_label=False,
    )
