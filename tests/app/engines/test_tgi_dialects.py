"""What each kind of server is sent, and how its adapters, limits and tokens are learned."""

import json
import os
import subprocess
import sys

import msgspec
import pytest

from app.engines import EngineInfo
from app.engines.dialects import DIALECTS, payload
from app.engines.hub import chat_request, prepare
from app.engines.tgi import TGIEngine
from app.errors import EngineGarbage, EngineUnavailable, InvalidRequest, ModelNotFound, ServiceError
from app.messages import Generation, Message, Sampling
from tests.fake_successors import FakeSuccessor
from tests.fake_tgi import FakeTGI, Tokens

TGI = DIALECTS["tgi"]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}


def ask(*, sampling=Sampling(), **fields):  # noqa: B008 - It is frozen.
    return Generation([Message("user", "hello")], sampling=sampling, **fields)


def sent(dialect, generation, model="tgi"):
    return msgspec.json.decode(msgspec.json.encode(payload(DIALECTS[dialect], generation, model)))


async def answer(engine, generation):
    return "".join([piece.text async for batch in engine.generate(generation) for piece in batch])


@pytest.mark.parametrize("stream", [False, True])
def test_our_payload_is_the_hub_clients(stream):
    sampling = Sampling(7, 0.5, 0.9, 0.1, None, 3, ("x",), logprobs=True, top_logprobs=2)
    generation = ask(sampling=sampling, stream=stream, tools=[TOOL], tool_choice="auto")
    parameters = {
        "model": "tgi", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "frequency_penalty": 0.1, "seed": 3,
        "stop": ["x"], "logprobs": True, "top_logprobs": 2, "stream": stream, "presence_penalty": None,
        "stream_options": {"include_usage": True} if stream else None, "tools": [TOOL], "tool_choice": "auto",
    }  # fmt: skip
    theirs = prepare("http://127.0.0.1:1", None, [{"role": "user", "content": "hello"}], parameters)
    assert sent("tgi", generation) == json.loads(json.dumps(theirs.json))


def test_our_grammar_is_the_hub_clients_under_tgis_other_name():
    parameters = {"model": "tgi", "response_format": JSON_SCHEMA}
    theirs = prepare("http://127.0.0.1:1", None, [], parameters).json["response_format"]
    ours = sent("tgi", ask(response_format=JSON_SCHEMA))["response_format"]
    assert (ours["type"], theirs["type"]) == ("json", "json_object")
    assert ours["value"] == theirs["value"] == SCHEMA


@pytest.mark.parametrize(
    ("base_url", "path"),
    [
        ("http://h:1", "/v1/chat/completions"),
        ("http://h:1/", "/v1/chat/completions"),
        ("http://h:1/v1", "/v1/chat/completions"),
        ("http://h:1/v1/", "/v1/chat/completions"),
        ("http://h:1/engines/a", "/engines/a/v1/chat/completions"),
        ("http://h:1/v1/chat/completions", "/v1/chat/completions"),
    ],
)
def test_the_chat_url_follows_the_hub_clients_rules(base_url, path):
    assert chat_request(base_url, None)[0] == "http://h:1" + path


async def test_a_base_url_with_a_path_keeps_it_for_every_route():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url + "/v1")
        await answer(engine, ask())
        assert await engine.healthy()
        await engine.describe()
        await engine.aclose()
    assert [request.path for request in tgi.requests] == ["/v1/chat/completions", "/health", "/info"]


async def test_the_token_traceparent_and_host_are_sent_and_nothing_of_the_machine():
    async with FakeTGI(api_key="secret") as tgi:
        engine = TGIEngine(tgi.url, token="secret")
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await answer(engine, ask(traceparent=trace))
        await answer(engine, ask(traceparent="x\r\nevil: 1"))
        await engine.aclose()
    first, second = (request.headers for request in tgi.requests)
    assert (first["authorization"], first["traceparent"]) == ("Bearer secret", trace)
    assert first["host"] == tgi.url.removeprefix("http://")
    assert first["user-agent"] == "hallmark"
    assert "traceparent" not in second
    assert "evil" not in second


PROBE = """
import asyncio
from app.engines.tgi import TGIEngine
from app.messages import Generation, Message
from tests.fake_tgi import FakeTGI
from huggingface_hub import get_token

async def main():
    assert get_token() == "hf_machine_secret"
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        async for _ in engine.generate(Generation([Message("user", "hello")], stream=True)):
            pass
        await engine.describe()
        await engine.healthy()
        await engine.count_tokens("a b")
        await engine.aclose()
        print(len(tgi.requests), [request.headers for request in tgi.requests])

asyncio.run(main())
"""


@pytest.mark.parametrize("place", ["HF_TOKEN", "HF_TOKEN_PATH"])
def test_the_machines_hub_token_never_reaches_the_engine(tmp_path, place):
    (tmp_path / "token").write_text("hf_machine_secret")
    value = "hf_machine_secret" if place == "HF_TOKEN" else str(tmp_path / "token")
    environment = {**os.environ, place: value}
    ran = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, timeout=30)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("4 ")
    assert "hf_machine_secret" not in ran.stdout
    assert "authorization" not in ran.stdout


def test_nothing_is_sent_that_tgi_refuses_or_misreads():
    sampling = Sampling(top_p=1.0, presence_penalty=0.0, seed=-1, stop=("a",), temperature=0.0)
    body = sent("tgi", ask(sampling=sampling))
    assert body == {
        "model": "tgi",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": False,
        "temperature": 0.0,
        "seed": 2**64 - 1,
        "stop": ["a"],
    }


async def test_the_stand_in_accepts_the_hardest_request_the_adapter_can_make():
    sampling = Sampling(1, 0.0, 1.0, -2.0, -2.0, -5, ("a", "b", "c", "d"), logprobs=True, top_logprobs=5)
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        for stream in (False, True):
            await answer(engine, ask(sampling=sampling, stream=stream, response_format=JSON_SCHEMA))
        await engine.aclose()


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_a_top_p_of_zero_keeps_the_likeliest_token(dialect):
    assert 0 < sent(dialect, ask(sampling=Sampling(top_p=0.0)))["top_p"] < 1e-4


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_a_developers_turn_is_a_system_turn_but_for_openai_itself(dialect):
    generation = Generation([Message("developer", "be brief"), Message("user", "hello")])
    role = "developer" if dialect == "openai" else "system"
    assert sent(dialect, generation)["messages"][0] == {"role": role, "content": "be brief"}


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_parallel_tool_calls_is_passed_to_servers_that_can_make_several(dialect):
    body = sent(dialect, ask(tools=[TOOL], parallel_tool_calls=False))
    assert body.get("parallel_tool_calls") == (None if dialect in ("tgi", "embedded") else False)
    assert "parallel_tool_calls" not in sent(dialect, ask(parallel_tool_calls=False))


def test_no_text_becomes_an_image_that_tgi_would_fetch():
    link = "![](http://169.254.169.254/latest)"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    texts = [{"type": "text", "text": part} for part in ("see ![", "](http://10.0.0.1/)", f"and {link}")]
    turns = [Message("user", f"Read {link}."), Message("user", [*texts, image, texts[2]]), Message("user", "as it is")]
    first, second, third = (message["content"] for message in sent("tgi", Generation(turns))["messages"])
    assert first == "Read ![ ](http://169.254.169.254/latest)."
    assert [part["type"] for part in second] == ["text", "image_url", "text"]
    assert second[1] == image
    assert "![](" not in "".join(part.get("text", "") for part in second)
    assert third == "as it is"
    assert sent("vllm", Generation(turns))["messages"][0]["content"] == f"Read {link}."


async def test_no_text_that_is_counted_becomes_an_image_that_tgi_would_fetch():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect="tgi")
        assert await engine.count_tokens("see ![](http://169.254.169.254/latest)") == 3
        await engine.aclose()
    (asked,) = (request for request in tgi.requests if request.path == "/tokenize")
    assert asked.json == {"inputs": "see ![ ](http://169.254.169.254/latest)"}


def test_no_tool_and_no_call_of_one_becomes_an_image_that_tgi_would_fetch():
    link = "![](http://169.254.169.254/latest)"
    schema = {"type": "object", "properties": {link: {"enum": ["as it is", link]}}}
    tool = {"type": "function", "function": {"name": link, "description": f"See {link}", "parameters": schema}}
    call = {"id": link, "type": "function", "function": {"name": link, "arguments": f'{{"a": "{link}"}}'}}
    turns = [
        Message("user", "hello", name=link),
        Message("assistant", None, tool_calls=[call]),
        Message("tool", link, tool_call_id=link),
    ]
    generation = Generation(turns, tools=[tool], tool_choice={"type": "function", "function": {"name": link}})
    unsafe, safe = json.dumps(sent("vllm", generation)), json.dumps(sent("tgi", generation))
    assert unsafe.count("![](") == 11
    assert json.loads(safe) == json.loads(unsafe.replace("![](", "![ ](")) | {"model": "tgi"}


@pytest.mark.parametrize("url", ["data:image/png;base64,AA)![](http://10.0.0.1/", "https://images.example/cat_(1).png"])
def test_an_image_whose_url_ends_the_mark_that_tgi_makes_of_it_is_refused(url):
    turns = [Message("user", [{"type": "image_url", "image_url": {"url": url}}])]
    with pytest.raises(InvalidRequest, match="%29") as caught:
        sent("tgi", Generation(turns))
    assert caught.value.param == "messages"
    assert sent("vllm", Generation(turns))["messages"][0]["content"][0]["image_url"]["url"] == url


@pytest.mark.parametrize("dialect", ["tgi", "embedded"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling": Sampling(stop=("a", "b", "c", "d", "e"))}, "stop"),
        ({"sampling": Sampling(logprobs=True, top_logprobs=6)}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ],
    ids=["stops", "logprobs", "no schema", "empty schema", "no properties", "unknown type"],
)  # fmt: skip
async def test_what_the_engine_cannot_serve_is_refused_by_name_before_it_is_asked(dialect, fields, param):
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect=dialect)
        with pytest.raises(InvalidRequest) as caught:
            await answer(engine, ask(**fields))
        await engine.aclose()
    assert caught.value.param == param
    assert tgi.requests == []


def test_a_text_format_asks_tgi_for_nothing_and_its_own_forms_pass():
    assert "response_format" not in sent("tgi", ask(response_format={"type": "text"}))
    for form in ({"type": "regex", "value": "[ab]"}, {"type": "json", "value": SCHEMA}):
        assert sent("tgi", ask(response_format=form))["response_format"] == form


def test_openais_servers_get_openais_shapes():
    sampling = Sampling(top_p=1.0, presence_penalty=0.5, seed=-1, stop=("a",) * 5)
    body = sent("vllm", ask(sampling=sampling, response_format=JSON_SCHEMA, stream=True), "base")
    assert body["response_format"] == JSON_SCHEMA
    assert (body["top_p"], body["presence_penalty"], body["seed"]) == (1.0, 0.5, -1)
    assert body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_no_null_is_ever_sent(dialect):
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    generation = Generation([Message("assistant", None, tool_calls=calls), Message("tool", "4", tool_call_id="1")])
    assert b"null" not in msgspec.json.encode(payload(DIALECTS[dialect], generation, "m"))


async def test_tgi_serves_only_the_adapters_it_is_known_to_have():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, adapters=("legal", "medical"))
        await answer(engine, ask(adapter="legal"))
        with pytest.raises(ModelNotFound, match=r"'nope'.*legal, medical"):
            await answer(engine, ask(adapter="nope"))
        await engine.aclose()
    assert [body["model"] for body in tgi.bodies] == ["legal"]


async def test_an_adapter_loaded_later_is_found_where_the_engine_lists_them():
    async with FakeTGI(lists_adapters=True) as tgi:
        engine = TGIEngine(tgi.url, dialect="embedded")
        with pytest.raises(EngineUnavailable, match="has not loaded the adapter 'legal'"):
            await answer(engine, ask(adapter="legal"))
        tgi.adapters = ("legal",)
        await answer(engine, ask(adapter="legal"))
        await answer(engine, ask())
        tgi.adapters = ()
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="legal") as caught:
                await answer(engine, ask(adapter="legal"))
            assert caught.value.retry_after_seconds == 2.0
        await engine.aclose()
    assert [body["model"] for body in tgi.bodies] == ["legal", "tgi", "legal"]


@pytest.mark.parametrize(
    ("dialect", "base", "adapter"), [("vllm", "org/base", "legal"), ("sglang", "org/base", "org/base:legal")]
)
async def test_base_and_adapter_are_named_as_the_server_wants(dialect, base, adapter):
    async with FakeTGI(lists_adapters=True, adapters=("legal", adapter)) as tgi:
        engine = TGIEngine(tgi.url, dialect=dialect)
        await answer(engine, ask())
        await answer(engine, ask(adapter="legal"))
        await engine.aclose()
    assert [body["model"] for body in tgi.bodies] == [base, adapter]


@pytest.mark.parametrize(
    ("dialect", "adapter", "name"),
    [("vllm", None, "org/newer"), ("openai", None, "org/newer"), ("sglang", "legal", "org/newer:legal")],
)
async def test_a_server_that_was_started_under_another_name_is_asked_by_it(dialect, adapter, name):
    async with FakeSuccessor(dialect, adapters=("legal",)) as server:
        engine = TGIEngine(server.url, dialect=dialect)
        await answer(engine, ask(adapter=adapter))
        server.model_id = "org/newer"
        with pytest.raises(EngineUnavailable, match="try again") as caught:
            await answer(engine, ask(adapter=adapter))
        assert caught.value.retry_after_seconds is not None
        await answer(engine, ask(adapter=adapter))
        await engine.aclose()
    assert server.bodies[-1]["model"] == name


async def test_what_a_server_lists_anew_is_asked_for_from_then_on():
    async with FakeSuccessor("vllm") as server:
        engine = TGIEngine(server.url, dialect="vllm")
        await answer(engine, ask())
        server.model_id = "org/newer"
        assert (await engine.describe()).model_id == "org/newer"
        await answer(engine, ask())
        await engine.aclose()


async def test_a_model_that_the_settings_name_and_the_server_has_not_stays_a_404():
    async with FakeSuccessor("vllm", adapters=("legal",)) as server:
        engine = TGIEngine(server.url, dialect="vllm", model="org/other")
        await engine.describe()
        for _ in range(2):
            with pytest.raises(ModelNotFound):
                await answer(engine, ask())
        await engine.aclose()


async def test_of_several_models_the_one_of_the_settings_is_described():
    models = [{"id": "small", "max_model_len": 2048}, {"id": "big", "max_model_len": 32768}, {"id": "big-too"}]
    listed = 200, "application/json", msgspec.json.encode({"object": "list", "data": models})
    async with FakeSuccessor("openai") as server:
        server.get = lambda path: listed
        engine = TGIEngine(server.url, dialect="openai", model="big")
        info = await engine.describe()
        await engine.aclose()
    assert (info.model_id, info.max_total_tokens, info.adapters) == ("big", 32768, ("small", "big-too"))


async def test_llama_cpp_cannot_choose_an_adapter():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect="llamacpp", model="m")
        with pytest.raises(ModelNotFound, match="llamacpp"):
            await answer(engine, ask(adapter="legal"))
        await engine.aclose()


async def test_tgi_says_what_it_serves():
    async with FakeTGI(max_total_tokens=4096) as tgi:
        engine = TGIEngine(tgi.url, adapters=("legal",))
        assert await engine.describe() == EngineInfo("org/base", "0" * 40, "3.3.6-dev0", 4096, 4095, ("legal",))
        await engine.aclose()


async def test_an_engine_that_lists_adapters_is_described_with_them():
    async with FakeTGI(lists_adapters=True, adapters=("legal",)) as tgi:
        engine = TGIEngine(tgi.url, dialect="embedded")
        assert (await engine.describe()).adapters == ("legal",)
        await engine.aclose()


async def test_tokens_are_counted_by_the_engine():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        assert await engine.count_tokens("three little words") == 3
        await engine.aclose()


async def test_a_server_that_cannot_count_gets_a_high_estimate():
    engine = TGIEngine("http://127.0.0.1:1", dialect="openai")
    assert await engine.count_tokens("three little words") == 7


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://h", "http://", ""])
def test_a_url_that_is_none_is_refused_when_the_engine_is_made(url):
    with pytest.raises(ValueError, match="http"):
        TGIEngine(url)


def test_an_unknown_dialect_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="tgi, embedded, vllm"):
        TGIEngine("http://h", dialect="tgy")


async def test_temperature_zero_and_one_reach_the_engine_as_they_are():
    async with FakeTGI(default=Tokens("a")) as tgi:
        engine = TGIEngine(tgi.url)
        for temperature in (0.0, 1.0):
            await answer(engine, ask(sampling=Sampling(temperature=temperature)))
        await engine.aclose()
    assert [body["temperature"] for body in tgi.bodies] == [0.0, 1.0]


async def test_an_engine_that_can_rates_texts_in_their_order():
    async with FakeTGI() as tgi:
        tgi.rating = lambda query, text: len(text) / 10 if query == "How long?" else 0.0
        engine = TGIEngine(tgi.url, dialect="embedded")
        assert await engine.rate("How long?", ["aaa", "a", "aaaaa"]) == [0.3, 0.1, 0.5]
        assert await engine.rate("How long?", []) is None
        await engine.aclose()
    assert len(tgi.requests) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_engine_that_cannot_rate_texts_is_asked_once_at_most(dialect):
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect=dialect)
        assert [await engine.rate("How long?", ["a"]) for _ in range(3)] == [None] * 3
        await engine.aclose()
    assert len(tgi.requests) == (1 if dialect == "embedded" else 0)


async def test_another_model_at_the_same_address_is_asked_for_ratings_anew():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect="embedded")
        await engine.describe()
        assert await engine.rate("How long?", ["a"]) is None
        tgi.model_id, tgi.rating = "org/with-a-head", lambda query, text: 0.5
        await engine.describe()
        assert await engine.rate("How long?", ["a"]) == [0.5]
        await engine.aclose()


@pytest.mark.parametrize("status", [400, 413, 422, 500])
async def test_texts_that_an_engine_does_not_rate_end_no_ratings_of_others(status):
    def rerank(body):
        if "too much" in body["query"]:
            error = {"error": "Input validation error: too much", "error_type": "validation"}
            return status, "application/json", msgspec.json.encode(error)
        return FakeTGI.rerank(tgi, body)

    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect="embedded")
        tgi.rating, tgi.rerank = lambda query, text: 0.5, rerank
        with pytest.raises(ServiceError):
            await engine.rate("too much", ["a"])
        assert await engine.rate("How long?", ["a"]) == [0.5]
        await engine.aclose()


async def test_only_the_beginning_of_a_long_question_is_sent_to_rate_texts_by():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect="embedded")
        tgi.rating = lambda query, text: 0.5
        assert await engine.rate("How long? " + "x" * 2_000_000, ["a"]) == [0.5]
        await engine.aclose()
    query = tgi.requests[0].json["query"]
    assert query.startswith("How long? xxx")
    assert len(query) == 4_000


async def test_ratings_of_other_texts_are_garbage():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect="embedded")
        tgi.rating = lambda query, text: 0.5
        tgi.rerank = lambda body: (200, "application/json", b'{"results": [{"index": 1, "relevance_score": 0.5}]}')
        with pytest.raises(EngineGarbage):
            await engine.rate("How long?", ["a"])
        await engine.aclose()


async def test_a_failure_of_an_engine_that_rates_is_told_and_it_is_asked_again():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, dialect="embedded")
        tgi.rerank = lambda body: (503, "application/json", b'{"error": "loading", "error_type": "healthcheck"}')
        with pytest.raises(EngineUnavailable):
            await engine.rate("How long?", ["a"])
        del tgi.rerank
        tgi.rating = lambda query, text: 0.5
        assert await engine.rate("How long?", ["a"]) == [0.5]
        await engine.aclose()
