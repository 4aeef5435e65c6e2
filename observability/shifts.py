"""Whether what a release gives differs between a window and its reference: labels, refusals, lengths, scores.

Categories are compared by chi-square and numbers by Kolmogorov and Smirnov's distance, both with p-values from
permutations of whole sessions: the textbook ones take each answer for independent, and want no rare categories.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from observability.estimates import Floats, column
from observability.permutations import Floats32, permutation_p, session_means

PERMUTATIONS = 999
_MAX_THRESHOLDS = 200


@dataclass(frozen=True, slots=True)
class Shift:
    """One output's difference: `effect` is 0 (none) to 1, and `at` says where it is largest.

    For categories the effect is the total variation distance, the part of the answers that changed category, and `at`
    the category; for numbers it is the largest difference between the two distributions, and `at` the number up to
    which the shares differ so. `reference` and `window` are those shares.
    """

    p_value: float
    effect: float
    at: str | float
    reference: float
    window: float


def category_shift(
    reference: Sequence[str],
    window: Sequence[str],
    reference_sessions: Sequence[Hashable] | None = None,
    window_sessions: Sequence[Hashable] | None = None,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Shift:
    """Compare how often each category occurs (chi-square: Pearson 1900); a category may occur on one side alone."""
    names = sorted({*reference, *window})
    codes = {name: code for code, name in enumerate(names)}
    one_hot = np.eye(len(names), dtype=np.float32)
    own, theirs = (
        session_means(one_hot[[codes[each] for each in side]], sessions)
        for side, sessions in ((reference, reference_sessions), (window, window_sessions))
    )
    _check(own, theirs)

    def chi_square(differences: Floats, pooled: Floats) -> Floats:
        return np.asarray(np.sum(differences**2 / pooled[:, None], axis=0))

    p_value = _permuted(chi_square, own, theirs, permutations, seed)
    before, after = own.mean(axis=0), theirs.mean(axis=0)
    at = int(np.argmax(np.abs(after - before)))
    effect = float(np.abs(after - before).sum()) / 2
    return Shift(p_value, effect, names[at], float(before[at]), float(after[at]))


def number_shift(
    reference: ArrayLike,
    window: ArrayLike,
    reference_sessions: Sequence[Hashable] | None = None,
    window_sessions: Sequence[Hashable] | None = None,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Shift:
    """Compare the distributions of a number, such as tokens or a retrieval score, at up to 200 of its values."""
    sides = column(reference, "reference"), column(window, "window")
    values = np.unique(np.concatenate(sides))
    thresholds = (
        values[np.unique(np.linspace(0, len(values) - 1, _MAX_THRESHOLDS).astype(int))] if len(values) else values
    )
    own, theirs = (
        session_means(side[:, None] <= thresholds, sessions)
        for side, sessions in zip(sides, (reference_sessions, window_sessions), strict=True)
    )
    _check(own, theirs)

    def largest(differences: Floats, _: Floats) -> Floats:
        return np.asarray(np.abs(differences).max(axis=0))

    p_value = _permuted(largest, own, theirs, permutations, seed)
    before, after = own.mean(axis=0), theirs.mean(axis=0)
    at = int(np.argmax(np.abs(after - before)))
    return Shift(p_value, float(abs(after - before)[at]), float(thresholds[at]), float(before[at]), float(after[at]))


def _permuted(
    statistic: Callable[[Floats, Floats], Floats], own: Floats32, theirs: Floats32, permutations: int, seed: int
) -> float:
    """The p-value of a statistic of the mean features' differences, a column a division, and of their pooled means."""
    features = np.concatenate([own, theirs])
    totals = features.sum(axis=0, dtype=np.float64)
    pooled = totals / len(features)

    def of_masks(masks: Floats32) -> Floats:
        inside = (features.T @ masks).astype(np.float64)
        differences = inside / len(theirs) - (totals[:, None] - inside) / len(own)
        return statistic(differences, pooled)

    return permutation_p(of_masks, len(own), len(theirs), permutations=permutations, seed=seed)[1]


def _check(own: Floats32, theirs: Floats32) -> None:
    if not len(own) or not len(theirs):
        raise ValueError("reference and window must each have at least one row.")
