"""What a run came to: times as histograms of bounded size, outcomes counted, and the share that met the objective."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_STEP = math.log(1.01)
_SMALLEST_SECONDS = 1e-6


@dataclass(frozen=True)
class Objective:
    """What a good answer is: its first token soon enough after it was due, and the others fast enough."""

    ttft_seconds: float = 1.0
    tpot_seconds: float = 0.1
    share: float = 0.95
    """How many of all requests must be good for a setting to be recommended."""


@dataclass(frozen=True)
class Sample:
    """One request: its outcome, and times in seconds from when it was due."""

    outcome: str
    """`ok`, a status as text, or what went wrong."""
    late_seconds: float = 0.0
    """How long after it was due it could be sent."""
    ttft_seconds: float | None = None
    total_seconds: float | None = None
    tokens: int = 0

    @property
    def tpot_seconds(self) -> float | None:
        """Time for each token after the first; None where there was but one."""
        if self.ttft_seconds is None or self.total_seconds is None or self.tokens < 2:
            return None
        return (self.total_seconds - self.ttft_seconds) / (self.tokens - 1)

    def meets(self, objective: Objective) -> bool:
        """Whether the answer came whole and in time."""
        if self.outcome != "ok" or self.ttft_seconds is None:
            return False
        return self.ttft_seconds <= objective.ttft_seconds and (self.tpot_seconds or 0.0) <= objective.tpot_seconds


class Times:
    """Quantiles within one per cent, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count += 1
        self._buckets[math.floor(math.log(max(seconds, _SMALLEST_SECONDS) / _SMALLEST_SECONDS) / _STEP)] += 1

    def quantile(self, share: float) -> float | None:
        """The time that `share` of them do not exceed; None of none."""
        left = share * self.count
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 1e-9:
                return _SMALLEST_SECONDS * math.exp((bucket + 0.5) * _STEP)
        return None

    def described(self) -> dict[str, float | None]:
        """The quantiles people ask for."""
        return {f"p{share * 100:g}": self.quantile(share) for share in (0.5, 0.9, 0.95, 0.99)}


@dataclass
class Measures:
    """What has been heard of so far."""

    objective: Objective
    outcomes: Counter[str] = field(default_factory=Counter)
    good: int = 0
    tokens: int = 0
    ttft: Times = field(default_factory=Times)
    tpot: Times = field(default_factory=Times)
    total: Times = field(default_factory=Times)
    late: Times = field(default_factory=Times)
    seconds: float = 0.0
    """From the start of the run to its last answer."""
    driver_seconds: float = 0.0
    """Processor time of the driver in it: near `seconds`, the driver is what is measured."""

    def add(self, sample: Sample) -> None:
        """Count one request."""
        self.outcomes[sample.outcome] += 1
        self.good += sample.meets(self.objective)
        self.tokens += sample.tokens
        self.late.add(sample.late_seconds)
        for times, value in (
            (self.ttft, sample.ttft_seconds),
            (self.tpot, sample.tpot_seconds),
            (self.total, sample.total_seconds),
        ):
            if value is not None:
                times.add(value)

    @property
    def requests(self) -> int:
        """All of them, whatever became of them."""
        return self.outcomes.total()

    @property
    def share_good(self) -> float:
        """Of all requests, failed ones included."""
        return self.good / self.requests if self.requests else 0.0

    def described(self) -> dict[str, Any]:
        """The figures, as JSON has them."""
        seconds = self.seconds or math.inf
        return {
            "requests": self.requests,
            "seconds": self.seconds,
            "requests_per_second": self.outcomes["ok"] / seconds,
            "tokens_per_second": self.tokens / seconds,
            "goodput_per_second": self.good / seconds,
            "good_share": self.share_good,
            "meets_objective": self.requests > 0 and self.share_good >= self.objective.share,
            "driver_busy_share": self.driver_seconds / seconds,
            "outcomes": dict(sorted(self.outcomes.items())),
            "ttft_seconds": self.ttft.described(),
            "tpot_seconds": self.tpot.described(),
            "total_seconds": self.total.described(),
            "late_seconds": self.late.described(),
        }
