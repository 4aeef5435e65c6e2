"""What releases were made of, as it was registered: datasets with their rows, training runs, and the releases.

The main rule: what is registered names itself by a digest that is checked before it is kept, and is never changed. A
dataset's digest is that of its rows' digests, sorted, a line each; a row's is that of its content's digest and where
it came from; a manifest's is that of its canonical JSON.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any

import msgspec
from sqlalchemy import Row, Select, and_, null, or_, select
from sqlalchemy.exc import IntegrityError

from app.database import (
    Database,
    dataset_examples,
    dataset_members,
    dataset_rows,
    dataset_series,
    dataset_versions,
    datasets,
    releases,
    training_runs,
)
from app.errors import Conflict, InvalidRequest, invalid_field
from app.releases import Digest, Release

MAX_DATASET_ROWS = 100_000
_ROWS_AT_ONCE = 1_000
"""So many are written in one transaction: others write to the database too."""
_CONDITIONS_AT_ONCE = 200
"""SQLite takes a thousand in one statement."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]
PlainId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")]


class DatasetRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One example of a dataset: not its content, which stays with the dataset's file, but what it is traced by."""

    digest: Digest
    """SHA-256 of the canonical JSON of the other three fields."""
    content_digest: Digest
    prediction_id: PlainId | None = None
    """The prediction it was made of."""
    label_id: PlainId | None = None
    """The label that says what is right."""


class DatasetManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a dataset's manifest says at least."""

    name: Name
    version: Name
    digest: Digest
    """SHA-256 of the rows' digests, sorted, with a line feed after each."""


class Dataset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dataset as it is registered. Its manifest has `name`, `version` and `digest`, and whatever else it likes."""

    manifest: dict[str, Any]
    manifest_digest: Digest
    """SHA-256 of the manifest's canonical JSON."""
    rows: Annotated[list[DatasetRow], msgspec.Meta(min_length=1, max_length=MAX_DATASET_ROWS)]


class RunManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a training run's manifest says at least."""

    adapter_digest: Digest
    base_model: Name
    base_revision: Name | None = None
    dataset_digest: Digest | None = None


class TrainingRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training run as it is registered.

    Its manifest has `adapter_digest` and `base_model`, `base_revision` and `dataset_digest` where they are known, and
    whatever else it likes.
    """

    id: Name
    manifest: dict[str, Any]
    digest: Digest
    """SHA-256 of the manifest's canonical JSON."""


def canonical(value: Any) -> str:
    """JSON with its keys sorted and no spaces, numbers as Python writes them: `json.dumps` can say it anywhere."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(text: str) -> str:
    """The digest of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def row_digest(content_digest: str, prediction_id: str | None, label_id: str | None) -> str:
    """The digest of a dataset's row."""
    return sha256(canonical({"content_digest": content_digest, "label_id": label_id, "prediction_id": prediction_id}))


def dataset_digest(row_digests: Iterable[str]) -> str:
    """The digest of a dataset: that of its rows' digests, in whatever order they come."""
    return sha256("".join(f"{digest}\n" for digest in sorted(row_digests)))


_members, _versions = dataset_members.c, dataset_versions.c
_registered = (dataset_rows, null().label("erased_at"))


def _built(tenant: str) -> Select[Any]:
    """The rows of the versions that were built here, as rows that were registered."""
    holds = and_(
        _members.series_id == _versions.series_id,
        _members.v_from <= _versions.number,
        or_(_members.v_to.is_(None), _members.v_to > _versions.number),
    )
    belongs = and_(dataset_examples.c.tenant == tenant, dataset_examples.c.digest == _members.digest)
    whose = and_(dataset_series.c.id == _versions.series_id, _versions.number <= dataset_series.c.revision)
    columns = [dataset_examples.c[name] for name in ("digest", "content_digest", "prediction_id", "label_id")]
    return (
        select(_versions.tenant, _versions.digest.label("dataset_digest"), *columns, dataset_examples.c.erased_at)
        .select_from(dataset_versions)
        .join(dataset_series, whose)
        .join(dataset_members, holds)
        .join(dataset_examples, belongs)
        .where(_versions.tenant == tenant)
    )


class Provenance:
    """What is registered, in the database that all replicas share."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- registering ---

    async def add_dataset(self, tenant: str, given: Dataset, *, who: str) -> tuple[Row[Any], bool]:
        """Keep a dataset; give its row of the table, and whether it is new. The same again changes nothing.

        Raises:
            InvalidRequest: a digest is not that of what it stands for; nothing is kept.
            Conflict: the name has that version already, or the digest another manifest.
        """
        manifest, written = await asyncio.to_thread(_checked_dataset, given)
        found = await self._dataset(tenant, manifest.digest)
        if found is None:
            rows = [{"tenant": tenant, "dataset_digest": manifest.digest, **msgspec.structs.asdict(row)}
                    for row in given.rows]  # fmt: skip
            once = self._database.insert(dataset_rows).on_conflict_do_nothing()
            # The rows come first: what a crash leaves of them belongs to no dataset, and is completed the next time.
            for at in range(0, len(rows), _ROWS_AT_ONCE):
                async with self._database.writing() as connection:
                    await connection.execute(once, rows[at : at + _ROWS_AT_ONCE])
            try:
                async with self._database.writing() as connection:
                    await connection.execute(
                        datasets.insert().values(
                            tenant=tenant,
                            digest=manifest.digest,
                            name=manifest.name,
                            version=manifest.version,
                            manifest=written,
                            manifest_digest=given.manifest_digest,
                            created_at=_now(),
                            created_by=who,
                        )
                    )
            except IntegrityError as error:
                if await self._dataset(tenant, manifest.digest) is None:
                    raise Conflict(
                        f"{manifest.name!r} has a version {manifest.version!r} already, of other rows: a version is "
                        "never changed. Give this one another.",
                        param="manifest.version",
                    ) from error
        kept = await self._dataset(tenant, manifest.digest)
        assert kept is not None
        if kept.manifest_digest != given.manifest_digest:
            raise Conflict(
                f"The dataset {manifest.digest} is registered with another manifest, as {kept.name} {kept.version}.",
                param="manifest",
            )
        return kept, found is None

    async def add_training_run(self, tenant: str, given: TrainingRun, *, who: str) -> tuple[Row[Any], bool]:
        """Keep a training run; give its row of the table, and whether it is new. The same again changes nothing.

        Raises:
            InvalidRequest: the digest is not that of the manifest, or the manifest lacks something.
            Conflict: another run has that id.
        """
        written = canonical(given.manifest)
        _check("digest", given.digest, sha256(written), "the manifest's canonical JSON")
        manifest = _said(given.manifest, RunManifest)
        row = {"id": given.id, "tenant": tenant, "manifest": written, "digest": given.digest, "created_at": _now()}
        once = self._database.insert(training_runs).on_conflict_do_nothing()
        async with self._database.writing() as connection:
            done = await connection.execute(once, {**row, **msgspec.structs.asdict(manifest), "created_by": who})
        kept = await self.training_run(given.id)
        if kept is None or kept.tenant != tenant or kept.digest != given.digest:
            raise Conflict(f"There is a training run {given.id!r} already: give this one another id.", param="id")
        return kept, done.rowcount == 1

    # --- finding ---

    async def dataset(self, tenant: str, digest: str) -> Row[Any] | None:
        """Find a dataset by its digest: the tenant's own, else anybody's."""
        query = select(datasets).where(datasets.c.digest == digest).order_by(datasets.c.tenant != tenant).limit(1)
        return await self._first(query)

    async def datasets_with(self, tenant: str, digest: str) -> Sequence[Row[Any]]:
        """The rows of that digest of the tenant's datasets."""
        belongs = and_(dataset_rows.c.tenant == datasets.c.tenant, dataset_rows.c.dataset_digest == datasets.c.digest)
        query = select(*_registered).join(datasets, belongs)
        found = await self._all(query.where(dataset_rows.c.tenant == tenant, dataset_rows.c.digest == digest))
        built = _built(tenant).where(_members.digest == digest).order_by(_versions.created_at, _versions.number)
        return [*found, *await self._all(built)]

    async def rows(self, tenant: str, digest: str) -> Sequence[Row[Any]]:
        """All rows of a dataset, by their digests: as it was built here, else as it was registered."""
        which = select(_versions.series_id, _versions.number).where(
            _versions.tenant == tenant, _versions.digest == digest
        )
        version = await self._first(which.order_by(_versions.created_at, _versions.number).limit(1))
        if version is not None:
            only = (_versions.series_id == version.series_id, _versions.number == version.number)
            return await self._all(_built(tenant).where(*only).order_by(_members.digest))
        mine = (dataset_rows.c.tenant == tenant, dataset_rows.c.dataset_digest == digest)
        return await self._all(select(*_registered).where(*mine).order_by(dataset_rows.c.digest))

    async def training_run(self, run_id: str) -> Row[Any] | None:
        """Find a training run."""
        return await self._first(select(training_runs).where(training_runs.c.id == run_id))

    async def training_runs(
        self, *, adapter_digests: Collection[str] = (), dataset_digests: Collection[str] = ()
    ) -> Sequence[Row[Any]]:
        """The training runs that made one of these adapters, or used one of these datasets."""
        table = training_runs.c
        wanted = or_(table.adapter_digest.in_(adapter_digests), table.dataset_digest.in_(dataset_digests))
        return await self._all(select(training_runs).where(wanted).order_by(table.created_at, table.id))

    async def release(self, label: str | None, digest: str) -> Row[Any] | None:
        """Find a release by its digest, of several the one of that label; else by the label alone."""
        name, _, number = (label or "").partition("@")
        named = and_(
            releases.c.name == name,
            releases.c.number == (int(number) if number.isdecimal() and len(number) < 10 else 0),
        )
        query = select(releases).where(or_(releases.c.digest == digest, named))
        return await self._first(query.order_by(releases.c.digest != digest, ~named).limit(1))

    async def releases_with(self, *needles: tuple[str, Collection[str]]) -> Sequence[Row[Any]]:
        """The releases in whose canonical JSON a field has one of these values; a deleted one is one of them.

        There are few releases, and they are written by hand: they are looked through.
        """
        said = [
            releases.c.canonical.contains(f'"{field}":{msgspec.json.encode(value).decode()}', autoescape=True)
            for field, values in needles
            for value in values
        ]
        found: dict[tuple[str, int], Row[Any]] = {}
        for at in range(0, len(said), _CONDITIONS_AT_ONCE):
            some = select(releases).where(or_(*said[at : at + _CONDITIONS_AT_ONCE]))
            found |= {(row.name, row.number): row for row in await self._all(some)}
        return [found[key] for key in sorted(found)]

    async def _dataset(self, tenant: str, digest: str) -> Row[Any] | None:
        return await self._first(select(datasets).where(datasets.c.tenant == tenant, datasets.c.digest == digest))

    async def _first(self, query: Any) -> Row[Any] | None:
        found = await self._all(query)
        return found[0] if found else None

    async def _all(self, query: Any) -> Sequence[Row[Any]]:
        async with self._database.reading() as connection:
            found: Sequence[Row[Any]] = (await connection.execute(query)).all()
        return found


def release_of(row: Row[Any]) -> Release | None:
    """Read a release without asking whether it verifies; None where nothing can be made of it."""
    try:
        parts = msgspec.json.decode(row.canonical, type=dict[str, Any])
        return msgspec.convert(parts | {"number": row.number}, Release)
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError):
        return None


def _checked_dataset(given: Dataset) -> tuple[DatasetManifest, str]:
    """Check a dataset's digests; give what its manifest says, and the manifest as it is kept."""
    written = canonical(given.manifest)
    _check("manifest_digest", given.manifest_digest, sha256(written), "the manifest's canonical JSON")
    manifest = _said(given.manifest, DatasetManifest)
    for at, row in enumerate(given.rows):
        found = row_digest(row.content_digest, row.prediction_id, row.label_id)
        _check(f"rows[{at}].digest", row.digest, found, "the canonical JSON of its content's digest and its origin")
    digests = {row.digest for row in given.rows}
    if len(digests) < len(given.rows):
        raise InvalidRequest("`rows`: a row stands there twice; each is one example.", param="rows")
    _check("manifest.digest", manifest.digest, dataset_digest(digests), "the rows' digests, sorted, a line each")
    return manifest, written


def _said(manifest: dict[str, Any], kind: type[Any]) -> Any:
    try:
        return msgspec.convert(manifest, kind)
    except msgspec.ValidationError as error:
        told = invalid_field(error)
        raise InvalidRequest(f"The manifest: {told.message}", param=f"manifest.{told.param or ''}".strip(".")) from None


def _check(field: str, given: str, found: str, what: str) -> None:
    if given != found:
        raise InvalidRequest(f"`{field}` is {given}; the SHA-256 of {what} is {found}.", param=field)


def _now() -> int:
    return time.time_ns() // 1_000_000
