"""A service as a process of its own, a proxy that can fail before each of its dependencies, and what it is asked.

The words are those of the table in docs/reliability.md.
"""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from redis.asyncio import Redis as RedisClient

from app.access import create_key
from tests.collector import Collector
from tests.fake_qdrant import fake_qdrant
from tests.fake_tgi import Act, FakeTGI, Tokens
from tests.faults import FaultyProxy
from tests.postgres import Postgres
from tests.redis_server import Redis
from tests.service import CHAT, EVERYTHING, Api, Stream, until
from tests.service_process import service_process

DEPENDENCIES = ("engine", "one engine of two", "Qdrant", "PostgreSQL", "Redis", "OTLP collector")
QUESTION = "How tall is the tower?"
AT_LENGTH = "Tell me at length."
PLAIN = {"mode": "off"}
TIMEOUTS = {"first_token_timeout_seconds": 3.0, "between_tokens_timeout_seconds": 3.0}


@dataclass(frozen=True)
class Seen:
    """What a client saw."""

    status: int
    code: str | None = None
    has_retry_after: bool = False
    prediction_id: str | None = None

    @classmethod
    def of(cls, response: httpx.Response) -> "Seen":
        return cls._made(response, response.json()["error"]["code"] if response.status_code >= 400 else None)

    @classmethod
    def of_stream(cls, stream: Stream) -> "Seen":
        assert stream.done == (stream.error is None), "a stream ended without a word"
        return cls._made(stream.response, stream.error["code"] if stream.error else None)

    @classmethod
    def _made(cls, response: httpx.Response, code: str | None) -> "Seen":
        headers = response.headers
        return cls(
            response.status_code,
            code,
            "retry-after" in headers,
            headers.get("x-prediction-id") or headers.get("x-request-id"),
        )


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


@dataclass
class World:
    """The service and its dependencies."""

    api: Api
    tight_key: str
    """A key that may send one request a minute."""
    proxies: dict[str, FaultyProxy]
    collector: Collector
    redis: RedisClient
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    async def ask(self, dependency: str, request: str, gate: Gate) -> Seen:
        """Make one of the requests that the table names, from when the gate is open."""
        model = "paired" if dependency == "one engine of two" else "hallmark"
        if request == "stream under way":
            return await self._stream_under_way(gate, model)
        await gate.passed()
        if request == "streamed chat":
            return Seen.of_stream(await self.api.stream(QUESTION, model=model))
        if request == "list of predictions":
            return Seen.of(await self.api.client.get("/v1/predictions"))
        if request == "chat beyond the key's limit":
            headers = {"authorization": f"Bearer {self.tight_key}"}
            await self._post(CHAT, self.api.body(QUESTION), headers=headers)
            return await self._post(CHAT, self.api.body(QUESTION), headers=headers)
        number = next(self.numbers)
        tide = {"name": "tide.txt", "text": f"The tide is {number} metres high."}
        posts = {
            "chat": (CHAT, self.api.body(QUESTION, model=model)),
            "chat that requires passages": (CHAT, self.api.body(QUESTION, retrieval={"mode": "required"})),
            "search": ("/v1/search", {"query": QUESTION}),
            "upload": ("/v1/documents", tide),
            "upload and wait": ("/v1/documents?wait=10", tide),
            "feedback": ("/v1/feedback", {"conversation": f"c{number}", "author": "a", "rating": True}),
            "new release": ("/v1/releases", {"name": "paired", "engine": "pair", "notes": f"the {number}th"}),
        }
        return await self._post(*posts[request])

    async def _post(self, path: str, body: dict[str, Any], **options: Any) -> Seen:
        return Seen.of(await self.api.client.post(path, json=body, **options))

    async def _stream_under_way(self, gate: Gate, model: str) -> Seen:
        is_under_way = False
        async with self.api.streaming(AT_LENGTH, model=model, retrieval=PLAIN) as (stream, events):
            async for _ in events:
                if stream.text and not is_under_way:
                    is_under_way = True
                    await gate.passed()
        return Seen.of_stream(stream)

    async def record_of(self, prediction_id: str) -> dict[str, Any]:
        """The closed record of a prediction, once it is shown."""

        async def shown() -> dict[str, Any] | None:
            response = await self.api.client.get(f"/v1/predictions/{prediction_id}")
            return response.json() if response.status_code == 200 and response.json()["outcome"] != "open" else None

        return dict(await until(shown, seconds=20))

    async def notice(self, dependency: str) -> None:
        """Return when the service knows of the fault."""

        async def is_noticed() -> bool:
            if dependency == "Qdrant":
                return (await self._post("/v1/search", {"query": QUESTION})).status == 503
            return not await self._are_in("tgi")

        await until(is_noticed, seconds=20)

    async def used(self, dependency: str) -> int | None:
        """How often a dependency has been used that no answer shows; None of the others."""
        if dependency == "OTLP collector":
            return len(self.collector.traces)
        if dependency == "Redis":
            return sum([int(await self.redis.get(key)) async for key in self.redis.scan_iter("*requests/*")])
        if dependency == "one engine of two":
            return int(await self._are_in("pair"))
        return None

    async def _are_in(self, group: str) -> bool:
        """Whether requests are sent to all engines of a group."""
        metrics = (await self.api.client.get("/metrics")).text
        return set(re.findall(rf'^hallmark_engine_up{{engine="{group}".* (\S+)$', metrics, re.MULTILINE)) == {"1.0"}


def answer_to(body: dict[str, Any]) -> Act:
    """A short answer, or one that takes a while."""
    if body["messages"][-1]["content"] == AT_LENGTH:
        return Tokens(*(f" word{i}" for i in range(30)), delay_seconds=0.05)
    return Tokens("The tower is 330 metres", " tall.")


@asynccontextmanager
async def faulty_world(folder: Path) -> AsyncIterator[World]:
    """Start everything, with one document and a release `paired` on two engines."""
    async with AsyncExitStack() as stack:
        server = stack.enter_context(Postgres())
        redis = stack.enter_context(Redis(folder))
        collector = stack.enter_context(Collector())
        alone, first, second = [await stack.enter_async_context(FakeTGI(default=answer_to)) for _ in range(3)]
        second.queue_size = 50  # So that the first is asked first.
        targets = {
            "engine": urlsplit(alone.url).netloc,
            "one engine of two": urlsplit(first.url).netloc,
            "Qdrant": urlsplit(await stack.enter_async_context(fake_qdrant())).netloc,
            "PostgreSQL": f"{server.folder}/.s.PGSQL.5432",
            "Redis": f"127.0.0.1:{redis.port}",
            "OTLP collector": urlsplit(collector.url).netloc,
        }
        proxies = {name: await stack.enter_async_context(FaultyProxy(targets[name])) for name in DEPENDENCIES}
        database = server.create_database()
        pair = [proxies["one engine of two"].url, second.url]
        settings = {
            "engine": TIMEOUTS,
            "engines": {"pair": {"urls": pair, "start_wait_seconds": 0.0, **TIMEOUTS}},
            "qdrant": {"url": proxies["Qdrant"].url},
            "database_url": f"postgresql://postgres@127.0.0.1:{proxies['PostgreSQL'].port}{urlsplit(database).path}",
            "limits": {"redis_url": f"redis://127.0.0.1:{proxies['Redis'].port}"},
        }
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": proxies["OTLP collector"].url, "OTEL_BSP_SCHEDULE_DELAY": "500"}
        # Without a limit nothing would be asked of Redis.
        key, tight_key = [
            (await asyncio.to_thread(create_key, database, name="test", scopes=EVERYTHING, requests_per_minute=each))[1]
            for each in (100_000, 1)
        ]
        process = await stack.enter_async_context(
            service_process(folder / "data", proxies["engine"].url, settings, key=key, variables=variables)
        )
        client = await stack.enter_async_context(process.client())
        client.timeout = 60
        api = Api(client, "default", key)
        await api.add("tower.txt", "The tower is 330 metres tall. It stands in Paris.")
        made = await client.post("/v1/releases", json={"name": "paired", "engine": "pair"})
        assert made.json()["approved"], made.text
        promoted = await client.post("/v1/rollouts/paired/promote", json={"release": "paired@1", "why": "test"})
        assert promoted.status_code == 200, promoted.text
        reader = await stack.enter_async_context(RedisClient.from_url(redis.url))
        yield World(api, tight_key, proxies, collector, reader)
