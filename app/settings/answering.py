"""What answers, and what an answer may take."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from app.settings.forms import Dialect, EngineUrl, HttpUrl, RedisUrl, Section, dialect_and_url


class EngineSettings(Section):
    """The text-generation server that answers, or several that serve the same model."""

    url: HttpUrl | None = Field(None, description="Base URL of a running engine. Unset with `--local-engine`.")
    urls: tuple[EngineUrl, ...] = Field(
        (),
        description="Further ones that serve the same model: requests go to the one with the least to do. One of "
        "another dialect is written with it in front, such as `vllm+http://gpu-2:8000`.",
    )
    dialect: Dialect = Field("tgi", description="Which server it is: each differs in details the adapter knows.")
    token: SecretStr | None = Field(None, description="Bearer token the engine wants.")
    model: str | None = Field(
        None, description="Model name to send for the base model; by default what the engine reports."
    )
    adapters: tuple[str, ...] = Field(
        (), description="LoRA adapters the engine was started with: TGI serves its base model for an unknown one."
    )
    adapter_folder: Path | None = Field(
        None, description="Where adapters lie on this machine, each in a folder of its name: their digests are checked."
    )
    adapter_folder_on_engine: Path | None = Field(
        None, description="What the engine calls that folder, if it sees it elsewhere: adapters are loaded from there."
    )
    connect_timeout_seconds: float = Field(5.0, gt=0)
    first_token_timeout_seconds: float = Field(120.0, gt=0, description="Longest wait for the first byte of an answer.")
    between_tokens_timeout_seconds: float = Field(30.0, gt=0, description="Longest silence inside a stream.")
    max_connections: int = Field(256, ge=1, description="Requests in flight to the engine at once.")
    start_wait_seconds: float = Field(
        10.0, ge=0, description="Longest wait of a request for an engine that is starting; 0 refuses at once."
    )
    start_wait_requests: int = Field(64, ge=0, description="Requests that may wait for it at once.")
    warmup_requests: int = Field(
        1, ge=0, le=100, description="Requests sent to an engine that came up before callers' requests are."
    )

    @property
    def members(self) -> list[tuple[str, str]]:
        """Dialect and base URL of each engine, `url` first."""
        given = [*([self.url] if self.url else []), *self.urls]
        return [dialect_and_url(url, self.dialect) for url in dict.fromkeys(given)]


class EmbeddedSettings(Section):
    """The embedded engine: what `hallmark engine` serves and `hallmark serve --local-engine` supervises."""

    enabled: bool = Field(False, description="Start and supervise one: the same as `--local-engine`.")
    model: str = Field("smollm2-135m-instruct", description="The packaged model, a hub id, or a path.")
    threads: int | None = Field(None, ge=1, description="Torch threads; by default one less than the cores.")
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    max_queue: int = Field(64, ge=1, description="Requests that may wait; one more is refused with 429.")
    max_batch: int = Field(16, ge=1, description="Sequences decoded together.")
    max_adapters: int = Field(
        4, ge=1, description="Adapters held at once; each takes the memory of another copy of the model."
    )


class ReleaseSettings(Section):
    """The release that answers. Its digest is computed from these values, so changing one makes a new release."""

    name: str = Field("hallmark", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    base_model: str | None = Field(None, description="Base model id, checked against the engine when given.")
    base_revision: str | None = None
    adapter: str | None = Field(None, description="LoRA adapter's name on the engine.")
    adapter_digest: str | None = Field(None, description="SHA-256 of the adapter's weights.")
    prompt_file: Path | None = Field(None, description="A prompt template instead of the built-in one.")
    retrieval: Literal["off", "auto", "required"] = Field(
        "auto", description="`auto` answers without passages when the index is down, `required` refuses."
    )
    search: Literal["hybrid", "dense", "sparse"] = "hybrid"
    top_k: int = Field(5, ge=1, le=50, description="Passages searched for a question.")
    per_document: int | None = Field(None, ge=1, le=50, description="So many of them of one document at most.")
    mmr: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Take passages that are unlike each other: 1 by relevance alone, 0 by that not at all.",
    )
    rewrite: bool = Field(
        False,
        description="In a conversation, have the engine make the last question one that can be searched by itself.",
    )
    context: Literal["auto", "passages", "sentences"] = Field(
        "auto",
        description="What of the passages the engine is given: all, or the sentences that answer best, which a small "
        "model needs. `auto` is `sentences` with the embedded engine.",
    )
    check: Literal["sentence", "end", "off"] = Field(
        "sentence", description="Check each sentence before it is sent, check the whole at the end, or not at all."
    )
    fallback: Literal["extract", "abstain", "keep"] = Field(
        "extract", description="What replaces an answer that the passages do not support."
    )
    engine_fallback: str | None = Field(
        None,
        pattern=r"^extractive$|^[a-z0-9][a-z0-9._-]{0,63}@[1-9][0-9]{0,8}$",
        description="What answers while the engine cannot: `extractive` (the passages alone), or a release, `name@3`.",
    )
    abstention: str = "I can't answer that from the documents I have."
    max_tokens: int = Field(256, ge=1, description="Default limit of an answer.")
    temperature: float = Field(0.0, ge=0, le=2)
    notes: str = ""


class LimitSettings(Section):
    """What one request, and all of them together, may take."""

    max_body_bytes: int = Field(2_000_000, ge=1_000, description="Largest JSON body.")
    max_document_bytes: int = Field(50_000_000, ge=1_000, description="Largest uploaded document.")
    max_document_pages: int = Field(2_000, ge=1, description="Pages, slides or sheets of a document.")
    max_document_characters: int = Field(10_000_000, ge=1_000, description="Text of a document.")
    max_document_seconds: float = Field(
        8.0, gt=0, description="Processor time to parse a small document; each further megabyte has half as much more."
    )
    max_document_memory_bytes: int = Field(
        512_000_000, ge=128_000_000, description="Address space of the process that parses a document."
    )
    max_concurrent_answers: int = Field(
        256,
        ge=1,
        description="Chat requests being answered; one more waits. More than `engine.max_connections` help little.",
    )
    max_waiting_answers: int = Field(
        64, ge=0, description="Chat requests of each priority that may wait for a place; one more gets 429."
    )
    max_wait_seconds: float = Field(
        10.0, gt=0, description="Longest wait for a place; who is expected to wait half as long gets 429 at once."
    )
    request_timeout_seconds: float = Field(600.0, gt=0, description="Longest life of one answer.")
    redis_url: RedisUrl | None = Field(
        None, description="Where replicas count their keys' rate limits together, redis://...; unset: each by itself."
    )
    disk_reserve_bytes: int = Field(
        50_000_000,
        ge=0,
        description="Room kept on the disk of `data_dir`: with less, new requests are refused.",
    )
    remote_images: bool = Field(
        False, description="Let callers send images by URL: the engine fetches them, from whatever it can reach."
    )

    @property
    def longest_wait_seconds(self) -> float:
        """The longest wait for a place: who waited has to have time left for an answer."""
        return min(self.max_wait_seconds, self.request_timeout_seconds / 2)
