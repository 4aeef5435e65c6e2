"""TGI's bytes: HTTP heads, chunk framing, and the JSON of its answers and events."""

import json
from typing import Any

CREATED = 1767870000
FINGERPRINT = "3.3.6-dev0-native"
TIMES = {
    "x-compute-type": "gpu+optimized",
    "x-compute-time": "0.012",
    "x-total-time": "12",
    "x-validation-time": "0",
    "x-queue-time": "0",
    "x-inference-time": "12",
    "x-time-per-token": "4",
    "x-prompt-tokens": "11",
    "x-generated-tokens": "3",
}
REASONS = {200: "OK", 401: "Unauthorized", 404: "Not Found", 422: "Unprocessable Entity", 429: "Too Many Requests"}


def http_head(
    status: int,
    content_type: str,
    headers: dict[str, str] | None = None,
    *,
    length: int | None = None,
    chunked: bool = False,
) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}"]
    lines += [f"content-type: {content_type}"] if content_type else []
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += ["transfer-encoding: chunked"] if chunked else []
    lines += [f"content-length: {length}"] if length is not None else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


STREAM_HEAD = http_head(
    200, "text/event-stream", {"cache-control": "no-cache", "x-accel-buffering": "no"}, chunked=True
)


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def sse_event(value: Any) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def about(model: str, kind: str) -> dict[str, Any]:
    return {"object": kind, "id": "", "created": CREATED, "model": model, "system_fingerprint": FINGERPRINT}


def completion(model: str, message: dict[str, Any], finish: str, usage: dict[str, int]) -> bytes:
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return dump({**about(model, "chat.completion"), "choices": [choice], "usage": usage})


def sse_chunk(model: str, delta: dict[str, Any], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return sse_event({**about(model, "chat.completion.chunk"), "choices": [choice], "usage": None})


def tail(model: str, usage: dict[str, int] | None) -> list[bytes]:
    counts = [sse_event({**about(model, "chat.completion.chunk"), "choices": [], "usage": usage})] if usage else []
    return [*counts, b"data: [DONE]\n\n"]
