"""A canary's trial as JSON: its plan, the evidence of each guard, what was heard, and what was decided."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.errors import InvalidRequest
from app.guards import Decision, Heard, TrialRecord
from app.guards.trials import Kind, Status
from app.routes.schemas import Wire
from app.trial_plans import DEFAULT_GUARDS, GUARDS, GuardName, TrialPlan, trial_plan
from observability.sequential import Arm, Guard

Share = Annotated[float, Field(ge=0, lt=1)]
Chance = Annotated[float, Field(gt=0, lt=1)]
_USUAL = TrialPlan()


class GuardObject(Wire):
    """A guard: what a canary must not worsen, and by how much it may."""

    name: GuardName
    tolerance: Share | None = Field(
        None, description="By how much the canary's share of bad sessions may be higher. By default the guard's own."
    )
    margin: Share | None = Field(None, description="By how much it must surely not be higher to be promoted.")
    weight: Annotated[float, Field(gt=0, le=1_000)] | None = Field(None, description="Its part of the error budget.")


class TrialPlanObject(Wire):
    """What a canary is watched for; fixed when its trial begins."""

    guards: list[GuardObject] = Field(
        default_factory=lambda: [GuardObject(name=guard.name) for guard in DEFAULT_GUARDS],  # type: ignore[arg-type]
        min_length=1,
        max_length=len(GUARDS),
        description="By default `failed`, `refused`, `unsupported` and `slow`. `disliked` needs users' thumbs.",
    )
    rollback_error: Chance = Field(
        _USUAL.bets.rollback_error, description="How likely a canary that is no worse is ever rolled back, in all."
    )
    promotion_error: Chance = Field(
        _USUAL.bets.promotion_error, description="How likely one that is worse is ever said to be fit for promotion."
    )
    min_observations: int = Field(
        _USUAL.bets.min_observations, ge=1, le=100_000, description="Sessions of the canary before a guard decides."
    )
    slow_seconds: float = Field(_USUAL.slow_seconds, gt=0, le=86_400, description="An answer that took longer is slow.")
    silent_seconds: float = Field(
        _USUAL.silent_seconds, gt=0, le=10_000_000, description="After so long without a word there is an alarm."
    )

    def plan(self) -> TrialPlan:
        """The plan that is meant; raises InvalidRequest where its parts contradict each other."""
        try:
            return trial_plan(**self.model_dump())
        except ValueError as error:
            raise InvalidRequest(f"`plan.guards`: {error}", param="plan") from error

    @classmethod
    def of(cls, plan: TrialPlan) -> "TrialPlanObject":
        """The plan as it is shown, with every figure."""
        bets = plan.bets
        return cls(
            guards=[_guard(guard) for guard in bets.guards],
            rollback_error=bets.rollback_error,
            promotion_error=bets.promotion_error,
            min_observations=bets.min_observations,
            slow_seconds=plan.slow_seconds,
            silent_seconds=plan.silent_seconds,
        )


class EvidenceObject(BaseModel):
    """What one guard knows; one session is one observation."""

    guard: str
    canary_sessions: int
    canary_bad: float | None = Field(description="The mean of what they said, 0 (good) to 1 (bad).")
    stable_sessions: int
    stable_bad: float | None = None
    e_value: float = Field(description="Evidence that the canary is worse than tolerated; 1 is none.")
    threshold: float = Field(description="The e-value at which it is rolled back.")
    verdict: Literal["waiting", "no_harm_found", "worse"] = Field(
        description="`waiting` for the plan's `min_observations`."
    )
    safety_e_value: float = Field(description="Evidence that it is worse by less than the margin; 1 is none.")
    safety_threshold: float = Field(description="All guards must reach it for promotion, which a person decides.")


class DecisionObject(BaseModel):
    """Why a guard rolled the canary back."""

    guard: str
    why: str
    observation: int = Field(description="The observation that decided; 0 where none did.")
    e_value: float | None = None
    threshold: float | None = None
    path: list[tuple[int, float]] = Field(description="E-values along the way, by sessions of the canary.")

    @classmethod
    def of(cls, decision: Decision) -> "DecisionObject":
        """The decision as it is shown."""
        return cls(
            guard=decision.guard,
            why=decision.why,
            observation=decision.observation,
            e_value=decision.e_value,
            threshold=decision.threshold,
            path=list(decision.path),
        )


class TrialObject(BaseModel):
    """A canary's trial, or the last one of the name."""

    id: str
    object: Literal["trial"] = "trial"
    name: str
    stable: str
    canary: str
    status: Status = Field(description="`rolled_back` by a guard; `ended` by a person.")
    plan: TrialPlanObject
    evidence: list[EvidenceObject]
    may_promote: bool = Field(description="Whether all guards have shown that it is not worse by their margins.")
    observations: int
    alarm: str | None = Field(None, description="What keeps the trial from coming to an end.")
    decision: DecisionObject | None = None
    started_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, record: TrialRecord) -> "TrialObject":
        """The trial as it is shown."""
        return cls(
            id=record.id,
            name=record.name,
            stable=record.label("stable"),
            canary=record.label("canary"),
            status=record.status,
            plan=TrialPlanObject.of(record.plan),
            evidence=[_evidence(record, guard) for guard in record.plan.bets.guards],
            may_promote=record.state.trial.verdict.action == "promote",
            observations=record.observations,
            alarm=record.alarm,
            decision=DecisionObject.of(record.decision) if record.decision else None,
            started_at=_moment(record.started_at),
            updated_at=_moment(record.updated_at),
        )


class ObservationObject(BaseModel):
    """What one session said, in its order."""

    number: int
    kind: Kind
    arm: Arm
    badness: dict[str, float] = Field(description="By guard, 0 (good) to 1 (bad).")
    at: datetime

    @classmethod
    def of(cls, heard: Heard) -> "ObservationObject":
        """The observation as it is shown."""
        return cls(number=heard.number, kind=heard.kind, arm=heard.arm, badness=heard.badness, at=_moment(heard.at))


class ObservationList(BaseModel):
    """One page of a trial's observations; `next` is the `after` of the next one."""

    object: Literal["list"] = "list"
    trial: str
    data: list[ObservationObject]
    next: int | None = None


def _guard(guard: Guard) -> GuardObject:
    return GuardObject.model_validate(
        {"name": guard.name, "tolerance": guard.tolerance, "margin": guard.margin, "weight": guard.weight}
    )


def _evidence(record: TrialRecord, guard: Guard) -> EvidenceObject:
    known, bets = record.state.trial.evidence[guard.name], record.plan.bets
    threshold = bets.rollback_threshold(guard)
    verdict: Literal["waiting", "no_harm_found", "worse"] = "waiting"
    if known.canary.n >= bets.min_observations:
        verdict = "worse" if known.harm_e_value >= threshold else "no_harm_found"
    return EvidenceObject(
        guard=guard.name,
        canary_sessions=known.canary.n,
        canary_bad=known.canary.mean if known.canary.n else None,
        stable_sessions=known.stable.n,
        stable_bad=known.stable.mean if known.stable.n else None,
        e_value=known.harm_e_value,
        threshold=threshold,
        verdict=verdict,
        safety_e_value=known.safety_e_value,
        safety_threshold=bets.promotion_threshold,
    )


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
