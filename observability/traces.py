"""One request's trace, by explicit calls: sampled before a span is built, ended once, never the request's problem.

Nothing here is a context manager: a span held open across a `yield` would be closed in another task. A request that is
not sampled has a trace id for logs, the record and the outgoing `traceparent`, and no span object at all. Attribute
values are facts about the work; prompts, answers and document text are never among them.
"""

import logging
from collections.abc import Mapping
from random import getrandbits
from time import perf_counter, time_ns
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.metrics import Histogram
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_RESPONSE_STATUS_CODE
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

logger = logging.getLogger(__name__)

Attributes = Mapping[str, AttributeValue]


def error_type(error: BaseException | str) -> str:
    """Name an error for `error.type`: a code as it is, an exception by its class; messages may quote content."""
    if isinstance(error, str):
        return error
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


class TraceSpan:
    """A span that ends once; the shared NOT_RECORDED does nothing, so callers never ask whether they are sampled."""

    __slots__ = ("_span", "_tracer", "started_ns")

    def __init__(self, tracer: Tracer | None, span: Span | None, started_ns: int = 0) -> None:
        self._tracer = tracer
        self._span = span
        self.started_ns = started_ns
        """Unix time in nanoseconds; 0 when not recorded."""

    @property
    def recording(self) -> bool:
        """Whether attributes set now are kept."""
        return self._span is not None

    @property
    def context(self) -> trace.SpanContext | None:
        """Trace id, span id and flags; None when not recorded or ended."""
        return None if self._span is None else self._span.get_span_context()

    def child(
        self,
        name: str,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        *,
        started_ns: int | None = None,
    ) -> "TraceSpan":
        """Start a span below this one, now or at a Unix time in nanoseconds that has passed."""
        if self._span is None or self._tracer is None:
            return NOT_RECORDED
        return start_span(
            self._tracer, name, kind, attributes, trace.set_span_in_context(self._span, Context()), started_ns
        )

    def set(self, name: str, value: AttributeValue) -> None:
        """Set one attribute."""
        if self._span is not None:
            self._span.set_attribute(name, value)

    def update(self, attributes: Attributes) -> None:
        """Set several attributes."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Add a point in time."""
        if self._span is not None:
            self._span.add_event(name, attributes)

    def end(self, *, error: BaseException | str | None = None, ended_ns: int | None = None) -> None:
        """End the span; only the first call counts. An error is named by its type and its message is left out."""
        span, self._span = self._span, None
        if span is None:
            return
        try:
            if error is not None:
                span.set_attribute(ERROR_TYPE, error_type(error))
                span.set_status(StatusCode.ERROR)
            span.end(ended_ns)
        except Exception:  # A span processor is foreign code and must not fail the request.
            logger.warning("a span could not be ended and is lost", exc_info=True)


NOT_RECORDED: Final = TraceSpan(None, None)


def start_span(
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    attributes: Attributes | None,
    parent: Context,
    started_ns: int | None = None,
) -> TraceSpan:
    """Start a span under the span in `parent`; NOT_RECORDED when the SDK declines or fails."""
    started = time_ns() if started_ns is None else started_ns
    try:
        span = tracer.start_span(name, parent, kind, attributes, start_time=started)
    except Exception:  # A sampler or span processor is foreign code and must not fail the request.
        logger.warning("a span could not be started and is lost", exc_info=True)
        return NOT_RECORDED
    return TraceSpan(tracer, span, started) if span.is_recording() else NOT_RECORDED


class RequestTrace:
    """What one request is known by in every trace, log line and record: `trace_id`, 32 hex digits."""

    __slots__ = ("_flags", "_measure", "_owned", "_span_id", "server", "trace_id")

    def __init__(
        self,
        trace_id: str,
        server: TraceSpan = NOT_RECORDED,
        *,
        span_id: str = "",
        flags: int = 0,
        owned: bool = True,
        measure: "Measure | None" = None,
    ) -> None:
        """`span_id` is what the outgoing header names when nothing is recorded; empty picks a random one.

        `owned` is False when somebody else (FastAPI) ends the server span and measures the request.
        """
        self.trace_id = trace_id
        self.server = server
        self._span_id = span_id
        self._flags = flags
        self._owned = owned
        self._measure = measure

    @property
    def sampled(self) -> bool:
        """Whether spans are recorded for this request."""
        return self.server.recording

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
        """The W3C header for a call made inside `span`."""
        context = span.context
        if context is not None:
            return f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"
        if not self._span_id:
            self._span_id = f"{getrandbits(64) or 1:016x}"
        return f"00-{self.trace_id}-{self._span_id}-{self._flags:02x}"

    def span(
        self,
        name: str,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        *,
        parent: TraceSpan | None = None,
    ) -> TraceSpan:
        """Start a span below the server span or `parent`; the caller ends it."""
        return (parent or self.server).child(name, kind, attributes)

    def end(self, status: int | None, *, error: BaseException | str | None = None) -> None:
        """End the server span with the HTTP status that was sent (None: nothing was); only the first call counts.

        As the HTTP conventions have it, a status of 500 and up is an error even when none is given, and one of 400 to
        499 is the client's error and not the span's.
        """
        server = self.server
        if not self._owned:
            self.server = NOT_RECORDED
            return
        if self._measure is None and not server.recording:
            return
        if status is not None and 400 <= status < 500:
            error = None
        elif error is None and (status is None or status >= 500):
            error = str(status or "incomplete_response")
        if self._measure is not None:
            self._measure.end(status, error)
            self._measure = None
        if status is not None:
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
