"""Two gateways on one PostgreSQL at 200 requests a second are killed 20 times, are without their database for a minute,
and one of them is without room on its disk: what clients saw complete is in the database in the end, once."""

import asyncio
import itertools
import json
import random
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from app.database import Database, predictions
from tests.postgres import Postgres
from tests.service import CHAT
from tests.service_process import DidNotStart, ServiceProcess, service_process
from tests.small_disk import SmallDisk

REQUESTS_A_SECOND = 200
KILLS = 20
OUTAGE_SECONDS = 60.0
FULL_SECONDS = 8.0
RECOVERY_SECONDS = 10.0
ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """One life of a gateway's process."""

    process: ServiceProcess
    client: httpx.AsyncClient
    was_killed: bool = False


class Gateway:
    """A gateway that is started again whenever it ends, on its own data directory and with the same key."""

    def __init__(self, name: str, data_dir: Path, engine_url: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.data_dir = data_dir
        self.run: Run | None = None
        self.starts: list[float] = []
        """How many seconds each start took."""
        self._key: str | None = None
        self._given = (data_dir, engine_url, settings)
        self._clients = AsyncExitStack()

    @asynccontextmanager
    async def kept_running(self) -> AsyncIterator[None]:
        supervisor = asyncio.create_task(self._supervise())
        try:
            await self.up()
            yield
        finally:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            await self._clients.aclose()

    async def _supervise(self) -> None:
        while True:
            began = time.monotonic()
            try:
                async with service_process(*self._given, key=self._key) as process:
                    self._key = process.key
                    self.starts.append(time.monotonic() - began)
                    self.run = Run(process, await self._clients.enter_async_context(process.client()))
                    await process.ended()
            except DidNotStart:
                await asyncio.sleep(0.5)
            finally:
                self.run = None

    async def up(self) -> Run:
        while self.run is None:
            await asyncio.sleep(0.02)
        return self.run

    async def kill(self) -> None:
        run = await self.up()
        run.was_killed = True
        self.run = None
        run.process.kill()

    def waiting(self) -> int:
        """How many predictions are in the outbox."""
        with closing(sqlite3.connect(self.data_dir / "hallmark.db", timeout=10)) as connection:
            return int(connection.execute("SELECT count(*) FROM predictions").fetchone()[0])


@dataclass
class Refusal:
    """An error as a client saw it, and when."""

    gateway: str
    at: float
    status: int
    code: str
    has_retry_after: bool


@dataclass
class Seen:
    """What the clients saw."""

    complete: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)
    broken_by_no_kill: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    last_complete: dict[str, float] = field(default_factory=dict)
    """When the last answer of each gateway was complete."""


class Traffic:
    """Requests at a steady pace to each gateway in turn, or to the other while it is down; every other pair streams."""

    def __init__(self, gateways: list[Gateway]) -> None:
        self._gateways = gateways
        self.seen = Seen()

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[Seen]:
        pacing = asyncio.create_task(self._pace())
        try:
            yield self.seen
        finally:
            pacing.cancel()
            await asyncio.gather(pacing, return_exceptions=True)
            await asyncio.gather(*self._asking)

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._asking: set[asyncio.Task[None]] = set()
        for number in itertools.count():
            one, other = self._gateways if number % 2 else reversed(self._gateways)
            task = asyncio.create_task(self._ask(one if one.run else other, stream=number // 2 % 2 == 0))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
            await asyncio.sleep(max(0.0, started + (number + 1) / REQUESTS_A_SECOND - loop.time()))

    async def _ask(self, gateway: Gateway, *, stream: bool) -> None:
        run, seen = gateway.run, self.seen
        seen.counts["asked"] += 1
        if run is None:
            seen.counts["found nobody there"] += 1
            return
        body = {
            "model": "hallmark",
            "messages": [{"role": "user", "content": "What is a release?"}],
            "retrieval": {"mode": "off"},
            "stream": stream,
        }
        try:
            async with run.client.stream("POST", CHAT, json=body) as response:
                if response.status_code == 200:
                    seen.begun.add(response.headers["x-prediction-id"])
                content = await response.aread()
        except httpx.TransportError as error:
            seen.counts["broken off"] += 1
            if not run.was_killed:
                seen.broken_by_no_kill.append(repr(error))
            return
        self._note(gateway, response, content, stream=stream)

    def _note(self, gateway: Gateway, response: httpx.Response, content: bytes, *, stream: bool) -> None:
        seen, now = self.seen, time.monotonic()
        if response.status_code == 200 and (not stream or content.endswith(b"data: [DONE]\n\n")):
            seen.counts["complete"] += 1
            seen.complete.add(response.headers["x-prediction-id"])
            seen.last_complete[gateway.name] = now
            return
        seen.counts["refused" if response.status_code != 200 else "ended by an error"] += 1
        error = json.loads(content.rpartition(b"data: ")[2])["error"]
        has_retry_after = response.status_code == 200 or "retry-after" in response.headers
        seen.refusals.append(Refusal(gateway.name, now, response.status_code, error["code"], has_retry_after))


async def seconds_until(look: Callable[[], Awaitable[bool]], *, at_most: float = 60.0) -> float:
    """How long it takes until `look` finds what it looks for."""
    began = time.monotonic()
    async with asyncio.timeout(at_most):
        while not await look():
            await asyncio.sleep(0.05)
    return time.monotonic() - began


async def say_something(gateway: Gateway) -> httpx.Response:
    """Give feedback, which needs the database."""
    run = await gateway.up()
    return await run.client.post("/v1/feedback", json={"conversation": "c", "author": gateway.name, "rating": True})


async def kill_at_random(gateways: list[Gateway], kills: int, seconds: float) -> None:
    """Kill one or the other at so many moments of the next seconds."""
    began = time.monotonic()
    for moment in sorted(random.uniform(0, seconds) for _ in range(kills)):
        await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
        await random.choice([each for each in gateways if each.run] or gateways).kill()
    await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))


async def outcomes(url: str) -> list[tuple[str, str]]:
    async with Database(url) as database, database.reading() as connection:
        return [tuple(row) for row in await connection.execute(select(predictions.c.id, predictions.c.outcome))]


@asynccontextmanager
async def engine() -> AsyncIterator[str]:
    """A stand-in engine in a process of its own; gives its address."""
    command = [sys.executable, "-m", "tests.fake_tgi", "--tokens", "4", "--delay-ms", "5"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.wait()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(420)
async def test_kills_an_outage_and_a_full_disk_lose_and_double_nothing_that_a_client_saw_complete(tmp_path, capsys):
    async with AsyncExitStack() as stack:
        server = stack.enter_context(Postgres())
        disk = stack.enter_context(SmallDisk(tmp_path / "disk", megabytes=192))
        url = server.create_database()
        engine_url = await stack.enter_async_context(engine())
        settings = {"database_url": url}
        a = Gateway("a", disk.folder / "data", engine_url, settings)
        b = Gateway("b", tmp_path / "b", engine_url, settings)
        for gateway in (a, b):
            await stack.enter_async_context(gateway.kept_running())
        traffic = Traffic([a, b])
        async with traffic.flowing() as seen:
            await kill_at_random([a, b], 6, 20.0)

            went_away = time.monotonic()
            await asyncio.to_thread(server.stop)
            await a.kill()
            await b.kill()
            for gateway in (a, b):
                refused = await say_something(gateway)
                assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            await kill_at_random([a, b], 3, 20.0)
            disk.fill()
            full_at = time.monotonic()
            await a.kill()
            await kill_at_random([a, b], 2, FULL_SECONDS)
            run = await a.up()
            disk.free()
            freed_at = time.monotonic()

            async def records_again() -> bool:
                return seen.last_complete["a"] > freed_at

            after_full = await seconds_until(records_again)
            assert a.run is run, "the gateway whose disk was full has been restarted"
            await asyncio.sleep(max(0.0, went_away + OUTAGE_SECONDS - time.monotonic()))
            runs = [await a.up(), await b.up()]
            await asyncio.to_thread(server.start)

            async def takes_feedback() -> bool:
                return all([(await say_something(gateway)).is_success for gateway in (a, b)])

            after_outage = await seconds_until(takes_feedback)
            left = a.waiting(), b.waiting()

            async def ships() -> bool:
                return a.waiting() < left[0] and b.waiting() < left[1]

            until_shipping = after_outage + await seconds_until(ships)

            async def has_caught_up() -> bool:
                return max(a.waiting(), b.waiting()) < 2 * REQUESTS_A_SECOND

            until_caught_up = until_shipping + await seconds_until(has_caught_up)
            assert [a.run, b.run] == runs, "a gateway was restarted"
            await kill_at_random([a, b], 6, 25.0)

        async def is_empty() -> bool:
            await asyncio.gather(a.up(), b.up())
            return a.waiting() + b.waiting() == 0

        until_empty = await seconds_until(is_empty)
        rows = await outcomes(url)

    starts = a.starts + b.starts
    with capsys.disabled():
        print(
            f"\n{dict(seen.counts)}; {len(starts)} starts in {median(starts):.1f} s (median). After the outage feedback"
            f" was taken in {after_outage:.1f} s, {sum(left)} predictions began to move in {until_shipping:.1f} s and"
            f" were there in {until_caught_up:.1f} s; after the disk was full an answer was complete in"
            f" {after_full:.1f} s; after the last request the outboxes were empty in {until_empty:.1f} s:"
            f" {dict(Counter(dict(rows).values()))}"
        )
    by_id = dict(rows)
    assert len(by_id) == len(rows), "a prediction is doubled"
    assert len(starts) == KILLS + 2
    assert len(seen.complete) > 5_000, "too little was asked for the test to mean anything"
    assert Counter(by_id.get(each) for each in seen.complete) == {"finished": len(seen.complete)}
    assert {by_id.get(each) for each in seen.begun} <= {"finished", "interrupted", "failed"}
    # Only the gateway whose disk was full refused anything, and said why and when to come back.
    assert {(each.gateway, each.code, each.has_retry_after) for each in seen.refusals} == {
        ("a", "record_unavailable", True)
    }
    assert all(full_at <= each.at <= freed_at + after_full for each in seen.refusals)
    assert seen.broken_by_no_kill == []
    assert max(after_full, after_outage, until_shipping) <= RECOVERY_SECONDS
