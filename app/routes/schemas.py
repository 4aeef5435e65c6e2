"""The service's own resources as JSON: what `/openapi.json` promises, and what a generated client is made from."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.access.keys import LONGEST_GROUP
from app.messages import Priority
from retrieval.documents import Document, Hit, Passage, SearchMode

MAX_TEXTS = 256
"""Texts in one request for embeddings."""

MAX_TEXT_CHARACTERS = 100_000

Fact = Annotated[str, Field(max_length=2_048)] | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | bool
"""A value of a document's metadata."""

MOST_NAME_CHARACTERS = 512
Name = Annotated[str, Field(min_length=1, max_length=MOST_NAME_CHARACTERS, pattern=r"^[^\x00-\x1f\x7f]+$")]
Key = Annotated[str, Field(min_length=1, max_length=128)]
EmbeddedText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARACTERS)]


class Wire(BaseModel):
    """What every body shares: nothing unknown, nothing taken for what it is not, no number that JSON has not."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ErrorBody(BaseModel):
    """What went wrong, in words that name the field and the fix."""

    message: str
    type: str
    code: str
    param: str | None = None
    request_id: str | None = None


class ErrorEnvelope(BaseModel):
    """OpenAI's error envelope; every error of every route has this form."""

    error: ErrorBody


GROUPS_MEANING = (
    "Who of the tenant sees it: who is in one of these groups; an empty list is everybody. "
    "By default those who saw what it replaces, and for a new document everybody."
)
Group = Annotated[str, Field(min_length=1, max_length=LONGEST_GROUP, pattern=r"\S")]
Groups = Annotated[list[Group], Field(max_length=32, description=GROUPS_MEANING)]


class DocumentObject(BaseModel):
    """A document in the collection."""

    id: str
    object: Literal["document"] = "document"
    name: str
    title: str
    version: str = Field(description="SHA-256 of the uploaded bytes.")
    media_type: str
    size_bytes: int
    characters: int
    pages: int
    passages: int
    index_version: str
    metadata: dict[str, Any]
    source: str = Field(description="What it is synchronised with; empty for what was added by itself.")
    groups: list[str] = Field(description="Who of the tenant sees it; empty: everybody.")
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, document: Document) -> "DocumentObject":
        """The document as it is shown."""
        return cls(
            id=document.id,
            name=document.name,
            title=document.title,
            version=document.version,
            media_type=document.media_type,
            size_bytes=document.size_bytes,
            characters=document.length,
            pages=document.pages,
            passages=document.passages,
            index_version=document.index_version,
            metadata=document.metadata,
            source=document.source,
            groups=list(document.groups),
            created_at=document.created_at,
            updated_at=document.updated_at,
        )


class IngestedObject(BaseModel):
    """What an upload did."""

    document: DocumentObject
    outcome: Literal["created", "unchanged", "replaced"]
    embedded_passages: int = Field(description="Passages that had to be embedded; 0 when nothing changed.")
    job: str = Field(description="The job that did it.")


class DocumentList(BaseModel):
    """One page of documents; `next` is the `after` of the next one."""

    object: Literal["list"] = "list"
    data: list[DocumentObject]
    next: str | None = None


class Deleted(BaseModel):
    """Something that is gone."""

    id: str
    object: Literal["document.deleted"] = "document.deleted"
    deleted: bool = True


class PassageObject(BaseModel):
    """A passage: `text` is exactly the document's source text from `start` to `end`."""

    id: str
    document_id: str
    document_version: str
    document_name: str
    title: str
    n: int
    heading_path: list[str]
    page: int | None = None
    start: int
    end: int
    text: str

    @classmethod
    def of(cls, passage: Passage) -> "PassageObject":
        """The passage as it is shown."""
        return cls(
            id=passage.id,
            document_id=passage.document_id,
            document_version=passage.document_version,
            document_name=passage.document_name,
            title=passage.document_title,
            n=passage.n,
            heading_path=list(passage.heading_path),
            page=passage.page,
            start=passage.start,
            end=passage.end,
            text=passage.text,
        )


class PassageList(BaseModel):
    """All passages of a document, in order."""

    object: Literal["list"] = "list"
    data: list[PassageObject]


class SourceObject(BaseModel):
    """The text that a document's offsets count in."""

    document_id: str
    text: str


class SearchRequest(Wire):
    """A question to the index."""

    query: str = Field(min_length=1, max_length=8_192)
    top_k: int = Field(5, ge=1, le=100)
    mode: SearchMode = "hybrid"
    per_document: int | None = Field(None, ge=1, le=100, description="So many passages of one document at most.")
    mmr: float | None = Field(
        None, ge=0, le=1, description="Take passages that are unlike each other: 1 by relevance alone, 0 not by it."
    )
    filter: dict[Key, Fact | Annotated[list[Fact], Field(min_length=1, max_length=100)]] | None = Field(
        None, max_length=32, description="Metadata that must be equal; a list of values means any of them."
    )


class HitObject(BaseModel):
    """A passage that was found, with the rank and the score each leg gave it (null where the leg missed it)."""

    passage: PassageObject
    score: float
    dense_rank: int | None
    dense_score: float | None
    sparse_rank: int | None
    sparse_score: float | None
    rerank_score: float | None = Field(
        description="What the reranker thought of it, 0 to 1; null where none is set up."
    )
    url: str = Field(description="Opens the passage without a key.")

    @classmethod
    def of(cls, hit: Hit, url: str) -> "HitObject":
        """The hit as it is shown."""
        return cls(
            passage=PassageObject.of(hit.passage),
            score=hit.score,
            dense_rank=hit.dense_rank,
            dense_score=hit.dense_score,
            sparse_rank=hit.sparse_rank,
            sparse_score=hit.sparse_score,
            rerank_score=hit.rerank_score,
            url=url,
        )


class SearchResponse(BaseModel):
    """Hits, best first."""

    object: Literal["search.result"] = "search.result"
    hits: list[HitObject]
    index_version: str
    embed_seconds: float
    search_seconds: float
    rerank_seconds: float | None = Field(None, description="What the reranker took; null where none is set up.")
    reranking_model: str | None = Field(None, description="What ordered the hits; null where it did not answer, too.")


class ModelObject(BaseModel):
    """A release, as OpenAI lists models; `id` is the name to ask for."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "hallmark"
    release: str = Field(description="`name@number`: the release the name stands for now.")
    digest: str = Field(description="SHA-256 of the release's canonical JSON.")
    base_model: str | None = None
    adapter: str | None = None
    prompt_version: str
    retrieval: str


class ModelList(BaseModel):
    """What can be asked for."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class EmbeddingRequest(Wire):
    """OpenAI's request for embeddings; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1, max_length=256)
    input: EmbeddedText | Annotated[list[EmbeddedText], Field(min_length=1, max_length=MAX_TEXTS)] = Field(
        description="One text or several; token ids are not read."
    )
    encoding_format: Literal["float", "base64"] | None = Field("float", description="Null is `float`.")
    dimensions: int | None = Field(None, ge=1, le=65_536, description="If given, what the model makes.")
    user: str | None = None


class EmbeddingObject(BaseModel):
    """One vector, L2-normalised; base64 is of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens embedded."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


class PredictionObject(BaseModel):
    """A prediction on record: who asked what of which release, what it rested on, what came of it.

    With `store` false, all that was said by the caller, the engine or a document is left out; `metadata` stays.
    """

    id: str
    created_at: datetime
    tenant: str
    outcome: Literal["open", "finished", "failed", "cancelled", "interrupted"]
    key_id: str | None = None
    user: str | None = None
    conversation: str | None = None
    model: str | None = Field(None, description="The name the caller asked for.")
    release_name: str | None = Field(None, description="`name@number`.")
    release_digest: str | None = None
    assignment: Literal["stable", "canary", "pinned", "shadow", "fallback", "extractive", "chore"] | None = Field(
        None,
        description="Why that release: by its rollout, by the caller's pin, unseen beside another, or, while an engine "
        "was away, in place of another or by its passages alone. A `chore` is what a chat page asks for itself.",
    )
    fallback: str | None = Field(
        None, description="What answered because an engine could not: a release by its label, or `extractive`."
    )
    shadow_of: str | None = Field(None, description="The prediction that was shown where this one was not.")
    base_model: str | None = None
    adapter: str | None = None
    prompt_version: str | None = None
    index_version: str | None = None
    retrieval_mode: str | None = None
    retrieval_outcome: str | None = None
    stream: bool
    store: bool
    finish_reason: str | None = None
    error_code: str | None = None
    verdict: str | None = None
    predicted_class: str | None = Field(None, description="The label that a release that classifies answered with.")
    valid: bool | None = Field(
        None,
        description="Whether the answer is one of the release's labels, or fits its schema; null for other releases, "
        "and where nothing was answered.",
    )
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    retrieve_seconds: float | None = Field(None, description="Finding passages, with what the engine is asked for it.")
    queue_seconds: float | None = Field(None, description="The wait for a place here, and then for the engine's first.")
    first_token_seconds: float | None = None
    engine_seconds: float | None = None
    total_seconds: float | None = None
    trace_id: str | None = None
    kept: Literal["full", "redacted", "metadata", "erased", "expired", "unreadable"] | None = Field(
        None,
        description="How much of the content is on record; null where all of it is. `erased`: it was, and was erased. "
        "`expired`: its term is over. `unreadable`: it is sealed, and this service has no key that opens it.",
    )
    metadata: dict[str, Any] | None = None
    passages: list[dict[str, Any]] | None = None
    citations: list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    request: Any = Field(None, description="The request's body as it came.")
    messages: list[Any] | None = Field(
        None, description="The prompt as the engine got it, where passages were put into it."
    )
    question: str | None = None
    answer: str | None = None
    features: list[dict[str, Any]] | None = Field(
        None, description="What the release's features were, as they stood in the prompt, and how old."
    )


class PredictionList(BaseModel):
    """One page of predictions, newest first; `next` is the `before` of the next one."""

    object: Literal["list"] = "list"
    data: list[PredictionObject]
    next: str | None = None


class PredictionCount(BaseModel):
    """How many predictions there are."""

    object: Literal["prediction.count"] = "prediction.count"
    count: int


class Health(BaseModel):
    """Whether the process is alive, or ready; `checks` says what is not."""

    status: Literal["ok", "unready"]
    checks: dict[str, str] = Field(default_factory=dict)


class IdentityObject(BaseModel):
    """The caller as their key proves."""

    key_id: str
    name: str
    tenant: str
    scopes: list[str]
    priority: Priority
    requests_per_minute: int | None = Field(description="None is no limit.")
    tokens_per_minute: int | None = Field(description="Of prompts and answers together; None is no limit.")
    groups: list[str] = Field(description="Whose documents it sees beside those that are for all of the tenant.")
    user: str | None = Field(description="For whom it acts, by a token that was verified; null is for itself.")
