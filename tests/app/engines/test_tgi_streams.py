"""Streams: connections reused, nothing kept behind, the engine's work stopped when nobody listens."""

import asyncio
import contextlib
import gc
import re
import tracemalloc

import pytest
import uvloop

from app.engines.tgi import TGIEngine
from app.engines.toolcalls import ToolCalls
from app.errors import ContextTooLong, EngineError, EngineInterrupted, EngineUnavailable, Overloaded
from app.messages import Generation, Message, Sampling, Usage
from tests.fake_tgi import FakeTGI, Hang, Refuse, Reply, Tokens, ToolCall

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":%b}]}\n\n'
DONE = b"data: [DONE]\n\n"


def ask(*, stream=True, stop=(), **fields):
    return Generation([Message("user", "hello")], stream=stream, sampling=Sampling(stop=stop), **fields)


async def pieces_of(engine, generation):
    return [piece async for batch in engine.generate(generation) for piece in batch]


async def text_of(engine, generation):
    return "".join(piece.text for piece in await pieces_of(engine, generation))


async def test_ten_streams_use_one_connection():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        for _ in range(10):
            assert await text_of(engine, ask()) == "Hello world."
        assert tgi.connections == 1
        await engine.aclose()


async def test_a_stream_whose_last_bytes_come_late_keeps_its_connection():
    gate = asyncio.Event()
    late = Reply(EVENT % (b"a", b'"stop"'), DONE, b": bye\n\n", content_type="text/event-stream", gates={2: gate})
    async with FakeTGI(late) as tgi:
        engine = TGIEngine(tgi.url)
        batches = engine.generate(ask())
        await anext(batches)
        asyncio.get_running_loop().call_later(0.01, gate.set)
        assert [batch async for batch in batches] == []
        await text_of(engine, ask())
        assert tgi.connections == 1
        await engine.aclose()


async def test_a_stream_that_never_closes_after_done_costs_its_connection_only():
    never = Reply(EVENT % (b"a", b'"stop"'), DONE, b"", content_type="text/event-stream", gates={2: asyncio.Event()})
    async with FakeTGI(never) as tgi:
        engine = TGIEngine(tgi.url)
        assert await text_of(engine, ask()) == "a"
        await tgi.until(lambda: tgi.open_connections == 0)
        assert await text_of(engine, ask()) == "Hello world."
        await engine.aclose()


async def test_json_answers_errors_and_streams_share_one_connection():
    acts = (Tokens("a"), Refuse.overloaded(), Refuse.too_long(), ToolCall("f", {}), Tokens("b"))
    async with FakeTGI(*acts) as tgi:
        engine = TGIEngine(tgi.url)
        for stream in (False, False, True, True, True):
            with contextlib.suppress(Overloaded, ContextTooLong):
                await pieces_of(engine, ask(stream=stream))
        assert (tgi.connections, len(tgi.requests)) == (1, 5)
        await engine.aclose()


async def test_two_hundred_streams_leave_nothing_behind():
    async with FakeTGI(lean=True, default=Tokens("a", "b", "c")) as tgi:
        engine = TGIEngine(tgi.url)

        async def streams(count):
            for _ in range(count):
                await text_of(engine, ask())
            gc.collect()

        await streams(20)
        tracemalloc.start()
        await streams(20)
        before = tracemalloc.get_traced_memory()[0]
        await streams(200)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        await engine.aclose()
        assert tgi.connections == 1
    assert grown < 20_000


async def test_closing_the_generator_stops_the_engine_at_once():
    async with FakeTGI(Tokens("a", "b", "c", hang_after=1)) as tgi:
        engine = TGIEngine(tgi.url)
        batches = engine.generate(ask())
        assert [piece.text for piece in await anext(batches)] == ["a"]
        await batches.aclose()
        await tgi.until(lambda: tgi.cancelled == 1)
        await engine.aclose()


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_the_consumer_stops_the_engine_at_once(stream):
    async with FakeTGI(Hang()) as tgi:
        engine = TGIEngine(tgi.url)
        consumer = asyncio.create_task(pieces_of(engine, ask(stream=stream)))
        await tgi.until(lambda: len(tgi.requests) == 1)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        await tgi.until(lambda: tgi.cancelled == 1)
        await engine.aclose()


async def test_cancelled_streams_do_not_use_up_the_connections():
    async with FakeTGI(default=Tokens("a", "b", hang_after=1)) as tgi:
        engine = TGIEngine(tgi.url, max_connections=2)
        for _ in range(6):
            batches = engine.generate(ask())
            await anext(batches)
            await batches.aclose()
        tgi.default = Tokens("fine")
        assert await text_of(engine, ask()) == "fine"
        await engine.aclose()


async def test_a_generator_never_started_sends_nothing():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        await engine.generate(ask()).aclose()
        assert await text_of(engine, ask()) == "Hello world."
        assert len(tgi.requests) == 1
        await engine.aclose()


async def test_pieces_that_arrive_together_come_together_with_the_last():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        batches = [batch async for batch in engine.generate(ask())]
        await engine.aclose()
    assert [[piece.text for piece in batch] for batch in batches] == [["Hello", " world", ".", ""]]
    last = batches[0][-1]
    assert (last.finish_reason, last.usage.completion_tokens) == ("stop", 3)


async def test_a_token_is_handed_on_before_the_next_is_made():
    gates = {1: asyncio.Event(), 2: asyncio.Event()}
    async with FakeTGI(Tokens("a", "b", "c", gates=gates)) as tgi:
        engine = TGIEngine(tgi.url)
        batches = engine.generate(ask())
        for gate, text in ((None, "a"), (gates[1], "b"), (gates[2], "c")):
            if gate is not None:
                gate.set()
            assert (await anext(batches))[0].text == text
        await batches.aclose()
        await engine.aclose()


A = EVENT % (b"a", b'"stop"')
STREAMS = {
    "no role, no usage": (EVENT % (b"a", b"null") + EVENT % (b"b", b'"stop"') + DONE, "ab", "stop"),
    "no finish reason": (EVENT % (b"a", b"null") + DONE, "a", "stop"),
    "no end mark": (EVENT % (b"a", b'"length"'), "a", "length"),
    "no space, no last blank line": (A.replace(b": ", b":", 1) + b"data:[DONE]", "a", "stop"),
    "carriage returns": ((A + DONE).replace(b"\n", b"\r\n"), "a", "stop"),
    "comments and names": (b": hi\n\nevent: message\nid: 7\n" + A + b":\n\n" + DONE, "a", "stop"),
    "completions' end": (EVENT % (b"a", b'"eos_token"') + DONE, "a", "stop"),
    "a stop sequence's reason": (EVENT % (b"a", b'"stop_sequence"') + DONE, "a", "stop"),
    "a reason nobody knows": (EVENT % (b"a", b'"repetition"') + DONE, "a", "stop"),
    "filtered": (EVENT % (b"a", b'"content_filter"') + DONE, "a", "content_filter"),
    "empty": (DONE, "", "stop"),
    "one event over two lines": (A.replace(b',"delta"', b',\ndata: "delta"') + DONE, "a", "stop"),
    "a null error": (A.replace(b"{", b'{"error":null,', 1) + DONE, "a", "stop"),
    "another choice": (EVENT.replace(b":0", b":1") % (b"x", b'"length"') + A + DONE, "a", "stop"),
}


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
@pytest.mark.parametrize(("body", "text", "finish"), STREAMS.values(), ids=list(STREAMS))
async def test_a_servers_habits_do_not_change_the_answer(body, text, finish, framing):
    async with FakeTGI(Reply(body, content_type="text/event-stream; charset=utf-8", framing=framing)) as tgi:
        engine = TGIEngine(tgi.url)
        pieces = await pieces_of(engine, ask())
        await engine.aclose()
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == (text, finish)


@pytest.mark.parametrize("rest", [b"", b"da", b'data: {"choices":[],"usa'], ids=["nothing", "a field", "an event"])
@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_an_answer_cut_after_its_finish_reason_is_whole(rest, framing):
    gate = asyncio.Event()
    reply = Reply(A, rest, content_type="text/event-stream", framing=framing, cut=True, gates={1: gate})
    async with FakeTGI(reply) as tgi:
        engine = TGIEngine(tgi.url)
        batches = engine.generate(ask())
        pieces = await anext(batches)
        gate.set()
        pieces += [piece async for batch in batches for piece in batch]
        await engine.aclose()
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("a", None), ("", "stop")]


async def test_an_answer_aborted_before_its_first_piece_is_an_error():
    async with FakeTGI(Reply(EVENT % (b"", b'"abort"') + DONE, content_type="text/event-stream")) as tgi:
        engine = TGIEngine(tgi.url)
        with pytest.raises(EngineError, match="aborted"):
            await pieces_of(engine, ask())
        await engine.aclose()


async def test_an_answer_aborted_later_is_interrupted():
    gate = asyncio.Event()
    chunks = EVENT % (b"a", b"null"), EVENT % (b"", b'"abort"') + DONE
    async with FakeTGI(Reply(*chunks, content_type="text/event-stream", gates={1: gate})) as tgi:
        engine = TGIEngine(tgi.url)
        batches = engine.generate(ask())
        assert (await anext(batches))[0].text == "a"
        gate.set()
        with pytest.raises(EngineInterrupted, match="aborted"):
            await anext(batches)
        await engine.aclose()


async def test_tool_calls_stream_in_openais_shape():
    async with FakeTGI(ToolCall("weather", {"city": "Ulm"})) as tgi:
        engine = TGIEngine(tgi.url)
        pieces = await pieces_of(engine, ask())
        await engine.aclose()
    first, second = [piece.tool_calls[0] for piece in pieces if piece.tool_calls]
    assert re.fullmatch("call_[0-9a-f]{24}", first.pop("id"))
    assert first == {"index": 0, "type": "function", "function": {"name": "weather", "arguments": "{"}}
    assert second == {"index": 0, "function": {"arguments": '"city":"Ulm"}'}}
    assert pieces[-1].finish_reason == "tool_calls"


def test_each_call_of_a_stream_says_its_id_type_and_name_once():
    def delta(index, **fields):
        function = {"name": fields.pop("name", None), "arguments": "x"}
        return {"index": index, "type": "function", "function": function, **fields}

    calls = ToolCalls()
    read = [
        *calls.read([delta(0, id="call_a", name="f")]),
        *calls.read([delta(0, id="call_a", name="f"), delta(1, id="call_b", name=None)]),
        *calls.read([delta(1, id="call_b", name="g")]),
        *calls.read([delta(2, id="call_a", name="f")]),
    ]
    assert [call.get("id") for call in read[:4]] == ["call_a", None, "call_b", None]
    assert [call["function"].get("name") for call in read] == ["f", None, None, "g", "f"]
    assert [call.get("type") for call in read] == ["function", None, "function", None, "function"]
    assert [call["function"]["arguments"] for call in read] == ["x"] * 5
    # An id that another call of the answer has is none.
    assert read[4]["id"] not in ("call_a", "call_b")


@pytest.mark.parametrize("given", ["0", "1", "", None, 7])
def test_an_id_that_other_answers_have_too_is_replaced_by_a_unique_one(given):
    ids = {ToolCalls().read([{"id": given, "function": {"name": "f"}}])[0]["id"] for _ in range(20)}
    assert len(ids) == 20


async def test_tool_calls_of_tgi_2_are_read_too():
    event = (
        b'data: {"choices":[{"index":0,"delta":{"tool_calls":{"index":0,"id":"","type":"function",'
        b'"function":{"name":"f","arguments":{"a":1}}}}}]}\n\n'
    )
    async with FakeTGI(Reply(event + DONE, content_type="text/event-stream")) as tgi:
        engine = TGIEngine(tgi.url)
        pieces = await pieces_of(engine, ask())
        await engine.aclose()
    assert pieces[0].tool_calls[0]["function"] == {"name": "f", "arguments": '{"a":1}'}


async def test_logprobs_come_with_their_token_even_when_it_has_no_text():
    event = b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"logprobs":{"content":[{"token":"%b"}]}}]}\n\n'
    body = event % (b"", b"<s>") + event % (b"a", b"a") + DONE
    async with FakeTGI(Reply(body, content_type="text/event-stream")) as tgi:
        engine = TGIEngine(tgi.url)
        pieces = await pieces_of(engine, ask())
        await engine.aclose()
    assert [piece.logprobs["content"][0]["token"] for piece in pieces[:-1]] == ["<s>", "a"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_sequence_left_in_the_text_is_cut_off(stream):
    async with FakeTGI(Tokens("one", " EN", "D", finish="stop_sequence")) as tgi:
        engine = TGIEngine(tgi.url)
        pieces = await pieces_of(engine, ask(stream=stream, stop=(" END",)))
        await engine.aclose()
    assert "".join(piece.text for piece in pieces) == "one"
    assert (pieces[-1].finish_reason, pieces[-1].usage.completion_tokens) == ("stop", 3)


async def test_what_only_began_like_a_stop_sequence_is_given_back():
    async with FakeTGI(Tokens("one", " EN", finish="length")) as tgi:
        engine = TGIEngine(tgi.url)
        pieces = await pieces_of(engine, ask(stop=(" END",)))
        await engine.aclose()
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == ("one EN", "length")


async def test_a_stop_sequence_that_the_engine_missed_ends_the_answer_its_tokens_are_guessed_and_the_engine_stops():
    tokens = Tokens("one", ".\n\nTwo", " three", " four", hang_after=3)
    async with FakeTGI(tokens) as tgi:
        engine = TGIEngine(tgi.url)
        pieces = await pieces_of(engine, ask(stop=("\n\n",)))
        await tgi.until(lambda: tgi.cancelled == 1)
        await engine.aclose()
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == ("one.", "stop")
    assert pieces[-1].usage == Usage(prompt_tokens=2, completion_tokens=3, total_tokens=5)


async def test_an_engine_that_strips_stop_sequences_itself_is_left_alone():
    async with FakeTGI(Tokens("a\n", "\nb"), lists_adapters=True) as tgi:
        engine = TGIEngine(tgi.url, dialect="embedded")
        assert await text_of(engine, ask(stop=("\n\n",))) == "a\n\nb"
        await engine.aclose()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_kept_connection_that_the_engine_closed_is_replaced_unseen(stream):
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        await text_of(engine, ask(stream=stream))
        tgi.close_idle()
        assert await text_of(engine, ask(stream=stream)) == "Hello world."
        assert (tgi.connections, len(tgi.requests)) == (2, 2)
        await engine.aclose()


async def test_closing_the_engine_ends_answers_in_flight():
    async with FakeTGI(Tokens("a", "b", hang_after=1)) as tgi:
        engine = TGIEngine(tgi.url)
        batches = engine.generate(ask())
        await anext(batches)
        await engine.aclose()
        with pytest.raises(EngineInterrupted):
            await anext(batches)
        with pytest.raises(EngineUnavailable):
            await text_of(engine, ask())
        await tgi.until(lambda: tgi.open_connections == 0)


def test_it_works_on_uvloop():
    async def run():
        async with FakeTGI(Tokens("a", "b"), Tokens("a"), Tokens("a", hang_after=0)) as tgi:
            engine = TGIEngine(tgi.url)
            texts = [await text_of(engine, ask()), await text_of(engine, ask(stream=False))]
            consumer = asyncio.create_task(text_of(engine, ask()))
            await tgi.until(lambda: len(tgi.requests) == 3)
            consumer.cancel()
            await tgi.until(lambda: tgi.cancelled == 1)
            await engine.aclose()
            return texts, tgi.connections

    assert uvloop.run(run()) == (["ab", "a"], 1)
