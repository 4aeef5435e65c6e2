"""Answers for programs - tool calls, JSON - beside a tenant's documents, and what goes on record about them."""

import asyncio
import gc
import json
import weakref

import pytest

from app.messages import whole_tool_calls
from app.routes.watch import PATIENCE_SECONDS, Patience, Watch
from tests.fake_tgi import FakeTGI, Tokens, ToolCall
from tests.service import live_service

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
QUESTION = "How is the weather in Turin?"


@pytest.fixture
async def tgi():
    async with FakeTGI() as tgi:
        yield tgi


@pytest.fixture
async def api(tgi, tmp_path):
    async with live_service(tmp_path, engine_url=tgi.url, tenants=1) as service, service.tenant() as api:
        document = {"name": "kettle.md", "text": "# Kettle\n\nThe kettle boils one litre in 90 seconds."}
        added = await api.client.post("/v1/documents?wait=20", json=document)
        assert added.status_code == 201
        yield api


async def ask(api, **body):
    asked = {"model": "hallmark", "messages": [{"role": "user", "content": QUESTION}], **body}
    return await api.client.post("/v1/chat/completions", json=asked)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called_though_no_document_bears_on_the_question(api, tgi, stream):
    tgi.script(ToolCall("get_weather", {"city": "Turin"}))
    answer = await ask(api, tools=[TOOL], stream=stream)
    assert answer.status_code == 200
    assert "get_weather" in answer.text
    recorded = (await api.client.get(f"/v1/predictions/{answer.headers['x-prediction-id']}")).json()
    (call,) = recorded["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Turin"})
    assert recorded["finish_reason"] == "tool_calls"


async def test_json_is_answered_as_json_though_no_document_bears_on_the_question(api, tgi):
    tgi.script(Tokens('{"sky":', '"blue"}'))
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object", "properties": {}}}}
    answer = (await ask(api, response_format=schema)).json()
    assert answer["choices"][0]["message"]["content"] == '{"sky":"blue"}'


async def test_text_asked_for_by_name_is_checked_like_any_text(api, tgi):
    answer = (await ask(api, response_format={"type": "text"})).json()
    assert answer["verdict"]["reason"] == "nothing_relevant"
    assert tgi.bodies == []


async def test_what_follows_a_tool_s_result_is_not_held_against_the_documents(api, tgi):
    tgi.script(Tokens("Nine", " degrees", "."))
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "How fast does the kettle boil, and how warm is Turin?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "9 degrees"},
    ]
    answer = (await ask(api, messages=messages)).json()
    assert answer["choices"][0]["message"]["content"] == "Nine degrees."


async def test_the_prompt_with_its_passages_is_on_record(api, tgi):
    tgi.script(Tokens("The kettle boils one litre in 90 seconds."))
    answer = await ask(api, messages=[{"role": "user", "content": "How fast does the kettle boil one litre?"}])
    recorded = (await api.client.get(f"/v1/predictions/{answer.headers['x-prediction-id']}")).json()
    assert recorded["messages"] == tgi.bodies[0]["messages"]
    assert "<sources " in recorded["messages"][-1]["content"]


def test_fragments_of_several_calls_become_whole_calls_in_order():
    assert whole_tool_calls(
        [
            {"index": 1, "id": "b", "type": "function", "function": {"name": "two", "arguments": ""}},
            {"index": 0, "id": "a", "type": "function", "function": {"name": "one", "arguments": "{"}},
            {"index": 1, "function": {"arguments": "[]"}},
            {"index": 0, "function": {"arguments": "}"}},
        ]
    ) == [
        {"id": "a", "type": "function", "function": {"name": "one", "arguments": "{}"}},
        {"id": "b", "type": "function", "function": {"name": "two", "arguments": "[]"}},
    ]


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    raise AssertionError


async def test_time_runs_out_for_whoever_has_not_finished():
    watch = Watch(never, 0.001, stop=lambda reason: True, patience=Patience())
    with pytest.raises(asyncio.CancelledError):
        await asyncio.Event().wait()
    assert asyncio.current_task().uncancel() == 0
    assert watch.reason == "timeout"
    watch.close()


async def test_an_answer_that_is_complete_is_not_cancelled_for_its_time():
    asked: list[str] = []
    over = asyncio.Event()

    def stop(reason: str) -> bool:
        asked.append(reason)
        over.set()
        return False

    watch = Watch(never, 0.001, stop=stop, patience=Patience())
    await over.wait()
    assert (asked, watch.reason, asyncio.current_task().cancelling()) == (["timeout"], None, 0)
    watch.close()


async def test_time_counts_from_the_beginning_and_not_from_when_the_client_is_watched():
    rang: list[str] = []
    is_over = asyncio.Event()

    def stop(reason: str) -> bool:
        rang.append(reason)
        return False

    def later() -> None:
        rang.append("later")
        is_over.set()

    watch = Watch(never, 1.0, stop=stop, patience=Patience())
    asyncio.get_running_loop().call_later(1.0 + PATIENCE_SECONDS * 0.8, later)
    await is_over.wait()
    watch.close()
    assert rang == ["timeout", "later"]


async def test_an_answer_that_is_out_soon_is_not_watched():
    asked: list[str] = []
    is_watched = asyncio.Event()

    def receiver(name: str):
        async def receive() -> dict[str, str]:
            asked.append(name)
            is_watched.set()
            return await never()

        return receive

    patience = Patience()
    short = Watch(receiver("short"), 60, stop=lambda reason: True, patience=patience)
    long = Watch(receiver("long"), 60, stop=lambda reason: True, patience=patience)
    short.close()
    await is_watched.wait()
    long.close()
    assert asked == ["long"]


async def test_a_request_that_was_watched_is_freed_without_the_collector():
    watched = asyncio.Event()

    async def receive() -> dict[str, str]:
        watched.set()
        return await never()

    async def answer() -> weakref.ref[Watch]:
        watch = Watch(receive, 60, stop=lambda reason: True, patience=Patience())
        await watched.wait()
        watch.close()
        return weakref.ref(watch)

    gc.disable()
    try:
        watch = await asyncio.create_task(answer())
        for _ in range(5):  # The watching task is told, ends, and is let go.
            await asyncio.sleep(0)
        assert watch() is None
    finally:
        gc.enable()
