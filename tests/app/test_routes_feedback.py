"""Feedback and labels through the service, as applications, reviewers and their retries use them."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.predictions import uuid7
from tests.fake_tgi import FakeTGI
from tests.postgres import Postgres
from tests.service import Api, Service, live_service

UNSEEN = "019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55"


@contextlib.asynccontextmanager
async def serve(directory: Path, **settings: Any) -> AsyncIterator[Service]:
    async with FakeTGI() as tgi, live_service(directory, engine_url=tgi.url, settings=settings, tenants=1) as service:
        yield service


@pytest.fixture
async def service(tmp_path: Path, shared: dict[str, Any]) -> AsyncIterator[Service]:
    async with serve(tmp_path / "data", **shared) as service:
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.client() as client:
        yield Api(client, "default", service.key)


async def give(api: Api, *, status: int = 201, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    if "conversation" not in body:
        body.setdefault("prediction_id", UNSEEN)
    response = await api.client.post("/v1/feedback", json=body, headers=headers)
    assert response.status_code == status, response.text
    return dict(response.json())


async def state(api: Api, *, status: int = 201, **body: Any) -> dict[str, Any]:
    response = await api.client.post("/v1/labels", json={"prediction_id": UNSEEN, **body})
    assert response.status_code == status, response.text
    return dict(response.json())


async def listed(api: Api, path: str = "feedback", **params: Any) -> list[dict[str, Any]]:
    response = await api.client.get(f"/v1/{path}", params=params)
    assert response.status_code == 200, response.text
    return list(response.json()["data"])


def told(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    return str(error["message"])


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


async def said(api: Api) -> dict[tuple[str, str], float]:
    """What `/metrics` has counted, by source and kind."""
    lines = (await api.client.get("/metrics")).text.splitlines()
    counts = {}
    for line in lines:
        if line.startswith("hallmark_feedback_total{"):
            labels, value = line.removeprefix("hallmark_feedback_total{").split("} ")
            parts = dict(part.split("=") for part in labels.split(","))
            counts[parts["source"].strip('"'), parts["kind"].strip('"')] = float(value)
    return counts


async def test_feedback_lives_from_the_answer_to_its_withdrawal(api, shared):
    answer = await api.answer("What is a hallmark?")
    given = await give(
        api, prediction_id=answer["id"], author="anna", rating=False, comment="No.", correction="A stamp."
    )
    assert given["prediction"] == "stored" or shared  # Another database has it a little later.
    assert (given["object"], given["revision"], given["source"], given["author"]) == ("feedback", 1, "end_user", "anna")
    path = f"/v1/feedback/{given['id']}"
    changed = (await api.client.patch(path, json={"author": "anna", "rating": 2, "comment": None})).json()
    assert (changed["revision"], changed["rating"], changed["comment"], changed["correction"]) == (
        2,
        2.0,
        None,
        "A stamp.",
    )
    shown = (await api.client.get(path)).json()
    assert {**shown, "history": None, "prediction": None} == {**changed, "history": None, "prediction": None}
    assert [each["said"].get("rating") for each in shown["history"]] == [False, 2.0]
    assert shown["history"][1]["said"] == {"rating": 2.0, "comment": None}
    gone = (await api.client.delete(path, params={"author": "anna"})).json()
    assert (gone["revision"], gone["withdrawn"]) == (3, True)
    assert await listed(api) == []
    assert [each["id"] for each in await listed(api, withdrawn=True)] == [given["id"]]
    assert await said(api) == {
        ("end_user", "negative"): 1,
        ("end_user", "change"): 1,
        ("end_user", "withdrawal"): 1,
    }


async def test_feedback_comes_before_its_prediction_and_years_after_it(api):
    early = await give(api, rating=True)
    assert (early["prediction"], early["prediction_id"]) == ("not_yet", UNSEEN)
    late = await give(api, author="anna", rating=True, said_at="2019-05-06T07:08:09.123+02:00")
    assert late["said_at"] == "2019-05-06T05:08:09.123000Z"
    assert (await give(api, conversation="chat 1", rating=True))["prediction"] is None


async def test_a_retry_gets_the_first_answer_and_counts_once(api):
    body = {"author": "anna", "rating": True, "metadata": {"page": 3}}
    headers = {"idempotency-key": "call-1"}
    first = await give(api, headers=headers, **body)
    again = await give(api, headers=headers, status=200, **body)
    assert again == await give(api, status=200, idempotency_key="call-1", **body) == first
    for other in ({"rating": False}, {"author": "ben"}, {"metadata": {"page": 4}}):
        response = await api.client.post(
            "/v1/feedback", json={"prediction_id": UNSEEN, **body, **other}, headers=headers
        )
        assert "another content" in told(response, 409, "conflict", "idempotency_key")
    response = await api.client.post(
        "/v1/feedback", json={"prediction_id": UNSEEN, **body, "idempotency_key": "call-2"}, headers=headers
    )
    told(response, 400, "invalid_request", "idempotency_key")
    assert await listed(api) == [{**first, "prediction": None}]
    assert await said(api) == {("end_user", "positive"): 1}


async def test_whoever_changes_their_mind_is_counted_once(api):
    first = await give(api, author="anna", rating=True)
    second = await give(api, author="anna", rating=False, status=200)
    assert (second["id"], second["revision"]) == (first["id"], 2)
    summary = (await api.client.get(f"/v1/predictions/{UNSEEN}/feedback")).json()
    (counts,) = summary["counts"]
    assert (counts["total"], counts["positive"], counts["negative"]) == (1, 0, 1)


async def test_calls_of_an_application_that_was_offline_may_come_in_any_order(api):
    await give(api, author="anna", withdrawn=True, said_at=ago(10))
    overtaken = await give(api, author="anna", rating=True, said_at=ago(20), status=200)
    assert overtaken["withdrawn"] is True
    assert await listed(api) == []
    await give(api, author="anna", rating=False, said_at=ago(5), status=200)
    assert [each["rating"] for each in await listed(api)] == [False]


async def test_only_the_author_or_an_administrator_may_change_it(service, api):
    given = await give(api, author="anna", rating=True)
    own = await give(api, rating=True)
    path, own_path = f"/v1/feedback/{given['id']}", f"/v1/feedback/{own['id']}"
    for body in ({"rating": False}, {"rating": False, "author": "ben"}):
        response = await api.client.patch(path, json=body)
        assert "another author" in told(response, 403, "insufficient_scope", "author")
    told(await api.client.delete(path), 403, "insufficient_scope", "author")
    async with (
        service.client(await service.new_key()) as other,
        service.client(await service.new_key(scopes=("admin",))) as admin,
    ):
        told(await other.delete(own_path), 403, "insufficient_scope", "author")
        told(await other.delete(own_path, params={"author": own["author"]}), 400, "invalid_request", "author")
        told(
            await other.post("/v1/feedback", json={"conversation": "c", "rating": True, "author": own["author"]}),
            *(400, "invalid_request", "author"),
        )
        assert (await other.patch(path, json={"author": "anna", "rating": 1})).json()["revision"] == 2
        assert (await admin.delete(own_path)).json()["withdrawn"] is True
        assert (await admin.patch(path, json={"comment": "spam"})).json()["author"] == "anna"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "prediction_id"),
    ({"prediction_id": UNSEEN, "conversation": "c", "rating": True}, "prediction_id"),
    ({"prediction_id": "7", "rating": True}, "prediction_id"),
    ({"prediction_id": UNSEEN}, "rating"),
    ({"prediction_id": UNSEEN, "rating": "good"}, "rating"),
    ({"prediction_id": UNSEEN, "rating": 1e16}, "rating"),
    ({"prediction_id": UNSEEN, "rating": True, "source": "me"}, "source"),
    ({"prediction_id": UNSEEN, "rating": True, "author": ""}, "author"),
    ({"prediction_id": UNSEEN, "rating": True, "stars": 5}, "stars"),
    ({"prediction_id": UNSEEN, "comment": "a\x00b"}, "comment"),
    ({"prediction_id": UNSEEN, "comment": "x" * 10_001}, "comment"),
    ({"prediction_id": UNSEEN, "correction": "x" * 100_001}, "correction"),
    ({"prediction_id": UNSEEN, "metadata": {"a": {"b": 1}}}, "metadata.a"),
    ({"prediction_id": UNSEEN, "rating": True, "idempotency_key": "with space"}, "idempotency_key"),
    ({"prediction_id": UNSEEN, "rating": True, "said_at": "yesterday"}, "said_at"),
    ({"prediction_id": UNSEEN, "rating": True, "said_at": 1_700_000_000}, "said_at"),
    ({"prediction_id": UNSEEN, "rating": True, "said_at": "2026-11-24T12:00:00"}, "said_at"),
    ({"prediction_id": UNSEEN, "rating": True, "said_at": "1969-12-31T23:59:59Z"}, "said_at"),
    ({"prediction_id": UNSEEN, "rating": True, "said_at": "2999-01-01T00:00:00Z"}, "said_at"),
    ({"prediction_id": UNSEEN, "withdrawn": True, "rating": True}, "rating"),
]


@pytest.mark.parametrize("shared", ["sqlite"], indirect=True)
async def test_a_mistake_names_its_field_and_writes_nothing(api):
    for body, param in MISTAKES:
        told(await api.client.post("/v1/feedback", json=body), 400, "invalid_request", param)
    assert await listed(api, withdrawn=True) == []


async def test_a_change_of_nothing_and_of_what_is_not_there_is_refused(api):
    given = await give(api, rating=True)
    path = f"/v1/feedback/{given['id']}"
    told(await api.client.patch(path, json={}), 400, "invalid_request", "rating")
    told(await api.client.patch(path, json={"category": "tone"}), 400, "invalid_request", "category")
    told(await api.client.patch(f"/v1/feedback/{UNSEEN}", json={"rating": True}), 404, "not_found")
    told(await api.client.delete(f"/v1/feedback/{UNSEEN}"), 404, "not_found")
    told(await api.client.get("/v1/feedback/7"), 400, "invalid_request", "feedback_id")


async def test_lists_are_filtered_and_paged(api):
    for number in range(5):
        await give(api, author=f"user {number}", rating=number, category="stars" if number % 2 else None)
    await give(api, conversation="chat 1", rating=True, source="application")
    page = (await api.client.get("/v1/feedback", params={"limit": 4})).json()
    assert [each["rating"] for each in page["data"]] == [True, 4, 3, 2]
    rest = (await api.client.get("/v1/feedback", params={"limit": 4, "before": page["next"]})).json()
    assert ([each["rating"] for each in rest["data"]], rest["next"]) == ([1, 0], None)
    assert [each["rating"] for each in await listed(api, category="stars")] == [3, 1]
    assert [each["rating"] for each in await listed(api, conversation="chat 1")] == [True]
    assert [each["rating"] for each in await listed(api, source="application")] == [True]
    assert len(await listed(api, prediction_id=UNSEEN, since=ago(100))) == 5
    assert await listed(api, since=ago(-100)) == []
    assert len(await listed(api, prediction_id=UNSEEN, since=f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}")) == 5
    assert await listed(api, since=f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%S}") == []
    told(await api.client.get("/v1/feedback", params={"since": "1700000000"}), 400, "invalid_request", "since")


async def test_a_label_is_stated_replaced_and_withdrawn(api):
    first = await state(api, author="ben", **{"class": "refund"}, policy="uniform", sampling_probability=0.1)
    assert (first["class"], first["source"], first["prediction"]) == ("refund", "reviewer", "not_yet")
    second = await state(api, author="ben", answer="Four weeks.", passages=["a:1"], status=200)
    assert (second["id"], second["class"], second["passages"], second["policy"]) == (first["id"], None, ["a:1"], None)
    await state(api, source="application", passages=[])
    assert [each["author"][:4] for each in await listed(api, "labels", prediction_id=UNSEEN)] == ["key:", "ben"]
    assert [each["passages"] for each in await listed(api, "labels", source="application")] == [[]]
    path = f"/v1/labels/{first['id']}"
    told(await api.client.delete(path), 403, "insufficient_scope", "author")
    assert (await api.client.delete(path, params={"author": "ben"})).json()["withdrawn"] is True
    shown = (await api.client.get(path)).json()
    assert [each["said"].get("class") for each in shown["history"]] == ["refund", None, None]
    assert len(await listed(api, "labels")) == 1
    assert len(await listed(api, "labels", withdrawn=True)) == 2
    assert await said(api) == {
        ("reviewer", "label"): 2,
        ("application", "label"): 1,
        ("reviewer", "label_withdrawal"): 1,
    }


@pytest.mark.parametrize("shared", ["sqlite"], indirect=True)
async def test_a_label_that_states_nothing_or_no_truth_is_refused(api):
    for body, param in (
        ({}, "class"),
        ({"comment": "c"}, "class"),
        ({"answer": ""}, "answer"),
        ({"passages": [""]}, "passages.0"),
        ({"class": "a", "sampling_probability": 0}, "sampling_probability"),
        ({"class": "a", "sampling_probability": 1.1}, "sampling_probability"),
        ({"class": "a", "source": "review_queue"}, "source"),
        ({"class": "a", "withdrawn": True}, "class"),
    ):
        response = await api.client.post("/v1/labels", json={"prediction_id": UNSEEN, **body})
        told(response, 400, "invalid_request", param)
    told(await api.client.post("/v1/labels", json={"class": "a"}), 400, "invalid_request", "prediction_id")
    assert await listed(api, "labels", withdrawn=True) == []


async def test_a_prediction_is_shown_with_what_is_said_of_it(service, api, shared):
    response = await api.client.get(f"/v1/predictions/{UNSEEN}/feedback")
    assert UNSEEN in told(response, 404, "not_found")
    await give(api, author="anna", rating=True, comment="c")
    await give(api, author="ben", rating=False)
    await give(api, source="judge", category="faithful", rating=0.5)
    gone = await give(api, author="eve", rating=True)
    await api.client.delete(f"/v1/feedback/{gone['id']}", params={"author": "eve"})
    await state(api, **{"class": "refund"})
    shown = (await api.client.get(f"/v1/predictions/{UNSEEN}/feedback")).json()
    assert (shown["prediction_id"], shown["prediction"]) == (UNSEEN, "not_yet")
    people, judge = shown["counts"]
    assert (people["source"], people["total"], people["positive"], people["negative"]) == ("end_user", 2, 1, 1)
    assert (judge["category"], judge["numbers"], judge["mean"]) == ("faithful", 1, 0.5)
    assert [each["author"][:4] for each in shown["feedback"]] == ["key:", "ben", "anna"]
    assert [each["class"] for each in shown["labels"]] == ["refund"]
    async with service.client(await service.new_key(scopes=("feedback:read",))) as reader:
        partly = (await reader.get(f"/v1/predictions/{UNSEEN}/feedback")).json()
    assert {**partly, "labels": shown["labels"]} == shown
    assert partly["labels"] is None
    answer = await api.answer("What is a hallmark?")
    if not shared:  # Else the shared database has only what was sent to it.
        alone = (await api.client.get(f"/v1/predictions/{answer['id']}/feedback")).json()
        assert (alone["prediction"], alone["feedback"], alone["labels"]) == ("stored", [], [])


async def test_while_the_database_is_down_the_caller_knows_and_a_retry_counts_once(tmp_path: Path, postgres: Postgres):
    url = postgres.create_database()
    async with serve(tmp_path / "data", database_url=url) as service, service.client() as client:
        api = Api(client, "default", service.key)
        given = await give(api, rating=True, idempotency_key="a")
        postgres.stop()
        try:
            calls = [("POST", "/v1/feedback", {"conversation": "c", "rating": False, "idempotency_key": "b"})]
            calls += [("PATCH", f"/v1/feedback/{given['id']}", {"rating": False}), ("GET", "/v1/feedback", None)]
            calls += [("POST", "/v1/labels", {"prediction_id": UNSEEN, "class": "a"}), ("GET", "/v1/labels", None)]
            calls += [("GET", f"/v1/predictions/{UNSEEN}/feedback", None)]
            for method, path, body in calls:
                response = await client.request(method, path, json=body)
                told(response, 503, "unavailable")
                assert int(response.headers["retry-after"]) >= 1
            assert (await api.ask("What is a hallmark?")).status_code == 200
        finally:
            postgres.start()
        await give(api, conversation="c", rating=False, idempotency_key="b")
        await give(api, conversation="c", rating=False, idempotency_key="b", status=200)
        assert [each["rating"] for each in await listed(api)] == [False, True]


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_thousands_of_concurrent_calls_over_http_count_exactly(api):
    chance = random.Random(5)
    ids = [uuid7() for _ in range(150)]
    calls: list[dict[str, Any]] = []
    latest: dict[tuple[str, str], tuple[datetime, bool | None]] = {}
    start = datetime.now(UTC) - timedelta(days=1)
    while len(calls) < 3_000:
        said_at = start + timedelta(seconds=len(calls))
        key = f"user {chance.randrange(4)}", chance.choice(ids)
        rating = chance.choice([True, False, None])
        body = {"author": key[0], "prediction_id": key[1], "said_at": said_at.isoformat()}
        body |= {"withdrawn": True} if rating is None else {"rating": rating}
        if chance.random() < 0.5:
            body["idempotency_key"] = f"call-{len(calls)}"
        calls += [body] * min(chance.choice([1, 1, 2, 3]), 3_000 - len(calls))
        latest[key] = said_at, rating
    chance.shuffle(calls)
    statuses: Counter[int] = Counter()
    waiting = iter(calls)

    async def client() -> None:
        for body in waiting:
            statuses[(await api.client.post("/v1/feedback", json=body)).status_code] += 1

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(64)))
    print(f"\n{len(calls) / (time.perf_counter() - started):.0f} calls a second over HTTP")
    assert statuses.total() == 3_000
    assert statuses[201] == len(latest)
    assert statuses[200] == 3_000 - len(latest)
    found: dict[tuple[str, str], bool | None] = {}
    params: dict[str, Any] = {"limit": 200, "withdrawn": True}
    while params:
        page = (await api.client.get("/v1/feedback", params=params)).json()
        for each in page["data"]:
            found[each["author"], each["prediction_id"]] = None if each["withdrawn"] else each["rating"]
        params = {**params, "before": page["next"]} if page["next"] else {}
    assert found == {key: rating for key, (_, rating) in latest.items()}
