"""OpenAI's own Python SDK, unchanged, on `/v1/responses`; and every body and event by OpenAI's own description."""

import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response
from openai.types.responses.response_output_text import AnnotationFileCitation

from tests.fake_tgi import FakeTGI, Tokens
from tests.service import Api, live_service
from tests.wire import read_events

DESCRIPTION = Path(__file__).parents[3] / "shared" / "data" / "conf_openai_openapi" / "openapi.yaml"
KETTLE = """# Aurora kettle

The Aurora kettle boils one litre in 90 seconds. It holds 1.7 litres and weighs 1200 grams.

## Warranty

The warranty of the Aurora kettle lasts 24 months from the date of purchase.
"""
SPEED = "How fast does the Aurora kettle boil one litre?"
FAST = "The Aurora kettle boils one litre in 90 seconds"
SEARCH: Any = {
    "type": "file_search",
    "vector_store_ids": ["hallmark"],
    "max_num_results": 4,
    "filters": {"type": "eq", "key": "kind", "value": "kettle"},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
RESULTS: Any = ["file_search_call.results"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Api, AsyncOpenAI]]:
    async with FakeTGI() as tgi:
        settings = {"retrieval": {"passage_tokens": 32}}
        directory = tmp_path_factory.mktemp("responses")
        async with (
            live_service(directory, engine_url=tgi.url, tenants=1, settings=settings) as service,
            service.tenant() as api,
            sdk(service.url, api.key) as client,
        ):
            await api.add("kettle.md", KETTLE, kind="kettle")
            yield tgi, api, client


def sdk(url: str, key: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


@pytest.fixture
def tgi(everyone) -> FakeTGI:
    tgi = everyone[0]
    tgi.acts.clear()
    tgi.requests.clear()
    tgi.default = Tokens(" The Aurora kettle boils", " one litre in", " 90 seconds", ".")
    return tgi


@pytest.fixture
def api(everyone, tgi) -> Api:
    return everyone[1]


@pytest.fixture
def client(everyone, tgi) -> AsyncOpenAI:
    return everyone[2]


@functools.cache
def _schemas() -> dict[str, Any]:
    if not DESCRIPTION.exists():
        pytest.skip("needs OpenAI's description beside the project, in ../shared/data/conf_openai_openapi")
    import yaml  # Nobody else needs it.

    loaded = yaml.load(DESCRIPTION.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return dict(loaded["components"]["schemas"])


def described(name: str, value: Any) -> None:
    """Hold a value to one of OpenAI's schemas."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": _schemas()}}
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
    assert problem is None, (problem.json_path, problem.message[:500])


def _event_schemas() -> dict[str, str]:
    """The schema of each type of event."""
    branches = [branch["$ref"].rpartition("/")[2] for branch in _schemas()["ResponseStreamEvent"]["anyOf"]]
    return {_schemas()[name]["properties"]["type"]["enum"][0]: name for name in branches}


def assert_cited(response: Response) -> None:
    search, message = response.output
    assert search.type == "file_search_call"
    assert search.queries == [SPEED]
    assert search.results
    assert {each.filename for each in search.results} == {"kettle.md"}
    assert message.type == "message"
    (content,) = message.content
    assert content.type == "output_text"
    (annotation,) = content.annotations
    assert isinstance(annotation, AnnotationFileCitation)
    assert annotation.filename == "kettle.md"
    assert response.output_text[annotation.index :].startswith("[1]")
    assert annotation.quote == f"{FAST}."  # type: ignore[attr-defined]


async def test_a_whole_response_is_typed(client):
    response = await client.responses.create(model="hallmark", input=SPEED, tools=[SEARCH], include=RESULTS)
    assert response.output_text == f"{FAST} [1]."
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.usage is not None
    assert response.usage.total_tokens > 0
    assert_cited(response)


async def test_a_stream_is_typed(client):
    text, annotations, last = "", [], None
    stream = await client.responses.create(model="hallmark", input=SPEED, tools=[SEARCH], include=RESULTS, stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            text += event.delta
        elif event.type == "response.output_text.annotation.added":
            annotations.append(event.annotation)
        last = event
    assert text == f"{FAST} [1]."
    assert len(annotations) == 1
    assert last is not None
    assert last.type == "response.completed"
    assert_cited(last.response)


async def test_the_stream_s_helper_puts_the_response_together(client):
    async with client.responses.stream(model="hallmark", input=SPEED, tools=[SEARCH], include=RESULTS) as stream:
        kinds = [event.type async for event in stream]
        response = await stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert_cited(response)


async def test_a_conversation_goes_on_by_id_and_is_read_again(client):
    first = await client.responses.create(model="hallmark", input=SPEED)
    second = await client.responses.create(model="hallmark", input="And why?", previous_response_id=first.id)
    again = await client.responses.retrieve(second.id)
    assert again.previous_response_id == first.id
    assert again.output_text == second.output_text


async def test_what_is_refused_is_the_sdk_s_own_error(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.responses.create(model="hallmark", input=SPEED, tools=[{"type": "web_search"}])
    assert refusal.value.param == "tools[0].type"
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve("0" * 8 + "-0000-7000-8000-" + "0" * 12)


async def test_a_stream_that_fails_is_a_typed_event(client, tgi):
    tgi.script(Tokens("The Aurora", " kettle", cut_after=1))
    stream = await client.responses.create(model="hallmark", input=SPEED, tool_choice="none", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [SEARCH], "include": RESULTS, "instructions": "Be brief.", "metadata": {"a": "b"}, "user": "u"},
        {"tool_choice": "none", "max_output_tokens": 50, "temperature": 0.2, "top_p": 0.8},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}, "store": False},
    ],
    ids=["searched", "bare", "json"],
)
async def test_bodies_and_events_are_as_openai_describes_them(api, tgi, fields):
    body = {"model": "hallmark", "input": SPEED, **fields}
    described("CreateResponse", body)
    whole = (await api.client.post("/v1/responses", json=body)).json()
    described("Response", whole)
    if fields.get("store", True):
        described("Response", (await api.client.get(f"/v1/responses/{whole['id']}")).json())
    by_type = _event_schemas()
    for event in await read_events(api.client, body):
        described(by_type[event["type"]], event)


async def test_ends_that_are_not_whole_are_as_openai_describes_them(api, tgi):
    body = {"model": "hallmark", "input": SPEED, "tool_choice": "none"}
    for act in (Tokens("The", " kettle", finish="length"), Tokens("The", " kettle", cut_after=1)):
        tgi.script(act)
        last = (await read_events(api.client, body))[-1]
        described(_event_schemas()[last["type"]], last)


def test_the_check_notices_what_openai_does_not_describe():
    with pytest.raises(AssertionError):
        described("Response", {"id": "x", "object": "response"})
