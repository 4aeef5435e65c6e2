"""Looks at every rule again and again, and writes what became of its alerts; whoever calls `step` is the worker.

The main rule: a round is many small steps, each a tenant and a name, and keeps nothing but what is active: what was
found before is in the database. Two workers that do the same round write the same once.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.alerts import store
from app.alerts.builtin import BUILTIN_TIMINGS, DEPLOYMENT, outbox_findings, trial_findings
from app.alerts.conditions import DriftSource, Finding, judge
from app.alerts.facts import Facts, Reports, Role, Target
from app.alerts.rules import Rule
from app.alerts.rulesets import latest, rules_for
from app.alerts.states import Action, Alert, Subject, Timing, advance, resolve
from app.alerts.store import Silence
from app.database import Database, rollout_changes
from app.database import releases as releases_table
from app.errors import InvalidRequest, ServiceError
from app.predictions import uuid7
from app.quality.rows import Rows
from app.registry import all_rollouts
from app.rollouts import Rollout

log = logging.getLogger(__name__)

EVERY_SECONDS = 30.0
MAX_PART = 0.2
"""The part of all time that rounds may take: where one takes long, the next comes later."""
MAX_ACTIVE = 5_000
"""Alerts that may be active at once; further ones are not raised, and the log says so."""
MAX_TENANTS = 1_000

NOT_WATCHED = "It is not watched any more: the release does not serve, or the rule is gone."


class Evaluator:
    """Evaluates the rules.

    Args:
        database: shared by all replicas and workers.
        reports: makes the figures.
        clock: the time, in milliseconds since 1970.
        tells: whether there is a webhook, and so anything to put into its outbox.
        drift: whoever watches for drift.
        every_seconds: from one round to the next.
        seconds: seconds that never go back.
    """

    def __init__(
        self,
        database: Database,
        reports: Reports,
        clock: Callable[[], int],
        *,
        tells: bool,
        drift: DriftSource | None = None,
        every_seconds: float = EVERY_SECONDS,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._reports = reports
        self._rows = Rows(database)
        self._clock = clock
        self._tells = tells
        self._drift = drift
        self._every_seconds = every_seconds
        self._seconds = seconds
        self._due = seconds()
        self._round: _Round | None = None

    async def step(self) -> bool:
        """Look at the rules of one tenant and name; tells whether there is more to do at once.

        Raises:
            Unavailable: the database does not answer; the round begins anew.
        """
        if self._round is None:
            if self._seconds() < self._due:
                return False
            self._round = await self._begin()
        try:
            return await self._further(self._round)
        except BaseException:
            self._round, self._due = None, self._seconds() + self._every_seconds
            raise

    async def _begin(self) -> "_Round":
        started = self._seconds()
        async with self._database.reading() as connection:
            rollouts = await all_rollouts(connection)
            sets = await latest(connection)
            changed = await _last_changes(connection, rollouts)
            digests = await _digests(connection, rollouts)
            known = await store.active(connection, MAX_ACTIVE)
        tenants = await self._rows.tenants()
        if len(tenants) > MAX_TENANTS:
            log.error("There are %d tenants, and alerts are raised for the first %d", len(tenants), MAX_TENANTS)
        watched: list[tuple[str, list[tuple[Target, tuple[Rule, ...]]]]] = []
        for rollout in rollouts:
            targets = list(_targets(rollout, digests, changed.get(rollout.name, 0)))
            watched.append((rollout.name, [(each, rules_for(each.release, sets)[1]) for each in targets]))
        groups = iter([(tenant, *each) for tenant in sorted(tenants)[:MAX_TENANTS] for each in watched])
        return _Round(started=started, groups=groups, active={each.subject: each for each in known})

    async def _further(self, current: "_Round") -> bool:
        group = next(current.groups, None)
        if group is not None:
            await self._evaluate(current, *group)
            return True
        await self._built_in(current)
        for alert in current.active.values():
            if alert.subject not in current.seen:
                await self._write(alert, resolve(alert, self._clock(), NOT_WATCHED), "resolved")
        took = self._seconds() - current.started
        async with self._database.writing() as connection:
            await store.finish_round(self._database, connection, self._clock(), took)
        self._round = None
        self._due = current.started + max(self._every_seconds, took / MAX_PART)
        return False

    async def _evaluate(
        self, current: "_Round", tenant: str, name: str, targets: Sequence[tuple[Target, tuple[Rule, ...]]]
    ) -> None:
        now = self._clock()
        facts = Facts(self._database, self._reports, tenant, name, now)
        is_used = await facts.is_used()
        silences = await self._silences(tenant) if is_used else []
        for target, rules in targets:
            for rule in rules:
                subject = Subject(tenant, rule.name, target.release)
                current.seen.add(subject)
                if is_used:
                    found = await self._judged(rule, target, facts)
                    timing = Timing(rule.kind, rule.severity, rule.for_seconds, rule.keep_seconds)
                    await self._apply(current, subject, timing, found, silences)

    async def _judged(self, rule: Rule, target: Target, facts: Facts) -> Finding:
        try:
            return await judge(rule, target, facts, self._drift)
        except InvalidRequest as error:  # The window has too many releases for a report.
            log.warning("The rule %s of %s cannot be judged: %s", rule.name, target.release, error.code)
            return Finding(None, "The figures cannot be made.")
        except (ServiceError, SQLAlchemyError):
            raise  # Without the database there is nothing to be said of any rule.
        except Exception as error:  # noqa: BLE001 - one rule of one tenant must not end what watches all of them.
            log.error(  # noqa: TRY400 - what a figure fails on may quote what somebody wrote.
                "The rule %s of %s cannot be judged: %s", rule.name, target.release, type(error).__name__
            )
            return Finding(None, "The figures cannot be made.")

    async def _built_in(self, current: "_Round") -> None:
        now = self._clock()
        found = {**await trial_findings(self._database, now), **await outbox_findings(self._database, now)}
        silences = await self._silences(DEPLOYMENT)
        for subject, finding in found.items():
            current.seen.add(subject)
            await self._apply(current, subject, BUILTIN_TIMINGS[subject.rule], finding, silences)

    async def _silences(self, tenant: str) -> list[Silence]:
        async with self._database.reading() as connection:
            # A rule may have the name of one that is the deployment's, and is silenced along with it.
            return await store.silences_of(connection, {tenant, DEPLOYMENT}, self._clock())

    async def _apply(
        self, current: "_Round", subject: Subject, timing: Timing, finding: Finding, silences: Sequence[Silence]
    ) -> None:
        before = current.active.get(subject)
        if before is None and len(current.active) >= MAX_ACTIVE:
            return
        after, action = advance(before, subject, timing, finding, self._clock(), uuid7())
        silent = any(silence.covers(subject) for silence in silences)
        if after is not None and after.state == "firing" and not after.told and not silent:
            after, action = msgspec.structs.replace(after, told=True), action or "firing"
        elif before is after:
            return
        await self._write(before, after, action)

    async def _write(self, before: Alert | None, after: Alert | None, action: Action | None) -> None:
        """Write a change with its event and notification, or nothing where another worker was quicker."""
        now = self._clock()
        async with self._database.writing() as connection:
            if after is None:
                if before is not None:
                    await store.drop(connection, before)
                return
            if before is None:
                written = await store.insert(self._database, connection, after)
            else:
                written = await store.replace(connection, before, after)
            if not written or action is None:
                return
            number = before.version + 1 if before else 0
            await store.note(connection, after.id, number, now, action, after.why, after.facts)
            is_told = after.told and action in ("firing", "resolved")
            if is_told and self._tells:
                await store.notify(connection, after, action, now)
        _log(after, action, silent=action != "pending" and not is_told)


class _Round(msgspec.Struct):
    """One look at everything."""

    started: float
    groups: Iterator[tuple[str, str, list[tuple[Target, tuple[Rule, ...]]]]]
    active: dict[Subject, Alert]
    seen: set[Subject] = msgspec.field(default_factory=set)


def _log(alert: Alert, action: Action, *, silent: bool) -> None:
    """Say it in the log, silenced or not."""
    level = logging.ERROR if action == "firing" and not silent else logging.INFO
    subject = alert.subject
    log.log(
        level,
        "The alert %s of %s is %s%s: %s",
        subject.rule,
        subject.release or "the deployment",
        action,
        " (silenced)" if silent else "",
        alert.why,
        extra={
            "alert": alert.id,
            "rule": subject.rule,
            "release": subject.release,
            "tenant": subject.tenant,
            "severity": alert.severity,
        },
    )


def _targets(rollout: Rollout, digests: dict[tuple[str, int], str], changed_at: int) -> Iterator[Target]:
    roles: list[tuple[int | None, Role]] = [
        (rollout.stable, "stable"),
        (rollout.canary, "canary"),
        (rollout.shadow, "shadow"),
    ]
    for number, role in roles:
        if number is not None and (rollout.name, number) in digests:
            yield Target(
                name=rollout.name,
                release=f"{rollout.name}@{number}",
                digest=digests[rollout.name, number],
                role=role,
                paused=rollout.paused and role != "stable",
                serving_since=changed_at,
            )


async def _last_changes(connection: AsyncConnection, rollouts: Sequence[Rollout]) -> dict[str, int]:
    """When each rollout was last changed."""
    column, found = rollout_changes.c, {}
    for rollout in rollouts:
        query = select(column.at).where(column.name == rollout.name, column.revision == rollout.revision)
        found[rollout.name] = (await connection.execute(query)).scalar_one_or_none() or 0
    return found


async def _digests(connection: AsyncConnection, rollouts: Sequence[Rollout]) -> dict[tuple[str, int], str]:
    column, found = releases_table.c, dict[tuple[str, int], str]()
    for rollout in rollouts:
        query = select(column.number, column.digest).where(
            column.name == rollout.name, column.number.in_(rollout.serving)
        )
        found |= {(rollout.name, row.number): row.digest for row in await connection.execute(query)}
    return found
