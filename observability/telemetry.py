"""Tracing for the process: built once by the composition root, configured by OpenTelemetry's own variables.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or its `_TRACES_`/`_METRICS_`/`_LOGS_` form) turns exporting on; without it there is no
provider, no thread and no span. `OTEL_TRACES_SAMPLER`, `_HEADERS`, `_TIMEOUT`, `OTEL_BSP_*`, `OTEL_BLRP_*`,
`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SDK_DISABLED` are read by the SDK.

FastAPI makes the server span of every ordinary route from these providers. The chat route is answered in front of
FastAPI and `Telemetry.begin` makes the same span for it, under the same names, but decides before it builds. What the
sampler leaves out is exported all the same if the request fails or is answered by a canary.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from random import getrandbits
from time import time_ns
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.sdk._logs import LogRecordProcessor
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.semconv.attributes import http_attributes, network_attributes, server_attributes, url_attributes
from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from observability.exporting import Exporting
from observability.genai import Evaluation
from observability.genai_metrics import Instruments
from observability.spans import NOT_RECORDED, Attributes, BuiltSpan, NotedSpan, TraceSpan, start_span
from observability.traces import Conventions, Late, Measure, Profile, RequestTrace

# https://opentelemetry.io/docs/specs/semconv/http/http-metrics/#metric-httpserverrequestduration
_DURATION_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_ROOT = Context()
_SERVER = SpanKind.SERVER
_PROPAGATOR = TraceContextTextMapPropagator()


class Telemetry:
    """The process's providers, and the trace of each hot-lane request."""

    def __init__(
        self,
        *,
        service_version: str,
        service_name: str = "hallmark",
        instance_id: str | None = None,
        profile: Profile = "1.37",
        keep_failures: bool = True,
        span_processor: SpanProcessor | None = None,
        metric_reader: MetricReader | None = None,
        event_processor: LogRecordProcessor | None = None,
    ) -> None:
        """The processors and the reader replace the OTLP exporters of the environment.

        `keep_failures` has requests that failed exported although the sampler left them out, as those of a canary are
        in any case. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the names given here.

        Raises:
            ExporterMisconfigured: an OTEL_* variable asks for an exporter, protocol or queue that is not supported.
        """
        self._export = Exporting(
            service_name=service_name,
            service_version=service_version,
            instance_id=instance_id,
            span_processor=span_processor,
            metric_reader=metric_reader,
            event_processor=event_processor,
            keep_failures=keep_failures,
        )
        tracing, keeping, metering = self._export.tracing, self._export.keeping, self._export.metering
        scope = "hallmark", service_version
        self._tracer = None if tracing is None else tracing.get_tracer(*scope)
        self._keeps_failures = keep_failures
        self._keeper = None if keeping is None else keeping.get_tracer(*scope)
        self._events = None if self._export.events is None else self._export.events.get_logger(*scope)
        meter = None if metering is None else metering.get_meter(*scope)
        self._durations = (
            None
            if meter is None
            else meter.create_histogram(
                HTTP_SERVER_REQUEST_DURATION,
                unit="s",
                description="Duration of HTTP server requests.",
                explicit_bucket_boundaries_advisory=_DURATION_SECONDS,
            )
        )
        self._conventions = Conventions(profile, None if meter is None else Instruments(meter, profile).record)

    @property
    def tracer_provider(self) -> trace.TracerProvider:
        """For `FastAPI(telemetry=...)`; the no-op provider, which FastAPI skips entirely, when nothing is exported."""
        return self._export.tracing or trace.NoOpTracerProvider()

    @property
    def meter_provider(self) -> metrics.MeterProvider:
        """For `FastAPI(telemetry=...)`; the no-op provider when nothing is exported."""
        return self._export.metering or metrics.NoOpMeterProvider()

    @property
    def tells_evaluations(self) -> bool:
        """Whether events are exported."""
        return self._events is not None

    def evaluated(self, evaluation: Evaluation) -> None:
        """Tell what somebody said of an answer; does not wait."""
        if self._events is not None:
            evaluation.emit(self._events)

    def begin(
        self,
        traceparent: bytes | None = None,
        *,
        route: str,
        method: str = "POST",
        scope: Mapping[str, Any] | None = None,
    ) -> RequestTrace:
        """Begin a request's trace, joining the caller's when `traceparent` is a valid W3C header.

        `route` is the template, never the path. The ASGI `scope` is read only when the request is exported.
        """
        parent, trace_id, span_id, flags = _ROOT, 0, "", 0
        if traceparent is not None:
            extracted = _PROPAGATOR.extract({"traceparent": traceparent.decode("latin-1")}, Context())
            caller = trace.get_current_span(extracted).get_span_context()
            if caller.is_valid:
                parent, trace_id, span_id = extracted, caller.trace_id, f"{caller.span_id:016x}"
                # Where nothing is exported the engine's spans, if any, hang below the caller's.
                flags = caller.trace_flags if self._tracer is None else 0
        trace_id = trace_id or getrandbits(128) or 1
        server, late = self._serve(parent, trace_id, route, method, scope)
        return RequestTrace(
            f"{trace_id:032x}",
            server,
            span_id=span_id,
            flags=flags,
            measure=self._measure(route, method, scope),
            late=late,
            conventions=self._conventions,
        )

    def current(self) -> RequestTrace:
        """The trace of the request FastAPI is serving in this context; FastAPI ends its span itself."""
        span = trace.get_current_span()
        context = span.get_span_context()
        if not context.is_valid:
            return RequestTrace(f"{getrandbits(128) or 1:032x}", conventions=self._conventions)
        # One that is recorded in case it fails has no spans below it.
        is_exported = span.is_recording() and context.trace_flags.sampled
        server = BuiltSpan(0, self._tracer, span) if is_exported else NOT_RECORDED
        return RequestTrace(
            f"{context.trace_id:032x}",
            server,
            span_id=f"{context.span_id:016x}",
            flags=context.trace_flags,
            owned=False,
            conventions=self._conventions,
        )

    async def aclose(self, deadline_seconds: float = 5.0) -> None:
        """Export what is queued, for at most the deadline; what is still queued then is lost and logged."""
        await asyncio.to_thread(self.close, deadline_seconds)

    def close(self, deadline_seconds: float = 5.0) -> None:
        """Do as `aclose` does, blocking."""
        self._export.close(deadline_seconds)

    def _serve(
        self, parent: Context, trace_id: int, route: str, method: str, scope: Mapping[str, Any] | None
    ) -> tuple[TraceSpan, Late | None]:
        """Start the server span if the request is sampled; note it if it would be exported for having failed."""
        if self._tracer is None:
            return NOT_RECORDED, None
        name = f"{method} {route}"
        if self._export.samples(parent, trace_id, name):
            told = _request_attributes(scope, route, method)
            return start_span(self._tracer, name, _SERVER, told, parent, trace_id=trace_id), None
        if self._keeper is None:
            return NOT_RECORDED, None
        started_ns = time_ns()
        late = Late(self._keeper, parent, started_ns, name, partial(_request_attributes, scope, route, method))
        return NotedSpan(started_ns, name, _SERVER, None) if self._keeps_failures else NOT_RECORDED, late

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


def _request_attributes(scope: Mapping[str, Any] | None, route: str, method: str) -> Attributes:
    """What FastAPI's own server span says of a request: method, route, scheme, path, protocol version, address."""
    scope = scope or {}
    found: dict[str, str | int] = {
        http_attributes.HTTP_REQUEST_METHOD: method,
        http_attributes.HTTP_ROUTE: route,
        url_attributes.URL_SCHEME: scope.get("scheme", "http"),
    }
    if path := scope.get("path"):
        found[url_attributes.URL_PATH] = path
    if version := scope.get("http_version"):
        found[network_attributes.NETWORK_PROTOCOL_VERSION] = version
    return found | _server(scope)


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
