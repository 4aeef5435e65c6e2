"""Index versions as JSON."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.routes.job_schemas import JobObject
from app.routes.schemas import Name, Wire
from retrieval.evaluation.sets import EvaluationSet, Question
from retrieval.jobs import Job
from retrieval.retriever import MAX_QUERY_CHARACTERS
from retrieval.versions import IndexVersion

MAX_QUESTIONS = 1_000


class MadeOf(BaseModel):
    """What an index version is made of; another of any of these is another version."""

    embedding_model: str
    dimension: int
    passage_tokens: int
    splitting_version: int
    sparse_model: str
    schema_version: int


class ComparedFigure(BaseModel):
    """A mean over the questions, with its 95 % interval, beside that of the live version."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    live: float | None


class Comparison(BaseModel):
    """How a version ranked a set of questions beside the version that was live."""

    live: str
    at: datetime
    questions: int
    figures: list[ComparedFigure]


class IndexObject(BaseModel):
    """An index version: one embedding model, splitting and schema."""

    id: str
    object: Literal["index"] = "index"
    state: Literal["building", "ready", "live", "retired", "dropped"]
    made_of: MadeOf
    documents: int = Field(description="Documents of all tenants that it has.")
    passages: int
    missing_documents: int = Field(description="Those that it lacks, or has not as they are by now.")
    trouble: str | None = Field(description="Why it does not go on at present.")
    comparison: Comparison | None
    created_at: datetime
    ready_at: datetime | None
    live_at: datetime | None
    retired_at: datetime | None

    @classmethod
    def of(cls, version: IndexVersion, trouble: str | None = None) -> "IndexObject":
        """The version as it is shown."""
        schema = version.schema
        return cls(
            id=version.id,
            state=version.state,
            made_of=MadeOf(**{name: getattr(schema, name) for name in MadeOf.model_fields}),
            documents=version.documents,
            passages=version.passages,
            missing_documents=version.missing_documents,
            trouble=trouble,
            comparison=Comparison(**version.comparison) if version.comparison else None,
            created_at=version.created_at,
            ready_at=version.ready_at,
            live_at=version.live_at,
            retired_at=version.retired_at,
        )


class IndexList(BaseModel):
    """All index versions, oldest first."""

    object: Literal["list"] = "list"
    data: list[IndexObject]


class BuildObject(BaseModel):
    """An index version that is being built, and the job that tells how far it is."""

    object: Literal["index.build"] = "index.build"
    index: IndexObject
    job: JobObject

    @classmethod
    def of(cls, version: IndexVersion, job: Job) -> "BuildObject":
        """Both as they are shown."""
        return cls(index=IndexObject.of(version), job=JobObject.of(job))


class SwitchRequest(Wire):
    """Which version is to answer is in the path."""

    uncompared: bool = Field(False, description="Say that there is nothing to compare it by.")


class JudgedQuestion(Wire):
    """A question, and the documents that answer it by name, with how relevant each is."""

    question: str = Field(min_length=1, max_length=MAX_QUERY_CHARACTERS)
    documents: dict[Name, Annotated[int, Field(ge=1, le=100)]] = Field(min_length=1, max_length=100)


class CompareRequest(Wire):
    """Questions of which it is known what answers them."""

    questions: list[JudgedQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)
    k: int = Field(10, ge=1, le=50, description="Documents of a ranking that count.")

    def judged(self) -> EvaluationSet:
        """The questions as a set."""
        asked = (Question(str(n), each.question, each.documents) for n, each in enumerate(self.questions, 1))
        return EvaluationSet("questions", tuple(asked))


class DroppedIndex(BaseModel):
    """A version that is gone, with its points."""

    id: str
    object: Literal["index"] = "index"
    deleted: Literal[True] = True
