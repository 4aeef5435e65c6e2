"""Whether a canary is worse than the stable release, or surely not worse, however often somebody looks.

The main rule: evidence is a bet. For each guard a capital of 1 is staked, again and again, that the canary's next
observation is worse than that of the stable traffic beside it. If it is no worse, nobody can make money by that: the
chance that the capital ever reaches 1 / error is at most that error, at whatever moment one stops (Ville 1939; betting
on bounded means: Waudby-Smith and Ramdas 2024, JRSS B 86). The capital is the e-value. A second bet, the other way
round, is that the canary is worse by less than a margin: only that one can promote it.

A state is a value that JSON can hold. It follows from the observations in their order by additions, multiplications and
one exactly rounded sum, so that a replay gives the same bits on any machine.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Self

import msgspec

Arm = Literal["stable", "canary"]
Action = Literal["continue", "roll_back", "promote"]

# The capital is split evenly over these stakes, as shares of the most that can be bet without risking ruin: large ones
# find large harm soon, small ones small harm.
STAKES = tuple(step / 20 for step in range(1, 20, 2))
# A canary's observation is compared with the mean of at least so many stable ones, where traffic has them: with one the
# comparison is twice as noisy, and with eight little is gained.
_STABLE_PER_CANARY = 4
# So many observations of the canary wait for stable ones beside them; then one stable one must do.
_MAX_WAITING = 8
_MOST_CAPITAL = 1e300


class Guard(msgspec.Struct, frozen=True, kw_only=True):
    """What a canary must not worsen: the mean of something between 0 (good) and 1 (bad), once a session.

    `tolerance` is by how much the canary's mean may be higher before it counts as worse, `margin` by how much it must
    surely not be higher before it is promoted, `weight` the guard's part of the error budget.
    """

    name: str
    tolerance: float = 0.0
    margin: float = 0.05
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            ValueError: a figure is out of its range.
        """
        if not 0 <= self.tolerance <= self.margin < 1 or self.margin == 0:
            raise ValueError(f"{self.name}: tolerance must be from 0 to margin, and margin above 0 and below 1.")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"{self.name}: weight must be above 0.")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The guards of a trial, fixed before it begins, and how often it may err.

    `rollback_error` is the chance that a canary within every tolerance is ever rolled back, over the whole trial and
    all guards together. `promotion_error` is the chance that one beyond any margin is ever promoted: every guard must
    agree, so each may err by the whole of it (intersection-union test, Berger 1982).
    """

    guards: tuple[Guard, ...]
    rollback_error: float = 0.01
    promotion_error: float = 0.05
    min_observations: int = 30
    """Observations of the canary, for each guard, before that guard decides anything."""

    def __post_init__(self) -> None:
        """Check that there are guards, each with a name of its own, and that the errors are chances."""
        if not self.guards or len({guard.name for guard in self.guards}) < len(self.guards):
            raise ValueError("guards must be one or more, each with a name of its own.")
        if not (0 < self.rollback_error < 1 and 0 < self.promotion_error < 1):
            raise ValueError("rollback_error and promotion_error must be above 0 and below 1.")

    def rollback_threshold(self, guard: Guard) -> float:
        """The e-value at which this guard rolls back: one over its part of the error budget (Bonferroni)."""
        return sum(each.weight for each in self.guards) / (guard.weight * self.rollback_error)

    @property
    def promotion_threshold(self) -> float:
        """The e-value that every guard must reach for promotion."""
        return 1 / self.promotion_error


class Observation(msgspec.Struct, frozen=True):
    """One session's word about one guard: `badness` is 0 to 1.

    A session has one arm and is observed once for each guard: twenty answers in one conversation are one observation.
    """

    guard: str
    arm: Arm
    badness: float


class Tally(msgspec.Struct, frozen=True):
    """How many were observed, and their badness added up."""

    n: int = 0
    badness: float = 0.0

    def add(self, badness: float) -> "Tally":
        """Count one more."""
        return Tally(self.n + 1, self.badness + badness)

    @property
    def mean(self) -> float:
        """The mean badness; needs one observation."""
        return self.badness / self.n


class Evidence(msgspec.Struct, frozen=True):
    """What is known about one guard: both arms, who waits to be compared, and the capital at each of `STAKES`."""

    stable: Tally = Tally()
    canary: Tally = Tally()
    waiting_stable: Tally = Tally()
    waiting_canary: tuple[float, ...] = ()
    harm: tuple[float, ...] = (1.0,) * len(STAKES)
    safety: tuple[float, ...] = (1.0,) * len(STAKES)

    @property
    def harm_e_value(self) -> float:
        """Evidence that the canary is worse than tolerated; 1 is none."""
        return _average(self.harm)

    @property
    def safety_e_value(self) -> float:
        """Evidence that the canary is worse by less than the margin; 1 is none."""
        return _average(self.safety)

    def observe(self, guard: Guard, arm: Arm, badness: float) -> "Evidence":
        """Take in one session."""
        if arm == "stable":
            stable, waiting = self.stable.add(badness), self.waiting_stable.add(badness)
            grown = msgspec.structs.replace(self, stable=stable, waiting_stable=waiting)
        else:
            queue = (*self.waiting_canary, badness)[-_MAX_WAITING:]
            grown = msgspec.structs.replace(self, canary=self.canary.add(badness), waiting_canary=queue)
        beside, queue = grown.waiting_stable.n, grown.waiting_canary
        enough = beside >= _STABLE_PER_CANARY or (beside > 0 and len(queue) == _MAX_WAITING)
        return _compare(grown, guard) if queue and enough else grown


class Verdict(msgspec.Struct, frozen=True):
    """What follows from the evidence so far; `guard` and its e-value are those that decided, or are nearest to harm."""

    action: Action
    guard: str
    e_value: float
    threshold: float


class Trial(msgspec.Struct, frozen=True):
    """A canary's trial: its plan, and the evidence about each guard. Encode it with msgspec to keep it."""

    plan: Plan
    evidence: Mapping[str, Evidence]

    @classmethod
    def begin(cls, plan: Plan) -> Self:
        """Start without evidence."""
        return cls(plan, {guard.name: Evidence() for guard in plan.guards})

    def observe(self, observation: Observation) -> "Trial":
        """Take in one observation.

        Raises:
            ValueError: the plan has no such guard, or the badness is not between 0 and 1.
        """
        guard = next((each for each in self.plan.guards if each.name == observation.guard), None)
        if guard is None:
            raise ValueError(f"The plan has no guard {observation.guard!r}: guards are fixed before a trial begins.")
        if not 0 <= observation.badness <= 1:
            raise ValueError(f"{guard.name}: badness must be between 0 and 1, not {observation.badness}.")
        after = self.evidence[guard.name].observe(guard, observation.arm, observation.badness)
        return Trial(self.plan, {**self.evidence, guard.name: after})

    @property
    def verdict(self) -> Verdict:
        """Say what to do: roll back when one guard says so, promote when all do, else go on."""
        plan, heard = self.plan, self._heard()
        harm = [self._harm(guard) for guard in plan.guards]
        proved = [verdict for verdict, known in zip(harm, heard, strict=True) if known and _reached(verdict)]
        if proved:
            return msgspec.structs.replace(max(proved, key=_part), action="roll_back")
        safety = [
            Verdict("promote", guard.name, self.evidence[guard.name].safety_e_value, plan.promotion_threshold)
            for guard in plan.guards
        ]
        if all(heard) and all(map(_reached, safety)):
            return min(safety, key=_part)
        return max(harm, key=_part)

    def _heard(self) -> Sequence[bool]:
        return [self.evidence[guard.name].canary.n >= self.plan.min_observations for guard in self.plan.guards]

    def _harm(self, guard: Guard) -> Verdict:
        threshold = self.plan.rollback_threshold(guard)
        return Verdict("continue", guard.name, self.evidence[guard.name].harm_e_value, threshold)


class Step(msgspec.Struct, frozen=True):
    """The e-values of the guard that an observation was about, and what then followed."""

    observation: Observation
    harm_e_value: float
    safety_e_value: float
    verdict: Verdict


def replay(plan: Plan, observations: Iterable[Observation]) -> Iterator[Step]:
    """Go through stored observations in their order, up to the one that decided: the path of the e-values."""
    trial = Trial.begin(plan)
    for observation in observations:
        trial = trial.observe(observation)
        evidence, verdict = trial.evidence[observation.guard], trial.verdict
        yield Step(observation, evidence.harm_e_value, evidence.safety_e_value, verdict)
        if verdict.action != "continue":
            return


def _compare(evidence: Evidence, guard: Guard) -> Evidence:
    """Bet on the canary's oldest observation against the mean of the stable ones that gathered beside it.

    Which ones meet is settled by the order in which the arms came and never by what was observed. So the difference
    has the mean of the arms' difference, whatever happened before: that is all the bet needs to be fair.
    """
    first, *others = evidence.waiting_canary
    difference = first - evidence.waiting_stable.mean
    # The stake is the largest share of what a difference of -1, or 1, could cost.
    worse = (difference - guard.tolerance) / (1 + guard.tolerance)
    safer = (guard.margin - difference) / (1 - guard.margin)
    return msgspec.structs.replace(
        evidence,
        waiting_stable=Tally(),
        waiting_canary=tuple(others),
        harm=_bet(evidence.harm, worse),
        safety=_bet(evidence.safety, safer),
    )


def _bet(capitals: Sequence[float], outcome: float) -> tuple[float, ...]:
    """Stake each capital on an outcome of at least -1; what exceeds the largest that JSON can hold is given away."""
    won = (capital * (1 + stake * outcome) for capital, stake in zip(capitals, STAKES, strict=True))
    return tuple(min(capital, _MOST_CAPITAL) for capital in won)


def _average(capitals: Sequence[float]) -> float:
    # fsum is rounded once, whatever the order and the version of Python.
    return math.fsum(capitals) / len(capitals)


def _reached(verdict: Verdict) -> bool:
    return verdict.e_value >= verdict.threshold


def _part(verdict: Verdict) -> float:
    return verdict.e_value / verdict.threshold
