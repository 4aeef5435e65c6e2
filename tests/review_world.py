"""The parts of the review queue over one database, with a clock that a test moves, and predictions as a shipper leaves
them."""

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete

from app.database import (
    Database,
    feedback,
    labels,
    predictions,
    review_boosts,
    review_items,
    review_queues,
    reviews,
)
from app.feedback import FeedbackLog, Given, LabelLog, Speaker
from app.predictions import History, Prediction, Where, uuid7
from app.predictions.rows import to_row
from app.predictions.shipper import Shipper, shippable
from app.review import Exchange, Filler, Finding, Findings, Item, Leased, Queues, Reviews, Rules
from tests.service import Api, until

EPOCH = Where(since=datetime(2020, 1, 1, tzinfo=UTC))
"""Everything that tests predict."""


@dataclass
class Clock:
    """A time that stands still until it is moved."""

    now: int = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += round(seconds * 1000)


def person(name: str | None, tenant: str = "acme", **facts: Any) -> Speaker:
    return Speaker(tenant=tenant, key_id="k1", user=name, **facts)


@dataclass
class World:
    """One replica's parts."""

    database: Database
    labels: LabelLog
    feedback: FeedbackLog
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.history = History(self.database)
        self.queues = Queues(self.database, self.clock)
        self.reviews = Reviews(self.database, self.queues, self.history, self.labels, self.clock)
        self.findings = Findings(self.database, self.queues, self.clock)
        self.exchange = Exchange(self.database, self.queues, self.findings, self.history, self.labels, self.clock)
        self.filler = self.new_filler()

    def new_filler(self, **options: Any) -> Filler:
        """Never entered: it works when it is told to, and only then."""
        return Filler(self.database, self.queues, self.history, self.labels, **options)

    async def queue(self, name: str = "q", *, tenant: str = "acme", **rules: Any) -> None:
        given = Rules(**{"where": EPOCH, "uniform": 1.0, "classes": ("right", "wrong"), **rules})
        await self.queues.define(tenant, name, given, who="test")

    async def predict(self, count: int = 1, **facts: Any) -> list[str]:
        """Put finished predictions into the database, and give their ids."""
        made = [prediction(**facts) for _ in range(count)]
        await self.ship(made)
        return [each.id for each in made]

    async def ship(self, predictions: Sequence[Prediction]) -> None:
        if predictions:
            rows = [as_shipped(each) for each in predictions]
            await Shipper(None, self.database)._upsert(rows)  # type: ignore[arg-type]

    async def rate(self, prediction_id: str, rating: Any = False, **said: Any) -> Any:
        given = Given(prediction_id=prediction_id, rating=rating, **said)
        return await self.feedback.give(person("user", said.pop("tenant", "acme")), given)

    async def fill(self) -> None:
        """Fill until there is nothing left to do."""
        while await self.filler.step():
            pass

    async def items(self, name: str = "q", tenant: str = "acme") -> dict[str, Item]:
        """The items of a queue by prediction."""
        found = await self.findings.items(tenant, name, limit=10_000)
        assert len({each.prediction_id for each in found}) == len(found)
        return {each.prediction_id: each for each in found}

    async def lease(self, name: str, count: int = 1, queue: str = "q") -> list[Leased]:
        return await self.reviews.lease(person(name), queue, count=count)

    async def review(self, name: str, class_name: str = "right", count: int = 1) -> list[str]:
        """Lease and complete; gives the ids of the reviews."""
        ids = []
        for leased in await self.lease(name, count):
            done = await self.reviews.complete(person(name), leased.review.id, Finding(class_name=class_name))
            ids.append(done.id)
        return ids


def prediction(**facts: Any) -> Prediction:
    request = json.dumps({"messages": [{"role": "user", "content": "How long?"}]}).encode()
    given = {"id": uuid7(), "tenant": "acme", "outcome": "finished", "answer": "Four weeks.", "request": request}
    return Prediction(**{**given, "release_name": "hallmark@1", **facts})


def as_shipped(prediction: Prediction) -> dict[str, Any]:
    """The columns of a prediction as they come into the shared database."""
    key, *rest = to_row(prediction)
    return shippable([bytes(key), *rest])


def cited(support: float) -> dict[str, Any]:
    """The facts of an answer that its passages bear out so far."""
    return {"verdict": "answered", "citations": [{"answer_start": 0, "support": support}]}


@contextlib.asynccontextmanager
async def replica(url: str, clock: Clock | None = None) -> AsyncIterator[World]:
    """Open one replica's parts over a database."""
    async with (
        Database(url, timeout_seconds=20.0) as database,
        LabelLog(database) as labels,
        FeedbackLog(database) as feedback,
    ):
        yield World(database, labels, feedback, clock or Clock())


async def emptied(url: str) -> str:
    """Make a database as if nobody had ever used it: to migrate a new one for every test takes longer than the test."""
    async with Database(url, timeout_seconds=20.0) as database, database.writing() as connection:
        for table in (predictions, feedback, labels, review_queues, review_boosts, review_items, reviews):
            await connection.execute(delete(table))
    return url


async def under_review(owner: Api) -> dict[str, str]:
    """Make a queue through the service and lease from it: the ids of what there is then, by the path's parameter."""
    rules = {"uniform": 1.0, "classes": ["right", "wrong"], "where": {"since": "2020-01-01T00:00:00Z"}}
    assert (await owner.client.put("/v1/review/queues/answers", json=rules)).status_code == 201
    boost = await owner.client.post("/v1/review/queues/answers/boosts", json={"rate": 0.5, "reason": "r", "where": {}})

    async def leased() -> Any:
        return (await owner.client.post("/v1/review/queues/answers/leases", json={})).json()["data"]

    (lease,) = await until(leased)
    review = (await owner.client.get(f"/v1/review/reviews/{lease['review_id']}")).json()
    return {
        "queue": "answers",
        "review_id": review["id"],
        "item_id": review["item_id"],
        "boost_id": boost.json()["id"],
    }
