"""Stand-ins for the servers that came after TGI, each in its own dialect: vLLM, SGLang, llama.cpp's server, OpenAI.

    async with FakeSuccessor("vllm", Tokens("Hello")) as engine: ...

Made from descriptions of these servers' wire formats, not from recordings: what they refuse, how they name models and
adapters, where they say how they are, and the shapes of answers, streams and errors. A `Trouble` is a failure by its
meaning, told in the dialect's own words.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from tests.fake_tgi import FakeTGI
from tests.tgi_acts import Act, Refuse, Reply, Tokens, ToolCall
from tests.tgi_frames import CREATED, dump, sse_event

SUCCESSORS = ("vllm", "sglang", "llamacpp", "openai")


class Trouble(Act):
    """A failure by its meaning: too_long, overloaded, invalid, loading, failed (before the first token) or broken.

    A broken answer fails after its first token, once `gate` is set.
    """

    def __init__(self, meaning: str, *, gate: asyncio.Event | None = None) -> None:
        super().__init__(gates={1: gate} if gate is not None else {})
        self.meaning = meaning

    @property
    def for_tgi(self) -> Act:
        """What TGI, and the embedded engine, do."""
        return {
            "too_long": Refuse.too_long(),
            "overloaded": Refuse.overloaded(),
            "invalid": Refuse(422, "Input validation error: grammar is not supported", "validation"),
            "loading": Refuse(503, "unhealthy", "healthcheck", in_stream=False),
            "failed": Refuse.failed(),
            "broken": Tokens("Hello", " world", fail_after=1, gates=self.gates),
        }[self.meaning]


@dataclass
class Wire:
    """What sets one server apart."""

    troubles: dict[str, tuple[int, str, str]]
    """Status, message and error type of each."""
    health_path: str
    adapter_separator: str | None
    """What stands between base and adapter in `model`; empty if the adapter stands alone."""
    gauges: tuple[str, str] | None
    fails_in_stream: tuple[str, ...] = ()
    """Troubles that a stream tells under status 200."""
    ends_with_done: bool = True
    done_after_error: bool = True


WIRES = {
    "vllm": Wire(
        {
            "too_long": (400, "This model's maximum context length is 2048 tokens.", "BadRequestError"),
            "overloaded": (503, "The request queue is full.", "ServiceUnavailableError"),
            "invalid": (400, "Invalid grammar specification.", "BadRequestError"),
            "loading": (503, "EngineCore encountered an issue: the engine process is dead.", "ServiceUnavailableError"),
            "failed": (500, "Internal server error", "InternalServerError"),
        },
        "/health", "", ("vllm:num_requests_running", "vllm:num_requests_waiting"),
        fails_in_stream=("failed",),
    ),
    "sglang": Wire(
        {
            "too_long": (400, "The input (3000) is longer than the model's context length.", "BadRequestError"),
            "overloaded": (503, "The request queue is full.", "ServiceUnavailable"),
            "invalid": (400, "Failed to parse the grammar.", "BadRequestError"),
            "loading": (503, "Server is starting: loading model", "ServiceUnavailable"),
            "failed": (500, "Internal server error", "InternalServerError"),
        },
        "/ready", ":", ("sglang:num_running_reqs", "sglang:num_queue_reqs"),
        fails_in_stream=("overloaded", "failed"),
    ),
    "llamacpp": Wire(
        {
            "too_long": (400, "the request exceeds the available context size", "exceed_context_size_error"),
            "overloaded": (503, "the request queue is full", "unavailable_error"),
            "invalid": (400, "Failed to parse grammar", "invalid_request_error"),
            "loading": (503, "Loading model", "unavailable_error"),
            "failed": (500, "Compute error.", "server_error"),
        },
        "/health", None, ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
        done_after_error=False,
    ),
    "openai": Wire(
        {
            "too_long": (400, "This model's maximum context length is 2048 tokens.", "invalid_request_error"),
            "overloaded": (429, "Too many requests", "rate_limit_error"),
            "invalid": (400, "Invalid schema for response_format.", "invalid_request_error"),
            "loading": (503, "The engine is shutting down", "server_error"),
            "failed": (500, "The server had an error", "server_error"),
        },
        "/v1/models", "", None,
    ),
}  # fmt: skip


class FakeSuccessor(FakeTGI):
    """One of `SUCCESSORS`; acts, counters and the rest are those of `FakeTGI`."""

    def __init__(self, dialect: str, *acts: Act, **options: Any) -> None:
        super().__init__(*acts, lists_adapters=dialect in ("vllm", "sglang"), **options)
        self.dialect = dialect
        self.wire = WIRES[dialect]

    def get(self, path: str) -> tuple[int, str, bytes] | None:
        wire = self.wire
        about: dict[str, Any] | None = None
        if path == wire.health_path and path != "/v1/models":
            if not self.is_healthy:
                return self._refusal("loading")
            return 200, "application/json", dump({"status": "ok"}) if self.dialect == "llamacpp" else b""
        if path == "/v1/models":
            models = self.models()
            models[0]["max_model_len"] = self.max_total_tokens
            return (
                (200, "application/json", dump({"object": "list", "data": models}))
                if self.is_healthy
                else (503, "", b"")
            )
        if path == "/metrics" and wire.gauges is not None:
            return 200, "text/plain; version=0.0.4", self._metrics(*wire.gauges).encode()
        if path == "/version" and self.dialect == "vllm":
            about = {"version": "0.33.0"}
        elif path == "/model_info" and self.dialect == "sglang":
            about = {"model_path": self.model_id, "tokenizer_path": self.model_id, "is_generation": True}
        elif path == "/props" and self.dialect == "llamacpp":
            about = {"default_generation_settings": {"n_ctx": self.max_total_tokens}, "build_info": "b9999-0"}
        return (200, "application/json", dump(about)) if about is not None else None

    def _metrics(self, running: str, waiting: str) -> str:
        labels = "" if self.dialect == "llamacpp" else '{engine="0",model_name="org/base {x} y"}'
        return (
            f"# HELP {running} Number.\n# TYPE {running} gauge\n{running}{labels} {self.batch_size}.0\n"
            f"# TYPE {waiting} gauge\n{waiting}{labels} {float(self.queue_size)}\n"
            f'{waiting}_by_reason{{reason="capacity"}} 99.0\n'
        )

    def tokenize(self, body: dict[str, Any]) -> Any:
        text = body["content" if self.dialect == "llamacpp" else "prompt"]
        tokens = list(range(len(text.split(" "))))
        return {"tokens": tokens} if self.dialect == "llamacpp" else {"count": len(tokens), "tokens": tokens}

    def reply_to(self, raw: bytes) -> Act:
        body = json.loads(raw)
        problem = self._problem(body)
        if problem is not None:
            return self._reply(*problem)
        act = self.act_for(body)
        if isinstance(act, Trouble):
            return self._trouble(act, body)
        if not isinstance(act, Tokens | ToolCall):
            return act
        if not body["stream"]:
            return Reply(self._whole(act, body), framing="length")
        events = self._events(act, with_usage=body.get("stream_options", {}).get("include_usage", False))
        if self.wire.ends_with_done:
            events.append(b"data: [DONE]\n\n")
        return Reply(*events, content_type="text/event-stream; charset=utf-8")

    def _problem(self, body: dict[str, Any]) -> tuple[int, str, bytes] | None:
        """What the server would not take."""
        model, wire = body.get("model", ""), self.wire
        if self.dialect in ("vllm", "openai") and model not in (self.model_id, *self.adapters):
            message = f"The model `{model}` does not exist."
            return 404, "application/json", self._error(404, message, "NotFoundError", "model")
        base, separator, adapter = model.partition(":")
        if self.dialect == "sglang" and separator and (base != self.model_id or adapter not in self.adapters):
            return 400, "application/json", self._error(400, f"LoRA adapter {adapter} is not loaded", "BadRequestError")
        form = body.get("response_format")
        if form is not None and form["type"] == "json_schema" and "schema" not in form.get("json_schema", {}):
            return 400, "application/json", self._error(400, "json_schema is missing", wire.troubles["invalid"][2])
        if not -(2**63) <= body.get("seed", 0) < 2**63 or not 0 < body.get("top_p", 1) <= 1:
            return 400, "application/json", self._error(400, "out of range", wire.troubles["invalid"][2])
        if any(value is None for value in body.values()):
            return 400, "application/json", self._error(400, "null", wire.troubles["invalid"][2])
        return None

    def _error(self, status: int, message: str, kind: str, param: str | None = None) -> bytes:
        error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": status}
        if self.dialect == "sglang":
            return dump({"object": "error", **error})
        if self.dialect == "llamacpp":
            return dump({"error": {"code": status, "message": message, "type": kind}})
        return dump({"error": error})

    def _refusal(self, meaning: str) -> tuple[int, str, bytes]:
        status, message, kind = self.wire.troubles[meaning]
        return status, "application/json", self._error(status, message, kind)

    @staticmethod
    def _reply(status: int, content_type: str, body: bytes) -> Reply:
        return Reply(body, status=status, content_type=content_type, framing="length")

    def _trouble(self, act: Trouble, body: dict[str, Any]) -> Reply:
        meaning, first = act.meaning, b""
        if meaning == "broken":
            meaning, first = "failed", b"".join(self._events(Tokens("Hello", " world"), with_usage=False)[:2])
        elif not body["stream"] or meaning not in self.wire.fails_in_stream:
            return self._reply(*self._refusal(meaning))
        status, message, kind = self.wire.troubles[meaning]
        event = b"data: " + dump({"error": {"message": message, "type": kind, "code": status}}) + b"\n\n"
        done = b"data: [DONE]\n\n" if self.wire.done_after_error else b""
        return Reply(first, event + done, content_type="text/event-stream", gates=act.gates)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "object": kind, "created": CREATED, "model": self.model_id}

    def _whole(self, act: Tokens | ToolCall, body: dict[str, Any]) -> bytes:
        if isinstance(act, ToolCall):
            function = {"name": act.name, "arguments": act.arguments}
            message: dict[str, Any] = {
                "role": "assistant", "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            }  # fmt: skip
            finish, usage = "tool_calls", {"prompt_tokens": 11, "completion_tokens": 9, "total_tokens": 20}
        else:
            message = {"role": "assistant", "content": "".join(act.tokens)}
            finish, usage = act.finish, act.usage()
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return dump({**self._head("chat.completion"), "choices": [choice], "usage": usage})

    def _events(self, act: Tokens | ToolCall, *, with_usage: bool) -> list[bytes]:
        """A role chunk, the deltas, the finish reason in a chunk of its own, and the usage after it."""
        deltas: list[dict[str, Any]]
        if isinstance(act, ToolCall):
            start = {"index": 0, "id": "call_1", "type": "function", "function": {"name": act.name, "arguments": ""}}
            parts = (act.arguments[:2], act.arguments[2:])
            deltas = [{"tool_calls": [start]}]
            deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in parts]
            finish, usage = "tool_calls", {"prompt_tokens": 11, "completion_tokens": 9, "total_tokens": 20}
        else:
            deltas = [{"content": token} for token in act.tokens]
            finish, usage = act.finish, act.usage()
        deltas = [{"role": "assistant", "content": ""}, *deltas]
        events = [self._chunk(delta, None) for delta in deltas] + [self._chunk({}, finish)]
        if with_usage:
            events.append(sse_event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage}))
        return events

    def _chunk(self, delta: dict[str, Any], finish: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return sse_event({**self._head("chat.completion.chunk"), "choices": [choice]})
