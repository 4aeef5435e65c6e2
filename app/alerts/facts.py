"""What the conditions of one tenant and name rest on: figures, counts, and when something was last there.

The main rule: each is read once a round, whatever number of rules asks, and every query names its tenant.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import Row, case, func, select

from app.alerts.rules import BurnShare
from app.database import Database, labels, predictions
from app.predictions import Where, created_at, first_id
from app.quality import Asked, ReleaseQuality, Report

USED_SECONDS = 30 * 86_400
"""A tenant that asked nothing for so long is missed by nobody."""

Role = Literal["stable", "canary", "shadow"]

Reports = Callable[[Asked], Awaitable[Report]]
"""Makes the figures."""

_p, _l = predictions.c, labels.c


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A release that answers, or may."""

    name: str
    release: str
    digest: str
    role: Role
    paused: bool
    serving_since: int
    """When the rollout was last changed: it has served at least since then, in its role."""


class Counts(msgspec.Struct, frozen=True):
    """How many answers of a window were bad, by what was bad of them."""

    ended: int = 0
    finished: int = 0
    bad: dict[str, int] = {}

    def of(self, share: BurnShare) -> tuple[int, int]:
        """How many were bad, of how many."""
        return self.bad.get(share, 0), self.ended if share == "failed" else self.finished


class Facts:
    """Reads about one tenant and name, as things are at `now` (milliseconds since 1970)."""

    def __init__(self, database: Database, reports: Reports, tenant: str, name: str, now: int) -> None:
        self.tenant = tenant
        self.now = now
        self._database = database
        self._make = reports
        self._name = name
        self._reports: dict[float, dict[str, ReleaseQuality]] = {}
        self._counts: dict[tuple[float, float], dict[str, Counts]] = {}
        self._used: bool | None = None

    async def quality(self, window_seconds: float, release: str) -> ReleaseQuality | None:
        """The figures of a release over its last answers; None where it gave none."""
        found = self._reports.get(window_seconds)
        if found is None:
            where = Where(release=self._name, since=self._moment(window_seconds), until=_moment(self.now))
            report = await self._make(Asked(tenant=self.tenant, where=where))
            found = self._reports[window_seconds] = {each.release: each for each in report.releases}
        return found.get(release)

    async def counts(self, window_seconds: float, release: str, slow_seconds: float) -> Counts:
        """How many of a release's last answers were bad."""
        asked = window_seconds, slow_seconds
        found = self._counts.get(asked)
        if found is None:
            since = first_id(self._moment(window_seconds))
            labelled = _p.release_name.startswith(f"{self._name}@", autoescape=True)
            query = select(_p.release_name, *_counted(slow_seconds)).where(
                _p.tenant == self.tenant, _p.id >= since, _p.id < first_id(_moment(self.now)), labelled
            )
            async with self._database.reading() as connection:
                rows = (await connection.execute(query.group_by(_p.release_name))).all()
            found = self._counts[asked] = {row.release_name: _counts_of(row) for row in rows}
        return found.get(release, Counts())

    async def is_used(self) -> bool:
        """Whether the tenant asked anything of late."""
        if self._used is None:
            since = first_id(self._moment(USED_SECONDS))
            query = select(_p.id).where(_p.tenant == self.tenant, _p.id >= since).limit(1)
            async with self._database.reading() as connection:
                self._used = (await connection.execute(query)).first() is not None
        return self._used

    async def newest_answer(self, target: Target) -> int | None:
        """When a release last answered, in milliseconds since 1970."""
        query = select(_p.id).where(
            _p.tenant == self.tenant,
            _p.release_digest == target.digest,
            _p.id >= first_id(self._moment(USED_SECONDS)),
        )
        async with self._database.reading() as connection:
            newest = (await connection.execute(query.order_by(_p.id.desc()).limit(1))).scalar_one_or_none()
        return round(created_at(newest).timestamp() * 1000) if newest else None

    async def is_labelled(self, target: Target, window_ms: int) -> bool:
        """Whether any answer of a release was labelled within the window."""
        query = (
            select(_l.row)
            .join(predictions, (_p.tenant == _l.tenant) & (_p.id == _l.prediction_id))
            .where(
                _l.tenant == self.tenant,
                _l.id >= first_id(_moment(self.now - window_ms)),
                _l.withdrawn.is_(False),
                _p.release_name == target.release,
            )
        )
        async with self._database.reading() as connection:
            return (await connection.execute(query.limit(1))).first() is not None

    def _moment(self, seconds_ago: float) -> datetime:
        return _moment(self.now - round(seconds_ago * 1000))


def _counted(slow_seconds: float) -> list[Any]:
    finished = _p.outcome == "finished"
    verdict = func.coalesce(_p.verdict, "")
    bad = {
        "failed": _p.outcome.in_(("failed", "interrupted")),
        "refused": finished & ((verdict == "abstained:engine_abstained") | (_p.finish_reason == "content_filter")),
        "abstained": finished & verdict.startswith("abstained"),
        "unsupported": finished & verdict.endswith(":unsupported_answer"),
        "truncated": finished & (_p.finish_reason == "length"),
        "slow": finished & (_p.total_seconds > slow_seconds),
    }
    columns = {"ended": _p.outcome.in_(("finished", "failed", "interrupted")), "finished": finished, **bad}
    return [func.sum(case((which, 1), else_=0)).label(name) for name, which in columns.items()]


def _counts_of(row: Row[Any]) -> Counts:
    facts = {name: int(value or 0) for name, value in row._asdict().items() if name != "release_name"}
    return Counts(facts.pop("ended"), facts.pop("finished"), facts)


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
