"""What labels say of a release's answers: classes, right answers, and how long labels take to come.

The main rule: labels whose sampling probability is known are weighed by it and not mixed with others, since what
somebody chose to label is a sample of nothing. Where a judge scored nearly all answers, its scores make the figures
sharper (`observability.estimates.prediction_powered`).
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from app.predictions import created_at
from app.quality.figures import Figure, figure
from observability.classification import Scores, classification
from observability.estimates import Estimate, Moments, mean_score, prediction_powered, quantile
from observability.matching import exact_match, token_f1

MAX_CLASSES = 50
"""Classes with figures of their own: the commonest."""
MIN_JUDGED = 0.95
"""The share of answers that a judge must have scored, and of labelled ones, before it is used."""
_MAX_CLASS_CHARACTERS = 256


class Labelled(msgspec.Struct, frozen=True, kw_only=True):
    """What the labels of one answer come to."""

    session: int
    made_at: float
    """When it was answered, in seconds since 1970."""
    tenant: str
    chances: dict[str, float]
    """By queue, or other way of sampling, how likely it was to take the answer."""
    chances_in_slices: dict[str, float] = {}
    """The same of queues that consider some of the answers only."""
    probability: float | None = None
    """What its weight is one over, up to a factor that is the same for all: `weighed` fills it in."""
    signals: tuple[float, float, float]
    true_class: str | None
    said: str | None
    """The answer, where it is short enough to name a class."""
    exact: float | None
    f1: float | None
    judged: float | None
    delay_seconds: float

    @classmethod
    def of(
        cls,
        labels: Sequence[Any],
        session: int,
        signals: tuple[float, float, float],
        *,
        tenant: str,
        partial: Collection[str] = (),
    ) -> "Labelled":
        """Sum up the labels of an answer, the newest first; `partial` are queues that consider a slice only.

        Of several classes the commonest counts, and the newest of those; every right answer is one.
        """
        answer = labels[0].answer
        classes = [each.class_name for each in labels if each.class_name is not None]
        rights = [each.right_answer for each in labels if each.right_answer is not None]
        chances: dict[str, float] = {}
        for each in labels:
            if each.sampling_probability is not None:
                queue = queue_of(each.policy)
                chances[queue] = max(each.sampling_probability, chances.get(queue, 0.0))
        is_matched = bool(rights) and answer is not None
        first = min(created_at(each.label_id) for each in labels)
        return cls(
            session=session,
            made_at=created_at(labels[0].id).timestamp(),
            tenant=tenant,
            chances={queue: chance for queue, chance in chances.items() if queue not in partial},
            chances_in_slices={queue: chance for queue, chance in chances.items() if queue in partial},
            signals=signals,
            true_class=Counter(classes).most_common(1)[0][0] if classes else None,
            said=labels[0].predicted_class or _short(answer),
            exact=exact_match(answer, rights) if is_matched else None,
            f1=token_f1(answer, rights) if is_matched else None,
            judged=None if labels[0].judged is None else float(labels[0].judged),
            delay_seconds=(first - created_at(labels[0].id)).total_seconds(),
        )


class Weighed(msgspec.Struct, frozen=True, kw_only=True):
    """Labelled answers that may be taken together, each with its weight."""

    rows: list[Labelled]
    left_out: int
    """Labelled answers of unknown probability beside others whose probability is known, or of a slice beside all."""
    sampled: bool


def queue_of(policy: str | None) -> str:
    """The queue that a label's policy names: what stands before the slash."""
    return (policy or "").partition("/")[0]


def weighed(rows: Sequence[Labelled]) -> Weighed:
    """Weigh answers by how likely chance was to have them labelled; those of unknown probability only if all are.

    Each queue's weights, one over its probability, add up to all answers by themselves. So do those of several queues
    when each is taken times a share of 1 (Hartley 1962): in proportion to how many equal rows it is worth (Kish). No
    queue need know how likely another was to take an answer. Queues that consider a slice only are left out beside
    others; alone they speak for their slice.
    """
    sampled = [(row, row.chances) for row in rows if row.chances]
    sampled = sampled or [(row, row.chances_in_slices) for row in rows if row.chances_in_slices]
    if not sampled:
        return Weighed(rows=list(rows), left_out=0, sampled=False)
    weights: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, chances in sampled:
        for queue, chance in chances.items():
            weights[row.tenant, queue].append(1 / chance)
    worth = {key: sum(each) ** 2 / sum(weight**2 for weight in each) for key, each in weights.items()}
    totals: dict[str, float] = defaultdict(float)
    for (tenant, _), rows_worth in worth.items():
        totals[tenant] += rows_worth
    combined = [
        sum(worth[row.tenant, queue] / totals[row.tenant] / chance for queue, chance in chances.items())
        for row, chances in sampled
    ]
    smallest = min(1.0, *combined)  # A probability is at most 1, and only their proportions count.
    found = [
        msgspec.structs.replace(row, probability=smallest / weight)
        for (row, _), weight in zip(sampled, combined, strict=True)
    ]
    return Weighed(rows=found, left_out=len(rows) - len(sampled), sampled=True)


class LabelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one release that rest on labels."""

    labelled: int
    left_out: int
    sampled: bool
    figures: list[Figure]


def label_figures(rows: Sequence[Labelled], answers: int, judged: Moments | None) -> LabelFigures:
    """Make the figures; `answers` is how many the release gave, `judged` what a judge says of all of them."""
    meant = weighed(rows)
    # What corrects a judge has to be drawn from all that it judged: answers that somebody chose are unlike the others.
    may_judge = meant.sampled and judged is not None and judged.n >= MIN_JUDGED * answers
    judge = judged if may_judge else None
    figures = list(_figures(meant.rows, judge)) if meant.rows else []
    if rows:
        delays = [row.delay_seconds for row in rows]
        sessions = [row.session for row in rows]
        for suffix, share in (("median", 0.5), ("p90", 0.9)):
            delay = quantile(delays, share, sessions=sessions)
            figures.append(figure(f"label_delay_seconds_{suffix}", delay, unit="seconds"))
    return LabelFigures(labelled=len(meant.rows), left_out=meant.left_out, sampled=meant.sampled, figures=figures)


def names_classes(rows: Sequence[Labelled]) -> bool:
    """Whether any answer is one of the stated classes; else these are what a reviewer thinks of answers."""
    stated = {row.true_class for row in rows}
    return any(row.said in stated for row in rows)


def _figures(rows: Sequence[Labelled], judge: Moments | None) -> Iterator[Figure]:
    matched = [row for row in rows if row.exact is not None]
    if matched:
        yield figure("exact_match", _score(matched, [row.exact or 0.0 for row in matched], judge))
        yield figure("token_f1", _score(matched, [row.f1 or 0.0 for row in matched], judge))
    classed = [row for row in rows if row.true_class is not None]
    names = [name for name, _ in Counter(row.true_class for row in classed).most_common(MAX_CLASSES) if name]
    for name in names:
        hits = [float(row.true_class == name) for row in classed]
        yield figure("class_share", _score(classed, hits, judge), class_name=name)
    if names_classes(classed):
        yield from _classified(classed, names, judge)


def _classified(rows: Sequence[Labelled], names: Sequence[str], judge: Moments | None) -> Iterator[Figure]:
    truths = [row.true_class or "" for row in rows]
    answers = [row.said for row in rows]
    sessions = [row.session for row in rows]
    answered = Counter(answer for answer in answers if answer in set(truths))
    listed = list(dict.fromkeys([*names, *(name for name, _ in answered.most_common() if name)]))[:MAX_CLASSES]
    found = classification(truths, answers, _probabilities(rows), sessions=sessions, classes=listed)
    yield figure("accuracy", _score(rows, [float(row.true_class == row.said) for row in rows], judge))
    for kind, scores in (("micro", found.micro), ("macro", found.macro)):
        yield from _of_scores(scores, f"_{kind}", None)
    for name, scores in found.per_class.items():
        yield from _of_scores(scores, "", name)


def _of_scores(scores: Scores, suffix: str, class_name: str | None) -> Iterator[Figure]:
    for name in ("precision", "recall", "f1"):
        yield figure(f"{name}{suffix}", getattr(scores, name), class_name=class_name)


def _score(rows: Sequence[Labelled], scores: Sequence[float], judge: Moments | None) -> Estimate:
    """Estimate a mean score, by help of the judge where it scored enough and tells something."""
    judged = [at for at, row in enumerate(rows) if row.judged is not None]
    if judge is not None and len(judged) >= MIN_JUDGED * len(rows) and judge.n >= len(judged):
        some = [rows[at] for at in judged]
        said = np.array([row.judged for row in some], float)
        truths = np.array(scores)[judged]
        # The judge may speak for a class or against it.
        for proxies, everything in ((said, judge), (1 - said, Moments(judge.n, 1 - judge.mean, judge.variance))):
            found = prediction_powered(
                truths, proxies, everything, _probabilities(some), sessions=[row.session for row in some]
            )
            if found.method == "prediction-powered":
                return found
    return mean_score(scores, _probabilities(rows), sessions=[row.session for row in rows])


def _short(answer: str | None) -> str | None:
    """An answer that is short enough to name a class, without the space around it."""
    return answer.strip() if answer is not None and len(answer) <= _MAX_CLASS_CHARACTERS else None


def _probabilities(rows: Sequence[Labelled]) -> list[float] | None:
    known = [row.probability for row in rows if row.probability is not None]
    return known if len(known) == len(rows) else None
