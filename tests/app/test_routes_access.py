"""Every route, from its description: closed without a key, closed to other tenants, closed without the scope."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from app.routes.front import OPEN_PATHS
from tests.fake_tgi import FakeTGI
from tests.lineage_world import dataset_of, row_of, run_of
from tests.review_world import under_review
from tests.service import EVERYTHING, Api, Service, description, live_service

STEPS = ("canary", "shadow", "promote", "rollback", "pause", "resume")
SCOPES = {
    "chat": ["POST /v1/chat/completions", "GET /v1/models", "GET /v1/models/{model}", "POST /v1/embeddings"],
    "documents:read": [
        "GET /v1/documents",
        "GET /v1/documents/{document_id}",
        "GET /v1/documents/{document_id}/source",
        "GET /v1/documents/{document_id}/passages",
        "GET /v1/documents/{document_id}/passages/{n}",
        "POST /v1/search",
        "GET /v1/failed-documents",
        "GET /v1/jobs",
        "GET /v1/jobs/{job_id}",
        "GET /v1/jobs/{job_id}/documents",
    ],
    "documents:write": [
        "POST /v1/documents",
        "DELETE /v1/documents/{document_id}",
        "POST /v1/documents/sync",
        "POST /v1/jobs/{job_id}/cancel",
        "POST /v1/jobs/{job_id}/complete",
    ],
    "predictions:read": [
        "GET /v1/predictions",
        "GET /v1/predictions/count",
        "GET /v1/predictions/export",
        "GET /v1/predictions/{prediction_id}",
        "GET /v1/predictions/{prediction_id}/lineage",
        "GET /v1/lineage/documents/{document_id}",
        "GET /v1/lineage/releases/{release}",
        "GET /v1/lineage/adapters/{digest}",
        "GET /v1/lineage/dataset-rows/{digest}",
        "GET /v1/lineage/datasets/{digest}",
    ],
    "feedback:write": [
        "POST /v1/feedback",
        "PATCH /v1/feedback/{feedback_id}",
        "DELETE /v1/feedback/{feedback_id}",
    ],
    "feedback:read": [
        "GET /v1/feedback",
        "GET /v1/feedback/{feedback_id}",
        "GET /v1/predictions/{prediction_id}/feedback",
    ],
    "labels:write": ["POST /v1/labels", "DELETE /v1/labels/{label_id}"],
    "labels:read": ["GET /v1/labels", "GET /v1/labels/{label_id}"],
    "releases:read": [
        "GET /v1/releases",
        "GET /v1/releases/diff",
        "GET /v1/releases/{release}",
        "GET /v1/rollouts",
        "GET /v1/rollouts/{name}",
        "GET /v1/rollouts/{name}/changes",
        "GET /v1/rollouts/{name}/trial",
        "GET /v1/rollouts/{name}/trial/observations",
    ],
    "releases:write": [
        "GET /v1/engines",
        "POST /v1/releases",
        "DELETE /v1/releases/{release}",
        *(f"POST /v1/rollouts/{{name}}/{step}" for step in STEPS),
        "POST /v1/lineage/datasets",
        "POST /v1/lineage/training-runs",
        "POST /v1/drift/references",
        "PUT /v1/features/{view}",
        "DELETE /v1/features/{view}",
    ],
    "review:manage": [
        "PUT /v1/review/queues/{queue}",
        "POST /v1/review/queues/{queue}/gold",
        "POST /v1/review/queues/{queue}/boosts",
        "DELETE /v1/review/queues/{queue}/boosts/{boost_id}",
        "POST /v1/review/queues/{queue}/import",
    ],
    "review:write": [
        "POST /v1/review/queues/{queue}/leases",
        "POST /v1/review/reviews/{review_id}/complete",
        "POST /v1/review/reviews/{review_id}/skip",
        "POST /v1/review/reviews/{review_id}/renew",
        "DELETE /v1/review/reviews/{review_id}",
    ],
    "review:read": [
        "GET /v1/review/queues",
        "GET /v1/review/queues/{queue}",
        "GET /v1/review/queues/{queue}/items",
        "GET /v1/review/items/{item_id}",
        "GET /v1/review/reviews/{review_id}",
        "GET /v1/review/queues/{queue}/agreement",
        "GET /v1/review/queues/{queue}/shares",
        "GET /v1/review/queues/{queue}/boosts",
        "GET /v1/review/queues/{queue}/boosts/{boost_id}",
        "GET /v1/review/queues/{queue}/export",
    ],
    "quality:read": ["GET /v1/quality", "GET /v1/drift"],
    "alerts:read": [
        "GET /v1/alerts",
        "GET /v1/alerts/{alert_id}",
        "GET /v1/alert-rules",
        "GET /v1/alert-rules/{target}",
        "GET /v1/alert-rules/{target}/revisions",
        "GET /v1/alert-silences",
        "GET /v1/alert-notifications",
    ],
    "alerts:write": [
        "POST /v1/alerts/{alert_id}/acknowledge",
        "PUT /v1/alert-rules/{target}",
        "DELETE /v1/alert-rules/{target}",
        "POST /v1/alert-silences",
        "DELETE /v1/alert-silences/{silence_id}",
        "POST /v1/alert-notifications/test",
    ],
    "datasets:read": [
        "GET /v1/datasets",
        "GET /v1/datasets/{dataset}",
        "GET /v1/datasets/{dataset}/builds",
        "GET /v1/datasets/{dataset}/builds/{build_id}",
        "GET /v1/datasets/{dataset}/versions",
        "GET /v1/datasets/{dataset}/versions/{version}",
        "GET /v1/datasets/{dataset}/versions/{version}/rows",
        "GET /v1/datasets/{dataset}/versions/{version}/files/{file}",
        "GET /v1/datasets/{dataset}/diff",
        "GET /v1/dataset-rows",
    ],
    "datasets:write": [
        "POST /v1/datasets/{dataset}/builds",
        "DELETE /v1/datasets/{dataset}/builds/{build_id}",
        "POST /v1/datasets/{dataset}/imports",
        "PUT /v1/datasets/{dataset}/tags/{tag}",
        "DELETE /v1/datasets/{dataset}/tags/{tag}",
    ],
    "features:read": ["GET /v1/features", "GET /v1/features/{view}", "POST /v1/feature-values"],
    "features:write": ["POST /v1/features/{view}/rows"],
    "privacy:manage": ["POST /v1/erasures", "GET /v1/erasures", "GET /v1/erasures/{erasure_id}"],
    "metrics": ["GET /metrics"],
    "": ["GET /v1/me"],
}
ROW = row_of("An example.")
DATASET = dataset_of("tone", "1", [ROW])
TRAINING_RUN = run_of("tone-run", "a" * 64, DATASET.manifest["digest"])
DIGESTS = {"adapters": "a" * 64, "dataset-rows": ROW.digest, "datasets": DATASET.manifest["digest"]}
NEEDED = {route: scope for scope, routes in SCOPES.items() for route in routes}
BODIES = {
    "POST /v1/chat/completions": {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}]},
    "POST /v1/embeddings": {"model": "hashing", "input": "x"},
    "POST /v1/search": {"query": "gold"},
    "POST /v1/documents": {"name": "mine.txt", "text": "My own text."},
    "POST /v1/documents/sync": {"source": "folder", "documents": []},
    "POST /v1/feedback": {"conversation": "c", "rating": True},
    "PATCH /v1/feedback/{feedback_id}": {"rating": False},
    "POST /v1/labels": {"prediction_id": "01900000-0000-7000-8000-000000000001", "class": "a"},
    "PUT /v1/review/queues/{queue}": {"classes": ["right", "wrong"]},
    "POST /v1/review/queues/{queue}/leases": {},
    "POST /v1/review/queues/{queue}/gold": {"prediction_id": "01900000-0000-7000-8000-000000000001", "class": "right"},
    "POST /v1/review/queues/{queue}/boosts": {"rate": 0.5, "reason": "why not", "where": {}},
    "POST /v1/review/queues/{queue}/import": [],
    "POST /v1/review/reviews/{review_id}/complete": {"class": "right"},
    "POST /v1/review/reviews/{review_id}/skip": {},
    "POST /v1/review/reviews/{review_id}/renew": {},
    "POST /v1/lineage/datasets": msgspec.to_builtins(DATASET),
    "POST /v1/lineage/training-runs": msgspec.to_builtins(TRAINING_RUN),
    "POST /v1/releases": {"name": "hallmark", "notes": "another"},
    "POST /v1/drift/references": {
        "release": "hallmark@1",
        "since": "2026-11-01T00:00:00Z",
        "until": "2026-11-02T00:00:00Z",
    },
    "POST /v1/alerts/{alert_id}/acknowledge": {"why": "seen"},
    "PUT /v1/alert-rules/{target}": {"rules": [], "why": "none"},
    "POST /v1/alert-silences": {"rule": "*", "seconds": 60, "why": "a test"},
    "POST /v1/datasets/{dataset}/builds": {"recipe": {"task": "classify"}},
    "PUT /v1/datasets/{dataset}/tags/{tag}": {"version": 1},
    "POST /v1/erasures": {"user": "nobody"},
    "PUT /v1/features/{view}": {"entity": "customer", "features": {"plan": "string"}},
    "POST /v1/features/{view}/rows": {"rows": [{"entity": "c", "event_time": "2026-11-01", "values": {"plan": "pro"}}]},
    "POST /v1/feature-values": {"features": ["customer:plan"], "rows": [{"entity": {"customer": "c"}}]},
    **{f"POST /v1/rollouts/{{name}}/{step}": {} for step in STEPS},
    "POST /v1/rollouts/{name}/canary": {"share": 0.1},
    "POST /v1/rollouts/{name}/shadow": {"rate": 0.1},
}
ROUTES = [
    f"{method.upper()} {path}"
    for path, methods in description()["paths"].items()
    for method in methods
    if path not in OPEN_PATHS
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("access"), engine_url=tgi.url, tenants=2) as service,
    ):
        yield service


@pytest.fixture(scope="module")
async def owner(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


@pytest.fixture(scope="module")
async def things(owner: Api) -> dict[str, str]:
    """What the owner has, by the name of the path's parameter."""
    document = await owner.add("gold.txt", "A hallmark is a stamp on gold.")
    (job,) = (await owner.client.get("/v1/jobs")).json()["data"]
    answer = await owner.answer("What is a hallmark?")
    feedback = await owner.client.post("/v1/feedback", json={"prediction_id": answer["id"], "rating": True})
    label = await owner.client.post("/v1/labels", json={"prediction_id": answer["id"], "class": "a"})
    for route in ("POST /v1/lineage/datasets", "POST /v1/lineage/training-runs"):
        assert (await call(owner.client, route, {})).status_code == 201
    silence = await call(owner.client, "POST /v1/alert-silences", {})
    erasure = await call(owner.client, "POST /v1/erasures", {})
    build = await call(owner.client, "POST /v1/datasets/{dataset}/builds", {"dataset": "support"})
    return {
        "document_id": document["id"],
        "job_id": job["id"],
        "alert_id": "01900000-0000-7000-8000-000000000000",
        "silence_id": silence.json()["id"],
        "target": "hallmark",
        "dataset": "support",
        "erasure_id": erasure.json()["id"],
        "build_id": build.json()["id"],
        "version": "1",
        "file": "train.jsonl",
        "tag": "best",
        "view": "customer",
        "prediction_id": answer["id"],
        "feedback_id": feedback.json()["id"],
        "label_id": label.json()["id"],
        "n": "1",
        "model": "hallmark",
        "name": "hallmark",
        "release": "hallmark@1",
        **await under_review(owner),
    }


@pytest.fixture(scope="module")
async def keys(service: Service) -> dict[str, str]:
    """For each scope a key that has all but this one."""
    return {
        scope: await new_key(service, scopes=tuple(each for each in EVERYTHING if each != scope))
        for scope in SCOPES
        if scope
    }


async def new_key(service: Service, **facts: Any) -> str:
    """Make a key beside the service, which may be writing: this must not keep it from ending what it writes."""
    return await asyncio.to_thread(service.new_key, **facts)


async def call(client: httpx.AsyncClient, route: str, things: dict[str, str]) -> httpx.Response:
    method, path = route.split(" ")
    asked = {"a": "hallmark@1", "b": "hallmark@1"} if path == "/v1/releases/diff" else None
    asked = {"old": "1"} if path == "/v1/datasets/{dataset}/diff" else asked
    path = path.format(**things, digest=DIGESTS.get(path.split("/")[-2]))
    return await client.request(method, path, json=BODIES.get(route), params=asked)


def test_the_scope_of_every_route_is_known():
    assert set(NEEDED) == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_route_is_closed_without_a_valid_key(service, things, route):
    for header in ({}, {"authorization": "Bearer hm_aaaaaaaa_wrong"}, {"authorization": "Basic YTpi"}):
        async with httpx.AsyncClient(base_url=service.url, headers=header, trust_env=False) as client:
            response = await call(client, route, things)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("route", [route for route in ROUTES if NEEDED[route]])
async def test_a_route_is_closed_to_a_key_without_its_scope(service, things, keys, route):
    async with service.client(keys[NEEDED[route]]) as client:
        response = await call(client, route, things)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (403, "insufficient_scope")
    assert f"'{NEEDED[route]}'" in error["message"]


# Lists of predictions by what they were made with: one that a stranger asks for has nothing in it.
USES = [f"GET /v1/lineage/{path}" for path in ("documents/{document_id}", "releases/{release}")]
# Alerts are found by a worker: whose they are is tested there.
ALERTS = ["GET /v1/alerts/{alert_id}", "POST /v1/alerts/{alert_id}/acknowledge"]


@pytest.mark.parametrize("route", [route for route in ROUTES if "_id}" in route and route not in USES + ALERTS])
async def test_what_belongs_to_another_tenant_does_not_exist(service, owner, things, route):
    ids = ("prediction_id", "feedback_id", "label_id", "review_id", "item_id", "boost_id", "silence_id", "build_id")
    ids += ("job_id",)
    unknown = {**things, "document_id": "nobodys"} | dict.fromkeys(ids, "01900000-0000-7000-8000-000000000000")
    async with service.client(await new_key(service, tenant="stranger")) as stranger:
        response = await call(stranger, route, things)
        absent = await call(stranger, route, unknown)
    assert response.status_code == absent.status_code == 404
    shown, expected = response.json()["error"], absent.json()["error"]
    for name in ("document_id", *ids):
        shown["message"] = shown["message"].replace(things[name], "...")
        expected["message"] = expected["message"].replace(unknown[name], "...")
    assert {**shown, "request_id": ""} == {**expected, "request_id": ""}
    # Silences are only listed.
    shows = route.replace("DELETE", "GET").removesuffix("/{silence_id}")
    there = await call(owner.client, shows, things)
    assert there.status_code in (200, 409)  # The owner's is there, though it may be done.


async def test_what_is_registered_by_another_tenant_does_not_exist(service, owner, things):
    async with service.client(await new_key(service, tenant="newcomer")) as stranger:
        for name in ("dataset-rows", "datasets"):
            route = f"GET /v1/lineage/{name}/{{digest}}"
            assert (await call(owner.client, route, things)).status_code == 200
            assert (await call(stranger, route, things)).status_code == 404
        for route in (*USES, "GET /v1/lineage/adapters/{digest}"):
            assert (await call(owner.client, route, things)).status_code == 200
            found = await call(stranger, route, things)
            assert found.status_code == 404 or found.json()["data"] == []


async def test_lists_and_searches_show_a_tenant_only_its_own(service, things):
    async with service.client(await new_key(service, tenant="stranger")) as stranger:
        assert (await stranger.get("/v1/documents")).json()["data"] == []
        for path in ("predictions", "feedback", "labels"):
            assert (await stranger.get(f"/v1/{path}")).json()["data"] == []
        assert (await stranger.post("/v1/search", json={"query": "hallmark gold"})).json()["hits"] == []
        answer = (await call(stranger, "POST /v1/chat/completions", things)).json()
    assert answer["retrieval"] == "empty"


async def test_an_admin_may_do_everything(service, things):
    async with service.client(await new_key(service, tenant="boss", scopes=("admin",))) as boss:
        statuses = {route: (await call(boss, route, things)).status_code for route in ROUTES}
    # 409 where there is no canary, for one; 415 where a form is wanted.
    assert set(statuses.values()) <= {200, 201, 202, 400, 404, 409, 415}
