"""Review queues as JSON: their rules, what is added to them on purpose, how far they are."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from app.predictions import Where
from app.releases import LABEL_PATTERN, NAME_PATTERN
from app.review import ItemState, Negative, Policy, Progress, Rules, Threshold
from app.routes.feedback_schemas import (
    ONE_LINE,
    TEXT,
    Moment,
    PredictionId,
    read_moment,
)
from app.routes.registry_schemas import moment
from app.routes.schemas import Wire

Rate = Annotated[float, Field(ge=1e-6, le=1)]
ClassName = Annotated[str, Field(min_length=1, max_length=256, pattern=ONE_LINE)]
Fact = Annotated[str, Field(min_length=1, max_length=512, pattern=TEXT)]
Time = Annotated[datetime, BeforeValidator(lambda value: moment(value) if isinstance(value, int) else value)]
"""Milliseconds since 1970, shown as a date and time."""


class Shown(BaseModel):
    """What is shown of a part's own facts."""

    model_config = ConfigDict(from_attributes=True, populate_by_name=True)


class Slice(Wire):
    """Which predictions are meant; what is left out makes no difference."""

    release: Annotated[str, Field(max_length=80, pattern=f"{NAME_PATTERN}|{LABEL_PATTERN}")] | None = Field(
        None, description="A release as `name@3`, or all of a name."
    )
    model: Fact | None = Field(None, description="The name that was asked for.")
    adapter: Fact | None = None
    user: Fact | None = None
    verdict: Fact | None = Field(None, description="`abstained:nothing_relevant`, or `abstained` whatever the reason.")
    assignment: Literal["stable", "canary", "pinned", "shadow", "chore"] | None = Field(
        None, description="Shadows and chores are considered only if they are named here."
    )
    since: Moment | None = Field(None, description="Made then or later.")
    until: Annotated[AwareDatetime, BeforeValidator(read_moment)] | None = Field(None, description="Made before then.")

    def where(self) -> Where:
        """The slice as the history takes it."""
        return Where(**self.model_dump())


class ThresholdRule(Wire):
    """A rate for the predictions whose signal lies below a value."""

    rate: Rate
    below: float


class NegativeRule(Wire):
    """A rate for the predictions that somebody rated badly."""

    rate: Rate
    below: float | None = Field(None, description="Numbers below it are bad; without it only `false` is.")


class QueueRules(Wire):
    """How a queue is filled and reviewed. A prediction gets the highest rate of those that apply."""

    question: Annotated[str, Field(max_length=2_000, pattern=TEXT)] = Field(
        "", description="What reviewers are asked about each answer."
    )
    classes: Annotated[list[ClassName], Field(max_length=100)] = Field(
        default_factory=list, description="What reviewers choose from. Without any, they state an answer or passages."
    )
    where: Slice = Field(
        default_factory=Slice,
        description="Which predictions are considered; by default all from now on. Stays as it is once it is set.",
    )
    uniform: Rate = Field(0.05, description="How likely any prediction is taken.")
    low_support: ThresholdRule | None = Field(
        None, description="For answers of which the passages bear out less than `below`, from 0 to 1."
    )
    low_margin: ThresholdRule | None = Field(
        None, description="For answers whose nearest passage is ahead of the next by less than `below`, in cosine."
    )
    negative_feedback: NegativeRule | None = Field(None, description="For answers that somebody rated badly.")
    overlap: int = Field(1, ge=1, le=10, description="Reviewers that an item of the share for overlap gets.")
    overlap_share: float = Field(1.0, ge=0, le=1, description="The share of the items that get more than one.")
    gold_share: float = Field(0.0, ge=0, le=1, description="How often a reviewer is given an item of known class.")
    lease_seconds: int = Field(1_800, ge=10, le=604_800, description="After that an item goes to others.")
    capacity: int = Field(10_000, ge=1, le=100_000, description="Items that may wait before filling waits for room.")
    paused: bool = Field(False, description="Whether filling waits. Nothing is left out: it goes on where it was.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "question": "Is the answer right?",
                    "classes": ["right", "wrong", "cannot tell"],
                    "uniform": 0.02,
                    "low_support": {"rate": 0.2, "below": 0.6},
                    "negative_feedback": {"rate": 1.0},
                    "overlap": 2,
                    "overlap_share": 0.1,
                }
            ]
        }
    )

    def rules(self) -> Rules:
        """The rules as the queue keeps them."""
        given = self.model_dump(exclude={"where", "classes", "low_support", "low_margin", "negative_feedback"})
        low_support, low_margin, negative = self.low_support, self.low_margin, self.negative_feedback
        return Rules(
            **given,
            where=self.where.where(),
            classes=tuple(dict.fromkeys(self.classes)),
            low_support=Threshold(**low_support.model_dump()) if low_support else None,
            low_margin=Threshold(**low_margin.model_dump()) if low_margin else None,
            negative_feedback=Negative(**negative.model_dump()) if negative else None,
        )

    @classmethod
    def of(cls, rules: Rules) -> "QueueRules":
        """The rules as they are shown."""
        facts = msgspec.to_builtins(rules)
        facts["where"] = {name: value for name, value in facts["where"].items() if name in Slice.model_fields}
        return cls.model_validate_json(msgspec.json.encode(facts))


class QueueObject(Shown):
    """A review queue."""

    id: str
    object: Literal["review.queue"] = "review.queue"
    name: str
    revision: int = Field(description="Rises by one whenever its rules change.")
    rules: Annotated[QueueRules, BeforeValidator(QueueRules.of)]
    created_at: Time
    created_by: str
    updated_at: Time
    updated_by: str


class QueueList(BaseModel):
    """The queues of a tenant, by name."""

    object: Literal["list"] = "list"
    data: list[QueueObject]


class ItemCountObject(Shown):
    """Items of one policy and state."""

    policy: Policy
    state: ItemState
    items: int


class ReviewerObject(Shown):
    """What one reviewer did in a queue."""

    reviewer: str
    done: int
    skipped: int
    leased: int = Field(description="Leases that have not expired.")
    mean_seconds: float | None = Field(description="From lease to completion, of reviews that were not imported.")
    gold: int = Field(description="Items done whose class is known.")
    gold_right: int
    gold_share: float | None = Field(description="Of those, how many were found right.")
    gold_low: float | None = Field(description="Wilson's 95 % interval.")
    gold_high: float | None


class QueueDetail(QueueObject):
    """A review queue and how far it is."""

    items: list[ItemCountObject]
    reviewers: list[ReviewerObject]

    @classmethod
    def told(cls, progress: Progress) -> "QueueDetail":
        """The queue as it is shown with its progress."""
        queue = QueueObject.model_validate(progress.queue)
        return cls.model_construct(
            **dict(queue),
            items=[ItemCountObject.model_validate(each) for each in progress.items],
            reviewers=[ReviewerObject.model_validate(each) for each in progress.reviewers],
        )


class GoldRequest(Wire):
    """A prediction whose right class is known."""

    prediction_id: PredictionId
    class_name: ClassName = Field(alias="class")


class GoldObject(BaseModel):
    """An item of known class."""

    item_id: str
    object: Literal["review.gold"] = "review.gold"
    prediction_id: str
    class_name: str = Field(serialization_alias="class")


class BoostRequest(Wire):
    """A larger share of a slice, or of predictions that are named: because something was noticed there."""

    rate: Rate
    reason: Annotated[str, Field(min_length=1, max_length=2_000, pattern=TEXT)]
    where: Slice | None = Field(None, description="A slice of what the queue considers, up to now and from now on.")
    prediction_ids: Annotated[list[PredictionId], Field(min_length=1, max_length=1_000)] | None = Field(
        None, description="The members of a cluster, instead of a slice."
    )

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"rate": 0.3, "reason": "questions drift", "where": {"release": "hallmark@4"}},
                {"rate": 1.0, "reason": "cluster 7", "prediction_ids": ["019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55"]},
            ]
        }
    )


class BoostObject(Shown):
    """A larger share of a slice."""

    id: str
    object: Literal["review.boost"] = "review.boost"
    rate: float
    reason: str
    where: dict[str, Any] | None = Field(None, description="Null where predictions were named.")
    considered: int | None = Field(
        None, description="Where predictions were named, how many of them the queue considers: when it was just made."
    )
    created_at: Time
    created_by: str
    ended_at: Time | None = None

    @classmethod
    def of(cls, boost: Any, considered: int | None = None) -> "BoostObject":
        """The boost as it is shown."""
        where = msgspec.to_builtins(boost.where)
        facts = {
            name: getattr(boost, name) for name in ("id", "rate", "reason", "created_at", "created_by", "ended_at")
        }
        meant = where and {name: value for name, value in where.items() if value is not None}
        return cls(**facts, where=meant, considered=considered)


class BoostList(BaseModel):
    """The boosts of a queue, the newest first."""

    object: Literal["list"] = "list"
    data: list[BoostObject]
