"""What a vector index must do, and the words it is asked in.

The main rule: an index holds no truth. It maps numbered points to vectors and answers "which points are nearest";
which points count, and what they say, is the document store's business. So a point carries no text, and its number is
made of the store's: `point_id(generation, n)`, where a generation is one written version of one document.

Every question passes `scoping.tenant_filter`: there is no way to build an `IndexFilter` without a tenant.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from retrieval.scoping import IndexFilter

SCHEMA_VERSION = 1
"""Raised when the points' payload or numbering changes; an older collection is then written anew at the start."""

_PASSAGE_BITS = 20
MOST_PASSAGES = (1 << _PASSAGE_BITS) - 1
"""Of one document: a further one would have the number of the next generation's, which may be another tenant's."""

Vector = NDArray[np.float32]


def point_id(generation: int, n: int) -> int:
    """The number of passage `n` of a generation; below 2**53, so that JSON clients keep it exact."""
    if not 0 <= n <= MOST_PASSAGES:
        raise ValueError(f"a document has at most {MOST_PASSAGES:,} passages, so none is number {n:,}")
    return generation << _PASSAGE_BITS | n


def point_key(point: int) -> tuple[int, int]:
    """The generation and passage number a point stands for."""
    return point >> _PASSAGE_BITS, point & (1 << _PASSAGE_BITS) - 1


@dataclass(frozen=True, slots=True)
class SparseVector:
    """Term ids and their weights."""

    indices: list[int]
    values: list[float]


@dataclass(frozen=True, slots=True)
class IndexPoint:
    """One passage as the index stores it; `labels` are what filters ask for, as `scoping.labels` makes them."""

    id: int
    dense: Vector
    sparse: SparseVector
    tenant: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Legs:
    """What each leg found: (point, score) pairs, best first; a leg that was not asked is empty."""

    dense: list[tuple[int, float]] = field(default_factory=list)
    sparse: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class IndexSchema:
    """What every vector of a collection has in common; two collections with equal schemas are interchangeable.

    `owner` is the document store whose generations the points are numbered by: two stores must not share a collection.
    """

    embedding_model: str
    dimension: int
    splitting_version: int
    passage_tokens: int
    sparse_model: str
    owner: str
    schema_version: int = SCHEMA_VERSION

    @property
    def index_version(self) -> str:
        """`<model>-d<dimension>-s<splitting>-<8 hex>`: what a prediction records; the owner is no part of it."""
        return _index_version(self)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """A schema as it was written down, by this or an earlier version."""
        return cls(**{each.name: stored[each.name] for each in fields(cls) if each.name in stored})

    def is_embedded_by(self, model: str, dimension: int) -> bool:
        """Whether a model's vectors are of the collection's space."""
        return (self.embedding_model, self.dimension) == (model, dimension)


@lru_cache(maxsize=64)
def _index_version(schema: IndexSchema) -> str:
    facts = {key: value for key, value in asdict(schema).items() if key != "owner"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    model = re.sub(r"[^a-z0-9.]+", "-", schema.embedding_model.rsplit("/", 1)[-1].lower()).strip("-")
    return f"{model}-d{schema.dimension}-s{schema.splitting_version}-{digest}"


class Index(Protocol):
    """A collection of points, at a place that holds several and names one of them; methods may raise IndexUnavailable.

    The place's name for a collection (an alias, a pointer file) is for whoever looks from outside and for the start;
    what is written and searched here is always the collection that was opened.
    """

    async def open(self, schema: IndexSchema) -> None:
        """Open the collection of this schema, or make it, empty."""
        ...

    def beside(self) -> "Index":
        """Give another collection of the same place, to be opened by another schema."""
        ...

    async def named(self) -> Mapping[str, Any] | None:
        """Tell the schema of the collection that the place names, if it names one; also before `open`."""
        ...

    async def promote(self) -> None:
        """Have the place name this collection, in one step that survives the end of this process."""
        ...

    async def drop(self) -> None:
        """Close the collection and remove it with all its points."""
        ...

    async def close(self) -> None:
        """Write everything down and let go; closing twice is fine."""
        ...

    async def check(self) -> None:
        """Return if the index answers."""
        ...

    async def upsert(self, points: Sequence[IndexPoint]) -> None:
        """Write points; on return they survive the end of this process."""
        ...

    async def delete(self, ids: Sequence[int]) -> None:
        """Remove points; unknown ones are passed over."""
        ...

    async def search(
        self, where: IndexFilter, *, dense: Vector | None, sparse: SparseVector | None, depth: int
    ) -> Legs:
        """Find the `depth` best points of each leg that has a vector: by cosine, and by BM25."""
        ...

    async def ids(self) -> list[int]:
        """Every point, of all tenants."""
        ...

    async def vectors(self, ids: Sequence[int]) -> dict[int, Vector]:
        """The dense vectors of those points that exist."""
        ...
