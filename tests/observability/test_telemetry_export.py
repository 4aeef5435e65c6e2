"""Export: over OTLP/HTTP to a collector on loopback, and at no cost to a request when there is none to take it."""

import gc
import socket
import time
from collections.abc import Iterator

import pytest
from opentelemetry._logs import LogRecord
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import NoOpTracerProvider

from observability import genai
from observability.exporting import ExporterMisconfigured
from observability.spans import NotedSpan
from observability.telemetry import Telemetry
from tests.collector import Collector
from tests.generations import start_generation
from tests.stopwatch import Stopwatch

ROUTE = "/v1/chat/completions"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        yield server


@pytest.fixture
def dead_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A collector that accepts and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_spans_and_metrics_reach_the_collector_as_otlp(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20collector-token")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    telemetry = Telemetry(service_version="1.2.3", instance_id="i-1")
    trace = telemetry.begin(route=ROUTE)
    span = start_generation(trace)
    genai.end_generation(span, completion_tokens=5)
    trace.end(200)
    telemetry.close()

    (resource_spans,) = collector.traces[0].resource_spans
    resource = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
    assert resource["service.name"] == "hallmark"
    assert resource["service.version"] == "1.2.3"
    assert resource["service.instance.id"] == "i-1"
    generation, server = resource_spans.scope_spans[0].spans
    assert (generation.name, server.name) == ("chat m", f"POST {ROUTE}")
    assert generation.parent_span_id == server.span_id
    assert server.trace_id.hex() == trace.trace_id
    assert {item.key: item.value.int_value for item in generation.attributes}["gen_ai.usage.output_tokens"] == 5
    names = {metric.name for metric in collector.metrics[0].resource_metrics[0].scope_metrics[0].metrics}
    assert names == {"http.server.request.duration"}
    assert not collector.logs
    assert {headers["authorization"] for headers in collector.headers} == {"Bearer collector-token"}


def test_metrics_are_exported_only_when_they_are_asked_for(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    telemetry = Telemetry(service_version="1")
    telemetry.begin(route=ROUTE).end(200)
    telemetry.close()
    assert len(collector.traces) == 1
    assert not collector.metrics


def alive(*kinds: type) -> list[object]:
    """All objects of these kinds; by `type`, because asking some of torch's for their class makes them warn."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


@pytest.mark.parametrize("trouble", ["refused", "silent", "503", "slow"])
def test_a_collector_in_trouble_costs_no_request_time_and_memory_is_bounded(
    trouble: str, dead_url: str, silent_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans and events alike: what cannot be sent waits in a queue of 64, and then the oldest goes."""
    for queue in ("BSP", "BLRP"):
        monkeypatch.setenv(f"OTEL_{queue}_MAX_QUEUE_SIZE", "64")
        monkeypatch.setenv(f"OTEL_{queue}_MAX_EXPORT_BATCH_SIZE", "32")
    with Collector(status=503 if trouble == "503" else 200, holds=trouble == "slow") as collector:
        url = {"refused": dead_url, "silent": silent_url}.get(trouble, collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        telemetry = Telemetry(service_version="1")
        others = {id(thing) for thing in alive(ReadableSpan, LogRecord)}
        seconds = []
        for turn in range(300):
            started = time.thread_time()
            trace = telemetry.begin(route=ROUTE)
            trace.end(200)
            telemetry.evaluated(genai.Evaluation("feedback", 1.0, "positive"))
            if turn == 150 and trouble in ("503", "slow"):
                assert collector.asked.wait(10), "it was asked while requests went on"
            seconds.append(time.thread_time() - started)
        kept = [thing for thing in alive(ReadableSpan, LogRecord) if id(thing) not in others]
        assert len(kept) <= 2 * (64 + 32 + 2)
        assert sorted(seconds)[-3] < 0.5  # In one or two all the garbage of the process may be collected.
        watch = Stopwatch()
        telemetry.close(deadline_seconds=0.2)
        assert watch.seconds < 2.0


def test_the_notes_of_a_request_that_did_not_fail_are_gone_with_it(
    dead_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{dead_url}/v1/traces")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    telemetry = Telemetry(service_version="1")
    others = {id(thing) for thing in alive(NotedSpan)}
    for _ in range(100):
        trace = telemetry.begin(route=ROUTE)
        trace.span("work").end()
        trace.end(200)
    assert len([thing for thing in alive(NotedSpan) if id(thing) not in others]) <= 2
    telemetry.close(deadline_seconds=0.2)


async def test_shutting_down_waits_for_a_silent_collector_no_longer_than_the_deadline(
    silent_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{silent_url}/v1/traces")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    telemetry = Telemetry(service_version="1")
    telemetry.begin(route=ROUTE).end(200)
    watch = Stopwatch()
    await telemetry.aclose(deadline_seconds=0.2)
    assert watch.seconds < 0.8


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"},
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318",
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
        },
    ],
)
def test_nothing_is_traced_when_nothing_is_exported(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    telemetry = Telemetry(service_version="1")
    assert isinstance(telemetry.tracer_provider, NoOpTracerProvider)
    assert not telemetry.begin(route=ROUTE).sampled
    assert not telemetry.tells_evaluations
    telemetry.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_LOGS_EXPORTER", "console"),
    ],
)
def test_an_exporter_that_is_not_supported_is_refused_at_start_by_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv(name, value)
    with pytest.raises(ExporterMisconfigured, match=f"{name}='{value}'"):
        Telemetry(service_version="1")


@pytest.mark.parametrize("signal", ["BSP", "BLRP"])
@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("MAX_QUEUE_SIZE", "256", "{0}_MAX_EXPORT_BATCH_SIZE must be less than or equal to {0}_MAX_QUEUE_SIZE"),
        ("MAX_QUEUE_SIZE", "0", "{0}_MAX_QUEUE_SIZE must"),
        ("MAX_EXPORT_BATCH_SIZE", "4096", "{0}_MAX_EXPORT_BATCH_SIZE must"),
        ("SCHEDULE_DELAY", "-1", "{0}_SCHEDULE_DELAY must"),
    ],
)
def test_a_queue_that_cannot_be_is_refused_at_start_by_its_variables(
    signal: str, name: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv(f"OTEL_{signal}_{name}", value)
    with pytest.raises(ExporterMisconfigured, match=named.format(f"OTEL_{signal}")):
        Telemetry(service_version="1")


def test_an_explicit_http_protobuf_protocol_is_accepted(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    telemetry = Telemetry(service_version="1")
    telemetry.begin(route=ROUTE).end(200)
    telemetry.close()
    assert len(collector.traces) == 1
