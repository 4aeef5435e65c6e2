"""Keeps on `/metrics` for how many tenants a serving release has drifted: numbers, no tenant's name or questions."""

from collections.abc import Awaitable, Callable, Collection, Sequence

from app.drift.states import KINDS, Drift
from app.rollouts import Rollout
from observability.collectors import DriftSample

MAX_RELEASES = 50


class DriftGauges:
    """Reads what the worker has found, and shows it.

    Args:
        drift: asks the database.
        rollouts: gives the rollouts that there are.
        show: gets the numbers of the releases that serve.
    """

    EVERY_SECONDS = 60.0

    def __init__(
        self,
        drift: Drift,
        *,
        rollouts: Callable[[], Awaitable[Collection[Rollout]]],
        show: Callable[[Sequence[DriftSample]], None],
    ) -> None:
        self._drift = drift
        self._rollouts = rollouts
        self._show = show

    async def refresh(self) -> None:
        """Read the numbers now; raises ServiceError, and what is shown then stays."""
        serving = {f"{rollout.name}@{number}" for rollout in await self._rollouts() for number in rollout.serving}
        alarmed, compared = await self._drift.counts()
        shown = [release for release in sorted(serving)[:MAX_RELEASES] if release in compared]
        self._show(
            [
                DriftSample(release, compared[release], {kind: alarmed.get((release, kind), 0) for kind in KINDS})
                for release in shown
            ]
        )
