"""Which of the passages that were found are taken, so that they do not all say the same.

The main rule: pure and deterministic. What ranked first is always taken, and of equals the one that ranked higher.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from retrieval.index import Vector

_Item = TypeVar("_Item")
_LEAST_POOL = 20
_POOL_FACTOR = 4


@dataclass(frozen=True, slots=True)
class Variety:
    """How unlike each other the hits of a search have to be; by default they may be as alike as they are."""

    per_document: int | None = None
    """So many passages of one document at most."""
    mmr: float | None = None
    """How much relevance counts beside being unlike what is taken already: 1 alone, 0 not at all; None is 1."""

    def pool(self, top_k: int) -> int:
        """How many hits to choose from; as many as are wanted where there is no choice."""
        return top_k if self.mmr is None else max(_LEAST_POOL, _POOL_FACTOR * top_k)


def few_of_each(items: Iterable[_Item], group: Callable[[_Item], Hashable], most: int | None) -> Iterator[_Item]:
    """Leave out what comes when `most` of its group came before; None leaves out nothing."""
    if most is None:
        yield from items
        return
    taken: Counter[Hashable] = Counter()
    for item in items:
        key = group(item)
        taken[key] += 1
        if taken[key] <= most:
            yield item


def marginal(scores: Sequence[float], vectors: Vector, count: int, balance: float) -> list[int]:
    """Order by maximal marginal relevance; gives the positions of `count` items, or of all if there are fewer.

    Each next one has the largest `balance * relevance - (1 - balance) * its largest cosine to those taken` (Carbonell
    and Goldstein, 1998). Relevance is the score, scaled so that the best has 1 and the worst 0: fused scores have no
    scale of their own. `scores` come best first; `vectors` are rows of length 1, or 0 where there is none.
    """
    relevance = np.asarray(scores, dtype=np.float64)
    if not relevance.size:
        return []
    spread = relevance.max() - relevance.min()
    relevance = (relevance - relevance.min()) / spread if spread > 0 else np.ones_like(relevance)
    alike = np.zeros_like(relevance)
    free = np.ones(relevance.size, dtype=bool)
    taken = [0]
    while len(taken) < min(count, relevance.size):
        free[taken[-1]] = False
        cosines = (vectors @ vectors[taken[-1]]).astype(np.float64)
        alike = cosines if len(taken) == 1 else np.maximum(alike, cosines)
        worth = np.where(free, balance * relevance - (1.0 - balance) * alike, -np.inf)
        taken.append(int(worth.argmax()))
    return taken[:count]
