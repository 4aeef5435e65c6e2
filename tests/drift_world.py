"""Questions and answers as a service leaves them, over one database, and a watcher that steps when told."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import select

from app.database import Database, drift_windows
from app.drift import Drift, DriftPlan, References
from app.drift.watching import DriftWatcher
from app.predictions import History
from app.predictions.embeddings import pack
from app.predictions.shipper import Shipper
from app.review import Queues, Raising, Rules
from tests.review_world import EPOCH, Clock, as_shipped, prediction

MODEL = "test-model"
SMALL = DriftPlan(reference_sessions=400, window_sessions=200)
DIMENSION = 24
_random = np.random.default_rng(20_261_128)
_TOPICS = _random.normal(size=(8, DIMENSION))


def vector(topic: int, random: np.random.Generator, spread: float = 0.35) -> np.ndarray:
    """A question of a topic; 0 to 5 are what people ask, 6 and 7 are new."""
    found = _TOPICS[topic] + random.normal(size=DIMENSION) * spread * 2
    unit: np.ndarray = (found / np.linalg.norm(found)).astype(np.float32)
    return unit


@dataclass
class DriftWorld:
    """One process's view; the clock is the watcher's."""

    database: Database
    plan: DriftPlan = SMALL
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(7)
        self.drift = Drift(self.database)
        self.references = References(self.database, self.clock)
        self.queues = Queues(self.database, self.clock)
        self.watcher = self.new_watcher()

    def new_watcher(self, **options: Any) -> DriftWatcher:
        given = {"plan": self.plan, "on_alarm": Raising(self.database, self.clock), "pace_seconds": 0.0, **options}
        return DriftWatcher(self.database, History(self.database), self.clock, **given)

    async def begin(self) -> None:
        """Have the watcher begin behind an answer that nobody counts."""
        await self.ship([prediction(assignment="stable")])
        await self.watch()

    async def ask(
        self,
        sessions: int,
        *,
        topic: Callable[[int], int] = lambda number: number % 6,
        each: int = 1,
        facts: Callable[[int], dict[str, Any]] = lambda _: {},
        **common: Any,
    ) -> list[str]:
        """Leave `each` questions of so many new sessions; gives the predictions' ids."""
        made = []
        for number in range(sessions):
            asked = vector(topic(number), self.random)
            who = f"s{self.random.integers(1 << 60)}"
            for _ in range(each):
                nearly = asked + self.random.normal(size=DIMENSION).astype(np.float32) * 0.01
                given = {
                    "assignment": "stable",
                    "conversation": who,
                    "completion_tokens": int(self.random.integers(20, 60)),
                    "finish_reason": "stop",
                    "question_embedding": pack(nearly, MODEL),
                    **common,
                    **facts(number),
                }
                made.append(prediction(**given))
        await self.ship(made)
        return [each.id for each in made]

    async def ship(self, made: Sequence[Any]) -> None:
        for at in range(0, len(made), 400):
            rows = [as_shipped(each) for each in made[at : at + 400]]
            await Shipper(None, self.database)._upsert(rows)  # type: ignore[arg-type]

    async def watch(self) -> None:
        """Step until there is nothing left to do."""
        while await self.watcher.step():
            pass

    async def queue(self, name: str = "q", **rules: Any) -> None:
        await self.queues.define("acme", name, Rules(**{"where": EPOCH, "uniform": 0.01, **rules}), who="test")

    async def windows(self) -> list[Any]:
        query = select(drift_windows).order_by(drift_windows.c.tenant, drift_windows.c.number)
        async with self.database.reading() as connection:
            return list((await connection.execute(query)).all())


@contextlib.asynccontextmanager
async def drift_world(url: str, **options: Any) -> AsyncIterator[DriftWorld]:
    """Open a watcher over a database."""
    async with Database(url, timeout_seconds=20.0) as database:
        yield DriftWorld(database, **options)
