"""Where telemetry goes: the SDK's providers, as OpenTelemetry's own variables configure them.

What has ended waits in a bounded queue that a thread exports: a collector that is down, slow or hanging costs spans and
events, the oldest first, and never a request.
"""

import logging
import re
import threading
from collections.abc import Callable, Mapping
from os import environ  # noqa: TID251 - OTEL_* belongs to OpenTelemetry, whose SDK reads the same variables.
from time import monotonic
from typing import Any, Final, Protocol, TypeVar

from opentelemetry.context import Context
from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_OFF,
    Decision,
    ParentBased,
    ParentBasedTraceIdRatio,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.semconv.attributes import service_attributes, url_attributes
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import NonRecordingSpan, SpanKind, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue

from observability.spans import ChosenIds, start_span

E = TypeVar("E")
P = TypeVar("P")

logger = logging.getLogger(__name__)

REDACTED: Final = "REDACTED"
_TRACE_ID_LIMIT: Final = TraceIdRatioBased.TRACE_ID_LIMIT
_ARGUMENTS: Final = re.compile(r"\b(max_queue_size|max_export_batch_size|schedule_delay)(?:_millis)?\b")
"""What the SDK calls in its errors what a variable says."""


class ExporterMisconfigured(ValueError):
    """An OTEL_* variable asks for what is not exported, or not so; the message names it and the fix."""


class _Closable(Protocol):
    def shutdown(self) -> None: ...


class Exporting:
    """The providers, of which each is None where its signal is not exported."""

    def __init__(
        self,
        *,
        service_name: str,
        service_version: str,
        instance_id: str | None = None,
        span_processor: SpanProcessor | None = None,
        metric_reader: MetricReader | None = None,
        event_processor: LogRecordProcessor | None = None,
        keep_failures: bool = True,
    ) -> None:
        """The processors and the reader replace the OTLP exporters of the environment.

        With `keep_failures` a server span that the sampler left out is exported if it ends as an error.

        Raises:
            ExporterMisconfigured: an OTEL_* variable asks for an exporter, protocol or queue that is not supported.
        """
        resource = _resource(service_name, service_version, instance_id)
        self.tracing: TracerProvider | None = None
        # It decides about requests; the provider's own also notes what this leaves out.
        self._sampler: Sampler = ALWAYS_OFF
        self._bound: int | None = None
        self.keeping: TracerProvider | None = None
        """Makes the spans of requests that are kept whatever the sampler said; None where it leaves out none, or all:
        who turns tracing off means it."""
        self.metering: MeterProvider | None = None
        self.events: LoggerProvider | None = None
        self._exporters: list[_Closable] = []
        if span_processor or wants_export("TRACES"):
            self._trace(resource, span_processor or self._spans_over_otlp(), keep_failures=keep_failures)
        if metric_reader or wants_export("METRICS"):
            readers = [metric_reader or self._metrics_over_otlp()]
            # Closing is ours, with a deadline: the SDK's own exit handlers may wait for half a minute.
            self.metering = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)
        if event_processor or wants_export("LOGS"):
            self.events = LoggerProvider(resource, shutdown_on_exit=False)
            self.events.add_log_record_processor(event_processor or self._events_over_otlp())

    def samples(self, parent: Context, trace_id: int, name: str) -> bool:
        """Whether a request is exported however it ends; `parent` is empty where it begins the trace."""
        if not parent and self._bound is not None:
            return trace_id & _TRACE_ID_LIMIT < self._bound
        decided = self._sampler.should_sample(parent, trace_id, name, SpanKind.SERVER)
        return decided.decision is Decision.RECORD_AND_SAMPLE

    def close(self, deadline_seconds: float) -> None:
        """Export what is queued, for at most the deadline; what is still queued then is lost and logged."""
        ends = monotonic() + deadline_seconds
        closing = [
            # The SDK's shutdowns take no deadline, so they run in threads that can be left behind.
            threading.Thread(target=shut_down, name="telemetry-close", daemon=True)
            for shut_down in self._shutdowns(deadline_seconds)
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(max(0.0, ends - monotonic()))
        if any(thread.is_alive() for thread in closing):
            logger.warning("the collector did not take the last telemetry within %.1f s: it is lost", deadline_seconds)
            for exporter in self._exporters:
                exporter.shutdown()  # Wakes an export that is waiting to try again.

    def _shutdowns(self, deadline_seconds: float) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        if self.tracing is not None:
            found.append(self.tracing.shutdown)  # The processor that both tracer providers have.
        if (metering := self.metering) is not None:
            found.append(lambda: metering.shutdown(timeout_millis=deadline_seconds * 1000))
        if self.events is not None:
            found.append(self.events.shutdown)
        return found

    def _trace(self, resource: Resource, processor: SpanProcessor, *, keep_failures: bool) -> None:
        ids = ChosenIds()
        self.tracing = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
        self.tracing.add_span_processor(_WithoutQuery())
        self.tracing.add_span_processor(processor)
        self._sampler = self.tracing.sampler
        self._bound = _bound_of(self._sampler)
        if self._sampler in (ALWAYS_ON, ALWAYS_OFF, DEFAULT_OFF):
            return
        self.keeping = TracerProvider(ALWAYS_ON, resource, id_generator=ids, shutdown_on_exit=False)
        self.keeping.add_span_processor(processor)
        if keep_failures:
            self.tracing.sampler = _Noting(self._sampler)
            self.tracing.add_span_processor(_KeepFailures(self.keeping))

    def _spans_over_otlp(self) -> SpanProcessor:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        self._exporters.append(exporter := OTLPSpanExporter())
        return _batching(BatchSpanProcessor, exporter, "OTEL_BSP")

    def _metrics_over_otlp(self) -> MetricReader:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        return PeriodicExportingMetricReader(OTLPMetricExporter())

    def _events_over_otlp(self) -> LogRecordProcessor:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

        self._exporters.append(exporter := OTLPLogExporter())
        return _batching(BatchLogRecordProcessor, exporter, "OTEL_BLRP")


def _batching(processor: Callable[[E], P], exporter: E, variables: str) -> P:
    """Put the SDK's queue in front of an exporter; its own error names arguments, for which nobody here asked."""
    try:
        return processor(exporter)
    except ValueError as error:
        said = _ARGUMENTS.sub(lambda found: f"{variables}_{found[1].upper()}", str(error))
        raise ExporterMisconfigured(f"{said} Unset, a batch is of 512, and the queue of 2048.") from error


def _bound_of(sampler: Sampler) -> int | None:
    """What a sampler of the SDK's that goes by trace ids compares them with: to ask it takes ten calls a request."""
    if type(sampler) in (ParentBased, ParentBasedTraceIdRatio):
        sampler = sampler._root  # type: ignore[attr-defined] # noqa: SLF001 - it tells in no other way.
    return sampler.bound if type(sampler) is TraceIdRatioBased else None


class _WithoutQuery(SpanProcessor):
    """Takes out what FastAPI's server span quotes of a query: what callers filter by, and the signatures of links."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002 - the SDK's signature.
        if span.attributes and url_attributes.URL_QUERY in span.attributes:
            span.set_attribute(url_attributes.URL_QUERY, REDACTED)


class _Noting(Sampler):
    """Has the server spans that another sampler leaves out recorded, but not exported."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        *args: Any,
    ) -> SamplingResult:
        """Decide as the other does, but for what is left out."""
        decided = self._sampler.should_sample(parent_context, trace_id, name, kind, attributes, *args)
        if decided.decision is Decision.DROP and kind is SpanKind.SERVER:
            return SamplingResult(Decision.RECORD_ONLY, attributes, decided.trace_state)
        return decided

    def get_description(self) -> str:
        """Name the sampler that decides."""
        return self._sampler.get_description()


class _KeepFailures(SpanProcessor):
    """Exports a server span that was not sampled if it has ended as an error: FastAPI's, of an ordinary route."""

    def __init__(self, keeping: TracerProvider) -> None:
        self._tracer = keeping.get_tracer("hallmark")

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        if context is None or context.trace_flags.sampled or span.status.status_code is not StatusCode.ERROR:
            return
        parent = Context() if span.parent is None else set_span_in_context(NonRecordingSpan(span.parent), Context())
        ids = {"trace_id": context.trace_id, "span_id": context.span_id}
        kept = start_span(self._tracer, span.name, span.kind, span.attributes, parent, span.start_time, **ids)
        # Its `error.type` is among the attributes, and says more than that there was one.
        error = str((span.attributes or {}).get(ERROR_TYPE, "_OTHER"))
        kept.end(error=error, ended_ns=span.end_time)


def wants_export(signal: str) -> bool:
    """Whether OTEL_* asks for this signal ("TRACES", "METRICS", "LOGS") over OTLP/HTTP.

    Metrics are sent only where they are asked for by name: Prometheus has them at `/metrics`, and saying them twice
    costs a request more than the rest of its telemetry together.

    Raises:
        ExporterMisconfigured: another exporter or protocol is asked for.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    own_endpoint = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    unasked = "none" if signal == "METRICS" and not own_endpoint else "otlp"
    exporter = (environ.get(f"OTEL_{signal}_EXPORTER") or unasked).strip().lower()
    endpoint = own_endpoint or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if exporter == "none" or not endpoint:
        return False
    if exporter != "otlp":
        raise ExporterMisconfigured(f"OTEL_{signal}_EXPORTER={exporter!r} is not supported: use 'otlp' or 'none'")
    for name in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := environ.get(name):
            if protocol != "http/protobuf":
                raise ExporterMisconfigured(f"{name}={protocol!r} is not supported: set it to 'http/protobuf'")
            break
    return True


def _resource(service_name: str, service_version: str, instance_id: str | None) -> Resource:
    described = {service_attributes.SERVICE_NAME: service_name, service_attributes.SERVICE_VERSION: service_version}
    if instance_id is not None:
        described["service.instance.id"] = instance_id
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the names given here.
    return Resource.create(described).merge(OTELResourceDetector().detect())
