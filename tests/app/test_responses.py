"""`/v1/responses`: what it takes and refuses, what it tells, and that all the rest is as with chat completions."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from app.errors import InvalidRequest
from app.responses.tools import equality_of
from tests.fake_tgi import FakeTGI, Refuse, Tokens, ToolCall
from tests.service import NO_TLS, Api, Service, live_service
from tests.wire import read_events

KETTLE = """# Aurora kettle

The Aurora kettle boils one litre in 90 seconds. It holds 1.7 litres and weighs 1200 grams.

## Warranty

The warranty of the Aurora kettle lasts 24 months from the date of purchase.
"""
SPEED = "How fast does the Aurora kettle boil one litre?"
FAST = "The Aurora kettle boils one litre in 90 seconds"
SEARCH = {"type": "file_search", "vector_store_ids": ["hallmark"]}
RESULTS = ["file_search_call.results"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Service]]:
    async with FakeTGI() as tgi:
        settings = {"retrieval": {"passage_tokens": 32}}
        directory = tmp_path_factory.mktemp("responses")
        async with live_service(directory, engine_url=tgi.url, tenants=40, settings=settings) as service:
            yield tgi, service


@pytest.fixture
def tgi(everyone) -> FakeTGI:
    tgi = everyone[0]
    tgi.acts.clear()
    tgi.requests.clear()
    tgi.default = Tokens(" The Aurora kettle boils", " one litre in", " 90 seconds", ".")
    return tgi


@pytest.fixture(scope="module")
async def api(everyone) -> AsyncIterator[Api]:
    """A tenant with a document."""
    async with everyone[1].tenant() as api:
        await api.add("kettle.md", KETTLE, kind="kettle")
        yield api


@pytest.fixture
async def nobody(everyone) -> AsyncIterator[Api]:
    """A tenant without documents."""
    async with everyone[1].tenant() as api:
        yield api


async def ask(api: Api, asked: Any = SPEED, **fields: Any) -> httpx.Response:
    return await api.client.post("/v1/responses", json={"model": "hallmark", "input": asked, **fields})


async def told(api: Api, asked: Any = SPEED, **fields: Any) -> dict[str, Any]:
    response = await ask(api, asked, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def refused(api: Api, status: int = 400, asked: Any = SPEED, **fields: Any) -> tuple[str, str]:
    response = await ask(api, asked, **fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


async def test_a_response_has_the_search_and_the_cited_answer(api, tgi):
    response = await ask(api)
    body = response.json()
    search, message = body["output"]
    assert (search["type"], search["status"], search["queries"], search["results"]) == (
        "file_search_call",
        "completed",
        [SPEED],
        None,
    )
    (content,) = message["content"]
    (citation,) = content["annotations"]
    text = content["text"]
    assert text == f"{FAST} [1]."
    assert text[citation["index"] :].startswith("[1]")
    assert (citation["type"], citation["filename"], citation["quote"]) == ("file_citation", "kettle.md", f"{FAST}.")
    source = await api.source(citation["file_id"])
    assert source[citation["source_start"] : citation["source_end"]] == citation["quote"]
    assert (body["status"], body["retrieval"], body["verdict"]["status"]) == ("completed", "used", "answered")
    assert response.headers["x-prediction-id"] == body["id"]
    assert response.headers["x-release"] == body["release"]


async def test_it_is_the_same_prediction_as_that_of_a_chat(api, tgi):
    body = await told(
        api,
        [{"role": "user", "content": [{"type": "input_text", "text": SPEED}]}],
        instructions="Be brief.",
        max_output_tokens=77,
        temperature=0.5,
        top_p=0.9,
        user="u-1",
        metadata={"team": "a"},
        tools=[{**SEARCH, "max_num_results": 2}],
    )
    record = (await api.client.get(f"/v1/predictions/{body['id']}")).json()
    assert (record["answer"], record["user"], record["metadata"]) == (f"{FAST} [1].", "u-1", {"team": "a"})
    assert record["request"]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": SPEED},
    ]
    assert len(record["passages"]) <= 2
    (sent,) = tgi.bodies
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"]) == (77, 0.5, 0.9)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    shown = {key: body[key] for key in ("instructions", "max_output_tokens", "temperature", "top_p", "user")}
    assert shown == {
        "instructions": "Be brief.",
        "max_output_tokens": 77,
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "u-1",
    }
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + body["usage"]["output_tokens"] > 0


async def test_results_are_included_when_asked_for(api, tgi):
    search = (await told(api, include=RESULTS, tools=[SEARCH]))["output"][0]
    assert {each["filename"] for each in search["results"]} == {"kettle.md"}
    first = search["results"][0]
    assert first["text"] == (await api.source(first["file_id"]))[first["start"] : first["end"]] != ""
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as stranger:
        assert (await stranger.get(first["url"])).json()["text"] == first["text"]


async def test_the_tool_s_filter_restricts_the_search(api, tgi):
    fits = {"type": "eq", "key": "kind", "value": "kettle"}
    other = {"type": "or", "filters": [{**fits, "value": "toaster"}, {**fits, "value": "oven"}]}
    used = await told(api, tools=[{**SEARCH, "filters": fits}])
    assert used["retrieval"] == "used"
    withheld = await told(api, tools=[{**SEARCH, "filters": other}])
    assert (withheld["retrieval"], withheld["verdict"]["abstained"]) == ("irrelevant", True)


@pytest.mark.parametrize(
    ("filters", "equality"),
    [
        ({"type": "eq", "key": "a", "value": 1}, {"a": 1}),
        ({"type": "in", "key": "a", "value": ["x", "y"]}, {"a": ["x", "y"]}),
        (
            {
                "type": "and",
                "filters": [{"type": "eq", "key": "a", "value": 1}, {"type": "eq", "key": "b", "value": True}],
            },
            {"a": 1, "b": True},
        ),
        (
            {
                "type": "or",
                "filters": [{"type": "eq", "key": "a", "value": 1}, {"type": "in", "key": "a", "value": [2, 3]}],
            },
            {"a": [1, 2, 3]},
        ),
    ],
)
def test_filters_that_can_be_searched_by_become_an_equality(filters, equality):
    assert equality_of(filters) == equality


def _nested(depth: int) -> dict[str, Any]:
    filters: dict[str, Any] = {"type": "eq", "key": "a", "value": 1}
    for _ in range(depth):
        filters = {"type": "and", "filters": [filters]}
    return filters


@pytest.mark.parametrize(
    "filters",
    [
        {"type": "gt", "key": "a", "value": 1},
        {"type": "eq", "key": "a", "value": None},
        {"type": "eq", "key": "a"},
        {"type": "in", "key": "a", "value": []},
        {"type": "and", "filters": [{"type": "eq", "key": "a", "value": 1}, {"type": "eq", "key": "a", "value": 2}]},
        {"type": "or", "filters": [{"type": "eq", "key": "a", "value": 1}, {"type": "eq", "key": "b", "value": 2}]},
        {"type": "and", "filters": ["a"]},
        _nested(50),
        {},
    ],
)
def test_filters_that_cannot_be_searched_by_are_refused_by_name(filters):
    with pytest.raises(InvalidRequest, match=r"`tools\[0\]\.filters`") as refusal:
        equality_of(filters)
    assert refusal.value.param == "tools[0].filters"


async def test_a_choice_of_the_tool_requires_or_forbids_the_search(api, nobody, tgi):
    assert "retrieval" not in await told(api, tool_choice="none")
    required = await told(nobody, tools=[SEARCH], tool_choice={"type": "file_search"})
    assert (required["retrieval"], required["verdict"]["abstained"]) == ("irrelevant", True)
    record = (await nobody.client.get(f"/v1/predictions/{required['id']}")).json()
    assert record["retrieval_mode"] == "required"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [SEARCH, {"type": "function", "name": "f"}]}, "tools[1].type"),
        ({"tools": [SEARCH, SEARCH]}, "tools"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].vector_store_ids"),
        ({"tools": [{**SEARCH, "vector_store_ids": ["vs_1"]}]}, "tools[0].vector_store_ids[0]"),
        ({"tools": [{**SEARCH, "max_num_results": 51}]}, "tools[0].max_num_results"),
        ({"tools": [{**SEARCH, "top_k": 3}]}, "tools[0].top_k"),
        ({"tools": [{**SEARCH, "ranking_options": {"score_threshold": 0.5}}]}, "tools[0].ranking_options"),
        ({"tools": [{**SEARCH, "filters": {"type": "lt", "key": "a", "value": 1}}]}, "tools[0].filters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"retrieval": {"style": "openwebui"}}, "retrieval.style"),
        ({"metadata": {"a": []}}, "metadata"),
        ({"asked": []}, "input"),
        ({"asked": [{"type": "file_search_call", "id": "fs_1"}]}, "input"),
        ({"asked": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"asked": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"asked": [{"role": "user"}]}, "input[0].content"),
        ({"asked": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]"),
        ({"asked": [{"role": "user", "content": ["x"]}]}, "input[0].content[0]"),
        *(
            (
                {"asked": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
                "input[0].content[0].image_url",
            )
            for url in ("http://10.0.0.1/a", "data:image/png;base64,AA)![](http://10.0.0.1/a")
        ),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(api, tgi, fields, param):
    found, message = await refused(api, **fields)
    assert found == param
    assert f"`{param}" in message
    assert not tgi.bodies


async def test_what_an_answer_has_may_come_back_as_input(api, tgi):
    first = await told(api)
    turns = [{"role": "user", "content": SPEED}, *first["output"], {"role": "user", "content": "And the warranty?"}]
    second = await told(api, turns)
    record = (await api.client.get(f"/v1/predictions/{second['id']}")).json()
    assert [(each["role"], each["content"]) for each in record["request"]["messages"]] == [
        ("user", SPEED),
        ("assistant", f"{FAST} [1]."),
        ("user", "And the warranty?"),
    ]


async def test_a_response_goes_on_from_the_one_before_without_its_instructions(api, tgi):
    first = await api.client.post(
        "/v1/responses",
        json={"model": "hallmark", "input": SPEED, "instructions": "Be brief."},
        headers={"x-conversation-id": "c-1"},
    )
    second = await told(api, "And the warranty?", previous_response_id=first.json()["id"], instructions="Be kind.")
    assert second["previous_response_id"] == first.json()["id"]
    record = (await api.client.get(f"/v1/predictions/{second['id']}")).json()
    assert record["conversation"] == "c-1"
    assert [each["content"] for each in record["request"]["messages"]] == [
        "Be kind.",
        SPEED,
        f"{FAST} [1].",
        "And the warranty?",
    ]


async def test_a_response_goes_on_from_a_chat_completion(api, tgi):
    first = await api.answer(SPEED)
    second = await told(api, "And the warranty?", previous_response_id=first["id"])
    assert len(tgi.bodies[-1]["messages"]) == 3
    assert second["status"] == "completed"


async def test_a_chain_may_be_as_large_as_one_request(nobody, tgi):
    turns = [{"role": "user", "content": "hot kettles " * 90_000}, {"role": "user", "content": SPEED}]
    first = await told(nobody, turns, tools=[SEARCH], tool_choice="required")
    param, message = await refused(nobody, 413, turns, previous_response_id=first["id"])
    assert param == "previous_response_id"
    assert "2000000 (setting `limits.max_body_bytes`)" in message
    assert [each["id"] for each in await nobody.records()] == [first["id"]]


async def test_an_answer_that_called_tools_is_not_told_as_a_response_nor_gone_on_from(api, tgi):
    tgi.script(ToolCall("f", '{"a": 1}'))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    called = await api.answer("Call f.", tools=tools)
    assert called["choices"][0]["finish_reason"] == "tool_calls"
    param, message = await refused(api, previous_response_id=called["id"])
    assert (param, "`/v1/chat/completions`" in message) == ("previous_response_id", True)
    again = await api.client.get(f"/v1/responses/{called['id']}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
    assert "/v1/predictions/" in again.json()["error"]["message"]


async def test_what_is_not_kept_cannot_be_gone_on_from_nor_read_again(api, tgi):
    first = await told(api, store=False)
    assert first["store"] is False
    param, message = await refused(api, 404, previous_response_id=first["id"])
    assert param == "previous_response_id"
    assert "not kept" in message
    again = await api.client.get(f"/v1/responses/{first['id']}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")


async def test_what_is_kept_redacted_is_not_gone_on_from(api, tgi):
    body = {"model": "hallmark", "input": "I am jo@example.com: how fast is the Aurora kettle?"}
    first = await api.client.post("/v1/responses", json=body, headers={"x-hallmark-keep": "redacted"})
    assert first.status_code == 200
    param, message = await refused(api, previous_response_id=first.json()["id"])
    assert (param, "redacted" in message) == ("previous_response_id", True)


async def test_nobody_goes_on_from_what_is_another_tenant_s_or_unknown(api, nobody, tgi):
    theirs = (await told(api))["id"]
    for unknown in (theirs, "resp_1", "0" * 8 + "-0000-7000-8000-" + "0" * 12):
        assert (await refused(nobody, 404, previous_response_id=unknown))[0] == "previous_response_id"
    assert (await nobody.client.get(f"/v1/responses/{theirs}")).status_code == 404
    assert len(tgi.bodies) == 1


async def test_a_key_without_the_scope_goes_on_from_its_own_responses_alone(everyone, api, tgi):
    theirs = (await told(api))["id"]
    service = everyone[1]
    async with service.client(await service.new_key(tenant=api.name, scopes=("chat",))) as client:
        chatting = Api(client, api.name, "")
        response = await ask(chatting, previous_response_id=theirs)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "insufficient_scope")
        own = (await told(chatting))["id"]
        assert (await ask(chatting, previous_response_id=own)).status_code == 200
        assert (await client.get(f"/v1/responses/{own}")).status_code == 403


async def test_an_answer_that_was_cut_by_its_length_is_incomplete(api, tgi):
    tgi.script(Tokens("The Aurora kettle boils", " one litre", finish="length"))
    body = await told(api, tool_choice="none")
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    tgi.script(Tokens("The Aurora kettle boils", " one litre", finish="length"))
    events = await read_events(api.client, {"model": "hallmark", "input": SPEED, "tool_choice": "none"})
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"


async def test_an_error_before_the_first_event_keeps_its_status(api, tgi):
    tgi.script(Refuse.too_long())
    response = await ask(api, stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["code"]


async def test_a_stream_that_breaks_off_ends_with_a_failed_response(nobody, tgi):
    tgi.script(Tokens("The Aurora", " kettle", cut_after=1))
    events = await read_events(nobody.client, {"model": "hallmark", "input": SPEED})
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert response["error_code"] == "engine_interrupted"
    assert response["output"][-1]["content"][0]["text"] == "The Aurora"
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert (await nobody.record())["error_code"] == "engine_interrupted"
    again = (await nobody.client.get(f"/v1/responses/{response['id']}")).json()
    assert (again["status"], again["error"]["code"], again["error_code"]) == (
        "failed",
        "server_error",
        "engine_interrupted",
    )


async def test_the_events_come_in_the_order_of_the_api(api, tgi):
    body = {"model": "hallmark", "input": SPEED, "tools": [SEARCH], "include": RESULTS}
    events = await read_events(api.client, body)
    kinds = [each["type"].removeprefix("response.") for each in events]
    assert list(dict.fromkeys(kinds)) == [
        "created",
        "in_progress",
        "output_item.added",
        "file_search_call.in_progress",
        "file_search_call.searching",
        "file_search_call.completed",
        "output_item.done",
        "content_part.added",
        "output_text.delta",
        "output_text.annotation.added",
        "output_text.done",
        "content_part.done",
        "completed",
    ]
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    text = "".join(each["delta"] for each in events if each["type"] == "response.output_text.delta")
    response = events[-1]["response"]
    assert text == response["output"][1]["content"][0]["text"] == f"{FAST} [1]."
    added = [each["item"]["type"] for each in events if each["type"] == "response.output_item.added"]
    assert added == ["file_search_call", "message"]
    assert response["output"][0]["results"]


async def test_a_response_is_read_again_as_it_was_told(api, tgi):
    first = await told(api, include=RESULTS, instructions="Be brief.", metadata={"a": "b"}, tools=[SEARCH])
    again = (await api.client.get(f"/v1/responses/{first['id']}")).json()
    verdict, completed = first.pop("verdict"), first.pop("completed_at")
    assert again.pop("verdict").items() <= verdict.items()
    assert abs(again.pop("completed_at") - completed) <= 1
    assert again == first


async def test_a_response_is_read_again_after_its_document_is_gone(everyone, tgi):
    async with everyone[1].tenant() as api:
        document = await api.add("kettle.md", KETTLE)
        first = await told(api, include=RESULTS)
        assert (await api.client.delete(f"/v1/documents/{document['id']}")).status_code == 200
        again = (await api.client.get(f"/v1/responses/{first['id']}")).json()
        search, message = again["output"]
        assert all("text" not in each and each["file_id"] == document["id"] for each in search["results"])
        (citation,) = message["content"][0]["annotations"]
        assert (citation["quote"], citation["filename"]) == (f"{FAST}.", document["id"])


async def test_json_is_asked_of_the_engine_as_chat_asks_for_it(nobody, tgi):
    tgi.script(Tokens('{"a":', " 1}"))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    body = await told(nobody, text={"format": form})
    assert body["output"][-1]["content"][0]["text"] == '{"a": 1}'
    assert body["text"] == {"format": form}
    chat = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    first = tgi.bodies[0].get("response_format")
    await nobody.answer(SPEED, response_format=chat)
    assert first == tgi.bodies[1].get("response_format") is not None


async def test_what_the_engine_refuses_of_a_format_is_told_in_the_form_of_a_response(nobody, tgi):
    param, message = await refused(nobody, text={"format": {"type": "json_object"}})
    assert param == "text.format"
    assert message.startswith("`text.format`: ")
    assert '"json_schema":' not in message  # It is chat's form, which is refused here.


async def test_a_filter_that_the_index_refuses_is_named_as_it_was_sent(api, tgi):
    filters = {"type": "eq", "key": "", "value": 1}
    assert (await refused(api, tools=[{**SEARCH, "filters": filters}]))[0] == "tools[0].filters"
    assert (await refused(api, tools=[SEARCH], retrieval={"filter": {"": 1}}))[0] == "retrieval.filter"


async def test_metrics_know_the_route(nobody, tgi):
    await told(nobody)
    metrics = (await nobody.client.get("/metrics")).text
    assert 'hallmark_request_seconds_count{route="/v1/responses"}' in metrics
    assert "/v1/responses" in metrics.partition("hallmark_overhead_seconds_count{")[2]
