"""Simulated label queues: how often intervals of accuracy, F1 and guessed accuracy cover the truth."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from observability.calibration import calibrate, label_free
from observability.classification import classification
from observability.estimates import Estimate, Moments, mean_score, prediction_powered
from tests.benchmarks.tables import Table

ANSWERS = 20_000
LABELS = 300
# How much a wrong answer looks doubtful to whoever fills the queue.
DOUBT = 1.5


@dataclass
class Traffic:
    """Answers with their doubtfulness, whether each is right, a lenient judge's word, and the session of each."""

    doubt: np.ndarray
    right: np.ndarray
    judged: np.ndarray
    sessions: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


class Coverage:
    """What one estimator did over many runs."""

    def __init__(self) -> None:
        self.runs = self.covered = 0
        self.bias = self.width = 0.0

    def add(self, estimate: Estimate, truth: float) -> None:
        if estimate.value is None or estimate.low is None or estimate.high is None:
            return
        self.runs += 1
        self.covered += estimate.low <= truth <= estimate.high
        self.bias += estimate.value - truth
        self.width += estimate.high - estimate.low

    @property
    def rate(self) -> float:
        return self.covered / max(1, self.runs)

    def cells(self) -> list[str]:
        runs = max(1, self.runs)
        return [f"{self.bias / runs:+.3f}", f"{100 * self.rate:.1f} %", f"{self.width / runs:.3f}"]


def traffic(random: np.random.Generator, accuracy: float, *, answers_a_session: int = 1) -> Traffic:
    """Draw answers; those of one session are about equally hard."""
    sessions = np.arange(ANSWERS) // answers_a_session
    hardness = random.normal(size=sessions[-1] + 1)[sessions]
    doubt = hardness if answers_a_session == 1 else 0.9 * hardness + 0.436 * random.normal(size=ANSWERS)
    chance = 1 / (1 + np.exp(DOUBT * doubt - _offset(accuracy)))
    right = (random.random(ANSWERS) < chance).astype(float)
    judged = np.where(right == 1, random.random(ANSWERS) < 0.97, random.random(ANSWERS) < 0.5).astype(float)
    return Traffic(doubt, right, judged, sessions)


def _offset(accuracy: float) -> float:
    """The constant that gives answers of standard normal doubt that accuracy on average."""
    grid = np.linspace(-5, 5, 2001)
    density = np.exp(-(grid**2) / 2)
    low, high = -10.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = float((density / (1 + np.exp(DOUBT * grid - middle))).sum() / density.sum())
        low, high = (middle, high) if mean < accuracy else (low, middle)
    return low


def queue(doubt: np.ndarray, labels: int = LABELS, uniform: float = 0.2) -> np.ndarray:
    """Each answer's probability of being asked about: mostly the doubtful, a fifth of the budget for all alike."""
    wanted = np.exp(1.2 * doubt)
    return np.minimum(1.0, labels * ((1 - uniform) * wanted / wanted.sum() + uniform / len(doubt)))


def estimates(random: np.random.Generator, accuracy: float) -> Iterator[tuple[str, Estimate, float]]:
    """One run: each estimator's word about one window of traffic."""
    drawn = traffic(random, accuracy)
    chances = queue(drawn.doubt)
    asked = random.random(ANSWERS) < chances
    labels, judged = drawn.right[asked], drawn.judged[asked]
    uniform = random.random(ANSWERS) < LABELS / ANSWERS
    truth, everything = drawn.accuracy, Moments.of(drawn.judged)
    yield "plain mean over the queue", mean_score(labels), truth
    yield "judge on every answer", mean_score(drawn.judged), truth
    yield "**Wilson, labels asked for evenly**", mean_score(drawn.right[uniform]), truth
    yield "**Hájek by stored probability**", mean_score(labels, chances[asked]), truth
    yield (
        "**prediction-powered, with the judge**",
        prediction_powered(labels, judged, everything, chances[asked]),
        truth,
    )
    talk = traffic(random, accuracy, answers_a_session=5)
    whole = random.random(ANSWERS // 5) < LABELS / ANSWERS
    rows = whole[talk.sessions]
    yield "sessions of 5 answers, each answer for itself", mean_score(talk.right[rows]), talk.accuracy
    of_sessions = mean_score(talk.right[rows], sessions=talk.sessions[rows].tolist())
    yield "**sessions of 5 answers, by session**", of_sessions, talk.accuracy


def coverage_of_accuracy(runs: int, accuracy: float, seed: int = 11) -> dict[str, Coverage]:
    random = np.random.default_rng(seed)
    found: dict[str, Coverage] = defaultdict(Coverage)
    for _ in range(runs):
        for name, estimate, truth in estimates(random, accuracy):
            found[name].add(estimate, truth)
    return found


def accuracy_table(runs: int) -> Table:
    columns = [
        f"{figure}, accuracy {accuracy}" for accuracy in (0.75, 0.95) for figure in ("bias", "coverage", "width")
    ]
    conditions = (
        f"{runs:,} windows of {ANSWERS:,} answers and about {LABELS} labels each; a queue that prefers doubtful "
        "answers, with a fifth of its budget spread evenly; a judge that passes 97 % of the right and 50 % of the "
        "wrong answers. Intervals promise 95 %. Bold: what Hallmark uses."
    )
    table = Table("accuracy intervals", conditions, ["estimator", *columns])
    both = [coverage_of_accuracy(runs, accuracy) for accuracy in (0.75, 0.95)]
    for name in both[0]:
        table.rows.append([name, *(cell for found in both for cell in found[name].cells())])
        if name.startswith("**"):
            worst = min(found[name].rate for found in both)
            table.require(worst >= 0.93, f"{name} covers {worst:.3f}")
    return table


def coverage_of_classes(runs: int, classes: int, labels: int, accuracy: float, *, even: bool, seed: int = 12):
    """How often precision, recall and F1 are covered, of macro averages and of the most frequent class."""
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(classes, 3.0))
    names = [str(number) for number in range(classes)]
    found: dict[str, Coverage] = defaultdict(Coverage)
    for _ in range(runs):
        drawn = traffic(random, accuracy)
        true = random.choice(classes, ANSWERS, p=share)
        said = np.where(drawn.right == 1, true, (true + random.integers(1, classes, ANSWERS)) % classes)
        chances = np.full(ANSWERS, labels / ANSWERS) if even else queue(drawn.doubt, labels)
        asked = random.random(ANSWERS) < chances
        scored = classification(
            [names[each] for each in true[asked]], [names[each] for each in said[asked]], chances[asked], classes=names
        )
        hits, of_true, of_said = (np.bincount(each, minlength=classes) for each in (true[true == said], true, said))
        f1 = 2 * hits / (of_true + of_said)
        first = int(share.argmax())
        found["macro precision"].add(scored.macro.precision, float((hits / of_said).mean()))
        found["macro recall"].add(scored.macro.recall, float((hits / of_true).mean()))
        found["macro F1"].add(scored.macro.f1, float(f1.mean()))
        found["F1 of a class"].add(scored.per_class[names[first]].f1, float(f1[first]))
    return found


def classes_table(runs: int) -> Table:
    measures = ["F1 of a class", "macro precision", "macro recall", "macro F1"]
    conditions = (
        f"{runs:,} windows each; coverage of intervals that promise 95 %, in brackets the share of windows in which "
        "there was one: a macro average has none below ten effective rows a class."
    )
    table = Table("class intervals", conditions, ["classes, labels, accuracy, queue", *measures])
    cases = (
        (3, 200, 0.8, True),
        (3, 200, 0.8, False),
        (10, 300, 0.9, True),
        (10, 600, 0.9, False),
        (20, 300, 0.85, True),
    )
    for classes, labels, accuracy, even in cases:
        found = coverage_of_classes(runs, classes, labels, accuracy, even=even)
        name = f"{classes}, {labels}, {accuracy}, {'evenly' if even else 'the doubtful first'}"
        cells = [f"{100 * found[each].rate:.1f} % ({found[each].runs / runs:.0%})" for each in measures]
        table.rows.append([name, *cells])
        worst = min(found[each].rate for each in measures)
        table.require(worst >= 0.9, f"intervals of {name} cover {worst:.3f}")
    return table


def signals(random: np.random.Generator, answers: int, *, harder: float = 0.0, unseen: float = 0.0):
    """Three noisy signals of how good answers are, one of which is often absent, and whether each is right.

    `harder` makes answers worse in a way that the signals show, `unseen` in a way that they do not.
    """
    good = random.normal(size=answers) - harder
    support = np.clip(0.6 + 0.2 * good + 0.1 * random.normal(size=answers), 0, 1)
    retrieval = 0.5 + 0.1 * good + 0.1 * random.normal(size=answers)
    log_probability = np.where(
        random.random(answers) < 0.1, np.nan, -1 + 0.3 * good + 0.4 * random.normal(size=answers)
    )
    right = random.random(answers) < 1 / (1 + np.exp(-(1.3 + 1.4 * good - unseen)))
    named = {"support": support, "retrieval_score": retrieval, "mean_log_probability": log_probability}
    return named, right.astype(float)


def label_free_table(runs: int) -> Table:
    """What the guess says of later windows, by what became of the answers."""
    conditions = (
        f"{runs} calibrations on 400 labels asked for evenly, each tried on a window of 2,000 answers; three noisy "
        "signals, one absent from a tenth of the answers. Guessed intervals promise 95 %."
    )
    columns = ["later window", "true accuracy", "guessed", "coverage", "called valid"]
    table = Table("label-free", conditions, columns)
    windows = {
        "as when labelled": {},
        "harder, as the signals show": {"harder": 0.5},
        "much harder": {"harder": 1.5},
        "worse, and the signals do not show it": {"unseen": 1.0},
    }
    for name, change in windows.items():
        random = np.random.default_rng(13)
        found, truths, valid = Coverage(), 0.0, 0
        for _ in range(runs):
            known, right = signals(random, 400)
            guessed_of, true_of = signals(random, 2000, **change)
            guess = label_free(calibrate(known, right), guessed_of)
            truths += true_of.mean() / runs
            found.add(guess.estimate, float(true_of.mean()))
            valid += guess.valid
        guessed = truths + found.bias / runs
        table.rows.append([name, f"{truths:.3f}", f"{guessed:.3f}", f"{100 * found.rate:.0f} %", f"{valid / runs:.0%}"])
        if not change:
            table.require(found.rate >= 0.93, f"guesses of unchanged answers are covered {found.rate:.3f}")
    return table
