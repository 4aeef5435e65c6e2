"""Items, reviews and figures of the review queue as JSON."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.review import Finding, Item, ItemState, Leased, Policy, SkipReason, messages_of
from app.routes.feedback_schemas import (
    MAX_CORRECTION_CHARACTERS,
    TEXT,
    Author,
    Comment,
    PassageId,
)
from app.routes.registry_schemas import moment
from app.routes.review_queue_schemas import ClassName, Shown, Time
from app.routes.schemas import Wire

Reviewer = Annotated[Author, Field(description="For whom the application speaks; by default for itself.")]


class ReviewObject(Shown):
    """A reviewer's turn at an item."""

    id: str
    object: Literal["review"] = "review"
    item_id: str
    reviewer: str
    state: Literal["leased", "expired", "returned", "skipped", "done"] = Field(
        description="A lease whose time is over reads `leased` until its reviewer asks again."
    )
    leased_at: Time
    expires_at: Time
    finished_at: Time | None = None
    reason: str | None = Field(None, description="Why it was skipped.")
    class_name: str | None = Field(None, serialization_alias="class")
    label_id: str | None = Field(None, description="What was found, at `/v1/labels/{id}`.")


class ItemObject(Shown):
    """A prediction in a queue."""

    id: str
    object: Literal["review.item"] = "review.item"
    prediction_id: str
    release_name: str | None = None
    policy: Policy = Field(description="Why it is there; of several policies the one that made it likeliest.")
    probability: float | None = Field(
        None, description="How likely chance was to take it; null if it was put there on purpose."
    )
    state: ItemState
    wanted: int = Field(description="How many reviewers it gets.")
    done: int
    skipped: int
    gold_class: str | None = None
    created_at: Time


class ItemList(BaseModel):
    """One page of items, newest first; `next` is the `before` of the next one."""

    object: Literal["list"] = "list"
    data: list[ItemObject]
    next: str | None = None


class ItemDetail(ItemObject):
    """An item and its reviews, the oldest first."""

    reviews: list[ReviewObject]

    @classmethod
    def told(cls, item: Item, reviews: list[Any]) -> "ItemDetail":
        """The item as it is shown with its reviews."""
        shown = ItemObject.model_validate(item)
        return cls.model_construct(**dict(shown), reviews=[ReviewObject.model_validate(each) for each in reviews])


class LeaseRequest(Wire):
    """A request for items to review."""

    reviewer: Reviewer | None = None
    count: int = Field(1, ge=1, le=20, description="Items to hold in all, with those that are held already.")


class LeasedObject(BaseModel):
    """An item in a reviewer's hands: what was asked and answered, and nothing of why it is here."""

    review_id: str
    object: Literal["review.lease"] = "review.lease"
    expires_at: datetime
    question: str
    classes: list[str]
    prediction_id: str
    messages: list[dict[str, Any]] = Field(description="The conversation that is answered.")
    answer: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    citations: list[dict[str, Any]] | None = None
    passages: list[dict[str, Any]] | None = Field(None, description="The passages that were found.")

    @classmethod
    def of(cls, leased: Leased) -> "LeasedObject":
        """The item as its reviewer sees it."""
        prediction, rules = leased.prediction, leased.queue.rules
        return cls(
            review_id=leased.review.id,
            expires_at=moment(leased.review.expires_at),
            question=rules.question,
            classes=list(rules.classes),
            prediction_id=prediction.id,
            messages=messages_of(prediction),
            answer=prediction.answer,
            tool_calls=prediction.tool_calls,
            citations=prediction.citations,
            passages=prediction.passages,
        )


class LeaseList(BaseModel):
    """The items that a reviewer holds, as far as they were asked for."""

    object: Literal["list"] = "list"
    data: list[LeasedObject]


class FindingRequest(Wire):
    """What a reviewer finds: a class where the queue has some, else at least an answer or passages."""

    reviewer: Reviewer | None = None
    class_name: ClassName | None = Field(None, alias="class")
    answer: Annotated[str, Field(min_length=1, max_length=MAX_CORRECTION_CHARACTERS, pattern=TEXT)] | None = Field(
        None, description="The right answer."
    )
    passages: Annotated[list[PassageId], Field(max_length=200)] | None = Field(
        None, description="The ids of all relevant passages; an empty list says that none is."
    )
    comment: Comment | None = None

    model_config = ConfigDict(json_schema_extra={"examples": [{"reviewer": "anna", "class": "wrong"}]})

    def finding(self) -> Finding:
        """What the queue takes."""
        return Finding(class_name=self.class_name, answer=self.answer, passages=self.passages, comment=self.comment)


class SkipRequest(Wire):
    """Leave an item to others."""

    reviewer: Reviewer | None = None
    reason: SkipReason = "other"


class RenewRequest(Wire):
    """Begin the time of a lease anew."""

    reviewer: Reviewer | None = None


class AgreementObject(Shown):
    """A coefficient: 1 is perfect agreement, 0 what chance gives. Null where there is nothing to compare."""

    value: float | None
    low: float | None = Field(description="95 % interval by bootstrap over the items; null below 20 of them.")
    high: float | None
    items: int


class PairObject(Shown):
    """Cohen's kappa of two reviewers."""

    reviewers: tuple[str, str]
    kappa: AgreementObject
    share: float = Field(description="Of the items on which both chose the same.")


class QueueAgreementObject(Shown):
    """How far the reviewers of a queue agree on classes."""

    object: Literal["review.agreement"] = "review.agreement"
    alpha: AgreementObject = Field(description="Krippendorff's nominal alpha over all reviewers.")
    pairs: list[PairObject]


class EstimateObject(Shown):
    """A share with its 95 % interval."""

    share: float
    low: float
    high: float
    items: int
    effective_items: float = Field(description="How many equally likely items would tell as much.")
    unweighted: float = Field(description="The plain mean over the items: what the queue is like, not all answers.")


class ShareObject(Shown):
    """How often a class is right."""

    class_name: str = Field(serialization_alias="class")
    release: str | None = Field(description="Of this release's answers; null over all that the queue considers.")
    estimate: EstimateObject


class ShareList(BaseModel):
    """Estimated shares, weighted by one over each item's probability (Hajek)."""

    object: Literal["list"] = "list"
    data: list[ShareObject]


class ImportResult(Shown):
    """What an import did, in annotations."""

    object: Literal["review.import"] = "review.import"
    done: int
    skipped: int
    unchanged: int = Field(description="Known already, or older than what is known.")
