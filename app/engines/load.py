"""How busy a server says it is: two gauges out of its Prometheus metrics.

The page has hundreds of lines and is read every second, so it is searched, not parsed.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in the batch, and in the queue before it."""

    running: float
    waiting: float


def read_load(page: bytes, *, running: str, waiting: str) -> Load:
    """Read the two gauges; one that is absent is 0, because servers show a metric only once it was touched."""
    return Load(_total(page, running), _total(page, waiting))


def _total(page: bytes, name: str) -> float:
    """The sum over a gauge's labels: a server with several engines inside has one for each."""
    values = [float(value) for value in _pattern(name).findall(page)]
    total = sum(value for value in values if math.isfinite(value))
    return max(0.0, total)


@lru_cache(maxsize=32)
def _pattern(name: str) -> re.Pattern[bytes]:
    number = rb"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
    return re.compile(rb"^%b(?:\{.*\})? +(%b)(?=\s|$)" % (re.escape(name).encode(), number), re.MULTILINE)
