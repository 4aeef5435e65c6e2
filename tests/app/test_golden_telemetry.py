"""All that one answered question sends to a collector, name by name: a change of any of them shows in the diff.

Set `HALLMARK_GOLDEN=write` for one run to write the files anew; read the diff, and say in the commit why it changed.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from app.releases import RetrievalPlan
from observability.genai import Evaluation
from observability.telemetry import Telemetry
from observability.traces import Profile
from retrieval.documents import Hit, Passage, Scope, SearchMode, SearchResult
from tests.collector import Collector
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import live_gateway

GOLDEN = Path(__file__).parent / "golden"
PASSAGE = "The kettle boils one litre of water in 90 seconds."
QUESTION = "How fast does the kettle boil a litre?"
CONVERSATION = "Conversation of Mrs Xq-7f3a"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Kettle:
    """A search that finds one passage."""

    async def search(
        self, scope: Scope, query: str, *, top_k: int = 5, mode: SearchMode = "hybrid", **_: Any
    ) -> SearchResult:
        passage = Passage("doc", "0" * 64, 1, PASSAGE, 0, len(PASSAGE))
        hit = Hit(passage, 1.0, dense_rank=1, dense_score=0.9)
        return SearchResult((hit,), "index-1", 0.002, 0.003, "minilm")

    async def similarity(self, text: str, texts: list[str]) -> list[float]:
        return [0.9] * len(texts)


@pytest.mark.parametrize("profile", get_args(Profile))
async def test_the_telemetry_of_one_answer_is_as_the_golden_file_has_it(
    tmp_path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=team")
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
        telemetry = Telemetry(service_version="1", profile=profile)
        async with (
            FakeTGI(Tokens("The kettle boils one litre of water", " in 90 seconds.")) as tgi,
            live_gateway(
                tmp_path, engine_url=tgi.url, search=Kettle(), plan=RetrievalPlan(), telemetry=telemetry
            ) as live,
        ):
            live.api.client.headers.update({"x-conversation-id": CONVERSATION, "traceparent": CALLER})
            stream = await live.api.stream(QUESTION, user="anna", stop=["Xq-7f3a"], seed=7)
            assert stream.done
            (record,) = await live.records()
            told = Evaluation(
                "feedback.helpful", 1.0, "positive", "end_user", record.id, CONVERSATION, record.trace_id, True, 10**18
            )
            telemetry.evaluated(told)
        found = _as_told(collector)
        assert {headers["content-encoding"] for headers in collector.headers} == {"gzip"}
        assert {headers["x-tenant"] for headers in collector.headers} == {"team"}
        sent = "".join(map(str, [*collector.traces, *collector.metrics, *collector.logs]))
    for content in ("kettle", "Xq-7f3a", "anna"):
        assert content not in sent
    spans = found["spans"]
    assert spans[f"chat {record.base_model or 'hallmark'}"]["id"] == "the prediction's"
    assert tgi.requests[-1].headers["traceparent"].endswith("-01")
    golden = GOLDEN / f"telemetry-{profile}.json"
    if os.environ.get("HALLMARK_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(golden.read_text())


def _as_told(collector: Collector) -> dict[str, Any]:
    """What was sent, with ids and times put into words."""
    spans = [
        span
        for request in collector.traces
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (events,) = [
        scope.log_records
        for request in collector.logs
        for resource in request.resource_logs
        for scope in resource.scope_logs
    ]
    metrics = [
        metric
        for request in collector.metrics[-1:]
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    ]
    names = {span.span_id: _key(span) for span in spans}
    (chat,) = [span for span in spans if span.name.startswith("chat ")]
    response = dict(_told(chat.attributes))["gen_ai.response.id"]
    return {
        "spans": {_key(span): _span(span, names, response) for span in spans},
        "events": [
            {
                "name": event.event_name,
                "parent": names[event.span_id],
                "is_in_the_trace": event.trace_id == chat.trace_id,
                "at": event.time_unix_nano,
                "attributes": _normal(event.attributes, response),
            }
            for event in events
        ],
        "metrics": {metric.name: _metric(metric) for metric in metrics},
    }


def _key(span: Span) -> str:
    step = dict(_told(span.attributes)).get("hallmark.record.step")
    return f"{span.name} {step}" if step else span.name


def _span(span: Span, names: dict[bytes, str], response: Any) -> dict[str, Any]:
    own = span.span_id.hex() == str(response).replace("-", "")[16:]
    return {
        "kind": Span.SpanKind.Name(span.kind),
        "id": "the prediction's" if own else "random",
        "parent": names.get(span.parent_span_id, "the caller's"),
        "attributes": _normal(span.attributes, response),
        "events": [event.name for event in span.events],
        "status": span.status.code,
        "is_in_order": span.start_time_unix_nano <= span.end_time_unix_nano,
    }


def _metric(metric: Any) -> dict[str, Any]:
    kind = metric.WhichOneof("data")
    points = getattr(metric, kind).data_points
    told = [
        {
            "attributes": _normal(point.attributes, None),
            **(
                {"count": point.count, "bounds": " ".join(map(str, point.explicit_bounds))}
                if kind == "histogram"
                else {}
            ),
            **({"value": point.as_int} if kind == "sum" else {}),
        }
        for point in points
    ]
    return {"unit": metric.unit, "kind": kind, "points": sorted(told, key=json.dumps)}


def _value(point: Any, kind: str) -> dict[str, Any]:
    if kind == "sum":
        return {"value": point.as_int}
    return {"count": point.count, "bounds": " ".join(map(str, point.explicit_bounds))}


def _normal(attributes: Iterable[KeyValue], response: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in _told(attributes):
        if response is not None and value == response:
            found[name] = "the prediction's id"
        elif name in ("server.port", "hallmark.check.seconds", "gen_ai.response.time_to_first_chunk"):
            found[name] = type(value).__name__
        else:
            found[name] = value
    return found


def _told(attributes: Iterable[KeyValue]) -> Iterable[tuple[str, Any]]:
    for each in attributes:
        yield each.key, _plain(each.value)


def _plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return [_plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)
