"""One ranking from two: the dense and the BM25 leg, fused the same way whatever index they came from.

The main rule: every fused point keeps each leg's rank and score, so that a search can be explained.
"""

from collections.abc import Iterator
from math import sqrt
from typing import Literal, NamedTuple

from retrieval.index import Legs

Fusion = Literal["dbsf", "rrf"]
RRF_K = 2
"""Qdrant's constant, for ranks from 0; the 60 of Cormack et al. (2009) measured worse on every set we have."""


class Fused(NamedTuple):
    """A point with its fused score and what each leg said; ranks count from 1."""

    point: int
    score: float
    dense_rank: int | None = None
    dense_score: float | None = None
    sparse_rank: int | None = None
    sparse_score: float | None = None


def fuse(legs: Legs, method: Fusion) -> Iterator[Fused]:
    """Fuse, best first; equal scores are ordered by point number. A single leg keeps its own order and scores.

    A search takes the first few, so the rest is not made.
    """
    dense = {point: (rank, score) for rank, (point, score) in enumerate(legs.dense, 1)}
    sparse = {point: (rank, score) for rank, (point, score) in enumerate(legs.sparse, 1)}
    if dense and sparse:
        weigh = _dbsf if method == "dbsf" else _rrf
        scores = weigh(legs.dense)
        for point, score in weigh(legs.sparse).items():
            scores[point] = scores.get(point, 0.0) + score
    else:
        scores = dict(legs.dense or legs.sparse)
    nothing = (None, None)
    for score, point in sorted([(-score, point) for point, score in scores.items()]):
        yield Fused(point, -score, *dense.get(point, nothing), *sparse.get(point, nothing))


def _rrf(leg: list[tuple[int, float]]) -> dict[int, float]:
    """Reciprocal rank fusion: 1 / (k + rank from 0)."""
    return {point: 1.0 / (RRF_K + rank) for rank, (point, _) in enumerate(leg)}


def _dbsf(leg: list[tuple[int, float]]) -> dict[int, float]:
    """Distribution-based score fusion: each leg's scores scaled so that mean plus and minus three deviations is 0 to 1.

    https://medium.com/plain-simple-software/distribution-based-score-fusion-dbsf-a-new-approach-to-vector-search-ranking-f87c37488b18
    """
    scores = [score for _, score in leg]
    mean = sum(scores) / len(scores)
    # The statistics module is exact, and takes longer for it than the search does.
    squares = sum((score - mean) ** 2 for score in scores)
    deviation = sqrt(squares / (len(scores) - 1)) if len(scores) > 1 else 0.0
    if deviation <= 1e-9 * abs(mean):  # All alike, but for rounding.
        return {point: 0.5 for point, _ in leg}
    return {point: (score - mean) / (6.0 * deviation) + 0.5 for point, score in leg}
