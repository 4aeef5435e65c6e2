"""The engine's HTTP routes: TGI's, and vLLM's verbs for adapters and for rating texts.

Main rule: a request's work ends with its connection. Whatever way the handler is left, the job is cancelled.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.engines.local import EngineSettings
from app.engines.local.adapters import Adapters
from app.engines.local.metrics import Metrics
from app.engines.local.model import LoadedModel, control_tokens
from app.engines.local.protocol import (
    BASE_MODEL_NAME,
    DONE,
    MAX_STOP_SEQUENCES,
    AnswerShape,
    ChatBody,
    Fault,
    LoadAdapterBody,
    RerankBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from app.engines.local.reader import Reader
from app.engines.local.sampler import Picked
from app.engines.local.scheduler import Delta, Job, Rating, Scheduler
from app.engines.local.text import TextStream

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2_000_000  # TGI's payload limit.
OPEN_PATHS = frozenset({"/health", "/info", "/metrics"})
CLIENT_CLOSED_REQUEST = 499
JSON = "application/json"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
METRIC_LABELS = {"overloaded": "overloaded", "validation": "validation", "template_error": "template"}

Body = TypeVar("Body")
Result = TypeVar("Result")


class EngineService:
    """One loaded model behind HTTP; `app` is the ASGI application. `reader` rates texts, where there is one.

    Raises:
        Fault: an adapter of the settings cannot be served.
    """

    def __init__(self, base: LoadedModel, settings: EngineSettings, reader: Reader | None = None) -> None:
        self._base = base
        self._settings = settings
        self._control_tokens = control_tokens(base.vocabulary)
        self._max_total_tokens = min(settings.max_total_tokens, base.context_tokens)
        self._fingerprint = f"{version('hallmark')}-embedded"
        self._metrics = Metrics()
        self._adapters = Adapters(base, settings.max_adapters, settings.adapters)
        self._reader = reader
        self._scheduler = Scheduler(
            end_token_ids=base.end_token_ids,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            metrics=self._metrics,
            reader=reader,
        )
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/info", self._info),
                Route("/metrics", self._show_metrics),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/rerank", self._rerank, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/chat_tokenize", self._chat_tokenize, methods=["POST"]),
                Route("/v1/load_lora_adapter", self._load_adapter, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload_adapter, methods=["POST"]),
            ],
            middleware=[Middleware(_BearerToken, token=settings.token)] if settings.token else [],
            exception_handlers={Fault: self._show_fault},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self._scheduler.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            self._scheduler.stop()
            self._adapters.close()

    async def _chat(self, request: Request) -> Response:
        self._metrics.received()
        body = await _decode(request, ChatBody)
        job, shape = await self._job(body)
        self._scheduler.submit(job)
        if body.stream:
            return await self._streamed(request, job, shape, with_usage=body.wants_usage)
        try:
            answer = await _while_connected(request, _whole_answer(job, shape))
        finally:
            self._scheduler.cancel(job)
        return Response(status_code=CLIENT_CLOSED_REQUEST) if answer is None else Response(answer, media_type=JSON)

    async def _streamed(self, request: Request, job: Job, shape: AnswerShape, *, with_usage: bool) -> Response:
        """Await the first piece before the head is sent, so that a failure until then has its own status."""
        try:
            first = await _while_connected(request, job.deltas.get())
        except BaseException:
            self._scheduler.cancel(job)
            raise
        if first is None or first.fault:
            self._scheduler.cancel(job)
            return (
                _fault_response(first.fault) if first and first.fault else Response(status_code=CLIENT_CLOSED_REQUEST)
            )
        events = _events(job, first, shape, with_usage=with_usage)
        return _JobResponse(events, lambda: self._scheduler.cancel(job))

    async def _job(self, body: ChatBody) -> tuple[Job, AnswerShape]:
        sampling = body.sampling()
        model_name = body.model or BASE_MODEL_NAME
        is_base = model_name in (BASE_MODEL_NAME, self._base.model_id)
        model = self._base.model if is_base else self._adapters.use(model_name)
        _, prompt = await asyncio.to_thread(self._render, body)
        if body.structured_outputs is not None:
            sampling = replace(sampling, choices=tuple(map(self._choice, body.structured_outputs.choice)))
        max_tokens = body.limit(len(prompt), self._max_total_tokens)
        shape = AnswerShape(
            model=self._base.model_id if is_base else model_name,
            fingerprint=self._fingerprint,
            prompt_tokens=len(prompt),
            vocabulary=self._base.vocabulary,
        )
        text = TextStream(self._base.vocabulary, body.stops)
        return Job(model=model, prompt=prompt, options=sampling, max_tokens=max_tokens, text=text), shape

    def _choice(self, text: str) -> tuple[int, ...]:
        """One of the answers there may be, as the tokens that say it and end it."""
        end = self._base.tokenizer.eos_token_id
        tokens = self._base.vocabulary.encode(text, add_special_tokens=False).ids
        return (*tokens, min(self._base.end_token_ids) if end is None else end)

    def _render(self, body: ChatBody) -> tuple[str, list[int]]:
        """Write the messages as the model's prompt; a last message of the assistant's is continued."""
        continued = bool(body.messages) and body.messages[-1].role == "assistant"
        try:
            messages: list[Any] = [self._spelt(_plain(message)) for message in body.messages]
            text = self._base.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise Fault(422, "template_error", f"Template error: {error}") from error
        return text, self._base.vocabulary.encode(text, add_special_tokens=False).ids

    def _spelt(self, value: Any) -> Any:
        """Break the control tokens in what a message says: only the template ends a turn and begins one."""
        if isinstance(value, str):
            return self._control_tokens.sub(lambda token: f"{token[0][0]} {token[0][1:]}", value)
        if isinstance(value, list):
            return [self._spelt(each) for each in value]
        if isinstance(value, dict):
            return {self._spelt(key): self._spelt(each) for key, each in value.items()}
        return value

    async def _rerank(self, request: Request) -> Response:
        """Rate documents by how likely each answers the query, the likeliest first; always by the base model."""
        body = await _decode(request, RerankBody)
        reader = self._reader
        if reader is None:
            raise Fault(501, "unsupported", f"{self._base.model_id} has no head to rate texts with")
        prompts = await asyncio.to_thread(lambda: [reader.prompt(body.query, text) for text in body.documents])
        rating = Rating(prompts, asyncio.get_running_loop().create_future())
        self._scheduler.rate(rating)
        if await _while_connected(request, rating.rated) is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        best = sorted(enumerate(rating.scores), key=lambda each: -each[1])[: body.top_n or None]
        results = [{"index": index, "relevance_score": score} for index, score in best]
        usage = {"total_tokens": sum(map(len, prompts))}
        return JSONResponse({"model": self._base.model_id, "usage": usage, "results": results})

    async def _tokenize(self, request: Request) -> Response:
        body = await _decode(request, TokenizeBody)
        if not body.inputs:
            raise Fault.validation("`inputs` cannot be empty")
        return JSONResponse(await asyncio.to_thread(self._tokens, body.inputs, special=True))

    async def _chat_tokenize(self, request: Request) -> Response:
        body = await _decode(request, ChatBody)
        text, _ = await asyncio.to_thread(self._render, body)
        tokens = await asyncio.to_thread(self._tokens, text, special=False)
        return JSONResponse({"tokenize_response": tokens, "templated_text": text})

    def _tokens(self, text: str, *, special: bool) -> list[dict[str, Any]]:
        encoded = self._base.vocabulary.encode(text, add_special_tokens=special)
        at_byte = [0]  # TGI's offsets count UTF-8 bytes, the tokenizer's count characters.
        for character in text:
            at_byte.append(at_byte[-1] + len(character.encode()))
        return [
            {"id": id_, "text": text[start:stop], "start": at_byte[start], "stop": at_byte[stop]}
            for id_, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True)
        ]

    async def _health(self, _request: Request) -> Response:
        if self._scheduler.alive:
            return Response()
        return _fault_response(Fault(503, "healthcheck", "unhealthy"))

    async def _info(self, _request: Request) -> Response:
        facts = {
            "model_id": self._base.model_id,
            "model_sha": self._base.revision,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": self._scheduler.max_in_flight,
            "max_best_of": 1,
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_input_tokens": self._max_total_tokens - 1,
            "max_total_tokens": self._max_total_tokens,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "max_adapters": self._settings.max_adapters,
            "router": "hallmark-embedded",
            "version": version("hallmark"),
            "sha": None,
            "docker_label": None,
            "dtype": self._base.dtype,
            "device": "cpu",
        }
        return JSONResponse(facts)

    async def _models(self, _request: Request) -> Response:
        base = self._base.model_id
        entries = [(base, None), *((name, base) for name in self._adapters.by_use)]
        data = [
            {"id": id_, "object": "model", "created": 0, "owned_by": base, "root": id_, "parent": parent}
            for id_, parent in entries
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _show_metrics(self, _request: Request) -> Response:
        return PlainTextResponse(
            self._metrics.render(queue_size=self._scheduler.waiting, batch_size=self._scheduler.running)
        )

    async def _load_adapter(self, request: Request) -> Response:
        body = await _decode(request, LoadAdapterBody)
        dropped = await self._adapters.load(body.lora_name, Path(body.lora_path), replace=body.load_inplace)
        gone = f" To make room, dropped: {', '.join(dropped)}." if dropped else ""
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.{gone}")

    async def _unload_adapter(self, request: Request) -> Response:
        body = await _decode(request, UnloadAdapterBody)
        await self._adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _show_fault(self, _request: Request, error: Exception) -> Response:
        assert isinstance(error, Fault)
        if label := METRIC_LABELS.get(error.error_type):
            self._metrics.failed(label)
        return _fault_response(error)


async def _decode(request: Request, shape: type[Body]) -> Body:
    raw = b""
    async for piece in request.stream():
        raw += piece
        if len(raw) > MAX_BODY_BYTES:
            raise Fault(413, "validation", f"Input validation error: the body exceeds {MAX_BODY_BYTES} bytes")
    target = "Failed to deserialize the JSON body into the target type"
    try:
        return msgspec.json.decode(raw, type=shape)
    except msgspec.ValidationError as error:
        raise Fault(422, "validation", f"{target}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Fault(400, "validation", f"{target}: {error}") from error


def _plain(message: Any) -> dict[str, Any]:
    if isinstance(message.content, list) and any(part.get("type") != "text" for part in message.content):
        raise Fault.validation("`messages` may hold text parts only: this model sees no images")
    extras = {"name": message.name, "tool_calls": message.tool_calls, "tool_call_id": message.tool_call_id}
    given = {key: value for key, value in extras.items() if value is not None}
    return {"role": message.role, "content": message.text, **given}


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result | None:
    """Await `work` as long as the client is there; None once it has left."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole_answer(job: Job, shape: AnswerShape) -> bytes:
    texts: list[str] = []
    picked: list[Picked] = []
    while True:
        delta = await job.deltas.get()
        if delta.fault:
            raise delta.fault
        texts.append(delta.text)
        picked += delta.picked
        if delta.finish_reason:
            return shape.completion("".join(texts), picked, delta.finish_reason, delta.completion_tokens)


async def _events(job: Job, first: Delta, shape: AnswerShape, *, with_usage: bool) -> AsyncGenerator[bytes, None]:
    delta = first
    while not delta.is_last:
        yield shape.chunk(delta.text, delta.picked, None)
        delta = await job.deltas.get()
    if delta.fault:
        yield delta.fault.as_event()
    else:
        yield shape.chunk(delta.text, delta.picked, delta.finish_reason)
        if with_usage:
            yield shape.usage_chunk(delta.completion_tokens)
    yield DONE


class _JobResponse(StreamingResponse):
    """A stream of events that calls `on_close` however it ends, even before its first byte."""

    def __init__(self, events: AsyncGenerator[bytes, None], on_close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


def _fault_response(fault: Fault) -> Response:
    return Response(fault.as_body(), status_code=fault.status, media_type=JSON)


class _BearerToken:
    """Lets only requests with the token through, but for what a monitor reads; refuses as TGI does, without a body."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await Response(status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)
