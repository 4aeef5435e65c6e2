"""From a release, an adapter, a row of a dataset or a document back to the predictions that used it."""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import Row

from app.errors import NotFound
from app.lineage.provenance import Provenance, release_of
from app.lineage.tracing import release_problems
from app.predictions import DocumentUses, History, Mention, Outcome, created_at
from app.releases import Release, parse_label


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction that used something."""

    prediction_id: str
    created_at: datetime
    outcome: Outcome | None
    """Null where the prediction itself is not on record any more."""
    release_name: str | None
    release_digest: str | None
    assignment: str | None
    document_version: str | None = None
    cited: bool | None = None


class UsedBy(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the predictions that used something, the newest first, and the releases through which they did."""

    id: str
    kind: Literal["release", "adapter", "dataset_row", "document"]
    verified: bool | None = None
    """Whether the releases on the way are what their digests say; null where none is on the way."""
    problems: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    training_runs: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    prediction_id: str | None = None
    """The prediction that a row was made of."""
    label_id: str | None = None
    data: tuple[Used, ...] = ()
    next: str | None = None
    """The `before` of the next page."""
    object: str = "lineage.uses"


class Uses:
    """Answers what used something, for one tenant."""

    def __init__(self, provenance: Provenance, history: History, documents: DocumentUses) -> None:
        self._provenance = provenance
        self._history = history
        self._documents = documents

    async def of_release(self, tenant: str, label: str, *, limit: int, before: str | None = None) -> UsedBy:
        """The predictions that the release `name@3` made, also one that is deleted."""
        parse_label(label)
        row = await self._provenance.release(label, "")
        if row is None:
            raise NotFound(f"There is no release {label!r}.", param="release")
        return await self._through(UsedBy(id=label, kind="release"), tenant, [row], limit, before)

    async def of_adapter(self, tenant: str, digest: str, *, limit: int, before: str | None = None) -> UsedBy:
        """The predictions of the releases that have the adapter with this digest."""
        runs = await self._provenance.training_runs(adapter_digests=[digest])
        rows = await self._releases(adapter_digests={digest})
        if not rows and not runs:
            raise NotFound(f"No release and no training run names an adapter with the digest {digest!r}.")
        told = UsedBy(
            id=digest,
            kind="adapter",
            training_runs=tuple(run.id for run in runs),
            datasets=_once(run.dataset_digest for run in runs if run.dataset_digest),
        )
        return await self._through(told, tenant, rows, limit, before)

    async def of_dataset_row(self, tenant: str, digest: str, *, limit: int, before: str | None = None) -> UsedBy:
        """The predictions of the releases that were trained on this example, in whichever dataset of the tenant."""
        found = await self._provenance.datasets_with(tenant, digest)
        if not found:
            raise NotFound(f"No dataset has a row with the digest {digest!r}.")
        datasets = _once(row.dataset_digest for row in found)
        runs = await self._provenance.training_runs(dataset_digests=datasets)
        rows = await self._releases(
            runs={run.id for run in runs},
            adapter_digests={run.adapter_digest for run in runs},
            dataset_digests=set(datasets),
        )
        told = UsedBy(
            id=digest,
            kind="dataset_row",
            training_runs=tuple(run.id for run in runs),
            datasets=datasets,
            prediction_id=found[0].prediction_id,
            label_id=found[0].label_id,
        )
        return await self._through(told, tenant, rows, limit, before)

    async def of_document(
        self,
        tenant: str,
        document_id: str,
        *,
        version: str | None = None,
        cited: bool | None = None,
        limit: int,
        before: str | None = None,
    ) -> UsedBy:
        """The predictions that were given the document, or only those that `cited` it."""
        uses = await self._documents.find(tenant, document_id, version=version, cited=cited, limit=limit, before=before)
        known = await self._history.mentions(tenant, {use.prediction_id for use in uses})
        data = [
            _used(use.prediction_id, known.get(use.prediction_id), version=use.document_version, cited=use.cited)
            for use in uses
        ]
        following = uses[-1].prediction_id if len(uses) >= limit else None
        labels = _once(sorted({each.release_name for each in known.values() if each.release_name}))
        return UsedBy(id=document_id, kind="document", releases=labels, data=tuple(data), next=following)

    async def _releases(
        self,
        *,
        runs: Collection[str] = (),
        adapter_digests: Collection[str] = (),
        dataset_digests: Collection[str] = (),
    ) -> list[Row[Any]]:
        """The releases that say they have one of these adapters, or come from one of these runs or datasets."""

        def says(release: Release | None) -> bool:
            return release is not None and (
                release.adapter_digest in adapter_digests
                or release.lineage.training_run in runs
                or release.lineage.dataset_digest in dataset_digests
            )

        rows = await self._provenance.releases_with(
            ("adapter_digest", adapter_digests), ("training_run", runs), ("dataset_digest", dataset_digests)
        )
        return [row for row in rows if says(release_of(row))]

    async def _through(
        self, told: UsedBy, tenant: str, rows: Sequence[Row[Any]], limit: int, before: str | None
    ) -> UsedBy:
        """Add the predictions that these releases made."""
        problems = [
            f"{row.name}@{row.number}: {problem}" for row in rows for problem in release_problems(row, row.digest)
        ]
        found = await self._history.of_releases(tenant, {row.digest for row in rows}, limit=limit, before=before)
        return msgspec.structs.replace(
            told,
            verified=not problems if rows else None,
            problems=tuple(problems),
            releases=tuple(f"{row.name}@{row.number}" for row in rows),
            data=tuple(_used(each.id, each) for each in found),
            next=found[-1].id if len(found) == limit else None,
        )


def _used(prediction_id: str, known: Mention | None, *, version: str | None = None, cited: bool | None = None) -> Used:
    return Used(
        prediction_id=prediction_id,
        created_at=created_at(prediction_id),
        outcome=known.outcome if known else None,
        release_name=known.release_name if known else None,
        release_digest=known.release_digest if known else None,
        assignment=known.assignment if known else None,
        document_version=version,
        cited=cited,
    )


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
