"""A live service for tests: the real composition on uvicorn and loopback, in front of a stand-in engine.

`live_service` is the whole of it. `live_gateway` is the chat route alone with parts of the test's choice: a search that
is down, a log on a full disk, an exporter that keeps spans. Both keep exactly one tenant apart from the next, so that
tests of one module can share a service and still count their own records.
"""

import asyncio
import contextlib
import functools
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import uvicorn
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from app.access import Access, KeyStore, create_key
from app.admission import Admission
from app.database import Database
from app.engines import Engine
from app.engines.groups import EngineGroups
from app.engines.tgi import TGIEngine, Timeouts
from app.gateway import Gateway
from app.grounding import Search
from app.links import PassageLinks
from app.main import VERSION, open_service
from app.predictions import History, Prediction, PredictionLog
from app.prompts import ANSWER_PROMPT
from app.rates import RateLimits
from app.releases import Release, Releases, RetrievalPlan
from app.routes.api import create_api
from app.routes.chat import ChatRoute
from app.serving import server_config
from app.settings import Settings
from app.shadows import Shadows
from observability import logs
from observability.metrics import Metrics
from observability.telemetry import Telemetry
from retrieval.embedder import Embedder, HashingEmbedder
from tests.migrated import migrated
from tests.watching import Watch

EVERYTHING = (
    "chat",
    "documents:read",
    "documents:write",
    "indexes:manage",
    "predictions:read",
    "feedback:read",
    "feedback:write",
    "labels:read",
    "labels:write",
    "review:read",
    "review:write",
    "review:manage",
    "quality:read",
    "alerts:read",
    "alerts:write",
    "datasets:read",
    "datasets:write",
    "features:read",
    "features:write",
    "privacy:manage",
    "releases:read",
    "releases:write",
    "metrics",
)
CHAT = "/v1/chat/completions"
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients on loopback: the certificates of the world, which httpx loads for each, take as long as most tests."""


@dataclass
class Service:
    """Where the service answers, and keys to it."""

    url: str
    key: str
    data_dir: Path
    database: Path | str
    """Where its keys are, by path or URL."""
    tenants: dict[str, str] = field(default_factory=dict)
    """Keys of tenants that nobody has used yet, by tenant."""

    def client(self, key: str | None = None, **options: Any) -> httpx.AsyncClient:
        """An HTTP client with the tenant's key, or another."""
        headers = {"authorization": f"Bearer {key or self.key}", **options.pop("headers", {})}
        return httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=60, trust_env=False, verify=NO_TLS, **options
        )

    def nobody(self, **options: Any) -> httpx.AsyncClient:
        """An HTTP client without a key."""
        return httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False, verify=NO_TLS, **options)

    async def new_key(self, *, tenant: str = "default", scopes: tuple[str, ...] = EVERYTHING, **facts: Any) -> str:
        """Make another key while the service runs, as the command line does.

        In a thread of its own: the service may be in the middle of a write on this event loop, and goes on meanwhile.
        """
        made = await asyncio.to_thread(create_key, self.database, name="test", tenant=tenant, scopes=scopes, **facts)
        return made[1]

    @contextlib.asynccontextmanager
    async def tenant(self, **options: Any) -> AsyncIterator["Api"]:
        """Act as a tenant nobody was before."""
        name = next(iter(self.tenants))
        key = self.tenants.pop(name)
        async with self.client(key, **options) as client:
            yield Api(client, name, key)


@dataclass
class Stream:
    """A streamed answer as it arrived."""

    response: httpx.Response
    chunks: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    """The body of the `error` event, or of the response when it is no stream."""
    done: bool = False
    """Whether the end mark was the last event."""

    @property
    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or "" for chunk in self.chunks for choice in chunk.get("choices", ())
        )

    @property
    def deltas(self) -> list[dict[str, Any]]:
        return [choice["delta"] for chunk in self.chunks for choice in chunk.get("choices", ())]

    @property
    def finish_reason(self) -> str | None:
        said = [choice["finish_reason"] for chunk in self.chunks for choice in chunk.get("choices", ())]
        return said[-1] if said else None

    @property
    def evidence(self) -> dict[str, Any]:
        """The chunk that carries citations and verdict."""
        return next((chunk for chunk in self.chunks if "retrieval" in chunk), {})

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return [each for delta in self.deltas for each in delta.get("annotations", ())]

    def take(self, block: str) -> None:
        """Read one event."""
        assert not self.done, "an event after the end mark"
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if fields.get("event") == "error":
            self.error = json.loads(fields["data"])["error"]
        elif fields["data"] == "[DONE]":
            self.done = True
        else:
            self.chunks.append(json.loads(fields["data"]))


@dataclass
class Api:
    """One tenant's use of the service."""

    client: httpx.AsyncClient
    name: str
    key: str

    def body(self, asked: str | list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        return {"model": "hallmark", "messages": messages, **fields}

    async def ask(self, asked: str | list[dict[str, Any]], **fields: Any) -> httpx.Response:
        """Ask for a whole answer."""
        return await self.client.post(CHAT, json=self.body(asked, **fields))

    async def answer(self, asked: str | list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """Ask for a whole answer and get it."""
        response = await self.ask(asked, **fields)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def stream(self, asked: str | list[dict[str, Any]], **fields: Any) -> Stream:
        """Ask for a stream and read it to its end."""
        async with self.streaming(asked, **fields) as (stream, events):
            async for _ in events:
                pass
        return stream

    @contextlib.asynccontextmanager
    async def streaming(
        self, asked: str | list[dict[str, Any]], **fields: Any
    ) -> AsyncIterator[tuple[Stream, AsyncIterator[None]]]:
        """Ask for a stream; each step of the iterator reads one event. Leaving the block hangs up."""
        body = self.body(asked, stream=True, **fields)
        async with self.client.stream("POST", CHAT, json=body) as response:
            stream = Stream(response)

            async def events() -> AsyncIterator[None]:
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    stream.error = json.loads(await response.aread())["error"]
                    return
                rest = ""
                async for text in response.aiter_text():
                    *blocks, rest = (rest + text).split("\n\n")
                    for block in blocks:
                        stream.take(block)
                        yield
                assert not rest

            yield stream, events()

    async def add(self, name: str, text: str, **metadata: Any) -> dict[str, Any]:
        """Add a document."""
        response = await self.client.post(
            "/v1/documents?wait=20", json={"name": name, "text": text, "metadata": metadata}
        )
        assert response.status_code in (200, 201), response.text
        return dict(response.json()["document"])

    async def source(self, document_id: str) -> str:
        """The text that a document's offsets count in."""
        return str((await self.client.get(f"/v1/documents/{document_id}/source")).json()["text"])

    async def records(self, count: int = 1) -> list[dict[str, Any]]:
        """The tenant's predictions, newest first, once there are so many and none of them is open."""

        async def closed() -> list[dict[str, Any]] | None:
            found = (await self.client.get("/v1/predictions?limit=200")).json()["data"]
            enough = len(found) >= count and all(each["outcome"] != "open" for each in found)
            return found if enough else None

        found = await until(closed) if count else (await self.client.get("/v1/predictions")).json()["data"]
        assert len(found) == count, [(each["id"], each["outcome"], each["error_code"]) for each in found]
        return list(found)

    async def record(self) -> dict[str, Any]:
        """The tenant's only prediction, once it is closed."""
        return (await self.records(1))[0]

    async def counts(self) -> Counter[tuple[str, str]]:
        """Chat requests so far by status and outcome, as `/metrics` has them."""
        return chat_counts((await self.client.get("/metrics")).text)


@functools.cache
def description() -> dict[str, Any]:
    """The description of the API, made once: it takes a second, and whoever reads it changes nothing."""
    return create_api(VERSION).openapi()


async def until(look: Callable[[], Awaitable[Any]], *, seconds: float = 50.0) -> Any:
    """Wait until `look` finds something, and give it; so long that only what never comes is given up."""
    pause_seconds = 0.005
    async with asyncio.timeout(seconds):
        while True:
            if found := await look():
                return found
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(0.1, 1.3 * pause_seconds)  # To look costs what others could do meanwhile.


def chat_counts(metrics: str) -> Counter[tuple[str, str]]:
    """Read the chat requests by status and outcome from Prometheus' text; every one was also timed once."""
    counts: Counter[tuple[str, str]] = Counter()
    timed = 0.0
    lines = "\n".join(line for line in metrics.splitlines() if "hallmark_request" in line)
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            if sample.labels.get("route") != CHAT:
                continue
            if sample.name == "hallmark_requests_total":
                counts[sample.labels["status"], sample.labels["outcome"]] += int(sample.value)
            elif sample.name == "hallmark_request_seconds_count":
                timed += sample.value
    assert counts.total() == timed
    return counts


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, *, keep_alive_seconds: float = 600) -> AsyncIterator[str]:
    """Serve an application on a free port of loopback; gives its address.

    A busy machine uses a connection again after longer than the service would keep it.
    """
    config = server_config(app)
    config.port = 0
    config.timeout_keep_alive = keep_alive_seconds
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
        if task.done():
            await task
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.stopping.set()
        await task


class _Server(uvicorn.Server):
    """uvicorn, but it stops when it is told to, and not when it next looks."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stopping.wait()


@contextlib.asynccontextmanager
async def live_service(
    data_dir: Path,
    *,
    engine_url: str,
    embedder: Embedder | None = None,
    settings: dict[str, Any] | None = None,
    log_stream: BinaryIO | None = None,
    tenants: int = 0,
    key: str | None = None,
    watch: Watch | None = None,
) -> AsyncIterator[Service]:
    """Run the whole service on a free port of loopback until the block ends, with keys for so many fresh tenants.

    With a `key` none is made: the database may be down. The block ends with `watching.Leaked` where anything that the
    service was told is in its log, spans, events or metrics; a `watch` that is given is searched by who gave it, and
    the service has telemetry and metrics of its own, as in production.
    """
    engine = {"url": engine_url, "start_wait_seconds": 0.0, **(settings or {}).get("engine", {})}
    given = {"data_dir": data_dir, **(settings or {}), "engine": engine}
    database = given.get("database_url") or data_dir / "hallmark.db"
    names = [*([] if key else ["default"]), *(f"tenant-{i}" for i in range(tenants))]
    keys = await _make_keys(database, names)
    key = key or keys.pop(0)
    is_given, watch = watch is not None, watch or Watch(VERSION)
    log = logs.configure("INFO", "json", stream=watch.log(log_stream))
    try:
        async with contextlib.AsyncExitStack() as parts:
            chosen = Settings(**given)
            seen = {} if is_given else _seen_by(watch, chosen)
            app = await parts.enter_async_context(
                open_service(chosen, log, embedder=embedder or HashingEmbedder(), **seen)
            )
            url = await parts.enter_async_context(serving(watch.app(app)))
            yield Service(url, key, data_dir, database, {f"tenant-{i}": each for i, each in enumerate(keys)})
            if not is_given:
                watch.measure()
    finally:
        await asyncio.to_thread(log.close)
    if not is_given:
        watch.keep_secret(key, *keys)
        watch.check()


def _seen_by(watch: Watch, settings: Settings) -> dict[str, Any]:
    """The parts of a service by which it says something of itself."""
    chosen = {"profile": settings.telemetry.genai_profile, "keep_failures": settings.telemetry.keep_failures}
    return {"telemetry": watch.telemetry(service_version=VERSION, **chosen), "metrics": watch.metrics}


def size_with_room(path: Path, room_bytes: int) -> int:
    """Make an empty database at `path`, and give the size it has when it has grown by so much."""
    return migrated(path).stat().st_size + room_bytes


async def _make_keys(where: Path | str, tenants: list[str]) -> list[str]:
    if not tenants:
        return []
    async with Database.of_file(migrated(where)) if isinstance(where, Path) else Database(where) as database:
        store = KeyStore(database)
        return [(await store.create(name="test", tenant=tenant, scopes=EVERYTHING))[1] for tenant in tenants]


@dataclass
class LiveGateway:
    """The chat route alone, and what it noted."""

    url: str
    gateway: Gateway
    api: Api
    _history: History
    _metrics: Metrics
    _spans: InMemorySpanExporter

    async def records(self, count: int = 1) -> list[Prediction]:
        """What is on record, once there are so many predictions and none of them is open."""

        async def closed() -> list[Prediction] | None:
            found = await self._history.find("default")
            return found if len(found) >= count and all(each.outcome != "open" for each in found) else None

        found = await until(closed)
        assert len(found) == count, found
        return list(found)

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """Requests so far by status and outcome."""
        return chat_counts(self._metrics.render()[0].decode())

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans that have ended."""
        return list(self._spans.get_finished_spans())


@contextlib.asynccontextmanager
async def live_gateway(
    data_dir: Path,
    *,
    engine_url: str,
    engine: Engine | None = None,
    search: Search | None = None,
    plan: RetrievalPlan | None = None,
    predictions: PredictionLog | None = None,
    record_required: bool = True,
    admission: Admission | None = None,
    timeout_seconds: float = 60.0,
    telemetry: Telemetry | None = None,
    releases: Releases | None = None,
    keep_alive_seconds: float = 600,
) -> AsyncIterator[LiveGateway]:
    """Serve the chat route on a free port of loopback, with the parts given."""
    database = data_dir / "hallmark.db"
    (key,) = await _make_keys(database, ["default"])
    watch, spans = Watch(process=False), InMemorySpanExporter()
    log = logs.configure("INFO", "json", stream=watch.log())
    async with contextlib.AsyncExitStack() as parts:
        parts.callback(log.close)
        telemetry = telemetry or Telemetry(service_version="test", span_processor=SimpleSpanProcessor(spans))
        parts.push_async_callback(telemetry.aclose)
        predictions = await parts.enter_async_context(predictions or PredictionLog(database))
        shared = await parts.enter_async_context(Database.of_file(database))
        access = await parts.enter_async_context(Access(shared))
        if engine is None:
            engine = TGIEngine(engine_url, timeouts=Timeouts())
            parts.push_async_callback(engine.aclose)
        release = Release("hallmark", 1, "tgi", ANSWER_PROMPT, plan or RetrievalPlan())
        gateway = Gateway(
            releases=releases or Releases(release),
            engines=EngineGroups({"tgi": engine}),
            search=search,
            predictions=predictions,
            admission=admission or Admission(),
            record_required=record_required,
        )
        shadows = Shadows(gateway)
        parts.push_async_callback(shadows.aclose)
        route = ChatRoute(
            gateway,
            shadows=shadows,
            access=access,
            rates=await parts.enter_async_context(RateLimits()),
            links=PassageLinks(b"secret"),
            telemetry=telemetry,
            metrics=watch.metrics,
            log=log,
            max_body_bytes=2_000_000,
            timeout_seconds=timeout_seconds,
        )
        url = await parts.enter_async_context(serving(watch.app(route), keep_alive_seconds=keep_alive_seconds))
        headers = {"authorization": f"Bearer {key}"}
        client = httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False, verify=NO_TLS)
        await parts.enter_async_context(client)
        yield LiveGateway(url, gateway, Api(client, "default", key), History(shared), watch.metrics, spans)
        watch.measure()
    watch.see(spans.get_finished_spans())
    watch.keep_secret(key)
    watch.check()
