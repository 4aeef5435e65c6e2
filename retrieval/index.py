"""What a vector index must do, and the words it is asked in.

The main rule: an index holds no truth. It maps numbered points to vectors and answers "which points are nearest";
which points count, and what they say, is the document store's business. So a point carries no text, and its number is
made of the store's: `point_id(generation, n)`, where a generation is one written version of one document.

Every question passes `tenant_filter`: there is no way to build an `IndexFilter` without a tenant.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.documents import Scope
from retrieval.errors import InvalidFilter

SCHEMA_VERSION = 1
"""Raised when the points' payload or numbering changes; an older collection is then rebuilt."""

MAX_FILTER_VALUES = 100
_PASSAGE_BITS = 20

Vector = NDArray[np.float32]


def point_id(generation: int, n: int) -> int:
    """The number of passage `n` of a generation; below 2**53, so that JSON clients keep it exact."""
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
    """One passage as the index stores it; `labels` are the document's metadata in the form filters ask for."""

    id: int
    dense: Vector
    sparse: SparseVector
    tenant: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IndexFilter:
    """Which points a query may see: the tenant's, with any label of each group, of no hidden generation.

    Made by `tenant_filter` only.
    """

    tenant: str
    groups: tuple[tuple[str, ...], ...] = ()
    hidden: tuple[int, ...] = ()


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
        facts = {key: value for key, value in asdict(self).items() if key != "owner"}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        model = re.sub(r"[^a-z0-9.]+", "-", self.embedding_model.rsplit("/", 1)[-1].lower()).strip("-")
        return f"{model}-d{self.dimension}-s{self.splitting_version}-{digest}"

    def difference(self, stored: Mapping[str, Any]) -> str:
        """How a stored schema differs, in words; empty when it does not."""
        own = asdict(self)
        return ", ".join(
            f"{key} is {stored.get(key)!r} in the collection and {own[key]!r} here"
            for key in own
            if stored.get(key) != own[key]
        )


class Index(Protocol):
    """A collection of points; every method may raise IndexUnavailable."""

    async def open(self, schema: IndexSchema, *, rebuild: bool = False) -> None:
        """Open the collection, or make it; `rebuild` starts an empty one where the stored schema differs.

        Raises:
            IndexMismatch: The stored schema is another one and `rebuild` is false.
        """
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


def tenant_filter(scope: Scope, hidden: Collection[int] = ()) -> IndexFilter:
    """Turn a scope into the one filter an index understands; `hidden` generations are never found.

    Raises:
        InvalidFilter: The filter names a key whose value is neither a string, number, boolean nor a list of those.
    """
    if not scope.tenant:
        raise InvalidFilter("A scope needs a tenant.")
    groups = tuple(_group(key, value) for key, value in sorted(scope.filter.items()))
    return IndexFilter(scope.tenant, groups, tuple(sorted(hidden)))


def labels(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The filterable part of a document's metadata: scalars and lists of scalars, each as one label."""
    found: dict[str, None] = {}
    for key, value in metadata.items():
        for item in value if isinstance(value, list) else [value]:
            if _is_scalar(item):
                found[_label(key, item)] = None
    return tuple(found)


def _group(key: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not isinstance(key, str) or not key:
        raise InvalidFilter(f"Filter key {key!r}: use the name of a metadata field.")
    if not 1 <= len(values) <= MAX_FILTER_VALUES:
        raise InvalidFilter(f"Filter {key!r}: give 1 to {MAX_FILTER_VALUES} values, not {len(values)}.")
    for item in values:
        if not _is_scalar(item):
            raise InvalidFilter(
                f"Filter {key!r}: a {type(item).__name__} cannot be matched; "
                "use a string, number or boolean, or a list of them for any-of."
            )
    return tuple(_label(key, item) for item in values)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return isinstance(value, str | int | bool)


def _label(key: str, value: str | float | bool) -> str:
    # JSON tells 1 from "1" and from true; 2024.0 is written 2024, since JSON knows one kind of number.
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps([key, number], ensure_ascii=False)
