"""Every `hallmark_*` metric, in a registry of its own, rendered for Prometheus.

Seconds, bytes and counts only. A label's values are few and ours: route templates, statuses, outcomes, releases; never
a path, a model name a caller sent, a tenant or a document. One request is one call, which finds its children in a
dictionary: looking labels up in the library costs more than counting, and so do the library's histogram and counter,
which take locks. docs/telemetry.md lists every name.
"""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector

from observability.collectors import (
    AlertStates,
    AlertTally,
    Count,
    Drifts,
    DriftSample,
    Engines,
    GroupSample,
    IngestionQueue,
    LoopCounter,
    LoopHistogram,
    Observed,
    Outbox,
    Qualities,
    QualitySample,
    Timings,
)

REQUEST_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STAGE_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
WAIT_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
OVERHEAD_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
MAX_RELEASES: Final = 100
"""Releases with a label of their own; later ones are counted together as `other`."""


class _Answers:
    """The children of one route and release, and of each way its requests ended."""

    __slots__ = (
        "_labels",
        "_outcomes",
        "_requests",
        "completion",
        "engine",
        "first_token",
        "overhead",
        "prompt",
        "seconds",
    )

    def __init__(self, metrics: "Metrics", route: str, release: str) -> None:
        self.seconds = metrics.request_seconds.labels(route)
        self.overhead = metrics.overhead_seconds.labels(route)
        self.engine = metrics.engine_seconds.labels(release)
        self.first_token = metrics.first_token_seconds.labels(release)
        self.prompt = metrics.tokens.labels(release, "prompt")
        self.completion = metrics.tokens.labels(release, "completion")
        self._requests = metrics.requests
        self._labels = route, release
        self._outcomes: dict[tuple[int, str], Count] = {}

    def outcome(self, status: int, outcome: str) -> Count:
        found = self._outcomes.get((status, outcome))
        if found is None:
            route, release = self._labels
            found = self._outcomes[status, outcome] = self._requests.labels(route, str(status), outcome, release)
        return found


class Metrics:
    """The service's counters and histograms.

    `request`, `answer` and `ingested` belong to the event loop's thread; the others are safe to use from any.
    """

    def __init__(self, *, version: str, process: bool = True) -> None:
        """`process` adds the standard `process_*` metrics (CPU, memory, open files)."""
        self.registry = CollectorRegistry()
        self._observed = Observed()
        self.registry.register(self._observed)
        if process:
            ProcessCollector(registry=self.registry)
        self._answers: dict[tuple[str, str], _Answers] = {}
        self._ordinary: dict[tuple[str, int], tuple[Count, Timings]] = {}
        self._releases: set[str] = set()
        self._requests_and_stages()
        self._answers_and_records()
        self._engines_and_documents()
        build = Gauge("hallmark_build_info", "Always 1; says what runs.", ["version", "python"], registry=self.registry)
        build.labels(version, platform.python_version()).set(1)

    def _requests_and_stages(self) -> None:
        self.requests = self._loop_counter(
            "hallmark_requests", "Requests answered, by how they ended.", "route", "status", "outcome", "release"
        )
        self.request_seconds = self._histogram(
            "hallmark_request_seconds", "From a request's arrival to its last byte.", REQUEST_SECONDS, "route"
        )
        self.overhead_seconds = self._histogram(
            "hallmark_overhead_seconds",
            "The gateway's own share of a request: its time without the waits for engine and retrieval.",
            OVERHEAD_SECONDS,
            "route",
        )
        self.engine_seconds = self._histogram(
            "hallmark_engine_seconds", "Time a request waited for its engine.", REQUEST_SECONDS, "release"
        )
        self.first_token_seconds = self._histogram(
            "hallmark_first_token_seconds",
            "From a request's arrival to the engine's first token.",
            REQUEST_SECONDS,
            "release",
        )
        self.queue_seconds = self._histogram(
            "hallmark_queue_seconds",
            "How long requests that were answered waited for a place.",
            WAIT_SECONDS,
            "priority",
        )
        self.refusals = self._counter(
            "hallmark_refusals", "Chat requests refused with 429, by what there was not enough of.", "reason"
        )
        self.retrieval_seconds = self._histogram(
            "hallmark_retrieval_seconds", "Finding passages, with what the engine is asked for it.", STAGE_SECONDS
        ).labels()
        self.embed_seconds = self._histogram(
            "hallmark_embed_seconds", "Embedding a query, waiting for its batch included.", STAGE_SECONDS
        ).labels()
        self.rerank_seconds = self._histogram(
            "hallmark_rerank_seconds", "A reranker's look at what a search found.", STAGE_SECONDS
        ).labels()

    def _answers_and_records(self) -> None:
        self.tokens = self._loop_counter("hallmark_tokens", "Tokens as the engine counted them.", "release", "kind")
        self.citations = self._counter("hallmark_citations", "Citations by what the check said.", "release", "status")
        self.features = self._counter(
            "hallmark_features", "Features asked for an answer's prompt, by what came of it.", "release", "state"
        )
        self.abstentions = self._counter(
            "hallmark_abstentions", "Answers withheld, by the machine-readable reason.", "release", "reason"
        )
        self.records = self._counter("hallmark_records", "Prediction records by what became of them.", "result")
        self._record_results = {
            result: self.records.labels(result) for result in ("written", "failed", "dropped", "interrupted")
        }
        # Observed by the thread that commits.
        self.record_commit_seconds = Histogram(
            "hallmark_record_commit_seconds",
            "One group commit of prediction records.",
            buckets=STAGE_SECONDS,
            registry=self.registry,
        )

    def _engines_and_documents(self) -> None:
        self._engines = Engines()
        self.registry.register(self._engines)
        self._qualities = Qualities()
        self.registry.register(self._qualities)
        self._alerts = AlertStates()
        self.registry.register(self._alerts)
        self._drifts = Drifts()
        self.registry.register(self._drifts)
        self.fallbacks = self._counter(
            "hallmark_fallbacks", "Answers given because an engine could not, by what gave them.", "release", "kind"
        )
        self.documents = self._counter("hallmark_documents", "Documents ingested, by what that did.", "outcome")
        self.ingest_seconds = self._histogram(
            "hallmark_ingest_seconds", "Ingesting one document: parse, split, embed, index.", REQUEST_SECONDS
        ).labels()
        self.ingested_passages = self._counter(
            "hallmark_ingested_passages", "Passages of documents ingested, by where their vectors come from.", "kind"
        )
        self.feedback = self._counter(
            "hallmark_feedback", "What was said of answers, by who said it and what kind it is.", "source", "kind"
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an ordinary request, one that no release answered."""
        found = self._ordinary.get((route, status))
        if found is None:
            outcome = "failed" if status >= 500 else "finished"
            found = self.requests.labels(route, str(status), outcome, ""), self.request_seconds.labels(route)
            self._ordinary[route, status] = found
        found[0].inc()
        found[1].observe(seconds)

    def answer(
        self,
        *,
        route: str,
        release: str,
        status: int,
        outcome: str,
        seconds: float,
        engine_seconds: float | None = None,
        retrieval_seconds: float | None = None,
        embed_seconds: float | None = None,
        first_token_seconds: float | None = None,
        priority: str = "",
        waited_seconds: float | None = None,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        """Count one answered request, whatever its outcome (finished, failed, cancelled).

        A stage that did not happen is None. `retrieval_seconds` includes `embed_seconds`; what `seconds` holds beyond
        engine, retrieval and the wait for a place is the gateway's own. `release` is a resolved one, empty when none
        was.
        """
        if release not in self._releases:
            release = self._admit(release)
        answers = self._answers.get((route, release))
        if answers is None:
            answers = self._answers[route, release] = _Answers(self, route, release)
        answers.outcome(status, outcome).inc()
        answers.seconds.observe(seconds)
        own = seconds
        if engine_seconds is not None:
            answers.engine.observe(engine_seconds)
            own -= engine_seconds
        if retrieval_seconds is not None:
            self.retrieval_seconds.observe(retrieval_seconds)
            own -= retrieval_seconds
        if embed_seconds is not None:
            self.embed_seconds.observe(embed_seconds)
        if waited_seconds is not None:
            self.queue_seconds.labels(priority).observe(waited_seconds)
            own -= waited_seconds
        if first_token_seconds is not None:
            answers.first_token.observe(first_token_seconds)
        answers.overhead.observe(max(0.0, own))
        if prompt_tokens:
            answers.prompt.inc(prompt_tokens)
        if completion_tokens:
            answers.completion.inc(completion_tokens)

    def cited(self, release: str, statuses: Iterable[str]) -> None:
        """Count an answer's citations by status: supported, weak, unsupported."""
        release = self._admit(release)
        for status in statuses:
            self.citations.labels(release, status).inc()

    def featured(self, release: str, states: Iterable[str]) -> None:
        """Count the features asked for an answer by state: read, missing, expired, unavailable."""
        release = self._admit(release)
        for state in states:
            self.features.labels(release, state).inc()

    def abstained(self, release: str, reason: str) -> None:
        """Count an answer withheld."""
        self.abstentions.labels(self._admit(release), reason).inc()

    def recorded(self, rows: int, seconds: float) -> None:
        """Count one group commit, and the predictions that it put on record for good."""
        self._record_results["written"].inc(rows)
        self.record_commit_seconds.observe(seconds)

    def unrecorded(self, result: str, rows: int = 1) -> None:
        """Count records that were not written as they should: failed, dropped, or interrupted by a crash."""
        self._record_results[result].inc(rows)

    def fell_back(self, release: str, kind: str) -> None:
        """Count an answer given because an engine could not: by another release (`fallback`), or `extractive`."""
        self.fallbacks.labels(self._admit(release), kind).inc()

    def refused(self, reason: str) -> None:
        """Count a chat request refused with 429: `overloaded` or `rate_limit_exceeded`."""
        self.refusals.labels(reason).inc()

    def ingested(self, outcome: str, seconds: float) -> None:
        """Count a document: created, unchanged, replaced, deleted or refused."""
        self.documents.labels(outcome).inc()
        self.ingest_seconds.observe(seconds)

    def embedded(self, embedded: int, reused: int) -> None:
        """Count a document's passages: those that were embedded, and those that had their vector already."""
        for kind, count in (("embedded", embedded), ("reused", reused)):
            if count:
                self.ingested_passages.labels(kind).inc(count)

    def said(self, source: str, kind: str) -> None:
        """Count a call: positive, negative, number, text, change, withdrawal; label, label_withdrawal."""
        self.feedback.labels(source, kind).inc()

    def judged(self, samples: Sequence[QualitySample], computed_at_seconds: float) -> None:
        """Show these figures from now on, and no others; the releases are those that serve."""
        self._qualities.samples = samples
        self._qualities.computed_at_seconds = computed_at_seconds

    def alerted(self, tally: AlertTally) -> None:
        """Show these alerts from now on, and no others."""
        self._alerts.tally = tally

    def drifted(self, samples: Sequence[DriftSample]) -> None:
        """Show how these releases stand from now on, and no others."""
        self._drifts.samples = samples

    def watch(
        self,
        *,
        record_queue_depth: Callable[[], float] | None = None,
        requests_in_flight: Callable[[], float] | None = None,
        log_lines_dropped: Callable[[], float] | None = None,
        shadows_dropped: Callable[[], float] | None = None,
        evaluations_dropped: Callable[[], float] | None = None,
        waiting: Callable[[], Mapping[str, int]] | None = None,
        redis_failures: Callable[[], float] | None = None,
        outbox: Outbox | None = None,
        engines: Callable[[], Sequence[GroupSample]] | None = None,
    ) -> None:
        """Read these when Prometheus asks: they cost a request nothing."""
        if engines is not None:
            self._engines.read = engines
        if waiting is not None:
            self._observed.waiting = waiting
        gauge, counter, sources = GaugeMetricFamily, CounterMetricFamily, self._observed.sources
        if record_queue_depth is not None:
            name, documentation = "hallmark_record_queue_depth", "Prediction records waiting for their commit."
            sources[name] = gauge, documentation, record_queue_depth
        if requests_in_flight is not None:
            sources["hallmark_requests_in_flight"] = gauge, "Chat requests being answered.", requests_in_flight
        if log_lines_dropped is not None:
            name, documentation = "hallmark_log_lines_dropped", "Log lines lost because stderr was too slow."
            sources[name] = counter, documentation, log_lines_dropped
        if shadows_dropped is not None:
            documentation = "Shadow answers that did not run, or not to their end, because there was no room."
            sources["hallmark_shadows_dropped"] = counter, documentation, shadows_dropped
        if evaluations_dropped is not None:
            documentation = "Feedback and labels that were accepted and not told as events."
            sources["hallmark_evaluations_dropped"] = counter, documentation, evaluations_dropped
        if redis_failures is not None:
            documentation = "Times that Redis did not answer and rate limits were counted by this process alone."
            sources["hallmark_redis_failures"] = counter, documentation, redis_failures
        if outbox is not None:
            documentation = "Predictions that wait to be moved into the shared database."
            sources["hallmark_outbox_rows"] = gauge, documentation, lambda: outbox.rows
            documentation = "Age of the oldest prediction that waits to be moved into the shared database."
            sources["hallmark_outbox_lag_seconds"] = gauge, documentation, lambda: outbox.lag_seconds

    def watch_ingestion(self, queue: IngestionQueue) -> None:
        """Read these too when Prometheus asks."""
        self._observed.jobs = lambda: queue.open_jobs
        sources = self._observed.sources
        documentation = "Documents accepted and not ingested yet."
        sources["hallmark_ingestion_waiting_documents"] = (
            GaugeMetricFamily,
            documentation,
            lambda: queue.waiting_documents,
        )
        documentation = "Size of the documents accepted and not ingested yet."
        sources["hallmark_ingestion_waiting_bytes"] = GaugeMetricFamily, documentation, lambda: queue.waiting_bytes

    def watch_retrieval(
        self,
        *,
        embeddings_cached: Callable[[], float],
        embeddings_computed: Callable[[], float],
        searches_by_words: Callable[[], float],
        rerank_failures: Callable[[], float],
    ) -> None:
        """Read these when Prometheus asks, too."""
        self._observed.sources |= {
            "hallmark_embedding_cache_hits": (
                CounterMetricFamily,
                "Texts whose vector was at hand when it was asked for.",
                embeddings_cached,
            ),
            "hallmark_embedding_cache_misses": (
                CounterMetricFamily,
                "Texts that had to be embedded, those of documents left out.",
                embeddings_computed,
            ),
            "hallmark_searches_by_words": (
                CounterMetricFamily,
                "Searches that went on by words alone because the embedder did not answer.",
                searches_by_words,
            ),
            "hallmark_rerank_failures": (
                CounterMetricFamily,
                "Searches whose hits stayed in the order of the fusion because the reranker did not answer.",
                rerank_failures,
            ),
        }

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Render all metrics in the format `accept` asks for; takes milliseconds, so call it off the event loop."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _admit(self, release: str) -> str:
        if release not in self._releases:
            if len(self._releases) >= MAX_RELEASES:
                return "other"
            self._releases.add(release)
        return release

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _loop_counter(self, name: str, documentation: str, *labels: str) -> LoopCounter:
        counter = LoopCounter(name, documentation, *labels)
        self.registry.register(counter)
        return counter

    def _histogram(self, name: str, documentation: str, bounds: tuple[float, ...], *labels: str) -> LoopHistogram:
        histogram = LoopHistogram(name, documentation, bounds, *labels)
        self.registry.register(histogram)
        return histogram
