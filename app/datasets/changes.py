"""What differs between two versions, what a version is called, where a row is, and rows that are erased.

The main rule: a version is never changed. An erased row stays in every version it was in, as its digests and its origin
without its content, and each of these versions says how many of its rows are so.
"""

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import (
    dataset_examples,
    dataset_members,
    dataset_series,
    dataset_tags,
    dataset_versions,
)
from app.datasets.sealing import opened
from app.datasets.store import ROWS_AT_ONCE, Series, Store, alive
from app.errors import InvalidRequest

_s, _v, _t = dataset_series.c, dataset_versions.c, dataset_tags.c
_m, _e = dataset_members.c, dataset_examples.c


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A row that one version has and another has not."""

    change: str
    """`added` or `removed`."""
    digest: str
    prediction_id: str | None
    label_id: str | None
    split: str
    content: str | None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How two versions differ: all counted, and a page of the rows by digest."""

    added: int
    removed: int
    changed: int
    """Predictions whose row was replaced by another; both are counted above too."""
    data: list[Change]
    next: str | None


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a row is: in the versions of a dataset from `first` on, and from `end` on no more."""

    dataset: str
    purpose: str
    first: int
    end: int | None
    digest: str
    prediction_id: str | None
    label_id: str | None
    erased: bool


class Erased(msgspec.Struct, frozen=True, kw_only=True):
    """What an erasure reached."""

    rows: list[str]
    """The digests of the rows that have no content any more."""
    versions: list[tuple[str, int, str]]
    """The versions that had them: name, number, digest."""


class Changes:
    """Asks and changes what is said of versions."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._database = store.database

    async def difference(self, series: Series, old: int, new: int, *, limit: int = 50, after: str = "") -> Difference:
        """Tell how two versions differ. It costs what has changed between them, not what they have."""
        added, removed = _only_in(series, new, not_in=old), _only_in(series, old, not_in=new)
        async with self._database.reading() as connection:
            counts = [await _count(connection, each) for each in (added, removed)]
            rows: list[Change] = []
            for kind, those in (("added", added), ("removed", removed)):
                query = _rows(series, those).where(_m.digest > after).order_by(_m.digest).limit(limit + 1)
                found = (await connection.execute(query)).all()
                rows += [_change(kind, row) for row in await opened(self._store.ring, series.tenant, found)]
            changed = await _replaced(connection, series, added, removed)
        rows.sort(key=lambda row: row.digest)
        following = rows[limit - 1].digest if len(rows) > limit else None
        return Difference(added=counts[0], removed=counts[1], changed=changed, data=rows[:limit], next=following)

    # --- tags ---

    async def tag(self, series: Series, tag: str, number: int, *, who: str) -> None:
        """Give a version a name, which it takes from another that has it."""
        if tag == "latest" or tag.isdecimal():
            raise InvalidRequest(f"`tag`: {tag!r} means a version already; take another word.", param="tag")
        insert = self._database.insert(dataset_tags)
        moved = {name: insert.excluded[name] for name in ("number", "updated_at", "updated_by")}
        row = {"series_id": series.id, "tag": tag, "number": number, "updated_at": self._store.clock()}
        async with self._database.writing() as connection:
            again = insert.on_conflict_do_update(index_elements=["series_id", "tag"], set_=moved)
            await connection.execute(again, {**row, "updated_by": who})

    async def untag(self, series: Series, tag: str) -> bool:
        """Take a name away; False where no version has it."""
        async with self._database.writing() as connection:
            gone = delete(dataset_tags).where(_t.series_id == series.id, _t.tag == tag)
            return bool((await connection.execute(gone)).rowcount)

    # --- rows ---

    async def places(
        self, tenant: str, *, prediction_id: str | None = None, label_id: str | None = None, limit: int = 200
    ) -> list[Place]:
        """Find the rows that were made of a prediction or by a label, and the versions they are in."""
        belongs = and_(_e.tenant == _s.tenant, _e.digest == _m.digest)
        tables = dataset_series.join(dataset_members, _m.series_id == _s.id).join(dataset_examples, belongs)
        columns = (_s.name, _s.purpose, _s.revision, _m.v_from, _m.v_to, _e.digest, _e.prediction_id, _e.label_id)
        query = select(*columns, _e.erased_at).select_from(tables).where(_e.tenant == tenant, _m.v_from <= _s.revision)
        for column, value in ((_e.prediction_id, prediction_id), (_e.label_id, label_id)):
            if value is not None:
                query = query.where(column == value)
        async with self._database.reading() as connection:
            rows = (await connection.execute(query.order_by(_s.name, _m.v_from, _e.digest).limit(limit))).all()
        return [_place(row) for row in rows]

    async def erase(
        self, tenant: str, *, prediction_ids: Collection[str] = (), subjects: Collection[str] = ()
    ) -> Erased:
        """Erase the content of the rows that were made of predictions, or are of subjects; tells what held them.

        Builds that are under way may have read what is erased: they are interrupted.
        """
        found: dict[str, list[str]] = {}
        async with self._database.writing() as connection:
            await connection.execute(update(dataset_series).where(_s.tenant == tenant).values(build_id=None))
            for column, values in ((_e.prediction_id, prediction_ids), (_e.subject, subjects)):
                wanted = sorted(values)
                for at in range(0, len(wanted), ROWS_AT_ONCE):
                    meant = (_e.tenant == tenant, column.in_(wanted[at : at + ROWS_AT_ONCE]), _e.erased_at.is_(None))
                    digests = list((await connection.execute(select(_e.digest).where(*meant))).scalars())
                    blank = {"content": None, "subject": None, "erased_at": self._store.clock()}
                    await connection.execute(update(dataset_examples).where(*meant).values(**blank))
                    found[f"{column.name} {at}"] = digests
            rows = sorted(digest for digests in found.values() for digest in digests)
            return Erased(rows=rows, versions=await _holding(connection, tenant, rows))


async def _holding(connection: AsyncConnection, tenant: str, digests: Sequence[str]) -> list[tuple[str, int, str]]:
    """The versions that have one of these rows."""
    found: set[tuple[str, int, str]] = set()
    holds = and_(_v.series_id == _m.series_id, _v.number >= _m.v_from, or_(_m.v_to.is_(None), _v.number < _m.v_to))
    tables = dataset_members.join(dataset_versions, holds).join(dataset_series, _s.id == _m.series_id)
    for at in range(0, len(digests), ROWS_AT_ONCE):
        query = select(_s.name, _v.number, _v.digest).select_from(tables).distinct()
        some = digests[at : at + ROWS_AT_ONCE]
        rows = await connection.execute(query.where(_s.tenant == tenant, _m.digest.in_(some)))
        found |= {(row.name, row.number, row.digest) for row in rows}
    return sorted(found)


Those = tuple[ColumnElement[bool], ...]


def _only_in(series: Series, number: int, *, not_in: int) -> Those:
    """The condition that a membership holds in one version, and none of the same row in another.

    Of what has changed between the two, one end lies between them: so it is found by index.
    """
    low, high = sorted((number, not_in))
    end = _m.v_from if number > not_in else _m.v_to
    other = dataset_members.alias()
    there = (other.c.v_from <= not_in, or_(other.c.v_to.is_(None), other.c.v_to > not_in))
    same = select(other.c.digest).where(other.c.series_id == _m.series_id, other.c.digest == _m.digest, *there)
    return (_m.series_id == series.id, end > low, end <= high, alive(number), ~same.exists())


def _rows(series: Series, those: Those) -> Any:
    belongs = and_(_e.tenant == series.tenant, _e.digest == _m.digest)
    return select(dataset_examples).select_from(dataset_members.join(dataset_examples, belongs)).where(*those)


async def _count(connection: AsyncConnection, those: Those) -> int:
    counted = await connection.execute(select(func.count()).select_from(dataset_members).where(*those))
    return int(counted.scalar_one())


async def _replaced(connection: AsyncConnection, series: Series, added: Those, removed: Those) -> int:
    """How many predictions have another row in one than in the other."""
    new = _rows(series, added).with_only_columns(_e.prediction_id).where(_e.prediction_id.is_not(None))
    old = _rows(series, removed).with_only_columns(_e.prediction_id).where(_e.prediction_id.is_not(None))
    both = new.intersect(old).subquery()
    return int((await connection.execute(select(func.count()).select_from(both))).scalar_one())


def _change(kind: str, row: Any) -> Change:
    facts = {name: getattr(row, name) for name in Change.__struct_fields__ if name != "change"}
    return Change(change=kind, **facts)


def _place(row: Any) -> Place:
    return Place(
        dataset=row.name,
        purpose=row.purpose,
        first=row.v_from,
        end=row.v_to if row.v_to is not None and row.v_to <= row.revision else None,
        digest=row.digest,
        prediction_id=row.prediction_id,
        label_id=row.label_id,
        erased=row.erased_at is not None,
    )
