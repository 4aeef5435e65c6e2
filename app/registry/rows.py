"""Releases and rollouts as rows of the database and back, and the statements that move them."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Row, Select, and_, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import registry, releases, rollout_changes, rollouts
from app.errors import Conflict, NotFound
from app.releases import BadRelease, Release, stored_release
from app.rollouts import Rollout, begin

Step = Callable[[Rollout, set[int]], Rollout]
"""Makes the next state of a rollout; given the numbers of the releases there are."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A release as the registry has it; times are milliseconds since 1970."""

    release: Release
    created_at: int
    created_by: str | None = None
    approved_at: int | None = None
    """When it was first found fit to serve."""
    deleted_at: int | None = None
    problems: tuple[str, ...] = ()
    """What kept it from serving when it was last looked at, where that was just now."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a rollout."""

    name: str
    revision: int
    at: int
    who: str
    why: str
    action: str
    before: Rollout | None
    after: Rollout


def is_release(name: str, number: int) -> Any:
    """The condition that a row is this release."""
    return and_(releases.c.name == name, releases.c.number == number)


def entries() -> Select[Any]:
    """The query for releases that `entry_of` reads."""
    return select(releases)


def entry_of(row: Row[Any]) -> Entry:
    """Read a release; raises Conflict if it does not verify."""
    try:
        release = stored_release(row.number, row.canonical, row.digest)
    except BadRelease as error:
        raise Conflict(f"The release {row.name}@{row.number} cannot be read: {error}") from error
    return Entry(
        release=release,
        created_at=row.created_at,
        created_by=row.created_by,
        approved_at=row.approved_at,
        deleted_at=row.deleted_at,
    )


def change_of(row: Row[Any]) -> Change:
    """Read a change of a rollout."""
    before = msgspec.json.decode(row.before, type=Rollout) if row.before else None
    after = msgspec.json.decode(row.after, type=Rollout)
    return Change(
        name=row.name,
        revision=row.revision,
        at=row.at,
        who=row.who,
        why=row.why,
        action=row.action,
        before=before,
        after=after,
    )


async def enroll(connection: AsyncConnection, release: Release, who: str) -> tuple[int, bool]:
    """Find the number of a release, or give it the next of its name; the number belongs to the digest for ever."""
    same = and_(releases.c.name == release.name, releases.c.digest == release.digest)
    row = (await connection.execute(entries().where(same))).one_or_none()
    if row is not None:
        if row.deleted_at is not None:
            await connection.execute(releases.update().where(same).values(deleted_at=None))
        return int(row.number), False
    highest = select(func.coalesce(func.max(releases.c.number), 0)).where(releases.c.name == release.name)
    number = (await connection.execute(highest)).scalar_one() + 1
    await connection.execute(
        releases.insert().values(
            name=release.name,
            number=number,
            digest=release.digest,
            canonical=release.canonical.decode(),
            created_at=now(),
            created_by=who,
        )
    )
    return number, True


async def numbers_of(connection: AsyncConnection, name: str) -> set[int]:
    """The numbers of the releases of a name."""
    query = select(releases.c.number).where(releases.c.name == name, releases.c.deleted_at.is_(None))
    return set((await connection.execute(query)).scalars())


async def all_rollouts(connection: AsyncConnection) -> list[Rollout]:
    """The rollouts by name."""
    query = select(rollouts.c.state).order_by(rollouts.c.name)
    return [msgspec.json.decode(state, type=Rollout) for state in (await connection.execute(query)).scalars()]


async def rollout_or_none(connection: AsyncConnection, name: str) -> Rollout | None:
    """A name's rollout, if it has one."""
    query = select(rollouts.c.state).where(rollouts.c.name == name)
    state = (await connection.execute(query)).scalar_one_or_none()
    return msgspec.json.decode(state, type=Rollout) if state is not None else None


async def rollout_of(connection: AsyncConnection, name: str) -> Rollout:
    """A name's rollout; raises NotFound if it has none."""
    found = await rollout_or_none(connection, name)
    if found is None:
        raise await no_rollout(connection, name)
    return found


async def no_rollout(connection: AsyncConnection, name: str) -> NotFound:
    """What to raise for a name without a rollout: it says which there are."""
    known = ", ".join(repr(rollout.name) for rollout in await all_rollouts(connection))
    return NotFound(
        f"{name[:64]!r} has no rollout; there is {known or 'none'}. Promote a release of that name to begin one.",
        param="name",
    )


def _json(rollout: Rollout) -> str:
    return msgspec.json.encode(rollout).decode()


async def write_change(
    connection: AsyncConnection, before: Rollout | None, after: Rollout, *, action: str, who: str, why: str
) -> None:
    """Write the next state of a rollout with its audit row."""
    row = {"revision": after.revision, "state": _json(after)}
    if before is None:
        await connection.execute(rollouts.insert().values(name=after.name, **row))
    else:
        await connection.execute(rollouts.update().where(rollouts.c.name == after.name).values(**row))
    await connection.execute(
        rollout_changes.insert().values(
            name=after.name,
            revision=after.revision,
            at=now(),
            who=who,
            why=why,
            action=action,
            before=_json(before) if before else None,
            after=_json(after),
        )
    )


async def raise_version(connection: AsyncConnection) -> None:
    """Say that something changes: the first statement of every change, for which the next one waits."""
    await connection.execute(registry.update().values(version=registry.c.version + 1))


async def change_rollout(
    connection: AsyncConnection,
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
    """Do `Registry.change` in a transaction that has raised the version, without vetting what joins."""
    available = await numbers_of(connection, name)
    if joins is not None and joins not in available:
        raise NotFound(f"There is no release '{name}@{joins}' any more.", param="release")
    before = await rollout_or_none(connection, name)
    at = before.revision if before else 0
    if revision is not None and revision != at:
        raise Conflict(f"The rollout of {name} is at revision {at}, not {revision}: look again.", param="revision")
    if before is not None:
        after = step(before, available)
    elif first and joins is not None:
        after = begin(name, joins)
    else:
        raise await no_rollout(connection, name)
    await write_change(connection, before, after, action=action, who=who, why=why)
    return after


def now() -> int:
    """Milliseconds since 1970, as the tables count."""
    return time.time_ns() // 1_000_000
