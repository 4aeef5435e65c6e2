"""OpenAI's own Python SDK, unchanged, against the live service: only `base_url` and the key are ours."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_message import Annotation

from tests.fake_tgi import FakeTGI, Refuse, Reply, Tokens, ToolCall
from tests.service import NO_TLS, Api, Service, live_service

KETTLE = """# Aurora kettle

The Aurora kettle boils one litre in 90 seconds. It holds 1.7 litres and weighs 1200 grams.

## Warranty

The warranty of the Aurora kettle lasts 24 months from the date of purchase.
"""
QUESTION = [{"role": "user", "content": "How fast does the Aurora kettle boil one litre?"}]
PLAIN = {"retrieval": {"mode": "off"}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Service]]:
    async with FakeTGI() as tgi:
        directory = tmp_path_factory.mktemp("sdk")
        async with live_service(
            directory, engine_url=tgi.url, tenants=2, settings={"retrieval": {"passage_tokens": 32}}
        ) as service:
            yield tgi, service


@pytest.fixture(scope="module")
async def api(everyone) -> AsyncIterator[Api]:
    async with everyone[1].tenant() as api:
        await api.add("kettle.md", KETTLE)
        yield api


@pytest.fixture
def tgi(everyone) -> FakeTGI:
    tgi = everyone[0]
    tgi.acts.clear()
    tgi.requests.clear()
    tgi.default = Tokens(" The Aurora kettle boils", " one litre in", " 90 seconds", ".")
    return tgi


@pytest.fixture
async def client(everyone, api, tgi) -> AsyncIterator[AsyncOpenAI]:
    async with sdk(everyone[1], api.key) as client:
        yield client


@asynccontextmanager
async def sdk(service: Service, key: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0, timeout=10) as client:
        yield client


async def assert_cited(message: ChatCompletionMessage) -> None:
    """The message's typed annotation stands on its mark and leads to the passage."""
    assert message.content is not None
    assert message.annotations
    annotation = message.annotations[0]
    assert isinstance(annotation, Annotation)
    assert annotation.type == "url_citation"
    citation = annotation.url_citation
    assert message.content[citation.start_index : citation.end_index] == "[1]"
    assert citation.title == "Aurora kettle"
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as browser:  # It has no key.
        opened = await browser.get(citation.url)
    assert opened.status_code == 200
    assert "boils one litre in 90 seconds" in opened.json()["text"]


async def test_an_answer_has_typed_annotations_usage_and_the_release(client):
    raw = await client.chat.completions.with_raw_response.create(model="hallmark", messages=QUESTION)
    answer = raw.parse()
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content.startswith("The Aurora kettle boils one litre in 90 seconds")
    await assert_cited(choice.message)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens == 15
    assert re.fullmatch("[0-9a-f]{64}", answer.system_fingerprint)
    assert raw.headers["x-prediction-id"] == answer.id == raw.request_id
    # What is beyond OpenAI's types is there as extra fields.
    assert answer.citations[0]["quote"] in KETTLE
    assert answer.verdict["status"] == "answered"


async def test_the_synchronous_client_works_the_same(everyone, api, tgi):
    def ask() -> ChatCompletionMessage:
        with OpenAI(base_url=f"{everyone[1].url}/v1", api_key=api.key, max_retries=0) as client:
            streamed = client.chat.completions.create(model="hallmark", messages=QUESTION, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
            message = client.chat.completions.create(model="hallmark", messages=QUESTION).choices[0].message
            assert text == message.content
            return message

    await assert_cited(await asyncio.to_thread(ask))


async def test_a_stream_has_the_answer_in_deltas_and_the_usage_at_the_end(client):
    stream = await client.chat.completions.create(
        model="hallmark", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text.startswith("The Aurora kettle boils one litre in 90 seconds")
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    (annotations,) = [choice.delta.annotations for choice in choices if hasattr(choice.delta, "annotations")]
    mark = annotations[0]["url_citation"]
    assert text[mark["start_index"] : mark["end_index"]] == "[1]"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_stream_helper_puts_the_whole_message_together(client):
    async with client.chat.completions.stream(
        model="hallmark", messages=QUESTION, stream_options={"include_usage": True}
    ) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert "".join(deltas) == message.content
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.completion_tokens == 4
    await assert_cited(message)


async def test_the_extras_go_in_as_extra_body(client, tgi):
    answer = await client.chat.completions.create(model="hallmark@1", messages=QUESTION, extra_body=PLAIN)
    assert not answer.choices[0].message.annotations
    assert not hasattr(answer, "citations")
    assert [turn["role"] for turn in tgi.bodies[-1]["messages"]] == ["user"]


async def test_a_tool_call_is_typed(client, tgi):
    tgi.script(ToolCall("weather", {"city": "Oslo"}))
    answer = await client.chat.completions.create(
        model="hallmark", messages=QUESTION, tools=[WEATHER], extra_body=PLAIN
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"city":"Oslo"}')
    assert re.fullmatch("call_[0-9a-f]{24}", call.id)


async def test_a_streamed_tool_call_is_put_together_by_the_helper(client, tgi):
    tgi.script(ToolCall("weather", {"city": "Oslo"}))
    async with client.chat.completions.stream(
        model="hallmark", messages=QUESTION, tools=[WEATHER], extra_body=PLAIN
    ) as stream:
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"city":"Oslo"}')
    assert re.fullmatch("call_[0-9a-f]{24}", call.id)
    assert final.choices[0].finish_reason == "tool_calls"


async def test_what_an_engine_repeats_in_every_delta_of_a_call_is_not_doubled_by_the_helper(client, tgi):
    def event(arguments: str) -> bytes:
        function = {"name": "weather", "arguments": arguments}
        call = {"index": 0, "id": "0", "type": "function", "function": function}
        choice = {"index": 0, "delta": {"role": "assistant", "tool_calls": [call]}}
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"

    sse = map(event, ('{"city":', '"Oslo"', "}"))
    tgi.script(Reply(*sse, b"data: [DONE]\n\n", content_type="text/event-stream"))
    async with client.chat.completions.stream(
        model="hallmark", messages=QUESTION, tools=[WEATHER], extra_body=PLAIN
    ) as stream:
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"city":"Oslo"}')
    assert re.fullmatch("call_[0-9a-f]{24}", call.id)


async def test_a_wrong_key_is_an_authentication_error(everyone):
    async with sdk(everyone[1], "hm_aaaaaaaa_wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="hallmark", messages=QUESTION)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_a_key_without_the_scope_is_a_permission_error(everyone):
    service = everyone[1]
    async with sdk(service, await service.new_key(scopes=("documents:read",))) as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.chat.completions.create(model="hallmark", messages=QUESTION)
    assert caught.value.code == "insufficient_scope"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_a_not_found_error(client, stream):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4o", messages=QUESTION, stream=stream)
    error = caught.value
    assert (error.code, error.param, error.type) == ("model_not_found", "model", "invalid_request_error")
    assert "'hallmark'" in error.message
    assert error.request_id


async def test_a_wrong_field_is_a_bad_request_error_that_names_it(client):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="hallmark", messages=QUESTION, temperature=9)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_overloaded_engine_is_a_rate_limit_error(client, tgi, stream):
    tgi.default = lambda body: Refuse.overloaded()
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model="hallmark", messages=QUESTION, stream=stream)
    assert caught.value.code == "overloaded"
    assert int(caught.value.response.headers["retry-after"]) >= 1


async def test_the_sdk_tries_again_by_itself_after_an_overload(everyone, api, tgi):
    tgi.script(Refuse.overloaded())
    async with sdk(everyone[1], api.key) as client:
        answer = await client.with_options(max_retries=1).chat.completions.create(model="hallmark", messages=QUESTION)
    assert answer.choices[0].message.content


async def test_a_stream_that_breaks_off_is_an_api_error_after_what_came(client, tgi):
    sent = asyncio.Event()
    tgi.script(Tokens("The", " Aurora", " kettle", fail_after=2, gates={2: sent}))
    stream = await client.chat.completions.create(model="hallmark", messages=QUESTION, stream=True, extra_body=PLAIN)
    text: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            text.append(chunk.choices[0].delta.content)
            if text[-1] == " Aurora":
                sent.set()

    with pytest.raises(openai.APIError) as caught:
        await read()
    assert type(caught.value) is openai.APIError
    assert caught.value.code == "engine_interrupted"
    assert text == ["", "The", " Aurora"]


async def test_a_client_that_leaves_cancels_the_engine(client, tgi):
    hold = asyncio.Event()
    tgi.script(Tokens("The", " Aurora", " kettle", gates={2: hold}))
    stream = await client.chat.completions.create(model="hallmark", messages=QUESTION, stream=True, extra_body=PLAIN)
    async for chunk in stream:
        if chunk.choices[0].delta.content == " Aurora":
            break
    before = tgi.cancelled
    await stream.close()
    await tgi.until(lambda: tgi.cancelled == before + 1)


async def test_models_are_listed_and_described(client):
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == ["hallmark"]
    one = await client.models.retrieve("hallmark@1")
    assert one.object == "model"
    assert one.release == "hallmark@1"
    assert one.digest == listed[0].digest
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4o")


@pytest.mark.parametrize("model", ["hashing", "all-minilm-l6-v2"])
async def test_embeddings_are_the_same_in_both_encodings(client, model):
    texts = ["a kettle", "a toaster"]
    packed = await client.embeddings.create(model=model, input=texts)  # The SDK asks for base64 and unpacks it.
    plain = await client.embeddings.create(model=model, input=texts, encoding_format="float")
    assert packed.model == plain.model == model
    assert [each.index for each in packed.data] == [0, 1]
    np.testing.assert_allclose(
        [each.embedding for each in packed.data], [each.embedding for each in plain.data], rtol=1e-6
    )
    assert np.linalg.norm(plain.data[0].embedding) == pytest.approx(1, abs=1e-5)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == 4


async def test_embeddings_refuse_what_the_model_cannot_do(client):
    with pytest.raises(openai.NotFoundError, match="all-minilm-l6-v2"):
        await client.embeddings.create(model="text-embedding-3-small", input="x")
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        await client.embeddings.create(model="hashing", input="x", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="input"):
        await client.embeddings.create(model="hashing", input=[[1, 2, 3]])
