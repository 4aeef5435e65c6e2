"""How documents are taken in, kept and found."""

from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, StringConstraints, model_validator

from app.settings.forms import HttpUrl, Reachable, Section


class QdrantSettings(Section):
    """The vector index."""

    url: HttpUrl | None = Field(None, description="A Qdrant server; unset uses the index inside the process.")
    api_key: SecretStr | None = None
    collection: str = Field("hallmark", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    search_timeout_seconds: float = Field(2.0, gt=0, description="Longest wait for a search.")


class RetrievalSettings(Section):
    """How documents are read, split and found."""

    embedding_model: str = Field("all-minilm-l6-v2", description="The packaged model, a hub id, or a path.")
    embedding_backend: Literal["torch", "onnx-int8"] = Field("torch", description="`onnx-int8`: in integers, faster.")
    embedding_threads: int = Field(1, ge=1)
    embedding_cache: int = Field(4096, ge=0, description="Vectors of questions kept in memory; 0 keeps none.")
    embedding_url: HttpUrl | None = Field(None, description="A server that embeds, in place of this process.")
    embedding_dialect: Literal["tei", "openai"] = "tei"
    embedding_token: SecretStr | None = Field(None, description="Bearer token that server wants.")
    embedding_timeout_seconds: float = Field(5.0, gt=0, description="Longest wait for it, with all tries.")
    embedding_retries: int = Field(2, ge=0, le=10, description="Further tries while it is busy or does not answer.")
    embedding_fallback: Literal["fail", "words"] = Field("fail", description="`words`: without it, search by BM25.")
    next_embedding_model: str | None = Field(None, description="What the next index version is embedded by.")
    next_embedding_url: HttpUrl | None = Field(None, description="A server that embeds it.")
    next_embedding_dialect: Literal["tei", "openai"] = "tei"
    next_embedding_token: SecretStr | None = Field(None, description="Bearer token that server wants.")
    next_passage_tokens: int | None = Field(None, ge=32, le=512, description="Size its passages are split to.")
    rerank_url: HttpUrl | None = Field(None, description="A TEI server that orders anew what the search found.")
    rerank_token: SecretStr | None = Field(None, description="Bearer token it wants.")
    rerank_model: str | None = Field(None, description="A CrossEncoder by hub id or folder, run in this process.")
    rerank_depth: int = Field(20, ge=1, le=100, description="Passages it is shown for a question.")
    rerank_timeout_seconds: float = Field(2.0, gt=0, description="Longest wait for the server that reranks.")
    fusion: Literal["dbsf", "rrf"] = Field("dbsf", description="How the dense and the BM25 ranking become one.")
    passage_tokens: int = Field(200, ge=32, le=512, description="Size a passage is split to, in embedder tokens.")
    parser_processes: int = Field(1, ge=1)
    link_hosts: tuple[Annotated[str, StringConstraints(pattern=r"^(\*|\.?[a-z0-9-]+(\.[a-z0-9-]+)*)$")], ...] = Field(
        (), description="Hosts that links and images in answers from documents may lead to; `.corp` is all below it."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.embedding_dialect == "openai" and self.embedding_url and self.embedding_model == "all-minilm-l6-v2":
            raise ValueError("embedding_model: name the model that the server at embedding_url serves")
        if self.next_embedding_dialect == "openai" and self.next_embedding_url and not self.next_embedding_model:
            raise ValueError("next_embedding_model: name the model that the server at next_embedding_url serves")
        if self.embedding_url and self.embedding_backend != "torch":
            raise ValueError("embedding_backend: the server at embedding_url computes as it does: unset one")
        if self.rerank_url and self.rerank_model:
            raise ValueError("rerank_url and rerank_model exclude each other: unset one")
        return self


class IngestionSettings(Section):
    """How documents are taken in."""

    workers: int = Field(3, ge=1, le=64, description="Documents worked on at once.")
    max_waiting_documents: int = Field(1_000, ge=1, description="Uploads that may wait; one more gets 429.")
    max_waiting_bytes: int = Field(2_000_000_000, ge=1, description="Their size together, on the disk of `data_dir`.")
    max_attempts: int = Field(
        5, ge=1, description="Times that a document is begun, where the index is away or the service ends meanwhile."
    )
    keep_jobs: int = Field(1_000, ge=1, description="A tenant's jobs that are kept; failed documents stay listed.")
    embedding_threads: int | None = Field(
        None, ge=0, description="Of the process that embeds what is ingested; 0 embeds in the serving process."
    )
    embedding_idle_seconds: float = Field(60.0, gt=0, description="With nothing to embed, that process then ends.")
    fetch_urls: bool = Field(False, description="Let callers give a URL in place of a file: the service fetches it.")
    fetch_allowed: Reachable = Field(
        (), description="Hosts and networks beside the public web that may be fetched from: `wiki.corp`, `10.1.0.0/16`."
    )
    fetch_seconds: float = Field(30.0, gt=0, le=600, description="Longest time for one URL, its redirects included.")
