"""Liveness, readiness, metrics, and what every response carries."""

import re
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fake_tgi import FakeTGI, Tokens
from tests.service import CHAT, Service, live_service, until

ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Service]]:
    async with FakeTGI() as tgi, live_service(tmp_path_factory.mktemp("health"), engine_url=tgi.url) as service:
        yield tgi, service


@pytest.fixture
def tgi(everyone) -> FakeTGI:
    return everyone[0]


@pytest.fixture
def service(everyone) -> Service:
    return everyone[1]


@pytest.fixture
async def anybody(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.nobody() as client:
        yield client


async def samples(client: httpx.AsyncClient) -> dict[str, float]:
    """The metrics by name, their labels summed up."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


async def readiness(client: httpx.AsyncClient, status: int) -> httpx.Response | None:
    """The answer to a probe, once it has this status."""
    response = await client.get("/readyz")
    return response if response.status_code == status else None


# --- health ---


async def test_health_and_readiness_need_no_key(anybody):
    assert (await anybody.get("/healthz")).json() == {"status": "ok", "checks": {}}
    ready = await anybody.get("/readyz")
    assert ready.status_code == 200
    parts = {"engine": "ok", "release": "ok", "retrieval": "ok", "record": "ok"}
    assert ready.json() == {"status": "ok", "checks": parts}


async def test_an_unhealthy_engine_makes_the_service_unready_and_alive(anybody, tgi):
    tgi.is_healthy = False
    try:
        ready = await until(lambda: readiness(anybody, 503))
        alive = await anybody.get("/healthz")
    finally:
        tgi.is_healthy = True
    assert (ready.status_code, ready.json()["status"]) == (503, "unready")
    assert [part for part, state in ready.json()["checks"].items() if state != "ok"] == ["engine"]
    assert alive.status_code == 200
    await until(lambda: readiness(anybody, 200))


async def test_anonymous_probes_cost_the_engine_little(anybody, tgi):
    await anybody.get("/readyz")
    before = len(tgi.requests)
    for _ in range(20):
        assert (await anybody.get("/readyz")).status_code == 200
    # Two calls for each second that passed, and none for a probe.
    assert len(tgi.requests) - before <= 4


async def test_a_service_without_its_engine_starts_and_says_what_is_missing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    async with live_service(tmp_path, engine_url=url) as service, service.client() as client:
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["checks"]["engine"] != "ok"
        assert ready.json()["checks"]["retrieval"] == "ok"
        answer = await client.post(CHAT, json={"model": "hallmark", "messages": [{"role": "user", "content": "Hi"}]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        # What needs no engine works.
        added = await client.post("/v1/documents?wait=20", json={"name": "a.txt", "text": "A hallmark is a stamp."})
        assert added.status_code == 201
        assert (await client.post("/v1/search", json={"query": "hallmark"})).json()["hits"]


async def test_an_adapter_that_the_engine_does_not_serve_makes_the_service_unready(tmp_path):
    settings = {"release": {"adapter": "legal"}, "engine": {"dialect": "embedded"}}
    async with (
        FakeTGI(adapters=("medical",), lists_adapters=True) as tgi,
        live_service(tmp_path, engine_url=tgi.url, settings=settings) as service,
        service.client() as client,
    ):
        ready = await client.get("/readyz")
    assert ready.status_code == 503
    assert "'legal'" in ready.json()["checks"]["release"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs"])
async def test_a_probe_may_ask_for_the_head_alone(anybody, path):
    response = await anybody.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["x-request-id"]
    assert (await anybody.head("/v1/me")).status_code == 401


# --- metrics ---


async def test_metrics_need_their_scope(service, anybody):
    assert (await anybody.get("/metrics")).status_code == 401
    async with service.client(await service.new_key(scopes=("chat",))) as client:
        assert (await client.get("/metrics")).status_code == 403
    async with service.client(await service.new_key(scopes=("metrics",))) as client:
        response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")


async def test_metrics_can_be_opened_by_a_setting(tmp_path):
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path, engine_url=tgi.url, settings={"open_metrics": True}) as service,
        service.nobody() as anybody,
    ):
        assert "hallmark_build_info" in (await anybody.get("/metrics")).text
        assert (await anybody.get("/v1/me")).status_code == 401


async def test_an_answer_moves_the_metrics_of_requests_tokens_and_records(service):
    async with service.client() as client:
        before = await samples(client)
        response = await client.post(CHAT, json={"model": "hallmark", "messages": [{"role": "user", "content": "Hi"}]})
        usage = response.json()["usage"]

        async def counted() -> dict[str, float] | None:
            after = await samples(client)
            return after if after["hallmark_records_total"] > before["hallmark_records_total"] else None

        after = await until(counted)  # The thread that writes counts after it has told.
    moved = {name: after[name] - before.get(name, 0.0) for name in after}
    assert moved["hallmark_records_total"] == 1
    assert moved["hallmark_record_commit_seconds_count"] >= 1
    assert moved["hallmark_tokens_total"] == usage["total_tokens"]
    assert moved["hallmark_engine_seconds_count"] == 1
    assert after["hallmark_record_queue_depth"] == 0


async def test_paths_that_do_not_exist_share_one_label(service):
    async with service.client() as client:
        for n in range(3):
            await client.get(f"/nowhere/{n}")
        text = (await client.get("/metrics")).text
    assert "nowhere" not in text
    assert 'route="unmatched"' in text


# --- every response ---


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("GET", "/docs", 200),
        ("GET", "/v1/me", 200),
        ("GET", "/v1/documents/nobody", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/documents/", 404),
        ("POST", "/v1/search", 400),
        ("PUT", "/v1/documents", 405),
        ("GET", CHAT, 405),
        ("POST", CHAT, 400),
        ("POST", "/v1/documents", 415),
    ],
)
async def test_every_response_has_a_request_id(service, method, path, status):
    async with service.client() as client:
        content = {"content": b"<a/>", "headers": {"content-type": "text/xml"}} if status == 415 else {}
        response = await client.request(method, path, **content)
        again = await client.request(method, path, **content)
    assert response.status_code == status
    assert response.headers["x-request-id"] != again.headers["x-request-id"]
    if status >= 400:
        assert response.json()["error"]["request_id"] == response.headers["x-request-id"]


async def test_a_refused_key_is_answered_with_a_request_id(anybody):
    response = await anybody.get("/v1/me")
    assert ID.fullmatch(response.headers["x-request-id"])


async def test_the_id_of_an_answer_is_that_of_its_prediction(service, tgi):
    tgi.script(Tokens("Hello."))
    async with service.client() as client:
        response = await client.post(CHAT, json={"model": "hallmark", "messages": [{"role": "user", "content": "Hi"}]})
        assert ID.fullmatch(response.json()["id"])
        assert response.headers["x-request-id"] == response.headers["x-prediction-id"] == response.json()["id"]
        assert response.headers["x-release"] == "hallmark@1"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/documents", "GET, POST"),
        ("/v1/documents/a", "DELETE, GET"),
        ("/v1/search", "POST"),
        ("/healthz", "GET"),
        (CHAT, "POST"),
    ],
)
async def test_a_method_that_a_path_does_not_take_is_refused_with_those_it_takes(service, path, allowed):
    async with service.client() as client:
        response = await client.put(path, json={})
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == allowed
    assert allowed in response.json()["error"]["message"]
