"""The registry itself: what may be asked of it and changed in it, and how a process follows the others."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
from sqlalchemy import and_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, registry, releases, rollout_changes
from app.errors import Conflict, InvalidRequest, NotFound, ServiceError, Unavailable
from app.registry.memory import Memory
from app.registry.rows import (
    Change,
    Entry,
    Step,
    all_rollouts,
    change_of,
    change_rollout,
    enroll,
    entries,
    entry_of,
    is_release,
    now,
    numbers_of,
    raise_version,
    rollout_of,
    rollout_or_none,
    write_change,
)
from app.releases import BadRelease, Release, Releases, parse_label, stored_release
from app.rollouts import Rollout, begin

log = logging.getLogger(__name__)

SETTINGS = "settings"
"""Who made a change that followed from the settings."""

_VERSION = select(registry.c.version)

Vet = Callable[[Release], Awaitable[list[str]]]
"""Says what keeps a release from serving; raises ServiceError where that cannot be found out."""


class Registry:
    """Keeps releases and rollouts; use it in an `async with` block.

    Args:
        database: shared by all replicas.
        own: the release of the settings, still without its number.
        vet: asked before a release may serve.
        memory: a file that keeps what served last, for a start while the database is down.
        poll_seconds: how often another replica's changes are looked for.
    """

    def __init__(
        self, database: Database, *, own: Release, vet: Vet, memory: Path | None = None, poll_seconds: float = 0.5
    ) -> None:
        self.releases = Releases()
        self._database = database
        self._own = own
        self._vet = vet
        self._memory = Memory(memory) if memory else None
        self._poll_seconds = poll_seconds
        self._version = 0
        self._is_enrolled = False
        self._is_stale = False
        self._known: dict[tuple[str, int], Release] = {}
        self._following = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Enroll the settings' release, and serve; while the database is down, what served last.

        Raises:
            MigrationFailed: the database can never be used as it is.
        """
        with suppress(Unavailable):
            await self._database.prepare()
        await self._catch_up()
        if not self._version:
            await self._recall()
        self._follower = asyncio.create_task(self._follow(), name="registry")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._follower.cancel()
        with suppress(asyncio.CancelledError):
            await self._follower

    # --- releases ---

    async def create(self, release: Release, *, who: str) -> tuple[Entry, bool]:
        """Give a release its number and have it vetted; the same content again is the same release.

        Gives the release, and whether it is new. It may serve if the entry has no problems.
        """
        async with self._changing() as connection:
            await self._check_fallback(connection, release)
            number, is_new = await enroll(connection, release, who)
        release = msgspec.structs.replace(release, number=number)
        try:
            problems = await self._vet(release)
        except ServiceError as error:
            problems = [f"It could not be vetted: {error.message} Create it again to have it vetted."]
        if not problems:
            await self._approve(release)
        entry = await self.get(release.label)
        return msgspec.structs.replace(entry, problems=tuple(problems)), is_new

    async def get(self, label: str, *, param: str = "release") -> Entry:
        """Find a release by `name@3`; raises NotFound if there is none, or it is deleted."""
        name, number = parse_label(label, param=param)
        async with self._database.reading() as connection:
            row = (await connection.execute(entries().where(is_release(name, number)))).one_or_none()
        if row is None or row.deleted_at is not None:
            raise NotFound(f"There is no release {label!r}; `GET /v1/releases` lists them.", param=param)
        return entry_of(row)

    async def find(self, *, name: str | None, limit: int, after: str | None) -> list[Entry]:
        """List releases by name and number, those of one name or all, from the label `after` on."""
        query = entries().where(releases.c.deleted_at.is_(None)).order_by(releases.c.name, releases.c.number)
        if name is not None:
            query = query.where(releases.c.name == name)
        if after is not None:
            at = parse_label(after, param="after")
            query = query.where(tuple_(releases.c.name, releases.c.number) > at)
        async with self._database.reading() as connection:
            return [entry_of(row) for row in await connection.execute(query.limit(limit))]

    async def delete(self, label: str) -> None:
        """Take a release away: nobody can ask for it any more, but its predictions can still be traced to it.

        Raises:
            Conflict: it serves, or may answer in place of a release that does.
        """
        name, number = parse_label(label)
        await self.get(label)
        async with self._changing() as connection:
            for rollout in await all_rollouts(connection):
                if rollout.name == name and number in rollout.serving:
                    raise Conflict(f"{label} serves: it is part of the rollout of {name!r}. Promote another first.")
                for member in rollout.serving:
                    if (name, number) in await self._fallbacks_of(connection, (rollout.name, member)):
                        raise Conflict(f"{label} is a fallback of {rollout.name}@{member}, which serves.")
            await connection.execute(releases.update().where(is_release(name, number)).values(deleted_at=now()))

    # --- rollouts ---

    async def rollouts(self) -> list[Rollout]:
        """List the rollouts by name."""
        async with self._database.reading() as connection:
            return await all_rollouts(connection)

    async def rollout(self, name: str) -> Rollout:
        """Find a name's rollout; raises NotFound if it has none."""
        async with self._database.reading() as connection:
            return await rollout_of(connection, name)

    async def changes(self, name: str, *, limit: int, before: int | None = None) -> list[Change]:
        """List a rollout's changes, the newest first, from before a revision on."""
        query = select(rollout_changes).where(rollout_changes.c.name == name)
        if before is not None:
            query = query.where(rollout_changes.c.revision < before)
        query = query.order_by(rollout_changes.c.revision.desc()).limit(limit)
        async with self._database.reading() as connection:
            await rollout_of(connection, name)
            return [change_of(row) for row in await connection.execute(query)]

    async def change(
        self,
        name: str,
        action: str,
        step: Step,
        *,
        who: str,
        why: str = "",
        joins: int | None = None,
        revision: int | None = None,
        first: bool = False,
    ) -> Rollout:
        """Change a rollout by `step`, and write who did it and why; every replica follows within a second.

        `joins` is the number of a release that the change makes answer: it is vetted before. `revision` is the one the
        change was decided on: another is a Conflict. With `first` a name without a rollout gets one, with `joins` as
        its stable release.

        Raises:
            NotFound: no such rollout or release.
            Conflict: the release may not serve, or the change does not fit the state.
        """
        if joins is not None:
            await self._admit(f"{name}@{joins}")
        async with self._changing() as connection:
            return await change_rollout(
                connection, name, action, step, who=who, why=why, joins=joins, revision=revision, first=first
            )

    # --- inside ---

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[AsyncConnection]:
        """One change of the registry, which this process follows at once."""
        async with self._database.writing() as connection:
            await raise_version(connection)
            yield connection
        with suppress(Unavailable):
            await self._refresh()

    async def _admit(self, label: str) -> None:
        """Have a release vetted; raises Conflict if it may not serve."""
        entry = await self.get(label)
        if problems := await self._vet(entry.release):
            raise Conflict(f"{label} cannot serve: {' '.join(problems)}", param="release")
        fallback = entry.release.fallback
        if fallback not in (None, "extractive") and (await self.get(fallback)).approved_at is None:
            await self._admit(fallback)
        if entry.approved_at is None:
            await self._approve(entry.release)

    async def _approve(self, release: Release) -> None:
        async with self._changing() as connection:
            pending = and_(is_release(release.name, release.number), releases.c.approved_at.is_(None))
            await connection.execute(releases.update().where(pending).values(approved_at=now()))

    async def _check_fallback(self, connection: AsyncConnection, release: Release) -> None:
        if release.fallback in (None, "extractive"):
            return
        name, number = parse_label(release.fallback, param="fallback")
        if number not in await numbers_of(connection, name):
            raise InvalidRequest(f"`fallback`: there is no release {release.fallback!r}.", param="fallback")
        await self._load(connection, {(name, number)})
        found = self._known.get((name, number))
        if found is not None and found.task != release.task:
            raise InvalidRequest(f"`fallback`: {release.fallback!r} has another task.", param="fallback")

    async def _fallbacks_of(self, connection: AsyncConnection, key: tuple[str, int]) -> list[tuple[str, int]]:
        """A release's fallback, that one's own, and so on."""
        found: list[tuple[str, int]] = []
        while True:
            await self._load(connection, {key})
            fallback = self._known[key].fallback if key in self._known else None
            if fallback in (None, "extractive"):
                return found
            key = parse_label(fallback)
            found.append(key)

    async def _enroll_own(self) -> None:
        """Give the settings' release its number, and make it stable unless a person has taken the rollout over."""
        async with self._changing() as connection:
            number, _ = await enroll(connection, self._own, SETTINGS)
            own = msgspec.structs.replace(self._own, number=number)
            approved = releases.update().where(is_release(own.name, number), releases.c.approved_at.is_(None))
            await connection.execute(approved.values(approved_at=now()))
            before = await rollout_or_none(connection, own.name)
            if before is None:
                after = begin(own.name, number)
                await write_change(connection, None, after, action="promote", who=SETTINGS, why="first start")
            elif before.stable != number:
                if await self._last_change_by(connection, before) != SETTINGS:
                    log.info(
                        "%s is stable by a person's choice, so %s of the settings is not", before.stable, own.label
                    )
                else:
                    after = msgspec.structs.replace(before, revision=before.revision + 1, stable=number)
                    await write_change(
                        connection, before, after, action="promote", who=SETTINGS, why="changed settings"
                    )
        self._is_enrolled = True

    async def _last_change_by(self, connection: AsyncConnection, rollout: Rollout) -> str:
        query = select(rollout_changes.c.who).where(
            rollout_changes.c.name == rollout.name, rollout_changes.c.revision == rollout.revision
        )
        return str((await connection.execute(query)).scalar_one())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self._catch_up()

    async def _catch_up(self) -> None:
        """Take over what others changed; whatever keeps that from working, the next look may find it mended."""
        try:
            if not self._is_enrolled:
                await self._enroll_own()
            await self._refresh()
        except Unavailable as error:
            if not self._is_stale:
                log.error("The registry cannot be read; what served last goes on serving: %s", error)  # noqa: TRY400
            self._is_stale = True
        except Exception:
            if not self._is_stale:
                log.exception("The registry cannot be followed; what served last goes on serving")
            self._is_stale = True
        else:
            if self._is_stale:
                log.warning("The registry is read again")
            self._is_stale = False

    async def _refresh(self) -> None:
        """Take over what has changed; costs one number where nothing has."""
        async with self._following:
            if self._version and await self._database.number(_VERSION) == self._version:
                return
            async with self._database.reading() as connection:
                version = (await connection.execute(_VERSION)).scalar_one()
                fit = and_(releases.c.approved_at.is_not(None), releases.c.deleted_at.is_(None))
                rows = await connection.execute(select(releases.c.name, releases.c.number).where(fit))
                keys = {(name, number) for name, number in rows}
                await self._load(connection, keys)
                states = await all_rollouts(connection)
            self._serve([self._known[key] for key in sorted(keys & self._known.keys())], states)
            self._version = version
            if self._memory is not None:
                serving = self._with_fallbacks((state.name, number) for state in states for number in state.serving)
                kept = [self._known[key] for key in sorted(serving & self._known.keys())]
                await asyncio.to_thread(self._memory.keep, kept, states)

    def _with_fallbacks(self, keys: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
        """These releases, and whatever answers in their place."""
        found: set[tuple[str, int]] = set()
        waiting = list(keys)
        while waiting:
            key = waiting.pop()
            found.add(key)
            fallback = self._known[key].fallback if key in self._known else None
            if fallback not in (None, "extractive"):
                waiting.append(parse_label(fallback))
        return found

    async def _recall(self) -> None:
        """Serve what served last; where that is not known, the release of the settings, its number still open."""
        if self._memory is not None:
            self._serve(*await asyncio.to_thread(self._memory.recall))
        if not self.releases.serving:
            self._serve([self._own], [Rollout(name=self._own.name, revision=0, stable=self._own.number)])

    async def _load(self, connection: AsyncConnection, keys: set[tuple[str, int]]) -> None:
        """Read the releases among `keys` that are not known yet; one that does not verify is told and left out."""
        missing = sorted(keys - self._known.keys())
        for at in range(0, len(missing), 100):
            wanted = tuple_(releases.c.name, releases.c.number).in_(missing[at : at + 100])
            for row in await connection.execute(entries().where(wanted)):
                try:
                    self._known[row.name, row.number] = stored_release(row.number, row.canonical, row.digest)
                except BadRelease as error:
                    log.error("The release %s@%d cannot serve: %s", row.name, row.number, error)  # noqa: TRY400

    def _serve(self, found: Sequence[Release], states: Sequence[Rollout]) -> None:
        for name in self.releases.replace(found, states):
            log.error("The stable release of %r cannot serve; what served before goes on", name)
