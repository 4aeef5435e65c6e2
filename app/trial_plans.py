"""Pure: what a canary is watched for, how much worse it may be, and how often the watch may err.

The main rule: a plan is fixed when a trial begins. Whoever chooses guards after seeing answers finds harm by chance.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import msgspec

from observability.sequential import Guard, Plan

GuardName = Literal["failed", "refused", "unsupported", "slow", "disliked"]
"""`failed`: an error, an answer without a word, or one cut off by its length. `refused`: an abstention, or an answer
that begins as refusals do. `unsupported`: the passages did not bear the answer out. `slow`: it took longer than the
plan allows. `disliked`: the user's thumb was down, of those who gave one."""

GUARD_NAMES: tuple[GuardName, ...] = get_args(GuardName)

GUARDS = {
    guard.name: guard
    for guard in (
        Guard(name="failed", tolerance=0.01, margin=0.05),
        Guard(name="refused", tolerance=0.02, margin=0.1),
        Guard(name="unsupported", tolerance=0.02, margin=0.1),
        Guard(name="slow", tolerance=0.05, margin=0.1),
        Guard(name="disliked", tolerance=0.02, margin=0.1),
    )
}
"""Every guard there is, with the tolerance and the margin that it has unless told otherwise."""

DEFAULT_GUARDS = tuple(GUARDS[name] for name in ("failed", "refused", "unsupported", "slow"))
"""What every answer says something about. Not `disliked`: where nobody gives thumbs it would never hear anything."""


class TrialPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The guards of one canary's trial, with what they need to judge answers by.

    Raises:
        ValueError: a figure is out of its range, or a guard is unknown or named twice.
    """

    bets: Plan = Plan(guards=DEFAULT_GUARDS)
    slow_seconds: float = 30.0
    """An answer that took longer is `slow`."""
    silent_seconds: float = 3_600.0
    """A trial in which the canary, or a guard of it, hears nothing for so long raises an alarm."""

    def __post_init__(self) -> None:
        """Check the figures."""
        unknown = sorted({guard.name for guard in self.bets.guards} - set(GUARD_NAMES))
        if unknown:
            raise ValueError(f"there is no guard {unknown[0]!r}: choose from {', '.join(GUARD_NAMES)}.")
        if self.slow_seconds <= 0 or self.silent_seconds <= 0:
            raise ValueError("slow_seconds and silent_seconds must be above 0.")


def trial_plan(
    guards: Iterable[Mapping[str, Any]],
    *,
    rollback_error: float,
    promotion_error: float,
    min_observations: int,
    slow_seconds: float,
    silent_seconds: float,
) -> TrialPlan:
    """Make a plan of what the API's JSON says; a figure of a guard that is None is the guard's own.

    Raises:
        ValueError: a guard is unknown or named twice, or a figure is out of its range.
    """
    made = []
    for given in guards:
        if given["name"] not in GUARDS:
            raise ValueError(f"there is no guard {given['name']!r}: choose from {', '.join(GUARD_NAMES)}.")
        said = {field: value for field, value in given.items() if value is not None}
        made.append(msgspec.structs.replace(GUARDS[given["name"]], **said))
    bets = Plan(
        guards=tuple(made),
        rollback_error=rollback_error,
        promotion_error=promotion_error,
        min_observations=min_observations,
    )
    return TrialPlan(bets=bets, slow_seconds=slow_seconds, silent_seconds=silent_seconds)
