"""Alerts, their history, silences and what is to be told, as rows of the database; and the questions to them.

The main rule: a change of an alert is one transaction with its event and its notification, and is made only if the
alert is as whoever changes it saw it. So workers may do the same work, and be killed at any moment.
"""

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, Row, delete, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.alerts.builtin import BUILTIN_TIMINGS, DEPLOYMENT
from app.alerts.states import Action, Alert, State, Subject
from app.database import (
    Database,
    alert_events,
    alert_notifications,
    alert_rounds,
    alert_silences,
    alerts,
)
from app.errors import Conflict, NotFound
from app.predictions import uuid7

ANY = "*"
MAX_SILENCE_SECONDS = 30 * 86_400

NotificationState = Literal["waiting", "delivered", "dead"]
"""`dead`: nobody took it for a day, and it is not tried again."""

_a, _e, _n, _s = alerts.c, alert_events.c, alert_notifications.c, alert_silences.c
_is_active = _a.state != "resolved"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to an alert."""

    at: int
    action: str
    who: str | None
    """Who did it, where a person did."""
    why: str
    facts: dict[str, Any]


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """For so long nobody is told of these alerts; they are found and kept as ever."""

    id: str
    tenant: str
    rule: str
    release: str
    until: int
    at: int
    who: str
    why: str

    def covers(self, subject: Subject) -> bool:
        """Whether it is about an alert; a release without its number is every one of that name."""
        name, _, _ = subject.release.partition("@")
        return self.rule in (ANY, subject.rule) and self.release in (ANY, subject.release, name)


class Notification(msgspec.Struct, frozen=True, kw_only=True):
    """Something to tell by the webhook."""

    id: str
    tenant: str
    alert: str
    action: str
    body: str
    state: NotificationState
    attempts: int
    next_at: int
    created_at: int
    ended_at: int | None
    problem: str | None


class Alerts:
    """The alerts of the database that all replicas share, for those who want to know or to say something of them.

    A tenant sees its own, and those of the deployment.
    """

    def __init__(self, database: Database, clock: Any) -> None:
        """`clock` gives milliseconds since 1970."""
        self._database = database
        self._clock = clock

    async def find(
        self,
        tenant: str,
        *,
        states: Collection[State] | None = None,
        release: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[Alert]:
        """List alerts, the newest first, from before an id on."""
        query = select(alerts).where(_seen_by(tenant, _a.tenant))
        if states is not None:
            query = query.where(_a.state.in_(list(states)))
        if release is not None:
            query = query.where(_a.release == release)
        if before is not None:
            query = query.where(_a.id < before)
        async with self._database.reading() as connection:
            return [alert_of(row) for row in await connection.execute(query.order_by(_a.id.desc()).limit(limit))]

    async def get(self, tenant: str, alert_id: str) -> tuple[Alert, list[Event]]:
        """Find an alert with its history; raises NotFound."""
        async with self._database.reading() as connection:
            alert = await self._one(connection, tenant, alert_id)
            query = select(alert_events).where(_e.alert == alert_id).order_by(_e.number)
            return alert, [_event_of(row) for row in await connection.execute(query)]

    async def acknowledge(self, tenant: str, alert_id: str, *, who: str, why: str) -> Alert:
        """Say that somebody looks after an alert; raises NotFound, or Conflict where it is resolved."""
        async with self._database.writing() as connection:
            alert = await self._one(connection, tenant, alert_id, lock=True)
            if alert.state == "resolved":
                raise Conflict("The alert is resolved: there is nothing left to look after.")
            now = self._clock()
            after = msgspec.structs.replace(alert, acknowledged_at=now, acknowledged_by=who)
            await replace(connection, alert, after)
            await note(connection, alert_id, alert.version + 1, now, "acknowledged", why, {}, who=who)
            return msgspec.structs.replace(after, version=alert.version + 1)

    async def silence(self, tenant: str, *, rule: str, release: str, seconds: float, who: str, why: str) -> Silence:
        """Tell nobody of these alerts for so long; `*` is any rule of the tenant, or any release.

        What is looked at without a rule is the deployment's: it is silenced by its name, and for every tenant.
        """
        now = self._clock()
        made = Silence(
            id=uuid7(),
            tenant=DEPLOYMENT if rule in BUILTIN_TIMINGS else tenant,
            rule=rule,
            release=release,
            until=now + round(seconds * 1000),
            at=now,
            who=who,
            why=why,
        )
        async with self._database.writing() as connection:
            await connection.execute(alert_silences.insert().values(**msgspec.structs.asdict(made)))
        return made

    async def silences(self, tenant: str) -> list[Silence]:
        """List the tenant's silences that hold now, and the deployment's."""
        async with self._database.reading() as connection:
            return await silences_of(connection, [tenant, DEPLOYMENT], self._clock())

    async def end_silence(self, tenant: str, silence_id: str) -> None:
        """End a silence before its time; raises NotFound."""
        now = self._clock()
        held = (_s.id == silence_id, _seen_by(tenant, _s.tenant), _s.until > now, _s.ended_at.is_(None))
        async with self._database.writing() as connection:
            done = await connection.execute(alert_silences.update().where(*held).values(ended_at=now))
            if not done.rowcount:
                raise NotFound(f"There is no silence {silence_id[:64]!r} that still holds.", param="silence_id")

    async def notifications(
        self, tenant: str, *, state: NotificationState | None, limit: int, before: str | None
    ) -> list[Notification]:
        """List what was or is to be told, the newest first."""
        query = select(alert_notifications).where(_seen_by(tenant, _n.tenant))
        if state is not None:
            query = query.where(_n.state == state)
        if before is not None:
            query = query.where(_n.id < before)
        async with self._database.reading() as connection:
            rows = await connection.execute(query.order_by(_n.id.desc()).limit(limit))
            return [notification_of(row) for row in rows]

    async def test(self, tenant: str) -> Notification:
        """Have a worker tell something that is no alert, to see whether it arrives."""
        now, test_id = self._clock(), uuid7()
        body = _json({"type": "alert.test", "timestamp": _iso(now), "data": {"id": test_id, "tenant": tenant}})
        async with self._database.writing() as connection:
            made = await _enqueue(connection, tenant, test_id, "test", body, now)
            query = select(alert_notifications).where(_n.id == made)
            return notification_of((await connection.execute(query)).one())

    async def _one(self, connection: AsyncConnection, tenant: str, alert_id: str, *, lock: bool = False) -> Alert:
        query = select(alerts).where(_a.id == alert_id, _seen_by(tenant, _a.tenant))
        row = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
        if row is None:
            raise NotFound(f"There is no alert {alert_id!r}; `GET /v1/alerts` lists them.", param="alert_id")
        return alert_of(row)


def _seen_by(tenant: str, column: ColumnElement[str]) -> ColumnElement[bool]:
    return or_(column == tenant, column == DEPLOYMENT)


async def active(connection: AsyncConnection, limit: int) -> list[Alert]:
    """The alerts that are not resolved, of every tenant."""
    query = select(alerts).where(_is_active).order_by(_a.id).limit(limit)
    return [alert_of(row) for row in await connection.execute(query)]


async def silences_of(connection: AsyncConnection, tenants: Iterable[str], now: int) -> list[Silence]:
    """The silences of these tenants that hold."""
    held = (_s.tenant.in_(list(tenants)), _s.until > now, _s.ended_at.is_(None))
    columns = [column for column in alert_silences.c if column.name != "ended_at"]
    query = select(*columns).where(*held).order_by(_s.id).limit(1_000)
    return [Silence(**row._asdict()) for row in await connection.execute(query)]


async def insert(database: Database, connection: AsyncConnection, alert: Alert) -> bool:
    """Write a new alert; nothing, and False, where there is one about the same already."""
    row = database.insert(alerts).values(**_values(alert)).on_conflict_do_nothing()
    return bool((await connection.execute(row)).rowcount)


async def replace(connection: AsyncConnection, before: Alert, after: Alert) -> bool:
    """Write what an alert has become; nothing, and False, where somebody else has changed it meanwhile."""
    values = {**_values(after), "version": before.version + 1}
    same = (_a.id == before.id, _a.version == before.version)
    return bool((await connection.execute(alerts.update().where(*same).values(**values))).rowcount)


async def drop(connection: AsyncConnection, alert: Alert) -> None:
    """Forget an alert that never fired."""
    done = await connection.execute(delete(alerts).where(_a.id == alert.id, _a.version == alert.version))
    if done.rowcount:
        await connection.execute(delete(alert_events).where(_e.alert == alert.id))


async def note(
    connection: AsyncConnection,
    alert_id: str,
    number: int,
    at: int,
    action: str,
    why: str,
    facts: dict[str, Any],
    *,
    who: str | None = None,
) -> None:
    """Append to the history of an alert."""
    row = {"alert": alert_id, "number": number, "at": at, "action": action, "why": why, "facts": _json(facts)}
    await connection.execute(alert_events.insert().values(**row, who=who))


async def notify(connection: AsyncConnection, alert: Alert, action: Action, now: int) -> None:
    """Put into the outbox what is to be told of an alert."""
    await _enqueue(connection, alert.subject.tenant, alert.id, action, body_of(alert, action, now), now)


async def _enqueue(connection: AsyncConnection, tenant: str, alert_id: str, action: str, body: str, now: int) -> str:
    row = {"id": uuid7(), "tenant": tenant, "alert": alert_id, "action": action, "body": body, "state": "waiting"}
    times = {"attempts": 0, "next_at": now, "created_at": now}
    await connection.execute(alert_notifications.insert().values(**row, **times))
    return row["id"]


def body_of(alert: Alert, action: str, now: int) -> str:
    """What is told: who, what and how much, and nothing that anybody asked or was answered."""
    subject = alert.subject
    data = {
        "id": alert.id,
        "tenant": subject.tenant or None,
        "rule": subject.rule,
        "release": subject.release or None,
        "kind": alert.kind,
        "severity": alert.severity,
        "state": alert.state,
        "since": _iso(alert.since),
        "fired_at": _iso(alert.fired_at),
        "resolved_at": _iso(alert.resolved_at),
        "why": alert.why,
        "facts": alert.facts,
    }
    return _json({"type": f"alert.{action}", "timestamp": _iso(now), "data": data})


async def finish_round(database: Database, connection: AsyncConnection, at: int, seconds: float) -> None:
    """Note that all rules were looked at."""
    row = database.insert(alert_rounds).values(id=1, at=at, seconds=seconds)
    update = row.on_conflict_do_update(index_elements=["id"], set_={"at": at, "seconds": seconds})
    await connection.execute(update)


async def tally(connection: AsyncConnection) -> tuple[list[Row[Any]], dict[str, int], int | None]:
    """Active alerts by kind, severity, state and release; notifications by state; when rules were last looked at."""
    labels = (_a.kind, _a.severity, _a.state, _a.release)
    counted = select(*labels, func.count().label("number")).where(_is_active).group_by(*labels).limit(1_000)
    rows = list((await connection.execute(counted)).all())
    states = select(_n.state, func.count().label("number")).where(_n.state != "delivered").group_by(_n.state)
    told: dict[str, int] = {row.state: row.number for row in await connection.execute(states)}
    at = (await connection.execute(select(alert_rounds.c.at))).scalar_one_or_none()
    return rows, told, at


def alert_of(row: Row[Any]) -> Alert:
    """Read an alert."""
    facts = row._asdict()
    subject = Subject(facts.pop("tenant"), facts.pop("rule"), facts.pop("release"))
    return Alert(**{**facts, "subject": subject, "facts": msgspec.json.decode(facts["facts"])})


def notification_of(row: Row[Any]) -> Notification:
    """Read a notification."""
    return Notification(**row._asdict())


def _event_of(row: Row[Any]) -> Event:
    return Event(at=row.at, action=row.action, who=row.who, why=row.why, facts=msgspec.json.decode(row.facts))


def _values(alert: Alert) -> dict[str, Any]:
    values = msgspec.structs.asdict(alert)
    subject = msgspec.structs.asdict(values.pop("subject"))
    return {**values, **subject, "facts": _json(alert.facts)}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _iso(moment: int | None) -> str | None:
    if moment is None:
        return None
    return datetime.fromtimestamp(moment / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
