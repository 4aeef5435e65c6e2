"""How long something took, less the time for which it could have run and the machine had no processor free.

watch = Stopwatch()
...
assert watch.seconds < 0.3  # On a machine that does nothing else; on a busy one as much as that would have been.
"""

import contextlib
import time
from pathlib import Path


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._waited = _waited_seconds()

    @property
    def seconds(self) -> float:
        """Seconds so far, but for those that any thread of this process waited for a processor."""
        elapsed = time.perf_counter() - self._began
        return max(0.0, elapsed - max(0.0, _waited_seconds() - self._waited))


def _waited_seconds() -> float:
    """What the threads of this process have waited for a processor since they began; 0 where Linux does not say."""
    nanoseconds = 0
    for statistics in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # A thread may end while we look.
            nanoseconds += int(statistics.read_text().split()[1])
    return nanoseconds / 1e9
