"""Services under test are watched (`tests/watching.py`): one that tells what it was told is found out."""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from opentelemetry import trace

from retrieval.embedder import HashingEmbedder
from tests.collector import Collector
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import live_gateway, live_service
from tests.service_process import service_process
from tests.watching import Leaked, Watch, hear

SECRET = "the name of the patient is Xq-7f3a"


class Leaking(HashingEmbedder):
    """Tells what it is given in a way that somebody could have thought harmless."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way = way

    async def embed(self, texts: Sequence[str], *args: Any, **options: Any) -> Any:
        span = trace.get_current_span()
        if self._way == "log":
            logging.getLogger("app").warning("Embedding %r", texts[0])
        elif self._way == "attribute":
            span.set_attribute("hallmark.text", texts[0])
        elif self._way == "event":
            span.add_event("embedding", {"texts": list(texts)})
        elif self._way == "name":
            span.update_name(f"embed {texts[0][:40]}")
        elif self._way == "print":
            print(texts[0], flush=True)
        return await super().embed(texts, *args, **options)


@pytest.mark.parametrize(
    ("way", "where"), [("log", "the log"), ("attribute", "spans"), ("event", "spans"), ("name", "spans")]
)
async def test_a_service_that_tells_what_it_was_told_is_found_out(tmp_path, way, where):
    async def use() -> None:
        async with (
            FakeTGI() as tgi,
            live_service(tmp_path, engine_url=tgi.url, embedder=Leaking(way)) as service,
            service.client() as client,
        ):
            assert (await client.post("/v1/search", json={"query": SECRET})).status_code == 200

    with pytest.raises(Leaked, match=f"Xq-7f3a' is in {where}"):
        await use()


@pytest.mark.slow
@pytest.mark.parametrize(("way", "is_killed"), [("log", False), ("print", True)])
async def test_a_process_of_its_own_is_found_out_too_however_it_ends(tmp_path, way, is_killed):
    async def use() -> None:
        async with (
            FakeTGI() as tgi,
            service_process(tmp_path, tgi.url, embedder=partial(Leaking, way)) as process,
            process.client() as client,
        ):
            assert (await client.post("/v1/search", json={"query": SECRET})).status_code == 200
            if is_killed:
                process.kill()

    with pytest.raises(Leaked, match="Xq-7f3a' is in the log"):
        await use()


async def test_what_a_worker_wrote_is_searched_by_the_service_beside_it(tmp_path):
    hear(SECRET.encode())  # That of a service which has ended is nothing to those after it.

    async def use(is_heard: bool) -> None:
        async with FakeTGI() as tgi, live_service(tmp_path, engine_url=tgi.url) as service, service.client() as client:
            assert (await client.post("/v1/search", json={"query": SECRET})).status_code == 200
            if is_heard:
                hear(f"Working on {SECRET}".encode())

    await use(is_heard=False)
    with pytest.raises(Leaked, match="Xq-7f3a' is in what a worker wrote"):
        await use(is_heard=True)


async def test_a_part_of_an_answer_in_the_log_is_found_too(tmp_path):
    answer = "Four weeks, says the contract that your mother has signed in Basel."

    async def use() -> None:
        async with FakeTGI(Tokens(answer)) as tgi, live_gateway(tmp_path, engine_url=tgi.url) as live:
            assert (await live.api.stream("How long?")).text == answer
            logging.getLogger("app").info("answered %s...", answer[:36])

    with pytest.raises(Leaked, match="Four weeks"):
        await use()


async def test_a_key_in_the_log_is_found(tmp_path):
    async def use() -> None:
        async with FakeTGI() as tgi, live_service(tmp_path, engine_url=tgi.url) as service:
            logging.getLogger("app").info("the key %s", service.key)

    with pytest.raises(Leaked, match="is in the log"):
        await use()


async def test_labels_of_metrics_and_what_collectors_were_sent_are_searched(monkeypatch):
    for what in ("metrics", "OTLP metrics", "events", "a collector"):
        where = what.removeprefix("OTLP ")
        with Collector() as collector:
            if where == "a collector":
                monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            watch = Watch()
            watch.keep_secret(SECRET)
            telemetry = watch.telemetry(service_version="1")
            assert (telemetry is None) == (where == "a collector")
            if telemetry is None:
                from observability.telemetry import Telemetry

                telemetry = Telemetry(service_version="1")
                telemetry.tracer_provider.get_tracer("test").start_span(SECRET).end()
            elif what == "metrics":
                watch.metrics.refusals.labels(SECRET).inc()
            elif what == "OTLP metrics":
                telemetry.meter_provider.get_meter("test").create_counter("c").add(1, {"text": SECRET})
            else:
                from observability.genai import Evaluation

                telemetry.evaluated(Evaluation("feedback", 1.0, SECRET, "end_user", "p", None))
            watch.measure()
            await telemetry.aclose()
            with pytest.raises(Leaked, match=f"is in {where}"):
                watch.check()


async def test_what_is_told_of_requests_may_be_told():
    watch = Watch()
    body = {
        "model": "support team",
        "user": "anna@mail.example",
        "messages": [{"role": "user", "content": 'first line of it\nand "the" second line of it'}],
    }

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(
            {"type": "http.response.body", "body": b'{"choices": [{"message": {"content": "Four weeks, no?"}}]}'}
        )

    import msgspec

    async def receive() -> Any:
        return {"type": "http.request", "body": msgspec.json.encode(body)}

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    await watch.app(app)({"type": "http", "path": "/v1/chat/completions"}, receive, send)
    assert watch.canaries() == ["anna@mail.example", "first line of it", "second line of it", "Four weeks, no?"]
    watch.check()
