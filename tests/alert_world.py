"""A release that serves, the answers it gave, and an evaluator that looks when it is told; the clock is a test's."""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.access import KeyStore
from app.alerts import Alert, Alerts, Evaluator, Notification, RuleSets, read_rules
from app.database import Database
from app.drift import UNKNOWN, DriftState, Kind
from app.guards import Watcher
from app.predictions import History
from app.predictions.shipper import Shipper
from app.quality.making import Maker
from app.registry import Registry
from app.releases import Release
from app.rollouts import Rollout, set_canary
from tests.guard_world import RELEASE
from tests.review_world import Clock, as_shipped, prediction

TENANT = "acme"


def drifted(*kinds: Kind) -> DriftState:
    """What a watcher of drift says who found these to have changed, or nothing."""
    examples = ("p1", "p2") if kinds else ()
    return DriftState(alarm=bool(kinds), since=1 if kinds else None, kinds=kinds, examples=examples, windows=2)


@dataclass
class Drift:
    """A watcher of drift that says what it is told to."""

    states: dict[tuple[str, str], DriftState] = field(default_factory=dict)

    async def state(self, tenant: str, release: str) -> DriftState:
        return self.states.get((tenant, release), UNKNOWN)


@dataclass
class Alerting:
    """One deployment with its alerts."""

    database: Database
    registry: Registry
    clock: Clock = field(default_factory=lambda: Clock(time.time_ns() // 1_000_000))
    drift: Drift = field(default_factory=Drift)

    def __post_init__(self) -> None:
        self.alerts = Alerts(self.database, self.clock)
        self.rules = RuleSets(self.database, self.clock)
        self.evaluator = self.new_evaluator()

    def new_evaluator(self, **options: Any) -> Evaluator:
        given = {"tells": True, "drift": self.drift, "seconds": self._seconds, **options}
        return Evaluator(self.database, Maker(self.database).make, self.clock, **given)

    def _seconds(self) -> float:
        return self.clock.now / 1000

    async def set_rules(self, *rules: dict[str, Any], target: str = "hallmark") -> None:
        await self.rules.set(target, read_rules(rules), who="test", why="")

    async def look(self, *, after_seconds: float = 30.0, evaluator: Evaluator | None = None) -> None:
        """Let time pass, and look at every rule once."""
        self.clock.pass_seconds(after_seconds)
        while await (evaluator or self.evaluator).step():
            pass

    async def answer(self, count: int = 1, **facts: Any) -> list[str]:
        """Leave answers of the stable release."""
        made = [prediction(**{"tenant": TENANT, "assignment": "stable", **facts}) for _ in range(count)]
        await Shipper(None, self.database)._upsert([as_shipped(each) for each in made])  # type: ignore[arg-type]
        self.clock.now = max(self.clock.now, time.time_ns() // 1_000_000 + 1)
        return [each.id for each in made]

    async def active(self, tenant: str = TENANT) -> list[Alert]:
        return await self.alerts.find(tenant, states=("pending", "firing"))

    async def only(self, tenant: str = TENANT) -> Alert:
        (found,) = await self.active(tenant)
        return found

    async def told(self, tenant: str = TENANT) -> list[str]:
        """What was put into the outbox, in its order."""
        return [each.action for each in await self.notifications(tenant)]

    async def notifications(self, tenant: str = TENANT) -> list[Notification]:
        found = await self.alerts.notifications(tenant, state=None, limit=200, before=None)
        for each in found:
            json.loads(each.body)
        return found[::-1]

    async def canary(self, share: float = 0.5) -> Rollout:
        """Put another release on trial, and have the guards begin."""
        release = Release("hallmark", 0, "tgi", RELEASE.prompt, notes="on trial")
        entry, _ = await self.registry.create(release, who="test")
        number = entry.release.number
        step = lambda rollout, _: set_canary(rollout, number, share)  # noqa: E731
        after = await self.registry.change("hallmark", "canary", step, who="test", joins=number)
        await self.watch()
        return after

    async def watch(self) -> None:
        """Let the guards do what there is to do."""
        watcher = Watcher(self.database, History(self.database), self.clock)
        while await watcher.step():
            pass


async def _fit(_: Release) -> list[str]:
    return []


@contextlib.asynccontextmanager
async def alerting(where: str | Path) -> AsyncIterator[Alerting]:
    """Open a deployment over a new database, with one tenant."""
    database = Database.of_file(where) if isinstance(where, Path) else Database(where, timeout_seconds=20.0)
    async with database, Registry(database, own=RELEASE, vet=_fit, poll_seconds=60.0) as registry:
        await KeyStore(database).create(name="test", tenant=TENANT, scopes=("chat",))
        yield Alerting(database, registry)
