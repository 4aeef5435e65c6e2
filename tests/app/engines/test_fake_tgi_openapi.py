"""The stand-in's answers against TGI's published OpenAPI file, and against what that file leaves out."""

import json
from pathlib import Path

import jsonschema
import pytest

from app.engines.connections import Address, Connections
from tests.fake_tgi import FakeTGI, Refuse, Tokens, ToolCall

PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "tgi-openapi.json"

published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"TGI's OpenAPI file is not at {PUBLISHED}")


def as_json_schema(node):
    """OpenAPI 3.0 as JSON Schema: `nullable` becomes a choice with null, and example values are dropped."""
    if isinstance(node, list):
        return [as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    converted = {key: as_json_schema(value) for key, value in node.items() if key not in ("example", "nullable")}
    return {"anyOf": [converted, {"type": "null"}]} if node.get("nullable") is True else converted


def check(name, instance):
    components = as_json_schema(json.loads(PUBLISHED.read_text())["components"])
    schema = {"$ref": f"#/components/schemas/{name}", "components": components}
    jsonschema.Draft202012Validator(schema).validate(instance)


async def call(tgi, method, path, body=None):
    raw = json.dumps(body).encode() if body is not None else b""
    pool = Connections(Address.of(tgi.url))
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n".encode()
    response = await pool.exchange(head + raw, 1e12)
    content = await response.read(1e12, max_bytes=1 << 20)
    response.close()
    await pool.aclose()
    return response.status, response.content_type.decode(), content


async def chat(tgi, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return await call(tgi, "POST", "/v1/chat/completions", body)


def events_of(content):
    datas = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
    assert datas[-1] == "[DONE]"
    return [json.loads(data) for data in datas[:-1]]


ACTS = [Tokens("Hello", " world", ""), ToolCall("weather", {"city": "Ulm"})]


@published
@pytest.mark.parametrize("act", ACTS, ids=["text", "tool"])
async def test_json_answers_follow_the_published_schema(act):
    async with FakeTGI(act) as tgi:
        status, content_type, content = await chat(tgi)
    answer = json.loads(content)
    check("ChatCompletion", answer)
    assert (status, content_type) == (200, "application/json")
    assert (answer["object"], answer["id"]) == ("chat.completion", "")


@published
@pytest.mark.parametrize("act", ACTS, ids=["text", "tool"])
async def test_streams_follow_the_published_schema(act):
    async with FakeTGI(act) as tgi:
        _, content_type, content = await chat(tgi, stream=True, stream_options={"include_usage": True})
    assert content_type == "text/event-stream"
    for event in events_of(content):
        check("ChatCompletionChunk", event)
        assert event["object"] == "chat.completion.chunk"


@published
async def test_metadata_follows_the_published_schema():
    async with FakeTGI() as tgi:
        check("Info", json.loads((await call(tgi, "GET", "/info"))[2]))
        for model in json.loads((await call(tgi, "GET", "/v1/models"))[2])["data"]:
            check("ModelInfo", model)
        tokens = json.loads((await call(tgi, "POST", "/tokenize", {"inputs": "Grüße an alle"}))[2])
        check("TokenizeResponse", tokens)
    assert [(token["start"], token["stop"]) for token in tokens] == [(0, 7), (7, 10), (10, 15)]


@published
async def test_refusals_of_json_calls_follow_the_published_schema():
    async with FakeTGI(Refuse.overloaded()) as tgi:
        status, _, content = await chat(tgi)
        tgi.is_healthy = False
        health = await call(tgi, "GET", "/health")
    check("ErrorResponse", json.loads(content))
    check("ErrorResponse", json.loads(health[2]))
    assert (status, health[0]) == (429, 503)


async def test_health_is_an_empty_200_and_metrics_are_prometheus_text():
    async with FakeTGI() as tgi:
        tgi.queue_size = 3
        assert await call(tgi, "GET", "/health") == (200, "", b"")
        status, content_type, content = await call(tgi, "GET", "/metrics")
    assert (status, content_type) == (200, "text/plain; charset=utf-8")
    assert b"tgi_queue_size 3\n" in content


async def test_usage_is_sent_only_when_asked_for():
    async with FakeTGI() as tgi:
        without = events_of((await chat(tgi, stream=True))[2])
        with_usage = events_of((await chat(tgi, stream=True, stream_options={"include_usage": True}))[2])
    assert all(event["usage"] is None for event in without)
    assert (with_usage[-1]["choices"], with_usage[-1]["usage"]["completion_tokens"]) == ([], 3)


async def test_every_delta_has_a_role_and_the_last_token_has_the_finish_reason():
    async with FakeTGI(Tokens("a", "b", finish="length")) as tgi:
        events = events_of((await chat(tgi, stream=True))[2])
    assert [event["choices"][0]["delta"]["role"] for event in events] == ["assistant"] * 2
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, "length"]


async def test_a_streamed_failure_is_an_event_under_status_200():
    async with FakeTGI(Refuse.overloaded()) as tgi:
        status, _, content = await chat(tgi, stream=True)
    assert status == 200
    assert events_of(content) == [{"error": {"message": "Model is overloaded", "http_status_code": 422}}]


async def test_an_unknown_adapter_is_served_silently_and_echoed():
    async with FakeTGI(adapters=("legal",)) as tgi:
        models = [json.loads((await chat(tgi, model=name))[2])["model"] for name in ("tgi", "legal", "nope")]
    assert models == ["org/base", "legal", "nope"]


DESERIALISED = [
    {"messages": None},
    {"stop": "END"},
    {"stream": None},
    {"stream_options": None},
    {"max_tokens": 1, "max_completion_tokens": 1},
    {"logit_bias": {"1": 2}},
    {"seed": -1},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
]


@pytest.mark.parametrize("fields", DESERIALISED, ids=map(str, range(len(DESERIALISED))))
async def test_a_wrong_type_is_refused_in_plain_text(fields):
    async with FakeTGI() as tgi:
        status, content_type, content = await chat(tgi, **fields)
    assert (status, content_type) == (422, "text/plain; charset=utf-8")
    assert content.startswith(b"Failed to deserialize the JSON body into the target type")


INVALID = [
    {"top_p": 1},
    {"top_p": 0},
    {"max_tokens": 0},
    {"temperature": -1},
    {"stop": list("abcde")},
    {"top_logprobs": 6},
]


@pytest.mark.parametrize("fields", INVALID, ids=[f"{key}={value}" for each in INVALID for key, value in each.items()])
async def test_a_value_out_of_range_is_a_validation_error(fields):
    async with FakeTGI() as tgi:
        status, _, content = await chat(tgi, **fields)
        streamed, _, events = await chat(tgi, stream=True, **fields)
    assert (status, json.loads(content)["error_type"]) == (422, "validation")
    assert (streamed, events_of(events)[0]["error"]["http_status_code"]) == (200, 422)


async def test_the_lean_server_answers_the_same_bytes_as_the_full_one():
    answer = Tokens("a", "b", finish="length")
    contents = []
    for lean in (False, True):
        async with FakeTGI(default=answer, lean=lean) as tgi:
            body = b'{"messages":[{"role":"user","content":"hi"}],"stream":%b,"stream_options":{"include_usage":true}}'
            for stream in (b"true", b"false"):
                pool = Connections(Address.of(tgi.url))
                raw = body % stream
                head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw)
                response = await pool.exchange(head + raw, 1e12)
                contents.append((response.status, response.content_type, await response.read(1e12, max_bytes=1 << 20)))
                response.close()
                await pool.aclose()
    assert contents[:2] == contents[2:]
