"""The feature store in the service's own database, the same statements on SQLite and on PostgreSQL.

The main rule: rows are only added. One statement finds what was known at a moment, for the prompt of now and for the
training rows of then, so that both are the same by construction.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from sqlalchemy import BigInteger, Integer, Row, Select, Text, column, delete, select, values
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, feature_values, feature_views
from app.errors import Conflict, InvalidRequest, NotFound
from app.features.store import FeatureValue, Point
from app.features.views import FeatureRow, FeatureView
from app.privacy.envelopes import Ring, are_there, disclose, enclose, is_sealed, keys_for
from app.privacy.sealing import DataKey, is_pseudonym
from app.privacy.subjects import CONVERSATION

MAX_ROWS = 10_000
"""Of one call, which is one transaction: on SQLite the log of predictions waits for its end."""

POINTS_AT_ONCE = 500

Pseudonym = Callable[[str, str], str]
T = TypeVar("T")

_v, _f = feature_views.c, feature_values.c
_later = feature_values.alias("known")
_read_values = msgspec.json.Decoder(dict[str, Any]).decode


class Put(msgspec.Struct, frozen=True, kw_only=True):
    """What became of rows."""

    added: int
    unchanged: int
    """Rows that say what was there already."""


class SqlFeatures:
    """Feature views, and each tenant's values.

    Args:
        database: shared by all replicas.
        clock: milliseconds since 1970.
        ring: seals the values of entities that are somebody.
        pseudonym: the name that a user is kept by.
    """

    def __init__(
        self,
        database: Database,
        clock: Callable[[], int],
        *,
        ring: Ring | None = None,
        pseudonym: Pseudonym | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._ring = ring
        self._pseudonym = pseudonym

    # --- views ---

    async def define(self, view: FeatureView, *, who: str) -> bool:
        """Make a view, or change what may change of one; tells whether it is new.

        Raises:
            Conflict: it is there and is of another entity or subject, or has a feature that this leaves out or that is
                of another type.
        """
        written: dict[str, Any] = {
            "entity": view.entity,
            "features": msgspec.json.encode(view.features).decode(),
            "ttl_seconds": view.ttl_seconds,
            "subject": view.subject,
            "description": view.description,
        }
        mine = _v.name == view.name
        async with self._database.writing() as connection:
            await self._database.one_at_a_time(connection, feature_views.name)
            row = (await connection.execute(select(feature_views).where(mine))).one_or_none()
            if row is None:
                facts = {"name": view.name, "created_at": self._clock(), "created_by": who}
                await connection.execute(feature_views.insert(), facts | written)
                return True
            _check_change(_view_of(row), view)
            await connection.execute(feature_views.update().where(mine).values(**written))
        return False

    async def delete(self, name: str) -> None:
        """Take a view away with all that any tenant has in it; raises NotFound."""
        async with self._database.writing() as connection:
            await self._database.one_at_a_time(connection, feature_values.name)
            await self._view(connection, name)
            await connection.execute(delete(feature_values).where(_f.view == name))
            await connection.execute(delete(feature_views).where(_v.name == name))

    async def describe(self) -> list[FeatureView]:
        """Give the views by name. Raises Unavailable."""
        query = select(feature_views).order_by(_v.name)
        async with self._database.reading() as connection:
            return [_view_of(row) for row in await connection.execute(query)]

    async def view(self, name: str) -> FeatureView:
        """Give one view; raises NotFound or Unavailable."""
        async with self._database.reading() as connection:
            return await self._view(connection, name)

    async def _view(self, connection: AsyncConnection, name: str) -> FeatureView:
        query = select(feature_views).where(_v.name == name)
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"There is no feature view {name!r}; `GET /v1/features` lists those there are.")
        return _view_of(row)

    # --- writing ---

    async def put(self, tenant: str, view: FeatureView, rows: Sequence[FeatureRow]) -> Put:
        """Add rows, all of them or none; one that says what is there already adds nothing.

        Raises:
            InvalidRequest: there are too many.
            Conflict: of a row's entity and times something else is on record.
            NotFound: the view is gone.
        """
        if len(rows) > MAX_ROWS:
            raise InvalidRequest(f"`rows`: send {MAX_ROWS:,} at most at once.", param="rows")
        named = [msgspec.structs.replace(row, entity=self._named(tenant, view, row.entity)) for row in rows]
        keys = await self._keys(tenant, view, named)
        added = 0
        async with self._database.writing() as connection:
            # Two that write at once must not take the same moment for one entity.
            await self._database.one_at_a_time(connection, feature_values.name)
            await self._view(connection, view.name)
            if not await are_there(self._ring, connection, [key.id for key in keys.values()]):
                keys = await self._keys(tenant, view, named)
            now = self._clock()
            for some in _batches(named):
                there = await self._there(connection, tenant, view.name, some, keys)
                new = [
                    {
                        "tenant": tenant,
                        "view": view.name,
                        "entity": row.entity,
                        "event_at": row.event_at,
                        "created_at": created_at,
                        "content": _sealed(tenant, view, row, keys),
                    }
                    for row, before in zip(some, there, strict=True)
                    if (created_at := _known_at(row, before, now)) is not None
                ]
                if new:
                    await connection.execute(feature_values.insert(), new)
                added += len(new)
        return Put(added=added, unchanged=len(rows) - added)

    async def _keys(self, tenant: str, view: FeatureView, rows: Sequence[FeatureRow]) -> Mapping[str, DataKey]:
        if self._ring is None or view.subject is None:
            return {}
        subjects = sorted({_subject(view, row.entity) for row in rows})
        return await self._ring.sealing(tenant, subjects)

    async def _there(
        self,
        connection: AsyncConnection,
        tenant: str,
        view: str,
        rows: Sequence[FeatureRow],
        keys: Mapping[str, DataKey],
    ) -> list[dict[int, str | None]]:
        """For each row what is on record of its entity and event, by when it was known; None is not to be read."""
        asked = _asked([(n, row.entity, row.event_at) for n, row in enumerate(rows)])
        same = (_f.tenant == tenant, _f.view == view, _f.entity == asked.c.entity, _f.event_at == asked.c.at)
        query = select(asked.c.n, _f.entity, _f.event_at, _f.created_at, _f.content).select_from(asked).where(*same)
        found: list[dict[int, str | None]] = [{} for _ in rows]
        by_id = {key.id: key for key in keys.values()}
        for row in await connection.execute(query):
            found[row.n][row.created_at] = _opened(tenant, view, row, by_id)
        return found

    # --- reading ---

    async def read(self, tenant: str, view: str, names: Sequence[str], entity: str) -> list[FeatureValue]:
        """Give what an entity's features are now.

        Raises:
            NotFound: there is no such view.
            Unavailable: the database, or where the keys are, does not answer.
        """
        return await self.read_at(tenant, view, names, Point(entity, self._clock()))

    async def read_at(self, tenant: str, view: str, names: Sequence[str], point: Point) -> list[FeatureValue]:
        """Give what an entity's features were known to be at a moment; raises as `read` does."""
        async with self._database.reading() as connection:
            found = await self._view(connection, view)
            _check_names(found, names)
            known = _known(tenant, view, self._named(tenant, found, point.entity), point.at)
            row = (await connection.execute(known)).one_or_none()
        (shown,) = await self._shown(found, tenant, names, [(point.at, row)])
        return shown

    async def join(
        self, tenant: str, view: str, names: Sequence[str], points: Sequence[Point]
    ) -> list[list[FeatureValue]]:
        """Give for each point what the features were known to be then; raises as `read` does."""
        joined: list[list[FeatureValue]] = []
        found = await self.view(view)
        _check_names(found, names)
        for some in _batches(points):
            asked = _asked([(n, self._named(tenant, found, each.entity), each.at) for n, each in enumerate(some)])
            known = _known(tenant, view, asked.c.entity, asked.c.at).with_only_columns(_later.c.row).correlate(asked)
            both = asked.join(feature_values, _f.row == known.scalar_subquery())
            query = select(asked.c.n, *feature_values.c).select_from(both)
            async with self._database.reading() as connection:
                rows = {row.n: row for row in await connection.execute(query)}
            joined += await self._shown(found, tenant, names, [(each.at, rows.get(n)) for n, each in enumerate(some)])
        return joined

    async def _shown(
        self, view: FeatureView, tenant: str, names: Sequence[str], rows: Sequence[tuple[int, Row[Any] | None]]
    ) -> list[list[FeatureValue]]:
        held = [row.content for _, row in rows if row is not None]
        keys = await keys_for(self._ring, held) if any(map(is_sealed, held)) else {}

        def show() -> list[list[FeatureValue]]:
            return [_values_at(view, tenant, names, at, row, keys) for at, row in rows]

        return await asyncio.to_thread(show) if len(rows) > 1 else show()

    def _named(self, tenant: str, view: FeatureView, entity: str) -> str:
        """The name that an entity is kept by: a user's is the pseudonym that the user has elsewhere."""
        if self._pseudonym is None or view.subject != "user" or is_pseudonym(entity):
            return entity
        return self._pseudonym(tenant, entity)


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for at in range(0, len(items), POINTS_AT_ONCE):
        yield items[at : at + POINTS_AT_ONCE]


def _known(tenant: str, view: str, entity: Any, at: Any) -> Select[Any]:
    """What was known of an entity at a moment: of the events that had happened the last, by what was said last.

    What was written later counts for nothing, however early its event: then it was not there to be read.
    """
    known = _later.c
    of = (known.tenant == tenant, known.view == view, known.entity == entity)
    by_then = (known.event_at <= at, known.created_at <= at)
    return select(_later).where(*of, *by_then).order_by(known.event_at.desc(), known.created_at.desc()).limit(1)


def _asked(rows: Sequence[tuple[int, str, int]]) -> Any:
    """Entities and moments as a table of the statement."""
    columns = column("n", Integer), column("entity", Text), column("at", BigInteger)
    return values(*columns, name="asked").data(list(rows)).cte("asked")


def _values_at(
    view: FeatureView,
    tenant: str,
    names: Sequence[str],
    at: int,
    row: Row[Any] | None,
    keys: Mapping[str, DataKey],
) -> list[FeatureValue]:
    if row is None:
        return [FeatureValue(None, "missing")] * len(names)
    times = row.event_at, row.created_at
    if view.ttl_seconds is not None and row.event_at < at - view.ttl_seconds * 1000:
        return [FeatureValue(None, "expired", *times)] * len(names)
    content = _opened(tenant, view.name, row, keys)
    held = _read_values(content) if content is not None else {}
    return [
        FeatureValue(held[name], "read", *times) if name in held else FeatureValue(None, "missing", *times)
        for name in names
    ]


def _known_at(row: FeatureRow, before: Mapping[int, str | None], now: int) -> int | None:
    """When a row is known from, where `before` is what is on record of its event; None where it says nothing new.

    Raises:
        Conflict: it would change what is on record.
    """
    written = _written(row)
    if row.created_at is None:
        last = max(before, default=-1)
        return None if before and before[last] == written else max(now, last + 1)
    if row.created_at not in before:
        return row.created_at
    if before[row.created_at] == written:
        return None
    raise Conflict(
        "`rows`: of an entity and its times something else is on record, which is not changed: a correction has the "
        "same `event_time` and a later `created_time`, or none.",
        param="rows",
    )


def _written(row: FeatureRow) -> str:
    """The values as they are stored: the same values are the same text."""
    return msgspec.json.encode(row.values, order="sorted").decode()


def _subject(view: FeatureView, entity: str) -> str:
    return f"{CONVERSATION}{entity}" if view.subject == "conversation" else entity


def _sealed(tenant: str, view: FeatureView, row: FeatureRow, keys: Mapping[str, DataKey]) -> str:
    content = _written(row)
    key = keys.get(_subject(view, row.entity)) if view.subject is not None else None
    if key is None:
        return content
    return enclose(content.encode(), key, _context(tenant, view.name, row.entity, row.event_at))


def _opened(tenant: str, view: str, row: Any, keys: Mapping[str, DataKey]) -> str | None:
    """What a row holds; None where its key is gone, or is not here."""
    content: str = row.content
    if not is_sealed(content):
        return content
    plain = disclose(content, keys, _context(tenant, view, row.entity, row.event_at))
    return None if plain is None else plain.decode()


def _context(tenant: str, view: str, entity: str, event_at: int) -> bytes:
    return f"feature\0{tenant}\0{view}\0{entity}\0{event_at}".encode(errors="surrogatepass")


def _view_of(row: Row[Any]) -> FeatureView:
    return FeatureView(
        name=row.name,
        entity=row.entity,
        features=msgspec.json.decode(row.features),
        ttl_seconds=row.ttl_seconds,
        subject=row.subject,
        description=row.description,
    )


def _check_names(view: FeatureView, names: Sequence[str]) -> None:
    for name in names:
        if name not in view.features:
            there = ", ".join(view.features)
            raise NotFound(f"The feature view {view.name!r} has no feature {name[:100]!r}; it has {there}.")


def _check_change(old: FeatureView, new: FeatureView) -> None:
    """Refuse what would give rows on record another meaning."""
    for field in ("entity", "subject"):
        before, after = getattr(old, field), getattr(new, field)
        if before != after:
            raise Conflict(f"`{field}` of {old.name!r} is {before!r} and stays so: define another view.", param=field)
    for name, kind in old.features.items():
        if new.features.get(name) != kind:
            raise Conflict(
                f"`features.{name}` of {old.name!r} is {kind!r} and stays so: define another view.",
                param=f"features.{name}",
            )
