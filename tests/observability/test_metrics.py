"""The Prometheus metrics: what one call counts, that labels stay few, and that every name is documented."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from observability.collectors import EngineSample, GroupSample
from observability.metrics import MAX_RELEASES, REQUEST_SECONDS, Metrics

ROUTE = "/v1/chat/completions"
DOCS = Path(__file__).parents[2] / "docs" / "telemetry.md"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="1.2.3", process=False)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    found = metrics.registry.get_sample_value(name, labels)
    return None if found is None else float(found)


def answer(metrics: Metrics, **facts: object) -> None:
    facts_given: dict[str, object] = {
        "route": ROUTE,
        "release": "hallmark@1",
        "status": 200,
        "outcome": "finished",
        "seconds": 1.0,
    }
    metrics.answer(**(facts_given | facts))  # type: ignore[arg-type]


def test_one_answer_counts_its_request_stages_and_tokens(metrics: Metrics) -> None:
    answer(
        metrics,
        seconds=2.0,
        engine_seconds=1.5,
        retrieval_seconds=0.4,
        embed_seconds=0.1,
        first_token_seconds=0.7,
        prompt_tokens=100,
        completion_tokens=20,
    )
    assert value(metrics, "hallmark_request_seconds_sum", route=ROUTE) == 2.0
    assert value(metrics, "hallmark_engine_seconds_sum", release="hallmark@1") == 1.5
    assert value(metrics, "hallmark_retrieval_seconds_sum") == 0.4
    assert value(metrics, "hallmark_embed_seconds_sum") == 0.1
    assert value(metrics, "hallmark_first_token_seconds_sum", release="hallmark@1") == 0.7
    assert value(metrics, "hallmark_tokens_total", release="hallmark@1", kind="prompt") == 100
    assert value(metrics, "hallmark_tokens_total", release="hallmark@1", kind="completion") == 20
    labels = {"route": ROUTE, "status": "200", "outcome": "finished", "release": "hallmark@1"}
    assert value(metrics, "hallmark_requests_total", **labels) == 1


def test_the_wait_for_a_place_is_told_by_priority_and_is_not_the_gateways_own_time(metrics: Metrics) -> None:
    answer(metrics, seconds=3.0, engine_seconds=1.0, priority="low", waited_seconds=1.5)
    answer(metrics, seconds=0.5, priority="low")  # It got no place.
    metrics.refused("overloaded")
    assert value(metrics, "hallmark_queue_seconds_sum", priority="low") == 1.5
    assert value(metrics, "hallmark_queue_seconds_count", priority="low") == 1
    assert value(metrics, "hallmark_overhead_seconds_sum", route=ROUTE) == 1.0
    assert value(metrics, "hallmark_refusals_total", reason="overloaded") == 1


@given(st.lists(st.one_of(st.sampled_from(REQUEST_SECONDS), st.floats(0, 200)), max_size=20))
def test_a_histogram_counts_as_the_library_does(seconds: list[float]) -> None:
    metrics, registry = Metrics(version="1.2.3", process=False), CollectorRegistry()
    library = Histogram("hallmark_request_seconds", "", ["route"], buckets=REQUEST_SECONDS, registry=registry)
    for each in seconds:
        metrics.request(ROUTE, 200, each)
        library.labels(ROUTE).observe(each)
    for bound in ("0.001", "0.1", "1.0", "120.0", "+Inf"):
        labels = {"route": ROUTE, "le": bound}
        expected = registry.get_sample_value("hallmark_request_seconds_bucket", labels)
        assert value(metrics, "hallmark_request_seconds_bucket", **labels) == expected
    assert value(metrics, "hallmark_request_seconds_sum", route=ROUTE) == registry.get_sample_value(
        "hallmark_request_seconds_sum", {"route": ROUTE}
    )


def test_overhead_is_the_request_without_its_waits(metrics: Metrics) -> None:
    answer(metrics, seconds=2.0, engine_seconds=1.5, retrieval_seconds=0.4, embed_seconds=0.3)
    assert value(metrics, "hallmark_overhead_seconds_sum", route=ROUTE) == pytest.approx(0.1)


def test_overhead_is_never_negative_when_clocks_disagree(metrics: Metrics) -> None:
    answer(metrics, seconds=1.0, engine_seconds=1.1)
    assert value(metrics, "hallmark_overhead_seconds_sum", route=ROUTE) == 0.0


def test_a_stage_that_did_not_happen_is_not_observed(metrics: Metrics) -> None:
    answer(metrics, status=503, outcome="failed", release="")
    assert value(metrics, "hallmark_retrieval_seconds_count") == 0
    assert value(metrics, "hallmark_embed_seconds_count") == 0
    assert value(metrics, "hallmark_engine_seconds_count", release="") == 0
    assert value(metrics, "hallmark_first_token_seconds_count", release="") == 0
    labels = {"route": ROUTE, "status": "503", "outcome": "failed", "release": ""}
    assert value(metrics, "hallmark_requests_total", **labels) == 1


def test_each_outcome_of_a_release_is_counted_apart(metrics: Metrics) -> None:
    for outcome in ("finished", "finished", "cancelled"):
        answer(metrics, outcome=outcome)
    labels = {"route": ROUTE, "status": "200", "release": "hallmark@1"}
    assert value(metrics, "hallmark_requests_total", outcome="finished", **labels) == 2
    assert value(metrics, "hallmark_requests_total", outcome="cancelled", **labels) == 1


def test_releases_beyond_the_bound_share_one_label(metrics: Metrics) -> None:
    for number in range(MAX_RELEASES + 50):
        answer(metrics, release=f"r@{number}")
        metrics.cited(f"r@{number}", ["supported"])
        metrics.abstained(f"r@{number}", "not_supported")
    labels = {"route": ROUTE, "status": "200", "outcome": "finished"}
    assert value(metrics, "hallmark_requests_total", release="other", **labels) == 50
    assert value(metrics, "hallmark_citations_total", release="other", status="supported") == 50
    assert value(metrics, "hallmark_abstentions_total", release="other", reason="not_supported") == 50
    families = {family.name: family for family in metrics.registry.collect()}
    releases = {sample.labels["release"] for sample in families["hallmark_requests"].samples}
    assert len(releases) == MAX_RELEASES + 1


@pytest.mark.parametrize(("status", "outcome"), [(200, "finished"), (404, "finished"), (500, "failed")])
def test_an_ordinary_request_counts_its_status(metrics: Metrics, status: int, outcome: str) -> None:
    metrics.request("/v1/search", status, 0.01)
    metrics.request("/v1/search", status, 0.02)
    labels = {"route": "/v1/search", "status": str(status), "outcome": outcome, "release": ""}
    assert value(metrics, "hallmark_requests_total", **labels) == 2
    assert value(metrics, "hallmark_request_seconds_sum", route="/v1/search") == pytest.approx(0.03)


def test_citations_and_abstentions_are_counted_by_what_was_decided(metrics: Metrics) -> None:
    metrics.cited("hallmark@1", ["supported", "weak", "supported"])
    metrics.abstained("hallmark@1", "nothing_relevant")
    assert value(metrics, "hallmark_citations_total", release="hallmark@1", status="supported") == 2
    assert value(metrics, "hallmark_citations_total", release="hallmark@1", status="weak") == 1
    assert value(metrics, "hallmark_abstentions_total", release="hallmark@1", reason="nothing_relevant") == 1


def test_records_are_counted_by_what_became_of_them(metrics: Metrics) -> None:
    metrics.recorded(32, 0.002)
    metrics.unrecorded("dropped", 3)
    metrics.unrecorded("failed")
    metrics.unrecorded("interrupted", 2)
    counts = {result: value(metrics, "hallmark_records_total", result=result) for result in ("written", "dropped")}
    assert counts == {"written": 32, "dropped": 3}
    assert value(metrics, "hallmark_records_total", result="failed") == 1
    assert value(metrics, "hallmark_records_total", result="interrupted") == 2
    assert value(metrics, "hallmark_record_commit_seconds_sum") == 0.002


def test_engine_health_and_ingestion_are_shown(metrics: Metrics) -> None:
    members = [
        EngineSample("tgi", "gpu-1:3000", "closed", 3, 2.0, 0),
        EngineSample("tgi", "gpu-2:3000", "half_open", 0, None, 4),
    ]
    metrics.watch(engines=lambda: [GroupSample("tgi", 5, 12.5, 1, members)])
    metrics.fell_back("small@1", "fallback")
    metrics.ingested("created", 1.5)
    first, second = ({"engine": "tgi", "member": each.member} for each in members)
    assert value(metrics, "hallmark_engine_up", **first) == 1
    assert value(metrics, "hallmark_engine_up", **second) == 0
    assert value(metrics, "hallmark_engine_state", **second, state="half_open") == 1
    assert (value(metrics, "hallmark_engine_in_flight", **first), value(metrics, "hallmark_engine_queue", **first)) == (
        3,
        2,
    )
    assert value(metrics, "hallmark_engine_ejections_total", **second) == 4
    assert value(metrics, "hallmark_engine_failovers_total", engine="tgi") == 5
    assert value(metrics, "hallmark_engine_start_seconds", engine="tgi") == 12.5
    assert value(metrics, "hallmark_engine_waiting_room", engine="tgi") == 1
    assert value(metrics, "hallmark_fallbacks_total", release="small@1", kind="fallback") == 1
    assert value(metrics, "hallmark_documents_total", outcome="created") == 1
    assert value(metrics, "hallmark_ingest_seconds_sum") == 1.5


def test_watched_values_are_read_when_asked_for(metrics: Metrics) -> None:
    waiting = [0]
    metrics.watch(
        record_queue_depth=lambda: float(len(waiting)),
        requests_in_flight=lambda: 2.0,
        log_lines_dropped=lambda: 7.0,
        shadows_dropped=lambda: 3.0,
        waiting=lambda: {"high": 0, "low": 5},
        redis_failures=lambda: 2.0,
    )
    waiting.append(1)
    assert value(metrics, "hallmark_record_queue_depth") == 2
    assert value(metrics, "hallmark_requests_in_flight") == 2
    assert value(metrics, "hallmark_log_lines_dropped_total") == 7
    assert value(metrics, "hallmark_shadows_dropped_total") == 3
    assert value(metrics, "hallmark_queue_depth", priority="low") == 5
    assert value(metrics, "hallmark_redis_failures_total") == 2


def test_the_rendering_is_what_prometheus_parses(metrics: Metrics) -> None:
    answer(metrics)
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["hallmark_build_info"].samples[0].labels["version"] == "1.2.3"
    assert families["hallmark_requests"].type == "counter"
    assert families["hallmark_request_seconds"].type == "histogram"


def test_openmetrics_is_rendered_when_asked_for(metrics: Metrics) -> None:
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_two_instances_share_nothing_and_leave_the_global_registry_alone(metrics: Metrics) -> None:
    other = Metrics(version="2", process=False)
    answer(metrics)
    assert value(other, "hallmark_retrieval_seconds_count") == 0
    assert not any(family.name.startswith("hallmark") for family in REGISTRY.collect())


def test_process_metrics_come_along() -> None:
    body, _ = Metrics(version="1").render()
    assert b"process_cpu_seconds_total" in body


def test_every_metric_and_no_other_is_listed_in_the_docs(metrics: Metrics) -> None:
    metrics.watch(
        record_queue_depth=lambda: 0,
        requests_in_flight=lambda: 0,
        log_lines_dropped=lambda: 0,
        shadows_dropped=lambda: 0,
        evaluations_dropped=lambda: 0,
        redis_failures=lambda: 0,
    )
    metrics.watch_ingestion(SimpleNamespace(waiting_documents=0, waiting_bytes=0, open_jobs={}))
    metrics.watch_retrieval(
        embeddings_cached=lambda: 0,
        embeddings_computed=lambda: 0,
        searches_by_words=lambda: 0,
        rerank_failures=lambda: 0,
    )
    served = {
        family.name + "_total" if family.type == "counter" else family.name for family in metrics.registry.collect()
    }
    documented = {
        line.split("`")[1].partition("{")[0]
        for line in DOCS.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `hallmark_")
    }
    assert documented == served
