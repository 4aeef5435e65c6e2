"""What a caller gets, and what is on record, when the engine or the caller goes away or talks nonsense."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.trace import SpanKind

from app.engines import EngineInfo
from app.engines.tgi import TGIEngine, Timeouts
from app.messages import Generation, Piece
from retrieval.documents import Scope, SearchMode, SearchResult
from tests.fake_tgi import Act, Drop, FakeTGI, Hang, Refuse, Reply, Tokens
from tests.service import CHAT, Api, Service, live_gateway, live_service, until
from tests.tgi_frames import sse_chunk

QUESTION = "What is a release?"
INVALID = Refuse(422, "Input validation error: `stop` supports up to 4 stop sequences", "validation")


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Service]]:
    async with FakeTGI() as tgi:
        directory = tmp_path_factory.mktemp("failures")
        async with live_service(directory, engine_url=tgi.url, tenants=60) as service:
            yield tgi, service


@pytest.fixture
def tgi(everyone) -> FakeTGI:
    tgi, _ = everyone
    tgi.acts.clear()
    tgi.requests.clear()
    tgi.cancelled = 0
    return tgi


@pytest.fixture
async def api(everyone) -> AsyncIterator[Api]:
    async with everyone[1].tenant() as api:
        yield api


@asynccontextmanager
async def counting(api: Api) -> AsyncIterator[Counter[tuple[str, str]]]:
    """Fill the counter, at the end of the block, with the chat requests the service counted meanwhile."""
    before = await api.counts()
    counted: Counter[tuple[str, str]] = Counter()
    yield counted
    counted.update(await api.counts() - before)


@dataclass
class Case:
    """A way an engine fails before its first token."""

    act: Callable[[], Act]
    status: int
    code: str
    retry_after: bool = False


def _garbage(*chunks: bytes, content_type: str = "text/event-stream", framing: str = "chunked") -> Callable[[], Act]:
    return lambda: Reply(*chunks, content_type=content_type, framing=framing)


EITHER = {
    "overloaded": Case(Refuse.overloaded, 429, "overloaded", retry_after=True),
    "failed while generating": Case(Refuse.failed, 502, "engine_error"),
    "refused as invalid": Case(lambda: INVALID, 400, "engine_rejected"),
    "too long": Case(Refuse.too_long, 400, "context_length_exceeded"),
    "gone without a byte": Case(Drop, 503, "engine_unavailable", retry_after=True),
    "a web page": Case(_garbage(b"<html>welcome</html>", content_type="text/html"), 502, "engine_garbage"),
    "not HTTP": Case(_garbage(b"SSH-2.0-OpenSSH_9.6\r\n", framing="raw"), 502, "engine_garbage"),
    "an endless head": Case(_garbage(b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000, framing="raw"), 502, "engine_garbage"),
}
WHOLE = {
    "not JSON": Case(_garbage(b"I am fine", content_type="application/json"), 502, "engine_garbage"),
    "another JSON": Case(_garbage(b'{"answer": 42}', content_type="application/json"), 502, "engine_garbage"),
    "nothing": Case(_garbage(b"", content_type="application/json"), 502, "engine_garbage"),
}
STREAMED = {
    "overloaded, in the head": Case(
        lambda: Refuse(429, "Model is overloaded", "overloaded", in_stream=False), 429, "overloaded", retry_after=True
    ),
    "events that are no JSON": Case(_garbage(b"data: I am fine\n\n"), 502, "engine_garbage"),
    "an absurd line": Case(_garbage(b"data: " + b"a" * 2_000_000), 502, "engine_garbage"),
    "lines that are no events": Case(_garbage(b"one\ntwo\nthree\n\n"), 502, "engine_garbage"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", EITHER.values(), ids=EITHER)
async def test_an_engine_that_fails_before_its_first_token_gives_a_status_and_one_record(api, tgi, case, stream):
    await _fails_with_its_status(api, tgi, case, stream=stream)


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
async def test_a_whole_answer_that_is_none_is_garbage(api, tgi, case):
    await _fails_with_its_status(api, tgi, case, stream=False)


@pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED)
async def test_a_stream_that_never_begins_keeps_its_status(api, tgi, case):
    await _fails_with_its_status(api, tgi, case, stream=True)


async def _fails_with_its_status(api: Api, tgi: FakeTGI, case: Case, *, stream: bool) -> None:
    # A connection that was kept from the test before may be tried first: the engine then acts twice.
    tgi.script(case.act())
    tgi.default = lambda body: case.act()
    async with counting(api) as counted:
        response = await api.ask(QUESTION, stream=stream)
    tgi.default = Tokens("Hello")
    assert response.status_code == case.status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["code"] == case.code
    assert "[DONE]" not in response.text
    assert ("retry-after" in response.headers) == case.retry_after
    record = await api.record()
    assert (record["outcome"], record["error_code"]) == ("failed", case.code)
    assert record["id"] == error["request_id"] == response.headers["x-request-id"]
    assert record["stream"] is stream
    assert record["finish_reason"] is None
    assert counted == {(str(case.status), "failed"): 1}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_engine_that_is_not_there_is_a_503_that_says_when_to_retry(tmp_path, stream):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound and not listening: connections are refused.
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with live_gateway(tmp_path, engine_url=url) as live:
            response = await live.api.ask(QUESTION, stream=stream)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
            assert int(response.headers["retry-after"]) >= 1
            (record,) = await live.records()
            assert (record.outcome, record.error_code) == ("failed", "engine_unavailable")
            assert live.counts == {("503", "failed"): 1}


GOOD = sse_chunk("org/base", {"role": "assistant", "content": "Hello"}, None)
BROKEN_OFF = {
    "cut": (lambda **gates: Tokens("Hello", " world", ".", cut_after=1, **gates), "engine_interrupted"),
    "failed": (lambda **gates: Tokens("Hello", " world", ".", fail_after=1, **gates), "engine_interrupted"),
    "ended early": (
        lambda **gates: Reply(GOOD, b": bye\n\n", content_type="text/event-stream", **gates),
        "engine_interrupted",
    ),
    "garbage": (
        lambda **gates: Reply(GOOD, b"data: {\n\n", content_type="text/event-stream", **gates),
        "engine_garbage",
    ),
    "absurd": (
        lambda **gates: Reply(GOOD, b"data: " + b"a" * 2_000_000, content_type="text/event-stream", **gates),
        "engine_garbage",
    ),
}


@pytest.mark.parametrize(("act", "code"), BROKEN_OFF.values(), ids=BROKEN_OFF)
async def test_a_stream_that_breaks_off_ends_in_one_typed_error_event(api, tgi, act, code):
    gate = asyncio.Event()
    tgi.script(act(gates={1: gate}))
    async with counting(api) as counted:
        async with api.streaming(QUESTION) as (stream, events):
            async for _ in events:
                gate.set()
        record = await api.record()
    assert stream.response.status_code == 200
    assert stream.text == "Hello"
    assert not stream.done
    assert stream.error is not None
    assert stream.error["code"] == code
    assert (record["outcome"], record["error_code"], record["answer"]) == ("failed", code, "Hello")
    assert record["id"] == stream.error["request_id"] == stream.response.headers["x-prediction-id"]
    assert counted == {("200", "failed"): 1}


async def test_a_whole_answer_that_breaks_off_is_an_error_and_not_half_an_answer(api, tgi):
    body = Tokens("Hello", " world").json_body("org/base")
    tgi.script(Reply(body[:40], framing="chunked", cut=True))
    response = await api.ask(QUESTION)
    assert response.status_code in (502, 503)
    assert "Hello" not in response.text
    record = await api.record()
    assert (record["outcome"], record["error_code"]) == ("failed", response.json()["error"]["code"])


async def _silent(tmp_path, act: Act, *, stream: bool, timeout_seconds: float = 60.0) -> tuple[Any, Any, Any]:
    async with FakeTGI(act) as tgi:
        engine = TGIEngine(
            tgi.url,
            timeouts=Timeouts(first_token_seconds=0.3, between_tokens_seconds=0.3, answer_seconds=0.3)
            if timeout_seconds == 60.0
            else Timeouts(),
        )
        async with live_gateway(tmp_path, engine_url=tgi.url, engine=engine, timeout_seconds=timeout_seconds) as live:
            answered = await (live.api.stream(QUESTION) if stream else live.api.ask(QUESTION))
            await tgi.until(lambda: tgi.cancelled == 1)
            assert live.gateway.admission.in_flight == 0
            (record,) = await live.records()
            counts = live.counts
        await engine.aclose()
    return answered, record, counts


@pytest.mark.parametrize("timeout_seconds", [60.0, 0.3], ids=["engine", "request"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_silent_engine_is_a_504_and_its_work_is_cancelled(tmp_path, stream, timeout_seconds):
    act = Hang() if stream else Tokens("late", gate=asyncio.Event())
    answered, record, counts = await _silent(tmp_path, act, stream=stream, timeout_seconds=timeout_seconds)
    response = answered.response if stream else answered
    assert response.status_code == 504
    assert json.loads(response.content)["error"]["code"] == "engine_timeout"
    assert (record.outcome, record.error_code) == ("failed", "engine_timeout")
    assert counts == {("504", "failed"): 1}


@pytest.mark.parametrize("timeout_seconds", [60.0, 0.5], ids=["engine", "request"])
async def test_an_engine_that_falls_silent_in_a_stream_ends_it_with_a_typed_event(tmp_path, timeout_seconds):
    act = Tokens("Hello", " world", ".", hang_after=2)
    stream, record, counts = await _silent(tmp_path, act, stream=True, timeout_seconds=timeout_seconds)
    assert (stream.text, stream.done, stream.error["code"]) == ("Hello world", False, "engine_timeout")
    assert (record.outcome, record.error_code, record.answer) == ("failed", "engine_timeout", "Hello world")
    assert counts == {("200", "failed"): 1}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_caller_that_leaves_before_the_first_token_cancels_the_engine(api, tgi, stream):
    tgi.script(Hang())
    async with counting(api) as counted:
        asking = asyncio.create_task(api.ask(QUESTION, stream=stream))
        await tgi.until(lambda: len(tgi.bodies) == 1)
        asking.cancel()
        await tgi.until(lambda: tgi.cancelled == 1)
        record = await api.record()
    assert (record["outcome"], record["error_code"]) == ("cancelled", "client_left")
    assert counted == {("499", "cancelled"): 1}


async def test_a_caller_that_leaves_a_stream_in_the_middle_cancels_the_engine(api, tgi):
    tgi.script(Tokens("Hello", " world", ".", hang_after=2))
    async with counting(api) as counted:
        async with api.streaming(QUESTION) as (stream, events):
            async for _ in events:
                if stream.text == "Hello world":
                    break
        await tgi.until(lambda: tgi.cancelled == 1)
        record = await api.record()
    assert (record["outcome"], record["error_code"]) == ("cancelled", "client_left")
    assert record["answer"] == "Hello world"
    assert record["id"] == stream.response.headers["x-prediction-id"]
    assert counted == {("200", "cancelled"): 1}


async def test_a_caller_that_leaves_while_sending_its_question_leaves_no_record(api, tgi):
    host, port = api.client.base_url.host, api.client.base_url.port
    before = await api.counts()
    async with counting(api) as counted:
        _, writer = await asyncio.open_connection(host, port)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {api.key}\r\ncontent-length: 900\r\n\r\n{{"
        writer.write(head.encode())
        await writer.drain()
        writer.close()

        async def is_counted() -> bool:
            return await api.counts() != before

        await until(is_counted)
    assert counted == {("400", "failed"): 1}
    assert await api.records(0) == []
    assert tgi.bodies == []


async def test_a_caller_that_stops_reading_is_given_up_at_the_limit_and_its_connection_cut(tmp_path):
    async with (
        FakeTGI(Tokens(*["word " * 20_000] * 200)) as tgi,
        live_gateway(tmp_path, engine_url=tgi.url, timeout_seconds=0.5, keep_alive_seconds=1) as live,
    ):
        base = live.api.client.base_url
        reader, writer = await asyncio.open_connection(base.host, base.port, limit=1024)

        async def is_counted() -> bool:
            return live.counts == {("200", "failed"): 1}

        try:
            body = json.dumps(live.api.body(QUESTION, stream=True))
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {live.api.key}\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            (record,) = await live.records()
            assert (record.outcome, record.error_code) == ("failed", "engine_timeout")
            await tgi.until(lambda: tgi.open_connections == 0)
            assert live.gateway.admission.in_flight == 0
            await until(is_counted)
        finally:
            writer.transport.abort()


async def test_many_callers_that_leave_at_once_leave_one_cancelled_record_each(api, tgi):
    tgi.default = lambda body: Tokens("Hello", hang_after=0 if body.get("stream") else None, gate=asyncio.Event())
    asking = [asyncio.create_task(api.ask(QUESTION, stream=i % 2 == 0)) for i in range(40)]
    await tgi.until(lambda: len(tgi.bodies) == 40)
    for task in asking:
        task.cancel()
    await tgi.until(lambda: tgi.cancelled == 40)
    records = await api.records(40)
    assert {record["outcome"] for record in records} == {"cancelled"}
    tgi.default = Tokens("Hello")


async def test_the_next_caller_is_served_after_every_kind_of_failure(api, tgi):
    for act in (Refuse.failed(), Hang(), Tokens("Hello", "!", cut_after=1)):
        tgi.script(act)
        asking = asyncio.create_task(api.ask(QUESTION, stream=True))
        await tgi.until(lambda: not tgi.acts)
        if isinstance(act, Hang):
            asking.cancel()
        await asyncio.wait([asking])
    assert (await api.answer(QUESTION))["choices"][0]["message"]["content"]
    assert Counter(record["outcome"] for record in await api.records(4)) == {"failed": 2, "cancelled": 1, "finished": 1}


class SearchThatHangs:
    """A search that never comes back, and says when it was asked."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def search(
        self, scope: Scope, query: str, *, top_k: int = 5, mode: SearchMode = "hybrid", **_: Any
    ) -> SearchResult:
        self.asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def similarity(self, text: str, texts: list[str]) -> list[float]:
        raise AssertionError


async def test_a_caller_that_leaves_during_the_search_is_on_record_and_no_engine_is_asked(tmp_path):
    search = SearchThatHangs()
    async with FakeTGI() as tgi, live_gateway(tmp_path, engine_url=tgi.url, search=search) as live:
        asking = asyncio.create_task(live.api.ask(QUESTION))
        await search.asked.wait()
        asking.cancel()

        (record,) = await live.records()
        assert (record.outcome, record.error_code) == ("cancelled", "client_left")
        assert tgi.bodies == []
        assert live.gateway.admission.in_flight == 0
        assert sorted(span.name for span in live.spans) == ["POST /v1/chat/completions", "retrieval hallmark"]


async def test_every_ending_closes_its_trace_once_and_names_what_went_wrong(tmp_path):
    async with FakeTGI() as tgi, live_gateway(tmp_path, engine_url=tgi.url) as live:
        tgi.script(
            Tokens("Hello", "."), Tokens("Hello", "."), Tokens("Hello", ".", cut_after=1), Refuse.failed(), Hang()
        )
        await live.api.answer(QUESTION)
        assert (await live.api.stream(QUESTION)).done
        assert not (await live.api.stream(QUESTION)).done
        assert (await live.api.ask(QUESTION)).status_code == 502
        asking = asyncio.create_task(live.api.ask(QUESTION))
        await tgi.until(lambda: len(tgi.bodies) == 5)
        asking.cancel()
        await tgi.until(lambda: tgi.cancelled == 1)

        async def all_closed() -> bool:
            return live.counts.total() == 5

        await until(all_closed)
        records = {record.trace_id: record for record in await live.records(5)}
        assert len(records) == 5
        ended = Counter(
            (f"{span.context.trace_id:032x}", span.kind.name)
            for span in live.spans
            if span.context and span.kind is not SpanKind.INTERNAL
        )
        assert ended == {(trace, kind): 1 for trace in records for kind in ("SERVER", "CLIENT")}
        errors = {
            f"{span.context.trace_id:032x}": (span.attributes or {}).get("error.type")
            for span in live.spans
            if span.context and span.kind.name == "SERVER"
        }
        assert Counter((records[trace].outcome, error) for trace, error in errors.items()) == {
            ("finished", None): 2,
            ("failed", "engine_interrupted"): 1,
            ("failed", "engine_error"): 1,
            ("cancelled", "incomplete_response"): 1,
        }


class OddEngine:
    """An engine adapter that breaks its promises."""

    is_up = True

    def __init__(self, *, raises: Exception | None = None) -> None:
        self.raises = raises

    async def generate(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        yield [Piece(text="Hello")]
        if self.raises is not None:
            raise self.raises

    async def describe(self) -> EngineInfo:
        raise AssertionError

    async def count_tokens(self, text: str) -> int:
        raise AssertionError

    async def healthy(self) -> bool:
        raise AssertionError

    async def wait_until_up(self) -> bool:
        return False

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_without_an_end_is_none_whatever_the_adapter_says(tmp_path, stream):
    async with live_gateway(tmp_path, engine_url="", engine=OddEngine()) as live:
        answered = await (live.api.stream(QUESTION) if stream else live.api.ask(QUESTION))
        error = answered.error if stream else answered.json()["error"]
        assert error["code"] == "engine_interrupted"
        (record,) = await live.records()
        assert (record.outcome, record.error_code, record.answer) == ("failed", "engine_interrupted", "Hello")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_defect_of_ours_is_a_500_that_tells_nothing_of_the_inside(tmp_path, stream):
    engine = OddEngine(raises=ZeroDivisionError("the secret of the inside"))
    async with live_gateway(tmp_path, engine_url="", engine=engine) as live:
        answered = await (live.api.stream(QUESTION) if stream else live.api.ask(QUESTION))
        response = answered.response if stream else answered
        error = answered.error if stream else answered.json()["error"]
        assert (response.status_code, error["code"]) == (200 if stream else 500, "internal_error")
        assert "inside" not in str(error)
        (record,) = await live.records()
        assert (record.outcome, record.error_code) == ("failed", "internal_error")
        assert error["request_id"] == record.id
        assert live.counts == {("200" if stream else "500", "failed"): 1}
        assert live.gateway.admission.in_flight == 0
