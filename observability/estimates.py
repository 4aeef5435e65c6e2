"""Figures with an interval: from rows that a queue chose unevenly, that share sessions, or that have a proxy.

The main rule: an interval says what it rests on. `n` counts rows; `effective_n` is how many equally weighted,
independent rows would tell as much, fewer when weights differ or sessions repeat themselves. Every variance is that of
a sum of influences, one a row, added up within a session first (linearisation: Särndal, Swensson, Wretman, Model
Assisted Survey Sampling, 1992, 5.5; ultimate clusters: Kalton 1979), and every interval of a figure between 0 and 1 is
Wilson's at the effective n (Wilson 1927; for weighted rows Franco, Little, Louis, Slud 2019).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Method = Literal["wilson", "hajek", "prediction-powered", "t", "woodruff", "calibrated"]
Floats = NDArray[np.float64]

CONFIDENCE = 0.95
MIN_CONTRADICTED = 15
"""Labels that a proxy must have got wrong, and labels of either kind, by their effective number, before it is used:
with fewer its bias is not known well enough, and intervals covered 70 to 90 % where they promise 95."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the interval that covers the truth in `confidence` of all cases.

    None is what the rows cannot tell: every figure without rows, or an end of the interval. A figure that must lie
    between 0 and 1 then has the interval 0 to 1.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    effective_n: float
    method: Method
    confidence: float = CONFIDENCE


@dataclass(frozen=True, slots=True)
class Design:
    """How rows were come by: each one's weight, and which of them belong together."""

    weights: Floats
    sessions: NDArray[np.intp] | None
    method: Method

    @classmethod
    def of(cls, n: int, probabilities: ArrayLike | None = None, sessions: Sequence[Hashable] | None = None) -> Self:
        """Weigh `n` rows by the inverse of the probability with which each was sampled (Hájek 1971); None is evenly.

        Raises:
            ValueError: a probability is not above 0 and at most 1, or a column has another length.
        """
        weights = np.ones(n)
        if probabilities is not None:
            sampled = column(probabilities, "probabilities", n)
            if not np.all((sampled > 0) & (sampled <= 1)):
                raise ValueError("probabilities must be above 0 and at most 1: rows that were not sampled have none.")
            weights = 1.0 / sampled
        even = n == 0 or bool(np.all(weights == weights[0]))
        return cls(weights, numbered(sessions, n), "wilson" if even else "hajek")

    def sums(self, influences: Floats) -> Floats:
        """Add up the influences of each session."""
        return influences if self.sessions is None else np.bincount(self.sessions, influences).astype(np.float64)

    def variance(self, influences: Floats) -> float:
        """The variance of an estimate whose rows move it by `influences`, which add up to 0."""
        sums = self.sums(influences)
        correction = 1.0 if self.sessions is None or len(sums) < 2 else len(sums) / (len(sums) - 1)
        return float(np.sum(sums**2) * correction)

    def caution(self, confidence: float) -> float:
        """What a variance must be multiplied by because few sessions tell it only roughly (Korn, Graubard 1998)."""
        return 1.0 if self.sessions is None else caution(int(self.sessions.max()) + 1, confidence)

    def kish(self, weights: Floats) -> float:
        """How many equal sessions have a say like that: the squared sum over the sum of squares (Kish 1965)."""
        sums = self.sums(weights)
        return float(sums.sum() ** 2 / np.sum(sums**2)) if sums.any() else 0.0


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and variance (divided by n) of a column, which a database can add up."""

    n: int
    mean: float
    variance: float

    @classmethod
    def of(cls, values: ArrayLike) -> Self:
        """Take them from the values themselves."""
        known = column(values, "values")
        return cls(len(known), float(known.mean()), float(known.var())) if len(known) else cls(0, 0.0, 0.0)


def column(values: ArrayLike, name: str, n: int | None = None) -> Floats:
    """Check a column of numbers, of length `n` where given.

    Raises:
        ValueError: it has another length, or holds what is no finite number.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or (n is not None and len(array) != n):
        raise ValueError(f"{name} must be one column of {'numbers' if n is None else f'{n} numbers'}.")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite: leave out rows without a value.")
    return array


def numbered(sessions: Sequence[Hashable] | None, n: int) -> NDArray[np.intp] | None:
    """Number the sessions of `n` rows from 0 in order of appearance; None when every row is one of its own."""
    if sessions is None:
        return None
    if len(sessions) != n:
        raise ValueError(f"sessions must name one for each of the {n} rows.")
    numbers: dict[Hashable, int] = {}
    codes = np.fromiter((numbers.setdefault(each, len(numbers)) for each in sessions), np.intp, n)
    return None if len(numbers) == n else codes


def wilson(value: float, effective_n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval (1927) of a share `value` seen in `effective_n` rows, which need not be a whole number."""
    z = _z(confidence)
    denominator = 1 + z * z / effective_n
    centre = (value + z * z / (2 * effective_n)) / denominator
    half = z * np.sqrt(value * (1 - value) / effective_n + (z / (2 * effective_n)) ** 2) / denominator
    return max(0.0, min(value, float(centre - half))), min(1.0, max(value, float(centre + half)))


def proportion(successes: int, n: int, *, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a share from counts alone: every row weighs the same and is a session of its own."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n: {successes} of {n}.")
    if n == 0:
        return unknown("wilson", confidence)
    return Estimate(successes / n, *wilson(successes / n, n, confidence), n, float(n), "wilson", confidence)


def mean_score(
    scores: ArrayLike,
    probabilities: ArrayLike | None = None,
    *,
    sessions: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Estimate the mean of scores between 0 and 1, or a share when they are 0 and 1.

    `probabilities` are those with which the queue chose each row: without them a queue that asks for the doubtful
    answers makes a release look worse than it is.
    """
    values = scores_of(scores)
    design = Design.of(len(values), probabilities, sessions)
    found = Ratio.of(values, np.ones(len(values)), design)
    return found.estimate(design, confidence) if found else unknown(design.method, confidence)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure between 0 and 1, and what each row has to do with it.

    `influences` are how far each row moves it, `shares` the say each row has (they add up to 1), `spread` the variance
    of the rows' own figures, `rows` how many have a say.
    """

    value: float
    influences: Floats
    shares: Floats
    spread: float
    rows: int

    @classmethod
    def of(cls, numerators: Floats, denominators: Floats, design: Design) -> Self | None:
        """Divide weighted sums; each numerator is at least 0 and at most its denominator. None when nothing divides."""
        total = float(np.sum(design.weights * denominators))
        if total == 0:
            return None
        shares = design.weights * denominators / total
        own = np.divide(numerators, denominators, out=np.zeros(len(shares)), where=denominators > 0)
        # Summed as numerators first, so that equal weights give exactly the quotient of the counts.
        value = float(np.sum(design.weights * numerators)) / total
        away = own - value
        return cls(value, shares * away, shares, float(shares @ away**2), int(np.count_nonzero(shares)))

    def estimate(self, design: Design, confidence: float = CONFIDENCE) -> Estimate:
        """Give it its interval."""
        return bounded(
            self.value,
            variance=design.variance(self.influences),
            spread=self.spread,
            equal_sessions=design.kish(self.shares),
            rows=self.rows,
            caution=design.caution(confidence),
            method=design.method,
            confidence=confidence,
        )


def bounded(
    value: float,
    *,
    variance: float,
    spread: float,
    equal_sessions: float,
    rows: int,
    caution: float,
    method: Method,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Give a figure between 0 and 1 its interval, from what `Ratio` and `Design` say of its rows."""
    varied = variance > 1e-12 * spread > 0
    effective_n = spread / variance if varied else equal_sessions
    # The few errors that were seen may all have small weights: then the variance is small and says nothing of rows
    # with large ones. The bound is that of the National Center for Health Statistics (Parker and others 2017).
    effective_n = round(min(effective_n, float(rows)) / caution, 9)
    # A coin has the largest spread that a figure between 0 and 1 can have: scores that spread less are worth more.
    # One row is imagined that spreads as a coin does, so that scores that happen to be equal do not seem certain.
    coin = value * (1 - value)
    imagined = (rows * spread + coin) / (rows + 1)
    tosses = effective_n * coin / imagined if imagined > 0 else effective_n
    low, high = wilson(value, tosses, confidence)
    return Estimate(value, low, high, rows, effective_n, method, confidence)


def prediction_powered(
    labels: ArrayLike,
    proxies: ArrayLike,
    everything: Moments,
    probabilities: ArrayLike | None = None,
    *,
    sessions: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Estimate the mean label of all answers from the labelled ones and a proxy, such as a judge, that all have.

    `labels` and `proxies` (0 to 1) are those of the labelled rows, `everything` the proxy's moments over all rows, the
    labelled among them. The proxy may be biased: what it says of all is corrected by how far it was off where labels
    are known, and weighed by how well it tells (PPI++: Angelopoulos, Duchi, Zrnic 2023, arXiv 2311.01453; with
    sampling probabilities: Zrnic, Candès 2024, arXiv 2403.03208). `effective_n` above `n` is what the proxy brought.
    """
    truths, guesses = scores_of(labels), scores_of(proxies, "proxies", len(np.asarray(labels)))
    n = len(truths)
    if everything.n < n:
        raise ValueError("everything must be taken over all rows, the labelled ones among them.")
    plain = mean_score(truths, probabilities, sessions=sessions, confidence=confidence)
    design = Design.of(n, probabilities, sessions)
    low_labels, contradicted = truths < 0.5, np.abs(truths - guesses) > 0.5
    kinds = [design.kish(design.weights * rows) for rows in (low_labels, ~low_labels, contradicted)]
    if min(kinds) < MIN_CONTRADICTED:
        return plain
    shares = design.weights / design.weights.sum()
    residuals = truths - shares @ truths
    of_labels = shares * residuals
    # What the proxy adds to a labelled row's influence, which is a row like any other as well.
    of_proxy = (guesses - everything.mean) / everything.n - shares * (guesses - shares @ guesses)
    others = max(0.0, everything.n * everything.variance - float(np.sum((guesses - everything.mean) ** 2)))
    others /= everything.n**2
    trust = -float(of_labels @ of_proxy) / (float(of_proxy @ of_proxy) + others)
    if trust <= 0:
        return plain
    trust = min(1.0, trust)
    value = trust * everything.mean + float(shares @ (truths - trust * guesses))
    if not 0 < value < 1:
        return plain  # What the labelled rows say of the proxy does not hold for all: the two are not alike.
    variance = design.variance(of_labels + trust * of_proxy) * design.caution(confidence) + trust**2 * others
    low, high = wilson(value, value * (1 - value) / variance, confidence)
    return Estimate(value, low, high, n, float(shares @ residuals**2) / variance, "prediction-powered", confidence)


def mean(values: ArrayLike, *, sessions: Sequence[Hashable] | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate the mean of any numbers, such as tokens, with Student's interval."""
    known = column(values, "values")
    design = Design.of(len(known), None, sessions)
    units = len(known) if design.sessions is None else int(design.sessions.max()) + 1
    if units < 2:
        only = float(known.mean()) if len(known) else None
        return student(only, variance=0, spread=0, units=units, n=len(known), confidence=confidence)
    average = float(known.mean())
    variance = design.variance((known - average) / len(known))
    variance *= 1.0 if design.sessions is not None else units / (units - 1)
    spread = float(known.var())
    return student(average, variance=variance, spread=spread, units=units, n=len(known), confidence=confidence)


def caution(sessions: int, confidence: float = CONFIDENCE) -> float:
    """What the variance of sums of so many sessions must be multiplied by, because few tell it only roughly."""
    from scipy.special import stdtrit

    return float(stdtrit(max(1, sessions - 1), 0.5 + confidence / 2) / _z(confidence)) ** 2


def student(
    average: float | None, *, variance: float, spread: float, units: int, n: int, confidence: float = CONFIDENCE
) -> Estimate:
    """Give a mean of `n` rows in `units` sessions its interval; `variance` is its own, `spread` that of the rows."""
    from scipy.special import stdtrit

    if average is None or units < 2:
        return Estimate(average, None, None, n, float(units), "t", confidence)
    half = float(stdtrit(units - 1, 0.5 + confidence / 2)) * variance**0.5
    # Sessions whose means are the same but for rounding do not vary.
    effective_n = min(float(n), spread / variance) if variance > 1e-12 * spread > 0 else float(units)
    return Estimate(average, average - half, average + half, n, effective_n, "t", confidence)


def quantile(
    values: ArrayLike,
    share: float,
    *,
    sessions: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Estimate the value that `share` of all are at most, such as the 0.95 quantile of seconds.

    The interval is Woodruff's (1952): the share's own interval, read off the values. It has no end where even the
    largest value may well be below the true quantile.
    """
    known = np.sort(column(values, "values"))
    n = len(known)
    if n == 0:
        return Estimate(None, None, None, 0, 0.0, "woodruff", confidence)
    value = float(known[_rank(share, n)])
    below = mean_score(np.asarray(values) <= value, sessions=sessions, confidence=confidence)
    low_share, high_share = wilson(share, below.effective_n, confidence)
    tail = (1 - confidence) / 2
    low = float(known[_rank(low_share, n)]) if (1 - share) ** below.effective_n <= tail else None
    # One value further up: the share at most the upper end must be the larger one, for certain.
    high = float(known[min(n - 1, _rank(high_share, n) + 1)]) if share**below.effective_n <= tail else None
    return Estimate(value, low, high, n, below.effective_n, "woodruff", confidence)


def unknown(method: Method, confidence: float = CONFIDENCE) -> Estimate:
    """What is known of a share without any rows."""
    return Estimate(None, 0.0, 1.0, 0, 0.0, method, confidence)


def scores_of(values: ArrayLike, name: str = "scores", n: int | None = None) -> Floats:
    """Check a column of scores.

    Raises:
        ValueError: one is not between 0 and 1.
    """
    array = column(values, name, n)
    if not np.all((array >= 0) & (array <= 1)):
        raise ValueError(f"{name} must be between 0 and 1.")
    return array


def _rank(share: float, n: int) -> int:
    return min(n - 1, max(0, int(np.ceil(share * n)) - 1))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
