"""What is sent in a run: one way of sending, and the value of it that is swept."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from app.errors import InvalidRequest
from app.loadtest.arrivals import Arrival, at_rate, back_to_back, read_trace

_MOST = 1e6
"""Of requests or times a second, and of seconds: beyond it a run would not end."""


def check_positive(option: str, value: float) -> None:
    """Refuse an option's value that is not above 0, too large, or no number at all.

    Raises:
        InvalidRequest: names the option and its range.
    """
    if not 0.0 < value <= _MOST:  # So that NaN is refused.
        raise InvalidRequest(f"`--{option}`: {value:g} is not above 0 and at most {_MOST:g}.", param=option)


@dataclass(frozen=True)
class Load:
    """A trace, arrivals at a rate, or callers that wait for their answers; exactly one of the three."""

    trace: Path | None = None
    speed: float = 1.0
    rates: tuple[float, ...] = ()
    concurrencies: tuple[int, ...] = ()
    seconds: float = 30.0
    requests: int | None = None
    prompt_tokens: int = 256
    output_tokens: int = 64
    in_flight: int = 1000
    seed: int = 0

    def check(self) -> None:
        """Read the whole trace once, so that a wrong line is told before anything is sent.

        Raises:
            InvalidRequest: not one way of sending is chosen, a number is out of its range, or the trace cannot be read.
        """
        ways = {"trace": self.trace, "rate": self.rates, "concurrency": self.concurrencies}
        chosen = [name for name, given in ways.items() if given]
        if len(chosen) != 1:
            raise InvalidRequest(f"`--{chosen[0] if chosen else 'rate'}`: give one of --trace, --rate, --concurrency.")
        for rate in self.rates:
            check_positive("rate", rate)
        check_positive("speed", self.speed)
        check_positive("seconds", self.seconds)
        if self.trace is not None:
            deque(self.arrivals(1.0), maxlen=0)

    @property
    def swept(self) -> tuple[str, list[float]]:
        """What a sweep without a command changes, and its values."""
        if self.trace is not None:
            return "speed", [self.speed]
        return ("rate", list(self.rates)) if self.rates else ("concurrency", [float(n) for n in self.concurrencies])

    @property
    def is_paced(self) -> bool:
        """Whether requests are due at times of their own."""
        return not self.concurrencies

    def arrivals(self, value: float) -> Iterator[Arrival]:
        """The requests, for one value of what is swept."""
        if self.trace is not None:
            return read_trace(self.trace, speed=self.speed, limit=self.requests)
        if self.concurrencies:
            return back_to_back(self.requests or 50 * round(value), self.prompt_tokens, self.output_tokens)
        drawn = at_rate(value, self.seconds, self.prompt_tokens, self.output_tokens, seed=self.seed)
        return islice(drawn, self.requests)

    def places(self, value: float) -> int:
        """How many requests may be out at once."""
        return round(value) if self.concurrencies else self.in_flight
