"""A request's trace: joined, sampled before it is built, ended once, named as FastAPI names its own."""

from collections.abc import Sequence

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from observability.telemetry import Telemetry

CALLER = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED_CALLER = CALLER[:-2] + b"00"
ROUTE = "/v1/chat/completions"
SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "scheme": "http",
    "path": ROUTE,
    "headers": [(b"host", b"gateway.example:8080")],
    "server": ("127.0.0.1", 8080),
}

Traced = tuple[Telemetry, InMemorySpanExporter]


class CountingProcessor(SpanProcessor):
    """Counts the spans that were built at all."""

    def __init__(self) -> None:
        self.started = 0

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.started += 1


class FailingProcessor(SpanProcessor):
    """A foreign processor with a bug."""

    def __init__(self, method: str) -> None:
        self.method = method

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if self.method == "on_start":
            raise RuntimeError("bug")

    def on_end(self, span: ReadableSpan) -> None:
        if self.method == "on_end":
            raise RuntimeError("bug")


@pytest.fixture
def traced() -> Traced:
    exporter = InMemorySpanExporter()
    return Telemetry(service_version="1.2.3", span_processor=SimpleSpanProcessor(exporter)), exporter


def names(spans: Sequence[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def test_the_server_span_has_the_names_and_types_of_the_http_conventions(traced: Traced) -> None:
    telemetry, exporter = traced
    telemetry.begin(None, route=ROUTE, scope=SCOPE).end(200)
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/chat/completions"
    assert span.kind is SpanKind.SERVER
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": ROUTE,
        "network.protocol.version": "1.1",
        "server.address": "gateway.example",
        "server.port": 8080,
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_the_server_span_says_what_fastapis_own_span_says(traced: Traced) -> None:
    telemetry, exporter = traced
    app = FastAPI(
        telemetry={
            "tracer_provider": telemetry.tracer_provider,
            "meter_provider": telemetry.meter_provider,
            "operation_spans": False,
            "logs": False,
        }
    )

    @app.post(ROUTE)
    async def chat() -> str:
        return "x"

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway.example:8080") as client:
        await client.post(ROUTE, headers={"traceparent": CALLER.decode()})
    telemetry.begin(CALLER, route=ROUTE, scope=SCOPE).end(200)
    theirs, ours = exporter.get_finished_spans()
    assert ours.name == theirs.name
    assert ours.kind == theirs.kind
    assert ours.attributes == theirs.attributes
    assert ours.parent == theirs.parent


def test_a_valid_traceparent_is_joined(traced: Traced) -> None:
    telemetry, exporter = traced
    trace = telemetry.begin(CALLER, route=ROUTE)
    outgoing = trace.traceparent
    trace.end(200)
    (span,) = exporter.get_finished_spans()
    assert trace.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert span.parent is not None
    assert span.parent.span_id == 0xB7AD6B7169203331
    assert span.parent.is_remote
    assert outgoing.startswith(f"00-{trace.trace_id}-{span.context.span_id:016x}-")
    assert int(outgoing[-2:], 16) & 1


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"nonsense",
        b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01",
        b"ff" + CALLER[2:],
        CALLER + b"-more",
        b"\xff\xfe",
    ],
)
def test_an_invalid_traceparent_begins_a_trace_of_its_own(traced: Traced, header: bytes) -> None:
    telemetry, _ = traced
    trace = telemetry.begin(header, route=ROUTE)
    assert len(trace.trace_id) == 32
    assert trace.trace_id not in {"0af7651916cd43dd8448eb211c80319c", "0" * 32}


@given(st.binary(max_size=80))
def test_no_traceparent_header_makes_begin_raise(header: bytes) -> None:
    trace = Telemetry(service_version="1").begin(header, route=ROUTE)
    assert len(trace.trace_id) == 32
    assert int(trace.trace_id, 16) > 0


def test_without_an_exporter_the_callers_trace_is_passed_on_unchanged() -> None:
    trace = Telemetry(service_version="1").begin(CALLER, route=ROUTE)
    assert not trace.sampled
    assert trace.traceparent == CALLER.decode()


def test_without_an_exporter_a_request_still_has_valid_ids() -> None:
    trace = Telemetry(service_version="1").begin(route=ROUTE)
    version, trace_id, span_id, flags = trace.traceparent.split("-")
    assert (version, trace_id, flags) == ("00", trace.trace_id, "00")
    assert int(trace_id, 16) > 0
    assert int(span_id, 16) > 0
    assert trace.traceparent == trace.traceparent
    assert trace.span_id == ""


def test_an_unsampled_request_builds_no_span_but_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    processor, reader = CountingProcessor(), InMemoryMetricReader()
    telemetry = Telemetry(service_version="1", span_processor=processor, metric_reader=reader)
    trace = telemetry.begin(route=ROUTE, scope=SCOPE)
    span = trace.span("work")
    assert not trace.sampled
    span.set("a", 1)
    span.event("b")
    span.end()
    trace.end(404, error="model_not_found")
    trace.end(200)
    assert processor.started == 0
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    assert metric.name == "http.server.request.duration"
    assert metric.unit == "s"
    assert point.count == 1
    assert dict(point.attributes) == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "http.response.status_code": 404,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
    }


def test_the_callers_decision_not_to_sample_is_followed(traced: Traced) -> None:
    telemetry, exporter = traced
    trace = telemetry.begin(UNSAMPLED_CALLER, route=ROUTE)
    trace.end(200)
    version, trace_id, span_id, flags = trace.traceparent.split("-")
    assert (version, trace_id, flags) == ("00", trace.trace_id, "00")
    assert span_id != UNSAMPLED_CALLER.decode().split("-")[2], "ours, which is the parent if the request is kept"
    assert trace.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert not exporter.get_finished_spans()


def test_the_ratio_sampler_keeps_its_share_and_the_ids_it_decided_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    exporter = InMemorySpanExporter()
    telemetry = Telemetry(service_version="1", span_processor=SimpleSpanProcessor(exporter))
    traces = [telemetry.begin(route=ROUTE) for _ in range(2000)]
    sampled = {trace.trace_id for trace in traces if trace.sampled}
    for trace in traces:
        trace.end(200)
    assert 400 < len(sampled) < 600
    assert {f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans()} == sampled
    assert all(int(trace_id[16:], 16) < 2**62 for trace_id in sampled)


def test_children_hang_below_the_span_they_name(traced: Traced) -> None:
    telemetry, exporter = traced
    trace = telemetry.begin(route=ROUTE)
    outer = trace.span("outer", SpanKind.CLIENT, {"n": 1})
    inner = trace.span("inner", parent=outer)
    header = trace.traceparent_under(outer)
    inner.end()
    outer.end()
    trace.end(200)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert names(exporter.get_finished_spans()) == ["inner", "outer", f"POST {ROUTE}"]
    assert spans["inner"].parent == spans["outer"].context
    assert spans["outer"].parent == spans[f"POST {ROUTE}"].context
    assert spans["outer"].attributes == {"n": 1}
    assert f"{spans['outer'].context.span_id:016x}" in header


def test_a_span_ends_exactly_once_and_keeps_its_first_end(traced: Traced) -> None:
    telemetry, exporter = traced
    trace = telemetry.begin(route=ROUTE)
    span = trace.span("work")
    span.end(error="first")
    span.end(error="second")
    span.set("late", 1)
    trace.end(500)
    trace.end(200)
    work, server = exporter.get_finished_spans()
    assert work.attributes == {"error.type": "first"}
    assert server.attributes is not None
    assert server.attributes["http.response.status_code"] == 500


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (502, "engine_garbage", "engine_garbage"),
        (200, "engine_interrupted", "engine_interrupted"),
        (200, TimeoutError("secret"), "TimeoutError"),
        (500, None, "500"),
        (None, None, "incomplete_response"),
    ],
)
def test_an_error_is_named_by_its_type_and_its_message_left_out(
    traced: Traced, status: int | None, error: str | BaseException | None, expected: str
) -> None:
    telemetry, exporter = traced
    telemetry.begin(route=ROUTE).end(status, error=error)
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["error.type"] == expected
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert not span.events


def test_a_client_error_is_not_an_error_of_the_server(traced: Traced) -> None:
    telemetry, exporter = traced
    telemetry.begin(route=ROUTE).end(404, error="model_not_found")
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.UNSET
    assert "error.type" not in (span.attributes or {})


@pytest.mark.parametrize("method", ["on_start", "on_end"])
def test_a_failing_span_processor_fails_no_request(method: str) -> None:
    telemetry = Telemetry(service_version="1", span_processor=FailingProcessor(method))
    trace = telemetry.begin(CALLER, route=ROUTE)
    span = trace.span("work")
    span.end()
    trace.end(200)
    assert trace.trace_id == "0af7651916cd43dd8448eb211c80319c"


async def test_an_ordinary_route_finds_the_span_that_fastapi_opened(traced: Traced) -> None:
    telemetry, exporter = traced
    app = FastAPI(telemetry={"tracer_provider": telemetry.tracer_provider, "operation_spans": False})

    @app.post("/v1/search")
    async def search() -> str:
        trace = telemetry.current()
        trace.span("work").end()
        trace.end(200)
        trace.span("after the end").end()
        return trace.trace_id

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        trace_id = (await client.post("/v1/search")).json()
    work, server = exporter.get_finished_spans()
    assert names([work, server]) == ["work", "POST /v1/search"]
    assert work.parent == server.context
    assert trace_id == f"{server.context.trace_id:032x}"


def test_outside_any_span_the_current_trace_is_a_new_one(traced: Traced) -> None:
    telemetry, exporter = traced
    trace = telemetry.current()
    trace.span("work").end()
    assert int(trace.trace_id, 16) > 0
    assert not exporter.get_finished_spans()


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({"headers": [(b"host", b"a.example")]}, ("a.example", 80)),
        ({"headers": [(b"host", b"a.example")], "scheme": "https"}, ("a.example", 443)),
        ({"headers": [(b"host", b"[::1]:99")]}, ("::1", 99)),
        ({"headers": [(b"host", b"a:b:c")]}, (None, None)),
        ({"headers": [], "server": ("127.0.0.1", 7)}, ("127.0.0.1", 7)),
        ({"headers": [], "server": None}, (None, None)),
    ],
)
def test_the_server_address_comes_from_the_host_header_or_the_socket(
    traced: Traced, scope: dict[str, object], expected: tuple[object, object]
) -> None:
    telemetry, exporter = traced
    telemetry.begin(route=ROUTE, scope=scope).end(200)
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert (span.attributes.get("server.address"), span.attributes.get("server.port")) == expected


def test_resource_attributes_of_the_environment_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.version=9")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named-by-operator")
    exporter = InMemorySpanExporter()
    telemetry = Telemetry(service_version="1", instance_id="i-1", span_processor=SimpleSpanProcessor(exporter))
    telemetry.begin(route=ROUTE).end(200)
    resource = exporter.get_finished_spans()[0].resource.attributes
    assert resource["service.name"] == "named-by-operator"
    assert resource["service.version"] == "9"
    assert resource["service.instance.id"] == "i-1"
    assert resource["deployment.environment.name"] == "test"
