"""What a request may not be: refused by name, before anything is recorded and before the engine is asked."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from app.access import revoke_key
from tests.fake_tgi import FakeTGI, Tokens
from tests.properties import examples
from tests.service import CHAT, Api, Service, live_service, until
from tests.stopwatch import Stopwatch

QUESTION = "What is a release?"
BODY_LIMIT = 20_000


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Service]]:
    limits = {"max_body_bytes": BODY_LIMIT, "max_concurrent_answers": 4, "max_waiting_answers": 0}
    async with FakeTGI() as tgi:
        directory = tmp_path_factory.mktemp("bad-input")
        async with live_service(directory, engine_url=tgi.url, tenants=120, settings={"limits": limits}) as service:
            yield tgi, service


@pytest.fixture
def service(everyone) -> Service:
    return everyone[1]


@pytest.fixture
async def api(service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


def assert_envelope(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def image(image_url: Any) -> dict[str, Any]:
    return {"messages": [user([{"type": "image_url", "image_url": image_url}])]}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "model is a number": ({"model": 7}, "model"),
    "model is empty": ({"model": ""}, "model"),
    "model is endless": ({"model": "m" * 300}, "model"),
    "no messages": ({"messages": []}, "messages"),
    "messages is a text": ({"messages": "Hello"}, "messages"),
    "a message is a text": ({"messages": ["Hello"]}, "messages[0]"),
    "a message without a role": ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
    "an unknown role": ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages[0].role"),
    "no content": ({"messages": [user("Hello"), {"role": "user"}]}, "messages[1].content"),
    "content is a number": ({"messages": [user(7)]}, "messages[0].content"),
    "content is no part": ({"messages": [user([7])]}, "messages[0].content[0]"),
    "a part of another type": ({"messages": [user([{"type": "video"}])]}, "messages[0].content[0]"),
    "a part without its text": ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0]"),
    "a part without a type": ({"messages": [user([{"text": "Hello"}])]}, "messages[0].content[0]"),
    "an image that is a text": (image("data:image/png;base64,AA"), "messages[0].content[0].image_url"),
    "an image without a URL": (image({"detail": "low"}), "messages[0].content[0].image_url"),
    "an image from the network": (image({"url": "http://169.254.169.254/"}), "messages[0].content[0].image_url.url"),
    "an image from a file": (image({"url": "file:///etc/passwd"}), "messages[0].content[0].image_url.url"),
    **{
        f"an image of {what}": (image({"url": url}), "messages[0].content[0].image_url.url")
        for what, url in {
            "a second one": "data:image/png;base64,AA)![](http://169.254.169.254/",
            "a text": "data:image/png,AA",
            "nothing": "data:image/png;base64,",
            "two lines": "data:image/png;base64,AA\n",
        }.items()
    },
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "logit_bias": ({"logit_bias": {"50256": -100}}, "logit_bias"),
    "a spoken answer": ({"modalities": ["text", "audio"]}, "modalities"),
    "a voice": ({"audio": {"voice": "alloy"}}, "audio"),
    "a search of the web": ({"web_search_options": {}}, "web_search_options"),
    "a tool's turn without content": ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
    "an empty assistant turn": ({"messages": [user("Hi"), {"role": "assistant", "content": ""}]}, "messages"),
    "max_tokens is zero": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens is a text": ({"max_tokens": "9"}, "max_tokens"),
    "max_completion_tokens is negative": ({"max_completion_tokens": -1}, "max_completion_tokens"),
    "both limits": ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    "temperature is cold": ({"temperature": -0.1}, "temperature"),
    "temperature is hot": ({"temperature": 2.1}, "temperature"),
    "top_p is negative": ({"top_p": -0.1}, "top_p"),
    "top_p is large": ({"top_p": 1.1}, "top_p"),
    "frequency_penalty": ({"frequency_penalty": 3}, "frequency_penalty"),
    "presence_penalty": ({"presence_penalty": "x"}, "presence_penalty"),
    "seed is a fraction": ({"seed": 0.5}, "seed"),
    "seed is too large": ({"seed": 2**63}, "seed"),
    "stop is a number": ({"stop": 1}, "stop"),
    "five stops": ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    "a stop is a number": ({"stop": ["a", 1]}, "stop[1]"),
    "n is two": ({"n": 2}, "n"),
    "logprobs is a number": ({"logprobs": 1}, "logprobs"),
    "top_logprobs is large": ({"top_logprobs": 21}, "top_logprobs"),
    "tools is a text": ({"tools": "hammer"}, "tools"),
    "a tool is a text": ({"tools": ["hammer"]}, "tools[0]"),
    "tool_choice is a number": ({"tool_choice": 1}, "tool_choice"),
    "response_format is a text": ({"response_format": "json"}, "response_format"),
    "stream is a text": ({"stream": "yes"}, "stream"),
    "stream_options is a text": ({"stream_options": "usage"}, "stream_options"),
    "include_usage is a text": ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    "user is a number": ({"user": 7}, "user"),
    "user is endless": ({"user": "u" * 600}, "user"),
    "a NUL in the user": ({"user": "an\0na"}, "user"),
    "store is a text": ({"store": "no"}, "store"),
    "metadata is a text": ({"metadata": "x"}, "metadata"),
    "metadata nests": ({"metadata": {"a": {"b": 1}}}, "metadata"),
    "metadata has too many keys": ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    "metadata has a long value": ({"metadata": {"a": "x" * 513}}, "metadata"),
    "metadata has a long key": ({"metadata": {"a" * 65: "x"}}, "metadata"),
    "retrieval is a flag": ({"retrieval": True}, "retrieval"),
    "an unknown retrieval mode": ({"retrieval": {"mode": "maybe"}}, "retrieval.mode"),
    "an unknown retrieval option": ({"retrieval": {"topk": 3}}, "retrieval.topk"),
    "top_k is zero": ({"retrieval": {"top_k": 0}}, "retrieval.top_k"),
    "top_k is large": ({"retrieval": {"top_k": 51}}, "retrieval.top_k"),
    "filter is a text": ({"retrieval": {"filter": "x"}}, "retrieval.filter"),
    "an unknown search": ({"retrieval": {"search": "magic"}}, "retrieval.search"),
    "an unknown check": ({"retrieval": {"check": "twice"}}, "retrieval.check"),
    "an unknown fallback": ({"retrieval": {"fallback": "guess"}}, "retrieval.fallback"),
    "an unknown style": ({"retrieval": {"style": "baroque"}}, "retrieval.style"),
}


@pytest.mark.parametrize(("fields", "param"), WRONG.values(), ids=WRONG)
async def test_every_wrong_field_is_a_400_that_names_it(api, tgi, fields, param):
    response = await api.client.post(CHAT, json={**api.body(QUESTION), **fields})
    error = assert_envelope(response, 400, "invalid_request", param)
    assert error["type"] == "invalid_request_error"
    assert param.partition("[")[0].partition(".")[0] in error["message"]
    assert await api.records(0) == []
    assert tgi.bodies == []


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"top_p": 0},
        {"metadata": {"a": None}},
        {"functions": [], "logit_bias": {}, "modalities": ["text"], "parallel_tool_calls": False},
        {"functions": None, "logit_bias": None, "modalities": None, "audio": None, "metadata": None},
        {"service_tier": "auto", "prompt_cache_key": "x", "anything": {"else": 1}},
        image({"url": "data:image/png;base64,AA", "detail": "low"}),
    ],
    ids=" ".join,
)
async def test_what_openai_takes_is_answered(api, tgi, fields):
    response = await api.client.post(CHAT, json={**api.body(QUESTION), **fields})
    assert response.status_code == 200, response.text
    assert len(tgi.bodies) == 1
    assert await api.record()


async def test_metadata_without_a_value_is_left_out(api, tgi):
    await api.answer(QUESTION, metadata={"a": None, "b": "kept"})
    assert (await api.record())["metadata"] == {"b": "kept"}


async def test_turns_that_openai_has_deprecated_reach_the_engine_in_their_present_form(api, tgi):
    called = {"name": "f", "arguments": "{}"}
    turns = [
        user("Hello"),
        {"role": "assistant", "content": None, "refusal": None},
        user("Call f"),
        {"role": "assistant", "content": None, "function_call": called},
        {"role": "function", "name": "f", "content": "42"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I can't."}]},
        {"role": "developer", "content": "Be brief."},
        user("Why?"),
    ]
    await api.answer(turns)
    call = {"id": "call_function_3", "type": "function", "function": called}
    assert tgi.bodies[0]["messages"] == [
        user("Hello"),
        {"role": "assistant", "content": ""},
        user("Call f"),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "42", "name": "f", "tool_call_id": "call_function_3"},
        {"role": "assistant", "content": [{"type": "text", "text": "I can't."}]},
        {"role": "system", "content": "Be brief."},
        user("Why?"),
    ]


async def test_images_by_url_are_passed_on_only_where_the_settings_say_so(tmp_path):
    settings = {"limits": {"remote_images": True}}
    fields = image({"url": "https://images.example/cat.png"})
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path, engine_url=tgi.url, settings=settings) as service,
        service.client() as client,
    ):
        assert (await client.post(CHAT, json={"model": "hallmark", **fields})).status_code == 200
        assert tgi.bodies[0]["messages"] == fields["messages"]


@pytest.mark.parametrize("name", ["model", "messages"])
async def test_a_missing_field_is_a_400_that_names_it(api, tgi, name):
    body = api.body(QUESTION)
    del body[name]
    assert_envelope(await api.client.post(CHAT, json=body), 400, "invalid_request", name)
    assert tgi.bodies == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"hello", b"[]", b"7", b"null", b'"text"', b"\xff\xfe", b'{"model": "hallmark",}', b"[" * 9_000],
    ids=["nothing", "half", "words", "list", "number", "null", "text", "bytes", "comma", "deep"],
)
async def test_a_body_that_is_no_json_object_is_a_400(api, tgi, content):
    response = await api.client.post(CHAT, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"
    assert await api.records(0) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["model", "messages", "max_tokens", "temperature", "top_p", "stop", "tools", "tool_choice", "response_format"]
FIELDS += ["stream", "stream_options", "user", "store", "metadata", "retrieval", "seed", "logprobs", "n"]


@examples(100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
async def test_whatever_a_field_holds_it_is_answered_or_refused_in_the_envelope(api, tgi, fields):
    response = await api.client.post(CHAT, json=_finite({**api.body(QUESTION), **fields}))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "code", "param", "request_id"}


def _finite(value: Any) -> Any:
    """JSON has no NaN, no infinity and no half of a surrogate pair."""
    if isinstance(value, float):
        return value if abs(value) < 1e300 else 0.5
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, dict):
        return {_finite(key): _finite(each) for key, each in value.items()}
    return value


async def test_a_body_over_the_limit_is_a_413_whether_it_says_its_length_or_not(api, tgi):
    body = b'{"model":"hallmark","messages":[{"role":"user","content":"' + b"a" * BODY_LIMIT + b'"}]}'
    assert_envelope(await api.client.post(CHAT, content=body), 413, "payload_too_large")

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    assert_envelope(await api.client.post(CHAT, content=parts()), 413, "payload_too_large")
    assert await api.records(0) == []
    assert tgi.bodies == []


async def test_a_body_just_under_the_limit_is_answered(api, tgi):
    frame = len(b'{"model":"hallmark","messages":[{"role":"user","content":""}]}')
    body = b'{"model":"hallmark","messages":[{"role":"user","content":"' + b"a" * (BODY_LIMIT - frame) + b'"}]}'
    assert len(body) == BODY_LIMIT
    assert (await api.client.post(CHAT, content=body)).status_code == 200


async def test_an_unknown_model_is_a_404_that_says_what_there_is(api, tgi):
    response = await api.client.post(CHAT, json={**api.body(QUESTION), "model": "gpt-4o"})
    error = assert_envelope(response, 404, "model_not_found", "model")
    assert "'gpt-4o'" in error["message"]
    assert "'hallmark'" in error["message"]
    assert await api.records(0) == []
    assert tgi.bodies == []


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer hm_", "Bearer sk-123", "Basic abc", "Bearer hm_nobody_secret", "hm_x_y"]
)
async def test_without_a_valid_key_nothing_is_read(service, tgi, header):
    headers = {} if header is None else {"authorization": header}
    async with service.nobody() as client:
        response = await client.post(CHAT, content=b"{", headers=headers)
    assert_envelope(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert tgi.bodies == []


async def test_a_wrong_secret_of_a_known_key_is_a_401(api):
    response = await api.client.post(CHAT, json=api.body(QUESTION), headers={"authorization": f"Bearer {api.key}x"})
    assert_envelope(response, 401, "invalid_api_key")


async def test_a_revoked_key_is_refused_soon(service, api):
    assert (await api.ask(QUESTION)).status_code == 200
    await asyncio.to_thread(revoke_key, service.data_dir / "hallmark.db", api.key.split("_")[1])

    async def refused() -> httpx.Response | None:
        response = await api.ask(QUESTION)
        return response if response.status_code != 200 else None

    error = assert_envelope(await until(refused), 401, "invalid_api_key")
    assert "revoked" in error["message"]


async def test_a_key_without_the_scope_is_a_403_that_names_it(service, tgi):
    key = await service.new_key(scopes=("documents:read",))
    async with service.client(key) as client:
        response = await client.post(CHAT, content=b"{")
    error = assert_envelope(response, 403, "insufficient_scope")
    assert "'chat'" in error["message"]
    assert tgi.bodies == []


async def test_one_answer_too_many_is_a_429_at_once_and_health_stays_fast(service, api, tgi):
    gate = asyncio.Event()
    tgi.script(*(Tokens("Hello", gate=gate) for _ in range(4)))
    asking = [asyncio.create_task(api.ask(QUESTION, stream=i % 2 == 0)) for i in range(4)]
    await tgi.until(lambda: len(tgi.bodies) == 4)
    slowest = 0.0
    for stream in (False, True) * 5:
        watch = Stopwatch()
        response = await api.ask(QUESTION, stream=stream)
        slowest = max(slowest, watch.seconds)
        assert_envelope(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
    assert len(tgi.bodies) == 4
    async with service.nobody() as nobody:
        assert (await nobody.get("/healthz")).status_code == 200
        watch = Stopwatch()
        assert (await nobody.get("/healthz")).status_code == 200
        slowest = max(slowest, watch.seconds)
    # These are answered without waiting for anything.
    assert slowest < 0.5
    gate.set()
    assert {response.status_code for response in await asyncio.gather(*asking)} == {200}
    assert (await api.ask(QUESTION)).status_code == 200
    await api.records(5)
