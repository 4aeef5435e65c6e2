"""Every route, from its description: closed without a key, closed to other tenants, closed without the scope."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from tests.belongings import belongings
from tests.fake_tgi import FakeTGI
from tests.routes import NEEDED, OPEN, ROUTES, SCOPES, UNKNOWN, WANT_MORE, assert_envelope, call
from tests.service import EVERYTHING, Api, Service, description, live_service


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


@pytest.fixture
async def nobody(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.nobody() as client:
        yield client


@pytest.fixture(scope="module")
async def things(service: Service, owner: Api) -> dict[str, str]:
    """What the owner has, by the name of the path's parameter."""
    for route in ("POST /v1/lineage/datasets", "POST /v1/lineage/training-runs"):
        assert (await call(owner.client, route, {})).status_code == 201
    return await belongings(service, owner)


@dataclass(frozen=True)
class Keys:
    """Of each scope: a key that has nothing else, and one that has everything else."""

    only: dict[str, str]
    all_but: dict[str, str]


@pytest.fixture(scope="module")
async def keys(service: Service) -> Keys:
    scopes = [scope for scope in SCOPES if scope]
    return Keys(
        only={scope: await service.new_key(scopes=(scope,)) for scope in scopes},
        all_but={
            scope: await service.new_key(scopes=tuple(each for each in EVERYTHING if each != scope)) for scope in scopes
        },
    )


def test_the_scope_of_every_route_is_known():
    assert set(NEEDED) == set(ROUTES)
    assert set(EVERYTHING) == {scope for scope in SCOPES if scope}


def test_the_description_says_which_routes_need_a_key():
    for path, operations in description()["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([] if path in OPEN else [{"key": []}])


@pytest.mark.parametrize("route", ROUTES)
async def test_a_route_is_closed_without_a_valid_key(nobody, things, route):
    for header in ({}, {"authorization": "Bearer hm_aaaaaaaa_wrong"}, {"authorization": "Basic YTpi"}):
        nobody.headers = header
        response = await call(nobody, route, things)
        assert_envelope(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("route", [route for route in ROUTES if NEEDED[route]])
async def test_a_route_asks_for_its_scope_and_for_no_other(service, things, keys, route):
    scope = NEEDED[route]
    async with service.client(keys.all_but[scope]) as client:
        refused = await call(client, route, things)
    assert repr(scope) in assert_envelope(refused, 403, "insufficient_scope")["message"]
    async with service.client(keys.only[scope]) as client:
        response = await call(client, route, UNKNOWN)
    if route in WANT_MORE:
        assert repr(scope) not in assert_envelope(response, 403, "insufficient_scope")["message"]
    else:
        assert response.status_code not in (401, 403), response.text


# Lists of predictions by what they were made with: one that a stranger asks for has nothing in it.
USES = [f"GET /v1/lineage/{path}" for path in ("documents/{document_id}", "releases/{release}")]
# Alerts are found by a worker: whose they are is tested there.
ALERTS = ["GET /v1/alerts/{alert_id}", "POST /v1/alerts/{alert_id}/acknowledge"]


@pytest.mark.parametrize("route", [route for route in ROUTES if "_id}" in route and route not in USES + ALERTS])
async def test_what_belongs_to_another_tenant_does_not_exist(service, owner, things, route):
    ids = (
        "prediction_id",
        "response_id",
        "feedback_id",
        "label_id",
        "review_id",
        "item_id",
        "boost_id",
        "silence_id",
        "build_id",
    )
    ids += ("job_id",)
    unknown = things | {name: UNKNOWN[name] for name in ("document_id", *ids)}
    async with service.client(await service.new_key(tenant="stranger")) as stranger:
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
    async with service.client(await service.new_key(tenant="newcomer")) as stranger:
        for name in ("dataset-rows", "datasets"):
            route = f"GET /v1/lineage/{name}/{{digest}}"
            assert (await call(owner.client, route, things)).status_code == 200
            assert (await call(stranger, route, things)).status_code == 404
        for route in (*USES, "GET /v1/lineage/adapters/{digest}"):
            assert (await call(owner.client, route, things)).status_code == 200
            found = await call(stranger, route, things)
            assert found.status_code == 404 or found.json()["data"] == []


async def test_lists_and_searches_show_a_tenant_only_its_own(service, things):
    async with service.client(await service.new_key(tenant="stranger")) as stranger:
        assert (await stranger.get("/v1/documents")).json()["data"] == []
        for path in ("predictions", "feedback", "labels"):
            assert (await stranger.get(f"/v1/{path}")).json()["data"] == []
        assert (await stranger.post("/v1/search", json={"query": "hallmark gold"})).json()["hits"] == []
        answer = (await call(stranger, "POST /v1/chat/completions", things)).json()
    assert answer["retrieval"] == "empty"


async def test_an_admin_may_do_everything(service, things):
    async with service.client(await service.new_key(tenant="boss", scopes=("admin",))) as boss:
        statuses = {route: (await call(boss, route, things)).status_code for route in ROUTES}
    # 409 where there is no canary, for one; 415 where a form is wanted.
    assert set(statuses.values()) <= {200, 201, 202, 400, 404, 409, 415}
