"""One engine of a pool: its breaker, its load, and the requests that wait for its first word."""

import asyncio
from dataclasses import dataclass

from app.engines.breaker import Breaker, State
from app.engines.failures import status_of
from app.engines.load import Load
from app.engines.tgi import TGIEngine
from app.engines.wire import ConnectFailed
from app.errors import EngineError, EngineRejected, EngineTimeout, EngineUnavailable, ModelNotFound, ServiceError

NOBODY_LISTENS = "nothing listens there"


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """How a member stands, for readiness and metrics; nothing of what is asked or answered."""

    name: str
    state: State
    reason: str
    in_flight: int
    waiting: float | None
    """Its queue as it says itself; None where it does not say."""
    ejections: int


class Member:
    """One engine of several that serve the same model."""

    def __init__(self, name: str, engine: TGIEngine, breaker: Breaker) -> None:
        self.name = name
        self.engine = engine
        self.breaker = breaker
        self.looking: asyncio.Task[None] | None = None
        self.chosen = 0
        """When it was chosen last, by the pool's count."""
        self.was_up = True
        """What was told of it last."""
        self.patience: set[asyncio.Timeout] = set()
        """Those of the requests that wait for their first token here."""
        self._load: Load | None = None
        self._foreign = 0.0

    @property
    def facts(self) -> MemberFacts:
        """How it stands."""
        breaker, load = self.breaker, self._load
        waiting = load.waiting if load else None
        return MemberFacts(self.name, breaker.state, breaker.reason, self.engine.in_flight, waiting, breaker.openings)

    @property
    def burden(self) -> float:
        """How much it has to do: our requests and others' that it works at or queues, what queues counting twice."""
        queued = self._load.waiting if self._load else 0.0
        return self.engine.in_flight + self._foreign + queued

    def note_load(self, load: Load | None) -> None:
        """Take over what it says of its load; whatever of it is not ours is others'."""
        self._load = load
        self._foreign = max(0.0, load.running + load.waiting - self.engine.in_flight) if load else 0.0

    def failed(self, now: float, error: ServiceError) -> None:
        """Count a request that failed, if that was the engine's doing; a full one is none the worse for it."""
        if isinstance(error, EngineRejected) or lacks_model(error):
            return
        if isinstance(error, EngineError | EngineUnavailable | EngineTimeout):
            if is_refused(error):
                self.breaker.gone(now, NOBODY_LISTENS)
            else:
                self.breaker.failed(now, f"requests fail: {error.code}")

    def abandon(self) -> int:
        """Have those that wait for their first token look elsewhere; gives how many they are."""
        now = asyncio.get_running_loop().time()
        for timeout in self.patience:
            timeout.reschedule(now)
        return len(self.patience)


def is_refused(error: ServiceError) -> bool:
    """Whether nobody listens there, which a process that lives is never mistaken for."""
    return isinstance(error.__cause__, ConnectFailed)


def lacks_model(error: ServiceError) -> bool:
    """Whether a request failed for want of a model or adapter that is about to be there: others it can answer."""
    return isinstance(error.__cause__, ModelNotFound)


def has_no_route(error: ServiceError) -> bool:
    """Whether a probe was answered by a server that has no such route: one that lives."""
    return status_of(error) in (404, 405)
