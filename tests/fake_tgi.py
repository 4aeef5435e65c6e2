"""A stand-in for TGI's router: fast, scripted, no model; for tests, and as its own process for benchmarks.

    async with FakeTGI() as tgi:
        tgi.script(Tokens("Hello", " world"), Refuse.overloaded())   # one act per generation, in order
        ...                                                          # afterwards `tgi.default` answers
        assert tgi.bodies[0]["messages"] == [...]

It refuses what TGI refuses (a bare-string `stop`, `top_p: 1`, explicit nulls) and does what TGI does wrong (a
streamed failure comes as an event under status 200; an unknown adapter is served by the base model and echoed).
`python -m tests.fake_tgi --port 0 --tokens 64` prints its URL and answers from prebuilt bytes.
"""

import argparse
import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from tests.tgi_acts import Act, Drop, Hang, Refuse, Reply, Tokens, ToolCall
from tests.tgi_frames import STREAM_HEAD, TIMES, dump, framed, http_head, sse_event
from tests.tgi_rules import body_problem, validation_problem

__all__ = ["Act", "Drop", "FakeTGI", "Hang", "Received", "Refuse", "Reply", "Tokens", "ToolCall"]


@dataclass
class Received:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class FakeTGI:
    """The stand-in: an async context manager; `url` is its address."""

    def __init__(
        self,
        *acts: Act,
        default: Act | Callable[[dict[str, Any]], Act] | None = None,
        model_id: str = "org/base",
        adapters: tuple[str, ...] = (),
        lists_adapters: bool = False,
        api_key: str | None = None,
        max_total_tokens: int = 2048,
        port: int = 0,
        lean: bool = False,
        prefill_seconds: float = 0.0,
    ) -> None:
        """`default` answers when the script is empty; a function of the body may choose the act.

        With `lists_adapters` it behaves like the embedded engine: `/v1/models` lists them, unknown ones are a 404.
        `lean` keeps no requests and looks for `"stream":true` instead of decoding: for benchmarks; then
        `prefill_seconds` pass before anything is sent.
        """
        self.acts: deque[Act] = deque(acts)
        self.default = default or Tokens("Hello", " world", ".")
        self.model_id = model_id
        self.adapters = adapters
        self.lists_adapters = lists_adapters
        self.api_key = api_key
        self.max_total_tokens = max_total_tokens
        self.lean = lean
        self.prefill_seconds = prefill_seconds
        self.prebuilt: dict[str, bytes] = {}
        self.rating: Callable[[str, str], float] | None = None
        """How likely a text answers a query, where it is to behave like the embedded engine's `/v1/rerank`."""
        self.max_adapters: int | None = None
        """How many it holds, where it is to drop one for another like the embedded engine."""
        self.is_healthy = True
        self.is_hung = False
        """Whether requests are accepted and never answered, probes included."""
        self.queue_size = 0
        self.batch_size = 0
        self.requests: list[Received] = []
        self.connections = 0
        self.open_connections = 0
        self.cancelled = 0
        self._changed = asyncio.Event()
        self._port = port
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self.url = ""

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The decoded bodies of the chat requests."""
        return [request.json for request in self.requests if request.path.endswith("/chat/completions")]

    def script(self, *acts: Act) -> None:
        self.acts.extend(acts)

    async def until(self, condition: Callable[[], bool], *, seconds: float = 50.0) -> None:
        """Wait until a condition over this stand-in's counters holds, e.g. `lambda: tgi.cancelled == 1`."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def changed(self) -> None:
        self._changed.set()

    def close_idle(self) -> None:
        """Close every connection that is not in the middle of an answer, as a restarted server would."""
        for link in list(self._links):
            if link.task is None:
                link.close()

    async def __aenter__(self) -> "FakeTGI":
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Link(self), "127.0.0.1", self._port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop listening and drop every connection: the engine is gone."""
        assert self._server is not None
        self._server.close()
        tasks = [link.task for link in self._links if link.task is not None]
        for link in list(self._links):
            link.drop()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.until(lambda: not self._links)
        await self._server.wait_closed()

    def joined(self, link: "_Link") -> None:
        self._links.add(link)
        self.connections += 1
        self.open_connections += 1
        self.changed()

    def left(self, link: "_Link") -> None:
        self._links.discard(link)
        self.open_connections -= 1
        self.changed()

    def reply_to(self, raw: bytes) -> Act | None:
        """What to do with a chat request; None does as TGI. For stand-ins of other servers."""
        return None

    def act_for(self, body: dict[str, Any]) -> Act:
        if self.acts:
            return self.acts.popleft()
        return self.default(body) if callable(self.default) else self.default

    # The routes that do not generate: path -> (status, content type, body).

    def get(self, path: str) -> tuple[int, str, bytes] | None:
        if path in ("/health", "/ping", "/"):
            if self.is_healthy:
                return 200, "", b""
            return 503, "application/json", dump({"error": "unhealthy", "error_type": "healthcheck"})
        if path == "/info":
            return 200, "application/json", dump(self.info())
        if path == "/v1/models":
            return 200, "application/json", dump({"object": "list", "data": self.models()})
        if path == "/metrics":
            return 200, "text/plain; charset=utf-8", self.metrics().encode()
        return None

    def info(self) -> dict[str, Any]:
        return {
            "model_id": self.model_id,
            "model_sha": "0" * 40,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": 128,
            "max_best_of": 2,
            "max_stop_sequences": 4,
            "max_input_tokens": self.max_total_tokens - 1,
            "max_total_tokens": self.max_total_tokens,
            "validation_workers": 2,
            "max_client_batch_size": 4,
            "router": "text-generation-router",
            "version": "3.3.6-dev0",
            "sha": None,
            "docker_label": None,
            **({"max_adapters": self.max_adapters} if self.max_adapters is not None else {}),
        }

    def models(self) -> list[dict[str, Any]]:
        base = {"id": self.model_id, "object": "model", "created": 0, "owned_by": self.model_id}
        if not self.lists_adapters:
            return [base]
        return [base, *({**base, "id": name, "parent": self.model_id} for name in self.adapters)]

    def metrics(self) -> str:
        return (
            f"# TYPE tgi_queue_size gauge\ntgi_queue_size {self.queue_size}\n"
            f"# TYPE tgi_batch_current_size gauge\ntgi_batch_current_size {self.batch_size}\n"
        )

    def rerank(self, body: dict[str, Any]) -> tuple[int, str, bytes]:
        """Rate documents, the likeliest first; 501 from a model that cannot."""
        if self.rating is None:
            return 501, "application/json", dump({"error": "no head to rate texts with", "error_type": "unsupported"})
        rated = [(index, self.rating(body["query"], text)) for index, text in enumerate(body["documents"])]
        results = [{"index": index, "relevance_score": score} for index, score in sorted(rated, key=lambda r: -r[1])]
        return 200, "application/json", dump({"model": self.model_id, "results": results})

    def load_adapter(self, body: dict[str, Any]) -> tuple[int, str, bytes]:
        """Serve another adapter, if its folder is there, as the embedded engine and vLLM do."""
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            error = {"error": f"lora_name: {name!r} is already loaded", "error_type": "adapter"}
            return 400, "application/json", dump(error)
        if not (folder / "adapter_config.json").is_file():
            error = {"error": f"lora_path: {folder} has no adapter_config.json", "error_type": "adapter"}
            return 400, "application/json", dump(error)
        self.adapters = (*self.adapters, name)[-(self.max_adapters or 0) :]
        return 200, "text/plain", f"Success: LoRA adapter '{name}' added successfully.".encode()

    def unload_adapter(self, body: dict[str, Any]) -> tuple[int, str, bytes]:
        """Serve an adapter no longer."""
        self.adapters = tuple(name for name in self.adapters if name != body["lora_name"])
        return 200, "text/plain", b"Success"

    def tokenize(self, body: dict[str, Any]) -> Any:
        """One token per word, its space included; offsets are UTF-8 bytes as TGI's are."""
        tokens, start = [], 0
        for i, word in enumerate(str(body["inputs"]).split(" ")):
            text = word if i == 0 else " " + word
            stop = start + len(text.encode())
            tokens.append({"id": i, "text": text, "start": start, "stop": stop})
            start = stop
        return tokens


class _Link(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, fake: FakeTGI) -> None:
        self.fake = fake
        self.transport: asyncio.Transport | None = None
        self.task: asyncio.Task[None] | None = None
        self.parser = httptools.HttpRequestParser(self)
        self._start()

    def _start(self) -> None:
        self.path = ""
        self.headers: dict[str, str] = {}
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass of asyncio's.
        self.fake.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.task is not None:
            self.fake.cancelled += 1
            self.task.cancel()
        self.fake.left(self)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def drop(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.drop()

    def on_message_begin(self) -> None:
        self._start()

    def on_url(self, url: bytes) -> None:
        self.path = urlsplit(url.decode()).path

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.fake.lean:
            self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        fake = self.fake
        method = self.parser.get_method().decode()
        if fake.lean and method == "POST":
            if fake.prefill_seconds:
                asyncio.get_running_loop().call_later(fake.prefill_seconds, self._perform_lean)
            else:
                self._perform_lean()
            return
        fake.requests.append(Received(method, self.path, self.headers, self.body))
        fake.changed()
        if fake.is_hung:
            return
        if method == "GET":
            self._send(*(fake.get(self.path) or (404, "", b"")))
        elif fake.api_key and self.headers.get("authorization", "").lower() != f"bearer {fake.api_key}".lower():
            self._send(401, "", b"")
        elif self.path == "/tokenize":
            self._send(200, "application/json", dump(fake.tokenize(json.loads(self.body))))
        elif self.path == "/v1/rerank":
            self._send(*fake.rerank(json.loads(self.body)))
        elif self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and fake.lists_adapters:
            change = fake.load_adapter if self.path == "/v1/load_lora_adapter" else fake.unload_adapter
            self._send(*change(json.loads(self.body)))
        elif self.path == "/v1/chat/completions":
            self._chat()
        else:
            self._send(404, "", b"")

    def _send(self, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self.transport is not None:
            self.transport.write(http_head(status, content_type, headers, length=len(body)) + body)

    def _chat(self) -> None:
        if (reply := self.fake.reply_to(self.body)) is not None:
            self.task = asyncio.get_running_loop().create_task(self._perform(reply, {}, ""))
            return
        problem = body_problem(self.body)
        if problem is not None:
            self._send(422, "text/plain; charset=utf-8", problem.encode())
            return
        body = json.loads(self.body)
        fake, model = self.fake, body.get("model") or "tgi"
        if fake.lists_adapters and model not in ("tgi", fake.model_id, *fake.adapters):
            error = {"error": f"adapter {model} not found", "error_type": "adapter_not_found"}
            self._send(404, "application/json", dump(error))
            return
        refused = validation_problem(body)
        act: Act = Refuse(422, f"Input validation error: {refused}", "validation") if refused else fake.act_for(body)
        model = fake.model_id if model == "tgi" else model
        self.task = asyncio.get_running_loop().create_task(self._perform(act, body, model))

    def _perform_lean(self) -> None:
        act = self.fake.default
        assert isinstance(act, Tokens)
        if self.transport is None:
            return
        if b'"stream":true' not in self.body:
            self.transport.write(self._prebuilt("json", act, _lean_json))
        elif act.delay_seconds:
            pieces = [framed(event) for event in act.events(self.fake.model_id, usage=True)]
            self.transport.write(STREAM_HEAD)
            self._trickle([*pieces[:-2], b"".join(pieces[-2:]) + b"0\r\n\r\n"], 0, act.delay_seconds)
        else:
            self.transport.write(self._prebuilt("stream", act, _lean_stream))

    def _prebuilt(self, kind: str, act: Tokens, build: Callable[[Tokens, str], bytes]) -> bytes:
        found = self.fake.prebuilt.get(kind)
        if found is None:
            found = self.fake.prebuilt[kind] = build(act, self.fake.model_id)
        return found

    def _trickle(self, pieces: list[bytes], i: int, seconds: float) -> None:
        if self.transport is not None:
            self.transport.write(pieces[i])
            if i + 1 < len(pieces):
                asyncio.get_running_loop().call_later(seconds, self._trickle, pieces, i + 1, seconds)

    async def _perform(self, act: Act, body: dict[str, Any], model: str) -> None:
        if act.gate is not None:
            await act.gate.wait()
        stream = bool(body.get("stream"))
        match act:
            case Hang():
                await asyncio.Event().wait()
            case Drop():
                self._finish()
                self.drop()
                return
            case Refuse():
                self._refuse(act, stream=stream)
            case Reply():
                await self._reply(act)
            case Tokens() | ToolCall() if stream:
                usage = bool((body.get("stream_options") or {}).get("include_usage"))
                await self._stream(act, act.events(model, usage=usage))
            case Tokens() | ToolCall():
                if isinstance(act, Tokens) and act.cut_after is not None:
                    self._finish()
                    self.drop()
                    return
                if isinstance(act, Tokens) and act.delay_seconds:
                    await asyncio.sleep(act.delay_seconds * len(act.tokens))
                self._send(200, "application/json", act.json_body(model), TIMES)
            case _:
                raise TypeError(act)
        self._finish()

    def _finish(self) -> None:
        self.task = None
        self.fake.changed()

    def _refuse(self, act: Refuse, *, stream: bool) -> None:
        if stream and act.in_stream:
            event = {"error": {"message": act.message, "http_status_code": 422}}
            data = framed(sse_event(event)) + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
            self._write(STREAM_HEAD + data)
        else:
            error = {"error": act.message, "error_type": act.kind}
            self._send(act.status, "application/json", dump(error))

    async def _stream(self, act: Act, events: list[bytes]) -> None:
        limits = (act.cut_after, act.hang_after, act.fail_after) if isinstance(act, Tokens) else (None, None, None)
        cut_after, hang_after, fail_after = limits
        self._write(STREAM_HEAD)
        for i, event in enumerate(events):
            if i in act.gates:
                await act.gates[i].wait()
            if isinstance(act, Tokens) and act.delay_seconds:
                await asyncio.sleep(act.delay_seconds)
            if i == cut_after:
                await self._flush()
                self._finish()
                self.close()
                return
            if i == hang_after:
                await asyncio.Event().wait()
            if i == fail_after and isinstance(act, Tokens):
                self._write(framed(sse_event({"error": {"message": act.failure, "http_status_code": 422}})))
                self._write(framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
                return
            self._write(framed(event))
        self._write(b"0\r\n\r\n")

    async def _reply(self, act: Reply) -> None:
        length = sum(map(len, act.chunks)) if act.framing == "length" else None
        if act.framing != "raw":
            chunked = act.framing == "chunked"
            self._write(http_head(act.status, act.content_type, act.headers, length=length, chunked=chunked))
        for i, chunk in enumerate(act.chunks):
            if i in act.gates:
                await act.gates[i].wait()
            self._write(framed(chunk) if act.framing == "chunked" and chunk else chunk)
            await self._flush()
        if act.framing == "chunked" and not act.cut:
            self._write(b"0\r\n\r\n")
        if act.cut or act.framing in ("close", "raw"):
            self._finish()
            self.close()

    async def _flush(self) -> None:
        """Let the written bytes go out alone."""
        await asyncio.sleep(0)

    def _write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)


def _lean_json(act: Tokens, model: str) -> bytes:
    body = act.json_body(model)
    return http_head(200, "application/json", TIMES, length=len(body)) + body


def _lean_stream(act: Tokens, model: str) -> bytes:
    return STREAM_HEAD + b"".join(framed(event) for event in act.events(model, usage=True)) + b"0\r\n\r\n"


async def _serve(port: int, pieces: list[str], delay_seconds: float, prefill_seconds: float) -> None:
    answer = Tokens(*pieces, finish="length", delay_seconds=delay_seconds)
    given = {"port": port, "lean": True, "max_total_tokens": 8192, "prefill_seconds": prefill_seconds}
    async with FakeTGI(default=answer, **given) as fake:
        print(fake.url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in TGI that answers every chat with the same tokens.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answer", help="what to answer, a token a word, instead of so many tokens")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before each streamed token")
    parser.add_argument("--prefill-ms", type=float, default=0.0, help="before the first byte of an answer")
    given = parser.parse_args()
    words = given.answer.split() if given.answer else [f"token{i}" for i in range(given.tokens)]
    pieces = [f" {word}" for word in words]
    serve = _serve(given.port, pieces, given.delay_ms / 1000, given.prefill_ms / 1000)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            import uvloop
        except ImportError:
            asyncio.run(serve)
        else:
            uvloop.run(serve)


if __name__ == "__main__":
    main()
