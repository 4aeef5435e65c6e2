"""Releases and rollouts as JSON."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, Field

from app.registry import Change, Entry
from app.releases import LABEL_PATTERN, Release
from app.rollouts import Rollout
from app.routes.schemas import Wire
from app.routes.trial_schemas import TrialPlanObject

ReleaseLabel = Annotated[str, Field(pattern=LABEL_PATTERN, description="`name@number`.")]
Why = Annotated[str, Field("", max_length=2_000, pattern=r"^[^\x00]*$", description="Goes into the audit.")]
Revision = Annotated[
    int | None,
    Field(None, ge=0, description="The revision that this was decided on; if it has changed since, nothing is done."),
]


class ReleaseObject(BaseModel):
    """A release: immutable, and named by the digest of its content."""

    id: str = Field(description="`name@number`.")
    object: Literal["release"] = "release"
    name: str
    number: int
    digest: str = Field(description="SHA-256 of the canonical JSON of `content`.")
    content: dict[str, Any] = Field(
        description="All of it, defaults written out; keys sorted it is the canonical JSON."
    )
    approved: bool = Field(description="Whether it was found fit to serve.")
    problems: list[str] = Field(
        default_factory=list, description="When it was just created: what keeps it from serving."
    )
    created_at: datetime
    created_by: str | None = None

    @classmethod
    def of(cls, entry: Entry) -> "ReleaseObject":
        """The release as it is shown."""
        release = entry.release
        return cls(
            id=release.label,
            name=release.name,
            number=release.number,
            digest=release.digest,
            content=msgspec.json.decode(release.canonical),
            approved=entry.approved_at is not None,
            problems=list(entry.problems),
            created_at=moment(entry.created_at),
            created_by=entry.created_by,
        )


class ReleaseList(BaseModel):
    """One page of releases by name and number; `next` is the `after` of the next one."""

    object: Literal["list"] = "list"
    data: list[ReleaseObject]
    next: str | None = None


class Difference(BaseModel):
    """A field in which two releases differ; null where a release has no such field."""

    field: str = Field(description="Its path, with dots.")
    a: Any = None
    b: Any = None


class ReleaseDiff(BaseModel):
    """What differs between two releases."""

    object: Literal["release.diff"] = "release.diff"
    a: str
    b: str
    differences: list[Difference]

    @classmethod
    def of(cls, a: Release, b: Release, found: list[tuple[str, Any, Any]]) -> "ReleaseDiff":
        """The differences as they are shown."""
        differences = [Difference(field=field, a=left, b=right) for field, left, right in found]
        return cls(a=a.label, b=b.label, differences=differences)


class ReleaseDeleted(BaseModel):
    """A release that can no longer be asked for."""

    id: str
    object: Literal["release.deleted"] = "release.deleted"
    deleted: bool = True


class RolloutObject(BaseModel):
    """Which release of a name answers whom."""

    name: str
    object: Literal["rollout"] = "rollout"
    revision: int = Field(description="Rises by one with every change.")
    stable: str
    canary: str | None = None
    share: float = Field(description="The canary's part of the conversations, 0 to 1.")
    shadow: str | None = None
    shadow_rate: float = Field(description="The part of the requests that the shadow answers too, 0 to 1.")
    paused: bool = Field(description="Whether canary and shadow get nothing for now.")
    previous: list[str] = Field(description="What was stable before, oldest first.")
    plan: TrialPlanObject | None = Field(None, description="What the canary is watched for.")

    @classmethod
    def of(cls, rollout: Rollout) -> "RolloutObject":
        """The rollout as it is shown."""

        def label(number: int | None) -> str | None:
            return None if number is None else f"{rollout.name}@{number}"

        return cls(
            name=rollout.name,
            revision=rollout.revision,
            stable=f"{rollout.name}@{rollout.stable}",
            canary=label(rollout.canary),
            share=rollout.share,
            shadow=label(rollout.shadow),
            shadow_rate=rollout.shadow_rate,
            paused=rollout.paused,
            previous=[f"{rollout.name}@{number}" for number in rollout.previous],
            plan=TrialPlanObject.of(rollout.plan) if rollout.plan else None,
        )


class RolloutList(BaseModel):
    """The rollouts by name."""

    object: Literal["list"] = "list"
    data: list[RolloutObject]


class RolloutChange(BaseModel):
    """One change: who made it, why, and what was before and after."""

    object: Literal["rollout.change"] = "rollout.change"
    revision: int
    at: datetime
    who: str
    why: str
    action: str
    before: RolloutObject | None = None
    after: RolloutObject

    @classmethod
    def of(cls, change: Change) -> "RolloutChange":
        """The change as it is shown."""
        return cls(
            revision=change.revision,
            at=moment(change.at),
            who=change.who,
            why=change.why,
            action=change.action,
            before=RolloutObject.of(change.before) if change.before else None,
            after=RolloutObject.of(change.after),
        )


class RolloutChangeList(BaseModel):
    """One page of changes, newest first; `next` is the `before` of the next one."""

    object: Literal["list"] = "list"
    data: list[RolloutChange]
    next: int | None = None


class RolloutStep(Wire):
    """A change that needs no more than a reason."""

    why: Why
    revision: Revision


class PromoteStep(RolloutStep):
    """Make a release stable."""

    release: ReleaseLabel | None = Field(None, description="By default the canary.")


class CanaryStep(RolloutStep):
    """Try a release on a share of the conversations."""

    release: ReleaseLabel | None = Field(None, description="By default the canary there is, to change its share.")
    share: float = Field(ge=0, le=1, description="Of the conversations (else users, else requests), 0 to 1.")
    plan: TrialPlanObject | None = Field(
        None, description="What the canary is watched for, fixed when its trial begins; by default the usual guards."
    )


class ShadowStep(RolloutStep):
    """Let a release answer a part of the requests unseen."""

    release: ReleaseLabel | None = Field(None, description="By default the shadow there is, to change its rate.")
    rate: float = Field(ge=0, le=1, description="Of the requests, 0 to 1; 0 ends it.")


def moment(milliseconds: int) -> datetime:
    """A time of the tables as a time."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
