"""How often answers are right, guessed without labels from signals that every answer has; and when not to believe it.

The main rule: signals such as support, retrieval score and mean log-probability become one score (logistic
regression), the score becomes a probability of being right (isotonic regression on labels: Zadrozny and Elkan 2002),
and its mean over answers is their expected accuracy (as NannyML's CBPE does). That holds while answers with the same
signals are right as often as when the labels were given. It cannot notice when that changes: show the estimate from
labels beside it.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from observability.estimates import CONFIDENCE, Design, Estimate, Floats, Moments, column, numbered, unknown, wilson

MIN_LABELS = 100
MIN_OF_A_KIND = 20
"""Labels that say right, and that say wrong: below either limit nothing is fitted."""
MAX_ERROR = 0.1
MIN_AUC = 0.6
MAX_UNSEEN = 0.05
Doubt = Literal["no_answers", "drifted", "unseen_signals", "badly_calibrated", "uninformative"]
"""Why a guess may be wrong: nothing to guess; other questions than the labelled; over 5 % of the answers with signals
unlike any labelled; guessed and true shares apart by over 0.1 on labels; signals that hardly tell right from wrong."""
_FOLDS = 5
_BINS = 5


class TooFewLabels(ValueError):
    """The labels are too few, too much of one kind, or from too few sessions for a guess."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """A fitted guess, as numbers that JSON can hold, and how good it was on labels that it had not seen.

    `error` is the mean distance between guessed and true share over five bins of scores, `auc` the chance that a right
    answer gets a higher guess than a wrong one, `variance` that of the guesses' mean.
    """

    signals: tuple[str, ...]
    centres: tuple[float, ...]
    scales: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    may_miss: tuple[bool, ...]
    weights: tuple[float, ...]
    """One for each signal, then one for each signal's absence."""
    scores: tuple[float, ...]
    probabilities: tuple[float, ...]
    """The isotonic curve: scores that rise, and the probability at each; straight between them, level outside."""
    n: int
    effective_n: float
    error: float
    auc: float
    variance: float

    def guess(self, signals: Mapping[str, ArrayLike]) -> Floats:
        """Guess each answer's probability of being right; NaN is a signal that an answer lacks."""
        features = _features(_matrix(signals, self.signals), np.array(self.centres), np.array(self.scales))
        guesses: Floats = np.interp(features @ np.array(self.weights), self.scores, self.probabilities)
        return guesses

    def unseen(self, signals: Mapping[str, ArrayLike]) -> float:
        """The share of answers with a signal outside what was labelled, or without one that always was there."""
        matrix = _matrix(signals, self.signals)
        outside = (matrix < np.array(self.lows)) | (matrix > np.array(self.highs))
        lacking = np.isnan(matrix) & ~np.array(self.may_miss)
        return float(np.any(outside | lacking, axis=1).mean()) if len(matrix) else 0.0


@dataclass(frozen=True, slots=True)
class LabelFree:
    """A guessed accuracy; `doubts` are the reasons why it may be wrong, and it is valid when there are none."""

    estimate: Estimate
    doubts: tuple[Doubt, ...]

    @property
    def valid(self) -> bool:
        """Whether nothing speaks against the estimate."""
        return not self.doubts


def calibrate(
    signals: Mapping[str, ArrayLike],
    correct: ArrayLike,
    probabilities: ArrayLike | None = None,
    *,
    sessions: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Calibration:
    """Fit a guess to labelled answers: `correct` is 1 or 0, `probabilities` are those of the queue.

    Quality figures come from five folds, sessions kept whole, each guessed by a fit to the others.

    Raises:
        TooFewLabels: there are fewer than 100 labels, or fewer than 20 of a kind, or all of a kind in one fold.
        ValueError: the columns do not fit each other.
    """
    truths = column(correct, "correct")
    kinds = np.count_nonzero(truths == 1), np.count_nonzero(truths == 0)
    if sum(kinds) < len(truths):
        raise ValueError("correct must be 1 or 0.")
    if len(truths) < MIN_LABELS or min(kinds) < MIN_OF_A_KIND:
        raise TooFewLabels(
            f"It takes {MIN_LABELS} labels and {MIN_OF_A_KIND} of each kind to calibrate: "
            f"there are {kinds[0]} right and {kinds[1]} wrong."
        )
    names = tuple(sorted(signals))
    matrix = _matrix(signals, names)
    if len(matrix) != len(truths):
        raise ValueError(f"signals must have {len(truths)} values each, as many as there are labels.")
    design = Design.of(len(truths), probabilities, sessions)
    centres, scales = _standard(matrix)
    features = _features(matrix, centres, scales)
    guesses = _cross_fitted(features, truths, design.weights, numbered(sessions, len(truths)), seed)
    weights, scores, curve = _fit(features, truths, design.weights)
    shares = design.weights / design.weights.sum()
    residuals = truths - guesses
    return Calibration(
        signals=names,
        centres=_plain(centres),
        scales=_plain(scales),
        lows=_plain(np.nanmin(np.vstack([matrix, np.full(len(names), np.inf)]), axis=0)),
        highs=_plain(np.nanmax(np.vstack([matrix, np.full(len(names), -np.inf)]), axis=0)),
        may_miss=tuple(bool(np.isnan(each).any()) for each in matrix.T),
        weights=_plain(weights),
        scores=_plain(scores),
        probabilities=_plain(curve),
        n=len(truths),
        effective_n=design.kish(design.weights),
        error=_error(guesses, residuals, shares),
        auc=_auc(guesses, truths, shares),
        # The guess is taken for no surer than the labels' own mean: the residuals' variance, which is smaller, leaves
        # out what the fit owes to these labels, and intervals from it covered 91 % where they promise 95.
        variance=design.variance(shares * (truths - shares @ truths)),
    )


def label_free(
    calibration: Calibration,
    signals: Mapping[str, ArrayLike],
    *,
    drifted: bool = False,
    confidence: float = CONFIDENCE,
) -> LabelFree:
    """Guess the accuracy of answers without labels; `drifted` says that their questions are other than the labelled."""
    guesses = Moments.of(calibration.guess(signals))
    estimate = unknown("calibrated", confidence)
    if guesses.n:
        # What the labels leave open, and that these answers, too, are right or wrong by chance.
        spread = max(guesses.mean * (1 - guesses.mean), 1e-9)
        tosses = spread / (calibration.variance + spread / guesses.n)
        ends = wilson(guesses.mean, tosses, confidence)
        estimate = Estimate(guesses.mean, *ends, guesses.n, tosses, "calibrated", confidence)
    doubts: dict[Doubt, bool] = {
        "no_answers": not guesses.n,
        "drifted": drifted,
        "unseen_signals": calibration.unseen(signals) > MAX_UNSEEN,
        "badly_calibrated": calibration.error > MAX_ERROR,
        "uninformative": calibration.auc < MIN_AUC,
    }
    return LabelFree(estimate, tuple(doubt for doubt, holds in doubts.items() if holds))


def _matrix(signals: Mapping[str, ArrayLike], names: Sequence[str]) -> Floats:
    if not names or set(names) - signals.keys():
        raise ValueError(
            f"signals must be {', '.join(names) or 'at least one'}: there are {', '.join(signals) or 'none'}."
        )
    columns = [np.asarray(signals[name], np.float64) for name in names]
    if (
        len({each.shape for each in columns}) > 1
        or columns[0].ndim != 1
        or any(np.isinf(each).any() for each in columns)
    ):
        raise ValueError("signals must be columns of one length, with numbers or NaN.")
    return np.stack(columns, axis=1)


def _standard(matrix: Floats) -> tuple[Floats, Floats]:
    """Centre and scale of each signal among the answers that have it."""
    present = [each[~np.isnan(each)] for each in matrix.T]
    centres = np.array([each.mean() if len(each) else 0.0 for each in present])
    scales = np.array([each.std() if len(each) else 1.0 for each in present])
    return centres, np.where(scales > 0, scales, 1.0)


def _features(matrix: Floats, centres: Floats, scales: Floats) -> Floats:
    """The signals, standardised and with 0 where one is absent, and beside them whether each is absent."""
    return np.hstack([np.nan_to_num((matrix - centres) / scales), np.isnan(matrix)])


def _fit(features: Floats, truths: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """The weights of the features, and the isotonic curve from their weighted sum to a probability."""
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression

    even = weights / weights.mean()
    model = LogisticRegression().fit(features, truths, sample_weight=even)
    direction: Floats = model.coef_[0]
    curve = IsotonicRegression(y_min=0, y_max=1).fit(features @ direction, truths, sample_weight=even)
    return direction, curve.X_thresholds_, curve.y_thresholds_


def _cross_fitted(
    features: Floats, truths: Floats, weights: Floats, sessions: NDArray[np.intp] | None, seed: int
) -> Floats:
    codes = np.arange(len(truths)) if sessions is None else sessions
    folds = np.random.default_rng(seed).permutation(codes.max() + 1)[codes] % _FOLDS
    guesses = np.empty(len(truths))
    for fold in range(_FOLDS):
        held_out = folds == fold
        if held_out.any():
            if len(np.unique(truths[~held_out])) < 2:
                raise TooFewLabels("It takes labels of each kind from several sessions to calibrate.")
            direction, scores, curve = _fit(features[~held_out], truths[~held_out], weights[~held_out])
            guesses[held_out] = np.interp(features[held_out] @ direction, scores, curve)
    return guesses


def _error(guesses: Floats, residuals: Floats, shares: Floats) -> float:
    """The expected calibration error over bins of equal weight."""
    order = np.argsort(guesses, kind="stable")
    bins = np.minimum((np.cumsum(shares[order]) * _BINS).astype(int), _BINS - 1)
    return float(np.abs(np.bincount(bins, shares[order] * residuals[order])).sum())


def _auc(guesses: Floats, truths: Floats, shares: Floats) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truths, guesses, sample_weight=shares))


def _plain(values: Floats) -> tuple[float, ...]:
    return tuple(map(float, values))
