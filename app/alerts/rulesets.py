"""The sets of rules that hold, by release and by name; every revision is kept with who set it and why."""

from collections.abc import Callable, Sequence

import msgspec
from sqlalchemy import Row, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.alerts.rules import DEFAULT_RULES, Rule, decode_rules, encode_rules
from app.database import Database, alert_rules
from app.errors import Conflict

_r = alert_rules.c


class RuleSet(msgspec.Struct, frozen=True, kw_only=True):
    """One revision of a set."""

    target: str
    """A name, or one of its releases as `name@3`."""
    revision: int
    rules: tuple[Rule, ...] | None
    """None where the set was taken away: then what is more general holds."""
    at: int
    """Milliseconds since 1970."""
    who: str
    why: str


class RuleSets:
    """Keeps sets of rules; `clock` gives milliseconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], int]) -> None:
        self._database = database
        self._clock = clock

    async def all(self) -> list[RuleSet]:
        """List the sets that hold, by target."""
        async with self._database.reading() as connection:
            return [found for found in await latest(connection) if found.rules is not None]

    async def history(self, target: str, *, limit: int) -> list[RuleSet]:
        """List the revisions of a set, the newest first."""
        query = select(alert_rules).where(_r.target == target).order_by(_r.revision.desc()).limit(limit)
        async with self._database.reading() as connection:
            return [_set_of(row) for row in await connection.execute(query)]

    async def holding(self, target: str) -> tuple[str | None, tuple[Rule, ...]]:
        """The rules that hold for a target, and whose they are: None where they are the usual ones."""
        async with self._database.reading() as connection:
            return rules_for(target, await latest(connection))

    async def set(
        self, target: str, rules: Sequence[Rule] | None, *, who: str, why: str, revision: int | None = None
    ) -> RuleSet:
        """Set the rules of a target, or take them away; the same again is no change.

        `revision` is the one the change was decided on, 0 where there was none: another is a Conflict.
        """
        async with self._database.writing() as connection:
            await self._database.one_at_a_time(connection, alert_rules.name)
            query = select(alert_rules).where(_r.target == target).order_by(_r.revision.desc()).limit(1)
            row = (await connection.execute(query)).one_or_none()
            at = row.revision if row else 0
            if revision is not None and revision != at:
                raise Conflict(
                    f"The rules of {target} are at revision {at}, not {revision}: look again.", param="revision"
                )
            wanted = tuple(rules) if rules is not None else None
            if row is not None and _set_of(row).rules == wanted:
                return _set_of(row)
            made = RuleSet(
                target=target,
                revision=at + 1,
                rules=wanted,
                at=self._clock(),
                who=who,
                why=why,
            )
            kept = encode_rules(wanted) if wanted is not None else None
            await connection.execute(alert_rules.insert().values(**{**msgspec.structs.asdict(made), "rules": kept}))
            return made


async def latest(connection: AsyncConnection) -> list[RuleSet]:
    """The last revision of every set."""
    newest = select(_r.target, func.max(_r.revision).label("revision")).group_by(_r.target).subquery()
    same = (_r.target == newest.c.target) & (_r.revision == newest.c.revision)
    rows = await connection.execute(select(alert_rules).join(newest, same).order_by(_r.target))
    return [_set_of(row) for row in rows]


def rules_for(target: str, sets: Sequence[RuleSet]) -> tuple[str | None, tuple[Rule, ...]]:
    """Choose among sets: the release's own, else its name's, else the usual rules."""
    known = {each.target: each.rules for each in sets if each.rules is not None}
    for candidate in (target, target.partition("@")[0]):
        if candidate in known:
            return candidate, known[candidate]
    return None, DEFAULT_RULES


def _set_of(row: Row[tuple[object, ...]]) -> RuleSet:
    rules = decode_rules(row.rules) if row.rules is not None else None
    return RuleSet(target=row.target, revision=row.revision, rules=rules, at=row.at, who=row.who, why=row.why)
