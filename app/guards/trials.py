"""Trials as rows of the database and back: what is known in each, and the observations that it follows from."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import Row, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, trial_observations, trials
from app.errors import NotFound
from app.guards.judging import Decision, State
from app.predictions import Settled
from app.trial_plans import TrialPlan
from observability.sequential import Arm

Status = Literal["running", "rolled_back", "ended"]
"""`rolled_back` by a guard; `ended` by a person, who promoted it, rolled it back, or began another."""

Kind = Literal["answer", "feedback"]

MAX_RECENT = 1_000

_t, _o = trials.c, trial_observations.c


class TrialRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A trial as it is on record; times are milliseconds since 1970."""

    id: str
    name: str
    stable: int
    canary: int
    plan: TrialPlan
    status: Status
    state: State
    observations: int
    position: Settled | None
    """The last prediction that was looked at."""
    feedback_position: int
    started_at: int
    updated_at: int
    heard_at: int
    """When the canary was last heard of, or the trial began."""
    alarm: str | None
    """What keeps the trial from coming to an end, where something does."""
    decision: Decision | None

    def label(self, arm: Arm) -> str:
        """The release of an arm, as `name@3`."""
        return f"{self.name}@{self.stable if arm == 'stable' else self.canary}"


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """One session's word, as it is on record."""

    number: int
    kind: Kind
    arm: Arm
    badness: dict[str, float]
    at: int


class Trials:
    """The trials of the database that all replicas share, for those who want to know."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of(self, name: str) -> TrialRecord:
        """Find a name's trial, or its last one; raises NotFound if no worker has seen any."""
        query = select(trials).where(_t.name == name).order_by(_t.started_at.desc(), _t.id).limit(1)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound(
                f"{name[:64]!r} has had no trial. One begins when a canary is set and `hallmark worker` runs.",
                param="name",
            )
        return record_of(row)

    async def recent(self, ended_since: int) -> list[TrialRecord]:
        """List the trials that run, and those that ended since then, the oldest first."""
        wanted = or_(_t.status == "running", _t.updated_at >= ended_since)
        query = select(trials).where(wanted).order_by(_t.started_at, _t.id).limit(MAX_RECENT)
        async with self._database.reading() as connection:
            return [record_of(row) for row in await connection.execute(query)]

    async def heard(self, trial_id: str, *, after: int = 0, limit: int = 1_000) -> list[Heard]:
        """List a trial's observations in their order, those with a number above `after`."""
        wanted = (_o.number, _o.kind, _o.arm, _o.badness, _o.at)
        query = select(*wanted).where(_o.trial == trial_id, _o.number > after).order_by(_o.number).limit(limit)
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
        return [
            Heard(number=row.number, kind=row.kind, arm=row.arm, badness=msgspec.json.decode(row.badness), at=row.at)
            for row in rows
        ]


def record_of(row: Row[Any]) -> TrialRecord:
    """Read a trial."""
    return TrialRecord(
        id=row.id,
        name=row.name,
        stable=row.stable,
        canary=row.canary,
        plan=msgspec.json.decode(row.plan, type=TrialPlan),
        status=row.status,
        state=msgspec.json.decode(row.state, type=State),
        observations=row.observations,
        position=None if row.position is None or row.position_id is None else Settled(row.position, row.position_id),
        feedback_position=row.feedback_position,
        started_at=row.started_at,
        updated_at=row.updated_at,
        heard_at=row.heard_at,
        alarm=row.alarm,
        decision=msgspec.json.decode(row.decision, type=Decision) if row.decision else None,
    )


def values_of(record: TrialRecord) -> dict[str, Any]:
    """The columns of a trial."""
    position = record.position
    return {
        "id": record.id,
        "name": record.name,
        "stable": record.stable,
        "canary": record.canary,
        "plan": _json(record.plan),
        "status": record.status,
        "state": _json(record.state),
        "observations": record.observations,
        "position": position.row if position else None,
        "position_id": position.id if position else None,
        "feedback_position": record.feedback_position,
        "started_at": record.started_at,
        "updated_at": record.updated_at,
        "heard_at": record.heard_at,
        "alarm": record.alarm,
        "decision": _json(record.decision) if record.decision else None,
    }


async def running(connection: AsyncConnection) -> list[TrialRecord]:
    """The trials that have not ended."""
    rows = await connection.execute(select(trials).where(_t.status == "running").order_by(_t.id))
    return [record_of(row) for row in rows]


async def arms_of(
    connection: AsyncConnection, trial_id: str, kind: Kind, sessions: Sequence[bytes]
) -> dict[bytes, str]:
    """Which of these sessions were heard, and on which arm."""
    query = select(_o.session, _o.arm).where(_o.trial == trial_id, _o.kind == kind, _o.session.in_(sessions))
    return {row.session: row.arm for row in await connection.execute(query)} if sessions else {}


async def replace(connection: AsyncConnection, before: TrialRecord, after: TrialRecord) -> bool:
    """Write what a trial has become; nothing, and False, where somebody else has taken it further."""
    same = (
        _t.id == before.id,
        _t.status == before.status,
        _t.observations == before.observations,
        _t.position.is_not_distinct_from(before.position.row if before.position else None),
        _t.feedback_position == before.feedback_position,
    )
    return bool((await connection.execute(trials.update().where(*same).values(**values_of(after)))).rowcount)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
