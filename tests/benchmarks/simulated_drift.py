"""Windows of real questions, embedded by MiniLM: false alarms without drift, and what is found with it.

Questions are those of CLINC150 (150 intents in ten fields); a new topic is a field that the reference has none of.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import chi2_contingency, ks_2samp

from observability.drift import Questions, mmd, question_drift
from observability.shifts import category_shift, number_shift
from observability.windows import REFERENCE_INFLATION
from retrieval.embedder import SentenceTransformerEmbedder
from tests.benchmarks.tables import Table

REFERENCE = 1000
WINDOW = 500
LEVEL = 0.01
COMPONENTS = 32


@dataclass
class Corpus:
    """Questions' vectors and fields."""

    vectors: np.ndarray
    fields: np.ndarray

    @property
    def names(self) -> list[str]:
        return sorted(set(self.fields.tolist()))


def load_corpus(data: Path, splits: Sequence[str] = ("val", "test")) -> Corpus:
    """Embed CLINC150's questions with the packaged MiniLM; takes minutes on a busy machine."""
    folder = data / "clinc150"
    field_of = {
        intent: name
        for name, intents in json.loads((folder / "domains.json").read_text()).items()
        for intent in intents
    }
    rows = json.loads((folder / "data_full.json").read_text())
    questions = [row for split in splits for row in rows[split]]
    embedder = SentenceTransformerEmbedder()
    embedder.load()
    texts = [text for text, _ in questions]
    vectors = np.empty((len(texts), embedder.dimension), np.float32)
    order = np.argsort([len(text) for text in texts], kind="stable")
    for batch in np.array_split(order, max(1, len(order) // 64)):
        vectors[batch] = embedder.encode([texts[row] for row in batch], "query")
    return Corpus(vectors, np.array([field_of[intent] for _, intent in questions]))


@dataclass
class Draw:
    """A reference and a window; each question is repeated `repeats` times in its session."""

    reference: Questions
    window: Questions


def draw(
    corpus: Corpus,
    random: np.random.Generator,
    *,
    repeats: int = 1,
    new_share: float = 0.0,
    new_field: str | None = None,
    mix: float | None = None,
) -> Draw:
    """Take a window that differs by a new field, or by how often half of the fields occur (`mix`; .5 as before)."""
    known = np.flatnonzero(corpus.fields != new_field)
    taken = random.permutation(known)
    reference, window = taken[:REFERENCE], taken[REFERENCE : REFERENCE + WINDOW]
    if mix is not None:
        first_half = np.isin(corpus.fields, corpus.names[: len(corpus.names) // 2])
        rest = taken[REFERENCE:]
        of_first, of_second = rest[first_half[rest]], rest[~first_half[rest]]
        count = round(mix * WINDOW)
        window = np.concatenate([of_first[:count], of_second[: WINDOW - count]])
    new = round(new_share * WINDOW)
    if new:
        strange = random.choice(np.flatnonzero(corpus.fields == new_field), new, replace=False)
        window = np.concatenate([strange, window[new:]])
    return Draw(_repeated(corpus, reference, repeats), _repeated(corpus, window, repeats))


def _repeated(corpus: Corpus, rows: np.ndarray, repeats: int) -> Questions:
    return Questions.of(corpus.vectors[np.repeat(rows, repeats)], np.repeat(np.arange(len(rows)), repeats).tolist())


def verdicts(case: Draw, seed: int) -> dict[str, bool]:
    """What each quick detector says of one window."""
    drift = question_drift(case.reference, case.window, seed=seed)
    stability, smallest = of_components(case)
    return {
        OURS: drift.p_value <= LEVEL,
        "MMD alone, sessions permuted": drift.mmd_p <= LEVEL,
        "novelty alone, by session": drift.novelty_p <= LEVEL,
        "PSI > 0.1 on any of 32 components": stability > 0.1,
        "PSI > 0.2 on any of 32 components": stability > 0.2,
        "KS on 32 components, Bonferroni": smallest <= LEVEL / COMPONENTS,
    }


def slow_verdicts(case: Draw, seed: int) -> dict[str, bool]:
    """What those detectors say that take seconds, and are plainly wrong after a few windows."""
    return {
        "MMD, each question permuted": mmd_of_rows(case, seed),
        "MMD against resamples of the reference (as Evidently)": mmd_of_resamples(case, seed),
    }


def mmd_of_rows(case: Draw, seed: int) -> bool:
    """MMD that takes every question for independent."""
    sides = Questions.of(case.reference.vectors), Questions.of(case.window.vectors)
    return mmd(*sides, permutations=199, seed=seed)[1] <= LEVEL


def mmd_of_resamples(case: Draw, seed: int) -> bool:
    """MMD against two resamples of the reference, drawn with replacement; alarm above their 5th percentile.

    What Evidently 0.7's `mmd(bootstrap=True)` does with its defaults.
    """
    random = np.random.default_rng(seed)
    x, y = case.reference.vectors, case.window.vectors
    m, n = len(x), len(y)
    both = np.vstack([x, y])
    kernel = np.exp(-_distances(both, both) / np.median(_distances(x, y)))
    in_window = (np.arange(m + n) >= m).astype(np.float32)[:, None]
    observed = unbiased(kernel, 1 - in_window, in_window)[0]
    kernel = np.exp(-_distances(x, x) / np.median(_distances(x, x)))
    sizes = m * m // (m + n), m * n // (m + n)
    drawn = (random.multinomial(size, np.full(m, 1 / m), 100).T.astype(np.float32) for size in sizes)
    return bool(observed > np.percentile(unbiased(kernel, *drawn), 5))


def unbiased(kernel: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """MMD's unbiased estimate between two samples, a column each, given as how often each row is in them."""
    sides = ((one, kernel @ one), (other, kernel @ other))
    # A Gaussian kernel is 1 on the diagonal, and a row that is drawn twice meets itself there twice.
    within = [((side * means).sum(0) - side.sum(0), side.sum(0)) for side, means in sides]
    across = (one * sides[1][1]).sum(0) / (one.sum(0) * other.sum(0))
    return sum(total / (size * (size - 1)) for total, size in within) - 2 * across


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.maximum((one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T, 0)


def of_components(case: Draw) -> tuple[float, float]:
    """The largest PSI (ten bins) and the smallest KS p-value over 32 principal components of the reference."""
    centre = case.reference.vectors.mean(axis=0)
    axes = np.linalg.svd(case.reference.vectors - centre, full_matrices=False)[2][:COMPONENTS].T
    before, after = (((side.vectors - centre) @ axes).T for side in (case.reference, case.window))
    stability, smallest = 0.0, 1.0
    for own, theirs in zip(before, after, strict=True):
        edges = np.quantile(own, np.linspace(0, 1, 11)[1:-1])
        shares = [np.bincount(np.searchsorted(edges, side), minlength=10) / len(side) for side in (own, theirs)]
        expected, found = (np.maximum(share, 1e-4) for share in shares)
        stability = max(stability, float(np.sum((found - expected) * np.log(found / expected))))
        smallest = min(smallest, float(ks_2samp(own, theirs, method="asymp").pvalue))
    return stability, smallest


OURS = "**MMD and novelty, sessions whole, Holm**"
Detect = Callable[[Draw, int], dict[str, bool]]


def alarm_rates(corpus: Corpus, detect: Detect, trials: int, *, seed: int = 31, **change: float) -> dict[str, float]:
    """The share of windows in which each detector sees drift; new topics take turns."""
    random = np.random.default_rng(seed)
    names, alarms = corpus.names, Counter()
    for trial in range(trials):
        field = names[trial % len(names)] if change.get("new_share") else None
        alarms.update(
            {name: int(said) for name, said in detect(draw(corpus, random, new_field=field, **change), trial).items()}
        )
    return {name: count / trials for name, count in alarms.items()}


CHANGES: dict[str, dict[str, float]] = {
    "no drift": {},
    "no drift, each question twice": {"repeats": 2},
    "no drift, five times": {"repeats": 5},
    "10 % new topic": {"new_share": 0.1},
    "20 %": {"new_share": 0.2},
    "30 %": {"new_share": 0.3},
    "topics 50:50 to 70:30": {"mix": 0.7},
}


def question_table(corpus: Corpus, trials: int) -> Table:
    few = max(10, trials // 20)
    conditions = (
        f"Share of windows with an alarm at level {LEVEL}: {trials} windows without drift, {trials // 3} with five "
        f"repeats or with drift, {few} for the two slow ones. {WINDOW} sessions in a window, {REFERENCE} in the "
        "reference, CLINC150's questions as MiniLM vectors; a new topic is a field of which the reference has none."
    )
    table = Table("question drift", conditions, ["detector", *CHANGES])
    rows: dict[str, list[str]] = defaultdict(list)
    for change, options in CHANGES.items():
        count = trials // (1 if options in ({}, {"repeats": 2}) else 3)
        rates = alarm_rates(corpus, verdicts, count, **options) | alarm_rates(corpus, slow_verdicts, few, **options)
        for name, rate in rates.items():
            rows[name].append(f"{100 * rate:.1f} %")
        drifting = not change.startswith("no drift")
        table.require(drifting or rates[OURS] <= 0.02, f"{rates[OURS]:.1%} false alarms with {change}")
        table.require(change != "20 %" or rates[OURS] >= 0.8, f"power {rates[OURS]:.2f} with 20 % new topic")
    table.rows += [[name, *cells] for name, cells in rows.items()]
    return table


def p_values_of_reference(corpus: Corpus, seed: int, windows: int) -> list[float]:
    """The p-values of windows without drift that are all compared with the same reference."""
    random = np.random.default_rng(seed)
    taken = random.permutation(len(corpus.vectors))
    reference = _repeated(corpus, taken[:REFERENCE], 1)
    later = (random.choice(taken[REFERENCE:], WINDOW, replace=False) for _ in range(windows))
    return [
        question_drift(reference, _repeated(corpus, rows, 1), seed=window).p_value for window, rows in enumerate(later)
    ]


def inflation(p_values: np.ndarray, level: float) -> float:
    """How much likelier two windows of one reference are to both be at the level than two of different references."""
    windows = p_values.shape[1]
    alarms = (p_values <= level).sum(axis=1)
    together = float((alarms * (alarms - 1)).mean()) / (windows * (windows - 1))
    return together / max(float(alarms.mean() / windows) ** 2, 1e-12)


def reference_table(corpus: Corpus, references: int, windows: int) -> Table:
    """False alarms when one reference is used for window after window."""
    p_values = np.array([p_values_of_reference(corpus, 3200 + number, windows) for number in range(references)])
    alarms = p_values <= LEVEL
    conditions = (
        f"{references} references of {REFERENCE} sessions, each used for {windows} windows of {WINDOW} without drift. "
        "Factors: chance that two windows of one reference are both at the level, over that for different references."
    )
    table = Table("one reference", conditions, ["", "measured"])
    table.rows += [
        [f"windows at level {LEVEL}", f"{100 * alarms.mean():.2f} %"],
        ["of the worst reference", f"{100 * alarms.mean(axis=1).max():.1f} %"],
        ["two in a row", f"{(alarms[:, 1:] & alarms[:, :-1]).sum()} of {references * (windows - 1):,}"],
        *([f"factor at level {level}", f"{inflation(p_values, level):.1f}"] for level in (0.02, 0.05)),
    ]
    found = inflation(p_values, 0.05)
    table.require(found <= REFERENCE_INFLATION, f"two in a row are {found:.1f} times as likely as for new references")
    return table


def _outputs(random: np.random.Generator, sessions: int, turns: int, refusals: float, longer: float):
    """Refusals and lengths of answers; those of a session are alike."""
    refuses = random.random(sessions) < refusals
    often = np.repeat(np.where(refuses, 0.8, 0.02), turns)
    verbose = np.repeat(random.normal(size=sessions), turns)
    kinds = np.where(random.random(sessions * turns) < often, "refused", "answered").tolist()
    tokens = np.round(np.exp(4 + longer + 0.5 * verbose + 0.2 * random.normal(size=sessions * turns)))
    return kinds, tokens, np.repeat(np.arange(sessions), turns).tolist()


def output_table(trials: int) -> Table:
    conditions = (
        f"{trials} windows of {WINDOW} sessions of four answers against {REFERENCE} such sessions; share with an alarm "
        f"at level {LEVEL}. With drift, sessions that mostly refuse rise from 5 to 10 % and answers are a fifth longer."
    )
    table = Table("output drift", conditions, ["test", "no drift", "drift"])
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for column, (refusals, longer) in enumerate(((0.05, 0.0), (0.1, np.log(1.2)))):
        random = np.random.default_rng(33)
        for trial in range(trials):
            kinds, tokens, sessions = _outputs(random, REFERENCE, 4, 0.05, 0.0)
            later, later_tokens, later_sessions = _outputs(random, WINDOW, 4, refusals, longer)
            both = sessions, later_sessions
            ours_of_kinds = category_shift(kinds, later, *both, seed=trial)
            ours_of_tokens = number_shift(tokens, later_tokens, *both, seed=trial)
            counts = [[side.count("refused"), side.count("answered")] for side in (kinds, later)]
            p_values = {
                "**chi-square of refusals, sessions permuted**": ours_of_kinds.p_value,
                "chi-square of refusals, as if answers were independent": chi2_contingency(counts).pvalue,
                "**KS of lengths, sessions permuted**": ours_of_tokens.p_value,
                "KS of lengths, as if answers were independent": ks_2samp(tokens, later_tokens, method="asymp").pvalue,
            }
            for name, p_value in p_values.items():
                found[name][column] += p_value <= LEVEL
    for name, alarms in found.items():
        table.rows.append([name, *(f"{100 * count / trials:.1f} %" for count in alarms)])
        if name.startswith("**"):
            table.require(alarms[0] <= 0.02 * trials, f"{name}: {alarms[0]} false alarms in {trials}")
    return table
