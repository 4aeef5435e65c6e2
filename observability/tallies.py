"""Figures of rows that stream by: sums by session in bounded memory, from which come the same estimates.

The main rule: what `observability.estimates` computes of all rows at once, a tally computes of sums that a million rows
add to. Sessions are numbered while there are few, and then share numbers by chance: sums of sessions that chance put
together vary as sums of independent ones do, so that intervals stay right, and their width is known to 1 %.
"""

from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from observability.estimates import CONFIDENCE, Estimate, Floats, bounded, caution, quantile, student, unknown

MAX_SESSIONS = 8_192
"""Sessions with a number of their own. The variance is that of so many sums: its own error is the root of 2 / 8,192."""
MAX_SAMPLE = 10_000
"""Rows that a quantile is read from."""

Numbers = NDArray[np.intp]


class Sessions:
    """Numbers sessions below `MAX_SESSIONS`."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, session: str) -> int:
        """Give a session's number: always the same."""
        found = self._numbers.get(session)
        if found is not None:
            return found
        if len(self._numbers) < MAX_SESSIONS:
            self._numbers[session] = len(self._numbers)
            return len(self._numbers) - 1
        return crc32(session.encode(errors="surrogatepass")) % MAX_SESSIONS


class Tally:
    """Sums of a ratio's numerators and denominators by session; a mean's denominators are 1."""

    def __init__(self) -> None:
        self.rows = 0
        self._squares = 0.0
        self._above: Floats = np.zeros(0)
        self._below: Floats = np.zeros(0)

    def add(self, sessions: Numbers, numerators: Floats, denominators: Floats | None = None) -> None:
        """Add rows, one an entry of each column; those whose denominator is 0 have no say."""
        if denominators is not None:
            counts = denominators > 0
            sessions, numerators, denominators = sessions[counts], numerators[counts], denominators[counts]
        if not len(sessions):
            return
        below = np.ones(len(sessions)) if denominators is None else denominators
        self.rows += len(sessions)
        self._squares += float(np.sum(numerators**2 / below))
        self._above = _added(self._above, np.bincount(sessions, numerators).astype(float))
        self._below = _added(self._below, np.bincount(sessions, below).astype(float))

    def share(self, confidence: float = CONFIDENCE) -> Estimate:
        """Estimate the ratio of the sums, whose numerators are at least 0 and at most their denominators."""
        total = float(self._below.sum())
        if total == 0:
            return unknown("wilson", confidence)
        value = float(self._above.sum()) / total
        spread = max(0.0, self._squares / total - value * value)
        return bounded(
            value,
            variance=self._variance(value, total, of_rows=False),
            spread=spread if spread > 1e-12 else 0.0,
            equal_sessions=total**2 / float(np.sum(self._below**2)),
            rows=self.rows,
            caution=caution(self._units, confidence) if self._units < self.rows else 1.0,
            method="wilson",
            confidence=confidence,
        )

    def mean(self, confidence: float = CONFIDENCE) -> Estimate:
        """Estimate the mean of any numbers."""
        if not self.rows:
            return student(None, variance=0, spread=0, units=0, n=0, confidence=confidence)
        value = float(self._above.sum()) / self.rows
        return student(
            value,
            variance=self._variance(value, self.rows, of_rows=True),
            spread=max(0.0, self._squares / self.rows - value * value),
            units=self._units,
            n=self.rows,
            confidence=confidence,
        )

    @property
    def _units(self) -> int:
        return int(np.count_nonzero(self._below))

    def _variance(self, value: float, total: float, *, of_rows: bool) -> float:
        """As `Design.variance`; `of_rows` corrects for few of them also where each is a session of its own."""
        units = self._units
        corrected = units > 1 and (of_rows or units < self.rows)
        sums = (self._above - value * self._below) / total
        return float(np.sum(sums**2)) * (units / (units - 1) if corrected else 1.0)


class Sample:
    """The `size` rows with the smallest keys: with keys that chance made, all rows are equally likely in it."""

    def __init__(self, size: int = MAX_SAMPLE) -> None:
        self._size = size
        self._kept: list[tuple[NDArray[np.uint64], Numbers, Floats]] = []
        self._held = 0
        self.rows = 0

    def add(self, keys: NDArray[np.uint64], sessions: Numbers, values: Floats) -> None:
        """Add rows, one an entry of each column."""
        self.rows += len(keys)
        self._held += len(keys)
        self._kept.append((keys, sessions, values))
        if self._held > 2 * self._size:
            self._shrink()

    def quantile(self, share: float, confidence: float = CONFIDENCE) -> Estimate:
        """Estimate the value that `share` of all are at most; its `n` counts the rows of the sample."""
        values = self.values()
        sessions = [number for each in self._kept for number in each[1].tolist()]
        return quantile(values, share, sessions=sessions, confidence=confidence)

    def values(self) -> Floats:
        """What the sample holds."""
        self._shrink()
        return np.concatenate([each[2] for each in self._kept]) if self._kept else np.zeros(0)

    def _shrink(self) -> None:
        if self._held <= self._size:
            return
        keys = np.concatenate([each[0] for each in self._kept])
        smallest = np.argpartition(keys, self._size)[: self._size]
        sessions = np.concatenate([each[1] for each in self._kept])[smallest]
        values = np.concatenate([each[2] for each in self._kept])[smallest]
        self._kept, self._held = [(keys[smallest], sessions, values)], self._size


def _added(sums: Floats, more: NDArray[np.float64]) -> Floats:
    if len(more) > len(sums):
        sums = np.concatenate([sums, np.zeros(max(len(more), 2 * len(sums)) - len(sums))])
    sums[: len(more)] += more
    return sums
