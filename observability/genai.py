"""The home of every `gen_ai.*` and `db.*` name of spans and events, and of our own `hallmark.*` attributes.

The GenAI conventions are in development and being renamed: when they move, this file and `genai_metrics` change and
nothing else does, and alerts rest on our own metric names only. A profile says whose names are given: `1.37` those of
1.37 to 1.41, which packages and dashboards know today; `genai-0.1` those of the conventions' own repository; `both` all
of them. Functions take facts, never objects of the service, and never content: what was asked, found and answered is in
the prediction record.

https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from time import time_ns
from typing import Final, NamedTuple
from uuid import UUID

from opentelemetry import trace as api
from opentelemetry._logs import Logger, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import db_attributes, error_attributes
from opentelemetry.trace import SpanKind
from opentelemetry.util.types import AttributeValue

from observability.spans import NOT_RECORDED, Attributes, Facts, TraceSpan, error_type
from observability.traces import Profile, RequestTrace

PREDICTION_ID: Final = "hallmark.prediction.id"
RELEASE: Final = "hallmark.release"
ADAPTER: Final = "hallmark.adapter"
INDEX_VERSION: Final = "hallmark.index.version"
SEARCH_MODE: Final = "hallmark.search.mode"
SEARCH_TOP_K: Final = "hallmark.search.top_k"
RETRIEVAL_OUTCOME: Final = "hallmark.retrieval.outcome"
CHECK_MODE: Final = "hallmark.check.mode"
CHECK_SECONDS: Final = "hallmark.check.seconds"
VERDICT: Final = "hallmark.verdict"
RECORD_STEP: Final = "hallmark.record.step"
FIRST_TOKEN: Final = "hallmark.first_token"  # noqa: S105 - a token of text, not a secret.
"""Event: the first token of an answer arrived."""
EVALUATION_RESULT: Final = "gen_ai.evaluation.result"
EVALUATION_SOURCE: Final = "hallmark.evaluation.source"

CHAT, EMBEDDINGS, RETRIEVAL = "chat", "embeddings", "retrieval"
QDRANT: Final = "qdrant"
_PROMPT_VERSION: Final = "gen_ai.prompt.version"
_TOP_K: Final[Mapping[Profile, tuple[str, ...]]] = {
    "1.37": ("gen_ai.request.top_k",),
    "genai-0.1": ("gen_ai.retrieval.top_k",),
    "both": ("gen_ai.request.top_k", "gen_ai.retrieval.top_k"),
}
# Not yet in the package's stable names.
_RETURNED_ROWS: Final = "db.response.returned_rows"
_NANOSECONDS: Final = 1_000_000_000
# A member of an enumeration costs more to look up than a span to note.
_CLIENT: Final = SpanKind.CLIENT
_INTERNAL: Final = SpanKind.INTERNAL


def start_generation(
    trace: RequestTrace, *, model: str, prediction_id: str, is_first: bool = True, tell: Callable[[], Facts]
) -> TraceSpan:
    """Start the span of one engine call, `chat {model}`; of several for one answer the first is what others refer to.

    `tell` gives its `generation_facts`: most spans are noted and never built, and their facts are never made.
    """
    if trace.server is NOT_RECORDED:
        return NOT_RECORDED
    span_id = chat_span_id(prediction_id) if is_first else 0
    return trace.server.child(f"{CHAT} {model}", _CLIENT, tell, span_id=span_id)


def generation_facts(
    profile: Profile = "1.37",
    *,
    model: str,
    provider: str,
    release: str,
    prediction_id: str,
    conversation: str | None = None,
    prompt_name: str | None = None,
    prompt_version: str | None = None,
    adapter: str | None = None,
    stream: bool = False,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Facts:
    """Say of an engine call what is known when it begins.

    `provider` is the engine's dialect (`tgi`, `vllm`, ...). Stop sequences are counted, not quoted: a caller's stop
    words can be content.
    """
    attributes: dict[str, AttributeValue | None] = {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: CHAT,
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: provider,
        gen_ai_attributes.GEN_AI_REQUEST_MODEL: model,
        gen_ai_attributes.GEN_AI_REQUEST_STREAM: stream,
        gen_ai_attributes.GEN_AI_REQUEST_MAX_TOKENS: max_tokens,
        gen_ai_attributes.GEN_AI_REQUEST_TEMPERATURE: temperature,
        gen_ai_attributes.GEN_AI_REQUEST_TOP_P: top_p,
        gen_ai_attributes.GEN_AI_REQUEST_SEED: seed,
        gen_ai_attributes.GEN_AI_RESPONSE_ID: prediction_id,
        gen_ai_attributes.GEN_AI_CONVERSATION_ID: conversation and conversation_id(conversation),
        gen_ai_attributes.GEN_AI_PROMPT_NAME: prompt_name,
        "hallmark.request.stop_count": len(stop) or None,
        RELEASE: release,
        PREDICTION_ID: prediction_id,
        ADAPTER: adapter,
    }
    if profile != "1.37":
        attributes[_PROMPT_VERSION] = prompt_version
    return attributes


def end_generation(
    span: TraceSpan,
    *,
    first_token_ns: int | None = None,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    finish_reason: str | None = None,
    error: BaseException | str | None = None,
) -> None:
    """End an engine call with what it reported; `first_token_ns` is the Unix time of the answer's first token."""
    if span is NOT_RECORDED:
        return
    span.then(partial(_tell_answer, first_token_ns, prompt_tokens, completion_tokens, finish_reason))
    span.end(error=error)


def _tell_answer(
    first_token_ns: int | None,
    prompt_tokens: int | None,
    completion_tokens: int | None,
    finish_reason: str | None,
    span: TraceSpan,
) -> None:
    first_chunk_seconds = None
    if first_token_ns is not None:
        span.event(FIRST_TOKEN, at_ns=first_token_ns)
        first_chunk_seconds = (first_token_ns - span.started_ns) / _NANOSECONDS
    span.update(
        {
            gen_ai_attributes.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: first_chunk_seconds,
            gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS: prompt_tokens,
            gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS: completion_tokens,
            gen_ai_attributes.GEN_AI_RESPONSE_FINISH_REASONS: (finish_reason,) if finish_reason else None,
        }
    )


def count_generation(
    trace: RequestTrace,
    *,
    model: str,
    provider: str,
    seconds: float,
    first_chunk_seconds: float | None = None,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    error: BaseException | str | None = None,
) -> None:
    """Observe one engine call, sampled or not; `first_chunk_seconds` is for a stream only."""
    record = trace.conventions.record
    if record is None:
        return
    facts = _measured(CHAT, provider, model)
    record("inference", seconds, _with_error(facts, error))
    if first_chunk_seconds is not None:
        record("first_chunk", first_chunk_seconds, facts)
    record("input_tokens", prompt_tokens, facts)
    record("output_tokens", completion_tokens, facts)


def start_retrieval(trace: RequestTrace, *, collection: str, mode: str, top_k: int) -> TraceSpan:
    """Start the span of one search, `retrieval {collection}`."""
    if trace.server is NOT_RECORDED:
        return NOT_RECORDED
    attributes: dict[str, AttributeValue] = {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: RETRIEVAL,
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: QDRANT,
        gen_ai_attributes.GEN_AI_DATA_SOURCE_ID: collection,
        SEARCH_MODE: mode,
        SEARCH_TOP_K: top_k,
    }
    for name in _TOP_K[trace.conventions.profile]:
        attributes[name] = top_k
    return trace.server.child(f"{RETRIEVAL} {collection}", SpanKind.CLIENT, attributes)


def end_retrieval(
    trace: RequestTrace,
    span: TraceSpan,
    *,
    seconds: float,
    collection: str = "",
    hits: int = 0,
    index_version: str | None = None,
    outcome: str | None = None,
    embedding_model: str | None = None,
    embed_seconds: float = 0.0,
    search_seconds: float = 0.0,
    error: BaseException | str | None = None,
) -> None:
    """End a search, and observe it whether or not it is sampled.

    Its query was embedded first, which is a span, and then Qdrant was asked, which is another.
    """
    if (record := trace.conventions.record) is not None:
        record("retrieval", seconds, _with_error(_measured(RETRIEVAL, QDRANT), error))
        if embedding_model and embed_seconds:
            count_embeddings(trace, model=embedding_model, seconds=embed_seconds)
    if span is NOT_RECORDED:
        return
    span.then(partial(_tell_search, collection, hits, embedding_model, embed_seconds, search_seconds))
    span.update({INDEX_VERSION: index_version, RETRIEVAL_OUTCOME: outcome})
    span.end(error=error)


def _tell_search(
    collection: str,
    hits: int,
    embedding_model: str | None,
    embed_seconds: float,
    search_seconds: float,
    span: TraceSpan,
) -> None:
    embedded_ns = span.started_ns + int(embed_seconds * _NANOSECONDS)
    if embedding_model and embed_seconds:
        attributes = _embeddings_attributes(embedding_model, texts=1)
        name = f"{EMBEDDINGS} {embedding_model}"
        span.child(name, SpanKind.INTERNAL, attributes, started_ns=span.started_ns).end(ended_ns=embedded_ns)
    if search_seconds:
        query: dict[str, AttributeValue] = {
            db_attributes.DB_SYSTEM_NAME: QDRANT,
            db_attributes.DB_OPERATION_NAME: "query",
            db_attributes.DB_COLLECTION_NAME: collection,
            _RETURNED_ROWS: hits,
        }
        asked = span.child(f"query {collection}", SpanKind.CLIENT, query, started_ns=embedded_ns)
        asked.end(ended_ns=embedded_ns + int(search_seconds * _NANOSECONDS))


def count_embeddings(
    trace: RequestTrace, *, model: str, seconds: float, error: BaseException | str | None = None
) -> None:
    """Observe that texts were embedded, sampled or not."""
    if (record := trace.conventions.record) is not None:
        record("embeddings", seconds, _with_error(_measured(EMBEDDINGS, "hallmark", model), error))


def start_embeddings(trace: RequestTrace, *, model: str, texts: int) -> TraceSpan:
    """Start the span of embedding `texts` texts, `embeddings {model}`; end it with its own `end`."""
    if trace.server is NOT_RECORDED:
        return NOT_RECORDED
    return trace.server.child(f"{EMBEDDINGS} {model}", SpanKind.INTERNAL, _embeddings_attributes(model, texts))


def start_check(trace: RequestTrace, *, mode: str) -> TraceSpan:
    """Start the span of comparing an answer with its passages; of one checked as it streams it lies over the call."""
    if trace.server is NOT_RECORDED:
        return NOT_RECORDED
    return trace.server.child("citation_check", SpanKind.INTERNAL, {CHECK_MODE: mode})


def end_check(
    span: TraceSpan,
    *,
    seconds: float,
    citations: Sequence[str] = (),
    verdict: str | None = None,
    error: BaseException | str | None = None,
) -> None:
    """End a check with the statuses of the citations; `seconds` is what it took itself, without waiting for text."""
    if span is not NOT_RECORDED:
        span.then(partial(_tell_check, seconds, citations, verdict))
        span.end(error=error)


def _tell_check(seconds: float, citations: Sequence[str], verdict: str | None, span: TraceSpan) -> None:
    counted = {f"hallmark.citations.{status}": count for status, count in Counter(citations).items()}
    span.update({CHECK_SECONDS: seconds, VERDICT: verdict, **counted})


def start_record(trace: RequestTrace, *, step: str) -> TraceSpan:
    """Start the span of waiting for a row of the record to be on the disk: `opening` or `closing`."""
    if trace.server is NOT_RECORDED:
        return NOT_RECORDED
    return trace.server.child("record", _INTERNAL, {RECORD_STEP: step})


class Evaluation(NamedTuple):
    """What somebody said of an answer, without the words they used."""

    name: str
    value: float | None = None
    label: str | None = None
    source: str | None = None
    """What kind of author says it."""
    prediction_id: str | None = None
    conversation: str | None = None
    trace_id: str | None = None
    has_generation: bool = False
    """Whether an engine was called for the answer, so that there is a span to refer to."""
    said_ns: int | None = None

    def emit(self, logger: Logger) -> None:
        """Tell it as an event, below the span of the engine call if that is known."""
        facts: Facts = {
            gen_ai_attributes.GEN_AI_EVALUATION_NAME: self.name,
            gen_ai_attributes.GEN_AI_EVALUATION_SCORE_VALUE: self.value,
            gen_ai_attributes.GEN_AI_EVALUATION_SCORE_LABEL: self.label,
            gen_ai_attributes.GEN_AI_RESPONSE_ID: self.prediction_id,
            gen_ai_attributes.GEN_AI_CONVERSATION_ID: self.conversation and conversation_id(self.conversation),
            EVALUATION_SOURCE: self.source,
        }
        logger.emit(
            timestamp=self.said_ns or time_ns(),
            observed_timestamp=time_ns(),
            context=self._parent(),
            severity_number=SeverityNumber.INFO,
            attributes={name: value for name, value in facts.items() if value is not None},
            event_name=EVALUATION_RESULT,
        )

    def _parent(self) -> Context:
        span_id = chat_span_id(self.prediction_id or "") if self.has_generation else 0
        # Without a trace this says so; an empty context would stand for the trace of whoever calls.
        parent = api.SpanContext(int(self.trace_id or "0", 16), span_id, is_remote=True)
        return api.set_span_in_context(api.NonRecordingSpan(parent), Context())


def chat_span_id(prediction_id: str) -> int:
    """The id of the span of a prediction's engine call, so that what is said later finds it; 0 if there is none.

    It is the random half of the prediction's id, so that nothing has to be stored for it.
    """
    try:
        return int(prediction_id[19:23] + prediction_id[24:], 16) if len(prediction_id) == 36 else 0
    except ValueError:
        return 0


def conversation_id(given: str) -> str:
    """What stands for a caller's conversation: a UUID itself, and of anything else a digest, as it can be a name."""
    try:
        return str(UUID(given))
    except ValueError:
        return blake2b(given.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _measured(operation: str, provider: str, model: str | None = None) -> Attributes:
    facts = {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: operation,
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: provider,
    }
    return facts if model is None else {**facts, gen_ai_attributes.GEN_AI_REQUEST_MODEL: model}


def _with_error(facts: Attributes, error: BaseException | str | None) -> Attributes:
    return facts if error is None else {**facts, error_attributes.ERROR_TYPE: error_type(error)}


def _embeddings_attributes(model: str, texts: int) -> Facts:
    return {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: EMBEDDINGS,
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: "hallmark",
        gen_ai_attributes.GEN_AI_REQUEST_MODEL: model,
        "hallmark.embeddings.texts": texts,
    }
