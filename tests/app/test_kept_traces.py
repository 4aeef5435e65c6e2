"""What the sampler leaves out and is exported all the same: requests that failed, and those of a canary."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI, Response
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from app.prompts import ANSWER_PROMPT
from app.releases import Release, Releases, RetrievalPlan
from app.rollouts import Rollout
from observability.telemetry import Telemetry
from tests.app.test_golden_telemetry import CALLER, QUESTION, Kettle
from tests.fake_tgi import FakeTGI, Refuse, Tokens
from tests.service import live_gateway, until

ANSWER = Tokens("The kettle boils one litre of water", " in 90 seconds.")
UNSAMPLED_CALLER = f"{CALLER[:-2]}00"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Where spans go of which the sampler takes none."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


def telemetry_to(exporter: InMemorySpanExporter, **options: Any) -> Telemetry:
    return Telemetry(service_version="1", span_processor=SimpleSpanProcessor(exporter), **options)


async def ended(exporter: InMemorySpanExporter, count: int) -> dict[str, ReadableSpan]:
    async def enough() -> bool:
        return len(exporter.get_finished_spans()) >= count

    await until(enough)
    found = exporter.get_finished_spans()
    assert len(found) == count, [span.name for span in found]
    return {span.name: span for span in found}


async def test_of_requests_that_are_not_sampled_only_the_failed_one_is_exported_and_as_a_whole(
    tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    reader = InMemoryMetricReader()
    telemetry = telemetry_to(spans, metric_reader=reader)
    async with (
        FakeTGI() as tgi,
        live_gateway(tmp_path, engine_url=tgi.url, search=Kettle(), plan=RetrievalPlan(), telemetry=telemetry) as live,
    ):
        tgi.script(ANSWER, Refuse.failed(), ANSWER)
        await live.api.answer(QUESTION)
        assert (await live.api.ask([{"role": "user", "content": 7}])).status_code == 400
        live.api.client.headers["traceparent"] = UNSAMPLED_CALLER
        assert (await live.api.ask(QUESTION)).status_code == 502
        await live.api.answer(QUESTION)
        found = await ended(spans, 5)
        records = await live.records(3)
    server, chat = found["POST /v1/chat/completions"], found["chat hallmark"]
    assert {span.context.trace_id for span in found.values()} == {int(CALLER.split("-")[1], 16)}
    assert server.parent is not None
    assert server.parent.span_id == int(CALLER.split("-")[2], 16)
    assert (
        dict(server.attributes or {}).items()
        >= {
            "http.response.status_code": 502,
            "error.type": "engine_error",
            "http.route": "/v1/chat/completions",
        }.items()
    )
    assert found["retrieval hallmark"].parent == server.context
    assert chat.parent == server.context
    assert (chat.attributes or {})["error.type"]
    failed = next(record for record in records if record.outcome == "failed")
    assert chat.context.span_id == int(failed.id.replace("-", "")[16:], 16)
    # The engine was told the id that the span has now, and that it would not be exported: nobody knew yet.
    headers = [request.headers["traceparent"] for request in tgi.requests if "traceparent" in request.headers]
    assert headers[1] == f"00-{failed.trace_id}-{chat.context.span_id:016x}-00"
    # What the search says of itself is not measured here: it would be of this one invented.
    for span in (found["retrieval hallmark"], chat):
        assert span.start_time is not None
        assert span.end_time is not None
        assert (server.start_time or 0) <= span.start_time <= span.end_time <= (server.end_time or 0)
    counted = _counts(reader)
    assert counted["http.server.request.duration"] == 4
    assert counted["gen_ai.client.operation.duration"] == 3 + 3 + 3, "calls, searches and embeddings, sampled or not"


async def test_a_stream_that_breaks_off_is_kept_though_its_status_is_200(
    tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    async with (
        FakeTGI(Tokens("Hello", ".", cut_after=1)) as tgi,
        live_gateway(tmp_path, engine_url=tgi.url, telemetry=telemetry_to(spans)) as live,
    ):
        assert not (await live.api.stream(QUESTION)).done
        found = await ended(spans, 3)
    assert (found["POST /v1/chat/completions"].attributes or {})["error.type"] == "engine_interrupted"
    assert [event.name for event in found["chat hallmark"].events] == ["hallmark.first_token"]


async def test_a_canarys_requests_are_exported_and_the_engine_is_told_so(
    tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    stable = Release("hallmark", 1, "tgi", ANSWER_PROMPT, RetrievalPlan())
    releases = Releases(stable)
    canary = msgspec.structs.replace(stable, number=2)
    releases.replace([stable, canary], [Rollout(name="hallmark", revision=1, stable=1, canary=2, share=1.0)])
    # With failures left out, to show that a canary's is kept by itself.
    telemetry = telemetry_to(spans, keep_failures=False)
    async with (
        FakeTGI() as tgi,
        live_gateway(tmp_path, engine_url=tgi.url, telemetry=telemetry, releases=releases) as live,
    ):
        tgi.script(ANSWER, Refuse.failed())
        answered = await live.api.ask(QUESTION)
        assert answered.headers["x-release"] == "hallmark@2"
        assert (await live.api.ask(QUESTION, model="hallmark@1")).status_code == 502
        found = await ended(spans, 3)
    assert (found["chat hallmark"].attributes or {})["hallmark.release"] == "hallmark@2"
    first = next(request.headers["traceparent"] for request in tgi.requests if "traceparent" in request.headers)
    assert int(first[-2:], 16) & 1
    assert first.split("-")[2] == f"{found['chat hallmark'].context.span_id:016x}"


async def test_of_an_ordinary_route_the_server_span_of_a_failure_is_exported(spans: InMemorySpanExporter) -> None:
    telemetry = telemetry_to(spans)
    app = FastAPI(telemetry={"tracer_provider": telemetry.tracer_provider, "operation_spans": False, "logs": False})
    seen: list[str] = []

    @app.get("/v1/things/{name}")
    async def thing(name: str) -> Response:
        trace = telemetry.current()
        seen.append(trace.trace_id)
        trace.span("work").end()
        return Response(status_code=503 if name == "bad" else 200)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for name, caller in (("good", UNSAMPLED_CALLER), ("bad", UNSAMPLED_CALLER), ("bad", "")):
            await client.get(f"/v1/things/{name}?q=secret", headers={"traceparent": caller})
    joined, own = spans.get_finished_spans()
    assert [f"{span.context.trace_id:032x}" for span in (joined, own)] == seen[1:]
    assert joined.parent is not None
    assert own.parent is None
    for span in (joined, own):
        assert (span.name, span.kind, span.status.status_code) == (
            "GET /v1/things/{name}",
            SpanKind.SERVER,
            StatusCode.ERROR,
        )
        assert span.end_time is not None
        assert (span.start_time or 0) < span.end_time
        assert (span.attributes or {})["url.path"] == "/v1/things/bad"
        assert (span.attributes or {})["url.query"] == "REDACTED"
        assert "secret" not in span.to_json()


@pytest.mark.parametrize("sampler", ["always_off", "parentbased_always_off"])
def test_who_turns_tracing_off_gets_no_span_of_a_failure(
    spans: InMemorySpanExporter, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    trace = telemetry_to(spans).begin(route="/v1/chat/completions")
    trace.keep()
    trace.end(500)
    assert not spans.get_finished_spans()


def test_what_is_noted_of_one_request_is_bounded(spans: InMemorySpanExporter) -> None:
    trace = telemetry_to(spans).begin(route="/v1/chat/completions")
    for _ in range(1_000):
        trace.span("work").end()
    trace.end(500)
    assert len(spans.get_finished_spans()) == 101


def test_the_spans_of_others_do_not_get_the_ids_of_one_that_was_kept(spans: InMemorySpanExporter) -> None:
    telemetry = telemetry_to(spans)
    kept = telemetry.begin(CALLER[:-2].encode() + b"00", route="/v1/chat/completions")
    kept.end(500)
    other = telemetry.begin(route="/v1/chat/completions")
    other.end(500)
    first, second = spans.get_finished_spans()
    assert first.context.trace_id != second.context.trace_id
    assert first.context.span_id != second.context.span_id


def _counts(reader: InMemoryMetricReader) -> dict[str, int]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: sum(getattr(point, "count", 0) for point in metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
