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
    codes = {name: code for code, name in enumerate(sorted({name for pattern in patterns for name in pattern}))}
    size = len(codes)
    pairs = np.zeros((len(patterns), size, size))
    for at, pattern in enumerate(patterns):
        counts = np.bincount([codes[name] for name in pattern], minlength=size).astype(float)
        pairs[at] = (np.outer(counts, counts) - np.diag(counts)) / (len(pattern) - 1)

    def alpha(weights: Floats) -> Floats:
        together = np.tensordot(weights, pairs, axes=1)
        of_class = together.sum(axis=2)
        total = of_class.sum(axis=1)
        observed = total - np.trace(together, axis1=1, axis2=2)
        expected = (total**2 - (of_class**2).sum(axis=1)) / (total - 1)
        return _divided(expected - observed, expected)

    return _bootstrapped(patterns.values(), alpha)


def cohen_kappa(pairs: Iterable[tuple[str, str]]) -> Agreement:
    """Cohen's kappa; `pairs` holds what two reviewers chose for each item."""
    patterns = _counted(pairs)
    codes = {name: code for code, name in enumerate(sorted({name for pair in patterns for name in pair}))}
    chosen = np.zeros((2, len(patterns), len(codes)))
    for at, pair in enumerate(patterns):
        for reviewer in (0, 1):
            chosen[reviewer, at, codes[pair[reviewer]]] = 1.0
    same = np.array([float(a == b) for a, b in patterns])

    def kappa(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        observed = weights @ same / total
        expected = ((weights @ chosen[0]) * (weights @ chosen[1])).sum(axis=1) / total**2
        return _divided(observed - expected, 1.0 - expected)

    return _bootstrapped(patterns.values(), kappa)


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


def _bootstrapped(counts: Iterable[int], coefficient: Callable[[Floats], Floats]) -> Agreement:
    """A coefficient with its interval; `counts` says how many items there are of each pattern."""
    given = np.array(list(counts), dtype=float)
    items = int(given.sum())
    if not items:
        return Agreement(value=None, low=None, high=None, items=0)
    value = _number(coefficient(given[np.newaxis])[0])
    low = high = None
    if items >= MIN_ITEMS and value is not None:
        # The same items get the same interval, whoever asks.
        drawn = np.random.default_rng(items).multinomial(items, given / items, size=RESAMPLES).astype(float)
        found = coefficient(drawn)
        found = found[~np.isnan(found)]
        low, high = (_number(each) for each in np.quantile(found, (0.025, 0.975)))
    return Agreement(value=value, low=low, high=high, items=items)


def _divided(above: Floats, below: Floats) -> Floats:
    """Divide; where only one class occurs there is nothing to agree on."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=np.abs(below) > 1e-12)


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
