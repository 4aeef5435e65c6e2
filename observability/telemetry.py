"""Tracing for the process: built once by the composition root, configured by OpenTelemetry's own variables.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or its `_TRACES_`/`_METRICS_` form) turns exporting on; without it there is no provider,
no thread and no span. `OTEL_TRACES_SAMPLER`, `_HEADERS`, `_TIMEOUT`, `OTEL_BSP_*`, `OTEL_SERVICE_NAME`,
`OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SDK_DISABLED` are read by the SDK. Finished spans wait in a bounded queue that one
thread exports: a collector that is down or slow costs spans, never a request.

FastAPI makes the server span of every ordinary route from these providers. The chat route is answered in front of
FastAPI and `Telemetry.begin` makes the same span for it, under the same names, but decides before it builds.
"""

import asyncio
import logging
import threading
from collections.abc import Mapping
from os import environ  # noqa: TID251 - OTEL_* belongs to OpenTelemetry, whose SDK reads the same variables.
from random import getrandbits
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.semconv.attributes import (
    http_attributes,
    network_attributes,
    server_attributes,
    service_attributes,
    url_attributes,
)
from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from observability.traces import NOT_RECORDED, Measure, RequestTrace, TraceSpan, start_span

logger = logging.getLogger(__name__)

# https://opentelemetry.io/docs/specs/semconv/http/http-metrics/#metric-httpserverrequestduration
_DURATION_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_ROOT = Context()
_PROPAGATOR = TraceContextTextMapPropagator()


class ExporterMisconfigured(ValueError):
    """An OTEL_* variable asks for what this service does not export; the message names it and the fix."""


class _ChosenIds(RandomIdGenerator):
    """Hands the SDK the trace id that `begin` has already sampled; per thread, as sync routes trace in threads."""

    def __init__(self) -> None:
        self._chosen = threading.local()

    def choose(self, trace_id: int) -> None:
        self._chosen.trace_id = trace_id

    def generate_trace_id(self) -> int:
        chosen: int = getattr(self._chosen, "trace_id", 0)
        self._chosen.trace_id = 0
        return chosen or super().generate_trace_id()


def _wants_export(signal: str) -> bool:
    """Whether OTEL_* asks for this signal ("TRACES", "METRICS") over OTLP/HTTP.

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


class Telemetry:
    """The process's tracer and meter providers, and the trace of each hot-lane request."""

    def __init__(
        self,
        *,
        service_version: str,
        service_name: str = "hallmark",
        instance_id: str | None = None,
        span_processor: SpanProcessor | None = None,
        metric_reader: MetricReader | None = None,
    ) -> None:
        """`span_processor` and `metric_reader` replace the OTLP exporters of the environment.

        OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the names given here.

        Raises:
            ExporterMisconfigured: an OTEL_* variable asks for an exporter or protocol that is not supported.
        """
        described = {service_attributes.SERVICE_NAME: service_name, service_attributes.SERVICE_VERSION: service_version}
        if instance_id is not None:
            described["service.instance.id"] = instance_id
        resource = Resource.create(described).merge(OTELResourceDetector().detect())

        self._exporter: SpanExporter | None = None
        if span_processor is None and _wants_export("TRACES"):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            self._exporter = OTLPSpanExporter()
            span_processor = BatchSpanProcessor(self._exporter)
        if metric_reader is None and _wants_export("METRICS"):
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

            metric_reader = PeriodicExportingMetricReader(OTLPMetricExporter())

        self._ids = _ChosenIds()
        self._tracing: TracerProvider | None = None
        self._tracer: trace.Tracer | None = None
        if span_processor is not None:
            # Shutdown is ours, with a deadline: the SDK's own exit handler may wait for half a minute.
            self._tracing = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
            self._tracing.add_span_processor(span_processor)
            self._tracer = self._tracing.get_tracer("hallmark", service_version)
        self._metering = (
            None
            if metric_reader is None
            else MeterProvider(metric_readers=[metric_reader], resource=resource, shutdown_on_exit=False)
        )
        self._durations = (
            None
            if self._metering is None
            else self._metering.get_meter("hallmark", service_version).create_histogram(
                HTTP_SERVER_REQUEST_DURATION,
                unit="s",
                description="Duration of HTTP server requests.",
                explicit_bucket_boundaries_advisory=_DURATION_SECONDS,
            )
        )

    @property
    def tracer_provider(self) -> trace.TracerProvider:
        """For `FastAPI(telemetry=...)`; the no-op provider, which FastAPI skips entirely, when nothing is exported."""
        return self._tracing or trace.NoOpTracerProvider()

    @property
    def meter_provider(self) -> metrics.MeterProvider:
        """For `FastAPI(telemetry=...)`; the no-op provider when nothing is exported."""
        return self._metering or metrics.NoOpMeterProvider()

    def begin(
        self,
        traceparent: bytes | None = None,
        *,
        route: str,
        method: str = "POST",
        scope: Mapping[str, Any] | None = None,
    ) -> RequestTrace:
        """Begin a request's trace, joining the caller's when `traceparent` is a valid W3C header.

        `route` is the template, never the path. The ASGI `scope` is read only when the request is sampled.
        """
        if traceparent is not None:
            parent = _PROPAGATOR.extract({"traceparent": traceparent.decode("latin-1")}, Context())
            caller = trace.get_current_span(parent).get_span_context()
            if caller.is_valid:
                return self._join(parent, caller, route, method, scope)
        trace_id = getrandbits(128) or 1
        server = NOT_RECORDED
        if self._tracer is not None and self._samples(_ROOT, trace_id, f"{method} {route}"):
            self._ids.choose(trace_id)
            server = self._serve(self._tracer, _ROOT, route, method, scope)
        return RequestTrace(f"{trace_id:032x}", server, measure=self._measure(route, method, scope))

    def current(self) -> RequestTrace:
        """The trace of the request FastAPI is serving in this context; FastAPI ends its span itself."""
        span = trace.get_current_span()
        context = span.get_span_context()
        if not context.is_valid:
            return RequestTrace(f"{getrandbits(128) or 1:032x}")
        server = TraceSpan(self._tracer, span) if span.is_recording() else NOT_RECORDED
        return RequestTrace(
            f"{context.trace_id:032x}",
            server,
            span_id=f"{context.span_id:016x}",
            flags=context.trace_flags,
            owned=False,
        )

    async def aclose(self, deadline_seconds: float = 5.0) -> None:
        """Export what is queued, for at most the deadline; spans still queued then are lost and logged."""
        await asyncio.to_thread(self.close, deadline_seconds)

    def close(self, deadline_seconds: float = 5.0) -> None:
        """Do as `aclose` does, blocking."""
        # The SDK's shutdown takes no deadline, so it runs in a thread that can be left behind.
        closing = threading.Thread(
            target=self._shut_down, args=(deadline_seconds,), name="telemetry-close", daemon=True
        )
        closing.start()
        closing.join(deadline_seconds)
        if closing.is_alive():
            logger.warning("the collector did not take the last spans within %.1f s: they are lost", deadline_seconds)
            if self._exporter is not None:
                self._exporter.shutdown()  # Wakes an export that is waiting to try again.

    def _shut_down(self, deadline_seconds: float) -> None:
        if self._tracing is not None:
            self._tracing.shutdown()
        if self._metering is not None:
            self._metering.shutdown(timeout_millis=deadline_seconds * 1000)

    def _samples(self, parent: Context, trace_id: int, name: str) -> bool:
        assert self._tracing is not None
        decided = self._tracing.sampler.should_sample(parent, trace_id, name, SpanKind.SERVER)
        return decided.decision is Decision.RECORD_AND_SAMPLE

    def _join(
        self, parent: Context, caller: trace.SpanContext, route: str, method: str, scope: Mapping[str, Any] | None
    ) -> RequestTrace:
        trace_id, span_id = f"{caller.trace_id:032x}", f"{caller.span_id:016x}"
        measure = self._measure(route, method, scope)
        if self._tracer is None:
            # Nothing is exported here: the engine's spans, if any, hang below the caller's.
            return RequestTrace(trace_id, span_id=span_id, flags=caller.trace_flags, measure=measure)
        server = NOT_RECORDED
        if self._samples(parent, caller.trace_id, f"{method} {route}"):
            server = self._serve(self._tracer, parent, route, method, scope)
        return RequestTrace(trace_id, server, span_id=span_id, measure=measure)

    def _measure(self, route: str, method: str, scope: Mapping[str, Any] | None) -> Measure | None:
        if self._durations is None:
            return None
        scope = scope or {}
        attributes = {
            http_attributes.HTTP_REQUEST_METHOD: method,
            http_attributes.HTTP_ROUTE: route,
            url_attributes.URL_SCHEME: scope.get("scheme", "http"),
        }
        if version := scope.get("http_version"):
            attributes[network_attributes.NETWORK_PROTOCOL_VERSION] = version
        return Measure(self._durations, attributes)

    @staticmethod
    def _serve(
        tracer: trace.Tracer, parent: Context, route: str, method: str, scope: Mapping[str, Any] | None
    ) -> TraceSpan:
        attributes = _request_attributes(scope or {})
        attributes[http_attributes.HTTP_REQUEST_METHOD] = method
        attributes[http_attributes.HTTP_ROUTE] = route
        return start_span(tracer, f"{method} {route}", SpanKind.SERVER, attributes, parent)


def _request_attributes(scope: Mapping[str, Any]) -> dict[str, str | int]:
    """What FastAPI's own server span says of the connection: scheme, path, protocol version, server address."""
    found: dict[str, str | int] = {url_attributes.URL_SCHEME: scope.get("scheme", "http")}
    if path := scope.get("path"):
        found[url_attributes.URL_PATH] = path
    if version := scope.get("http_version"):
        found[network_attributes.NETWORK_PROTOCOL_VERSION] = version
    found |= _server(scope)
    return found


def _server(scope: Mapping[str, Any]) -> dict[str, str | int]:
    host = next((value for name, value in scope.get("headers", ()) if name == b"host"), None)
    if host is None:
        address, port = scope.get("server") or (None, None)
    else:
        try:
            url = urlsplit("//" + host.decode("latin-1"))
            address, port = url.hostname, url.port
        except ValueError:
            return {}  # A malformed Host header is the client's affair.
    if not address:
        return {}
    standard = 443 if scope.get("scheme") == "https" else 80
    return {server_attributes.SERVER_ADDRESS: address, server_attributes.SERVER_PORT: port or standard}
