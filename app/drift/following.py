"""How predictions become windows: counted by distinct sessions, release by release, tenant by tenant.

The main rule: a window is filled in the order in which answers came, and ends when the next one begins: a session
belongs to the window in which it began, and what it says later counts nowhere. What is filled so far is stored with the
position that it goes to, so that nothing is counted twice whoever goes on.
"""

from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import Row

from app.drift.facts import MAX_QUESTIONS, session_of
from app.drift.states import KINDS, Alarm, Kind, alarms_of
from observability.windows import BUDGET_DAYS, CONSECUTIVE, alarmed

EARLIER_SESSIONS = 5_000
"""Sessions of past windows that are remembered; one that comes back after more than these counts as a new one."""

_DIGEST_BYTES = 8


class DriftPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How drift is looked for."""

    reference_sessions: int = 1_000
    window_sessions: int = 500
    false_alarms: float = 1.0
    """Of a tenant, in 90 days."""
    label_rate: float = 0.2
    """How likely an answer of a release with an alarm is labelled; 0 raises nothing."""
    label_days: float = 7.0
    max_streams: int = 500
    """Releases of tenants that are followed at most."""


class Noticed(msgspec.Struct, frozen=True, kw_only=True):
    """A slice of the answers that should be looked at more closely, because of an alarm."""

    tenant: str
    release: str
    rate: float
    since: datetime
    until: datetime
    reason: str


class _Digests:
    """Digests that can be asked for one: a set of them would take ten times the memory, for hundreds of streams."""

    def __init__(self, joined: bytes) -> None:
        self._sorted = np.sort(np.frombuffer(joined, np.uint64))

    def __contains__(self, digest: bytes) -> bool:
        value = np.frombuffer(digest, np.uint64)[0]
        at = int(np.searchsorted(self._sorted, value))
        return at < len(self._sorted) and bool(self._sorted[at] == value)


class OpenWindow(msgspec.Struct):
    """The window that is being filled: changed as it is, and written when a step ends."""

    rows: list[int] = []
    """Of the predictions that count."""
    sessions: dict[bytes, int] = {}
    """How many questions of each were seen."""
    first_id: str = ""
    last_id: str = ""

    def take(self, row: Row[Any], session: bytes, size: int) -> bool:
        """Count an answer; False, and nothing has changed, where it begins the next window."""
        seen = self.sessions.get(session, 0)
        if not seen and len(self.sessions) >= size:
            return False
        self.sessions[session] = seen + 1
        if seen < MAX_QUESTIONS:
            self.rows.append(row.row)
        self.first_id = self.first_id or row.id
        self.last_id = row.id
        return True


class Stream(msgspec.Struct, dict=True):
    """What one tenant asks of one release."""

    tenant: str
    release: str
    started_at: int
    open: OpenWindow = msgspec.field(default_factory=OpenWindow)
    earlier: bytes = b""
    reference: int = 0
    windows: int = 0
    recent: dict[Kind, list[float]] = {}
    """The last two p-values by kind, with the reference in use."""
    alarms: tuple[Alarm, ...] = ()

    def take(self, row: Row[Any], size: int) -> bool:
        """Count an answer; False, and nothing has changed, where it begins the next window."""
        session = session_of(self.tenant, row.id, row.user, row.conversation)
        return session in self._earlier_sessions or self.open.take(row, session, size)

    @cached_property
    def _earlier_sessions(self) -> "_Digests":
        return _Digests(self.earlier)

    def next_window(self) -> OpenWindow:
        """Begin another window, and give the one that has ended."""
        ended, self.open = self.open, OpenWindow()
        self.earlier = (self.earlier + b"".join(ended.sessions))[-EARLIER_SESSIONS * _DIGEST_BYTES :]
        self.__dict__.pop("_earlier_sessions", None)
        return ended

    def hear(self, p_values: dict[Kind, float | None], reference: int, level: float, *, now: int) -> list[Alarm]:
        """Take in a window's p-values; gives the alarms that it raises. What was not tested stays as it was."""
        self.windows += 1
        if reference != self.reference:
            self.reference, self.recent, self.alarms = reference, {}, ()
        held = {each.kind: each for each in self.alarms}
        raised = []
        for kind, p_value in p_values.items():
            if p_value is None:
                continue
            self.recent[kind] = [*self.recent.get(kind, ()), p_value][-CONSECUTIVE:]
            if not alarmed(self.recent[kind], level):
                held.pop(kind, None)
            elif kind not in held:
                held[kind] = Alarm(kind=kind, since=now, window=self.windows)
                raised.append(held[kind])
        self.alarms = tuple(held.values())
        return raised


def stream_of(row: Row[Any]) -> Stream:
    """Read a stream."""
    return Stream(
        tenant=row.tenant,
        release=row.release,
        started_at=row.started_at,
        open=_open_window(row.open_window),
        earlier=bytes(row.earlier),
        reference=row.reference,
        windows=row.windows,
        recent=_recent(row.recent),
        alarms=alarms_of(row.alarms),
    )


def values_of(stream: Stream, *, now: int) -> dict[str, Any]:
    """The columns of a stream."""
    return {
        "tenant": stream.tenant,
        "release": stream.release,
        "reference": stream.reference,
        "windows": stream.windows,
        "open_window": msgspec.msgpack.encode(stream.open),
        "open_sessions": len(stream.open.sessions),
        "earlier": stream.earlier,
        "recent": msgspec.json.encode(stream.recent).decode(),
        "alarms": msgspec.json.encode(stream.alarms).decode(),
        "started_at": stream.started_at,
        "updated_at": now,
    }


def windows_in_90_days(streams: Iterable[tuple[int, int]], *, now: int) -> float:
    """How many tests may raise an alarm in 90 days, two a window, as windows and start of each stream tell so far."""
    day = 24 * 3600 * 1000
    return sum(
        len(KINDS) * (windows + 1) * BUDGET_DAYS * day / max(now - started_at, day) for windows, started_at in streams
    )


_open_window = msgspec.msgpack.Decoder(OpenWindow).decode
_recent = msgspec.json.Decoder(dict[Kind, list[float]]).decode
