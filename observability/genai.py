"""The home of every `gen_ai.*` and `db.*` name, and of our own `hallmark.*` span attributes.

The GenAI conventions are in development and being renamed: when they move, this file changes and nothing else does, and
alerts rest on our own metric names only. Functions take facts, never objects of the service, and never content: what
was asked, found and answered is in the prediction record.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from collections.abc import Sequence
from time import time_ns
from typing import Final

from opentelemetry.semconv._incubating.attributes import db_attributes, gen_ai_attributes
from opentelemetry.semconv.attributes import server_attributes
from opentelemetry.trace import SpanKind
from opentelemetry.util.types import AttributeValue

from observability.traces import NOT_RECORDED, RequestTrace, TraceSpan

PREDICTION_ID: Final = "hallmark.prediction.id"
RELEASE: Final = "hallmark.release"
ADAPTER: Final = "hallmark.adapter"
INDEX_VERSION: Final = "hallmark.index.version"
SEARCH_MODE: Final = "hallmark.search.mode"
SEARCH_TOP_K: Final = "hallmark.search.top_k"
FIRST_TOKEN: Final = "hallmark.first_token"  # noqa: S105 - a token of text, not a secret.
"""Event: the first token of an answer arrived."""

CHAT, EMBEDDINGS, RETRIEVAL = "chat", "embeddings", "retrieval"
_NANOSECONDS: Final = 1_000_000_000


def start_generation(
    trace: RequestTrace,
    *,
    model: str,
    provider: str,
    release: str,
    prediction_id: str,
    adapter: str | None = None,
    stream: bool = False,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    server_address: str | None = None,
    server_port: int | None = None,
) -> TraceSpan:
    """Start the span of one engine call, `chat {model}`.

    `provider` is the engine's dialect (`tgi`, `vllm`, ...). Stop sequences are counted, not quoted: a caller's stop
    words can be content.
    """
    if not trace.sampled:
        return NOT_RECORDED
    attributes: dict[str, AttributeValue | None] = {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: CHAT,
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: provider,
        gen_ai_attributes.GEN_AI_REQUEST_MODEL: model,
        gen_ai_attributes.GEN_AI_REQUEST_STREAM: stream,
        gen_ai_attributes.GEN_AI_REQUEST_MAX_TOKENS: max_tokens,
        gen_ai_attributes.GEN_AI_REQUEST_TEMPERATURE: temperature,
        gen_ai_attributes.GEN_AI_REQUEST_TOP_P: top_p,
        gen_ai_attributes.GEN_AI_REQUEST_FREQUENCY_PENALTY: frequency_penalty,
        gen_ai_attributes.GEN_AI_REQUEST_PRESENCE_PENALTY: presence_penalty,
        gen_ai_attributes.GEN_AI_REQUEST_SEED: seed,
        "hallmark.request.stop_count": len(stop) or None,
        server_attributes.SERVER_ADDRESS: server_address,
        server_attributes.SERVER_PORT: server_port,
        RELEASE: release,
        PREDICTION_ID: prediction_id,
        ADAPTER: adapter,
    }
    return trace.span(f"{CHAT} {model}", SpanKind.CLIENT, _present(attributes))


def first_token(span: TraceSpan) -> None:
    """Mark the arrival of an answer's first token."""
    if span.recording:
        elapsed = (time_ns() - span.started_ns) / _NANOSECONDS
        span.set(gen_ai_attributes.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK, elapsed)
        span.event(FIRST_TOKEN)


def end_generation(
    span: TraceSpan,
    *,
    model: str | None = None,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    finish_reason: str | None = None,
    error: BaseException | str | None = None,
) -> None:
    """End an engine call with what it reported; `model` is the model that answered."""
    if not span.recording:
        return
    span.update(
        _present(
            {
                gen_ai_attributes.GEN_AI_RESPONSE_MODEL: model,
                gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS: prompt_tokens,
                gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS: completion_tokens,
                gen_ai_attributes.GEN_AI_RESPONSE_FINISH_REASONS: (finish_reason,) if finish_reason else None,
            }
        )
    )
    span.end(error=error)


def start_retrieval(trace: RequestTrace, *, collection: str, mode: str, top_k: int) -> TraceSpan:
    """Start the span of one search, `retrieval {collection}`, which is also a query of Qdrant."""
    if not trace.sampled:
        return NOT_RECORDED
    attributes: dict[str, AttributeValue] = {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: RETRIEVAL,
        gen_ai_attributes.GEN_AI_DATA_SOURCE_ID: collection,
        db_attributes.DB_SYSTEM_NAME: "qdrant",
        db_attributes.DB_OPERATION_NAME: "query",
        db_attributes.DB_COLLECTION_NAME: collection,
        SEARCH_MODE: mode,
        SEARCH_TOP_K: top_k,
    }
    return trace.span(f"{RETRIEVAL} {collection}", SpanKind.CLIENT, attributes)


def end_retrieval(
    span: TraceSpan,
    *,
    hits: int = 0,
    index_version: str | None = None,
    embedding_model: str | None = None,
    embed_seconds: float = 0.0,
    error: BaseException | str | None = None,
) -> None:
    """End a search; the time it spent embedding its query becomes an embeddings span at its start."""
    if not span.recording:
        return
    if embedding_model and embed_seconds:
        embedding = span.child(
            f"{EMBEDDINGS} {embedding_model}",
            SpanKind.INTERNAL,
            _embeddings_attributes(embedding_model, texts=1),
            started_ns=span.started_ns,
        )
        embedding.end(ended_ns=span.started_ns + int(embed_seconds * _NANOSECONDS))
    span.set(db_attributes.DB_RESPONSE_RETURNED_ROWS, hits)
    if index_version:
        span.set(INDEX_VERSION, index_version)
    span.end(error=error)


def start_embeddings(
    trace: RequestTrace, *, model: str, texts: int, dimensions: int | None = None, parent: TraceSpan | None = None
) -> TraceSpan:
    """Start the span of embedding `texts` texts, `embeddings {model}`; end it with its own `end`."""
    if not trace.sampled:
        return NOT_RECORDED
    attributes = _embeddings_attributes(model, texts, dimensions)
    return trace.span(f"{EMBEDDINGS} {model}", SpanKind.INTERNAL, attributes, parent=parent)


def _embeddings_attributes(model: str, texts: int, dimensions: int | None = None) -> dict[str, AttributeValue]:
    return _present(
        {
            gen_ai_attributes.GEN_AI_OPERATION_NAME: EMBEDDINGS,
            gen_ai_attributes.GEN_AI_PROVIDER_NAME: "hallmark",
            gen_ai_attributes.GEN_AI_REQUEST_MODEL: model,
            gen_ai_attributes.GEN_AI_EMBEDDINGS_DIMENSION_COUNT: dimensions,
            "hallmark.embeddings.texts": texts,
        }
    )


def _present(attributes: dict[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}
