"""What answers, on plain ASGI: read the request in its form, ask the gateway, send what it yields.

`POST /v1/chat/completions` is one form of it, `POST /v1/responses` another; all between the two is the same.

An error before the first event keeps its HTTP status; a later one is one typed error event and never a clean end
mark. A client that hangs up cancels the work, streamed or not.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from copy import copy
from time import perf_counter
from typing import Self

from starlette.types import Receive, Scope, Send

from app.access import Access
from app.calls import Conclusion
from app.errors import EngineTimeout, Overloaded, RateLimited, ServiceError, Unavailable
from app.gateway import Answering, Gateway
from app.links import PassageLinks
from app.messages import Piece, about_tokens
from app.predictions import Prediction
from app.privacy.policies import read_level
from app.rates import RateLimits, Taken
from app.routes.forms import ChatForm, Form, Headers, Rendering
from app.routes.reply import Reply, read_body
from app.routes.watch import Patience, Watch
from app.shadows import Shadows
from observability.logs import Log, RequestIds, request_ids
from observability.metrics import Metrics
from observability.telemetry import Telemetry
from observability.traces import RequestTrace
from retrieval.documents import Passage

KEEP_HEADER = b"x-hallmark-keep"
"""How much of what is said a request wants kept at most."""

CHORE_HEADER = b"x-openwebui-task"
"""What Open WebUI asks for itself, such as a title; empty where a person asks."""

_JSON = (b"content-type", b"application/json")
_SSE = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class ChatRoute:
    """A route that answers as an ASGI application; by default in the form of OpenAI's chat completions."""

    # Of two that are copies the interpreter would look every attribute up in a dictionary.
    __slots__ = (
        "_access",
        "_form",
        "_gateway",
        "_links",
        "_log",
        "_max_body_bytes",
        "_metrics",
        "_path",
        "_patience",
        "_public_url",
        "_rates",
        "_shadows",
        "_telemetry",
        "_timeout_seconds",
    )

    def __init__(
        self,
        gateway: Gateway,
        *,
        shadows: Shadows,
        access: Access,
        rates: RateLimits,
        links: PassageLinks,
        telemetry: Telemetry,
        metrics: Metrics,
        log: Log,
        max_body_bytes: int,
        timeout_seconds: float,
        public_url: str | None = None,
        form: Form | None = None,
    ) -> None:
        self._gateway = gateway
        self._shadows = shadows
        self._access = access
        self._rates = rates
        self._links = links
        self._telemetry = telemetry
        self._metrics = metrics
        self._log = log
        self._max_body_bytes = max_body_bytes
        self._timeout_seconds = timeout_seconds
        self._public_url = public_url
        self._form = form or ChatForm()
        self._path = self._form.path
        self._patience = Patience()

    def speaking(self, form: Form) -> Self:
        """The same route in another form."""
        other = copy(self)
        other._form, other._path = form, form.path  # noqa: SLF001 - it is one of its own.
        return other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whatever happens, its telemetry ends once and with the status that was sent."""
        started = perf_counter()
        headers = dict(scope["headers"])
        trace = self._telemetry.begin(headers.get(b"traceparent"), route=self._path, method="POST", scope=scope)
        reply = Reply(send)
        answering: Answering | None = None
        taken: Taken | None = None
        error: ServiceError | None = None
        try:
            answering = await self._begin(headers, receive, trace)
            if answering.caller.is_limited:
                taken = await self._rates.take(answering.caller, _most_tokens(answering))
                reply.also = taken.headers
            await self._serve(scope, headers, receive, answering, reply)
        except ServiceError as failure:
            error = failure
            self._form.explain(failure, answering.request if answering else None)
            await reply.fail(failure, answering.prediction.id if answering else trace.trace_id)
        except Exception:
            error = ServiceError("Something went wrong on our side; the request id helps us find it.")
            await reply.fail(error, answering.prediction.id if answering else trace.trace_id)
            raise
        finally:
            self._account(started, trace, answering, reply.status, error)
            if answering is not None:
                self._shadows.offer(answering)
                if taken is not None:
                    self._settle(taken, answering, error)

    async def _begin(self, headers: Headers, receive: Receive, trace: RequestTrace) -> Answering:
        """Say who calls and read what they ask; nothing is read where they may not, or where there is no room."""
        caller = await self._access.identify(headers)
        caller.require("chat")
        self._shadows.make_room()
        self._gateway.admission.check(caller.priority)
        body = await read_body(headers, receive, self._max_body_bytes)
        request, body, conversation = await self._form.read(body, caller)
        kept = headers.get(KEEP_HEADER)
        level = read_level(kept.decode("latin-1")) if kept is not None else None
        header = headers.get(b"x-conversation-id") or headers.get(b"x-openwebui-chat-id")
        named = header.decode("latin-1")[:512] if header else conversation
        is_chore = _is_chore(headers.get(CHORE_HEADER, b""))
        answering = self._gateway.begin(request, body, caller, trace, conversation=named, is_chore=is_chore)
        answering.prediction.conversation = named
        answering.prediction.kept = level
        answering.headers = headers
        request_ids.set(RequestIds(trace.trace_id, trace.span_id, answering.prediction.id))
        return answering

    def _settle(self, taken: Taken, answering: Answering, error: ServiceError | None) -> None:
        """Have a request counted for what it took; one that there was no room for, or no engine, not at all."""
        tokens = _tokens(answering.prediction)
        if tokens == 0 and isinstance(error, Overloaded | Unavailable):
            self._rates.give_back(taken)
        elif tokens is not None:
            self._rates.settle(taken, tokens)

    async def _serve(
        self, scope: Scope, headers: Headers, receive: Receive, answering: Answering, reply: Reply
    ) -> None:
        """Send the answer while watching for the client to hang up."""
        prediction = answering.prediction

        def link(passage: Passage) -> str:
            base = self._public_url or _own_address(scope, headers)
            return base + self._links.path(prediction.tenant, passage.document_id, passage.n, passage.document_version)

        style = self._form.style(headers, answering.request)
        if style == "markdown":
            answering.marker = lambda n, passage: f"[[{n}]]({link(passage)})"

        def render() -> Rendering:
            # Only once the answer has begun it is certain which release gives it.
            return self._form.rendering(answering, link=link, style=style)

        watch = Watch(receive, self._timeout_seconds, stop=answering.stop, patience=self._patience)
        place = answering.place
        try:
            if not place.take():
                await place.wait()
            events = answering.events()
            try:
                if prediction.stream:
                    await self._stream(events, render, answering, reply)
                else:
                    await self._whole(events, render, answering, reply)
            finally:
                try:
                    await events.aclose()
                finally:
                    place.leave()
        except asyncio.CancelledError:
            if watch.reason is None or watch.task.uncancel():
                raise
            if watch.reason == "timeout":
                raise EngineTimeout(f"The answer took longer than {self._timeout_seconds:g} seconds.") from None
        finally:
            watch.close()

    async def _whole(
        self,
        events: AsyncGenerator[list[Piece] | Conclusion, None],
        render: Callable[[], Rendering],
        answering: Answering,
        reply: Reply,
    ) -> None:
        pieces: list[Piece] = []
        async for event in events:
            if isinstance(event, Conclusion):
                body = render().whole(pieces, event)
                await reply.whole(body, [_JSON, *_named(answering)])
            else:
                pieces += event

    async def _stream(
        self,
        events: AsyncGenerator[list[Piece] | Conclusion, None],
        render: Callable[[], Rendering],
        answering: Answering,
        reply: Reply,
    ) -> None:
        rendering: Rendering | None = None
        async for event in events:
            opening = b""
            if rendering is None:
                rendering = render()
                reply.broken_off = rendering.broken_off
                await reply.start([*_SSE, *_named(answering)])
                opening = rendering.opening()
            if isinstance(event, Conclusion):
                await reply.send(opening + rendering.ending(event), more=False)
            elif chunks := opening + rendering.chunks(event):
                await reply.send(chunks)

    def _account(
        self,
        started: float,
        trace: RequestTrace,
        answering: Answering | None,
        status: int | None,
        error: ServiceError | None,
    ) -> None:
        """Tell the trace, the metrics and the log the same facts, once."""
        seconds = perf_counter() - started
        shown = status or 499  # What proxies write for a client that left before an answer.
        trace.end(status, error=error.code if error else None)
        if isinstance(error, Overloaded | RateLimited):
            self._metrics.refused(error.code)
        if answering is None:
            self._metrics.answer(route=self._path, release="", status=shown, outcome="failed", seconds=seconds)
            self._log.access("POST", self._path, shown, seconds, trace_id=trace.trace_id, outcome="failed")
            return
        prediction, place, grounds = answering.prediction, answering.place, answering.grounds
        if place.waited_seconds is None and prediction.outcome == "open":  # It got no place, and is not on record.
            prediction.outcome = "failed" if error else "cancelled"
        release = prediction.release_name or ""
        prompt_tokens, completion_tokens = prediction.prompt_tokens or 0, prediction.completion_tokens or 0
        self._metrics.answer(
            route=self._path,
            release=release,
            status=shown,
            outcome=prediction.outcome,
            seconds=seconds,
            engine_seconds=prediction.engine_seconds,
            retrieval_seconds=prediction.retrieve_seconds,
            embed_seconds=grounds.embed_seconds if grounds else None,
            first_token_seconds=prediction.first_token_seconds,
            priority=place.priority,
            waited_seconds=place.waited_seconds,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )
        if grounds is not None and grounds.rerank_seconds is not None:
            self._metrics.rerank_seconds.observe(grounds.rerank_seconds)
        if prediction.fallback:
            self._metrics.fell_back(release, prediction.assignment or "")
        if prediction.citations:
            self._metrics.cited(release, [citation["status"] for citation in prediction.citations])
        if prediction.features:
            self._metrics.featured(release, [feature["state"] for feature in prediction.features])
        if answering.verdict is not None and answering.verdict.status == "abstained":
            self._metrics.abstained(release, answering.verdict.reason)
        self._log.access(
            "POST",
            self._path,
            shown,
            seconds,
            trace_id=trace.trace_id,
            prediction_id=prediction.id,
            release=release,
            tenant=prediction.tenant,
            outcome=prediction.outcome,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )


def _named(answering: Answering) -> list[tuple[bytes, bytes]]:
    prediction_id = answering.prediction.id.encode()
    return [
        (b"x-prediction-id", prediction_id),
        (b"x-request-id", prediction_id),
        (b"x-release", (answering.prediction.release_name or "").encode()),
    ]


def _is_chore(task: bytes) -> bool:
    """Whether the header names a task: a version that does not fill in `{{TASK}}` sends that as it stands."""
    return bool(task.strip()) and not task.strip().startswith(b"{{")


def _most_tokens(answering: Answering) -> int:
    """About how many tokens the prompt, as it was sent, and the longest answer have."""
    return about_tokens(answering.request.messages) + (answering.sampling.max_tokens or 0)


def _tokens(prediction: Prediction) -> int | None:
    """How many tokens an answer took; None where it broke off before the engine said so."""
    counted = (prediction.prompt_tokens or 0) + (prediction.completion_tokens or 0)
    has_engine_spoken = prediction.queue_seconds is not None
    return None if not counted and has_engine_spoken else counted


def _own_address(scope: Scope, headers: Headers) -> str:
    return f"{scope.get('scheme', 'http')}://{headers.get(b'host', b'localhost').decode('latin-1')}"
