"""Content never leaves by telemetry: a canary goes in wherever content can come near, and is looked for everywhere."""

import io
import json
import logging

from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from observability import genai, logs
from observability.metrics import Metrics
from observability.telemetry import Telemetry
from tests.generations import start_generation

CANARY = "the patient's name is Xq-7f3a"
ROUTE = "/v1/chat/completions"


def test_no_canary_in_spans_metrics_or_logs() -> None:
    exporter, reader, stream = InMemorySpanExporter(), InMemoryMetricReader(), io.BytesIO()
    events = InMemoryLogRecordExporter()
    telemetry = Telemetry(
        service_version="1",
        profile="both",
        span_processor=SimpleSpanProcessor(exporter),
        metric_reader=reader,
        event_processor=SimpleLogRecordProcessor(events),
    )
    metrics = Metrics(version="1", process=False)
    log = logs.configure("DEBUG", "json", stream=stream)

    scope = {
        "path": ROUTE,
        "query_string": CANARY.encode(),
        "headers": [(b"host", b"gateway"), (b"cookie", CANARY.encode()), (b"user-agent", CANARY.encode())],
    }
    trace = telemetry.begin(None, route=ROUTE, scope=scope)
    search = genai.start_retrieval(trace, collection="hallmark", mode="hybrid", top_k=5)
    genai.end_retrieval(trace, search, seconds=0.1, error=KeyError(CANARY))
    generation = start_generation(
        trace,
        model="m",
        provider="tgi",
        release="hallmark@1",
        prediction_id="p",
        stop=(CANARY,),
        conversation=CANARY,
    )
    genai.end_generation(generation, error=ValueError(CANARY))
    genai.count_generation(trace, model="m", provider="tgi", seconds=1.0, error=ValueError(CANARY))
    genai.end_check(genai.start_check(trace, mode="sentence"), seconds=0.1, error=ValueError(CANARY))
    genai.start_record(trace, step="closing").end(error=RuntimeError(CANARY))
    embedding = genai.start_embeddings(trace, model="m", texts=1)
    embedding.end(error=ValueError(CANARY))
    telemetry.evaluated(genai.Evaluation("feedback", 1.0, "positive", "end_user", "p", CANARY))
    try:
        json.loads(f"{{{CANARY}")
    except ValueError as error:
        error.add_note(CANARY)
        logging.getLogger("app").exception("bad answer", extra={"prompt": CANARY, "messages": [{"content": CANARY}]})
    trace.end(500, error=RuntimeError(CANARY))
    metrics.answer(route=ROUTE, release="", status=500, outcome="failed", seconds=1.0)
    log.access("POST", ROUTE, 500, 1.0, trace_id=trace.trace_id, outcome="failed")
    log.close()

    spans = exporter.get_finished_spans()
    assert len(spans) == 6
    told = "".join(span.to_json() for span in spans)
    (event,) = events.get_finished_logs()
    told += event.to_json()
    exported = reader.get_metrics_data()
    assert exported is not None
    told += exported.to_json()
    told += metrics.render()[0].decode()
    told += stream.getvalue().decode()
    assert "JSONDecodeError" in told
    assert "7f3a" not in told
