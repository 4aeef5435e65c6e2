"""Every recorded answer of a real TGI server, replayed to the adapter over loopback."""

import json
from pathlib import Path

import pytest

from app.engines.answers import StreamReader, read_answer
from app.engines.tgi import TGIEngine
from app.messages import Generation, Message, Piece, Usage
from tests.fake_tgi import FakeTGI, Reply

DATA = Path(__file__).parents[4] / "shared" / "data" / "conf_tgi" / "integration-tests" / "models" / "__snapshots__"
RECORDINGS = {path.stem: json.loads(path.read_text()) for path in sorted(DATA.glob("*/*.json"))}

pytestmark = pytest.mark.skipif(not RECORDINGS, reason=f"the recordings of real TGI servers are not at {DATA}")

FINISH = {"eos_token": "stop", "stop_sequence": "stop", "": None}


def as_stream(chunks):
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]


def expected(recording, index=0):
    """Text, finish reason, usage and tool call, read off a recording the slow and obvious way."""
    chunks = recording if isinstance(recording, list) else [recording]
    text, name, arguments, finish, usage = "", "", "", None, None
    for chunk in chunks:
        if not chunk["choices"] or index in [choice["index"] for choice in chunk["choices"]]:
            usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            text += said["content"] or ""
            for call in said.get("tool_calls") or []:
                name += call["function"]["name"] or ""
                arguments += call["function"]["arguments"]
            finish = choice["finish_reason"] or finish
    finish = FINISH.get(finish, finish) or "stop"
    return text, "tool_calls" if name else finish, usage, (name, arguments)


def observed(pieces: list[Piece]):
    usage = pieces[-1].usage
    calls = [call["function"] for piece in pieces for call in piece.tool_calls or ()]
    return (
        "".join(piece.text for piece in pieces),
        pieces[-1].finish_reason,
        None if usage is None else (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens),
        ("".join(call.get("name", "") for call in calls), "".join(call.get("arguments", "") for call in calls)),
    )


def counts(usage):
    return usage and (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])


def kind_of(recording):
    if isinstance(recording, dict) and "generated_text" in recording:
        return "native"
    first = recording[0] if isinstance(recording, list) and recording else recording
    return "completion" if first and first["object"] == "text_completion" else "chat"


CHATS = [name for name, recording in RECORDINGS.items() if kind_of(recording) == "chat"]
COMPLETIONS = [name for name, recording in RECORDINGS.items() if kind_of(recording) == "completion"]
NATIVE = [name for name, recording in RECORDINGS.items() if kind_of(recording) == "native"]


def test_no_recording_is_left_out():
    assert len(RECORDINGS) == 25
    assert (len(CHATS), len(COMPLETIONS), len(NATIVE)) == (21, 3, 1)


@pytest.mark.parametrize("name", CHATS)
async def test_a_recorded_chat_is_read_as_it_was_answered(name):
    recording = RECORDINGS[name]
    stream = isinstance(recording, list)
    if stream:
        reply = Reply(*as_stream(recording), content_type="text/event-stream")
    else:
        reply = Reply(json.dumps(recording).encode(), framing="length")
    async with FakeTGI(reply) as tgi:
        engine = TGIEngine(tgi.url)
        generation = Generation([Message("user", "as recorded")], stream=stream)
        pieces = [piece async for batch in engine.generate(generation) for piece in batch]
        await engine.aclose()
    text, finish, usage, call = expected(recording)
    assert observed(pieces) == (text, finish, counts(usage), call)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


@pytest.mark.parametrize("name", COMPLETIONS)
def test_each_prompt_of_a_recorded_completion_is_read_as_it_was_answered(name):
    recording = RECORDINGS[name]
    chunks = recording if isinstance(recording, list) else [recording]
    for index in sorted({choice["index"] for chunk in chunks for choice in chunk["choices"]}):
        if isinstance(recording, list):
            reader = StreamReader(choice=index)
            pieces = [piece for event in as_stream(recording) for piece in reader.feed(event)] + reader.end()
        else:
            pieces = [read_answer(json.dumps(recording).encode(), choice=index)]
        text, finish, usage, call = expected(recording, index)
        assert text
        assert observed(pieces) == (text, finish, counts(usage), call)


@pytest.mark.parametrize("name", NATIVE)
def test_a_recorded_native_answer_is_read_as_it_was_answered(name):
    recording = RECORDINGS[name]
    piece = read_answer(json.dumps(recording).encode())
    details = recording["details"]
    assert piece.text == recording["generated_text"]
    assert (piece.finish_reason, details["finish_reason"]) == ("stop", "eos_token")
    prompt, completion = len(details["prefill"]), details["generated_tokens"]
    assert piece.usage == Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def test_tool_call_arguments_of_the_recordings_are_json():
    called = [expected(RECORDINGS[name])[3] for name in CHATS]
    arguments = [arguments for name, arguments in called if name]
    assert len(arguments) == 5
    assert all(json.loads(given)["location"] for given in arguments)
