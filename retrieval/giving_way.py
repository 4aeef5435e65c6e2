"""Threads that compute in Python for long, beside an event loop that requests wait for."""

import sys
from threading import Lock

SWITCH_SECONDS = 0.0005
"""After which a thread that computes hands over the interpreter's lock. While a document is cut, the event loop wakes
up 4 to 5 ms late at p99 in place of 8 to 9 with Python's default, ten times this, and 2 in place of 3 at p90."""


class _GivingWay:
    """Has all threads hand over the interpreter's lock ten times as often as usual while at least one is in here.

    Only so long: otherwise the thread that commits records takes the lock from the event loop as often, and commits
    fewer rows at a time, which makes a streamed answer 1.2 times as dear.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._computing = 0
        self._usual_seconds = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._computing:
                self._usual_seconds = sys.getswitchinterval()
                if self._usual_seconds > SWITCH_SECONDS:
                    sys.setswitchinterval(SWITCH_SECONDS)
            self._computing += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._computing -= 1
            if not self._computing and self._usual_seconds > SWITCH_SECONDS:
                sys.setswitchinterval(self._usual_seconds)


giving_way = _GivingWay()
"""The process's: to be used as `with giving_way:` around what computes."""
