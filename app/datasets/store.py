"""Datasets and their versions in the database: writing the next one, finding those there are.

The main rule: a version is there whole or not at all. Its rows are written page by page under a number that nobody
reads yet, so that no transaction is long; one row that is changed at the end makes them count. Who writes holds a
claim, and every page checks it; what a writer left that died is removed before the next one writes.
"""

import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import (
    Database,
    dataset_builds,
    dataset_examples,
    dataset_members,
    dataset_series,
    dataset_tags,
    dataset_versions,
    datasets,
)
from app.datasets.recipes import OTHER, Kind, Purpose, Split
from app.datasets.sealing import lasting, opened, sealed
from app.errors import Conflict, NotFound
from app.lineage.provenance import sha256
from app.predictions import uuid7
from app.privacy.envelopes import Ring

CLAIM_SECONDS = 60.0
"""How long a build that was killed keeps others of its dataset waiting."""

ROWS_AT_ONCE = 500

Clock = Callable[[], int]

_s, _v, _t = dataset_series.c, dataset_versions.c, dataset_tags.c
_m, _e = dataset_members.c, dataset_examples.c


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset by its name."""

    id: str
    tenant: str
    name: str
    task: Kind
    purpose: Purpose
    revision: int
    """Its newest version."""
    created_at: int
    created_by: str | None


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a dataset."""

    series: Series
    number: int
    digest: str
    rows: int
    report: Any
    manifest: dict[str, Any]
    written: str
    """The manifest's canonical JSON."""
    created_at: int
    created_by: str | None
    erased: int
    """Rows whose content was erased since."""
    tags: tuple[str, ...] = ()


class Addition(msgspec.Struct, frozen=True, kw_only=True):
    """A row to be written."""

    digest: str
    content_digest: str
    prediction_id: str | None
    label_id: str | None
    split: Split
    subject: str | None
    content: str


def alive(number: Any) -> ColumnElement[bool]:
    """The condition that a membership holds in a version."""
    return and_(_m.v_from <= number, or_(_m.v_to.is_(None), _m.v_to > number))


class Store:
    """The datasets of all tenants.

    Args:
        database: shared by all replicas.
        clock: gives milliseconds since 1970.
        ring: seals and opens the content of rows.
    """

    def __init__(
        self, database: Database, clock: Clock = lambda: time.time_ns() // 1_000_000, *, ring: Ring | None = None
    ) -> None:
        self.database = database
        self.clock = clock
        self.ring = ring

    # --- writing a version ---

    async def claim(
        self, connection: AsyncConnection, tenant: str, name: str, *, task: Kind, purpose: Purpose, build: str, who: str
    ) -> Series:
        """Be the one who writes a dataset's next version, and make the dataset if there is none.

        Raises:
            Conflict: somebody else writes it, or it is of another task or for another purpose.
        """
        now = self.clock()
        registered = select(datasets.c.name).where(datasets.c.tenant == tenant, datasets.c.name == name).limit(1)
        is_registered = (await connection.execute(registered)).one_or_none() is not None
        made = {"id": uuid7(), "tenant": tenant, "name": name, "task": task, "purpose": purpose, "revision": 0}
        once = self.database.insert(dataset_series).on_conflict_do_nothing()
        is_new = (await connection.execute(once, {**made, "created_at": now, "created_by": who})).rowcount == 1
        if is_new and is_registered:
            raise Conflict(f"A dataset {name!r} was registered from elsewhere: take another name.", param="name")
        query = select(dataset_series).where(_s.tenant == tenant, _s.name == name).with_for_update()
        row = (await connection.execute(query)).one()
        if row.build_id not in (None, build) and row.build_expires_at > now:
            raise Conflict(f"A version of {name!r} is being built: wait for it, or cancel it.", param="name")
        if row.revision == 0:
            changed = update(dataset_series).where(_s.id == row.id).values(task=task, purpose=purpose)
            await connection.execute(changed)
        elif (row.task, row.purpose) != (task, purpose):
            raise Conflict(
                f"{name!r} is a dataset for {row.purpose}, of the task {row.task!r}: another needs a name of its own.",
                param="task" if row.task != task else "purpose",
            )
        await self._hold(connection, row.id, build, now)
        return _series({**row._asdict(), "task": task, "purpose": purpose})

    async def renew(self, series_id: str, build: str) -> bool:
        """Hold the claim for longer; False where it is held no more."""
        now = self.clock()
        async with self.database.writing() as connection:
            mine = (_s.id == series_id, _s.build_id == build)
            until = now + round(CLAIM_SECONDS * 1000)
            held = await connection.execute(update(dataset_series).where(*mine).values(build_expires_at=until))
            known = update(dataset_builds).where(dataset_builds.c.id == build).values(expires_at=until)
            if held.rowcount:
                await connection.execute(known)
            return bool(held.rowcount)

    async def sweep(self, series_id: str, *, build: str) -> None:
        """Remove what a build that never ended has written; for the holder of the claim."""
        while True:
            async with self.database.writing() as connection:
                # Whoever adds a row to another dataset must not find one here that is about to go.
                await self.database.one_at_a_time(connection, dataset_examples.name)
                revision = await self.held(connection, series_id, build)
                left = (_m.series_id == series_id, _m.v_from > revision)
                query = select(_m.digest, _s.tenant).join(dataset_series, _s.id == _m.series_id)
                rows = (await connection.execute(query.where(*left).limit(ROWS_AT_ONCE))).all()
                if not rows:
                    later = (_m.series_id == series_id, _m.v_to > revision)
                    await connection.execute(update(dataset_members).where(*later).values(v_to=None))
                    return
                digests, tenant = [row.digest for row in rows], rows[0].tenant
                await connection.execute(delete(dataset_members).where(*left, _m.digest.in_(digests)))
                other = dataset_members.alias()
                belongs = (
                    select(other.c.digest)
                    .join(dataset_series, _s.id == other.c.series_id)
                    .where(other.c.digest == _e.digest, _s.tenant == tenant)
                )
                orphan = (_e.tenant == tenant, _e.digest.in_(digests), ~belongs.exists())
                await connection.execute(delete(dataset_examples).where(*orphan))

    async def write(
        self, series: Series, build: str, *, added: Sequence[Addition] = (), removed: Collection[str] = ()
    ) -> None:
        """Write a page of the next version, which nobody sees yet.

        Raises:
            Conflict: the claim is held no more.
        """
        rows = [{"tenant": series.tenant, "erased_at": None, **msgspec.structs.asdict(row)} for row in added]
        kept = await sealed(self.ring, series.tenant, rows)
        async with self.database.writing() as connection:
            await self.database.not_while_one(connection, dataset_examples.name)
            number = await self.held(connection, series.id, build) + 1
            if added:
                lasts = await lasting(self.ring, connection, series.tenant, rows, kept)
                await connection.execute(self.database.insert(dataset_examples).on_conflict_do_nothing(), lasts)
                members = [{"series_id": series.id, "digest": row.digest, "v_from": number} for row in added]
                await connection.execute(dataset_members.insert(), members)
            if removed:
                gone = (_m.series_id == series.id, _m.digest.in_(removed), _m.v_to.is_(None), _m.v_from < number)
                await connection.execute(update(dataset_members).where(*gone).values(v_to=number))

    async def publish(
        self,
        series: Series,
        build: str,
        *,
        apart_from: int,
        digest: str,
        rows: int,
        report: str,
        manifest: str,
        who: str,
    ) -> int | None:
        """Make what was written a version, give its number, and give the claim back.

        Does nothing, and gives None, where `versions_apart` is `apart_from` no more: then it must be compared again.

        Raises:
            Conflict: the claim is held no more.
        """
        now = self.clock()
        async with self.database.writing() as connection:
            # Of two that are built at once, neither has seen the other: whoever publishes second must.
            await self.database.one_at_a_time(connection, f"{dataset_versions.name} of {series.tenant}")
            if await self.versions_apart(connection, series) != apart_from:
                return None
            number = await self.held(connection, series.id, build) + 1
            members = select(func.count()).select_from(dataset_members)
            written = (await connection.execute(members.where(_m.series_id == series.id, alive(number)))).scalar_one()
            if written != rows:
                raise RuntimeError(f"{written} rows were written of {rows}")
            made = {"digest": digest, "manifest": manifest, "created_at": now, "created_by": who}
            version = {"series_id": series.id, "number": number, "tenant": series.tenant, "rows": rows}
            await connection.execute(dataset_versions.insert().values(**version, report=report, **made))
            # The same rows may have been registered before, as another version or from elsewhere: they are the same.
            once = self.database.insert(datasets).on_conflict_do_nothing(index_elements=["tenant", "digest"])
            known = {"tenant": series.tenant, "name": series.name, "version": str(number)}
            await connection.execute(once.values(**known, manifest_digest=sha256(manifest), **made))
            done = {"revision": number, "build_id": None, "build_expires_at": None}
            await connection.execute(update(dataset_series).where(_s.id == series.id).values(**done))
            await self.finish(connection, build, "done", step="done", version=number, report=report)
        return number

    async def release(self, series_id: str, build: str, state: str, **facts: Any) -> None:
        """Give the claim back without a new version, and say what became of the build."""
        async with self.database.writing() as connection:
            mine = (_s.id == series_id, _s.build_id == build)
            free = {"build_id": None, "build_expires_at": None}
            await connection.execute(update(dataset_series).where(*mine).values(**free))
            await self.finish(connection, build, state, **facts)

    async def finish(self, connection: AsyncConnection, build: str, state: str, **facts: Any) -> None:
        """Say what became of a build; one that has ended stays as it is."""
        live = (dataset_builds.c.id == build, dataset_builds.c.state.in_(("waiting", "running")))
        ended = {"state": state, "finished_at": self.clock(), **facts}
        await connection.execute(update(dataset_builds).where(*live).values(**ended))

    async def _hold(self, connection: AsyncConnection, series_id: str, build: str, now: int) -> None:
        held = {"build_id": build, "build_expires_at": now + round(CLAIM_SECONDS * 1000)}
        await connection.execute(update(dataset_series).where(_s.id == series_id).values(**held))

    async def held(self, connection: AsyncConnection, series_id: str, build: str) -> int:
        """The newest version, if the claim is still held; no other transaction changes that until this one ends."""
        query = select(_s.revision).where(_s.id == series_id, _s.build_id == build).with_for_update()
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise Conflict(
                "The build was interrupted: by an erasure, or because it stood still for too long. Start it again."
            )
        return int(row.revision)

    async def versions_apart(self, connection: AsyncConnection, series: Series) -> int:
        """How many versions the tenant's datasets for the other purpose have."""
        count = select(func.coalesce(func.sum(_s.revision), 0))
        meant = (_s.tenant == series.tenant, _s.purpose == OTHER[series.purpose])
        return int((await connection.execute(count.where(*meant))).scalar_one())

    # --- finding ---

    async def series(self, tenant: str, name: str) -> Series:
        """Find a dataset that has a version; raises NotFound."""
        query = select(dataset_series).where(_s.tenant == tenant, _s.name == name, _s.revision > 0)
        async with self.database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"There is no dataset {name!r}.", param="dataset")
        return _series(row._asdict())

    async def all_series(self, tenant: str, *, limit: int, after: str = "") -> list[Series]:
        """List a tenant's datasets by name."""
        query = select(dataset_series).where(_s.tenant == tenant, _s.revision > 0, _s.name > after)
        async with self.database.reading() as connection:
            rows = await connection.execute(query.order_by(_s.name).limit(limit))
            return [_series(row._asdict()) for row in rows]

    async def version(self, tenant: str, name: str, which: str) -> Version:
        """Find a version by its number, by a tag, or as `latest`; raises NotFound."""
        series = await self.series(tenant, name)
        async with self.database.reading() as connection:
            number: int | None = series.revision
            if which.isdecimal() and len(which) < 10:
                number = int(which)
            elif which != "latest":
                query = select(_t.number).where(_t.series_id == series.id, _t.tag == which)
                number = (await connection.execute(query)).scalar_one_or_none()
            found = await self._versions(connection, series, _v.number == number) if number is not None else []
        if not found:
            raise NotFound(f"{name!r} has no version {which!r}; its newest is {series.revision}.", param="version")
        return found[0]

    async def versions(self, series: Series, *, limit: int, before: int | None = None) -> list[Version]:
        """List the versions of a dataset, the newest first."""
        until = (_v.number < before,) if before is not None else ()
        async with self.database.reading() as connection:
            return await self._versions(connection, series, *until, limit=limit)

    async def _versions(
        self, connection: AsyncConnection, series: Series, *which: ColumnElement[bool], limit: int = 1
    ) -> list[Version]:
        query = select(dataset_versions).where(_v.series_id == series.id, _v.number <= series.revision, *which)
        rows = (await connection.execute(query.order_by(_v.number.desc()).limit(limit))).all()
        named = select(_t.number, _t.tag).where(_t.series_id == series.id).order_by(_t.tag)
        tags: dict[int, list[str]] = {}
        for row in await connection.execute(named):
            tags.setdefault(row.number, []).append(row.tag)
        found = []
        for row in rows:
            erased = await self._erased(connection, series, row.number)
            found.append(_version(series, row, erased, tuple(tags.get(row.number, ()))))
        return found

    async def _erased(self, connection: AsyncConnection, series: Series, number: int) -> int:
        belongs = select(_m.digest).where(_m.series_id == series.id, _m.digest == _e.digest, alive(number))
        gone = (_e.tenant == series.tenant, _e.erased_at.is_not(None), belongs.exists())
        found = await connection.execute(select(func.count()).select_from(dataset_examples).where(*gone))
        return int(found.scalar_one())

    async def digests(self, series: Series, number: int) -> set[str]:
        """The digests of a version's rows."""
        query = select(_m.digest).where(_m.series_id == series.id, alive(number))
        async with self.database.reading() as connection:
            return set((await connection.execute(query)).scalars())

    async def tombstones(self, tenant: str, digests: Sequence[str]) -> set[str]:
        """Those of these rows whose content was erased: they do not come back."""
        found: set[str] = set()
        async with self.database.reading() as connection:
            for at in range(0, len(digests), ROWS_AT_ONCE):
                some = _e.digest.in_(digests[at : at + ROWS_AT_ONCE])
                query = select(_e.digest).where(_e.tenant == tenant, some, _e.erased_at.is_not(None))
                found.update((await connection.execute(query)).scalars())
        return found

    async def pages(
        self, series: Series, number: int, *, split: Split | None = None, after: str = "", page_rows: int = 500
    ) -> AsyncIterator[Sequence[Any]]:
        """Give a version's rows by their digests, page by page; between two pages nothing is held open."""
        while True:
            page = await self.page(series, number, split=split, after=after, limit=page_rows)
            if page:
                yield page
            if len(page) < page_rows:
                return
            after = page[-1].digest

    async def page(
        self, series: Series, number: int, *, split: Split | None = None, after: str = "", limit: int
    ) -> Sequence[Any]:
        """Give a page of a version's rows, by their digests."""
        belongs = and_(_e.tenant == series.tenant, _e.digest == _m.digest)
        query = select(dataset_examples).select_from(dataset_members.join(dataset_examples, belongs))
        query = query.where(_m.series_id == series.id, alive(number), _m.digest > after)
        if split is not None:
            query = query.where(_e.split == split)
        async with self.database.reading() as connection:
            rows = (await connection.execute(query.order_by(_m.digest).limit(limit))).all()
        return await opened(self.ring, series.tenant, rows)


def _series(facts: dict[str, Any]) -> Series:
    return Series(**{name: facts[name] for name in Series.__struct_fields__})


def _version(series: Series, row: Any, erased: int, tags: tuple[str, ...]) -> Version:
    return Version(
        series=series,
        number=row.number,
        digest=row.digest,
        rows=row.rows,
        report=msgspec.json.decode(row.report),
        manifest=msgspec.json.decode(row.manifest),
        written=row.manifest,
        created_at=row.created_at,
        created_by=row.created_by,
        erased=erased,
        tags=tags,
    )
