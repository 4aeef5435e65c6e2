"""Releases and rollouts over HTTP, and what they do to the answers."""

import asyncio
import contextlib
import json
import tomllib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_tgi import FakeTGI, Tokens
from tests.postgres import Postgres
from tests.service import CHAT, Api, Service, description, live_service, until

HANDBOOK = Path(__file__).parents[2] / "examples" / "handbook"


@pytest.fixture
async def tgi() -> AsyncIterator[FakeTGI]:
    async with FakeTGI(adapters=("tone",)) as tgi:
        yield tgi


@contextlib.asynccontextmanager
async def serve(
    directory: Path, tgi: FakeTGI, *, key: str | None = None, **settings: Any
) -> AsyncIterator[tuple[Service, Api]]:
    async with (
        live_service(directory, engine_url=tgi.url, settings=settings, key=key) as service,
        service.client() as client,
    ):
        yield service, Api(client, "default", service.key)


@pytest.fixture
async def api(tmp_path, tgi, shared) -> AsyncIterator[Api]:
    async with serve(tmp_path / "data", tgi, **shared) as (_, api):
        yield api


async def create(api: Api, notes: str = "", *, status: int = 201, **fields: Any) -> dict[str, Any]:
    response = await api.client.post("/v1/releases", json={"name": "hallmark", "notes": notes, **fields})
    assert response.status_code == status, response.text
    return dict(response.json())


async def step(api: Api, what: str, *, name: str = "hallmark", status: int = 200, **body: Any) -> dict[str, Any]:
    response = await api.client.post(f"/v1/rollouts/{name}/{what}", json=body)
    assert response.status_code == status, response.text
    return dict(response.json())


async def told(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    return str(error["message"])


async def releases_of(api: Api, conversations: int, **fields: Any) -> list[str]:
    """Who answers so many conversations, in order."""
    found = []
    for number in range(conversations):
        headers = {"x-conversation-id": f"conversation {number}"}
        response = await api.client.post(CHAT, json=api.body("Hello", **fields), headers=headers)
        assert response.status_code == 200, response.text
        found.append(response.headers["x-release"])
    return found


# --- releases ---


async def test_a_release_is_created_shown_listed_and_compared(api):
    made = await create(api, "second", retrieval={"top_k": 7})
    assert (made["id"], made["approved"], made["problems"]) == ("hallmark@2", True, [])
    assert made["created_by"].startswith("test (key ")
    assert made["content"]["retrieval"]["top_k"] == 7
    again = await create(api, "second", retrieval={"top_k": 7}, status=200)
    assert again == made
    assert (await api.client.get("/v1/releases/hallmark@2")).json() == made
    listed = (await api.client.get("/v1/releases", params={"limit": 1})).json()
    assert [each["id"] for each in listed["data"]] == ["hallmark@1"]
    following = (await api.client.get("/v1/releases", params={"limit": 5, "after": listed["next"]})).json()
    assert [each["id"] for each in following["data"]] == ["hallmark@2"]
    diff = (await api.client.get("/v1/releases/diff", params={"a": "hallmark@1", "b": "hallmark@2"})).json()
    assert {each["field"]: (each["a"], each["b"]) for each in diff["differences"]} == {
        "notes": ("", "second"),
        "retrieval.top_k": (5, 7),
    }


async def test_the_handbook_s_example_can_be_created_but_for_its_adapter(api):
    text = (HANDBOOK / "rollouts.md").read_text(encoding="utf-8").split("```toml")[1].split("```")[0]
    assert tomllib.loads(text)["name"] == "support"
    response = await api.client.post("/v1/releases", content=text, headers={"content-type": "application/toml"})
    assert response.status_code == 201, response.text
    (problem,) = response.json()["problems"]
    assert "support-tone" in problem


async def test_a_mistake_names_its_field(api):
    response = await api.client.post("/v1/releases", json={"name": "hallmark", "adaptor": "tone"})
    assert "did you mean `adapter`" in await told(response, 400, "invalid_request", "adaptor")
    response = await api.client.post("/v1/releases", content=b"name = ", headers={"content-type": "application/toml"})
    assert "not valid TOML" in await told(response, 400, "invalid_request")
    response = await api.client.post("/v1/releases", content=b" " * 1_000_001)
    await told(response, 413, "payload_too_large")
    for label in ("hallmark", "hallmark@0", "x@y"):
        await told(await api.client.get(f"/v1/releases/{label}"), 400, "invalid_request", "release")
    await told(await api.client.get("/v1/releases/hallmark@9"), 404, "not_found", "release")
    response = await api.client.get("/v1/releases/diff", params={"a": "hallmark@1", "b": "hallmark@9"})
    await told(response, 404, "not_found", "b")


async def test_an_adapter_that_the_engine_does_not_serve_answers_nobody(api, tgi):
    made = await create(api, adapter="toen")
    assert not made["approved"]
    assert "`adapter`" in made["problems"][0]
    for what in ({"release": "hallmark@2"}, {"release": "hallmark@2", "why": "anyway"}):
        response = await api.client.post("/v1/rollouts/hallmark/promote", json=what)
        assert "hallmark@2 cannot serve" in await told(response, 409, "conflict", "release")
    response = await api.ask("Hello", model="hallmark@2")
    await told(response, 404, "model_not_found", "model")
    assert tgi.bodies == []


async def test_a_release_that_classifies_has_its_labels(api):
    made = await create(api, task={"kind": "classify", "labels": ["refund", "other"]})
    assert made["content"]["task"]["labels"] == ["refund", "other"]
    assert made["problems"] == []


async def test_a_release_that_serves_is_not_deleted_and_another_is(api):
    await create(api, "second")
    await told(await api.client.delete("/v1/releases/hallmark@1"), 409, "conflict")
    gone = await api.client.delete("/v1/releases/hallmark@2")
    assert gone.json() == {"id": "hallmark@2", "object": "release.deleted", "deleted": True}
    await told(await api.client.get("/v1/releases/hallmark@2"), 404, "not_found", "release")


# --- rollouts ---


async def test_a_canary_is_tried_grown_promoted_and_taken_back(api):
    await create(api, "second")
    after = await step(api, "canary", release="hallmark@2", share=0.3, why="new words")
    assert (after["stable"], after["canary"], after["share"]) == ("hallmark@1", "hallmark@2", 0.3)
    first = await releases_of(api, 40)
    assert set(first) == {"hallmark@1", "hallmark@2"}
    assert await releases_of(api, 40) == first
    await step(api, "canary", share=0.6)
    grown = await releases_of(api, 40)
    assert all(then == "hallmark@2" for before, then in zip(first, grown, strict=True) if before == "hallmark@2")
    assert grown.count("hallmark@2") > first.count("hallmark@2")

    await step(api, "promote", why="good")
    assert set(await releases_of(api, 10)) == {"hallmark@2"}
    back = await step(api, "rollback", why="bad", revision=4)
    assert (back["stable"], back["previous"]) == ("hallmark@1", [])
    assert set(await releases_of(api, 10)) == {"hallmark@1"}
    changes = (await api.client.get("/v1/rollouts/hallmark/changes")).json()["data"]
    assert [(each["action"], each["why"]) for each in changes] == [
        ("rollback", "bad"),
        ("promote", "good"),
        ("canary", ""),
        ("canary", "new words"),
        ("promote", "first start"),
    ]
    assert changes[0]["before"]["stable"] == "hallmark@2"
    assert changes[0]["after"] == (await api.client.get("/v1/rollouts/hallmark")).json()
    assert changes[0]["who"].startswith("test (key ")


async def test_a_prediction_says_why_its_release_answered(api):
    await create(api, "second")
    await step(api, "canary", release="hallmark@2", share=1.0)
    for model in ("hallmark", "hallmark@1"):
        await api.answer("Hello", model=model, user="ann")
    newest, older = await api.records(2)
    assert (newest["release_name"], newest["assignment"], newest["shadow_of"]) == ("hallmark@1", "pinned", None)
    assert (older["release_name"], older["assignment"]) == ("hallmark@2", "canary")
    release = (await api.client.get("/v1/releases/hallmark@2")).json()
    assert older["release_digest"] == release["digest"]


async def test_without_a_conversation_a_user_stays_with_a_release(api):
    await create(api, "second")
    await step(api, "canary", release="hallmark@2", share=0.5)
    for user in ("ann", "bob", "cleo", "dan"):
        responses = [await api.ask("Hello", user=user) for _ in range(4)]
        assert len({response.headers["x-release"] for response in responses}) == 1
    nobody = Counter([(await api.ask("Hello")).headers["x-release"] for _ in range(40)])
    assert len(nobody) == 2


async def test_a_paused_rollout_sends_everything_to_stable_until_it_goes_on(api):
    await create(api, "second")
    await step(api, "canary", release="hallmark@2", share=1.0)
    assert (await step(api, "pause"))["paused"]
    assert set(await releases_of(api, 3)) == {"hallmark@1"}
    assert not (await step(api, "resume"))["paused"]
    assert set(await releases_of(api, 3)) == {"hallmark@2"}


async def test_another_name_begins_with_a_promotion_and_is_listed_as_a_model(api):
    await create(api, name="support")
    await step(api, "canary", name="support", release="support@1", share=0.5, status=404)
    await step(api, "promote", name="support", release="support@1")
    assert (await api.ask("Hello", model="support")).headers["x-release"] == "support@1"
    models = (await api.client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["release"]) for model in models] == [
        ("hallmark", "hallmark@1"),
        ("support", "support@1"),
    ]
    assert [each["name"] for each in (await api.client.get("/v1/rollouts")).json()["data"]] == ["hallmark", "support"]


MISFITS: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("canary", {"release": "hallmark@2", "share": 1.5}, 400, "share"),
    ("canary", {"release": "hallmark@2"}, 400, "share"),
    ("canary", {"release": "other@2", "share": 0.5}, 400, "release"),
    ("canary", {"release": "2", "share": 0.5}, 400, "release"),
    ("canary", {"share": 0.5}, 400, "release"),
    ("canary", {"release": "hallmark@1", "share": 0.5}, 409, "release"),
    ("canary", {"release": "hallmark@9", "share": 0.5}, 404, "release"),
    ("shadow", {"rate": 0.5}, 400, "release"),
    ("promote", {}, 409, "release"),
    ("promote", {"revision": 7, "release": "hallmark@2"}, 409, "revision"),
    ("promote", {"why": "x\x00"}, 400, "why"),
    ("promote", {"releese": "hallmark@2"}, 400, "releese"),
    ("rollback", {}, 409, None),
    ("resume", {}, 409, None),
]


async def test_a_change_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, tgi):
    async with serve(tmp_path / "data", tgi) as (_, api):
        await create(api, "second")
        for what, body, status, param in MISFITS:
            error = (await step(api, what, status=status, **body))["error"]
            assert error["param"] == param, (what, body)
            assert (await api.client.get("/v1/rollouts/hallmark")).json()["revision"] == 1


async def test_a_request_in_flight_finishes_on_the_release_it_began_with(api, tgi):
    await create(api, "second", prompt={"version": "two", "template": "{sources} {question}"})
    hold = asyncio.Event()
    tgi.script(Tokens("One", " two", gates={1: hold}))
    async with api.streaming("Hello") as (stream, events):
        await anext(events)
        await step(api, "promote", release="hallmark@2")
        assert (await api.ask("Hello")).headers["x-release"] == "hallmark@2"
        hold.set()
        async for _ in events:
            pass
    assert stream.done
    assert stream.response.headers["x-release"] == "hallmark@1"
    assert {row["release_name"] for row in await api.records(2)} == {"hallmark@1", "hallmark@2"}


async def test_readiness_tells_of_a_canary_that_the_engine_no_longer_serves(tmp_path):
    settings = {"engine": {"dialect": "embedded"}}
    async with (
        FakeTGI(adapters=("tone",), lists_adapters=True) as tgi,
        serve(tmp_path / "data", tgi, **settings) as (_, api),
    ):
        await create(api, adapter="tone")
        await step(api, "canary", release="hallmark@2", share=0.5)
        assert (await api.client.get("/readyz")).json()["checks"]["release"] == "ok"
        tgi.adapters = ()

        async def told_so() -> bool:
            return "hallmark@2: `adapter`" in (await api.client.get("/readyz")).text

        await until(told_so)


# --- several replicas ---


async def test_two_replicas_follow_each_other_under_traffic_without_a_failed_request(tmp_path, tgi, postgres):
    shared = {"database_url": postgres.create_database()}
    async with (
        serve(tmp_path / "one", tgi, **shared) as (_, one),
        serve(tmp_path / "other", tgi, **shared) as (_, other),
    ):
        await create(one, "second")
        stop = asyncio.Event()
        seen: list[tuple[int, str]] = []

        async def ask_on(api: Api, stream: bool) -> None:
            while not stop.is_set():
                if stream:
                    answer = await api.stream("Hello")
                    assert answer.done
                    seen.append((answer.response.status_code, answer.response.headers["x-release"]))
                else:
                    response = await api.ask("Hello")
                    seen.append((response.status_code, response.headers["x-release"]))

        asking = [asyncio.create_task(ask_on(api, stream)) for api in (one, other) for stream in (False, True)]

        async def everywhere(label: str) -> None:
            for api in (one, other):

                async def there(api: Api = api) -> bool:
                    return (await api.ask("Hello")).headers["x-release"] == label

                await until(there)

        await step(one, "promote", release="hallmark@2")
        await everywhere("hallmark@2")
        await step(other, "rollback")
        await everywhere("hallmark@1")
        await step(one, "canary", release="hallmark@2", share=1.0)
        await everywhere("hallmark@2")
        stop.set()
        await asyncio.gather(*asking)
        assert {status for status, _ in seen} == {200}
        assert {label for _, label in seen} == {"hallmark@1", "hallmark@2"}
        # What one replica says of a conversation, the other says too.
        await step(other, "canary", share=0.5)
        expected = await releases_of(other, 30)
        assert len(set(expected)) == 2

        async def agreed() -> bool:
            return await releases_of(one, 30) == expected

        await until(agreed)


async def test_a_database_that_is_down_stops_changes_and_no_answers(tmp_path, tgi):
    with Postgres() as server:
        url = server.create_database()
        async with serve(tmp_path / "data", tgi, database_url=url) as (service, api):
            await create(api, "second")
            await step(api, "promote", release="hallmark@2")
            server.stop()
            assert set(await releases_of(api, 3)) == {"hallmark@2"}
            await told(await api.client.post("/v1/rollouts/hallmark/rollback", json={}), 503, "unavailable")
            await told(await api.client.get("/v1/releases"), 503, "unavailable")
            assert (await api.client.get("/v1/models")).status_code == 200
        async with serve(tmp_path / "data", tgi, database_url=url, key=service.key) as (_, api):
            assert set(await releases_of(api, 3)) == {"hallmark@2"}  # Also started without it.
            server.start()
            await step(api, "rollback")
            assert set(await releases_of(api, 3)) == {"hallmark@1"}


async def test_the_openapi_example_of_a_release_is_what_is_read(api):
    schema = description()["components"]["schemas"]["Release"]
    assert schema["required"] == ["name"]
    made = await create(api, "full")
    # Rules for alerts come with a release and are kept beside it: they are no part of what its digest is taken of. And
    # features are no part of one that names none.
    assert set(made["content"]) | {"alerts", "features"} == set(schema["properties"])
    assert json.dumps(made["content"])
