"""What is said of answers, as a collector hears of it: ids and scores, no words, and at nobody's expense."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from app.errors import Unavailable
from app.evaluations import Evaluations, evaluation
from app.feedback import Feedback, Label
from app.predictions import Traced, uuid7
from observability.genai import Evaluation
from tests.collector import Collector
from tests.fake_tgi import FakeTGI
from tests.service import Api, live_service, until

CANARY = "the patient Xq-7f3a"
ABOUT = Traced("0af7651916cd43dd8448eb211c80319c", True, "refund")
FACTS: dict[str, Any] = {
    "id": "f",
    "revision": 1,
    "tenant": "default",
    "prediction_id": "019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55",
    "author": CANARY,
    "comment": CANARY,
    "withdrawn": False,
    "key_id": "k",
    "at": 5,
    "said_at": 4,
    "idempotency_key": None,
}


def feedback(**said: Any) -> Feedback:
    given = {"conversation": None, "source": "end_user", "category": None, "rating": None, **said}
    return Feedback(**FACTS | {"correction": CANARY, "metadata": {"a": CANARY}} | given)


def label(**said: Any) -> Label:
    given = {"source": "reviewer", "class_name": None, "answer": CANARY, "passages": None, **said}
    return Label(**FACTS | {"policy": None, "sampling_probability": None} | given)


@pytest.mark.parametrize(
    ("said", "about", "told"),
    [
        (feedback(rating=True), ABOUT, ("feedback", 1.0, "positive")),
        (feedback(rating=False, category="tone"), ABOUT, ("feedback.tone", 0.0, "negative")),
        (feedback(rating=3.5, category=CANARY), ABOUT, ("feedback.other", 3.5, None)),
        (feedback(), ABOUT, ("feedback", None, "text")),
        (feedback(rating=True, withdrawn=True), ABOUT, ("feedback", None, "withdrawn")),
        (label(class_name="refund"), ABOUT, ("label", 1.0, "correct")),
        (label(class_name="other"), ABOUT, ("label", 0.0, "incorrect")),
        (label(class_name="refund"), Traced(), ("label", None, "stated")),
        (label(), ABOUT, ("label", None, "stated")),
        (label(class_name="refund", withdrawn=True), ABOUT, ("label", None, "withdrawn")),
    ],
)
def test_a_score_is_told_and_no_word(said: Feedback | Label, about: Traced, told: tuple[Any, ...]) -> None:
    made = evaluation(said, about)
    assert (made.name, made.value, made.label) == told
    assert (made.prediction_id, made.trace_id, made.said_ns) == (said.prediction_id, about.trace_id, 4_000_000)
    assert "7f3a" not in repr(made._replace(conversation=None))


class Told:
    """An exporter that remembers."""

    tells_evaluations = True

    def __init__(self) -> None:
        self.heard: list[Evaluation] = []

    def evaluated(self, evaluation: Evaluation) -> None:
        self.heard.append(evaluation)


class Records:
    """Predictions and labels on record; the database is away for the tenant `away`, and hangs for `slow`."""

    async def traced(self, tenant: str, prediction_id: str) -> Traced | None:
        if tenant == "away":
            raise Unavailable("away")
        if tenant == "slow":
            await asyncio.Event().wait()
        return ABOUT

    async def get(self, tenant: str, label_id: str) -> Label:
        return label(id=label_id)


async def test_a_database_that_is_away_loses_an_event_and_not_the_next() -> None:
    told, records = Told(), Records()
    async with Evaluations(told, records, records) as evaluations:
        evaluations.reviewed("default", None)
        for tenant in ("away", "default"):
            evaluations._put(feedback(rating=True, tenant=tenant))
        evaluations.reviewed("default", "l")

        async def both() -> bool:
            return len(told.heard) == 2

        await until(both)
    assert [each.name for each in told.heard] == ["feedback", "label"]
    assert evaluations.dropped == 1


async def test_what_waits_for_a_database_that_hangs_is_bounded_and_closing_does_not_wait() -> None:
    told, records = Told(), Records()
    async with Evaluations(told, records, records, capacity=10) as evaluations:
        for _ in range(2):
            evaluations._put(feedback(rating=True, tenant="slow"))
            await asyncio.sleep(0)  # Until the first one hangs.
        for _ in range(100):
            evaluations._put(feedback(rating=True, tenant="slow"))
        assert evaluations.dropped == 91
    assert not told.heard


@pytest.fixture
async def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Api, Collector]]:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "20")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        async with FakeTGI() as tgi, live_service(tmp_path, engine_url=tgi.url) as service, service.client() as client:
            yield Api(client, "default", service.key), collector


def events(collector: Collector) -> list[LogRecord]:
    return [
        event
        for request in collector.logs
        for resource in request.resource_logs
        for scope in resource.scope_logs
        for event in scope.log_records
    ]


async def test_feedback_and_labels_reach_the_collector_below_the_span_of_their_answer(
    heard: tuple[Api, Collector],
) -> None:
    api, collector = heard
    await api.answer("What is a release?")
    record = await api.record()
    about = {"prediction_id": record["id"]}
    first = (await api.client.post("/v1/feedback", json={**about, "rating": True, "comment": CANARY})).json()
    await api.client.post("/v1/labels", json={**about, "answer": CANARY})
    await api.client.delete(f"/v1/feedback/{first['id']}")
    await api.client.post("/v1/feedback", json={"conversation": CANARY, "rating": 3.5})
    unknown = uuid7()
    await api.client.post("/v1/feedback", json={"prediction_id": unknown, "rating": False})
    # What FastAPI's own span says of a query is not for everybody: the signature of a link opens a passage.
    await api.client.get("/v1/feedback", params={"conversation": CANARY})

    async def all_there() -> bool:
        spans = str(collector.traces)
        return len(events(collector)) == 5 and "GET /v1/feedback" in spans and "chat hallmark" in spans

    await until(all_there)
    told = [
        (event.event_name, {item.key: item.value.string_value for item in event.attributes})
        for event in events(collector)
    ]
    assert {name for name, _ in told} == {"gen_ai.evaluation.result"}
    assert [(facts["gen_ai.evaluation.name"], facts.get("gen_ai.evaluation.score.label")) for _, facts in told] == [
        ("feedback", "positive"),
        ("label", "stated"),
        ("feedback", "withdrawn"),
        ("feedback", None),
        ("feedback", "negative"),
    ]
    (chat,) = [
        span
        for request in collector.traces
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.name == "chat hallmark"
    ]
    for event in events(collector)[:3]:
        assert (event.trace_id, event.span_id) == (chat.trace_id, chat.span_id)
    conversation, not_yet = events(collector)[3:]
    assert not conversation.trace_id
    assert not not_yet.trace_id
    assert told[4][1]["gen_ai.response.id"] == unknown
    sent = f"{collector.traces}{collector.logs}"
    assert "url.query" in sent
    assert "7f3a" not in sent
