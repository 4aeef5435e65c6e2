"""What answers while an engine cannot: another release, the passages alone, or a 503 that says when to come back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from tests.fake_tgi import FakeTGI, Refuse, Tokens
from tests.service import CHAT, Api, Service, live_service, until

KETTLE = """# Aurora kettle

The Aurora kettle boils one litre in 90 seconds. It holds 1.7 litres and weighs 1200 grams.

## Warranty

The warranty of the Aurora kettle lasts 24 months from the date of purchase.
"""
SPEED = "How fast does the Aurora kettle boil one litre?"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@asynccontextmanager
async def two_groups(
    directory: Path, big: FakeTGI, small: FakeTGI, *, tenants: int = 0, **engine: Any
) -> AsyncIterator[tuple[Service, Api]]:
    """A service with releases on both groups: `plain`, `safe` (falls back on `small@1`), `quoting`, and both."""
    settings = {"engine": engine, "engines": {"small": {"urls": [small.url], "model": "org/small"}}}
    async with (
        live_service(directory, engine_url=big.url, settings=settings, tenants=tenants) as service,
        service.client() as client,
    ):
        api = Api(client, "default", service.key)
        await create(api, "small", engine="small", retrieval={"mode": "off"})
        await create(api, "plain")
        await create(api, "safe", fallback="small@1")
        await create(api, "quoting", fallback="extractive")
        await create(api, "small-quoting", engine="small", fallback="extractive")
        await create(api, "both", fallback="small-quoting@1")
        yield service, api


async def create(api: Api, name: str, **fields: Any) -> dict[str, Any]:
    response = await api.client.post("/v1/releases", json={"name": name, **fields})
    assert response.status_code == 201, response.text
    made = dict(response.json())
    assert made["problems"] == []
    promoted = await api.client.post(f"/v1/rollouts/{name}/promote", json={"release": f"{name}@1", "why": "test"})
    assert promoted.status_code == 200, promoted.text
    return made


async def gauge(client: httpx.AsyncClient, name: str, **labels: str) -> float | None:
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    for line in (await client.get("/metrics")).text.splitlines():
        if line.partition("{")[0] == name and all(each in line for each in wanted):
            return float(line.rpartition(" ")[2])
    return None


async def is_away(client: httpx.AsyncClient, group: str) -> bool:
    return await gauge(client, "hallmark_engine_up", engine=group) == 0


@pytest.fixture(scope="module")
def began() -> float:
    """A moment before the engine went away."""
    return monotonic()


@pytest.fixture(scope="module")
async def everyone(began, tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, FakeTGI, Service]]:
    """A service whose engine is away, and whose other engine is not."""
    async with (
        FakeTGI() as big,
        FakeTGI(default=Tokens("A small", " answer.")) as small,
        two_groups(tmp_path_factory.mktemp("away"), big, small, tenants=20) as (service, api),
    ):
        big.is_healthy = False
        await until(lambda: is_away(api.client, "tgi"))
        big.requests.clear()
        yield big, small, service


@pytest.fixture
async def api(everyone) -> AsyncIterator[Api]:
    async with everyone[2].tenant() as api:
        yield api


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("model", ["safe", "safe@1"])
async def test_the_release_it_falls_back_on_answers_and_everything_says_so(api, everyone, stream, model):
    response = await api.client.post(CHAT, json=api.body("Hello", model=model, stream=stream))
    assert response.status_code == 200
    assert response.headers["x-release"] == "small@1"
    small = (await api.client.get("/v1/releases/small@1")).json()
    if not stream:
        body = response.json()
        assert (body["fallback"], body["model"], body["system_fingerprint"]) == ("small@1", model, small["digest"])
        assert body["choices"][0]["message"]["content"] == "A small answer."
    else:
        assert '"fallback":"small@1"' in response.text
        assert response.text.count(small["digest"]) == response.text.count('"id":')
        assert response.text.endswith("data: [DONE]\n\n")
    record = await api.record()
    assert (record["assignment"], record["fallback"], record["release_name"]) == ("fallback", "small@1", "small@1")
    assert (record["model"], record["release_digest"], record["retrieval_mode"]) == (model, small["digest"], "off")
    big, small_engine, _ = everyone
    assert big.bodies == []
    assert small_engine.bodies[-1]["model"] == "org/small"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_passages_answer_by_themselves_cited_and_marked(api, everyone, stream):
    document = await api.add("kettle.md", KETTLE)
    if stream:
        answered = await api.stream(SPEED, model="quoting")
        assert answered.done
        text, evidence = answered.text, answered.evidence
        assert answered.finish_reason == "stop"
    else:
        evidence = await api.answer(SPEED, model="quoting")
        text = evidence["choices"][0]["message"]["content"]
    assert text == "The Aurora kettle boils one litre in 90 seconds [1]."
    assert evidence["fallback"] == "extractive"
    assert (evidence["verdict"]["status"], evidence["verdict"]["reason"]) == ("replaced", "engine_unavailable")
    (citation,) = evidence["citations"]
    source = await api.source(document["id"])
    assert source[citation["source_start"] : citation["source_end"]] == citation["quote"]
    assert "90 seconds" in citation["quote"]
    record = await api.record()
    assert (record["assignment"], record["fallback"], record["release_name"]) == (
        "extractive",
        "extractive",
        "quoting@1",
    )
    assert (record["outcome"], record["verdict"]) == ("finished", "replaced:engine_unavailable")
    assert len(record["citations"]) == 1
    assert everyone[0].bodies == []


async def test_what_no_passage_is_about_is_refused_as_ever(api):
    await api.add("kettle.md", KETTLE)
    answer = await api.answer("Who won the chess championship of 1972?", model="quoting")
    assert answer["verdict"]["reason"] == "nothing_relevant"


async def told_to_retry(response: httpx.Response) -> int:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "engine_unavailable")
    return int(response.headers["retry-after"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_without_a_fallback_it_is_a_503_that_says_when_the_engine_should_be_there(api, began, stream):
    told = await told_to_retry(await api.ask("Hello", model="plain", stream=stream))
    assert max(1, 30 - (monotonic() - began)) <= told <= 30  # A start is taken to last 30 seconds until one was seen.
    record = await api.record()
    assert (record["outcome"], record["error_code"], record["assignment"], record["fallback"]) == (
        "failed",
        "engine_unavailable",
        "stable",
        None,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"retrieval": {"mode": "off"}},
    ],
    ids=["tools", "json", "probabilities", "no retrieval"],
)
async def test_a_program_and_a_plain_chat_get_no_sentence_of_a_passage(api, fields):
    await api.add("kettle.md", KETTLE)
    await told_to_retry(await api.ask(SPEED, model="quoting", **fields))
    record = await api.record()
    assert (record["assignment"], record["fallback"]) == ("stable", None)


async def test_what_a_chat_page_asks_for_itself_is_not_stood_in_for(api):
    headers = {"x-openwebui-task": "title_generation"}
    response = await api.client.post(CHAT, json=api.body("A title?", model="safe"), headers=headers)
    assert response.status_code == 503
    assert (await api.record())["assignment"] == "chore"


async def test_without_documents_there_is_nothing_to_quote(api):
    await told_to_retry(await api.ask(SPEED, model="quoting"))


async def test_fallbacks_are_counted_and_the_engine_s_state_is_shown(api):
    before = await gauge(api.client, "hallmark_fallbacks_total", release="small@1", kind="fallback") or 0
    await api.answer("Hello", model="safe")
    assert await gauge(api.client, "hallmark_fallbacks_total", release="small@1", kind="fallback") == before + 1
    assert await gauge(api.client, "hallmark_engine_state", engine="tgi", state="open") == 1
    assert await gauge(api.client, "hallmark_engine_up", engine="small") == 1


async def test_readiness_names_the_engine_that_is_out(api, everyone):
    ready = await api.client.get("/readyz")
    assert ready.status_code == 503  # `plain` has nothing to fall back on.
    place = everyone[0].url.removeprefix("http://")
    assert f"{place} of 'tgi' is out: says that it takes no work" in ready.json()["checks"]["engine"]


# --- engines that fail while they are asked ---


@pytest.fixture(scope="module")
async def alive(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, FakeTGI, Service]]:
    async with (
        FakeTGI() as big,
        FakeTGI(default=Tokens("A small", " answer.")) as small,
        two_groups(tmp_path_factory.mktemp("alive"), big, small, tenants=20) as (service, _),
    ):
        yield big, small, service


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_engine_that_fails_before_its_first_word_is_stood_in_for(alive, stream):
    big, _, service = alive
    async with service.tenant() as api:
        big.script(Refuse.failed())
        response = await api.ask("Hello", model="safe", stream=stream)
        assert (response.status_code, response.headers["x-release"]) == (200, "small@1")
        record = await api.record()
        assert (record["assignment"], record["outcome"], record["answer"]) == (
            "fallback",
            "finished",
            "A small answer.",
        )


async def test_what_was_found_for_the_release_that_failed_is_not_of_the_other_s_answer(alive):
    big, small, service = alive
    async with service.tenant() as api:
        await api.add("kettle.md", KETTLE)
        big.script(Refuse.failed())
        answer = await api.answer(SPEED, model="safe")
        assert "90 seconds" in str(big.bodies[-1])
        assert "90 seconds" not in str(small.bodies[-1])
        assert (answer["fallback"], "citations" in answer) == ("small@1", False)
        record = await api.record()
        found = [record[name] for name in ("passages", "messages", "question", "index_version", "citations")]
        assert (found, record["retrieval_outcome"]) == ([None] * 5, "off")


@pytest.mark.parametrize(
    ("act", "status"),
    [(Refuse.overloaded(), 429), (Refuse(422, "Input validation error: no", "validation"), 400)],
    ids=["full", "invalid"],
)
async def test_a_full_engine_and_a_refusal_are_told_to_the_caller(alive, act, status):
    big, small, service = alive
    async with service.tenant() as api:
        asked = len(small.bodies)
        big.script(act)
        assert (await api.ask("Hello", model="safe")).status_code == status
        assert (await api.record())["fallback"] is None
        assert len(small.bodies) == asked


async def test_a_stream_that_broke_off_is_not_begun_again_by_another(alive):
    big, _, service = alive
    async with service.tenant() as api:
        big.script(Tokens("One", " two.", cut_after=1))
        answered = await api.stream("Hello", model="safe", retrieval={"mode": "off"})
        assert answered.error is not None
        assert (answered.text, answered.error["code"]) == ("One", "engine_interrupted")
        assert (await api.record())["fallback"] is None


async def test_fallbacks_of_fallbacks_are_followed(alive):
    big, small, service = alive
    async with service.tenant() as api:
        await api.add("kettle.md", KETTLE)
        big.script(Refuse.failed())
        small.script(Refuse.failed())
        answer = await api.answer(SPEED, model="both")
        assert answer["fallback"] == "extractive"
        record = await api.record()
        assert (record["release_name"], record["assignment"]) == ("small-quoting@1", "extractive")


async def test_when_the_fallback_fails_too_its_error_is_told(alive):
    big, small, service = alive
    async with service.tenant() as api:
        big.script(Refuse.failed())
        small.script(Refuse.failed())
        assert (await api.ask("Hello", model="safe")).status_code == 502
        record = await api.record()
        assert (record["outcome"], record["release_name"]) == ("failed", "small@1")


async def test_an_engine_no_setting_names_keeps_a_release_from_serving(alive):
    _, _, service = alive
    async with service.client() as client:
        made = await client.post("/v1/releases", json={"name": "lost", "engine": "huge"})
        assert made.json()["problems"] == ["`engine` is 'huge'; this service has 'tgi', 'small'."]
        assert (await client.post("/v1/rollouts/lost/promote", json={"release": "lost@1"})).status_code == 409


async def test_promoting_approves_what_is_fallen_back_on(tmp_path):
    async with FakeTGI() as big, FakeTGI() as small:
        settings = {"engines": {"small": {"urls": [small.url]}}}
        async with live_service(tmp_path, engine_url=big.url, settings=settings) as service, service.client() as client:
            api = Api(client, "default", service.key)
            await small.stop()  # So that it cannot be vetted when it is created.
            made = await client.post("/v1/releases", json={"name": "late", "engine": "small"})
            assert made.json()["approved"] is False
            await create_unserved(client, "early", fallback="late@1")
            refused = await client.post("/v1/rollouts/early/promote", json={"release": "early@1"})
            assert refused.status_code == 503
            async with FakeTGI(port=int(small.url.rpartition(":")[2])):
                promoted = await client.post("/v1/rollouts/early/promote", json={"release": "early@1"})
                assert promoted.status_code == 200, promoted.text
                assert (await client.get("/v1/releases/late@1")).json()["approved"] is True
                await api.answer("Hello", model="early")


async def create_unserved(client: httpx.AsyncClient, name: str, **fields: Any) -> None:
    assert (await client.post("/v1/releases", json={"name": name, **fields})).status_code == 201


async def test_a_release_whose_engine_was_taken_from_the_settings_says_so(tmp_path):
    async with FakeTGI() as big, FakeTGI() as small:
        async with two_groups(tmp_path, big, small):
            pass
        async with live_service(tmp_path, engine_url=big.url) as service, service.client() as client:
            api = Api(client, "default", service.key)
            response = await api.ask("Hello", model="small")
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
            assert "no engine 'small'" in response.json()["error"]["message"]
            assert "no engine 'small'" in (await client.get("/readyz")).json()["checks"]["release"]
            assert (await api.ask("Hello", model="plain")).status_code == 200


async def test_the_release_of_the_settings_can_quote_too(tmp_path):
    settings = {"release": {"engine_fallback": "extractive"}}
    async with FakeTGI() as tgi:
        await tgi.stop()
        async with live_service(tmp_path, engine_url=tgi.url, settings=settings) as service, service.client() as client:
            api = Api(client, "default", service.key)
            await until(lambda: is_away(client, "tgi"))
            await api.add("kettle.md", KETTLE)
            assert (await api.answer(SPEED))["fallback"] == "extractive"
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["checks"]["engine"].startswith("ok, but ")) == (200, True)


# --- cold start ---


async def test_requests_wait_for_an_engine_that_starts_in_a_bounded_room(tmp_path):
    async with FakeTGI() as tgi:
        port = int(tgi.url.rpartition(":")[2])
    settings = {"engine": {"start_wait_seconds": 10.0, "start_wait_requests": 3, "warmup_requests": 2}}
    async with live_service(tmp_path, engine_url=tgi.url, settings=settings) as service, service.client() as client:
        api = Api(client, "default", service.key)
        await until(lambda: is_away(client, "tgi"))
        asked = [asyncio.create_task(api.ask("Hello", stream=number == 0)) for number in range(3)]

        async def is_full() -> bool:
            return await gauge(client, "hallmark_engine_waiting_room", engine="tgi") == 3

        await until(is_full)
        assert await told_to_retry(await api.ask("Hello")) >= 20
        async with FakeTGI(port=port) as started:
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [200] * 3
            # The first two were the pool's own.
            assert [body["max_tokens"] for body in started.bodies] == [1, 1, 256, 256, 256]
            assert 0 < (await gauge(client, "hallmark_engine_start_seconds", engine="tgi") or 0) < 10
            records = await api.records(4)
            assert {record["assignment"] for record in records} == {"stable"}
            waited = [record["engine_seconds"] for record in records if record["outcome"] == "finished"]
            assert min(waited) > 0.01


async def test_after_a_measured_start_retry_after_is_what_is_left_of_it(tmp_path):
    async with FakeTGI() as tgi:
        port = int(tgi.url.rpartition(":")[2])
    began = monotonic()
    async with live_service(tmp_path, engine_url=tgi.url) as service, service.client() as client:
        api = Api(client, "default", service.key)
        await until(lambda: is_away(client, "tgi"))
        assert await told_to_retry(await api.ask("Hello")) >= 25

        async def is_up() -> bool:
            return not await is_away(client, "tgi")

        async with FakeTGI(port=port):
            await until(is_up)
        measured = await gauge(client, "hallmark_engine_start_seconds", engine="tgi") or 0
        assert 0 < measured <= monotonic() - began
        assert await told_to_retry(await api.ask("Hello")) <= max(1, round(measured))


async def test_a_client_that_leaves_the_room_makes_place_and_is_on_record(tmp_path):
    async with FakeTGI() as tgi:
        pass
    settings = {"engine": {"start_wait_seconds": 10.0}}
    async with live_service(tmp_path, engine_url=tgi.url, settings=settings) as service, service.client() as client:
        api = Api(client, "default", service.key)
        await until(lambda: is_away(client, "tgi"))
        leaving = asyncio.create_task(api.ask("Hello"))

        async def waiting(count: int) -> bool:
            return await gauge(client, "hallmark_engine_waiting_room", engine="tgi") == count

        await until(lambda: waiting(1))
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await until(lambda: waiting(0))
        assert (await api.record())["outcome"] == "cancelled"
