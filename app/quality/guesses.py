"""What labels would say of the answers that have none: guessed from signals on record, each guess with its doubts.

The main rule: a guess stands beside the figure from labels and never in its place. It is fitted to what was labelled
in the last 90 days, whichever window is asked for, so that it speaks of answers whose labels are still to come.

The signals are support, the nearest passage's score, and the share of the answer that citations cover. The answers'
log-probabilities are not on record: engines send them only on request, with every token, and reading them would cost
each request more than all else that the gateway does.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import Row

from app.predictions.signals import covered, dense_scores, read_citations, support
from app.quality.figures import Figure, figure
from app.quality.labels import Labelled, names_classes, weighed
from observability.calibration import Calibration, TooFewLabels, calibrate, label_free
from observability.estimates import Floats, unknown

SIGNALS = ("coverage", "retrieval_score", "support")
LABELLED_DAYS = 90
OUTDATED_DAYS = 30
"""With half of the labelled answers older than that before the window's end, a guess is outdated."""
MAX_CLASSES = 5

Signals = tuple[float, float, float]


def signals_of(row: Row[Any]) -> Signals:
    """Read an answer's signals, in the order of `SIGNALS`; NaN is one that it lacks."""
    known = support(row.verdict, row.citations)
    scores = dense_scores(row.passages)
    cited = np.nan
    if row.citations is not None and row.answer_characters:
        cited = min(1.0, covered(read_citations(row.citations)) / row.answer_characters)
    return cited, scores[0] if scores else np.nan, np.nan if known is None else known


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A guess of one figure, ready to be applied; no calibration is one that could not be made."""

    figure: str
    class_name: str | None
    calibration: Calibration | None
    is_outdated: bool


def fits(rows: Sequence[Labelled], until: float) -> list[Fit]:
    """Fit a guess for each figure that the labels of a release tell of; `until` is the window's end in seconds."""
    rows = weighed(rows).rows
    found = []
    for name, class_name, meant, truths in _targets(rows):
        ages = [until - row.made_at for row in meant]
        is_outdated = bool(np.median(ages) > OUTDATED_DAYS * 86_400)
        found.append(
            Fit(figure=name, class_name=class_name, calibration=_fitted(meant, truths), is_outdated=is_outdated)
        )
    return found


def guesses(found: Sequence[Fit], signals: Sequence[Signals], *, drifted: bool) -> Iterator[Figure]:
    """Guess each figure for answers with these signals; `drifted` says that questions are other than the labelled."""
    columns = _columns(signals)
    for fit in found:
        estimate, doubts = unknown("calibrated"), ["too_few_labels"]
        if fit.calibration is not None:
            free = label_free(fit.calibration, columns, drifted=drifted)
            estimate, doubts = free.estimate, [*free.doubts, *(["outdated"] if fit.is_outdated else [])]
        yield figure(f"{fit.figure}_guessed", estimate, class_name=fit.class_name, doubts=doubts)


def _targets(rows: Sequence[Labelled]) -> Iterator[tuple[str, str | None, Sequence[Labelled], list[bool]]]:
    """Each figure that is a share of labelled answers: its name, its class, the answers, and which count."""
    matched = [row for row in rows if row.exact is not None]
    if matched:
        yield "exact_match", None, matched, [row.exact == 1.0 for row in matched]
    classed = [row for row in rows if row.true_class is not None]
    for name, _ in Counter(row.true_class for row in classed).most_common(MAX_CLASSES):
        yield "class_share", name, classed, [row.true_class == name for row in classed]
    if names_classes(classed):
        yield "accuracy", None, classed, [row.true_class == row.said for row in classed]


def _fitted(rows: Sequence[Labelled], truths: Sequence[bool]) -> Calibration | None:
    probabilities = [row.probability for row in rows if row.probability is not None]
    try:
        return calibrate(
            _columns([row.signals for row in rows]),
            np.array(truths, float),
            probabilities if len(probabilities) == len(rows) else None,
            sessions=[row.session for row in rows],
        )
    except TooFewLabels:
        return None


def _columns(signals: Sequence[Signals]) -> Mapping[str, Floats]:
    matrix = np.array(signals, float).reshape(-1, len(SIGNALS))
    return dict(zip(SIGNALS, matrix.T, strict=True))
