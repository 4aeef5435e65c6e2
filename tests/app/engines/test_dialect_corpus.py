"""One corpus of requests, put to a stand-in of every server: the caller can tell none from another.

This is what moving from TGI to one of its successors without changing a client rests on. The stand-ins are made from
descriptions of the servers; no real one was asked.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from app.engines.dialects import DIALECTS
from app.engines.load import Load, read_load
from app.engines.tgi import TGIEngine
from app.errors import (
    ContextTooLong,
    EngineError,
    EngineInterrupted,
    EngineRejected,
    EngineUnavailable,
    ModelNotFound,
    Overloaded,
    ServiceError,
)
from app.messages import Generation, Message, Piece, Sampling, Usage
from tests.fake_successors import FakeSuccessor, Trouble
from tests.fake_tgi import Act, FakeTGI, Tokens, ToolCall

TGIS = ("tgi", "embedded")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HELLO = [Message("user", "Hello")]


@asynccontextmanager
async def stand_in(
    dialect: str, *acts: Act, adapters: tuple[str, ...] = ()
) -> AsyncIterator[tuple[FakeTGI, TGIEngine]]:
    """A server of this dialect, and our engine in front of it."""
    if dialect in TGIS:
        scripted = [act.for_tgi if isinstance(act, Trouble) else act for act in acts]
        server: FakeTGI = FakeTGI(*scripted, adapters=adapters, lists_adapters=dialect == "embedded")
    else:
        server = FakeSuccessor(dialect, *acts, adapters=adapters)
    async with server:
        engine = TGIEngine(server.url, dialect=dialect, adapters=adapters if dialect == "tgi" else ())
        yield server, engine
        await engine.aclose()


@dataclass
class Case:
    """A request, what the engine does, and what the caller gets."""

    generation: Generation
    act: Act
    text: str = ""
    finish: str = "stop"
    call: tuple[str, str] | None = None
    usage: Usage = field(default_factory=lambda: Usage(11, 3, 14))


THREE = Tokens("Hello", " world", ".")
CORPUS = {
    "chat": Case(Generation(HELLO), THREE, "Hello world."),
    "conversation": Case(
        Generation([Message("system", "Be brief."), *HELLO, Message("assistant", "Hi"), Message("user", "And?")]),
        THREE,
        "Hello world.",
    ),
    "developer": Case(Generation([Message("developer", "Be brief."), *HELLO]), THREE, "Hello world."),
    "parts": Case(Generation([Message("user", [{"type": "text", "text": "Hello"}])]), THREE, "Hello world."),
    "length": Case(
        Generation(HELLO, sampling=Sampling(max_tokens=3)), Tokens("a", "b", "c", finish="length"), "abc", "length"
    ),
    "greedy": Case(Generation(HELLO, sampling=Sampling(temperature=0.0, top_p=0.0)), THREE, "Hello world."),
    "sampled": Case(
        Generation(HELLO, sampling=Sampling(temperature=0.7, top_p=1.0, frequency_penalty=0.5, presence_penalty=0.0)),
        THREE,
        "Hello world.",
    ),
    "seed": Case(Generation(HELLO, sampling=Sampling(seed=-7)), THREE, "Hello world."),
    "stop": Case(Generation(HELLO, sampling=Sampling(stop=("END", "\n\n"))), THREE, "Hello world."),
    "tool": Case(
        Generation(HELLO, tools=[TOOL], tool_choice="auto"),
        ToolCall("weather", {"city": "Turin"}),
        finish="tool_calls",
        call=("weather", '{"city":"Turin"}'),
        usage=Usage(11, 9, 20),
    ),
    "tool's result": Case(
        Generation(
            [
                *HELLO,
                Message("assistant", None, tool_calls=[CALL]),
                Message("tool", "4", tool_call_id="1"),
            ]
        ),
        THREE,
        "Hello world.",
    ),
    "schema": Case(Generation(HELLO, response_format=FORMAT), Tokens('{"city":', '"Turin"', "}"), '{"city":"Turin"}'),
    "labels": Case(Generation(HELLO, labels=("re (fund)", "other")), Tokens("re (", "fund", ")"), "re (fund)"),
    "task's schema": Case(Generation(HELLO, schema=SCHEMA), Tokens('{"city":', '"Turin"', "}"), '{"city":"Turin"}'),
    "text format": Case(Generation(HELLO, response_format={"type": "text"}), THREE, "Hello world."),
}  # fmt: skip


def streamed(generation: Generation, stream: bool) -> Generation:
    fields = {name: getattr(generation, name) for name in generation.__struct_fields__}
    return Generation(**{**fields, "stream": stream})


async def pieces_of(engine: TGIEngine, generation: Generation) -> list[Piece]:
    return [piece async for batch in engine.generate(generation) for piece in batch]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CORPUS.values(), ids=CORPUS)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_answer_is_the_same_from_every_server(dialect, case, stream):
    async with stand_in(dialect, case.act) as (_, engine):
        pieces = await pieces_of(engine, streamed(case.generation, stream))
    assert "".join(piece.text for piece in pieces) == case.text
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [case.finish]
    assert pieces[-1].usage == case.usage
    functions = [call["function"] for piece in pieces for call in piece.tool_calls or ()]
    if case.call is None:
        assert functions == []
    else:
        said = "".join(each.get("name") or "" for each in functions), "".join(each["arguments"] for each in functions)
        assert said == case.call


HELD = {
    "tgi": {"response_format": {"type": "regex", "value": '(re \\(fund\\)|a\\.b "c")'}},
    "embedded": {"structured_outputs": {"choice": ["re (fund)", 'a.b "c"']}},
    "vllm": {"structured_outputs": {"choice": ["re (fund)", 'a.b "c"']}},
    "sglang": {"regex": '(re \\(fund\\)|a\\.b "c")'},
    "llamacpp": {"grammar": 'root ::= "re (fund)" | "a.b \\"c\\""'},
    "openai": {},
}


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_each_server_is_held_to_labels_and_schemas_in_its_own_way(dialect):
    async with stand_in(dialect) as (server, engine):
        await pieces_of(engine, Generation(HELLO))
        plain = server.bodies[-1]
        await pieces_of(engine, Generation(HELLO, labels=("re (fund)", 'a.b "c"')))
        assert server.bodies[-1] == plain | HELD[dialect]
        await pieces_of(engine, Generation(HELLO, schema=SCHEMA, response_format={"type": "json_object"}))
        told = server.bodies[-1].get("response_format")
        if dialect == "embedded":
            assert server.bodies[-1] == plain
        else:
            assert (told["value"] if dialect == "tgi" else told["json_schema"]["schema"]) == SCHEMA


TROUBLES: dict[str, type[ServiceError]] = {
    "too_long": ContextTooLong,
    "overloaded": Overloaded,
    "invalid": EngineRejected,
    "loading": EngineUnavailable,
    "failed": EngineError,
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("meaning", "error"), TROUBLES.items(), ids=TROUBLES)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_failure_means_the_same_from_every_server(dialect, meaning, error, stream):
    async with stand_in(dialect, Trouble(meaning)) as (_, engine):
        with pytest.raises(ServiceError) as caught:
            await anext(engine.generate(streamed(Generation(HELLO), stream)))
    assert type(caught.value) is error
    assert caught.value.retryable is (meaning not in ("too_long", "invalid"))


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_that_fails_in_the_middle_is_interrupted_whoever_sends_it(dialect):
    gate = asyncio.Event()
    async with stand_in(dialect, Trouble("broken", gate=gate)) as (_, engine):
        batches = engine.generate(streamed(Generation(HELLO), True))
        while not (said := "".join(piece.text for piece in await anext(batches))):
            pass  # A role by itself.
        gate.set()
        with pytest.raises(EngineInterrupted):
            await anext(batches)
    assert said == "Hello"


NAMED = {"tgi": "legal", "embedded": "legal", "vllm": "legal", "sglang": "org/base:legal"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("dialect", "name"), NAMED.items(), ids=NAMED)
async def test_an_adapter_is_chosen_in_the_server_s_own_way(dialect, name, stream):
    async with stand_in(dialect, adapters=("legal",)) as (server, engine):
        await pieces_of(engine, streamed(Generation(HELLO, adapter="legal"), stream))
        assert server.bodies[-1]["model"] == name
        assert (await engine.describe()).adapters == ("legal",)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_adapter_that_is_not_there_is_never_answered_for_by_the_base_model(dialect):
    async with stand_in(dialect) as (server, engine):
        is_loaded_later = DIALECTS[dialect].load_path is not None
        with pytest.raises(EngineUnavailable if is_loaded_later else ModelNotFound):
            await pieces_of(engine, Generation(HELLO, adapter="legal"))
        assert server.bodies == []


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_health_is_asked_where_each_server_says_it(dialect):
    async with stand_in(dialect) as (server, engine):
        assert await engine.healthy()
        server.is_healthy = False
        assert not await engine.healthy()
        with pytest.raises(EngineUnavailable):
            await engine.check()


@pytest.mark.parametrize("dialect", [name for name, dialect in DIALECTS.items() if dialect.waiting_metric])
async def test_load_is_read_from_each_server_s_metrics(dialect):
    async with stand_in(dialect) as (server, engine):
        assert await engine.load() == Load(0, 0)
        server.batch_size, server.queue_size = 7, 12
        assert await engine.load() == Load(running=7, waiting=12)


async def test_a_server_without_metrics_says_nothing_of_its_load():
    async with stand_in("openai") as (server, engine):
        assert await engine.load() is None
        assert server.requests == []
    async with stand_in("llamacpp") as (server, engine):
        server.wire.gauges, gauges = None, server.wire.gauges  # type: ignore[attr-defined]
        try:
            assert await engine.load() is None
        finally:
            server.wire.gauges = gauges  # type: ignore[attr-defined]


PAGE = b"""# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="a } b"} 3.0
vllm:num_requests_waiting{engine="1",model_name="a } b"} 1.5e1 1700000000
vllm:num_requests_waiting_by_reason{reason="x"} 50
vllm:num_requests_running NaN
"""


def test_gauges_are_summed_over_their_labels_and_names_are_whole():
    assert read_load(PAGE, running="vllm:num_requests_running", waiting="vllm:num_requests_waiting") == Load(0, 18)
    assert read_load(b"", running="a", waiting="b") == Load(0, 0)
    assert read_load(b'a{x="\n 5\n', running="a", waiting="b") == Load(0, 0)


@pytest.mark.parametrize("value", ["1e", "-", "+Inf", "1.2.3", "e5", "1e999", "NaN", "5x", "-3", "9" * 400])
def test_a_gauge_that_shows_no_number_counts_for_nothing(value):
    assert read_load(f"a {value}\nb 2.5e1\n".encode(), running="a", waiting="b") == Load(0, 25)


ABOUT: dict[str, dict[str, Any]] = {
    "tgi": {"model_id": "org/base", "max_total_tokens": 2048, "version": "3.3.6-dev0"},
    "embedded": {"model_id": "org/base", "max_total_tokens": 2048},
    "vllm": {"model_id": "org/base", "max_total_tokens": 2048, "version": "0.33.0"},
    "sglang": {"model_id": "org/base", "max_total_tokens": 2048},
    "llamacpp": {"model_id": "org/base", "max_total_tokens": 2048, "version": "b9999-0"},
    "openai": {"model_id": "org/base", "max_total_tokens": 2048},
}


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_model_and_limits_are_learned_from_every_server(dialect):
    async with stand_in(dialect) as (_, engine):
        info = await engine.describe()
    assert {name: getattr(info, name) for name in ABOUT[dialect]} == ABOUT[dialect]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_tokens_are_counted_or_estimated_high(dialect):
    async with stand_in(dialect) as (_, engine):
        assert await engine.count_tokens("three little words") == (7 if dialect == "openai" else 3)
