"""What a search or an embedding leaves in its trace when it fails in a way nobody foresaw."""

from dataclasses import fields
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Receive, Scope, Send

from app.access import Caller
from app.links import PassageLinks
from app.main import VERSION
from app.readiness import Readiness
from app.routes.api import create_api
from app.routes.dependencies import Services
from observability.metrics import Metrics
from observability.telemetry import Telemetry

CALLER = Caller("key", "default", frozenset({"admin"}))


class BrokenRetriever:
    """A retriever with a defect."""

    embedding_model = "model"

    async def search(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    async def embed(self, texts: list[str]) -> Any:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/search", {"query": "kettle"}), ("/v1/embeddings", {"model": "model", "input": "kettle"})],
)
async def test_a_span_ends_even_with_a_defect_of_ours(path, body):
    spans = InMemorySpanExporter()
    telemetry = Telemetry(service_version="test", span_processor=SimpleSpanProcessor(spans))
    used = {
        "retriever": BrokenRetriever(),
        "defaults": {},
        "links": PassageLinks(b"secret"),
        "telemetry": telemetry,
        "metrics": Metrics(version="test", process=False),
        "readiness": Readiness({}),
        "embedding_names": lambda: ("model",),
        "collection": "hallmark",
        "max_document_bytes": 1_000,
        "open_metrics": False,
    }
    parts: dict[str, Any] = {field.name: used.get(field.name) for field in fields(Services)}
    api = create_api(VERSION, Services(**parts))

    async def admitted(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"caller": CALLER, "request_id": "id"}
        await api(scope, receive, send)

    transport = httpx.ASGITransport(admitted, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    await telemetry.aclose()
    ended = [span for span in spans.get_finished_spans() if span.kind.name != "SERVER"]
    assert ended
    assert {(span.attributes or {})["error.type"] for span in ended} == {"ZeroDivisionError"}
