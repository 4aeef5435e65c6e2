"""Reads engines' answers: bytes in, `Piece`s out, whichever of the servers' habits they follow.

Chat, completion and native answers share one permissive shape, decoded in part by msgspec (half a microsecond an
event). The main rule: nothing is relied on that some server leaves out (a role, a finish reason, `[DONE]`, a space
after `data:`), and nothing passes that is not an answer.
"""

from collections.abc import Sequence
from operator import methodcaller
from typing import Any

import msgspec

from app.engines.failures import refusal
from app.engines.stops import StopCutter
from app.engines.toolcalls import ToolCalls
from app.errors import EngineError, EngineGarbage, EngineInterrupted, EngineUnavailable, ServiceError
from app.messages import FinishReason, Message, Piece, Usage, about_tokens

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises of bytes that are no JSON, not of the type, or nested too deeply."""

_MAX_EVENT_BYTES = 1024 * 1024

_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}
_ABORTED = ("abort", "error")
_OTHER_LINES = (b":", b"event:", b"id:", b"retry:")
_FIELDS = (b"data:", *_OTHER_LINES)
_is_data = methodcaller("startswith", b"data:")


class _Said(msgspec.Struct, gc=False):
    """A `message` or a `delta`."""

    content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: _Said | None = None
    message: _Said | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class _Counts(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None


class _Details(msgspec.Struct, gc=False):
    """The native route's account of a generation."""

    finish_reason: str = "stop"
    generated_tokens: int = 0
    prefill: list[Any] = []


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Counts | None = None
    error: Any = None
    object: Any = None
    generated_text: str | None = None
    details: _Details | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


class _Refusal(msgspec.Struct):
    """The fields of every server's error bodies, flat or nested; their types vary."""

    error: Any = None
    error_type: Any = None
    message: Any = None
    type: Any = None
    detail: Any = None


class StreamReader:
    """Reads one streamed answer: `feed` it what arrives, then ask `end` for the last piece.

    `choice` is the index read; `stops` are cut from the text, for engines that leave them in; `messages` are what is
    answered, whose tokens are guessed where the cut comes before the engine's count. `is_done` tells
    that nothing more is needed from the engine; `is_over` that the engine itself said so; `has_progressed` that the
    last bytes held an event and not only a keep-alive comment.
    """

    def __init__(self, *, stops: Sequence[str] = (), choice: int = 0, messages: Sequence[Message] = ()) -> None:
        self.is_done = False
        self.is_over = False
        self.has_begun = False
        self.has_progressed = False
        self.failure: ServiceError | None = None
        self._has_events = False
        self._has_noise = False
        self._choice = choice
        self._cutter = StopCutter(stops) if stops else None
        self._messages = messages
        self._texts = 0
        self._rest = b""
        self._data: bytes | None = None
        self._finish: str | None = None
        self._usage: Usage | None = None
        self._has_tool_calls = False
        self._tool_calls = ToolCalls()

    @property
    def is_finished(self) -> bool:
        """Whether the finish reason is known: what may follow is the usage and the end mark."""
        return self._finish is not None

    def take(self, chunk: bytes) -> list[Piece]:
        """Return what the next bytes add, with the last pieces when they end the answer; no bytes are its end.

        Raises what `feed` and `end` raise.
        """
        if not chunk:
            return self.end()
        pieces = self.feed(chunk)
        if self.is_done:
            pieces += self.end()
        return pieces

    def feed(self, chunk: bytes) -> list[Piece]:
        """Return what the events completed by these bytes add.

        Raises what an error event stands for, if nothing was returned before; else it is kept in `failure`, for
        after these pieces.
        """
        pieces: list[Piece] = []
        events = self._split(chunk)
        self.has_progressed = bool(events)
        try:
            for data in events:
                if data == b"[DONE]":
                    self.is_done = self.is_over = True
                    break
                piece = self._read(data)
                if piece is not None:
                    pieces.append(piece)
                if self.is_done:
                    break
        except ServiceError as error:
            if not self.has_begun:
                raise
            self.failure = error
        if pieces:
            self.has_begun = True
        return pieces

    def end(self) -> list[Piece]:
        """Return the last pieces once the stream has ended.

        Raises EngineInterrupted when it ended too soon, or EngineUnavailable when that was before the first piece.
        """
        pieces: list[Piece] = []
        has_begun = self.has_begun
        if any(field.startswith(self._rest) for field in _FIELDS):
            self._rest = b""
        if not self.is_done and (self._rest or self._data):
            try:
                pieces = self.feed(b"\n\n")
            except EngineGarbage:
                self._has_events = True
            # What cannot be read is half an event: the stream was cut in the middle of it.
            self.failure = None
        if not self.is_done and self._finish is None:
            raise self._too_soon(has_begun=has_begun)
        self.is_done = True
        text = self._cutter.flush() if self._cutter else ""
        if self._has_tool_calls and self._finish in (None, "stop", "eos_token"):
            finish: FinishReason = "tool_calls"
        else:
            finish = _FINISH_REASONS.get(self._finish or "stop", "stop")
        pieces.append(Piece(text=text, finish_reason=finish, usage=self._usage))
        return pieces

    def _too_soon(self, *, has_begun: bool) -> ServiceError:
        if has_begun:
            return EngineInterrupted("the engine's answer broke off")
        if self._has_noise and not self._has_events:
            return EngineGarbage("the engine's stream holds no events")
        return EngineUnavailable("the engine's answer broke off before it began")

    def _split(self, chunk: bytes) -> list[bytes]:
        """Return the `data` of the server-sent events that these bytes complete."""
        events: list[bytes] = []
        data = self._rest + chunk if self._rest else chunk
        *blocks, rest = data.split(b"\n\n")
        if self._data is None and data.count(b"\n") == 2 * len(blocks) and all(map(_is_data, blocks)):
            events = [block[5:].strip() for block in blocks]  # As all servers write nearly all of their events.
        else:
            for block in blocks:
                self._read_lines(block.split(b"\n"), events)
                self._read_lines((b"",), events)
        # What may end by other marks is taken by the line.
        *lines, self._rest = rest.split(b"\n")
        self._read_lines(lines, events)
        if len(self._rest) > _MAX_EVENT_BYTES or (self._data is not None and len(self._data) > _MAX_EVENT_BYTES):
            raise EngineGarbage("the engine sent an event without an end")
        return events

    def _read_lines(self, lines: Sequence[bytes], events: list[bytes]) -> None:
        for line in lines:
            if line.startswith(b"data:"):
                value = line[5:].strip()
                self._data = value if self._data is None else self._data + b"\n" + value
            elif self._data is not None and (not line or line == b"\r"):
                events.append(self._data)
                self._data = None
            elif not line.startswith(_OTHER_LINES) and line.strip():
                self._has_noise = True

    def _read(self, data: bytes) -> Piece | None:
        try:
            event = _decode_event(data)
        except UNREADABLE as error:
            raise EngineGarbage("the engine sent an event that is not the protocol's JSON") from error
        self._has_events = True
        if event.error is not None or (event.choices is None and event.usage is None):
            raise self._failure(event, data)
        for choice in event.choices or ():
            if choice.index == self._choice:
                break
        else:
            choice = None
        if event.usage is not None and (choice is not None or not event.choices):
            # Usage beside another choice is that choice's own.
            self._usage = _usage(event.usage)
        if choice is None:
            return None
        if self._cutter is None and choice.finish_reason is None and choice.logprobs is None:
            said = choice.delta
            if said is not None and said.tool_calls is None:  # As nearly always: a token's text and no more.
                return Piece(said.content) if said.content else None
        return self._take(choice)

    def _take(self, choice: _Choice) -> Piece | None:
        said = choice.delta
        text = (said.content if said is not None else choice.text) or ""
        calls = None
        if said is not None and said.tool_calls:
            calls = self._tool_calls.read(said.tool_calls)
            self._has_tool_calls = True
        if choice.finish_reason:
            self._end_with(choice.finish_reason)
        if self._cutter is not None:
            text = self._cut(text, finished=bool(choice.finish_reason))
        if not text and calls is None and choice.logprobs is None:
            return None
        return Piece(text=text, tool_calls=calls, logprobs=choice.logprobs)

    def _cut(self, text: str, *, finished: bool) -> str:
        assert self._cutter is not None
        self._texts += bool(text)
        if self._cutter.is_cut:
            # The text goes on behind a stop: the engine, which looks at token ends only, missed it.
            self.is_done = bool(text) and not finished
            if self.is_done and self._usage is None:  # Which the engine tells at its own end, and is not waited for.
                prompt = about_tokens(self._messages)
                self._usage = Usage(
                    prompt_tokens=prompt, completion_tokens=self._texts, total_tokens=prompt + self._texts
                )
            self._finish = "stop_sequence"
            return ""
        text = self._cutter.feed(text)
        if self._cutter.is_cut:
            self._finish = "stop_sequence"
        return text

    def _end_with(self, reason: str) -> None:
        if reason in _ABORTED:
            raise (
                EngineInterrupted("the engine aborted the answer")
                if self.has_begun
                else EngineError("the engine aborted the answer")
            )
        self._finish = reason

    def _failure(self, event: _Event, data: bytes) -> ServiceError:
        if event.error is None and event.object != "error":
            return EngineGarbage("the engine sent an event that is neither an answer nor an error")
        error = read_refusal(200, data)
        if not self.has_begun:
            return error
        interrupted = EngineInterrupted("the engine failed in the middle of the answer")
        interrupted.__cause__ = error
        return interrupted


def read_answer(body: bytes, *, stops: Sequence[str] = (), choice: int = 0) -> Piece:
    """Read a whole JSON answer into its one piece; raises what an error in place of an answer stands for."""
    try:
        event = _decode_event(body)
    except UNREADABLE as error:
        raise EngineGarbage("the engine's answer is not the protocol's JSON") from error
    if event.generated_text is not None:
        return _native(event, event.generated_text, stops)
    for found in event.choices or ():
        if found.index == choice:
            break
    else:
        if event.error is not None or event.object == "error":
            raise read_refusal(200, body)
        raise EngineGarbage("the engine's answer holds no choice")
    said = found.message
    if said is None and found.text is None:
        raise EngineGarbage("the engine's answer holds no message")
    calls = ToolCalls().read(said.tool_calls) if said is not None and said.tool_calls else None
    text, reason = _cut_whole((said.content if said is not None else found.text) or "", found.finish_reason, stops)
    if reason in _ABORTED:
        raise EngineError("the engine aborted the answer")
    finish = "tool_calls" if calls and reason in (None, "stop", "eos_token") else reason
    return Piece(
        text=text,
        tool_calls=calls,
        logprobs=found.logprobs,
        finish_reason=_FINISH_REASONS.get(finish or "stop", "stop"),
        usage=_usage(event.usage) if event.usage is not None else None,
    )


def read_refusal(status: int, body: bytes, *, retry_after: str = "") -> ServiceError:
    """Return the error that an error body (flat, nested, plain text or empty) stands for.

    With status 200 the body is an error event, whose own code counts, except for TGI's, which is always 422.
    """
    try:
        read = msgspec.json.decode(body, type=_Refusal)
    except UNREADABLE:
        text = body.decode("utf-8", "replace").strip()
        return refusal(status, "" if text.startswith("<") else text, retry_after=retry_after)
    nested = read.error if isinstance(read.error, dict) else {}
    message = nested.get("message") or (read.error if isinstance(read.error, str) else None) or read.message
    kind = nested.get("type") or read.error_type or read.type
    if status == 200:
        code = nested.get("code")
        status = code if isinstance(code, int) and not isinstance(code, bool) else 500
    return refusal(status, str(message or read.detail or ""), str(kind or ""), retry_after)


def _cut_whole(text: str, reason: str | None, stops: Sequence[str]) -> tuple[str, str | None]:
    if stops:
        cutter = StopCutter(stops)
        text = cutter.feed(text) + cutter.flush()
        if cutter.is_cut:
            return text, "stop_sequence"
    return text, reason


def _native(event: _Event, text: str, stops: Sequence[str]) -> Piece:
    details = event.details
    text, reason = _cut_whole(text, details.finish_reason if details else "stop", stops)
    usage = None
    if details is not None:
        prompt, completion = len(details.prefill), details.generated_tokens
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
    return Piece(text=text, finish_reason=_FINISH_REASONS.get(reason or "stop", "stop"), usage=usage)


def _usage(counts: _Counts) -> Usage:
    prompt, completion = counts.prompt_tokens or 0, counts.completion_tokens or 0
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=counts.total_tokens or prompt + completion
    )
