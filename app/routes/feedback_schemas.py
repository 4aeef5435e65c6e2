"""Feedback and labels as JSON."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from app.feedback import Counts, Feedback, FeedbackSource, Given, Label, LabelSource, Revision, Stated, Written
from app.routes.registry_schemas import moment
from app.routes.schemas import Fact, Key, Wire

MAX_COMMENT_CHARACTERS = 10_000
MAX_CORRECTION_CHARACTERS = 100_000
FUTURE_SECONDS = 300
"""How far ahead of ours a caller's clock may be."""

ONE_LINE = r"^[^\x00-\x1f\x7f]+$"
TEXT = r"^[^\x00]*$"


def read_moment(value: Any) -> Any:
    """Read RFC 3339; pydantic itself would also take a number for a time."""
    if isinstance(value, str) and value[4:5] == "-" and "t" in value[:11].lower():
        return datetime.fromisoformat(value.upper())
    raise ValueError("give a date and time with its zone, as in 2026-11-24T12:00:00Z")


def _sensible(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("the time has no zone: end it with Z, or with an offset")
    if not _EARLIEST <= value <= datetime.now(UTC) + timedelta(seconds=FUTURE_SECONDS):
        raise ValueError("the time lies before 1970 or in the future")
    return value


_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)

Moment = Annotated[datetime, BeforeValidator(read_moment), AfterValidator(_sensible)]
PredictionId = Annotated[UUID, Field(strict=False, description="Need not be on record yet.")]
Author = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        pattern=ONE_LINE,
        description="For whom the application speaks, as it knows them; by default for itself. "
        "Only the same author, or a key with the scope `admin`, may change or withdraw it.",
    ),
]
Category = Annotated[str, Field(min_length=1, max_length=128, pattern=ONE_LINE)]
Conversation = Annotated[str, Field(min_length=1, max_length=512, pattern=TEXT)]
IdempotencyKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="The same key with the same content is the same call; with another content it is refused.",
    ),
]
SaidAt = Annotated[
    Moment,
    Field(
        description="When it was said, if that is not now. The latest word counts, in whatever order calls arrive; "
        "the same content of the same moment is the same call."
    ),
]
Comment = Annotated[str, Field(max_length=MAX_COMMENT_CHARACTERS, pattern=TEXT)]
Metadata = Annotated[dict[Key, Fact], Field(max_length=32)]
Score = Annotated[float, Field(ge=-1e15, le=1e15)]
PassageId = Annotated[str, Field(min_length=1, max_length=256, pattern=ONE_LINE)]


class Opinion(Wire):
    """What can be said of an answer."""

    rating: bool | Score | None = Field(
        None, description="Thumb up or down as a boolean, or a number on a scale of your own."
    )
    comment: Comment | None = None
    correction: Annotated[str, Field(max_length=MAX_CORRECTION_CHARACTERS, pattern=TEXT)] | None = Field(
        None, description="What the answer should have been."
    )
    metadata: Metadata | None = Field(None, description="Facts of your own; returned as they came.")


class FeedbackRequest(Opinion):
    """Feedback about a prediction or a conversation."""

    prediction_id: PredictionId | None = None
    conversation: Conversation | None = Field(None, description="As in the header `x-conversation-id` of its chats.")
    source: FeedbackSource = Field("end_user", description="What kind of author says it.")
    author: Author | None = None
    category: Category | None = Field(
        None, description="What is rated, such as `helpful`; an author has one feedback for each category."
    )
    withdrawn: bool = Field(
        False, description="Take back what was said before, without knowing its id; says nothing else."
    )
    said_at: SaidAt | None = None
    idempotency_key: IdempotencyKey | None = Field(None, description="Can also be the header `Idempotency-Key`.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prediction_id": "019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55",
                    "author": "anna",
                    "rating": False,
                    "comment": "The notice period is four weeks.",
                    "correction": "The notice period is four weeks to the end of a month [1].",
                },
                {"conversation": "chat-17", "category": "helpful", "rating": 4},
            ]
        }
    )

    def given(self, idempotency_key: str | None) -> Given:
        """What the store takes."""
        return Given(
            prediction_id=str(self.prediction_id) if self.prediction_id else None,
            conversation=self.conversation,
            source=self.source,
            category=self.category,
            rating=self.rating,
            comment=self.comment,
            correction=self.correction,
            metadata=self.metadata,
            withdrawn=self.withdrawn,
            said_at=milliseconds(self.said_at),
            idempotency_key=idempotency_key,
        )


class FeedbackChange(Opinion):
    """Change the fields that are sent; null takes one back."""

    author: Author | None = None
    said_at: SaidAt | None = None

    model_config = ConfigDict(json_schema_extra={"examples": [{"author": "anna", "rating": True, "comment": None}]})


class FeedbackRevision(BaseModel):
    """One call in the history of a feedback."""

    revision: int
    at: datetime = Field(description="When it arrived.")
    said_at: datetime
    key_id: str = Field(description="The API key that sent it.")
    said: dict[str, Any] = Field(description="The fields it set.")

    @classmethod
    def of(cls, revision: Revision) -> "FeedbackRevision":
        """The call as it is shown."""
        return cls(
            revision=revision.revision,
            at=moment(revision.at),
            said_at=moment(revision.said_at),
            key_id=revision.key_id,
            said=revision.said,
        )


class FeedbackObject(BaseModel):
    """Feedback as it holds now."""

    id: str
    object: Literal["feedback"] = "feedback"
    revision: int = Field(description="Rises by one with every call about it.")
    prediction_id: str | None = None
    conversation: str | None = None
    prediction: Literal["stored", "not_yet"] | None = Field(
        None, description="In the answer to a call about a prediction: whether that is on record yet."
    )
    source: FeedbackSource
    author: str = Field(description="As the caller named it, or `key:` and the id of the API key.")
    category: str | None = None
    rating: bool | float | None = None
    comment: str | None = None
    correction: str | None = None
    metadata: dict[str, Any] | None = None
    withdrawn: bool
    said_at: datetime = Field(description="When the latest word of it was said.")
    updated_at: datetime = Field(description="When this revision arrived.")

    @classmethod
    def of(cls, feedback: Feedback, prediction: Literal["stored", "not_yet"] | None = None) -> "FeedbackObject":
        """The feedback as it is shown."""
        return cls(**_shown(feedback), prediction=prediction)

    @classmethod
    def written(cls, written: Written) -> "FeedbackObject":
        """The answer to a call."""
        feedback = Feedback.of(written.row)
        about = None if feedback.prediction_id is None else _prediction(written)
        return cls.of(feedback, about)


class FeedbackDetail(FeedbackObject):
    """Feedback with every call about it, in the order of arrival."""

    history: list[FeedbackRevision]

    @classmethod
    def told(cls, feedback: Feedback, history: list[Revision]) -> "FeedbackDetail":
        """The feedback as it is shown with its history."""
        return cls(**_shown(feedback), history=[FeedbackRevision.of(each) for each in history])


class FeedbackList(BaseModel):
    """One page of feedback, newest first; `next` is the `before` of the next one."""

    object: Literal["list"] = "list"
    data: list[FeedbackObject]
    next: str | None = None


class LabelRequest(Wire):
    """What is true of an answer: at least one of class, answer and passages."""

    prediction_id: PredictionId
    source: Literal["reviewer", "application"] = Field("reviewer", description="What kind of author states it.")
    author: Author | None = None
    class_name: Annotated[str, Field(min_length=1, max_length=256, pattern=ONE_LINE)] | None = Field(
        None, alias="class", description="The right class, of a release that classifies."
    )
    answer: Annotated[str, Field(min_length=1, max_length=MAX_CORRECTION_CHARACTERS, pattern=TEXT)] | None = Field(
        None, description="The right answer."
    )
    passages: Annotated[list[PassageId], Field(max_length=200)] | None = Field(
        None, description="The ids of all relevant passages; an empty list says that none is."
    )
    comment: Comment | None = None
    policy: Annotated[str, Field(min_length=1, max_length=128, pattern=ONE_LINE)] | None = Field(
        None, description="If predictions are sampled for labelling: the name of the way."
    )
    sampling_probability: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="How likely that way was to choose this prediction."
    )
    withdrawn: bool = Field(
        False, description="Take back what was stated before, without knowing its id; states nothing else."
    )
    said_at: SaidAt | None = None
    idempotency_key: IdempotencyKey | None = Field(None, description="Can also be the header `Idempotency-Key`.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prediction_id": "019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55",
                    "author": "ben",
                    "answer": "Four weeks to the end of a month.",
                    "passages": ["contract.md:7"],
                },
                {"prediction_id": "019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55", "source": "application", "class": "refund"},
            ]
        }
    )

    def stated(self, idempotency_key: str | None) -> Stated:
        """What the store takes."""
        return Stated(
            prediction_id=str(self.prediction_id),
            source=self.source,
            class_name=self.class_name,
            answer=self.answer,
            passages=self.passages,
            comment=self.comment,
            policy=self.policy,
            sampling_probability=self.sampling_probability,
            withdrawn=self.withdrawn,
            said_at=milliseconds(self.said_at),
            idempotency_key=idempotency_key,
        )


class LabelObject(BaseModel):
    """A label as it holds now."""

    id: str
    object: Literal["label"] = "label"
    revision: int = Field(description="Rises by one with every call about it.")
    prediction_id: str
    prediction: Literal["stored", "not_yet"] | None = Field(
        None, description="In the answer to a call: whether the prediction is on record yet."
    )
    source: LabelSource
    author: str = Field(description="As the caller named it, or `key:` and the id of the API key.")
    class_name: str | None = Field(None, alias="class", description="The right class.")
    answer: str | None = None
    passages: list[str] | None = None
    comment: str | None = None
    policy: str | None = None
    sampling_probability: float | None = None
    withdrawn: bool
    said_at: datetime = Field(description="When the latest word of it was said.")
    updated_at: datetime = Field(description="When this revision arrived.")

    @classmethod
    def of(cls, label: Label, prediction: Literal["stored", "not_yet"] | None = None) -> "LabelObject":
        """The label as it is shown."""
        return cls(**_shown(label), prediction=prediction)

    @classmethod
    def written(cls, written: Written) -> "LabelObject":
        """The answer to a call."""
        return cls.of(Label.of(written.row), _prediction(written))


class LabelDetail(LabelObject):
    """A label with every call about it, in the order of arrival."""

    history: list[FeedbackRevision]

    @classmethod
    def told(cls, label: Label, history: list[Revision]) -> "LabelDetail":
        """The label as it is shown with its history."""
        return cls(**_shown(label), history=[FeedbackRevision.of(each) for each in history])


class LabelList(BaseModel):
    """One page of labels, newest first; `next` is the `before` of the next one."""

    object: Literal["list"] = "list"
    data: list[LabelObject]
    next: str | None = None


class FeedbackCounts(BaseModel):
    """How much feedback of one source and category holds now."""

    source: FeedbackSource
    category: str | None = None
    total: int
    positive: int = Field(description="Ratings that are true.")
    negative: int = Field(description="Ratings that are false.")
    numbers: int = Field(description="Ratings that are numbers.")
    mean: float | None = Field(None, description="Of the ratings that are numbers.")
    comments: int
    corrections: int

    @classmethod
    def of(cls, counts: Counts) -> "FeedbackCounts":
        """The counts as they are shown."""
        return cls(**{name: getattr(counts, name) for name in cls.model_fields})


class PredictionFeedback(BaseModel):
    """What is said of one prediction now, and what is true of it."""

    object: Literal["prediction.feedback"] = "prediction.feedback"
    prediction_id: str
    prediction: Literal["stored", "not_yet"] = Field(description="Whether the prediction is on record yet.")
    counts: list[FeedbackCounts]
    feedback: list[FeedbackObject] = Field(description="The newest; `/v1/feedback` has all of it.")
    labels: list[LabelObject] | None = Field(
        description="The newest; `/v1/labels` has all of them. Null if the key may not read labels."
    )


def milliseconds(value: datetime | None) -> int | None:
    """A time as the tables have it; one without a zone is UTC."""
    if value is None:
        return None
    return int((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp() * 1000)


def _prediction(written: Written) -> Literal["stored", "not_yet"]:
    return "stored" if written.is_stored else "not_yet"


def _shown(entry: Feedback | Label) -> dict[str, Any]:
    facts = {name: getattr(entry, name) for name in entry.__struct_fields__}
    for name in ("tenant", "key_id", "idempotency_key", "at"):
        del facts[name]
    if "class_name" in facts:
        facts["class"] = facts.pop("class_name")
    return facts | {"said_at": moment(entry.said_at), "updated_at": moment(entry.at)}
