"""Predictions, labels and corrections in one database, and the parts that make datasets of them."""

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete

from app.database import (
    Database,
    dataset_builds,
    dataset_examples,
    dataset_members,
    dataset_series,
    dataset_tags,
    dataset_versions,
    datasets,
    feedback,
    labels,
    predictions,
)
from app.datasets import Build, Datasets, Upload, open_datasets, read_recipe
from app.feedback import FeedbackLog, Given, LabelLog, Speaker, Stated
from app.lineage import Provenance, Tracer, Uses
from app.predictions import DocumentUses, History, Prediction, uuid7
from app.predictions.rows import to_row
from app.predictions.shipper import Shipper, shippable

TABLES = (
    dataset_builds,
    dataset_members,
    dataset_examples,
    dataset_tags,
    dataset_versions,
    dataset_series,
    datasets,
    feedback,
    labels,
    predictions,
)


@dataclass
class World:
    """One replica's parts."""

    database: Database
    labels: LabelLog
    feedback: FeedbackLog
    datasets: Datasets
    history: History
    tenant: str = "acme"
    provenance: Provenance = field(init=False)

    def __post_init__(self) -> None:
        self.provenance = Provenance(self.database)
        self.tracer = Tracer(self.provenance, self.history, self.labels)
        self.uses = Uses(self.provenance, self.history, DocumentUses(self.database, follows=False))

    def prediction(self, question: str, answer: str | None = "An answer.", **facts: Any) -> Prediction:
        request = json.dumps({"model": "m", "messages": [{"role": "user", "content": question}]}).encode()
        given = {"id": uuid7(), "tenant": self.tenant, "outcome": "finished", "release_name": "support@1"}
        return Prediction(**{**given, "request": request, "answer": answer, "question": question, **facts})

    async def put(self, *them: Prediction) -> None:
        for at in range(0, len(them), 500):
            rows = [to_row(each) for each in them[at : at + 500]]
            await Shipper(None, self.database)._upsert([shippable([bytes(key), *rest]) for key, *rest in rows])

    async def label(self, prediction: Prediction, *, user: str = "ann", **stated: Any) -> str:
        speaker = Speaker(tenant=prediction.tenant, key_id="k", user=user)
        written = await self.labels.state(speaker, Stated(prediction_id=prediction.id, **stated))
        return str(written.row["id"])

    async def correct(self, prediction: Prediction, correction: str, **given: Any) -> str:
        speaker = Speaker(tenant=prediction.tenant, key_id="k", user=given.pop("user", "eve"))
        said = Given(prediction_id=prediction.id, correction=correction, **given)
        return str((await self.feedback.give(speaker, said)).row["id"])

    async def classified(self, *asked: tuple[str, str], **facts: Any) -> list[Prediction]:
        """Put labelled predictions: question and class."""
        made = [self.prediction(question, name, **facts) for question, name in asked]
        await self.put(*made)
        for prediction, (_, name) in zip(made, asked, strict=True):
            await self.label(prediction, class_name=name)
        return made

    async def build(self, name: str = "data", *, purpose: Any = "training", **recipe: Any) -> Build:
        """Build a version and wait for what becomes of it."""
        given = read_recipe({"task": "classify", **recipe})
        started = await self.datasets.builds.from_predictions(self.tenant, name, given, purpose=purpose, who="test")
        return await self.ended(started)

    async def bring(self, name: str, uploads: Sequence[Upload], *, purpose: Any = "training", **recipe: Any) -> Build:
        """Import files and wait for what becomes of it."""
        given = read_recipe({"task": "classify", **recipe})
        builds = self.datasets.builds
        started = await builds.from_files(self.tenant, name, given, uploads, purpose=purpose, who="test")
        return await self.ended(started)

    async def ended(self, build: Build) -> Build:
        if task := self.datasets.builds._tasks.get(build.id):
            await task
        return await self.datasets.builds.get(self.tenant, build.dataset, build.id)

    async def rows(self, name: str = "data", version: str = "latest") -> list[dict[str, Any]]:
        """What a version says."""
        found = await self.datasets.store.version(self.tenant, name, version)
        return [
            json.loads(row.content)
            async for page in self.datasets.store.pages(found.series, found.number)
            for row in page
            if row.content is not None
        ]

    async def file(self, name: str, file: str, version: str = "latest") -> bytes:
        found = await self.datasets.store.version(self.tenant, name, version)
        return b"".join([piece async for piece in self.datasets.exports.file(found, file)])


@contextlib.asynccontextmanager
async def open_world(url: str, *, empty: bool = False) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as parts:
        database = await parts.enter_async_context(Database(url))
        if empty:
            async with database.writing() as connection:
                for table in TABLES:
                    await connection.execute(delete(table))
        history = History(database)
        yield World(
            database,
            await parts.enter_async_context(LabelLog(database)),
            await parts.enter_async_context(FeedbackLog(database)),
            await parts.enter_async_context(open_datasets(database, history, rest=0.0)),
            history,
        )
