"""One request's trace: sampled before a span is built, and kept for certain if the request fails or is a canary's.

A request that is not sampled has a trace id for logs, the record and the outgoing `traceparent`, and no span of the
SDK's at all. Where a sampler leaves some out, their spans are noted and built only if the request fails. Attribute
values are facts about the work; prompts, answers and document text are never among them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import getrandbits
from time import perf_counter
from typing import Final, Literal

import msgspec
from opentelemetry.context import Context
from opentelemetry.metrics import Histogram
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_RESPONSE_STATUS_CODE
from opentelemetry.trace import SpanKind, Tracer

from observability.spans import NOT_RECORDED, Attributes, NotedSpan, Told, TraceSpan, error_type, start_span

Profile = Literal["1.37", "genai-0.1", "both"]
"""Whose names the GenAI signals have; `observability.genai` knows them."""


@dataclass(frozen=True, slots=True)
class Conventions:
    """How the work of a request is told."""

    profile: Profile = "1.37"
    record: Callable[[str, float | None, Attributes], None] | None = None
    """Takes one observation of a GenAI metric; None where those are not exported."""


_DEFAULT: Final = Conventions()


class Late(msgspec.Struct, frozen=True):
    """How the server span of a request that was not sampled is built after all."""

    tracer: Tracer
    """One that samples everything."""
    parent: Context
    started_ns: int
    name: str
    describe: Callable[[], Attributes]
    """What the span says of the request."""


class RequestTrace:
    """What one request is known by in every trace, log line and record: `trace_id`, 32 hex digits."""

    __slots__ = ("_flags", "_late", "_measure", "_owned", "_span_id", "conventions", "server", "trace_id")

    def __init__(
        self,
        trace_id: str,
        server: TraceSpan = NOT_RECORDED,
        *,
        span_id: str = "",
        flags: int = 0,
        owned: bool = True,
        measure: "Measure | None" = None,
        late: Late | None = None,
        conventions: Conventions = _DEFAULT,
    ) -> None:
        """`span_id` is what the outgoing header names when nothing is recorded; empty picks a random one.

        `owned` is False when somebody else (FastAPI) ends the server span and measures the request. With `late` the
        server span is a noted one, which is built if the request fails.
        """
        self.trace_id = trace_id
        self.server = server
        self.conventions = conventions
        self._span_id = span_id
        self._flags = flags
        self._owned = owned
        self._measure = measure
        self._late = late

    @property
    def recording(self) -> bool:
        """Whether spans are recorded for this request, or noted in case it fails."""
        return self.server.recording

    @property
    def sampled(self) -> bool:
        """Whether this request is certain to be exported."""
        return self._late is None and self.server.recording

    @property
    def span_id(self) -> str:
        """The server span's id, 16 hex digits; empty when not sampled."""
        context = self.server.context
        return "" if context is None else f"{context.span_id:016x}"

    @property
    def traceparent(self) -> str:
        """The W3C header for calls made on behalf of this request."""
        return self.traceparent_under(self.server)

    def traceparent_under(self, span: TraceSpan) -> str:
        """The W3C header for a call made inside `span`; it says whether this request is certain to be exported."""
        context = span.context
        if context is not None:
            return f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"
        if own := span.id:
            return f"00-{self.trace_id}-{own:016x}-{self._flags:02x}"
        if not self._span_id:
            self._span_id = f"{getrandbits(64) or 1:016x}"
        return f"00-{self.trace_id}-{self._span_id}-{self._flags:02x}"

    def span(
        self,
        name: str,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Told = None,
        *,
        parent: TraceSpan | None = None,
        span_id: int = 0,
    ) -> TraceSpan:
        """Start a span below the server span or `parent`; the caller ends it."""
        return (parent or self.server).child(name, kind, attributes, span_id=span_id)

    def keep(self) -> None:
        """Have this request exported whatever the sampler said; to be called before any span below it is started."""
        late, noted = self._late, self.server
        if late is None:
            return
        self._late = None
        kind, facts, ids = SpanKind.SERVER, late.describe(), {"trace_id": int(self.trace_id, 16), "span_id": noted.id}
        self.server = start_span(late.tracer, late.name, kind, facts, late.parent, late.started_ns, **ids)
        if isinstance(noted, NotedSpan):
            noted.replay(self.server)

    def end(self, status: int | None, *, error: BaseException | str | None = None) -> None:
        """End the server span with the HTTP status that was sent (None: nothing was); only the first call counts.

        As the HTTP conventions have it, a status of 500 and up is an error even when none is given, and one of 400 to
        499 is the client's error and not the span's. A request that was not sampled and failed is exported now.
        """
        if not self._owned:
            self.server = NOT_RECORDED
            return
        if self._measure is None and not self.server.recording:
            return
        if status is not None and 400 <= status < 500:
            error = None
        elif error is None and (status is None or status >= 500):
            error = str(status or "incomplete_response")
        if self._measure is not None:
            self._measure.end(status, error)
            self._measure = None
        if error is not None and isinstance(self.server, NotedSpan):
            self.keep()
        server = self.server
        if status is not None and self._late is None:
            server.set(HTTP_RESPONSE_STATUS_CODE, status)
        server.end(error=error)


class Measure:
    """One observation of `http.server.request.duration`, taken whether or not the request is sampled."""

    __slots__ = ("_attributes", "_histogram", "_started")

    def __init__(self, histogram: Histogram, attributes: Attributes) -> None:
        self._histogram = histogram
        self._attributes = attributes
        self._started = perf_counter()

    def end(self, status: int | None, error: BaseException | str | None) -> None:
        """Record the seconds since the start, with the status that was sent."""
        attributes = dict(self._attributes)
        if status is not None:
            attributes[HTTP_RESPONSE_STATUS_CODE] = status
        if error is not None:
            attributes[ERROR_TYPE] = error_type(error)
        self._histogram.record(perf_counter() - self._started, attributes)
