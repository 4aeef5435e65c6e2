"""A rollout with a canary over one database, predictions as its arms leave them, and a watcher that steps when told."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select

from app.database import Database, trial_observations
from app.feedback import FeedbackLog, Given
from app.guards import TrialRecord, Trials, Watcher
from app.predictions import History, Prediction
from app.predictions.shipper import Shipper
from app.registry import Change, Registry
from app.releases import Prompt, Release
from app.rollouts import Rollout, set_canary
from app.trial_plans import TrialPlan
from tests.review_world import Clock, as_shipped, person, prediction

RELEASE = Release("hallmark", 0, "tgi", Prompt("p", "{sources} {question}"))


@dataclass
class Guarded:
    """One process's view of a rollout on trial; the clock is the watcher's."""

    database: Database
    registry: Registry
    feedback: FeedbackLog
    clock: Clock = field(default_factory=lambda: Clock(1_700_000_000_000))

    def __post_init__(self) -> None:
        self.trials = Trials(self.database)
        self.watcher = self.new_watcher()

    def new_watcher(self, **options: Any) -> Watcher:
        return Watcher(self.database, History(self.database), self.clock, **options)

    async def canary(self, share: float = 0.5, plan: TrialPlan | None = None, **content: Any) -> Rollout:
        """Put another release on trial, and have the watcher begin."""
        release = Release("hallmark", 0, "tgi", RELEASE.prompt, notes="on trial", **content)
        entry, _ = await self.registry.create(release, who="test")
        number = entry.release.number

        def step(rollout: Rollout, _: set[int]) -> Rollout:
            return set_canary(rollout, number, share, plan)

        after = await self.registry.change("hallmark", "canary", step, who="test", joins=number)
        await self.watch()
        return after

    async def answer(self, arm: str, count: int = 1, **facts: Any) -> list[str]:
        """Leave predictions of an arm, each a session of its own unless `facts` says otherwise."""
        return await self.answers([(arm, facts)] * count)

    async def answers(self, said: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Leave predictions of both arms, in their order."""
        made = []
        for arm, facts in said:
            label = "hallmark@1" if arm == "stable" else "hallmark@2"
            made.append(prediction(**{"assignment": arm, "release_name": label, "completion_tokens": 5, **facts}))
        await self.ship(*made)
        return [each.id for each in made]

    async def ship(self, *made: Prediction) -> None:
        await Shipper(None, self.database)._upsert([as_shipped(each) for each in made])  # type: ignore[arg-type]

    async def rate(self, prediction_id: str, rating: bool) -> None:
        await self.feedback.give(person(f"user of {prediction_id}"), Given(prediction_id=prediction_id, rating=rating))

    async def watch(self) -> None:
        """Step until there is nothing left to do."""
        while await self.watcher.step():
            pass

    async def trial(self) -> TrialRecord:
        return await self.trials.of("hallmark")

    async def rollout(self) -> Rollout:
        return await self.registry.rollout("hallmark")

    async def last_change(self) -> Change:
        return (await self.registry.changes("hallmark", limit=1))[0]

    async def sessions(self) -> list[str]:
        """Whose sessions were heard: the ids of their first answers, in order."""
        query = select(trial_observations.c.prediction_id).order_by(trial_observations.c.number)
        async with self.database.reading() as connection:
            return list((await connection.execute(query)).scalars())


async def _fit(_: Release) -> list[str]:
    return []


@contextlib.asynccontextmanager
async def guarded(url: str, directory: Path) -> AsyncIterator[Guarded]:
    """Open a registry and a watcher over a database."""
    async with (
        Database(url, timeout_seconds=20.0) as database,
        Registry(database, own=RELEASE, vet=_fit, poll_seconds=60.0) as registry,
        FeedbackLog(database) as feedback,
    ):
        yield Guarded(database, registry, feedback)
