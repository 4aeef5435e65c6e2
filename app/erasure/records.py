"""The durable record of erasures: who asked when, what was found, and nothing by which the subject could be read."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Self

import msgspec
from sqlalchemy import Row, select

from app.database import Database, erasures, predictions
from app.errors import InvalidRequest, NotFound
from app.lineage.provenance import Provenance, release_of
from app.predictions import Pseudonym, uuid7
from app.privacy.sealing import is_pseudonym
from app.privacy.subjects import SubjectKind, subject_digest

_e = erasures.c


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What was trained on rows that are erased: it goes on knowing what it has learnt, until it is replaced."""

    datasets: Sequence[str] = ()
    """By their digests."""
    training_runs: Sequence[str] = ()
    adapters: Sequence[str] = ()
    releases: Sequence[str] = ()


class Erasure(msgspec.Struct, frozen=True, kw_only=True):
    """An erasure as it is on record; times are milliseconds since 1970."""

    id: str
    tenant: str
    kind: SubjectKind
    state: str
    """`running` or `done`."""
    requested_at: int
    requested_by: str
    finished_at: int | None
    counts: dict[str, int]
    """How much was reached: predictions, feedback, labels, review items, embeddings, rows of datasets, keys."""
    dataset_digests: Sequence[str]
    """Datasets that hold rows made of what is erased."""

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """Read a row."""
        facts = {name: getattr(row, name) for name in cls.__struct_fields__ if hasattr(row, name)}
        return cls(**facts | {"counts": json.loads(row.counts), "dataset_digests": json.loads(row.datasets)})


class Erasures:
    """Takes erasures in and shows them.

    Args:
        database: shared by all replicas.
        clock: milliseconds since 1970.
        pseudonym: the name that a user is kept by.
    """

    def __init__(self, database: Database, clock: Callable[[], int], *, pseudonym: Pseudonym | None = None) -> None:
        self._database = database
        self._clock = clock
        self._pseudonym = pseudonym
        self._provenance = Provenance(database)

    async def request(self, tenant: str, kind: SubjectKind, name: str, *, who: str) -> Erasure:
        """Put an erasure on record: from here on it will be done.

        Raises:
            InvalidRequest: the subject is nobody.
            Unavailable: the database does not answer.
        """
        if not name.strip():
            raise InvalidRequest(f"`{kind}`: name whom to erase.", param=kind)
        names = [name]
        if kind == "user" and self._pseudonym is not None and not is_pseudonym(name):
            names.append(self._pseudonym(tenant, name))  # Beside what was kept before there were pseudonyms.
        row = {
            "id": uuid7(),
            "tenant": tenant,
            "kind": kind,
            "names": json.dumps(names),
            "digests": json.dumps([subject_digest(tenant, kind, each) for each in names]),
            "requested_at": self._clock(),
            "requested_by": who,
            "state": "running",
            "position": 0,
            "found": 1,  # So that it is looked through a second time in any case.
            "counts": "{}",
            "datasets": "[]",
        }
        async with self._database.writing() as connection:
            # What replicas are shipping now is there when this is; whatever they ship later is held against it.
            await self._database.one_at_a_time(connection, predictions.name)
            await connection.execute(erasures.insert(), row)
        return await self.get(tenant, str(row["id"]))

    async def get(self, tenant: str, erasure_id: str) -> Erasure:
        """Show one; raises NotFound if the tenant has no such erasure."""
        query = select(erasures).where(_e.tenant == tenant, _e.id == erasure_id)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"There is no erasure {erasure_id!r}.")
        return Erasure.of(row)

    async def find(self, tenant: str, *, limit: int = 50, before: str | None = None) -> list[Erasure]:
        """List a tenant's erasures, the newest first, from the id `before` on backwards."""
        query = select(erasures).where(_e.tenant == tenant)
        if before is not None:
            query = query.where(_e.id < before)
        async with self._database.reading() as connection:
            rows = (await connection.execute(query.order_by(_e.id.desc()).limit(limit))).all()
        return [Erasure.of(row) for row in rows]

    async def trained(self, erasure: Erasure) -> Trained:
        """Tell what was trained on what is erased, as far as it is registered."""
        digests = list(erasure.dataset_digests)
        if not digests:
            return Trained()
        runs = await self._provenance.training_runs(dataset_digests=digests)
        adapters = sorted({run.adapter_digest for run in runs})
        rows = await self._provenance.releases_with(
            ("dataset_digest", digests), ("training_run", [run.id for run in runs]), ("adapter_digest", adapters)
        )
        return Trained(
            datasets=digests,
            training_runs=[run.id for run in runs],
            adapters=adapters,
            releases=[f"{row.name}@{row.number}" for row in rows if release_of(row) is not None],
        )
