"""From a prediction to all that it was made of, link by link, each verified anew."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from operator import eq
from pathlib import Path
from typing import Any, Protocol

import msgspec
from sqlalchemy import Row

from app.feedback import Label, LabelLog
from app.lineage.links import (
    AdapterLink,
    DatasetLink,
    DatasetPage,
    DocumentLink,
    LabelMention,
    Link,
    ReleaseLink,
    RowLink,
    Trace,
    TrainingRunLink,
)
from app.lineage.provenance import (
    DatasetManifest,
    Provenance,
    RunManifest,
    dataset_digest,
    release_of,
    row_digest,
    sha256,
)
from app.predictions import History, Mention, Prediction
from app.predictions.documents import uses_of
from app.privacy.policies import is_redacted_from
from app.releases import Release
from app.vetting import folder_digest
from retrieval.documents import Document, Scope
from retrieval.errors import DocumentNotFound, RetrievalError

FIRST_ROWS = 20
"""Rows of the dataset that a prediction's lineage shows; the rest has its own pages."""


class Documents(Protocol):
    """Where documents are kept, to check quotes against."""

    async def document(self, scope: Scope, document_id: str) -> Document:
        """Get one document, as it is now."""
        ...

    async def source(self, scope: Scope, document_id: str) -> str:
        """Get the text that quotes are spans of."""
        ...


class Tracer:
    """Traces predictions.

    Args:
        provenance: what is registered.
        history: finds the predictions that datasets were made of.
        labels: finds the labels that say what is right in them.
        documents: where quotes are looked up.
        adapter_folder: where adapters lie on this machine, each in a folder of its name.
    """

    def __init__(
        self,
        provenance: Provenance,
        history: History,
        labels: LabelLog,
        *,
        documents: Documents | None = None,
        adapter_folder: Path | None = None,
    ) -> None:
        self._provenance = provenance
        self._history = history
        self._labels = labels
        self._documents = documents
        self._adapter_folder = adapter_folder
        self._hashing = asyncio.Semaphore(1)

    async def trace(self, prediction: Prediction) -> Trace:
        """Follow a prediction to its origins."""
        row, release_link = await self._release(prediction)
        release = release_of(row) if row is not None else None
        adapter = await self._adapter(release) if release else None
        run, run_link = await self._training_run(prediction.tenant, release) if release else (None, None)
        wanted = (run.dataset_digest if run is not None else None) or (release and release.lineage.dataset_digest)
        page = await self.dataset(prediction.tenant, wanted) if wanted else None
        rows = page.data if page else ()
        documents = await self._documents_of(prediction)
        steps: tuple[Link | None, ...] = (release_link, adapter, run_link, page.dataset if page else None)
        links = [link for link in steps if link is not None]
        links += [*rows, *documents]
        return Trace(
            prediction_id=prediction.id,
            verified=_all(links),
            release=release_link,
            adapter=adapter,
            training_run=run_link,
            dataset=page.dataset if page else None,
            rows=rows,
            next_row=page.next if page else None,
            index_version=prediction.index_version,
            documents=documents,
        )

    async def dataset(
        self, tenant: str, digest: str, *, limit: int = FIRST_ROWS, after: str | None = None
    ) -> DatasetPage:
        """Verify a dataset with all its rows; show its own tenant those from the one after the digest `after` on."""
        found = await self._provenance.dataset(tenant, digest)
        if found is None:
            return DatasetPage(dataset=DatasetLink(digest=digest, verified=False, problems=("It is not registered.",)))
        rows = await self._provenance.rows(found.tenant, digest)
        link = await asyncio.to_thread(_dataset_link, found, rows, is_own=found.tenant == tenant)
        if found.tenant != tenant:
            return DatasetPage(dataset=link)
        shown = [row for row in rows if after is None or row.digest > after][: limit + 1]
        following = shown[limit - 1].digest if len(shown) > limit else None
        shown = shown[:limit]
        known = await self._history.mentions(tenant, {row.prediction_id for row in shown if row.prediction_id})
        stated = await self._labels.known(tenant, {row.label_id for row in shown if row.label_id})
        data = tuple(_row_link(row, known.get(row.prediction_id), stated.get(row.label_id)) for row in shown)
        return DatasetPage(dataset=link, data=data, next=following)

    async def _release(self, prediction: Prediction) -> tuple[Row[Any] | None, ReleaseLink | None]:
        label, digest = prediction.release_name, prediction.release_digest
        if digest is None:
            return None, None
        row = await self._provenance.release(label, digest)
        if row is None:
            return None, ReleaseLink(id=label, digest=digest, verified=False, problems=("It is not registered.",))
        problems = release_problems(row, digest)
        release = release_of(row)
        if release is not None:
            problems += _unlike(
                ("adapter", prediction.adapter, release.adapter),
                ("base_model", prediction.base_model, release.base_model),
                ("prompt_version", prediction.prompt_version, release.prompt.version),
            )
        link = ReleaseLink(
            id=label,
            digest=digest,
            content=msgspec.Raw(row.canonical.encode()) if release is not None else None,
            deleted=row.deleted_at is not None,
            verified=not problems,
            problems=tuple(problems),
        )
        return row, link

    async def _adapter(self, release: Release) -> AdapterLink | None:
        if release.adapter is None:
            return None
        verified, problem = await self._check_adapter(release.adapter, release.adapter_digest)
        problems = (problem,) if problem else ()
        return AdapterLink(name=release.adapter, digest=release.adapter_digest, verified=verified, problems=problems)

    async def _check_adapter(self, name: str, digest: str | None) -> tuple[bool | None, str]:
        if digest is None:
            return None, "The release does not say its digest."
        folder = self._adapter_folder / name if self._adapter_folder else None
        if folder is None or not await asyncio.to_thread(folder.is_dir):
            return None, "Its folder is not on this machine."
        try:
            async with self._hashing:
                found = await asyncio.to_thread(folder_digest, folder)
        except OSError as error:
            return False, f"Its folder cannot be read: {error.strerror}."
        return found == digest, "" if found == digest else f"Its folder has the digest {found}."

    async def _training_run(self, tenant: str, release: Release) -> tuple[Row[Any] | None, TrainingRunLink | None]:
        """The run that the release names, else the first that made its adapter."""
        named = release.lineage.training_run
        if named is not None:
            run = await self._provenance.training_run(named)
            if run is None:
                return None, TrainingRunLink(id=named, verified=False, problems=("It is not registered.",))
        else:
            digests = [release.adapter_digest] if release.adapter_digest else []
            runs = await self._provenance.training_runs(adapter_digests=digests) if digests else []
            if not runs:
                return None, None
            run = runs[0]
        return run, _run_link(run, release, is_own=run.tenant == tenant)

    async def _documents_of(self, prediction: Prediction) -> tuple[DocumentLink, ...]:
        quotes: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for citation in prediction.citations or ():
            if isinstance(citation.get("quote"), str):
                quotes.setdefault((citation["document_id"], citation["document_version"]), []).append(citation)
        found = []
        for use in uses_of(prediction.id, prediction.passages, prediction.citations):
            quoted = quotes.get((use.document_id, use.document_version), [])
            verified, problems = await self._check_quotes(prediction, use.document_id, use.document_version, quoted)
            link = DocumentLink(
                document_id=use.document_id,
                document_version=use.document_version,
                cited=use.cited,
                quotes=len(quoted),
                verified=verified,
                problems=tuple(problems),
            )
            found.append(link)
        return tuple(found)

    async def _check_quotes(
        self, prediction: Prediction, document_id: str, version: str, quoted: Sequence[Mapping[str, Any]]
    ) -> tuple[bool | None, list[str]]:
        if self._documents is None:
            return None, ["Documents cannot be looked up here."]
        scope = Scope.whole(prediction.tenant)
        is_quoted = is_redacted_from if prediction.kept == "redacted" else eq
        try:
            document = await self._documents.document(scope, document_id)
            if document.version != version:
                return None, [f"It was replaced by version {document.version}."]
            text = await self._documents.source(scope, document_id) if quoted else ""
            # While the text was read the document may have been replaced.
            if quoted and (await self._documents.document(scope, document_id)).version != version:
                return None, ["It was just replaced."]
        except DocumentNotFound:
            return None, ["It was deleted."]
        except RetrievalError:
            return None, ["It cannot be looked up at present."]
        problems = [
            f"Its characters {each['source_start']} to {each['source_end']} are not what was quoted as [{each['n']}]."
            for each in quoted
            if not is_quoted(each["quote"], text[each["source_start"] : each["source_end"]])
        ]
        return not problems, problems


def release_problems(row: Row[Any], digest: str) -> list[str]:
    """What is wrong with a release of the registry that should have this digest."""
    problems = []
    if row.digest != digest:
        problems.append(f"The registry has {row.name}@{row.number} with the digest {row.digest}.")
    found = hashlib.sha256(row.canonical.encode()).hexdigest()
    if found != digest:
        problems.append(f"Its content has the digest {found}: it was changed after it was made.")
    return problems


def _run_link(row: Row[Any], release: Release, *, is_own: bool) -> TrainingRunLink:
    problems = _manifest_problems(row.manifest, row.digest, RunManifest, row)
    problems += _unlike(
        ("adapter_digest", row.adapter_digest, release.adapter_digest),
        ("dataset_digest", row.dataset_digest, release.lineage.dataset_digest or row.dataset_digest),
        ("base_model", row.base_model, release.base_model or row.base_model),
        ("base_revision", row.base_revision, release.base_revision or row.base_revision),
    )
    return TrainingRunLink(
        id=row.id,
        digest=row.digest,
        base_model=row.base_model,
        base_revision=row.base_revision,
        adapter_digest=row.adapter_digest,
        dataset_digest=row.dataset_digest,
        manifest=_shown(row.manifest) if is_own else None,
        verified=not problems,
        problems=tuple(problems),
    )


def _dataset_link(row: Row[Any], rows: Sequence[Row[Any]], *, is_own: bool) -> DatasetLink:
    problems = _manifest_problems(row.manifest, row.manifest_digest, DatasetManifest, row)
    changed = [each.digest for each in rows if _row_differs(each)]
    problems += [f"Its row {digest} is not what its digest says." for digest in changed[:10]]
    found = dataset_digest(each.digest for each in rows)
    if found != row.digest:
        problems.append(f"Its {len(rows)} rows have the digest {found}.")
    return DatasetLink(
        digest=row.digest,
        rows=len(rows),
        name=row.name if is_own else None,
        version=row.version if is_own else None,
        manifest=_shown(row.manifest) if is_own else None,
        verified=not problems,
        problems=tuple(problems),
    )


def _row_link(row: Row[Any], prediction: Mention | None, label: Label | None) -> RowLink:
    problems = ["Its content's digest or its origin was changed."] if _row_differs(row) else []
    if label is not None and row.prediction_id not in (None, label.prediction_id):
        problems.append(f"Its label is about the prediction {label.prediction_id}.")
    return RowLink(
        digest=row.digest,
        content_digest=row.content_digest,
        prediction_id=row.prediction_id,
        prediction=prediction,
        label_id=row.label_id,
        label=_mention(label) if label else None,
        erased=row.erased_at is not None,
        verified=not problems,
        problems=tuple(problems),
    )


def _mention(label: Label) -> LabelMention:
    return LabelMention(prediction_id=label.prediction_id, source=label.source, withdrawn=label.withdrawn)


def _row_differs(row: Row[Any]) -> bool:
    return bool(row.digest != row_digest(row.content_digest, row.prediction_id, row.label_id))


def _manifest_problems(written: str, digest: str, kind: type[Any], row: Row[Any]) -> list[str]:
    """What is wrong with a manifest, or with the columns that say what it says."""
    found = sha256(written)
    if found != digest:
        return [f"Its manifest has the digest {found}: it was changed after it was registered."]
    said = msgspec.structs.asdict(msgspec.convert(msgspec.json.decode(written), kind))
    return _unlike(*((name, getattr(row, name), value) for name, value in said.items()))


def _unlike(*facts: tuple[str, Any, Any]) -> list[str]:
    return [f"`{name}` is {left!r} here and {right!r} there." for name, left, right in facts if left != right]


def _shown(written: str) -> Any:
    """A manifest to be shown, if it still is JSON."""
    try:
        return msgspec.json.decode(written)
    except msgspec.DecodeError:
        return None


def _all(links: Sequence[Link]) -> bool | None:
    verdicts = [link.verified for link in links]
    if False in verdicts:
        return False
    return None if None in verdicts or not verdicts else True
