"""Ten times as many requests as can be answered, for half a minute: the rest is told so at once, and nobody suffers."""

import asyncio
import contextlib
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

import httptools
import pytest

from tests.fake_tgi import FakeTGI, Tokens
from tests.service import CHAT
from tests.service_process import ServiceProcess, service_process

T = TypeVar("T")

PLACES = 16
ANSWER_SECONDS = 0.4
SECONDS = 30.0
TIMES = 10
"""How many times more requests come than the service was seen to answer."""

QUIET_SECONDS = 0.01
"""What `/healthz` takes at most of an idle service on a machine of its own: where it takes longer, all bars rise."""


@dataclass
class Reply:
    """One response as a client met it."""

    status: int
    seconds: float
    at: float
    retry_after: str | None


class Connection(asyncio.Protocol):
    """A kept connection of a client that costs little: the machine is shared with the service."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionResetError("closed without an answer"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = value.decode()

    def on_message_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._parser = httptools.HttpResponseParser(self)
        self._done.set_result(None)

    async def ask(self, request: bytes) -> Reply:
        self._done, self._retry_after = asyncio.get_running_loop().create_future(), None
        started = time.perf_counter()
        self._transport.write(request)
        await self._done
        now = time.perf_counter()
        return Reply(self._status, now - started, now, self._retry_after)

    def close(self) -> None:
        self._transport.close()


@dataclass
class Crowd:
    """Clients that ask at a steady pace, however long answers take."""

    process: ServiceProcess
    _idle: list[Connection] = field(default_factory=list)

    def request(self, method: str, path: str, body: object = None) -> bytes:
        content = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nhost: {urlsplit(self.process.url).netloc}\r\n"
        head += f"authorization: Bearer {self.process.key}\r\ncontent-length: {len(content)}\r\n\r\n"
        return head.encode() + content

    async def ask(self, request: bytes) -> Reply:
        while self._idle:
            connection = self._idle.pop()
            # The service closes a connection that it was not asked on for some seconds, perhaps at this moment.
            with contextlib.suppress(ConnectionError):
                if connection.is_open:
                    return await self._ask_on(connection, request)
        where, loop = urlsplit(self.process.url), asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, where.hostname, where.port)
        return await self._ask_on(connection, request)

    async def _ask_on(self, connection: Connection, request: bytes) -> Reply:
        reply = await connection.ask(request)
        self._idle.append(connection)
        return reply

    async def keep_asking(self, rate: float, seconds: float) -> list[Reply]:
        """Ask so many times a second, every other time for a stream."""
        body = {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}], "retrieval": {"mode": "off"}}
        requests = itertools.cycle([self.request("POST", CHAT, {**body, "stream": each}) for each in (False, True)])
        asking, started = [], time.perf_counter()
        for number in range(int(rate * seconds)):
            asking.append(asyncio.create_task(self.ask(next(requests))))
            ahead = started + number / rate - time.perf_counter()
            if ahead > 0:
                await asyncio.sleep(ahead)
        return await asyncio.gather(*asking)

    async def health_beside(self, work: Awaitable[T]) -> tuple[T, float]:
        """Ask for the service's health all the time while `work` is done; gives its result, and p99 of the seconds."""
        request, seconds, task = self.request("GET", "/healthz"), [], asyncio.ensure_future(work)
        while not task.done():
            reply = await self.ask(request)
            assert reply.status == 200
            seconds.append(reply.seconds)
            await asyncio.sleep(0.02)
        return await task, p99(seconds)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def goodput(replies: list[Reply]) -> float:
    """Answers a second, while requests came."""
    answered = sorted(reply.at for reply in replies if reply.status == 200)
    return (len(answered) - 1) / (answered[-1] - answered[0])


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(150)
async def test_ten_times_too_many_requests_cost_those_that_are_answered_nothing(tmp_path, capsys):
    answer = Tokens("Hello", " world", ".", delay_seconds=ANSWER_SECONDS / 3)
    settings = {"limits": {"max_concurrent_answers": PLACES, "max_waiting_answers": 2 * PLACES}}
    async with (
        FakeTGI(default=answer) as tgi,
        service_process(tmp_path, tgi.url, settings) as process,
    ):
        crowd = Crowd(process)
        for _ in range(10):  # Everything is warm after this.
            await crowd.ask(crowd.request("GET", "/healthz"))
        _, idle = await crowd.health_beside(asyncio.sleep(3.0))
        slowness = max(1.0, idle / QUIET_SECONDS)
        await crowd.keep_asking(PLACES / ANSWER_SECONDS / 2, 1.0)
        peak = goodput(await crowd.keep_asking(1.3 * PLACES / ANSWER_SECONDS, 8.0))
        tgi.requests.clear()
        replies, health = await crowd.health_beside(crowd.keep_asking(TIMES * peak, SECONDS))
        crowd.close()

        statuses = Counter(reply.status for reply in replies)
        refused = [reply for reply in replies if reply.status != 200]
        refusals = p99([reply.seconds for reply in refused])
        answers = p99([reply.seconds for reply in replies if reply.status == 200])
        kept = goodput(replies) / peak
        with capsys.disabled():
            print(
                f"\n{len(replies)} requests in {SECONDS:g} s, {TIMES} times the peak of {peak:.0f}/s, on a machine "
                f"{slowness:.1f} times as slow as a quiet one: {dict(statuses)}; goodput {kept:.0%} of peak; p99 in ms "
                f"of refusals {refusals * 1e3:.1f}, of answers {answers * 1e3:.0f}, of /healthz {health * 1e3:.1f}"
            )
        assert set(statuses) <= {200, 429, 503}
        assert statuses[200] + statuses[429] == len(replies)  # The engine is well, so that nobody is told otherwise.
        assert all(reply.retry_after is not None and int(reply.retry_after) >= 1 for reply in refused)
        assert kept > 0.9
        # Below the shortest answer; on slow processors most of it is the client's own waiting for a processor.
        assert refusals < 0.3 * slowness
        assert health < 0.05 * slowness
        # Who was let in to wait stood behind 32 others for 16 places.
        assert answers < 10 * ANSWER_SECONDS
