"""What the caller sees when an engine refuses, breaks, lies or stays silent."""

import asyncio
import inspect
import json

import pytest

from app import errors
from app.engines import failures, wire
from app.engines.tgi import TGIEngine, Timeouts
from app.errors import (
    ContextTooLong,
    EngineError,
    EngineGarbage,
    EngineInterrupted,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    ServiceError,
)
from app.messages import Generation, Message
from tests.fake_tgi import Drop, FakeTGI, Hang, Refuse, Reply, Tokens

TOO_LONG = (
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. "
    "Given: 3000 `inputs` tokens and 100 `max_new_tokens`"
)
SHORT = Timeouts(first_token_seconds=0.2, between_tokens_seconds=0.2, answer_seconds=0.2, probe_seconds=0.2)


def generation(*, stream=False, **fields):
    return Generation([Message("user", "hello")], stream=stream, **fields)


async def answer(engine, *, stream):
    """The pieces handed out and the error that ended the answer, if any."""
    pieces = []
    try:
        async for batch in engine.generate(generation(stream=stream)):
            pieces += batch
    except ServiceError as error:
        return pieces, error
    return pieces, None


async def failure(*acts, stream=False, timeouts=None):
    async with FakeTGI(*acts) as tgi:
        engine = TGIEngine(tgi.url, timeouts=timeouts or Timeouts())
        try:
            return await answer(engine, stream=stream)
        finally:
            await engine.aclose()


# TGI's own failures (protocol sheet A7): what it says in a JSON call and, always under status 200, in a stream.
TGI_FAILURES = [
    (429, "Model is overloaded", "overloaded", Overloaded),
    (422, TOO_LONG, "validation", ContextTooLong),
    (422, "Input validation error: `inputs` must have less than 9 tokens. Given: 10", "validation", ContextTooLong),
    (422, "Input validation error: `inputs` cannot be empty", "validation", EngineRejected),
    (422, "Input validation error: grammar is not supported", "validation", EngineRejected),
    (422, "Template error: undefined value", "template_error", EngineRejected),
    (422, "Tool error: Grammar and tools are mutually exclusive", "tool_error", EngineRejected),
    (424, "Request failed during generation: Server error: CUDA out of memory", "generation", EngineError),
    (500, "Incomplete generation", "incomplete_generation", EngineError),
    (503, "unhealthy", "healthcheck", EngineUnavailable),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "message", "kind", "expected"), TGI_FAILURES, ids=[row[1] for row in TGI_FAILURES])
async def test_a_failure_of_tgi_is_the_same_error_in_json_and_as_first_event(status, message, kind, expected, stream):
    pieces, error = await failure(Refuse(status, message, kind), stream=stream)
    assert type(error) is expected
    assert pieces == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_with_a_status_before_a_stream_is_typed_too(stream):
    refuse = Refuse(422, "Template error: undefined value", "template_error", in_stream=False)
    _, error = await failure(refuse, stream=stream)
    assert type(error) is EngineRejected
    assert "Template error: undefined value" in error.message


BODIES = [
    (401, b"", "", EngineUnavailable),
    (401, b'{"error":{"message":"Unknown model or key","type":"invalid_request_error"}}', "application/json",
     EngineUnavailable),
    (403, b'{"error":"nope"}', "application/json", EngineUnavailable),
    (404, b"", "", EngineUnavailable),
    (405, b"", "", EngineUnavailable),
    (307, b"", "", EngineUnavailable),
    (413, b"length limit exceeded", "text/plain", PayloadTooLarge),
    (413, b'{"error":"Input validation error: the body exceeds 2000000 bytes","error_type":"validation"}',
     "application/json", PayloadTooLarge),
    (415, b"Expected request with `Content-Type: application/json`", "text/plain", EngineRejected),
    (422, b"Failed to deserialize the JSON body into the target type: stop: invalid type", "text/plain",
     EngineRejected),
    (400, b"Failed to parse the request body as JSON", "text/plain", EngineRejected),
    # vLLM, SGLang, llama.cpp, transformers serve.
    (404, b'{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","code":404}}',
     "application/json", ModelNotFound),
    (404, b'{"error":"model: \'x\' is not served; known: none","error_type":"model_not_found"}', "application/json",
     ModelNotFound),
    (400, b'{"error":{"message":"This model\'s maximum context length is 4096 tokens.","type":"BadRequestError"}}',
     "application/json", ContextTooLong),
    (400, b'{"error":{"code":400,"message":"the request exceeds it","type":"exceed_context_size_error"}}',
     "application/json", ContextTooLong),
    (400, b'{"object":"error","message":"temperature must be non-negative","type":"BadRequestError","code":400}',
     "application/json", EngineRejected),
    (503, b'{"object":"error","message":"The request queue is full.","type":"ServiceUnavailable","code":503}',
     "application/json", Overloaded),
    (503, b'{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}', "application/json",
     EngineUnavailable),
    (501, b'{"error":{"code":501,"message":"no grammar","type":"not_supported_error"}}', "application/json",
     EngineRejected),
    (422, b'{"detail":[{"loc":["body","x"],"msg":"extra"}]}', "application/json", EngineRejected),
    (429, b"slow down", "text/plain", Overloaded),
    (424, b"", "", EngineError),
    (500, b"<html><body>oops</body></html>", "text/html", EngineError),
    (502, b"<html>bad gateway</html>", "text/html", EngineUnavailable),
    (503, b"", "", EngineUnavailable),
    (504, b"", "", EngineTimeout),
    (418, b"", "", EngineRejected),
    (599, b"", "", EngineError),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "body", "content_type", "expected"), BODIES, ids=map(str, range(len(BODIES))))
async def test_a_status_with_any_body_is_a_typed_error(status, body, content_type, expected, stream):
    reply = Reply(body, status=status, content_type=content_type, framing="length")
    pieces, error = await failure(reply, stream=stream)
    assert type(error) is expected
    assert pieces == []
    assert "<" not in error.message


def test_every_status_and_type_of_the_table_is_an_error_of_the_tree():
    tree = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ServiceError)}
    table = {*failures.STATUSES.values(), *failures.TYPES.values(), *(error for _, error in failures.WORDS)}
    assert table <= tree
    engines_own = {EngineError, EngineRejected, EngineUnavailable, EngineTimeout}
    assert engines_own | {Overloaded, ContextTooLong, ModelNotFound, PayloadTooLarge} == table


@pytest.mark.parametrize("status", range(300, 600))
def test_any_status_has_an_error_that_is_never_the_callers_authentication(status):
    error = failures.refusal(status, "")
    assert isinstance(error, ServiceError)
    assert error.status not in (401, 403)
    assert error.message


@pytest.mark.parametrize("kind", wire.WireError.__subclasses__())
def test_every_failure_of_the_wire_has_an_error(kind):
    for has_begun in (False, True):
        error = failures.broken(kind("x"), has_begun=has_begun)
        assert type(error) is not ServiceError
        assert isinstance(error.__cause__, kind)


async def test_a_refused_key_is_not_the_callers_problem():
    async with FakeTGI(api_key="right") as tgi:
        engine = TGIEngine(tgi.url, token="wrong")
        _, error = await answer(engine, stream=False)
        await engine.aclose()
    assert type(error) is EngineUnavailable
    assert "token" in error.message


async def test_what_the_caller_can_mend_is_quoted_and_the_rest_is_not():
    _, rejected = await failure(Refuse.too_long())
    assert rejected.message.endswith(TOO_LONG)
    _, failed = await failure(Refuse.failed())
    assert "CUDA" not in failed.message
    assert "CUDA" in str(failed.__cause__)


async def test_the_engines_retry_after_is_passed_on():
    reply = Reply(b"full", status=429, content_type="text/plain", headers={"Retry-After": "7"}, framing="length")
    _, error = await failure(reply)
    assert error.retry_after_seconds == 7.0


@pytest.mark.parametrize(("given", "seconds"), [("inf", 3600), ("1e400", 3600), ("99999999999", 3600), ("nan", 0)])
async def test_no_engine_sends_callers_away_for_ever(given, seconds):
    reply = Reply(b"full", status=429, content_type="text/plain", headers={"Retry-After": given}, framing="length")
    _, error = await failure(reply)
    assert error.retry_after_seconds == seconds


DEEP = b"[" * 3_000 + b"]" * 3_000


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b'{"choices":[{"message":{"content":"x","tool_calls":' + DEEP + b"}}]}", content_type="application/json"),
        Reply(
            b'data: {"choices":[{"delta":{"content":"x","tool_calls":' + DEEP + b"}}]}\n\n",
            content_type="text/event-stream",
        ),
        Reply(b'{"error":' + DEEP + b"}", content_type="application/json"),
    ],
    ids=["whole", "event", "error"],
)
async def test_an_answer_that_is_nested_too_deeply_is_garbage(reply):
    pieces, error = await failure(reply, stream=reply.content_type.startswith("text"))
    assert (pieces, type(error)) == ([], EngineGarbage)


async def test_what_an_engine_says_of_itself_may_be_nested_too_deeply():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        tgi.get = lambda path: (200, "application/json", b'{"x":' + DEEP + b"}")
        with pytest.raises(EngineUnavailable):
            await engine.describe()
        await engine.aclose()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_that_is_deep_or_long_is_a_refusal(stream):
    for body in (
        b'{"error":' + DEEP + b"}",
        b'{"error":"Input validation error: ' + b"x" * 1_000_000 + b'"}',
    ):
        reply = Reply(body, status=422, content_type="application/json", framing="length")
        pieces, error = await failure(reply, stream=stream)
        assert (pieces, type(error)) == ([], EngineRejected)
        assert len(error.message) < 600


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_is_down_is_unavailable(stream):
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
    _, error = await answer(engine, stream=stream)
    assert type(error) is EngineUnavailable
    await engine.aclose()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_closed_without_a_byte_is_unavailable(stream):
    pieces, error = await failure(Drop(), stream=stream)
    assert (pieces, type(error)) == ([], EngineUnavailable)


async def test_a_stream_cut_before_its_first_token_is_unavailable():
    pieces, error = await failure(Tokens("a", "b", cut_after=0), stream=True)
    assert (pieces, type(error)) == ([], EngineUnavailable)


async def test_a_stream_cut_after_its_first_token_is_interrupted():
    pieces, error = await failure(Tokens("a", "b", "c", cut_after=2), stream=True)
    assert "".join(piece.text for piece in pieces) == "ab"
    assert type(error) is EngineInterrupted


async def test_a_stream_that_ends_properly_but_too_soon_is_interrupted():
    event = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    pieces, error = await failure(Reply(event, content_type="text/event-stream"), stream=True)
    assert [piece.text for piece in pieces] == ["a"]
    assert type(error) is EngineInterrupted


async def test_an_error_event_in_mid_stream_interrupts_after_what_came_before():
    gate = asyncio.Event()
    async with FakeTGI(Tokens("a", "b", "c", fail_after=2, gates={1: gate})) as tgi:
        engine = TGIEngine(tgi.url)
        batches = engine.generate(generation(stream=True))
        first = await anext(batches)
        gate.set()
        second = await anext(batches)
        with pytest.raises(EngineInterrupted) as caught:
            await anext(batches)
        await engine.aclose()
    assert [piece.text for piece in [*first, *second]] == ["a", "b"]
    assert isinstance(caught.value.__cause__, EngineError)


async def test_a_json_answer_cut_short_is_unavailable():
    reply = Reply(b'{"choices":[', framing="chunked", cut=True)
    pieces, error = await failure(reply)
    assert (pieces, type(error)) == ([], EngineUnavailable)


GARBAGE = [
    (b"<html><body>It works!</body></html>", "text/html"),
    (b"not json", "application/json"),
    (b"[]", "application/json"),
    (b"{}", "application/json"),
    (b'{"choices":[]}', "application/json"),
    (b'{"choices":[{"index":0}]}', "application/json"),
    (b'{"choices":[{"index":0,"message":{"content":{"a":1}}}]}', "application/json"),
    (b'{"choices":[{"index":0,"message":{"tool_calls":["x"]}}]}', "application/json"),
    (b"\xff\xfe\x00", "application/json"),
    (b'{"choices":[{"index":0,"message":{"content":"\xff\xfe"}}]}', "application/json"),
    (b"", "application/json"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "content_type"), GARBAGE, ids=map(str, range(len(GARBAGE))))
async def test_a_body_that_is_no_answer_is_garbage(body, content_type, stream):
    pieces, error = await failure(Reply(body, content_type=content_type, framing="length"), stream=stream)
    assert (pieces, type(error)) == ([], EngineGarbage)


GARBAGE_STREAMS = [
    b"data: not json\n\n",
    b"data: {}\n\n",
    b'data: {"hello":"world"}\n\n',
    b"data: <html>\n\n",
    b'data: {"choices":"many"}\n\n',
    b"<html><body>It works!</body></html>\n",
    b"data: " + b"x" * 1_100_000,
]


@pytest.mark.parametrize("body", GARBAGE_STREAMS, ids=map(str, range(len(GARBAGE_STREAMS))))
async def test_a_stream_of_something_else_is_garbage(body):
    pieces, error = await failure(Reply(body, content_type="text/event-stream"), stream=True)
    assert (pieces, type(error)) == ([], EngineGarbage)


@pytest.mark.parametrize("raw", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000])
async def test_a_server_that_does_not_speak_http_is_garbage(raw):
    pieces, error = await failure(Reply(raw, b"", framing="raw", gates={1: asyncio.Event()}))
    assert (pieces, type(error)) == ([], EngineGarbage)


async def test_an_answer_in_json_to_a_streamed_request_is_taken():
    body = {"choices": [{"index": 0, "message": {"content": "whole"}, "finish_reason": "stop"}]}
    pieces, error = await failure(Reply(json.dumps(body).encode(), framing="length"), stream=True)
    assert error is None
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("whole", "stop")]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_silent_engine_times_out(stream):
    pieces, error = await failure(Hang(), stream=stream, timeouts=SHORT)
    assert (pieces, type(error)) == ([], EngineTimeout)


async def test_silence_between_tokens_times_out():
    pieces, error = await failure(Tokens("a", "b", hang_after=1), stream=True, timeouts=SHORT)
    assert [piece.text for piece in pieces] == ["a"]
    assert type(error) is EngineTimeout


async def test_keep_alive_comments_do_not_hide_a_hung_engine():
    gates = {i: asyncio.Event() for i in range(1, 40)}
    loop = asyncio.get_running_loop()
    for i, gate in gates.items():
        loop.call_later(0.05 * i, gate.set)
    begun = loop.time()
    reply = Reply(*([b":\n\n"] * 40), content_type="text/event-stream", gates=gates)
    _, error = await failure(reply, stream=True, timeouts=SHORT)
    assert type(error) is EngineTimeout
    assert loop.time() - begun < 1.5


async def test_a_consumer_that_takes_its_time_is_not_the_engines_fault():
    gate = asyncio.Event()
    async with FakeTGI(Tokens("a", "b", gates={1: gate})) as tgi:
        engine = TGIEngine(tgi.url, timeouts=SHORT)
        texts = []
        async for batch in engine.generate(generation(stream=True)):
            texts += [piece.text for piece in batch]
            await asyncio.sleep(0.3)
            gate.set()
        await engine.aclose()
    assert "".join(texts) == "ab"


async def test_too_many_callers_are_told_to_come_back():
    hold = asyncio.Event()
    async with FakeTGI(default=Tokens("a", gate=hold)) as tgi:
        engine = TGIEngine(tgi.url, max_connections=1, timeouts=Timeouts(pool_seconds=0.1))
        first = asyncio.create_task(answer(engine, stream=False))
        await tgi.until(lambda: len(tgi.requests) == 1)
        _, error = await answer(engine, stream=False)
        hold.set()
        _, no_error = await first
        await engine.aclose()
    assert (type(error), error.retry_after_seconds, no_error) == (Overloaded, 1.0, None)


async def test_an_unhealthy_or_absent_engine_is_not_healthy_and_does_not_raise():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url, timeouts=SHORT)
        assert await engine.healthy()
        tgi.is_healthy = False
        assert not await engine.healthy()
    assert not await engine.healthy()
    with pytest.raises(EngineUnavailable):
        await engine.describe()
    await engine.aclose()
