"""Everything that can be configured, in one frozen object: `HALLMARK_*` variables, then `hallmark.toml`, then defaults.

Only `app.main` and `app.cli` read it; every other part is handed the plain values it needs. The variables of the
OpenTelemetry SDK (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_SAMPLER`, ...) are read by that SDK itself.
"""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from app.privacy.names import Name
from app.privacy.policies import Level
from app.privacy.redaction import KINDS, Kind


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    try:
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # The port is no number.
        is_one = False
    if not is_one or not url.isprintable() or " " in url:
        raise ValueError("it must start with http:// or https:// and name a host, such as http://gpu-1:3000")
    return url


def _origin(origin: str) -> str:
    if origin != "*" and (_http_url(origin) != origin or urlsplit(origin).path or urlsplit(origin).query):
        raise ValueError("an origin is scheme, host and port without a path, such as https://chat.example.com")
    return origin


def _database_url(url: SecretStr) -> SecretStr:
    if not url.get_secret_value().strip().startswith(("postgresql://", "sqlite:////")):
        raise ValueError("it must be postgresql://user:password@host/name, or sqlite:////path/to/file")
    return url


def _redis_url(url: SecretStr) -> SecretStr:
    parts = urlsplit(url.get_secret_value())
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise ValueError("it must be redis://host:6379/0, or rediss:// for TLS, with user:password@ before the host")
    return url


HttpUrl = Annotated[str, AfterValidator(_http_url)]

Dialect = Literal["tgi", "vllm", "sglang", "llamacpp", "openai", "embedded"]


def _dialect_and_url(url: str, dialect: str) -> tuple[str, str]:
    """Split `vllm+http://gpu-2:8000`; a URL without a dialect in front has the one given."""
    scheme, _, rest = url.partition("://")
    own, plus, scheme = scheme.rpartition("+")
    return (own, f"{scheme}://{rest}") if plus else (dialect, url)


def _engine_url(url: str) -> str:
    dialect, address = _dialect_and_url(url, "tgi")
    if dialect not in get_args(Dialect):
        raise ValueError(f"{dialect!r} is no dialect: it may begin with {', '.join(get_args(Dialect))}")
    _http_url(address)
    return url


EngineUrl = Annotated[str, AfterValidator(_engine_url)]

GroupName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


class Section(BaseModel):
    """A group of settings: `HALLMARK_<GROUP>_<NAME>` in the environment, a `[group]` table in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
        return [_dialect_and_url(url, self.dialect) for url in dict.fromkeys(given)]


class EmbeddedSettings(Section):
    """The embedded engine: what `hallmark engine` serves and `hallmark serve --local-engine` supervises."""

    enabled: bool = Field(False, description="Start and supervise one: the same as `--local-engine`.")
    model: str = Field("smollm2-135m-instruct", description="The packaged model, a hub id, or a path.")
    threads: int | None = Field(None, ge=1, description="Torch threads; by default one less than the cores.")
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    max_queue: int = Field(64, ge=1, description="Requests that may wait; one more is refused with 429.")
    max_batch: int = Field(16, ge=1, description="Sequences decoded together.")


class QdrantSettings(Section):
    """The vector index."""

    url: HttpUrl | None = Field(None, description="A Qdrant server; unset uses the index inside the process.")
    api_key: SecretStr | None = None
    collection: str = Field("hallmark", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    search_timeout_seconds: float = Field(2.0, gt=0, description="Longest wait for a search.")


class RetrievalSettings(Section):
    """How documents are read, split and found."""

    embedding_model: str = Field("all-minilm-l6-v2", description="The packaged model, a hub id, or a path.")
    embedding_threads: int = Field(1, ge=1)
    embedding_cache: int = Field(4096, ge=0, description="Vectors of questions kept in memory; 0 keeps none.")
    embedding_url: HttpUrl | None = Field(None, description="A server that embeds, in place of this process.")
    embedding_dialect: Literal["tei", "openai"] = "tei"
    embedding_token: SecretStr | None = Field(None, description="Bearer token that server wants.")
    embedding_timeout_seconds: float = Field(5.0, gt=0, description="Longest wait for it, with all tries.")
    embedding_retries: int = Field(2, ge=0, le=10, description="Further tries while it is busy or does not answer.")
    embedding_fallback: Literal["fail", "words"] = Field("fail", description="`words`: without it, search by BM25.")
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


class TelemetrySettings(Section):
    """What telemetry says beyond what OpenTelemetry's own variables (`OTEL_*`) decide."""

    genai_profile: Literal["1.37", "genai-0.1", "both"] = Field(
        "1.37",
        description="Whose names the GenAI signals have: those of 1.37 to 1.41, those of the conventions' own "
        "repository, or both while dashboards move.",
    )
    keep_failures: bool = Field(
        True, description="Export requests that failed although the sampler left them out, as those of a canary are."
    )


class AlertSettings(Section):
    """Who is told when a release gets worse; read by the worker."""

    webhook_url: SecretStr | None = Field(None, description="Where alerts are sent; unset: they are in the log alone.")
    webhook_secret: SecretStr | None = Field(
        None, description="What they are signed with: `whsec_` and Base64; `hallmark alerts secret` makes one."
    )
    webhook_allow: tuple[str, ...] = Field(
        (), description="Hosts and networks the webhook may lead to although they are not public, or not https."
    )
    webhook_timeout_seconds: float = Field(10.0, gt=0, le=60)
    every_seconds: float = Field(30.0, gt=0, description="From one look at all rules to the next.")


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
    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] | None = Field(
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


class DriftSettings(Section):
    """How `hallmark worker` looks for drift."""

    reference_sessions: int = Field(
        1_000, ge=400, le=4_000, description="First sessions of a release that later ones are compared with."
    )
    window_sessions: int = Field(500, ge=200, le=4_000, description="Distinct sessions of a window.")
    false_alarms: float = Field(
        1.0, gt=0, le=1_000, description="False alarms in 90 days that a tenant puts up with, over all its releases."
    )
    label_rate: float = Field(
        0.2, ge=0, le=1, description="Share of a drifted release's answers that its review queues take; 0 raises none."
    )
    label_days: float = Field(7.0, gt=0, le=365, description="How long they do.")
    embed_questions: bool = Field(
        False, description="Have the worker embed kept questions that were searched for nothing: it loads the embedder."
    )


class FeatureSettings(Section):
    """Where the features are that releases name."""

    store: Literal["sql", "feast"] = Field("sql", description="The service's own database, or a Feast repository.")
    read_timeout_seconds: float = Field(0.25, gt=0, le=30, description="Longest wait of a request for its features.")
    feast_repo: Path | None = Field(None, description="The folder with Feast's `feature_store.yaml`.")
    feast_tenants: tuple[str, ...] = Field(
        ("default",), description="Tenants that Feast's features are for: it does not know of any itself."
    )
    feast_threads: int = Field(4, ge=1, le=64, description="Reads of Feast at once; one more finds the store away.")


class PrivacySettings(Section):
    """How much of what was said is kept, and how."""

    content: Level = Field(
        "full",
        description="`full` as it was said, `redacted` without personal data and secrets, `metadata` nothing of it.",
    )
    tenants: dict[str, Level] = Field({}, description="For tenants that are not to have `content`.")
    redact: tuple[Kind | Name, ...] = Field(
        KINDS,
        description="What is taken out of redacted content; `person` and `place` need the extra `presidio`.",
    )
    names_model: str = Field("en_core_web_sm", description="The spaCy model that finds names; its folder, or package.")
    share: float = Field(1.0, ge=0, le=1, description="Of conversations whose content is kept at all, by chance.")
    master_key: SecretStr | None = Field(
        None, description="Seals content, each subject's by a key of its own: `id:base64`, several with commas."
    )
    master_key_file: Path | None = Field(
        None, description="The same, a key a line; `hallmark privacy new-key` makes one."
    )
    pseudonyms: bool = Field(True, description="With a master key: users are kept by a keyed hash of their name.")
    content_days: float | None = Field(None, gt=0, description="How long what was said is kept; unset: for ever.")
    predictions_days: float | None = Field(None, gt=0, description="How long whole records of predictions are kept.")
    feedback_days: float | None = Field(None, gt=0, description="How long words of feedback and labels are kept.")
    embeddings_days: float | None = Field(None, gt=0, description="How long questions' embeddings are kept.")
    review_days: float | None = Field(None, gt=0, description="How long items of review queues are kept.")
    features_days: float | None = Field(None, gt=0, description="How long features are kept that newer ones replaced.")


class Settings(BaseSettings):
    """The whole configuration of one process."""

    model_config = SettingsConfigDict(
        env_prefix="HALLMARK_",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        toml_file="hallmark.toml",
        frozen=True,
        extra="forbid",
    )

    data_dir: Path = Field(Path(".hallmark"), description="Everything kept on disk: records, keys, documents, index.")
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    public_url: HttpUrl | None = Field(
        None, description="How clients reach the service; citation links start with it. Default: the request's Host."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "text"] = Field("auto", description="`auto` is text on a terminal, else JSON.")
    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = Field(
        None, description="The database that several replicas share, postgresql://...; unset: SQLite in `data_dir`."
    )
    record: Literal["required", "best_effort"] = Field(
        "required", description="`required`: an answer that cannot be recorded is not given."
    )
    open_metrics: bool = Field(False, description="Serve `/metrics` without a key.")
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = Field(
        (), description="Web pages that may call the API from a browser, by origin; `*` is any."
    )

    engine: EngineSettings = EngineSettings()
    engines: dict[GroupName, EngineSettings] = Field(
        {}, description="Further engine groups, which releases name as their `engine`: `[engines.big]` in the file."
    )
    embedded: EmbeddedSettings = EmbeddedSettings()
    qdrant: QdrantSettings = QdrantSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    ingestion: IngestionSettings = IngestionSettings()
    release: ReleaseSettings = ReleaseSettings()
    drift: DriftSettings = DriftSettings()
    features: FeatureSettings = FeatureSettings()
    limits: LimitSettings = LimitSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    privacy: PrivacySettings = PrivacySettings()
    alerts: AlertSettings = AlertSettings()

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.main_engine in self.engines:
            raise ValueError(f"engines.{self.main_engine}: `[engine]` goes by this name already; choose another")
        for name, group in self.engines.items():
            if not group.members:
                raise ValueError(f"engines.{name}.urls: name at least one engine")
        return self

    @property
    def main_adapter_folder(self) -> Path | None:
        """Where the main engine's adapters lie on this machine."""
        own = self.data_dir / "adapters" if self.embedded.enabled else None
        return self.engine.adapter_folder or own

    @property
    def main_engine(self) -> str:
        """What releases call the group `[engine]`, or the embedded engine in its place."""
        return "embedded" if self.embedded.enabled else self.engine.dialect

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings passes it by name.
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise.
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment before the file, so that one run can override it."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


_NOT_SETTINGS = frozenset({"HALLMARK_URL", "HALLMARK_API_KEY"})
"""What the command line reads as a client."""


def unknown_variables() -> Iterator[tuple[str, str | None]]:
    """Give each variable of the environment that looks like a setting and is none, with the one that may be meant."""
    known = set(_NOT_SETTINGS)
    for name, field in Settings.model_fields.items():
        inner = type(field.default).model_fields if isinstance(field.default, Section) else {}
        known |= {f"HALLMARK_{name}_{each}".upper() for each in inner} or {f"HALLMARK_{name}".upper()}
    for variable in sorted(os.environ):  # noqa: TID251 - this module is where the environment is read.
        is_group = variable.startswith("HALLMARK_ENGINES_")  # One of them, as JSON.
        if variable.startswith("HALLMARK_") and variable not in known and not is_group:
            near = get_close_matches(variable[9:], [name[9:] for name in known], n=1, cutoff=0.7)
            yield variable, f"HALLMARK_{near[0]}" if near else None
