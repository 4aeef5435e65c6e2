"""Figures with intervals for evaluations: rows that weigh differently or share sessions, differences of two arms.

The main rule: a session counts once, and rows that happen to be equal are not certain. Everything here takes numbers
and gives numbers.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
ROUNDS = 1000
POWER = 0.8
MIN_SESSIONS = 10
"""Equal sessions, for each class of an average over classes, below which draws of them make no interval."""

Floats = NDArray[np.float64]


class Sample(msgspec.Struct, frozen=True):
    """What rows weigh and which belong together, for figures of these rows."""

    weights: Floats
    sessions: NDArray[np.int64]
    """The number of each row's session, from 0."""

    @classmethod
    def of(cls, weights: Sequence[float], sessions: Sequence[Any]) -> "Sample":
        """Number the sessions as they come; None is a session of its own."""
        numbers: dict[Any, int] = {}
        keys = [("row", n) if session is None else ("session", session) for n, session in enumerate(sessions)]
        numbered = [numbers.setdefault(key, len(numbers)) for key in keys]
        return cls(np.asarray(weights, float), np.asarray(numbered, np.int64))

    def where(self, kept: NDArray[np.bool_]) -> "Sample":
        """The same for some of the rows."""
        _, numbered = np.unique(self.sessions[kept], return_inverse=True)
        return Sample(self.weights[kept], numbered.astype(np.int64))

    @property
    def equal_sessions(self) -> float:
        """How many sessions of equal weight have a say like these (Kish 1965)."""
        sums = self.per_session(self.weights)
        return float(sums.sum() ** 2 / (sums**2).sum())

    @property
    def caution(self) -> float:
        """What a variance must be multiplied by because few sessions tell it only roughly (Korn, Graubard 1998)."""
        sessions = int(self.sessions.max()) + 1
        if sessions == len(self.sessions):
            return 1.0
        return (_quantile(0.5 + CONFIDENCE / 2, sessions) / NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)) ** 2

    def per_session(self, values: Floats) -> Floats:
        """Sums over each session's rows; rows first."""
        summed = np.zeros((int(self.sessions.max()) + 1, *values.shape[1:]))
        np.add.at(summed, self.sessions, values)
        return summed


class Estimate(msgspec.Struct, frozen=True):
    """A figure with its 95 % interval; `effective_n` is how many equal, unrelated rows would tell as much."""

    value: float | None
    low: float
    high: float
    n: int
    effective_n: float


UNKNOWN = Estimate(None, 0.0, 1.0, 0, 0.0)


def mean(values: Floats, sample: Sample) -> Estimate:
    """The weighted mean of scores between 0 and 1, with Wilson's interval (1927) at the effective n.

    The variance is that of a ratio of weighted sums, added up over sessions first (Kalton 1979). It is the interval of
    the service's quality figures, whose module says why it is made like that.
    """
    n = len(values)
    if not n:
        return UNKNOWN
    value = float(np.average(values, weights=sample.weights))
    spread = float(np.average((values - value) ** 2, weights=sample.weights))
    sums = sample.per_session(sample.weights * (values - value) / sample.weights.sum())
    variance = float((sums**2).sum()) * (len(sums) / (len(sums) - 1) if 1 < len(sums) < n else 1.0)
    # Sessions whose means are alike leave a variance of rounding alone, which would be taken for certainty.
    varied = variance > 1e-12 * spread > 0
    effective = spread / variance if varied else sample.equal_sessions
    # The few errors that were seen may be those that weigh little.
    effective = min(effective, float(n)) / sample.caution
    # One row is imagined that spreads as a coin does, so that scores that happen to be equal do not seem certain.
    coin = value * (1 - value)
    imagined = (n * spread + coin) / (n + 1)
    low, high = _wilson(value, effective * coin / imagined if imagined > 0 else effective)
    return Estimate(value, low, high, n, effective)


def bootstrap(statistic: Callable[[Floats], Floats], parts: Floats, sample: Sample) -> Estimate:
    """A figure made of sums over rows, with the percentiles of `ROUNDS` draws of whole sessions (Efron 1979).

    `parts` has a row's addends; `statistic` makes a figure of each row of sums, NaN where there is none. The interval
    is 0 to 1 where there are too few sessions to draw from, and Wilson's where all draws are alike.
    """
    if not len(parts):
        return UNKNOWN
    per_session = sample.per_session(parts * sample.weights[:, None])
    value = float(statistic(per_session.sum(0, keepdims=True))[0])
    if np.isnan(value):
        return UNKNOWN
    sessions = len(per_session)
    draws = np.random.default_rng(0).multinomial(sessions, np.full(sessions, 1 / sessions), ROUNDS)
    found = statistic(draws @ per_session)
    effective = sample.equal_sessions
    if effective < MIN_SESSIONS:
        return Estimate(value, 0.0, 1.0, len(parts), effective)
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = map(float, np.nanpercentile(found, (tail, 100 - tail)))
    if high - low < 1e-9:
        low, high = _wilson(value, effective / sample.caution)
    return Estimate(value, min(value, low), max(value, high), len(parts), effective)


class Difference(msgspec.Struct, frozen=True):
    """How much better the first arm is than the second on the same rows; `upper` is one-sided, the rest two-sided."""

    value: float
    low: float
    high: float
    upper: float
    n: int
    standard_error: float
    per_row_variance: float
    """What the variance of the difference would be with one row: what `rows_needed` goes by."""


def difference(first: Floats, second: Floats, sample: Sample) -> Difference:
    """The paired difference of two arms' scores.

    Four halves of a made-up row each way are added (Agresti and Min 2005), so that a few rows without a disagreement
    are not taken for certainty.
    """
    weight = float(sample.weights.mean())
    sessions = int(sample.sessions.max()) + 1
    made_up = np.array([1.0, -1.0, 0.0])
    scores = np.concatenate([first - second, made_up])
    weights = np.concatenate([sample.weights, weight * np.array([0.5, 0.5, 1.0])])
    padded = Sample(weights, np.concatenate([sample.sessions, sessions + np.arange(3)]))
    middle = float(np.average(scores, weights=weights))
    error = float(np.sqrt(_variance(scores, middle, padded)))
    two, one = _quantile(0.5 + CONFIDENCE / 2, sessions), _quantile(CONFIDENCE, sessions)
    value = float(np.average(first - second, weights=sample.weights))
    return Difference(
        value=value,
        low=max(-1.0, middle - two * error),
        high=min(1.0, middle + two * error),
        upper=min(1.0, middle + one * error),
        n=len(first),
        standard_error=error,
        per_row_variance=error**2 * len(first),
    )


def rows_needed(found: Difference, margin: float) -> int | None:
    """How many rows like these it takes to see, in 4 of 5 cases, that the difference is below the margin; None: never.

    The usual formula for a one-sided test at the difference that was seen, or at none where the other arm seems worse.
    """
    room = margin - max(found.value, 0.0)
    if room <= 0:
        return None
    normal = NormalDist()
    z = normal.inv_cdf(CONFIDENCE) + normal.inv_cdf(POWER)
    return int(np.ceil(found.per_row_variance * (z / room) ** 2))


def _variance(values: Floats, value: float, sample: Sample) -> float:
    """The variance of a weighted mean, by linearisation; sessions are added up first."""
    moved = sample.per_session(sample.weights * (values - value) / sample.weights.sum())
    sessions = len(moved)
    return float((moved**2).sum() * sessions / max(1, sessions - 1))


def _quantile(probability: float, sessions: int) -> float:
    """Student's quantile."""
    from scipy.special import stdtrit

    return float(stdtrit(max(1, sessions - 1), probability))


def _wilson(value: float, effective_n: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    denominator = 1 + z * z / effective_n
    centre = (value + z * z / (2 * effective_n)) / denominator
    half = z * np.sqrt(value * (1 - value) / effective_n + (z / (2 * effective_n)) ** 2) / denominator
    return max(0.0, min(value, float(centre - half))), min(1.0, max(value, float(centre + half)))
