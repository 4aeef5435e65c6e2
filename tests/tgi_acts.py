"""What the stand-in TGI can be told to do with one generation."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from tests.tgi_frames import completion, sse_chunk, tail


@dataclass
class Act:
    """What one generation does. `gate` is awaited before anything is sent, `gates[i]` before the i-th token."""

    gate: asyncio.Event | None = field(default=None, kw_only=True)
    gates: dict[int, asyncio.Event] = field(default_factory=dict, kw_only=True)


class Tokens(Act):
    """Answer with these tokens. `cut_after`: drop the connection after so many; `hang_after`: go silent instead;
    `fail_after`: send `failure` as an error event instead."""

    def __init__(
        self,
        *tokens: str,
        finish: str = "stop",
        prompt_tokens: int = 11,
        cut_after: int | None = None,
        hang_after: int | None = None,
        fail_after: int | None = None,
        failure: str = "Request failed during generation: Server error: CUDA out of memory",
        gate: asyncio.Event | None = None,
        gates: dict[int, asyncio.Event] | None = None,
        delay_seconds: float = 0.0,
    ) -> None:
        super().__init__(gate=gate, gates=gates or {})
        self.tokens = tokens
        self.finish = finish
        self.prompt_tokens = prompt_tokens
        self.cut_after = cut_after
        self.hang_after = hang_after
        self.fail_after = fail_after
        self.failure = failure
        self.delay_seconds = delay_seconds
        self._built: dict[tuple[str, bool, bool], Any] = {}

    def usage(self) -> dict[str, int]:
        completion = len(self.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def json_body(self, model: str) -> bytes:
        key = (model, False, False)
        if key not in self._built:
            message = {"role": "assistant", "content": "".join(self.tokens)}
            self._built[key] = completion(model, message, self.finish, self.usage())
        return self._built[key]

    def events(self, model: str, *, usage: bool) -> list[bytes]:
        key = (model, True, usage)
        if key not in self._built:
            last = len(self.tokens) - 1
            events = [
                sse_chunk(model, {"role": "assistant", "content": token}, self.finish if i == last else None)
                for i, token in enumerate(self.tokens)
            ]
            self._built[key] = events + tail(model, self.usage() if usage else None)
        return self._built[key]


class ToolCall(Act):
    """Call one tool, its arguments streamed in two pieces; like TGI's, the stream has no finish reason."""

    def __init__(self, name: str, arguments: dict[str, Any], *, gate: asyncio.Event | None = None) -> None:
        super().__init__(gate=gate)
        self.name = name
        self.arguments = json.dumps(arguments, separators=(",", ":"))

    def json_body(self, model: str) -> bytes:
        call = {"id": "0", "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        usage = {"prompt_tokens": 11, "completion_tokens": 9, "total_tokens": 20}
        return completion(model, {"role": "assistant", "tool_calls": [call]}, "stop", usage)

    def events(self, model: str, *, usage: bool) -> list[bytes]:
        pieces = [(self.name, self.arguments[:1]), (None, self.arguments[1:])]
        events = []
        for name, arguments in pieces:
            function = {"name": name, "arguments": arguments}
            call = {"index": 0, "id": "1", "type": "function", "function": function}
            events.append(sse_chunk(model, {"role": "assistant", "tool_calls": [call]}, None))
        counts = {"prompt_tokens": 11, "completion_tokens": 9, "total_tokens": 20}
        return events + tail(model, counts if usage else None)


class Refuse(Act):
    """Fail as TGI does: a status for a JSON call, an error event under status 200 for a stream.

    `in_stream=False` gives streams the status too, as errors found before scheduling do.
    """

    def __init__(
        self, status: int, message: str, kind: str, *, in_stream: bool = True, gate: asyncio.Event | None = None
    ) -> None:
        super().__init__(gate=gate)
        self.status, self.message, self.kind, self.in_stream = status, message, kind, in_stream

    @classmethod
    def overloaded(cls) -> "Refuse":
        return cls(429, "Model is overloaded", "overloaded")

    @classmethod
    def too_long(cls, limit: int = 2048, given: int = 3000) -> "Refuse":
        return cls(
            422,
            f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {limit}. "
            f"Given: {given} `inputs` tokens and 100 `max_new_tokens`",
            "validation",
        )

    @classmethod
    def failed(cls) -> "Refuse":
        return cls(424, "Request failed during generation: Server error: CUDA out of memory", "generation")


class Reply(Act):
    """Send exactly this response; `chunks` are written one by one, and `cut` drops the connection at the end."""

    def __init__(
        self,
        *chunks: bytes,
        status: int = 200,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
        framing: str = "chunked",
        cut: bool = False,
        gate: asyncio.Event | None = None,
        gates: dict[int, asyncio.Event] | None = None,
    ) -> None:
        """`framing`: chunked, length, close (ends with the connection) or raw (the chunks are all there is)."""
        super().__init__(gate=gate, gates=gates or {})
        self.chunks, self.status, self.content_type = chunks, status, content_type
        self.headers, self.framing, self.cut = headers or {}, framing, cut


class Hang(Act):
    """Accept and never answer."""


class Drop(Act):
    """Close the connection without a byte."""
