"""The spans of generation, retrieval and embeddings: exact names and value types, and never content."""

from collections.abc import Mapping

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from observability import genai
from observability.spans import NOT_RECORDED
from observability.telemetry import Telemetry
from observability.traces import RequestTrace
from tests.generations import start_generation


class Recorded:
    """A sampled request and what was exported of it."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        telemetry = Telemetry(service_version="1", span_processor=SimpleSpanProcessor(self.exporter))
        self.trace: RequestTrace = telemetry.begin(route="/v1/chat/completions")

    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def typed(attributes: Mapping[str, object] | None) -> dict[str, tuple[type, object]]:
    return {name: (type(value), value) for name, value in (attributes or {}).items()}


def test_a_generation_span_tells_request_and_response(recorded: Recorded) -> None:
    span = start_generation(
        recorded.trace,
        model="smollm2",
        provider="tgi",
        release="hallmark@3",
        prediction_id="p-1",
        adapter="tone",
        stream=True,
        max_tokens=64,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=("END", "STOP"),
        prompt_name="hallmark",
        prompt_version="answer-1",
    )
    genai.end_generation(
        span, first_token_ns=span.started_ns + 250_000_000, prompt_tokens=11, completion_tokens=5, finish_reason="stop"
    )
    (finished,) = recorded.spans()
    assert finished.name == "chat smollm2"
    assert finished.kind is SpanKind.CLIENT
    attributes = typed(finished.attributes)
    kind, first_chunk_seconds = attributes.pop("gen_ai.response.time_to_first_chunk")
    assert kind is float
    assert isinstance(first_chunk_seconds, float)
    assert 0 <= first_chunk_seconds < 5
    assert attributes == {
        "gen_ai.operation.name": (str, "chat"),
        "gen_ai.provider.name": (str, "tgi"),
        "gen_ai.request.model": (str, "smollm2"),
        "gen_ai.request.stream": (bool, True),
        "gen_ai.request.max_tokens": (int, 64),
        "gen_ai.request.temperature": (float, 0.5),
        "gen_ai.request.top_p": (float, 0.9),
        "gen_ai.request.seed": (int, 7),
        "gen_ai.response.id": (str, "p-1"),
        "gen_ai.prompt.name": (str, "hallmark"),
        "gen_ai.response.finish_reasons": (tuple, ("stop",)),
        "gen_ai.usage.input_tokens": (int, 11),
        "gen_ai.usage.output_tokens": (int, 5),
        "hallmark.request.stop_count": (int, 2),
        "hallmark.release": (str, "hallmark@3"),
        "hallmark.prediction.id": (str, "p-1"),
        "hallmark.adapter": (str, "tone"),
    }
    assert [event.name for event in finished.events] == ["hallmark.first_token"]


def test_what_a_generation_does_not_know_is_left_out(recorded: Recorded) -> None:
    span = start_generation(recorded.trace)
    genai.end_generation(span, error="engine_unavailable")
    (finished,) = recorded.spans()
    assert set(finished.attributes or {}) == {
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.request.model",
        "gen_ai.request.stream",
        "gen_ai.response.id",
        "hallmark.release",
        "hallmark.prediction.id",
        "error.type",
    }
    assert finished.status.status_code is StatusCode.ERROR


def test_a_retrieval_span_has_its_embedding_and_its_query_of_qdrant_inside(recorded: Recorded) -> None:
    span = genai.start_retrieval(recorded.trace, collection="hallmark", mode="hybrid", top_k=5)
    genai.end_retrieval(
        recorded.trace,
        span,
        seconds=0.01,
        collection="hallmark",
        hits=4,
        index_version="iv-1",
        outcome="used",
        embedding_model="minilm",
        embed_seconds=0.002,
        search_seconds=0.003,
    )
    embedding, query, retrieval = recorded.spans()
    assert (retrieval.name, retrieval.kind) == ("retrieval hallmark", SpanKind.CLIENT)
    assert typed(retrieval.attributes) == {
        "gen_ai.operation.name": (str, "retrieval"),
        "gen_ai.provider.name": (str, "qdrant"),
        "gen_ai.data_source.id": (str, "hallmark"),
        "gen_ai.request.top_k": (int, 5),
        "hallmark.search.mode": (str, "hybrid"),
        "hallmark.search.top_k": (int, 5),
        "hallmark.index.version": (str, "iv-1"),
        "hallmark.retrieval.outcome": (str, "used"),
    }
    assert (query.name, query.kind) == ("query hallmark", SpanKind.CLIENT)
    assert typed(query.attributes) == {
        "db.system.name": (str, "qdrant"),
        "db.operation.name": (str, "query"),
        "db.collection.name": (str, "hallmark"),
        "db.response.returned_rows": (int, 4),
    }
    assert embedding.name == "embeddings minilm"
    assert embedding.parent == query.parent == retrieval.context
    assert embedding.start_time == retrieval.start_time
    assert embedding.end_time == query.start_time
    assert embedding.end_time is not None
    assert embedding.start_time is not None
    assert embedding.end_time - embedding.start_time == 2_000_000


def test_a_search_that_failed_has_neither(recorded: Recorded) -> None:
    span = genai.start_retrieval(recorded.trace, collection="c", mode="sparse", top_k=5)
    genai.end_retrieval(recorded.trace, span, seconds=0.1, error="retrieval_unavailable")
    (retrieval,) = recorded.spans()
    assert retrieval.attributes is not None
    assert retrieval.attributes["error.type"] == "retrieval_unavailable"


def test_an_embeddings_span_counts_its_texts(recorded: Recorded) -> None:
    genai.start_embeddings(recorded.trace, model="minilm", texts=3).end()
    (finished,) = recorded.spans()
    assert finished.name == "embeddings minilm"
    assert typed(finished.attributes) == {
        "gen_ai.operation.name": (str, "embeddings"),
        "gen_ai.provider.name": (str, "hallmark"),
        "gen_ai.request.model": (str, "minilm"),
        "hallmark.embeddings.texts": (int, 3),
    }


def test_ending_twice_records_once(recorded: Recorded) -> None:
    span = start_generation(recorded.trace)
    genai.end_generation(span, finish_reason="stop")
    genai.end_generation(span, error="late")
    search = genai.start_retrieval(recorded.trace, collection="c", mode="hybrid", top_k=1)
    genai.end_retrieval(recorded.trace, search, seconds=0.1)
    genai.end_retrieval(recorded.trace, search, seconds=0.1, embedding_model="m", embed_seconds=1.0)
    generation, retrieval = recorded.spans()
    assert generation.status.status_code is StatusCode.UNSET
    assert not generation.events
    assert retrieval.name == "retrieval c"


def test_an_unsampled_request_gets_no_span_from_any_operation() -> None:
    trace = Telemetry(service_version="1").begin(route="/v1/chat/completions")
    started = [
        start_generation(trace),
        genai.start_retrieval(trace, collection="c", mode="hybrid", top_k=5),
        genai.start_embeddings(trace, model="m", texts=1),
        genai.start_check(trace, mode="sentence"),
        genai.start_record(trace, step="closing"),
    ]
    assert all(span is NOT_RECORDED for span in started)
    genai.end_generation(started[0], finish_reason="stop")
    genai.end_retrieval(trace, started[1], seconds=0.1, embedding_model="m", embed_seconds=1.0)
    genai.end_check(started[3], seconds=0.1)
    started[4].end()
