"""Pure: how far reviewers of the same items agree beyond chance, for classes without an order.

Cohen's kappa (1960) for two reviewers, Krippendorff's alpha (2011, nominal) for any number and with gaps. Intervals are
percentiles of a bootstrap over items: which items were reviewed is what chance decided.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
MIN_ITEMS = 20
"""Items below which no interval is given: a bootstrap of fewer says little."""

CELLS_AT_ONCE = 1_000_000
"""Numbers that are held at a time, of 8 bytes and a few times over, whatever there is of items and classes."""

Floats = NDArray[np.float64]
Pattern = TypeVar("Pattern", bound=tuple[str, ...])


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """A coefficient: 1 is perfect agreement, 0 what chance alone gives, below that less. None where it has no value."""

    value: float | None
    low: float | None
    high: float | None
    """Bounds of the 95 % interval."""
    items: int
    """Items that at least two reviewers classed."""


class PairAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """Cohen's kappa of two reviewers."""

    reviewers: tuple[str, str]
    kappa: Agreement
    share: float
    """Of the items on which both chose the same class."""


def krippendorff_alpha(items: Iterable[Sequence[str]]) -> Agreement:
    """Krippendorff's nominal alpha; `items` holds the classes that reviewers gave to each item, in any order."""
    patterns = _counted(tuple(sorted(given)) for given in items if len(given) > 1)
    size = np.array([len(pattern) for pattern in patterns], dtype=float)
    differing = np.array([_differing(pattern) for pattern in patterns])
    by_class = _ByClass(patterns)

    def alpha(weights: Floats) -> Floats:
        total = weights @ size
        expected = (total**2 - (by_class.sums(weights) ** 2).sum(axis=1)) / (total - 1)
        return _divided(expected - weights @ differing, expected)

    return _bootstrapped(patterns.values(), alpha, cells=by_class.cells)


def _differing(pattern: Sequence[str]) -> float:
    """The pairs of an item's classes that differ, each way round, as its reviewers share them out."""
    alike = sum(count * (count - 1) for count in Counter(pattern).values())
    return len(pattern) - alike / (len(pattern) - 1)


def cohen_kappa(pairs: Iterable[tuple[str, str]]) -> Agreement:
    """Cohen's kappa; `pairs` holds what two reviewers chose for each item."""
    patterns = _counted(pairs)
    # A class that only one of them chose is agreed on by no chance either.
    both = {a for a, _ in patterns} & {b for _, b in patterns}
    first, second = (_ByClass([[pair[who]] if pair[who] in both else [] for pair in patterns]) for who in (0, 1))
    same = np.array([float(a == b) for a, b in patterns])

    def kappa(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        observed = weights @ same / total
        expected = (first.sums(weights) * second.sums(weights)).sum(axis=1) / total**2
        return _divided(observed - expected, 1.0 - expected)

    return _bootstrapped(patterns.values(), kappa, cells=len(patterns))


class _ByClass:
    """Counts how often each class was given, in the order of their names.

    There may be as many classes as items, and a table of patterns by classes would not fit: what is 0 is not kept.
    """

    def __init__(self, patterns: Iterable[Sequence[str]]) -> None:
        found = sorted((name, at, count) for at, each in enumerate(patterns) for name, count in Counter(each).items())
        self.cells = len(found)
        self._patterns = np.array([at for _, at, _ in found], dtype=np.intp)
        self._counts = np.array([count for _, _, count in found], dtype=float)
        is_first = [at == 0 or name != found[at - 1][0] for at, (name, _, _) in enumerate(found)]
        self._starts = np.flatnonzero(is_first)

    def sums(self, weights: Floats) -> Floats:
        """The counts of each class where patterns have these weights, a row of them for a row of weights."""
        return np.add.reduceat(weights[:, self._patterns] * self._counts, self._starts, axis=1)


def pairwise(items: Iterable[dict[str, str]]) -> list[PairAgreement]:
    """Cohen's kappa of each two reviewers who share items; `items` holds each item's classes by reviewer."""
    shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for given in items:
        for a, b in combinations(sorted(given), 2):
            shared.setdefault((a, b), []).append((given[a], given[b]))
    return [
        PairAgreement(reviewers=reviewers, kappa=cohen_kappa(pairs), share=sum(a == b for a, b in pairs) / len(pairs))
        for reviewers, pairs in sorted(shared.items())
    ]


def _counted(patterns: Iterable[Pattern]) -> dict[Pattern, int]:
    """How many items there are of each pattern: few enough to resample, however many items."""
    return dict(sorted(Counter(patterns).items()))


def _bootstrapped(counts: Iterable[int], coefficient: Callable[[Floats], Floats], *, cells: int) -> Agreement:
    """A coefficient with its interval.

    `counts` says how many items there are of each pattern, `cells` how many numbers a coefficient is made of.
    """
    given = np.array(list(counts), dtype=float)
    items = int(given.sum())
    if not items:
        return Agreement(value=None, low=None, high=None, items=0)
    value = _number(coefficient(given[np.newaxis])[0])
    low = high = None
    if items >= MIN_ITEMS and value is not None:
        # The same items get the same interval, whoever asks.
        chance = np.random.default_rng(items)
        at_once = max(1, CELLS_AT_ONCE // cells)
        found = np.concatenate(
            [
                coefficient(
                    chance.multinomial(items, given / items, size=min(at_once, RESAMPLES - start)).astype(float)
                )
                for start in range(0, RESAMPLES, at_once)
            ]
        )
        found = found[~np.isnan(found)]
        low, high = (_number(each) for each in np.quantile(found, (0.025, 0.975)))
    return Agreement(value=value, low=low, high=high, items=items)


def _divided(above: Floats, below: Floats) -> Floats:
    """Divide; where only one class occurs there is nothing to agree on."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=np.abs(below) > 1e-12)


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
