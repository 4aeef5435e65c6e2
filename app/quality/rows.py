"""The rows that figures rest on, read page by page: answers, thumbs, labels, and what a judge says.

The main rule: every query names its tenant, here and nowhere else in the package, and between two pages nothing is held
open.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, ScalarSelect, Select, Table, case, func, or_, select

from app.database import Database, api_keys, feedback, labels, predictions, review_items, review_queues
from app.feedback.words import Words
from app.predictions import Where
from app.predictions.history import conditions, first_id
from app.predictions.sealed import opened
from app.privacy.envelopes import Ring, is_sealed

MAX_LABELLED = 20_000
"""Labelled answers that a report reads at most: the newest."""

_LABEL_PAGE = 500
_p, _f, _l, _i = predictions.c, feedback.c, labels.c, review_items.c

_whose = (_p.id, _p.release_name, _p.conversation, _p.user)
_characters = case((_p.store, func.coalesce(_p.answer_characters, func.length(_p.answer)))).label("answer_characters")
_answer_columns = (
    _p.row,
    *_whose,
    _p.outcome,
    _p.shadow_of,
    _p.finish_reason,
    _p.verdict,
    _p.valid,
    _p.prompt_tokens,
    _p.completion_tokens,
    _p.first_token_seconds,
    _p.total_seconds,
    _p.store,
    _p.citations,
    (_p.tool_calls.is_not(None) | _p.called_tools.is_not(None)).label("has_tool_calls"),
    _characters,
    _p.question,
    _p.question_digest,
)

_signal_columns = (_p.verdict, _p.citations, _p.passages, _characters)


class Rows:
    """Reads what one tenant has on record."""

    def __init__(self, database: Database, keys: Ring | None = None) -> None:
        self._database = database
        self._keys = keys

    async def tenants(self) -> list[str]:
        """Everybody who ever had a key."""
        return [row.tenant for row in await self._read(select(api_keys.c.tenant).distinct())]

    async def answers(self, tenant: str, where: Where, *, page_rows: int) -> AsyncIterator[Sequence[Row[Any]]]:
        """Give what was answered, the oldest first, page by page."""
        query = select(*_answer_columns).where(_p.outcome != "open", *_answered(tenant, where), *_ends(_p.id, where))
        query = query.order_by(_p.id).limit(page_rows)
        page = await self._read(query.where(*_start(_p.id, where)))
        while page:
            yield page
            # Not from the window's start as well: SQLite uses one of two lower bounds, and would walk to each page.
            page = await self._read(query.where(_p.id > page[-1].id)) if len(page) == page_rows else []

    async def thumbs(self, tenant: str, where: Where, *, page_rows: int) -> AsyncIterator[Sequence[Row[Any]]]:
        """Give the thumbs of end users that hold now, page by page."""
        about = _f.prediction_id
        query = (
            select(_f.row, *_whose, _f.rating)
            .where(_f.tenant == tenant, *_ends(about, where), _latest(feedback), _f.withdrawn.is_(False))
            .where(_f.source == "end_user", _f.rating_type == "boolean", *_finished(about, tenant, where))
            .order_by(about, _f.row)
            .limit(page_rows)
        )
        page = await self._read(query.where(*_start(about, where)))
        while page:
            yield page
            last = page[-1]
            following = query.where(about >= last.id, or_(about > last.id, _f.row > last.row))
            page = await self._read(following) if len(page) == page_rows else []

    async def labelled(self, tenant: str, where: Where) -> AsyncIterator[list[list[Any]]]:
        """Give labelled answers page by page, each as its labels: the newest answer first, the newest label first."""
        about = _l.prediction_id
        query = (
            select(
                *_whose,
                _l.row,
                _l.id.label("label_id"),
                _p.answer,
                _p.predicted_class,
                *_signal_columns,
                _l["class"].label("class_name"),
                _l.answer.label("right_answer"),
                _l.policy,
                _l.slot,
                _p.tenant,
                _p.subject_key,
                _p.sealed,
                _l.sampling_probability,
                _judged(tenant).label("judged"),
            )
            .where(_l.tenant == tenant, *_start(about, where), _latest(labels), _l.withdrawn.is_(False))
            .where(or_(_l["class"].is_not(None), _l.answer.is_not(None)), *_finished(about, tenant, where))
            .order_by(about.desc(), _l.row.desc())
            .limit(_LABEL_PAGE)
        )
        unfinished: list[Any] = []
        page = await self._read(query.where(*_ends(about, where)))
        while page:
            shown = await self._opened(page)
            *groups, unfinished = (list(rows) for _, rows in groupby([*unfinished, *shown], key=lambda row: row.id))
            yield groups
            last = page[-1]
            following = query.where(about <= last.id, or_(about < last.id, _l.row < last.row))
            page = await self._read(following) if len(page) == _LABEL_PAGE else []
        if unfinished:
            yield [unfinished]

    async def _opened(self, page: Sequence[Row[Any]]) -> Sequence[Any]:
        """The labelled answers with what was sealed in place; what cannot be opened is null."""
        if all(row.sealed is None and not is_sealed(row.right_answer) for row in page):
            return page
        whose = {row.subject_key for row in page if row.sealed is not None}
        keys = await self._keys.opening(sorted(whose)) if self._keys is not None and whose else {}
        facts = [row._asdict() for row in page]
        rights = await Words(ring=self._keys).opened(
            [{"slot": each["slot"], "answer": each["right_answer"]} for each in facts], ("answer",)
        )
        return [
            SimpleNamespace(**{**opened(each, keys), "right_answer": right["answer"]})
            for each, right in zip(facts, rights, strict=True)
        ]

    async def judged(self, tenant: str, where: Where, *, page_rows: int) -> AsyncIterator[Sequence[Row[Any]]]:
        """Give what judges say now of finished answers, page by page; what is said of one answer comes together."""
        about = _f.prediction_id
        query = (
            select(_f.row, _p.id, _p.release_name, _f.rating)
            .where(*_is_judged(tenant), *_ends(about, where), *_finished(about, tenant, where))
            .order_by(about, _f.row)
            .limit(page_rows)
        )
        page = await self._read(query.where(*_start(about, where)))
        while page:
            yield page
            last = page[-1]
            following = query.where(about >= last.id, or_(about > last.id, _f.row > last.row))
            page = await self._read(following) if len(page) == page_rows else []

    async def reviewed(self, tenant: str, where: Where) -> Sequence[Row[Any]]:
        """Count by release the items that chance put into review queues, and those that were reviewed."""
        about = _i.prediction_id
        query = (
            select(
                _p.release_name, func.count().label("n"), func.sum(case((_i.state == "done", 1), else_=0)).label("done")
            )
            .where(_i.tenant == tenant, _i.probability.is_not(None), *_start(about, where), *_ends(about, where))
            .where(*_finished(about, tenant, where))
        )
        return await self._read(query.group_by(_p.release_name))

    async def partial_queues(self, tenant: str) -> set[str]:
        """The tenant's queues that consider only a slice of what a release answers."""
        query = select(review_queues.c.name, review_queues.c.rules).where(review_queues.c.tenant == tenant)
        return {row.name for row in await self._read(query) if _is_partial(_read_rules(row.rules).where)}

    async def signals(self, tenant: str | None, rows: Sequence[int]) -> AsyncIterator[Sequence[Row[Any]]]:
        """Give what tells how far answers can be trusted, by their row numbers; None is whoever's they are."""
        whose = () if tenant is None else (_p.tenant == tenant,)
        for at in range(0, len(rows), _LABEL_PAGE):
            yield await self._read(select(*_signal_columns).where(_p.row.in_(rows[at : at + _LABEL_PAGE]), *whose))

    async def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        async with self._database.reading() as connection:
            rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
        return rows


class _Rules(msgspec.Struct):
    where: Where


_read_rules = msgspec.json.Decoder(_Rules).decode
_NARROWING = ("user", "conversation", "model", "adapter", "verdict", "assignment", "label_state", "feedback_state")


def _is_partial(where: Where) -> bool:
    return any(getattr(where, name) is not None for name in _NARROWING)


def _answered(tenant: str, where: Where) -> Iterator[ColumnElement[bool]]:
    """Which answers are meant, but for the window: that bounds whichever table's ids are walked along."""
    yield _p.release_name.is_not(None)
    if where.assignment is None:
        yield or_(_p.assignment.is_(None), _p.assignment != "chore")
    yield from conditions(tenant, msgspec.structs.replace(where, since=None, until=None))


def _finished(prediction_id: Any, tenant: str, where: Where) -> tuple[ColumnElement[bool], ...]:
    """The finished answer that something is said of."""
    return (_p.id == prediction_id, _p.outcome == "finished", *_answered(tenant, where))


def _start(prediction_id: Any, where: Where) -> list[ColumnElement[bool]]:
    return [] if where.since is None else [prediction_id >= first_id(where.since)]


def _ends(prediction_id: Any, where: Where) -> list[ColumnElement[bool]]:
    return [] if where.until is None else [prediction_id < first_id(where.until)]


def _latest(table: Table) -> ColumnElement[bool]:
    later = table.alias()
    following = select(later.c.row).where(later.c.slot == table.c.slot, later.c.revision == table.c.revision + 1)
    return ~following.exists()


def _is_judged(tenant: str) -> tuple[ColumnElement[bool], ...]:
    """A judge's scores that hold now: a thumb, or a number from 0 to 1."""
    holds = (_latest(feedback), _f.withdrawn.is_(False))
    return (_f.tenant == tenant, _f.source == "judge", _f.rating.between(0.0, 1.0), *holds)


def _judged(tenant: str) -> ScalarSelect[Any]:
    score = select(func.avg(_f.rating)).where(_f.prediction_id == _p.id, *_is_judged(tenant))
    return score.correlate(predictions).scalar_subquery()
