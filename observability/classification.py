"""How well classes were told: accuracy, precision, recall and F1, per class and averaged, each with its interval.

The values are scikit-learn's on the same rows and weights with `zero_division=nan`: a class that was never answered has
no precision and one that never was true no recall; theirs is None and left out of the macro average. To count them 0
would make a release worse for each class of which the sample happens to hold nothing. F1 is a growing function of the
Jaccard index J, 2 J / (1 + J), and J is the share of right rows among those that are or were called the class, so that
its interval carries over; a macro average's comes from its rows' influences (the delta method of Takahashi and others
2022).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observability.estimates import CONFIDENCE, Design, Estimate, Floats, Ratio, unknown

MIN_ROWS_PER_CLASS = 10
"""Effective rows a class on (harmonic) average before a macro average gets an interval: with 4, those that promise 95 %
covered 89, and with 2, 80."""
_UNLISTED = -1


@dataclass(frozen=True, slots=True)
class Scores:
    """Of the rows called a class those that are (precision), of those that are the ones called so (recall), and F1."""

    precision: Estimate
    recall: Estimate
    f1: Estimate


@dataclass(frozen=True, slots=True)
class Classification:
    """Scores of all rows. `micro` adds the rows of all classes up, `macro` averages over classes."""

    accuracy: Estimate
    micro: Scores
    macro: Scores
    per_class: Mapping[str, Scores]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The three ratios behind the scores of a class; the last is the Jaccard index."""

    precision: Ratio | None
    recall: Ratio | None
    jaccard: Ratio | None


def classification(
    truths: Sequence[str],
    answers: Sequence[str | None],
    probabilities: ArrayLike | None = None,
    *,
    sessions: Sequence[Hashable] | None = None,
    classes: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
) -> Classification:
    """Score answers against the true classes; an answer that is None, or no class, is wrong.

    `classes` are those to report, by default all that occur. `probabilities` and `sessions` are as in `mean_score`.
    """
    if len(truths) != len(answers):
        raise ValueError(f"answers must be as many as truths: {len(answers)} for {len(truths)}.")
    design = Design.of(len(truths), probabilities, sessions)
    if classes is None:
        classes = sorted({*truths, *(answer for answer in answers if answer is not None)})
    codes = {name: code for code, name in enumerate(dict.fromkeys(classes))}
    true, said = _coded(truths, codes), _coded(answers, codes)
    right = np.array([truth == answer for truth, answer in zip(truths, answers, strict=True)], np.float64)
    parts = {name: _parts(true == code, said == code, design) for name, code in codes.items()}
    listed = (true != _UNLISTED).astype(np.float64), (said != _UNLISTED).astype(np.float64)
    hits = right * listed[0]
    micro = _Parts(
        Ratio.of(hits, listed[1], design),
        Ratio.of(hits, listed[0], design),
        Ratio.of(hits, listed[0] + listed[1] - hits, design),
    )
    return Classification(
        _estimate(Ratio.of(right, np.ones(len(right)), design), design, confidence),
        _scores(micro, design, confidence),
        _macro(list(parts.values()), design, confidence),
        {name: _scores(each, design, confidence) for name, each in parts.items()},
    )


def _coded(names: Sequence[str | None], codes: Mapping[str, int]) -> NDArray[np.intp]:
    return np.fromiter(
        (_UNLISTED if name is None else codes.get(name, _UNLISTED) for name in names), np.intp, len(names)
    )


def _parts(is_class: NDArray[np.bool_], called: NDArray[np.bool_], design: Design) -> _Parts:
    hits = (is_class & called).astype(np.float64)
    return _Parts(
        Ratio.of(hits, called.astype(np.float64), design),
        Ratio.of(hits, is_class.astype(np.float64), design),
        Ratio.of(hits, (is_class | called).astype(np.float64), design),
    )


def _scores(parts: _Parts, design: Design, confidence: float) -> Scores:
    jaccard = _estimate(parts.jaccard, design, confidence)
    if jaccard.value is not None:
        assert jaccard.low is not None
        assert jaccard.high is not None
        jaccard = replace(jaccard, value=_f1(jaccard.value), low=_f1(jaccard.low), high=_f1(jaccard.high))
    return Scores(_estimate(parts.precision, design, confidence), _estimate(parts.recall, design, confidence), jaccard)


def _estimate(ratio: Ratio | None, design: Design, confidence: float) -> Estimate:
    return ratio.estimate(design, confidence) if ratio else unknown(design.method, confidence)


def _macro(classes: Sequence[_Parts], design: Design, confidence: float) -> Scores:
    rows = len(design.weights)

    def average(
        ratios: Sequence[Ratio | None], value: Callable[[float], float], slope: Callable[[float], float]
    ) -> Estimate:
        known = [ratio for ratio in ratios if ratio]
        if not known:
            return unknown(design.method, confidence)
        middle = sum(value(ratio.value) for ratio in known) / len(known)
        influences: Floats = np.zeros(rows)
        shares: Floats = np.zeros(rows)
        for ratio in known:
            # A variance within a class of few rows is seen too small by (k - 1) / k, which adds up over many classes.
            few = max(2.0, design.kish(ratio.shares))
            influences += slope(ratio.value) * np.sqrt(few / (few - 1)) * ratio.influences / len(known)
            shares += ratio.shares / len(known)
        whole = Ratio(middle, influences, shares, middle * (1 - middle), int(np.count_nonzero(shares)))
        estimate = whole.estimate(design, confidence)
        enough = design.kish(shares) >= MIN_ROWS_PER_CLASS * len(known)
        return estimate if enough else replace(estimate, low=None, high=None)

    return Scores(
        average([each.precision for each in classes], float, lambda _: 1.0),
        average([each.recall for each in classes], float, lambda _: 1.0),
        average([each.jaccard for each in classes], _f1, lambda jaccard: 2 / (1 + jaccard) ** 2),
    )


def _f1(jaccard: float) -> float:
    return 2 * jaccard / (1 + jaccard)
