"""The reader of streams: how the bytes and the text are dealt out never changes the answer."""

import contextlib
import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.engines.answers import StreamReader, read_answer
from app.engines.stops import StopCutter
from app.errors import EngineGarbage, EngineInterrupted, ServiceError

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def body_of(tokens, finish, *, newline=b"\n", space=b" ", comments=()):
    """The server-sent events of an answer, in one server's way of writing them."""
    events = [
        {"choices": [{"index": 0, "delta": {"content": token}, "finish_reason": finish if last else None}]}
        for token, last in zip(tokens, [False] * (len(tokens) - 1) + [True], strict=True)
    ]
    datas = [json.dumps(event, ensure_ascii=False).encode() for event in [*events, {"choices": [], "usage": USAGE}]]
    body = b""
    for i, data in enumerate([*datas, b"[DONE]"]):
        if i in comments:
            body += b":" + newline * 2
        body += b"data:" + space + data + newline * 2
    return body


def read(body, cuts=(), stops=()):
    reader = StreamReader(stops=stops)
    pieces, edges = [], [0, *sorted(cuts), len(body)]
    for start, end in itertools.pairwise(edges):
        if not reader.is_done:
            pieces += reader.feed(body[start:end])
    return [*pieces, *reader.end()]


def gist(pieces):
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason, pieces[-1].usage


tokens_of = st.lists(st.text(max_size=6), min_size=1, max_size=12)


@given(
    tokens=tokens_of,
    finish=st.sampled_from(["stop", "length"]),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    space=st.sampled_from([b" ", b""]),
    comments=st.sets(st.integers(0, 12), max_size=3),
    data=st.data(),
)
def test_any_cutting_of_the_bytes_gives_the_same_answer(tokens, finish, newline, space, comments, data):
    body = body_of(tokens, finish, newline=newline, space=space, comments=comments)
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=20))
    text, reason, usage = gist(read(body, cuts))
    assert (text, reason) == ("".join(tokens), finish)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 3, 8)


def test_cutting_between_all_bytes_gives_the_same_pieces():
    body = body_of(["Grüße", " 🙂", "", "!"], "stop", newline=b"\r\n")
    assert read(body, range(1, len(body))) == read(body)


@example(tokens=["", "0", ""], cut_at=167)
@given(tokens=tokens_of, cut_at=st.integers(0, 2000))
def test_a_stream_cut_anywhere_is_never_taken_for_a_finished_one(tokens, cut_at):
    body = body_of(tokens, "stop")
    reader = StreamReader()
    handed_out = bool(reader.feed(body[: min(cut_at, body.index(b'"finish_reason": "stop"'))]))
    with pytest.raises(Exception, match="broke off") as caught:
        reader.end()
    assert isinstance(caught.value, EngineInterrupted) == handed_out


def cut_slowly(text, stops):
    """Character by character: the first stop sequence to be complete ends the text before it."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


few = st.text("ab\n", min_size=1, max_size=3)


@given(parts=st.lists(st.text("ab\n", max_size=5), max_size=8), stops=st.lists(few, min_size=1, max_size=4))
def test_a_stop_sequence_ends_the_text_however_it_is_dealt_out(parts, stops):
    cutter = StopCutter(stops)
    text = "".join(cutter.feed(part) for part in parts)
    text += cutter.flush()
    assert (text, cutter.is_cut) == cut_slowly("".join(parts), stops)


@given(parts=st.lists(st.text("ab\n", max_size=5), max_size=8), stops=st.lists(few, min_size=1, max_size=4))
def test_nothing_is_held_back_that_cannot_begin_a_stop_sequence(parts, stops):
    cutter = StopCutter(stops)
    passed = "".join(cutter.feed(part) for part in parts)
    if not cutter.is_cut:
        held = "".join(parts)[len(passed) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@given(tokens=tokens_of, stops=st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_stop_sequence_cuts_streams_and_json_answers_alike(tokens, stops):
    text, is_cut = cut_slowly("".join(tokens), stops)
    finish = "stop" if is_cut else "length"
    assert gist(read(body_of(tokens, "length"), stops=stops))[:2] == (text, finish)
    answer = {"choices": [{"index": 0, "message": {"content": "".join(tokens)}, "finish_reason": "length"}]}
    piece = read_answer(json.dumps(answer).encode(), stops=stops)
    assert (piece.text, piece.finish_reason) == (text, finish)


@given(st.binary(max_size=200))
def test_random_bytes_are_garbage_or_too_short_and_never_a_crash(noise):
    with contextlib.suppress(ServiceError):
        reader = StreamReader()
        reader.feed(noise)
        reader.end()
    with pytest.raises(EngineGarbage):
        read_answer(noise)
