"""Spans by explicit calls: one ends once, and none is ever the request's problem.

Nothing here is a context manager: a span held open across a `yield` would be closed in another task. The shared
NOT_RECORDED does nothing. A `NotedSpan` costs about a microsecond and becomes a span of the SDK's only if its request
turns out to be worth keeping.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from random import getrandbits
from time import time_ns
from typing import Final

import msgspec
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

logger = logging.getLogger(__name__)

Attributes = Mapping[str, AttributeValue]
Facts = Mapping[str, AttributeValue | None]
"""Attributes of which those that are None are left out."""
Told = Facts | Callable[[], Facts] | None
"""Facts, or what tells them: called only if anybody is going to see the span."""


class ChosenIds(RandomIdGenerator):
    """Hands the SDK the ids chosen for the span being started; per thread, as sync routes trace in threads."""

    def __init__(self) -> None:
        self._chosen = threading.local()

    def choose(self, trace_id: int = 0, span_id: int = 0) -> None:
        """Choose the ids of the next span that this thread starts; 0 leaves one to chance."""
        self._chosen.ids = (trace_id, span_id)

    def generate_trace_id(self) -> int:
        """Give the chosen trace id once."""
        trace_id, span_id = getattr(self._chosen, "ids", (0, 0))
        self._chosen.ids = (0, span_id)
        return trace_id or super().generate_trace_id()

    def generate_span_id(self) -> int:
        """Give the chosen span id once."""
        trace_id, span_id = getattr(self._chosen, "ids", (0, 0))
        self._chosen.ids = (trace_id, 0)
        return span_id or super().generate_span_id()


def error_type(error: BaseException | str) -> str:
    """Name an error for `error.type`: a code as it is, an exception by its class; messages may quote content."""
    if isinstance(error, str):
        return error
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


class TraceSpan(msgspec.Struct, eq=False):
    """A span that ends once; this one does nothing, so that callers never ask whether they are sampled."""

    started_ns: int
    """Unix time in nanoseconds; 0 when not recorded."""

    @property
    def recording(self) -> bool:
        """Whether attributes set now are kept."""
        return False

    @property
    def context(self) -> trace.SpanContext | None:
        """Trace id, span id and flags; None when not recorded or ended, or only noted."""
        return None

    @property
    def id(self) -> int:
        """The span id that calls made inside this span name as their parent; 0 when not recorded."""
        return 0

    def child(
        self,
        name: str,  # noqa: ARG002 - of this and what follows nothing is kept.
        kind: SpanKind = SpanKind.INTERNAL,  # noqa: ARG002
        attributes: Told = None,  # noqa: ARG002
        *,
        started_ns: int | None = None,  # noqa: ARG002
        span_id: int = 0,  # noqa: ARG002
    ) -> "TraceSpan":
        """Start a span below this one, now or at a Unix time in nanoseconds that has passed, with this id if not 0."""
        return NOT_RECORDED

    def set(self, name: str, value: AttributeValue) -> None:
        """Set one attribute."""

    def update(self, attributes: Facts) -> None:
        """Set several attributes."""

    def event(self, name: str, *, at_ns: int | None = None) -> None:
        """Add a point in time, by default now."""

    def then(self, tell: Callable[["TraceSpan"], None]) -> None:
        """Have the span told more, which is made only if anybody is going to see it."""

    def end(self, *, error: BaseException | str | None = None, ended_ns: int | None = None) -> None:
        """End the span; only the first call counts. An error is named by its type and its message is left out."""


NOT_RECORDED: Final = TraceSpan(0)


class BuiltSpan(TraceSpan):
    """A span of the SDK's; once it has ended it does nothing."""

    _tracer: Tracer | None
    _span: Span | None

    @property
    def recording(self) -> bool:
        """Whether attributes set now are kept."""
        return self._span is not None

    @property
    def context(self) -> trace.SpanContext | None:
        """Trace id, span id and flags; None once it has ended."""
        return None if self._span is None else self._span.get_span_context()

    @property
    def id(self) -> int:
        """The span's id; 0 once it has ended."""
        context = self.context
        return 0 if context is None else context.span_id

    def child(
        self,
        name: str,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Told = None,
        *,
        started_ns: int | None = None,
        span_id: int = 0,
    ) -> TraceSpan:
        """Start a span below this one."""
        if self._span is None or self._tracer is None:
            return NOT_RECORDED
        parent = trace.set_span_in_context(self._span, Context())
        return start_span(self._tracer, name, kind, attributes, parent, started_ns, span_id=span_id)

    def set(self, name: str, value: AttributeValue) -> None:
        """Set one attribute."""
        if self._span is not None:
            self._span.set_attribute(name, value)

    def update(self, attributes: Facts) -> None:
        """Set several attributes."""
        if self._span is not None:
            self._span.set_attributes(_present(attributes))

    def event(self, name: str, *, at_ns: int | None = None) -> None:
        """Add a point in time."""
        if self._span is not None:
            self._span.add_event(name, timestamp=at_ns)

    def then(self, tell: Callable[[TraceSpan], None]) -> None:
        """Have it told at once."""
        if self._span is not None:
            tell(self)

    def end(self, *, error: BaseException | str | None = None, ended_ns: int | None = None) -> None:
        """End it."""
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


MAX_NOTED: Final = 100
"""Spans noted below one: an answer has some eight."""


def start_span(
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    attributes: Told,
    parent: Context,
    started_ns: int | None = None,
    *,
    trace_id: int = 0,
    span_id: int = 0,
) -> TraceSpan:
    """Start a span under the span in `parent`, with the ids that are not 0; NOT_RECORDED when the SDK declines."""
    started = time_ns() if started_ns is None else started_ns
    ids = getattr(tracer, "id_generator", None)
    chosen = ids if isinstance(ids, ChosenIds) and (trace_id or span_id) else None
    try:
        if chosen is not None:
            chosen.choose(trace_id, span_id)
        facts = attributes() if callable(attributes) else attributes
        span = tracer.start_span(name, parent, kind, _present(facts or {}), start_time=started)
    except Exception:  # A sampler or span processor is foreign code and must not fail the request.
        logger.warning("a span could not be started and is lost", exc_info=True)
        return NOT_RECORDED
    finally:
        if chosen is not None:
            chosen.choose()  # One that was not asked for is not for somebody else's span.
    return BuiltSpan(started, tracer, span) if span.is_recording() else NOT_RECORDED


class NotedSpan(TraceSpan):
    """A span of a request that is not sampled: noted, and built only if the request turns out to be worth keeping."""

    _name: str
    _kind: SpanKind
    _attributes: Told
    _id: int = 0
    _children: tuple["NotedSpan", ...] = ()
    _told: tuple[Callable[[TraceSpan], None], ...] = ()
    _error: BaseException | str | None = None
    _ended_ns: int = 0

    @property
    def recording(self) -> bool:
        """Whether what is noted now is kept, if the span is."""
        return not self._ended_ns

    @property
    def id(self) -> int:
        """The id that this span will have, if it is ever built."""
        if not self._id:
            self._id = getrandbits(64) or 1
        return self._id

    def child(
        self,
        name: str,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Told = None,
        *,
        started_ns: int | None = None,
        span_id: int = 0,
    ) -> TraceSpan:
        """Note a span below this one."""
        children = self._children
        if self._ended_ns or len(children) >= MAX_NOTED:
            return NOT_RECORDED
        noted = NotedSpan(started_ns or time_ns(), name, kind, attributes, span_id)
        self._children = (*children, noted)
        return noted

    def set(self, name: str, value: AttributeValue) -> None:
        """Note one attribute."""
        self.update({name: value})

    def update(self, attributes: Facts) -> None:
        """Note several attributes."""
        self.then(partial(_update, attributes))

    def event(self, name: str, *, at_ns: int | None = None) -> None:
        """Note a point in time."""
        self.then(partial(_event, name, at_ns or time_ns()))

    def then(self, tell: Callable[[TraceSpan], None]) -> None:
        """Keep what could be told for when it is."""
        if not self._ended_ns:
            self._told = (*self._told, tell)

    def end(self, *, error: BaseException | str | None = None, ended_ns: int | None = None) -> None:
        """Note the end; only the first call counts."""
        if not self._ended_ns:
            if error is not None:
                self._error = error_type(error)  # An exception would keep its frames alive.
            self._ended_ns = ended_ns or time_ns()

    def replay(self, span: TraceSpan) -> None:
        """Have `span` tell what was noted of this one, and of those below."""
        for tell in self._told:
            tell(span)
        for child in self._children:
            child.replay_under(span)

    def replay_under(self, parent: TraceSpan) -> None:
        """Build this span below `parent`, from its start to its end as noted."""
        span = parent.child(self._name, self._kind, self._attributes, started_ns=self.started_ns, span_id=self._id)
        self.replay(span)
        span.end(error=self._error, ended_ns=self._ended_ns or None)


def _update(attributes: Facts, span: TraceSpan) -> None:
    span.update(attributes)


def _event(name: str, at_ns: int, span: TraceSpan) -> None:
    span.event(name, at_ns=at_ns)


def _present(attributes: Facts) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}
