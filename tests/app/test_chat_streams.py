"""What a caller of the chat route reads, chunk by chunk and whole, and what the engine was told."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fake_tgi import FakeTGI, Reply, Tokens, ToolCall
from tests.service import Api, Service, live_service
from tests.tgi_frames import about, dump, sse_event

QUESTION = "What is a release?"
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Service]]:
    directory = tmp_path_factory.mktemp("streams")
    async with FakeTGI() as tgi, live_service(directory, engine_url=tgi.url, tenants=60) as service:
        yield tgi, service


@pytest.fixture
async def api(everyone) -> AsyncIterator[Api]:
    async with everyone[1].tenant() as api:
        yield api


async def test_a_stream_is_openai_s_chunks_under_the_prediction_s_id(api, tgi):
    tgi.script(Tokens("Hello", " world", "!"))
    stream = await api.stream(QUESTION)
    headers = stream.response.headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    record = await api.record()
    digest = (await api.client.get("/v1/models/hallmark")).json()["digest"]
    assert headers["x-prediction-id"] == headers["x-request-id"] == record["id"]
    assert headers["x-release"] == record["release_name"] == "hallmark@1"
    for chunk in stream.chunks:
        assert (chunk["id"], chunk["object"]) == (record["id"], "chat.completion.chunk")
        assert (chunk["model"], chunk["system_fingerprint"]) == ("hallmark", digest)
        assert isinstance(chunk["created"], int)
    first, *_ = stream.deltas
    assert first == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in stream.deltas if delta.get("content")] == ["Hello", " world", "!"]
    assert [each for each in (c["choices"][0]["finish_reason"] for c in stream.chunks) if each] == ["stop"]
    assert stream.done
    assert (record["answer"], record["outcome"], record["stream"]) == ("Hello world!", "finished", True)


async def test_a_whole_answer_is_openai_s_object_under_the_prediction_s_id(api, tgi):
    tgi.script(Tokens("Hello", " world", "!"))
    response = await api.ask(QUESTION)
    answer, record = response.json(), await api.record()
    assert answer["id"] == record["id"] == response.headers["x-prediction-id"] == response.headers["x-request-id"]
    assert (response.headers["x-release"], answer["object"], answer["model"]) == (
        "hallmark@1",
        "chat.completion",
        "hallmark",
    )
    assert answer["system_fingerprint"] == record["release_digest"]
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world!"}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    assert (record["prompt_tokens"], record["completion_tokens"]) == (11, 3)


async def test_a_release_can_be_asked_for_by_its_number(api, tgi):
    response = await api.client.post("/v1/chat/completions", json={**api.body(QUESTION), "model": "hallmark@1"})
    assert (response.status_code, response.json()["model"]) == (200, "hallmark@1")


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}])
async def test_the_usage_chunk_is_sent_when_asked_for_and_recorded_in_any_case(api, tgi, options):
    stream = await api.stream(QUESTION, **({"stream_options": options} if options else {}))
    usages = [chunk["usage"] for chunk in stream.chunks if chunk.get("usage")]
    asked = bool(options and options["include_usage"])
    assert usages == ([{"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}] if asked else [])
    if asked:
        assert stream.chunks[-1]["choices"] == []
    assert (await api.record())["completion_tokens"] == 3


async def test_the_first_token_arrives_while_the_engine_still_works(api, tgi):
    gate = asyncio.Event()
    tgi.script(Tokens("Hello", " world", gates={1: gate}))
    async with api.streaming(QUESTION) as (stream, events):
        async for _ in events:
            if stream.text:
                break
        assert (stream.text, stream.done) == ("Hello", False)
        # What a client has seen begin is on record, as open.
        (opened,) = (await api.client.get("/v1/predictions")).json()["data"]
        assert (opened["id"], opened["outcome"]) == (stream.response.headers["x-prediction-id"], "open")
        gate.set()
        async for _ in events:
            pass
    assert (stream.text, stream.done) == ("Hello world", True)
    record = await api.record()
    assert 0 < record["first_token_seconds"] < record["total_seconds"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_client_saw_complete_is_on_record_at_that_moment(api, tgi, stream):
    for _ in range(10):
        response = await api.ask(QUESTION, stream=stream)
        record = (await api.client.get(f"/v1/predictions/{response.headers['x-prediction-id']}")).json()
        assert record["outcome"] == "finished"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_passes_through(api, tgi, stream):
    tgi.script(ToolCall("get_weather", {"city": "Paris"}))
    fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": "auto"}
    if stream:
        streamed = await api.stream("How is the weather in Paris?", **fields)
        calls = [call for delta in streamed.deltas for call in delta.get("tool_calls", ())]
        assert {call["index"] for call in calls} == {0}
        assert [call["function"]["name"] for call in calls if call["function"].get("name")] == ["get_weather"]
        arguments = "".join(call["function"].get("arguments") or "" for call in calls)
        assert (streamed.finish_reason, streamed.done) == ("tool_calls", True)
    else:
        (choice,) = (await api.answer("How is the weather in Paris?", **fields))["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "get_weather")
        assert "index" not in call
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
        arguments = call["function"]["arguments"]
    assert json.loads(arguments) == {"city": "Paris"}
    assert tgi.bodies[0]["tools"] == [TOOL]
    record = await api.record()
    assert (record["finish_reason"], bool(record["tool_calls"])) == ("tool_calls", True)


async def test_a_tool_s_result_is_sent_on_to_the_engine(api, tgi):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    turns = [
        {"role": "user", "content": "How is the weather in Paris?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
    ]
    await api.answer(turns, tools=[TOOL])
    sent = tgi.bodies[0]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert sent[1]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert (sent[2]["tool_call_id"], sent[2]["content"]) == ("call_1", "18 degrees")


LOGPROBS = {"content": [{"token": "Hi", "logprob": -0.25, "top_logprobs": [{"token": "Hi", "logprob": -0.25}]}]}


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "with documents"])
@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_pass_through(api, tgi, stream, documents):
    if documents:
        await api.add("release.md", "# Release\n\nWhat is a release? A release is an immutable bundle of parts.\n")
    if stream:
        choice = {"index": 0, "delta": {"content": "Hi"}, "logprobs": LOGPROBS, "finish_reason": "stop"}
        event = sse_event({**about("org/base", "chat.completion.chunk"), "choices": [choice]})
        tgi.script(Reply(event, b"data: [DONE]\n\n", content_type="text/event-stream"))
        streamed = await api.stream(QUESTION, logprobs=True, top_logprobs=1)
        found = [chunk["choices"][0]["logprobs"] for chunk in streamed.chunks if chunk["choices"]]
        assert [each for each in found if each] == [LOGPROBS]
        assert streamed.text == "Hi"
    else:
        message = {"role": "assistant", "content": "Hi"}
        choice = {"index": 0, "message": message, "logprobs": LOGPROBS, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        tgi.script(Reply(dump({**about("org/base", "chat.completion"), "choices": [choice], "usage": usage})))
        answer = await api.answer(QUESTION, logprobs=True, top_logprobs=1)
        assert answer["choices"][0]["logprobs"] == LOGPROBS
    assert (tgi.bodies[0]["logprobs"], tgi.bodies[0]["top_logprobs"]) == (True, 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("said", "told"), [("stop", "stop"), ("eos_token", "stop"), ("length", "length")])
async def test_finish_reasons_are_openai_s(api, tgi, stream, said, told):
    tgi.script(Tokens("Hello", finish=said))
    if stream:
        assert (await api.stream(QUESTION)).finish_reason == told
    else:
        assert (await api.answer(QUESTION))["choices"][0]["finish_reason"] == told
    assert (await api.record())["finish_reason"] == told


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["END", ["END", "x"]])
async def test_stop_texts_are_sent_on_and_never_shown(api, tgi, stream, stop):
    tgi.script(Tokens("Hello", " wor", "ld E", "ND of it"))
    if stream:
        text = (await api.stream(QUESTION, stop=stop)).text
    else:
        text = (await api.answer(QUESTION, stop=stop))["choices"][0]["message"]["content"]
    assert text == "Hello world "
    assert tgi.bodies[0]["stop"] == (["END"] if stop == "END" else ["END", "x"])


async def test_a_stream_that_is_cut_at_a_stop_text_says_about_how_many_tokens_it_took(api, tgi):
    tgi.script(Tokens("Hello", " wor", "ld E", "ND of it", " and", " more", hang_after=5))
    stream = await api.stream("What is a release?" * 40, stop="END", stream_options={"include_usage": True})
    usage = stream.chunks[-1]["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (5, usage["prompt_tokens"] + 5)
    assert 180 <= usage["prompt_tokens"] < 400  # A quarter of the characters, the instructions' among them.
    record = await api.record()
    assert (record["prompt_tokens"], record["completion_tokens"]) == (usage["prompt_tokens"], 5)


async def test_what_the_caller_chose_reaches_the_engine_and_nothing_else_does(api, tgi):
    chosen = {
        "seed": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 0.5,
        "max_completion_tokens": 33,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {}}}},
    }
    await api.answer(QUESTION, user="u", metadata={"a": "b"}, store=True, unknown_field=1, **chosen)
    (body,) = tgi.bodies
    names = ("seed", "temperature", "top_p", "frequency_penalty")
    assert {name: body[name] for name in names} == {name: chosen[name] for name in names}
    assert body.get("max_tokens", body.get("max_completion_tokens")) == 33
    assert body["response_format"] == {"type": "json", "value": {"properties": {}}}
    assert not {"user", "metadata", "store", "unknown_field", "retrieval"} & set(body)
    (asked,) = [request for request in tgi.requests if request.path.endswith("/chat/completions")]
    assert "authorization" not in asked.headers
    record = await api.record()
    assert (record["user"], record["metadata"]) == ("u", {"a": "b"})


async def test_the_release_s_defaults_fill_in_what_the_caller_left_open(api, tgi):
    await api.answer(QUESTION)
    (body,) = tgi.bodies
    assert body["max_tokens"] == 256
    assert "seed" not in body


async def test_the_engine_is_told_the_trace_of_the_caller(api, tgi):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    api.client.headers["traceparent"] = f"00-{trace}-00f067aa0ba902b7-01"
    await api.answer(QUESTION)
    (asked,) = [request for request in tgi.requests if request.path.endswith("/chat/completions")]
    assert asked.headers["traceparent"].split("-")[1] == trace == (await api.record())["trace_id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_not_to_be_stored_is_answered_and_its_words_are_not_kept(api, tgi, stream):
    tgi.script(Tokens("A secret", " answer."))
    response = await api.ask("A secret question?", stream=stream, store=False)
    assert "A secret" in response.text
    record = await api.record()
    assert (record["outcome"], record["completion_tokens"]) == ("finished", 2)
    assert "ecret" not in json.dumps(record)


async def test_a_question_in_parts_is_read_and_sent_on(api, tgi):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "a release?"}]
    await api.add("release.md", "# Release\n\nWhat is a release? A release is an immutable bundle of parts.\n")
    tgi.script(Tokens("A release is an immutable bundle of parts."))
    answer = await api.answer([{"role": "user", "content": parts}])
    assert answer["choices"][0]["message"]["content"] == "A release is an immutable bundle of parts [1]."


async def test_a_long_conversation_is_cut_to_the_engine_s_context_by_passages_first(api, tgi):
    filler = " ".join(f"Release parts bundle number {i} is immutable." for i in range(60))
    for i in range(5):
        await api.add(f"release-{i}.md", f"# Release {i}\n\nWhat is a release? {filler}\n")
    answer = await api.answer(QUESTION, max_tokens=256)
    assert answer["retrieval"] == "used"
    prompt = tgi.bodies[0]["messages"][-1]["content"]
    assert len(prompt.split(" ")) + 256 <= tgi.max_total_tokens
    assert "[1]" in prompt

    response = await api.ask(f"{QUESTION} {'word ' * 2500}", max_tokens=256)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert response.json()["error"]["param"] == "messages"
