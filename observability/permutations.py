"""Permutation tests in which whole sessions change sides, and several tests at once.

The main rule: a session is one observation. Its rows are averaged before anything is compared, because questions of one
conversation repeat each other: a test that permutes rows finds a change wherever there are conversations.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observability.estimates import Floats, numbered

Floats32 = NDArray[np.float32]
# Masks of so many permutations are in memory at once.
_AT_ONCE = 128
_TIE = 1e-9


def session_means(rows: NDArray[Any], sessions: Sequence[Hashable] | None) -> Floats32:
    """Average the rows of each session; sessions come in the order in which they appear."""
    features = np.asarray(rows, np.float32)
    codes = numbered(sessions, len(features))
    if codes is None:
        return features
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(codes.max() + 1))
    sums = np.add.reduceat(features[order], starts, axis=0)
    counts = np.bincount(codes).astype(np.float32)
    return np.asarray(sums / counts.reshape(-1, *(1,) * (features.ndim - 1)), np.float32)


def permutation_p(
    statistic: Callable[[Floats32], Floats], reference: int, window: int, *, permutations: int, seed: int
) -> tuple[float, float]:
    """Give the statistic of a window and its p-value among random divisions into sides of the same sizes.

    `statistic` maps masks, a column for each division with 1 for the sessions in the window (the reference's come
    first), to a number each; large ones speak for a change. The p-value counts the real division in, so that it is
    never below 1 / (permutations + 1) and never too small (Phipson and Smyth 2010).
    """
    real = np.zeros((reference + window, 1), np.float32)
    real[reference:] = 1
    observed = float(statistic(real)[0])
    # What differs by rounding alone counts as equal.
    bar = observed - _TIE * max(1.0, abs(observed))
    larger = sum(int(np.sum(statistic(masks) >= bar)) for masks in _divisions(reference, window, permutations, seed))
    return observed, (1 + larger) / (1 + permutations)


def _divisions(reference: int, window: int, permutations: int, seed: int) -> Iterator[Floats32]:
    random = np.random.default_rng(seed)
    for first in range(0, permutations, _AT_ONCE):
        columns = min(_AT_ONCE, permutations - first)
        keys = random.random((columns, reference + window), np.float32)
        chosen = np.argpartition(keys, window - 1, axis=1)[:, :window]
        masks = np.zeros((columns, reference + window), np.float32)
        np.put_along_axis(masks, chosen, np.float32(1), axis=1)
        yield masks.T


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust p-values: the chance that any false one is at most `level` is then at most that level (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return tuple(adjusted)
