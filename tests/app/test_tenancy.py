"""Tenants and groups apart: every route asked for what is others', as it is and in odd ways, and nothing of it shows.

Each tenant has a word of its own in all that has content; in the tenant `board` there is also what is for a group. No
request says such a word, so that none is in an answer because who asks has kept it; and each route is asked by a tenant
that has asked for nothing before, so that neither is an id that a path named.
"""

import json
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.belongings import belongings
from tests.fake_tgi import FakeTGI
from tests.lineage_world import dataset_of, row_of, run_of
from tests.properties import examples
from tests.routes import BODIES, ROUTES, UNKNOWN, assert_envelope
from tests.service import Api, Service, live_service

THEIRS, OURS, SECRET = "kestrelworth", "ospreyfield", "merlinhaven"
CLERK = ("chat", "documents:read", "documents:write", "feedback:write")
SHARED = {"model", "release", "name", "target", "version", "file", "tag", "n"}
"""What a path names that no tenant owns: releases, their rollouts and rules, and parts of what is named beside it."""
NAMES = {"dataset", "queue", "view"}
"""What each tenant names as it likes: another's is not there, and making one by that name makes one's own."""
LEADS_TO_OWN = {"GET /v1/lineage/documents/{document_id}", "GET /v1/lineage/adapters/{digest}"}
"""Lists of one's own predictions that used something: of what is others' there are none."""
POINTERS = {
    "GET /v1/documents": ("after", "document_id"),
    "GET /v1/failed-documents": ("after", "document_id"),
    "GET /v1/jobs": ("before", "job_id"),
    "POST /v1/documents": ("job", "job_id"),
    "GET /v1/predictions": ("before", "prediction_id"),
    "GET /v1/feedback": ("prediction_id", "prediction_id"),
    "GET /v1/labels": ("prediction_id", "prediction_id"),
}
"""Parameters of a query that take ids, and the kind of thing each is the id of."""


@dataclass
class Tenant:
    """A tenant, what it has, and what of that nobody else may see."""

    api: Api
    things: dict[str, str]
    secrets: frozenset[str]

    def path(self, route: str) -> str:
        """The path of a route with the tenant's things in it."""
        return filled(route, self.things)


@dataclass
class World:
    """Two tenants, and in ours a clerk who is in no group, and what is not for the clerk."""

    service: Service
    theirs: Tenant
    ours: Tenant
    clerk: httpx.AsyncClient
    restricted: dict[str, str]
    said: list[str] = field(default_factory=list)
    """What odd requests have said, of which some is kept and shown to whoever said it."""


def filled(route: str, things: dict[str, str]) -> str:
    path = route.split(" ")[1]
    named = {name: quote(thing, safe="") for name, thing in things.items()}
    return path.format(**{"digest": named.get(path.split("/")[-2], ""), **named})


async def settled(service: Service, api: Api, word: str, *, name: str) -> Tenant:
    """Give a tenant one of everything, with the word in it, under a name that does not tell the word."""
    things = await belongings(service, api, word, name=name)
    row = row_of(word)
    dataset = dataset_of(word, "1", [row], note=word)
    run = run_of(f"{name}-run", word.encode().hex().ljust(64, "0"), dataset.manifest["digest"])
    for route, body in (("datasets", dataset), ("training-runs", run)):
        made = await api.client.post(f"/v1/lineage/{route}", json=msgspec.to_builtins(body))
        assert made.status_code == 201, made.text
    digests = {"dataset-rows": row.digest, "datasets": dataset.manifest["digest"], "adapters": "a" * 64}
    own = {name: thing for name, thing in things.items() if thing != UNKNOWN.get(name)}
    ids = [thing for name, thing in own.items() if name not in SHARED | NAMES] + [row.digest, digests["datasets"]]
    return Tenant(api, {**things, **digests}, frozenset({word, *ids}))


@pytest.fixture(scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with opened(tmp_path_factory.mktemp("tenancy")) as world:
        yield world


@pytest.fixture(scope="module")
async def odd_world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """For requests that say what they like: rules that are called as somebody's prediction is are everybody's."""
    async with opened(tmp_path_factory.mktemp("oddly")) as world:
        yield world


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[World]:
    async with (
        FakeTGI() as tgi,
        live_service(folder, engine_url=tgi.url, tenants=2 + len(ROUTES) + len(POINTERS)) as service,
        service.tenant() as them,
        service.tenant() as us,
    ):
        theirs = await settled(service, them, THEIRS, name="theirs")
        ours = await settled(service, us, OURS, name="ours")
        board = await service.new_key(tenant=us.name, scopes=CLERK, groups=("board",))
        async with (
            service.client(board) as member,
            service.client(await service.new_key(tenant=us.name, scopes=CLERK)) as clerk,
        ):
            upload = {"name": f"{SECRET}.md", "text": f"# {SECRET}\n\nThe {SECRET} is a stamp.", "groups": ["board"]}
            made = await member.post("/v1/documents?wait=20", json=upload)
            assert made.status_code == 201, made.text
            refused = {**upload, "name": f"{SECRET}.pdf", "text": None, "content_base64": "JVBERg=="}
            failed = await member.post("/v1/documents", json={k: v for k, v in refused.items() if v})
            restricted = {**UNKNOWN, "document_id": made.json()["document"]["id"], "job_id": made.json()["job"]}
            failed_job = failed.json()["id"]
            before = await shown(them.client, theirs)
            yield World(service, theirs, ours, clerk, {**restricted, "failed_job": failed_job})
            assert (await member.get(f"/v1/documents/{restricted['document_id']}")).status_code == 200
        assert await shown(them.client, theirs) == before, "what somebody else asked has changed what is theirs"


async def shown(client: httpx.AsyncClient, tenant: Tenant) -> dict[str, Any]:
    """All that the owner reads by id, to be compared."""
    routes = [route for route in ROUTES if route.startswith("GET") and owned(route) and "source" not in route]
    answers = {route: await client.get(tenant.path(route)) for route in routes}
    kept = {route: answer for route, answer in answers.items() if answer.status_code == 200}
    assert len(kept) > len(routes) // 2, {route: answer.status_code for route, answer in answers.items()}
    changing = ("builds", "erasures", "review", "alerts", "jobs", "lineage")  # Of which some go on by themselves.
    return {route: answer.text for route, answer in kept.items() if not any(word in route for word in changing)}


def owned(route: str) -> set[str]:
    """The parameters of a route's path that are a tenant's own."""
    return set(re.findall(r"{(\w+)}", route)) - SHARED - NAMES


def leaks(response: httpx.Response, secrets: Iterable[str]) -> list[str]:
    """Which of these the response tells that its request did not."""
    request = response.request
    said = f"{request.url} {request.content!r} {request.headers}"
    told = f"{response.text} {response.headers}"
    return [secret for secret in secrets if secret in told and secret not in said]


def test_every_parameter_of_a_path_is_known_to_be_somebodys_or_everybodys() -> None:
    known = set(UNKNOWN) | {"digest"}
    assert {name for route in ROUTES for name in re.findall(r"{(\w+)}", route)} <= known
    assert known - SHARED - NAMES == {name for route in ROUTES for name in owned(route)}


async def test_each_tenant_has_everything_that_is_asked_for(world: World) -> None:
    for tenant in (world.theirs, world.ours):
        assert not [name for name in UNKNOWN if name.endswith("_id") and tenant.things[name] == UNKNOWN[name]]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_route_shows_nothing_of_another_tenant(world: World, route: str) -> None:
    method, theirs = route.split(" ")[0], world.theirs
    body = json.loads(json.dumps(BODIES.get(route)).replace(UNKNOWN["prediction_id"], theirs.things["prediction_id"]))
    async with world.service.tenant() as stranger:
        response = await stranger.client.request(method, theirs.path(route), json=body)
    assert not leaks(response, theirs.secrets)
    if owned(route) and route not in LEADS_TO_OWN:
        assert_envelope(response, 404, "not_found")


@pytest.mark.parametrize("route", POINTERS)
async def test_a_query_that_names_what_is_anothers_finds_nothing_of_it(world: World, route: str) -> None:
    parameter, thing = POINTERS[route]
    method, path = route.split(" ")
    asked = {parameter: world.theirs.things[thing]}
    async with world.service.tenant() as stranger:
        response = await stranger.client.request(method, path, params=asked, json=BODIES.get(route))
    assert response.status_code in (200, 404)
    assert not leaks(response, world.theirs.secrets)


async def test_a_response_of_another_tenant_cannot_be_gone_on_from(world: World) -> None:
    body = {"model": "hallmark", "input": "Go on.", "previous_response_id": world.theirs.things["response_id"]}
    assert_envelope(await world.ours.api.client.post("/v1/responses", json=body), 404, "not_found")


@pytest.mark.parametrize("route", ROUTES)
async def test_a_route_shows_nothing_that_is_for_groups_of_others(world: World, route: str) -> None:
    method, things = route.split(" ")[0], {**world.ours.things, **world.restricted}
    response = await world.clerk.request(method, filled(route, things), json=BODIES.get(route))
    assert not leaks(response, [SECRET])
    of_documents = {"document_id", "job_id"} & owned(route)
    if of_documents and "/lineage/" not in route:
        assert_envelope(response, 404, "not_found")


async def test_what_failed_for_others_does_not_show(world: World) -> None:
    path = f"/v1/jobs/{world.restricted['failed_job']}"
    assert_envelope(await world.clerk.get(path), 404, "not_found")
    assert SECRET not in (await world.clerk.get("/v1/failed-documents")).text


WORDS = st.sampled_from(["theirs", "ours", "board", "tenant-0", "tenant-1", "role:admin", "*", ""])
FIELDS = st.sampled_from(
    [
        "tenant",
        "tenant_id",
        "user",
        "group",
        "groups",
        "for_groups",
        "scopes",
        "key_id",
        "filter",
        "owner",
        "labels",
        "",
    ]
)
VALUES = st.recursive(WORDS | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
ODDITIES = st.dictionaries(FIELDS, VALUES | st.dictionaries(FIELDS, VALUES, max_size=2), max_size=3)
CHANGES = st.sampled_from(["{}", "{} ", "{}/", "../{}", "{}%00", "{}/1", "/{}", "{}'--", "{}?", "{}#"])
HEADERS = st.dictionaries(
    st.sampled_from(["x-openwebui-user-id", "x-openwebui-user-role", "x-openwebui-user-jwt", "x-tenant", "x-groups"]),
    st.sampled_from(["tenant-0", "admin", "board", "theirs-user", "e30.e30."]),
)


# What is put in place of the parameters of a path: how it is changed, and which of all things there are it is.
PARTS = st.lists(st.tuples(CHANGES, st.integers(0, 199)), min_size=4, max_size=4)


@given(
    route=st.sampled_from(ROUTES), parts=PARTS, query=ODDITIES, extra=ODDITIES, asked=st.none() | ODDITIES, sent=HEADERS
)
@examples(400)
async def test_however_oddly_it_is_asked_nothing_of_others_shows(
    odd_world: World,
    route: str,
    parts: list[tuple[str, int]],
    query: dict[str, Any],
    extra: dict[str, Any],
    asked: dict[str, Any] | None,
    sent: dict[str, str],
) -> None:
    world, (method, path) = odd_world, route.split(" ")
    things = [*world.theirs.things.values(), *world.restricted.values(), *world.ours.things.values()]
    odd = iter([change.format(things[at % len(things)]) for change, at in parts])
    path = re.sub(r"{\w+}", lambda _: quote(next(odd), safe="%"), path)
    params = {name: value for name, value in query.items() if isinstance(value, str)}
    body = BODIES.get(route)
    if isinstance(body, dict):
        body = {**extra, **body}
        if asked is not None:
            body |= {"filter": asked} if "search" in path else {"retrieval": {"filter": asked}}
    world.said.append(f"{path} {params} {body}")
    unsaid = [secret for secret in world.theirs.secrets if not any(secret in said for said in world.said)]
    assert THEIRS in unsaid
    for client, secrets in ((world.ours.api.client, unsaid), (world.clerk, [SECRET, THEIRS])):
        response = await client.request(method, path, params=params, json=body, headers=sent)
        assert response.status_code < 500 or response.status_code == 503, response.text
        assert not leaks(response, secrets)
