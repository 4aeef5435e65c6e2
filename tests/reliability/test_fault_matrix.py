"""The table of docs/reliability.md, executed: what a client sees of each dependency that fails in each way."""

import asyncio
import itertools
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import pytest

from tests.collector import Collector
from tests.fake_qdrant import fake_qdrant
from tests.fake_tgi import Act, FakeTGI, Tokens
from tests.faults import Fault, FaultyProxy
from tests.postgres import Postgres
from tests.service import CHAT, Api, until
from tests.service_process import service_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
DEPENDENCIES = {"engine", "one engine of two", "Qdrant", "PostgreSQL", "OTLP collector"}
QUESTION = "How tall is the tower?"
AT_LENGTH = "Tell me at length."

HOLD_SECONDS = 2.0
"""How long a fault lasts at least: whatever is done in the background meets it too."""


@dataclass(frozen=True)
class Row:
    """What the table promises of one request."""

    asked: str
    status: int
    code: str | None
    has_retry_after: bool
    outcome: str | None
    passages: str | None
    told_within: float
    well_within: float

    @property
    def request(self) -> str:
        return self.asked.removesuffix(", later")


def read_table() -> dict[tuple[str, Fault], list[Row]]:
    """The rows by dependency and fault."""
    found = defaultdict(list)
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 9 or cells[1] in ("fault", "---"):
            continue
        dependency, faults, requests, status, code, retry_after, record, told, well = cells
        outcome, passages, *_ = [*re.findall(r"`(\w+)`", record), None, None]
        for fault, asked in itertools.product(faults.split(", "), re.split(r", (?!later)", requests)):
            row = Row(
                asked=asked,
                status=int(status[:3]),
                code=code.strip("`") or None,
                has_retry_after=retry_after == "yes",
                outcome=outcome,
                passages=passages,
                told_within=float(told),
                well_within=float(well),
            )
            found[dependency, fault].append(row)
    return dict(found)


TABLE = read_table()


@dataclass
class Seen:
    """What a client saw."""

    status: int
    code: str | None = None
    has_retry_after: bool = False
    prediction_id: str | None = None


@dataclass
class World:
    """A service, and a proxy before each of its dependencies."""

    api: Api
    proxies: dict[str, FaultyProxy]
    collector: Collector
    numbers: Any = field(default_factory=itertools.count)

    @property
    def client(self) -> httpx.AsyncClient:
        return self.api.client

    async def ask(self, request: str, gate: "Gate", *, model: str) -> Seen:
        """Make one of the requests that the table names."""
        if request == "stream under way":
            return await self._stream(AT_LENGTH, gate, model=model, retrieval={"mode": "off"})
        if request == "streamed chat":
            await gate.passed()
            return await self._stream(QUESTION, None, model=model)
        await gate.passed()
        match request:
            case "chat":
                body = {"path": CHAT, **self.api.body(QUESTION, model=model)}
            case "chat that requires passages":
                body = {"path": CHAT, **self.api.body(QUESTION, model=model, retrieval={"mode": "required"})}
            case "search":
                body = {"path": "/v1/search", "query": QUESTION}
            case "upload":
                body = {"path": "/v1/documents", "name": "tide.txt", "text": f"The tide is {next(self.numbers)} high."}
            case "feedback":
                body = {"path": "/v1/feedback", "conversation": f"c{next(self.numbers)}", "author": "a", "rating": True}
            case "new release":
                body = {"path": "/v1/releases", "name": "paired", "engine": "pair", "notes": f"{next(self.numbers)}"}
            case "list of predictions":
                return _seen(await self.client.get("/v1/predictions"))
            case _:
                raise AssertionError(f"the table asks for {request!r}, which nobody knows")
        return _seen(await self.client.post(body.pop("path"), json=body))

    async def _stream(self, question: str, gate: "Gate | None", **fields: Any) -> Seen:
        async with self.api.streaming(question, **fields) as (stream, events):
            async for _ in events:
                if gate is not None and stream.text:
                    await gate.passed()
                    gate = None
        if stream.response.status_code == 200:
            assert stream.done == (stream.error is None)
            return Seen(200, stream.error["code"] if stream.error else None, False, _id_of(stream.response))
        assert stream.error is not None
        return _seen(stream.response, stream.error)

    async def record_of(self, prediction_id: str) -> dict[str, Any]:
        """The closed record of a prediction, once the database shows it."""

        async def shown() -> dict[str, Any] | None:
            response = await self.client.get(f"/v1/predictions/{prediction_id}")
            return response.json() if response.status_code == 200 and response.json()["outcome"] != "open" else None

        return dict(await until(shown, seconds=20))

    async def notice(self, dependency: str) -> None:
        """Return when the service knows of the fault."""

        async def is_noticed() -> bool:
            if dependency == "Qdrant":
                return (await self.client.post("/v1/search", json={"query": QUESTION})).status_code == 503
            return not await self.are_in("tgi")

        await until(is_noticed, seconds=20)

    async def are_in(self, group: str) -> bool:
        """Whether requests are sent to all engines of a group."""
        metrics = (await self.client.get("/metrics")).text
        return set(re.findall(rf'^hallmark_engine_up{{engine="{group}".* (\S+)$', metrics, re.MULTILINE)) == {"1.0"}


class Gate:
    """Where requests wait for the fault to begin."""

    def __init__(self) -> None:
        self._waiting = 0
        self._changed = asyncio.Condition()
        self._is_open = False

    async def passed(self) -> None:
        async with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._is_open)

    async def waited_at_by(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting == count)

    async def open(self) -> None:
        async with self._changed:
            self._is_open = True
            self._changed.notify_all()


def _id_of(response: httpx.Response) -> str | None:
    return response.headers.get("x-prediction-id") or response.headers.get("x-request-id")


def _seen(response: httpx.Response, error: dict[str, Any] | None = None) -> Seen:
    if response.status_code >= 400 and error is None:
        error = response.json()["error"]
    code = error["code"] if error else None
    return Seen(response.status_code, code, "retry-after" in response.headers, _id_of(response))


def answer_to(body: dict[str, Any]) -> Act:
    """A short answer, or one that takes a while."""
    if body["messages"][-1]["content"] == AT_LENGTH:
        return Tokens(*(f" word{i}" for i in range(30)), delay_seconds=0.05)
    return Tokens("The tower is 330 metres", " tall.")


@asynccontextmanager
async def the_world(data_dir: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        server = stack.enter_context(Postgres())
        collector = stack.enter_context(Collector())
        alone, first, second = [await stack.enter_async_context(FakeTGI(default=answer_to)) for _ in range(3)]
        second.queue_size = 50  # So that the first is asked first.
        targets = {
            "engine": urlsplit(alone.url).netloc,
            "one engine of two": urlsplit(first.url).netloc,
            "Qdrant": urlsplit(await stack.enter_async_context(fake_qdrant())).netloc,
            "PostgreSQL": f"{server.folder}/.s.PGSQL.5432",
            "OTLP collector": urlsplit(collector.url).netloc,
        }
        proxies = {name: await stack.enter_async_context(FaultyProxy(target)) for name, target in targets.items()}
        database = urlsplit(server.create_database()).path
        timeouts = {"first_token_timeout_seconds": 3.0, "between_tokens_timeout_seconds": 3.0}
        pair = {"urls": [proxies["one engine of two"].url, second.url], "start_wait_seconds": 0.0, **timeouts}
        settings = {
            "engine": timeouts,
            "engines": {"pair": pair},
            "qdrant": {"url": proxies["Qdrant"].url},
            "database_url": f"postgresql://postgres@127.0.0.1:{proxies['PostgreSQL'].port}{database}",
        }
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": proxies["OTLP collector"].url,
            "OTEL_BSP_SCHEDULE_DELAY": "500",
        }
        process = await stack.enter_async_context(
            service_process(data_dir, proxies["engine"].url, settings, variables=variables)
        )
        client = await stack.enter_async_context(process.client())
        client.timeout = 60
        api = Api(client, "default", process.key)
        await api.add("tower.txt", "The tower is 330 metres tall. It stands in Paris.")
        made = await client.post("/v1/releases", json={"name": "paired", "engine": "pair"})
        assert made.json()["approved"], made.text
        promoted = await client.post("/v1/rollouts/paired/promote", json={"release": "paired@1", "why": "test"})
        assert promoted.status_code == 200, promoted.text
        yield World(api, proxies, collector)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def world(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with the_world(tmp_path_factory.mktemp("faults")) as world:
        yield world


def test_every_dependency_is_in_the_table_with_every_fault() -> None:
    assert TABLE.keys() == set(itertools.product(DEPENDENCIES, get_args(Fault)))


@pytest.mark.parametrize(("dependency", "fault"), TABLE, ids=lambda value: value.replace(" ", "_"))
async def test_a_client_sees_what_the_table_says(world: World, dependency: str, fault: Fault, capsys) -> None:
    rows = TABLE[dependency, fault]
    model = "paired" if dependency == "one engine of two" else "hallmark"
    proxy = world.proxies[dependency]
    for row in rows:
        await well_again(world, dependency, row, model, 20.0)
    healed_at = time.perf_counter() + HOLD_SECONDS
    try:
        at_once = [row for row in rows if not row.asked.endswith(", later")]
        seen = dict(zip(at_once, await ask_all(world, at_once, model, lambda: proxy.become(fault)), strict=True))
        if later := [row for row in rows if row not in at_once]:
            await world.notice(dependency)
            seen |= dict(zip(later, await ask_all(world, later, model), strict=True))
        await asyncio.sleep(max(0.0, healed_at - time.perf_counter()))
    finally:
        await proxy.become(None)
    recovered = await asyncio.gather(*(well_again(world, dependency, row, model, 60.0) for row in rows))
    for row, well in zip(rows, recovered, strict=True):
        got, seconds = seen[row]
        with capsys.disabled():
            print(f"\n{dependency}, {fault}: {row.asked}: told in {seconds:.1f} s, well in {well:.1f} s", end="")
        assert (got.status, got.code, got.has_retry_after) == (row.status, row.code, row.has_retry_after), row
        assert seconds <= 2 * row.told_within + 2, row
        assert well <= 2 * row.well_within + 2, row
        if row.outcome is not None:
            assert got.prediction_id is not None
            record = await world.record_of(got.prediction_id)
            assert record["outcome"] == row.outcome, row
            assert record["error_code"] == row.code, row
            assert row.passages in (None, record["retrieval_outcome"]), row


async def ask_all(
    world: World, rows: list[Row], model: str, begin: Callable[[], Awaitable[None]] | None = None
) -> list[tuple[Seen, float]]:
    """Make the requests of these rows beside each other, once `begin` has begun; with the seconds each took."""
    gate = Gate()

    async def ask(row: Row) -> tuple[Seen, float]:
        seen = await world.ask(row.request, gate, model=model)
        return seen, time.perf_counter() - began

    asking = [asyncio.create_task(ask(row)) for row in rows]
    await gate.waited_at_by(len(rows))
    if begin is not None:
        await begin()
    began = time.perf_counter()
    await gate.open()
    return await asyncio.gather(*asking)


async def well_again(world: World, dependency: str, row: Row, model: str, at_most: float) -> float:
    """How long it takes until a request succeeds, and all of the dependency is used for it."""
    began = time.perf_counter()
    request = row.request.replace("stream under way", "streamed chat")
    spans = len(world.collector.traces)
    async with asyncio.timeout(at_most):
        while True:
            ((seen, _),) = await ask_all(world, [Row(**{**vars(row), "asked": request})], model)
            is_well = seen.status in (200, 201) and seen.code is None
            if is_well and row.passages:
                assert seen.prediction_id is not None
                is_well = (await world.record_of(seen.prediction_id))["retrieval_outcome"] == "used"
            if dependency == "OTLP collector":
                is_well = is_well and len(world.collector.traces) > spans
            if dependency == "one engine of two":
                is_well = is_well and await world.are_in("pair")
            if is_well:
                return time.perf_counter() - began
            await asyncio.sleep(0.1)
