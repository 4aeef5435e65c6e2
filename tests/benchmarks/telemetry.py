"""What telemetry costs one request, against doing nothing, in the same run.

A request here is what the chat route does: begin a trace, eight spans, the metrics of one answer, one access line. Each
row is the median over rounds, which interleave the rows so that a noisy neighbour
hits all of them. CPU is the process's, so the log writer's and the exporter's threads are counted, not only the caller.

    python tests/benchmarks/telemetry.py [--requests 5000] [--rounds 7]

The last line is JSON.
"""

import argparse
import io
import json
import logging
import logging.handlers
import os
import platform
import queue
import statistics
import time
from collections.abc import Callable
from functools import partial

from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from observability import genai, logs
from observability.metrics import Metrics
from observability.telemetry import Telemetry
from observability.traces import RequestTrace

ROUTE = "/v1/chat/completions"
CALLER = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
SCOPE = {
    "http_version": "1.1",
    "scheme": "http",
    "path": ROUTE,
    "headers": [(b"host", b"127.0.0.1:8080"), (b"content-type", b"application/json")],
}


class Discard(SpanExporter):
    """Takes spans at no cost of its own: what is measured is building and queueing them."""

    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class JSONFormatter(logging.Formatter):
    """What a stdlib JSON log line costs at least."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"time": record.created, "level": record.levelname, "message": record.getMessage()})


def traced(telemetry: Telemetry, caller: bytes | None = None) -> Callable[[], RequestTrace]:
    def request() -> RequestTrace:
        trace = telemetry.begin(caller, route=ROUTE, scope=SCOPE)
        search = genai.start_retrieval(trace, collection="hallmark", mode="hybrid", top_k=5)
        genai.end_retrieval(
            trace,
            search,
            seconds=0.004,
            collection="hallmark",
            hits=5,
            index_version="iv",
            outcome="used",
            embedding_model="minilm",
            embed_seconds=0.001,
            search_seconds=0.002,
        )
        facts = {"provider": "tgi", "release": "hallmark@1", "max_tokens": 64, "stream": True}
        told = partial(genai.generation_facts, model="m", prediction_id="p", **facts)
        span = genai.start_generation(trace, model="m", prediction_id="p", tell=told)
        _ = trace.traceparent_under(span)
        first_token_ns = time.time_ns()
        genai.end_generation(
            span, first_token_ns=first_token_ns, prompt_tokens=100, completion_tokens=20, finish_reason="stop"
        )
        if trace.conventions.record is not None:
            genai.count_generation(
                trace, model="m", provider="tgi", seconds=0.4, prompt_tokens=100, completion_tokens=20
            )
        genai.end_check(genai.start_check(trace, mode="sentence"), seconds=0.001, citations=("supported",))
        for step in ("opening", "closing"):
            genai.start_record(trace, step=step).end()
        trace.end(200)
        return trace

    return request


def counted(metrics: Metrics) -> Callable[[], None]:
    def request() -> None:
        metrics.answer(
            route=ROUTE,
            release="hallmark@1",
            status=200,
            outcome="finished",
            seconds=0.5,
            engine_seconds=0.45,
            retrieval_seconds=0.02,
            embed_seconds=0.01,
            first_token_seconds=0.1,
            prompt_tokens=100,
            completion_tokens=20,
        )

    return request


def logged(log: logs.Log) -> Callable[[], None]:
    def request() -> None:
        log.access(
            "POST",
            ROUTE,
            200,
            0.5,
            trace_id="a" * 32,
            prediction_id="0199f1e4-7b5c-7000-8000-000000000000",
            release="hallmark@1",
            tenant="acme",
            outcome="finished",
            prompt_tokens=100,
            completion_tokens=20,
        )

    return request


def queue_listener_logger() -> tuple[Callable[[], None], Callable[[], None]]:
    """The stdlib way of writing a line off the loop, for comparison."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(1_000_000)
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(JSONFormatter())
    listener = logging.handlers.QueueListener(lines, handler)
    listener.start()
    logger = logging.getLogger("benchmark")
    logger.propagate = False
    logger.addHandler(logging.handlers.QueueHandler(lines))
    return lambda: logger.info("request %s %s %d", "POST", ROUTE, 200), listener.stop


def cpu_microseconds(request: Callable[[], object], requests: int) -> float:
    """CPU microseconds of the whole process per call, with a pause at the end for what threads have left to do."""
    started = time.process_time()
    for _ in range(requests):
        request()
    time.sleep(0.05)
    return (time.process_time() - started) / requests * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    os.environ.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
    os.environ |= {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_BSP_MAX_QUEUE_SIZE": "100000"}

    def telemetry(ratio: str, *, metered: bool = False) -> Telemetry:
        os.environ["OTEL_TRACES_SAMPLER_ARG"] = ratio
        reader = InMemoryMetricReader() if metered else None
        return Telemetry(service_version="1", span_processor=BatchSpanProcessor(Discard()), metric_reader=reader)

    off, unsampled, sampled = Telemetry(service_version="1"), telemetry("0"), telemetry("1")
    metered, one_percent = telemetry("0", metered=True), telemetry("0.01")
    os.environ["OTEL_TRACES_SAMPLER"] = "always_off"
    never = telemetry("0")
    metrics = Metrics(version="1")
    log = logs.configure("INFO", "json", stream=io.BytesIO(), max_lines=1_000_000)
    stdlib, stop_stdlib = queue_listener_logger()
    everything = [traced(one_percent), counted(metrics), logged(log)]

    rows: dict[str, Callable[[], object]] = {
        "baseline: an empty call": lambda: None,
        "trace, nothing exported": traced(off),
        "trace, nothing kept (always_off)": traced(never),
        "trace, unsampled, kept if it fails": traced(unsampled),
        "trace, unsampled, caller's traceparent joined": traced(unsampled, CALLER),
        "trace, unsampled, OTLP metrics on": traced(metered),
        "trace, 1 % sampled": traced(one_percent),
        "trace, sampled: 8 spans": traced(sampled),
        "metrics of one answer": counted(metrics),
        "access line": logged(log),
        "stdlib QueueHandler line, for comparison": stdlib,
        "all: 1 % sampled, metrics, access line": lambda: [part() for part in everything],
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, request in rows.items():
            found[name].append(cpu_microseconds(request, arguments.requests))
    stop_stdlib()
    log.close()
    for closing in (unsampled, sampled, metered, one_percent, never):
        closing.close()

    print(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
        f"{arguments.requests} requests x {arguments.rounds} rounds; CPU us per request of the whole process"
    )
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, median in medians.items():
        print(f"{median:8.2f}  (least {min(found[name]):.2f}, most {max(found[name]):.2f})  {name}")
    print(json.dumps({"cpu_microseconds": {name: round(median, 2) for name, median in medians.items()}}))


if __name__ == "__main__":
    main()
