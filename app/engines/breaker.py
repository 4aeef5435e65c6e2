"""A circuit breaker: whether one engine is sent requests, by how its probes and its requests fare.

Pure: time is handed in. `closed` lets requests through, `open` lets none, `half_open` awaits a trial that its owner
makes. What is unmistakable (nobody listens there) opens it at once; silence and failure must repeat themselves. The
rule: a probe that is answered ends what probes found, and only a trial ends what requests found, of one process: who
listens after nobody did is another.
"""

from typing import Literal

State = Literal["closed", "half_open", "open"]


class Breaker:
    """The breaker of one engine.

    Args:
        failures: so many requests failing in a row open it.
        misses: so many probes in a row without an answer open it.
        open_seconds: how long failed requests keep it open; doubles with every trial that fails.
        longest_seconds: but no longer than that.
    """

    def __init__(
        self, *, failures: int = 3, misses: int = 2, open_seconds: float = 5.0, longest_seconds: float = 60.0
    ) -> None:
        self._most_failures = failures
        self._most_misses = misses
        self._first_pause = open_seconds
        self._longest_pause = longest_seconds
        self._pause = open_seconds
        self._failures = 0
        self._open_until = 0.0
        self.state: State = "closed"
        self.reason = ""
        """Why it is not closed."""
        self.misses = 0
        """Probes in a row that got no answer, and connections that were refused meanwhile."""
        self.openings = 0
        """How often it opened after it was closed."""
        self.needs_trial = False
        """Whether requests failed, so that an answered probe proves nothing."""

    def succeeded(self) -> None:
        """A request was answered, or the trial was."""
        self._failures = 0
        if self.state == "half_open":
            self.state, self.reason, self.needs_trial = "closed", "", False
            self._pause = self._first_pause

    def failed(self, now: float, reason: str) -> None:
        """A request failed, or the trial did."""
        self._failures += 1
        if self.state == "half_open":
            self._pause = min(2 * self._pause, self._longest_pause)
        elif self.state == "open" or self._failures < self._most_failures:
            return
        self._open(reason, until=now + self._pause)
        self.needs_trial = True

    def gone(self, now: float, reason: str) -> None:
        """A request or a probe found that nobody listens there: what failed before is no matter of who comes next."""
        self.misses += 1
        self._open(reason, until=now)
        self._pause = self._first_pause
        self.needs_trial = False

    def answered(self, now: float) -> None:
        """A probe was answered."""
        self.misses = 0
        if self.state == "open" and now >= self._open_until:
            self.state = "half_open"

    def missed(self, now: float, reason: str, *, at_once: bool = False) -> None:
        """A probe was not, or said that the engine takes no work."""
        self.misses += 1
        if at_once or self.misses >= self._most_misses:
            self._open(reason, until=max(now, self._open_until))

    def _open(self, reason: str, *, until: float) -> None:
        self.openings += self.state == "closed"
        self.state, self.reason, self._open_until = "open", reason, until
        self._failures = 0
