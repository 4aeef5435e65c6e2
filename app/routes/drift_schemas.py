"""Drift as JSON: the reference of each release, the windows that were compared with it, and what is wrong."""

import binascii
from base64 import b64decode
from datetime import datetime
from hashlib import blake2b
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from app.drift import Alarm, Followed, Inputs, Kind, Output, Reference, Window
from app.errors import InvalidRequest
from app.predictions.embeddings import pack
from app.releases import LABEL_PATTERN
from app.routes.feedback_schemas import Moment
from app.routes.registry_schemas import moment
from app.routes.schemas import Wire

MAX_QUESTIONS = 20_000
MAX_DIMENSION = 8_192

Vector = Annotated[str, Field(min_length=4, max_length=MAX_DIMENSION * 3)]


class QuestionVectors(Wire):
    """Questions of a reference as vectors: their words stay where they are."""

    name: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="What they are, for the record.")
    model: Annotated[str, Field(min_length=1, max_length=512)] = Field(
        description="The embedding model's id, as `GET /v1/models` names it: only its vectors can be compared."
    )
    vectors: list[Vector] = Field(
        min_length=1,
        max_length=MAX_QUESTIONS,
        description="Each the base64 of float16 numbers, little-endian, all of one length.",
    )
    sessions: list[Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=MAX_QUESTIONS, description="What belongs together; by default each is a session of its own."
    )

    def packed(self) -> list[tuple[bytes, bytes]]:
        """The digest of each one's session, and its vector as it is kept; raises InvalidRequest."""
        sessions = self.sessions or [str(number) for number in range(len(self.vectors))]
        if len(sessions) != len(self.vectors):
            raise InvalidRequest("`questions.sessions` must be as many as the vectors.", param="questions.sessions")
        read = [_vector(text, number) for number, text in enumerate(self.vectors)]
        if len({len(vector) for vector in read}) > 1:
            raise InvalidRequest("`questions.vectors` must all be of one length.", param="questions.vectors")
        return [
            (blake2b(session.encode(errors="surrogatepass"), digest_size=8).digest(), pack(vector, self.model))
            for session, vector in zip(sessions, read, strict=True)
        ]


class ReferenceRequest(Wire):
    """Another reference of a release: from the traffic of a time, from a dataset, or from questions."""

    release: Annotated[str, Field(max_length=80, pattern=LABEL_PATTERN)] = Field(description="As `name@3`.")
    since: Moment | None = Field(None, description="Take what was asked of it then or later; with `until`.")
    until: Moment | None = Field(None, description="And before then.")
    dataset: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="Take the predictions that this registered dataset was made of, by its digest."
    )
    questions: QuestionVectors | None = None

    def kind(self) -> Literal["traffic", "dataset", "questions"]:
        """Where it is from; raises InvalidRequest unless that is one thing."""
        given: dict[Literal["traffic", "dataset", "questions"], bool] = {
            "traffic": self.since is not None and self.until is not None,
            "dataset": self.dataset is not None,
            "questions": self.questions is not None,
        }
        chosen = [kind for kind, is_given in given.items() if is_given]
        if len(chosen) != 1 or (self.since is None) != (self.until is None):
            raise InvalidRequest(
                "Give one of: `since` with `until`, `dataset`, `questions`.", param=None if chosen else "since"
            )
        return chosen[0]


class ReferenceObject(BaseModel):
    """What a release's windows are compared with; a version never changes."""

    version: int
    source: dict[str, Any] = Field(description="Where its questions are from.")
    sessions: int
    questions: int
    embedded: int = Field(description="Questions that have an embedding.")
    created_at: datetime
    created_by: str

    @classmethod
    def of(cls, reference: Reference) -> "ReferenceObject":
        """Show a reference."""
        return cls(
            version=reference.version,
            source=reference.source,
            sessions=reference.sessions,
            questions=reference.questions,
            embedded=reference.embedded,
            created_at=moment(reference.created_at),
            created_by=reference.created_by,
        )


class InputsObject(BaseModel):
    """What was found of a window's questions; severity is told by effects, not by p-values."""

    p_value: float = Field(description="The smaller of both after Holm's correction: compared with the level.")
    mmd_p: float
    novelty_p: float
    mmd2: float = Field(description="The squared maximum mean discrepancy; 0 is none.")
    novel_share: float = Field(description="The share of sessions with something new, beyond what is always so.")
    sessions: int = Field(description="Those whose questions had an embedding.")

    @classmethod
    def of(cls, inputs: Inputs) -> "InputsObject":
        """Show what was found."""
        return cls.model_validate(inputs, from_attributes=True)


class OutputObject(BaseModel):
    """What was found of one thing that answers show."""

    name: Literal["class", "refused", "finish_reason", "answer_tokens", "top_score", "support"]
    p_value: float = Field(description="After Holm's correction over all outputs of the window.")
    effect: float = Field(
        description="0 (none) to 1: the share of answers that changed category, or the largest difference between the "
        "distributions of a number."
    )
    at: str | float = Field(description="The category, or the number, at which the difference is largest.")
    reference: float = Field(description="The share there, or up to there, in the reference.")
    window: float = Field(description="The same in the window.")
    sessions: int

    @classmethod
    def of(cls, output: Output) -> "OutputObject":
        """Show what was found."""
        return cls.model_validate(output, from_attributes=True)


class ClusterObject(BaseModel):
    """New questions that are alike."""

    sessions: int
    examples: list[str] = Field(description="Predictions of the tenant's own; the most typical first.")


class WindowObject(BaseModel):
    """A window that was compared."""

    number: int
    reference: int = Field(description="The version of the reference it was compared with.")
    first_id: str
    last_id: str = Field(description="Its answers began with one prediction and ended with the other.")
    sessions: int
    questions: int
    level: float = Field(description="At or below it a p-value counts; it follows from the budget of false alarms.")
    inputs: InputsObject | None = Field(description="Null where too few questions had an embedding.")
    outputs: list[OutputObject]
    clusters: list[ClusterObject] = Field(description="What is new, the largest first.")
    judged_at: datetime

    @classmethod
    def of(cls, window: Window) -> "WindowObject":
        """Show a window."""
        return cls(
            number=window.number,
            reference=window.reference,
            first_id=window.first_id,
            last_id=window.last_id,
            sessions=window.sessions,
            questions=window.questions,
            level=window.level,
            inputs=InputsObject.of(window.inputs) if window.inputs else None,
            outputs=[OutputObject.of(each) for each in window.outputs],
            clusters=[ClusterObject(sessions=each.sessions, examples=list(each.examples)) for each in window.clusters],
            judged_at=moment(window.judged_at),
        )


class AlarmObject(BaseModel):
    """What is wrong: the last two windows were both at or below the level."""

    kind: Kind
    since: datetime
    window: int = Field(description="The window that raised it.")

    @classmethod
    def of(cls, alarm: Alarm) -> "AlarmObject":
        """Show an alarm."""
        return cls(kind=alarm.kind, since=moment(alarm.since), window=alarm.window)


class ReleaseDrift(BaseModel):
    """What is known of one release, for the key's tenant."""

    release: str
    alarms: list[AlarmObject]
    examples: list[str] = Field(description="Predictions of the largest cluster of new questions, during an alarm.")
    open_sessions: int = Field(description="In the window that is being filled, or the reference.")
    compared: int = Field(description="How many windows there have been; with none nothing is known.")
    reference: ReferenceObject | None
    windows: list[WindowObject] = Field(description="The last ones, the newest first.")

    @classmethod
    def of(cls, followed: Followed) -> "ReleaseDrift":
        """Show a release."""
        return cls(
            release=followed.release,
            alarms=[AlarmObject.of(each) for each in followed.alarms],
            examples=list(followed.state.examples),
            open_sessions=followed.open_sessions,
            compared=followed.state.windows,
            reference=ReferenceObject.of(followed.reference) if followed.reference else None,
            windows=[WindowObject.of(each) for each in followed.windows],
        )


class DriftReport(BaseModel):
    """Whether questions or answers have changed, release by release."""

    object: Literal["drift"] = "drift"
    data: list[ReleaseDrift]


def _vector(text: str, number: int) -> Any:
    """Read a vector; raises InvalidRequest."""
    param = f"questions.vectors[{number}]"
    try:
        content = b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InvalidRequest(f"`{param}` is no base64.", param=param) from error
    if len(content) % 2 or len(content) > 2 * MAX_DIMENSION:
        raise InvalidRequest(f"`{param}` must be float16 numbers, at most {MAX_DIMENSION}.", param=param)
    vector = np.frombuffer(content, "<f2").astype(np.float32)
    if not np.isfinite(vector).all() or not vector.any():
        raise InvalidRequest(f"`{param}` must be finite numbers, and not all of them zero.", param=param)
    return vector
