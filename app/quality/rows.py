"""The rows that figures rest on, read page by page: answers, thumbs, labels, and what a judge says.

The main rule: every query names its tenant, here and nowhere else in the package, and between two pages nothing is held
open.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, ScalarSelect, Select, Table, func, or_, select

from app.database import Database, api_keys, feedback, labels, predictions
from app.predictions import Where
from app.predictions.history import conditions, first_id

MAX_LABELLED = 20_000
"""Labelled answers that a report reads at most: the newest."""

_LABEL_PAGE = 500
_p, _f, _l = predictions.c, feedback.c, labels.c

_whose = (_p.id, _p.release_name, _p.conversation, _p.user)
_answer_columns = (
    *_whose,
    _p.outcome,
    _p.shadow_of,
    _p.finish_reason,
    _p.verdict,
    _p.prompt_tokens,
    _p.completion_tokens,
    _p.first_token_seconds,
    _p.total_seconds,
    _p.store,
    _p.citations,
    _p.tool_calls.is_not(None).label("has_tool_calls"),
    func.length(_p.answer).label("answer_characters"),
    _p.question,
)


class Rows:
    """Reads what one tenant has on record."""

    def __init__(self, database: Database) -> None:
        self._database = database

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

    async def labelled(self, tenant: str, where: Where) -> AsyncIterator[list[list[Row[Any]]]]:
        """Give labelled answers page by page, each as its labels: the newest answer first, the newest label first."""
        about = _l.prediction_id
        query = (
            select(
                *_whose,
                _l.row,
                _l.id.label("label_id"),
                _p.answer,
                _l["class"].label("class_name"),
                _l.answer.label("right_answer"),
                _l.sampling_probability,
                _judged(tenant).label("judged"),
            )
            .where(_l.tenant == tenant, *_start(about, where), _latest(labels), _l.withdrawn.is_(False))
            .where(or_(_l["class"].is_not(None), _l.answer.is_not(None)), *_finished(about, tenant, where))
            .order_by(about.desc(), _l.row.desc())
            .limit(_LABEL_PAGE)
        )
        unfinished: list[Row[Any]] = []
        page = await self._read(query.where(*_ends(about, where)))
        while page:
            *groups, unfinished = (list(rows) for _, rows in groupby([*unfinished, *page], key=lambda row: row.id))
            yield groups
            last = page[-1]
            following = query.where(about <= last.id, or_(about < last.id, _l.row < last.row))
            page = await self._read(following) if len(page) == _LABEL_PAGE else []
        if unfinished:
            yield [unfinished]

    async def judged(self, tenant: str, where: Where) -> list[Row[Any]]:
        """Sum up by release what judges say of its answers: how many, their mean score, and that of its square."""
        each = (
            select(_p.release_name, func.avg(_f.rating).label("score"))
            .where(*_is_judged(tenant), *_start(_f.prediction_id, where), *_ends(_f.prediction_id, where))
            .where(*_finished(_f.prediction_id, tenant, where))
            .group_by(_p.id, _p.release_name)
            .subquery()
        )
        query = select(
            each.c.release_name,
            func.count().label("n"),
            func.avg(each.c.score).label("mean"),
            func.avg(each.c.score * each.c.score).label("square"),
        )
        return list(await self._read(query.group_by(each.c.release_name)))

    async def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        async with self._database.reading() as connection:
            rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
        return rows


def _answered(tenant: str, where: Where) -> Iterator[ColumnElement[bool]]:
    """Which answers are meant, but for the window: that bounds whichever table's ids are walked along."""
    yield _p.release_name.is_not(None)
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
