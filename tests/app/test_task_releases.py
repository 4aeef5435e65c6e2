"""Releases that classify and extract, through the service: what the engine is asked, what the caller gets, and what
is on record."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from tests.fake_tgi import FakeTGI, Refuse, Tokens
from tests.service import Api, live_service, until

LABELS = ["billing", "technical problem", "other"]
ROUTER = {"name": "router", "task": {"kind": "classify", "labels": LABELS}}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
ORDER = {"name": "order", "task": {"kind": "extract", "schema": SCHEMA}}
QUESTION = "I was charged twice."


@pytest.fixture
async def tgi() -> AsyncIterator[FakeTGI]:
    async with FakeTGI(default=Tokens("bill", "ing")) as tgi:
        yield tgi


@contextlib.asynccontextmanager
async def serve(directory: Path, tgi: FakeTGI, **settings: Any) -> AsyncIterator[Api]:
    async with live_service(directory, engine_url=tgi.url, settings=settings) as service, service.client() as client:
        yield Api(client, "default", service.key)


@pytest.fixture
async def api(tmp_path, tgi) -> AsyncIterator[Api]:
    async with serve(tmp_path / "data", tgi) as api:
        yield api


async def create(api: Api, release: dict[str, Any], **fields: Any) -> dict[str, Any]:
    response = await api.client.post("/v1/releases", json={**release, **fields})
    assert response.status_code == 201, response.text
    return dict(response.json())


async def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    return str(error["message"])


def said(tgi: FakeTGI) -> str:
    return str(tgi.bodies[-1]["messages"][-1]["content"])


# --- classify ---


async def test_a_release_that_classifies_answers_with_one_of_its_labels(api, tgi):
    assert (await create(api, ROUTER))["approved"]
    answer = await api.answer(QUESTION, model="router@1")
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("billing", "stop")
    assert "citations" not in answer
    assert tgi.bodies[-1]["response_format"] == {"type": "regex", "value": "(billing|technical problem|other)"}
    assert QUESTION in said(tgi)
    assert "- technical problem\n" in said(tgi)
    record = await api.record()
    assert (record["predicted_class"], record["valid"], record["outcome"]) == ("billing", True, "finished")
    assert (record["answer"], record["retrieval_outcome"]) == ("billing", "off")
    assert record["messages"][-1]["content"] == said(tgi)


async def test_a_class_is_given_as_its_label_is_written(api, tgi):
    await create(api, ROUTER)
    tgi.script(Tokens("**Technical ", "Problem**\n"), Tokens("Other. ", "It is about the weather."))
    answers = [await api.answer(QUESTION, model="router@1") for _ in range(2)]
    assert [each["choices"][0]["message"]["content"] for each in answers] == ["technical problem", "other"]


async def test_a_stream_is_held_until_it_is_a_class(api, tgi):
    await create(api, ROUTER)
    gate = asyncio.Event()
    tgi.script(Tokens("bill", "ing", gates={1: gate}))
    asking = asyncio.create_task(api.stream(QUESTION, model="router@1", stream_options={"include_usage": True}))
    await until(lambda: asyncio.sleep(0, tgi.bodies and tgi.bodies[-1]["stream"]))
    assert not asking.done()
    gate.set()
    stream = await asking
    assert (stream.text, stream.finish_reason, stream.done) == ("billing", "stop", True)
    assert [delta.get("content") for delta in stream.deltas if delta.get("content")] == ["billing"]
    assert stream.chunks[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_no_class_is_a_502_and_its_text_is_on_record(api, tgi, stream):
    await create(api, ROUTER)
    tgi.script(Tokens("I think ", "it is billing"))
    response = await api.ask(QUESTION, model="router@1", stream=stream)
    message = await refused(response, 502, "unfit_answer")
    assert response.headers["x-should-retry"] == "false"
    assert "none of the release's 3 labels" in message
    assert "I think" not in message
    record = await api.record()
    assert (record["outcome"], record["error_code"], record["valid"]) == ("failed", "unfit_answer", False)
    assert (record["answer"], record["predicted_class"], record["finish_reason"]) == (
        "I think it is billing",
        None,
        "stop",
    )
    assert record["completion_tokens"] == 2


async def test_an_answer_that_was_cut_says_so(api, tgi):
    await create(api, ORDER)
    tgi.script(Tokens('{"name": "', "An", finish="length"))
    message = await refused(await api.ask(QUESTION, model="order@1", max_tokens=2), 502, "unfit_answer")
    assert "raise `max_tokens`" in message


async def test_without_content_the_class_stays_on_record(api, tgi):
    await create(api, ROUTER)
    tgi.script(Tokens("billing"), Tokens("my secret"))
    await api.answer(QUESTION, model="router@1", store=False)
    await api.ask(QUESTION, model="router@1", store=False)
    second, first = await api.records(2)
    assert (first["predicted_class"], first["valid"], first["answer"]) == ("billing", True, None)
    assert (second["predicted_class"], second["valid"], second["answer"]) == (None, False, None)


async def test_where_the_engine_failed_nothing_is_said_of_validity(api, tgi):
    await create(api, ROUTER)
    tgi.script(Refuse.failed())
    await api.ask(QUESTION, model="router@1")
    assert (await api.record())["valid"] is None


async def test_probabilities_of_a_class_come_along(api, tgi):
    await create(api, ROUTER)
    answer = await api.answer(QUESTION, model="router@1", logprobs=True, top_logprobs=2)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "billing"
    assert tgi.bodies[-1]["logprobs"] is True
    stream = await api.stream(QUESTION, model="router@1", logprobs=True)
    assert stream.text == "billing"


# --- extract ---


async def test_a_release_that_extracts_answers_with_json_that_fits(api, tgi):
    await create(api, ORDER)
    tgi.script(Tokens("```json\n", '{"name": "Ann"}', "\n```"))
    answer = await api.answer("Ann called.", model="order@1", response_format={"type": "json_object"})
    assert answer["choices"][0]["message"]["content"] == '{"name": "Ann"}'
    assert tgi.bodies[-1]["response_format"] == {"type": "json", "value": SCHEMA}
    assert '"required":["name"]' in said(tgi)
    record = await api.record()
    assert (record["valid"], record["predicted_class"], record["answer"]) == (True, None, '{"name": "Ann"}')


async def test_json_that_does_not_fit_is_told_by_its_place(api, tgi):
    await create(api, ORDER)
    tgi.script(Tokens('{"name": 5}'))
    message = await refused(await api.ask(QUESTION, model="order@1"), 502, "unfit_answer")
    assert "at `name`" in message


# --- what a release says of retrieval and prompt ---


async def test_passages_are_looked_up_where_the_release_says_so(api, tgi):
    prompt = {"version": "r1", "template": "Rules:\n{sources}\n\n{labels}\n\n{question} {schema}"}
    await create(api, ROUTER, prompt=prompt, retrieval={"mode": "required"})
    document = await api.add("rules.txt", "Whoever was charged twice has a problem of billing.")
    answer = await api.answer("Somebody was charged twice.", model="router@1")
    assert (answer["choices"][0]["message"]["content"], answer["retrieval"], answer["citations"]) == (
        "billing",
        "used",
        [],
    )
    assert said(tgi).startswith("Rules:\n[1] Whoever was charged twice")
    assert said(tgi).endswith("- other\n\nSomebody was charged twice. null")
    record = await api.record()
    assert [each["document_id"] for each in record["passages"]] == [document["id"]]
    assert (record["verdict"], record["citations"], record["valid"]) == (None, None, True)
    tgi.script(Tokens("nothing"))
    await refused(await api.ask("Somebody was charged twice.", model="router@1"), 502, "unfit_answer")


async def test_the_last_turn_is_what_is_sorted_and_the_turns_before_it_are_kept(api, tgi):
    await create(api, ROUTER)
    turns = [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "Hello {labels}"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And {labels} twice?"},
    ]
    await api.answer(turns, model="router@1")
    sent = tgi.bodies[-1]["messages"]
    assert sent[:3] == turns[:3]
    assert "Text: And {labels} twice?" in sent[3]["content"]


async def test_what_asks_for_something_else_is_refused_by_name_and_not_recorded(api):
    await create(api, ROUTER)
    for fields, param in (
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"retrieval": {"mode": "auto"}}, "retrieval.mode"),
        ({"retrieval": {"check": "off"}}, "retrieval.check"),
        ({"retrieval": {"fallback": "keep"}}, "retrieval.fallback"),
    ):
        response = await api.ask(QUESTION, model="router@1", **fields)
        assert "'classify'" in await refused(response, 400, "invalid_request", param)
    await api.answer(QUESTION, model="router@1", response_format={"type": "text"}, retrieval={"top_k": 3})
    assert len(await api.records(1)) == 1


# --- before it serves ---


async def test_an_engine_that_cannot_be_held_to_a_task_is_told_before_the_release_serves(api, tgi):
    tgi.script(Refuse(422, "Input validation error: grammar is not supported", "validation"))
    made = await create(api, ROUTER)
    assert not made["approved"]
    assert "grammar is not supported" in made["problems"][0]
    made = await create(api, {**ORDER, "task": {"kind": "extract", "schema": {"type": "object"}}})
    assert "`properties`" in made["problems"][0]


async def test_a_fallback_has_the_same_task(api):
    await create(api, ROUTER)
    for other in (ORDER, {**ROUTER, "task": {"kind": "classify", "labels": ["a", "b"]}}, {"name": "plain"}):
        response = await api.client.post("/v1/releases", json={**other, "fallback": "router@1"})
        assert "another task" in await refused(response, 400, "invalid_request", "fallback")
    assert (await create(api, ROUTER, notes="two", fallback="router@1"))["id"] == "router@2"
    response = await api.client.post("/v1/releases", json={**ROUTER, "fallback": "extractive"})
    await refused(response, 400, "invalid_request", "fallback")


async def test_a_shadow_with_a_task_classifies_beside_a_plain_answer(api, tgi):
    await create(api, ROUTER, name="hallmark")
    response = await api.client.post("/v1/rollouts/hallmark/shadow", json={"release": "hallmark@2", "rate": 1.0})
    assert response.status_code == 200, response.text
    tgi.script(Tokens("Four weeks."), Tokens("other"))
    answer = await api.answer("How long?", retrieval={"mode": "off"}, response_format={"type": "text"})
    assert answer["choices"][0]["message"]["content"] == "Four weeks."
    shadow, shown = await api.records(2)
    assert (shown["assignment"], shown["valid"], shown["predicted_class"]) == ("stable", None, None)
    assert (shadow["assignment"], shadow["valid"], shadow["predicted_class"]) == ("shadow", True, "other")


async def test_an_export_tells_the_class_and_whether_it_was_valid(tmp_path, tgi, postgres):
    async with serve(tmp_path / "data", tgi, database_url=postgres.create_database()) as api:
        await create(api, ROUTER)
        tgi.script(Tokens("billing"), Tokens("nothing"), Tokens("Hello"))
        for model in ("router@1", "router@1", "hallmark"):
            await api.ask(QUESTION, model=model)
        rows = (await api.records(3))[::-1]
        assert [(row["predicted_class"], row["valid"]) for row in rows] == [
            ("billing", True),
            (None, False),
            (None, None),
        ]
        response = await api.client.get("/v1/predictions/export", params={"format": "parquet"})
        table = pq.read_table(io.BytesIO(response.content))
        assert str(table.schema.field("valid").type) == "bool"
        assert table.column("valid").to_pylist() == [True, False, None]
        lines = (await api.client.get("/v1/predictions/export")).text.splitlines()
        assert [json.loads(line)["predicted_class"] for line in lines] == ["billing", None, None]
