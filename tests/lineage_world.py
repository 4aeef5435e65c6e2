"""A small world with a past: predictions, a dataset made of them, a training run, its adapter, and releases of it."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from app.database import Database
from app.feedback import LabelLog, Speaker, Stated
from app.lineage import (
    Dataset,
    DatasetRow,
    Provenance,
    Tracer,
    TrainingRun,
    Uses,
    canonical,
    dataset_digest,
    row_digest,
)
from app.predictions import DocumentUses, History, Prediction, uuid7
from app.predictions.rows import to_row
from app.predictions.shipper import Shipper, shippable
from app.prompts import ANSWER_PROMPT
from app.registry.rows import enroll
from app.releases import Lineage, Release
from app.vetting import folder_digest


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def dataset_of(name: str, version: str, rows: list[DatasetRow], **said: Any) -> Dataset:
    manifest = {"name": name, "version": version, "digest": dataset_digest(row.digest for row in rows), **said}
    return Dataset(manifest=manifest, manifest_digest=digest_of(canonical(manifest)), rows=rows)


def row_of(content: str, prediction_id: str | None = None, label_id: str | None = None) -> DatasetRow:
    content_digest = digest_of(content)
    return DatasetRow(
        digest=row_digest(content_digest, prediction_id, label_id),
        content_digest=content_digest,
        prediction_id=prediction_id,
        label_id=label_id,
    )


def run_of(run_id: str, adapter_digest: str, dataset_digest: str | None, **said: Any) -> TrainingRun:
    manifest = {"adapter_digest": adapter_digest, "base_model": "smollm2", "dataset_digest": dataset_digest, **said}
    return TrainingRun(id=run_id, manifest=manifest, digest=digest_of(canonical(manifest)))


@dataclass
class World:
    """Everything that lineage is traced through, in one database."""

    database: Database
    adapters: Path
    tenant: str = "acme"
    releases: list[Release] = field(default_factory=list)
    documents: Any = None

    def __post_init__(self) -> None:
        self.history, self.provenance = History(self.database), Provenance(self.database)
        self.labels = LabelLog(self.database)
        self.tracer = Tracer(
            self.provenance, self.history, self.labels, documents=self.documents, adapter_folder=self.adapters
        )
        # The predictions come as from a shipper, which notes the documents.
        self.uses = Uses(self.provenance, self.history, DocumentUses(self.database, follows=False))

    def adapter(self, name: str, weights: bytes = b"weights") -> str:
        """Put an adapter's folder on this machine, and give its digest."""
        folder = self.adapters / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_bytes(b'{"r": 8}')
        (folder / "adapter_model.safetensors").write_bytes(weights)
        return folder_digest(folder)

    async def release(self, **facts: Any) -> Release:
        release = Release(**{"name": "hallmark", "number": 0, "engine": "tgi", "prompt": ANSWER_PROMPT, **facts})
        async with self.database.writing() as connection:
            number, _ = await enroll(connection, release, "test")
        release = msgspec.structs.replace(release, number=number)
        self.releases.append(release)
        return release

    def prediction(self, release: Release | None = None, **facts: Any) -> Prediction:
        known = {}
        if release is not None:
            known = {
                "release_name": release.label,
                "release_digest": release.digest,
                "base_model": release.base_model,
                "adapter": release.adapter,
                "prompt_version": release.prompt.version,
            }
        return Prediction(**{"id": uuid7(), "tenant": self.tenant, "outcome": "finished", **known, **facts})

    async def put(self, *predictions: Prediction) -> None:
        for at in range(0, len(predictions), 500):
            rows = [to_row(prediction) for prediction in predictions[at : at + 500]]
            await Shipper(None, self.database)._upsert([shippable([bytes(key), *rest]) for key, *rest in rows])

    async def label(self, *predictions: Prediction, **stated: Any) -> list[str]:
        """State what is true of predictions, and give the labels' ids."""
        async with self.labels as log:
            return [
                (
                    await log.state(
                        Speaker(tenant=prediction.tenant, key_id="k", user="ann"),
                        Stated(**{"prediction_id": prediction.id, "class_name": "refund", **stated}),
                    )
                ).row["id"]
                for prediction in predictions
            ]

    async def trained(self, name: str = "tone", *, examples: int = 5, tenant: str | None = None) -> Release:
        """Make a dataset of new, labelled predictions, train an adapter on it, and make a release of that."""
        tenant = tenant or self.tenant
        sources = [self.prediction(tenant=tenant) for _ in range(examples)]
        await self.put(*sources)
        labels = await self.label(*sources)
        rows = [
            row_of(f"{name} example {n}", source.id, label)
            for n, (source, label) in enumerate(zip(sources, labels, strict=True))
        ]
        dataset = dataset_of(f"{name}-data", "1", rows)
        await self.provenance.add_dataset(tenant, dataset, who="test")
        adapter = self.adapter(name, weights=f"weights of {name}".encode())
        run = run_of(f"{name}-run", adapter, dataset.manifest["digest"])
        await self.provenance.add_training_run(tenant, run, who="test")
        return await self.release(
            base_model="smollm2",
            adapter=name,
            adapter_digest=adapter,
            lineage=Lineage(training_run=run.id, dataset_digest=dataset.manifest["digest"]),
        )
