"""The service keeps nothing of a request that is over, however it ended."""

import asyncio
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from tests.fake_tgi import Act, FakeTGI, Refuse, Tokens
from tests.service import CHAT
from tests.service_process import service_process

REQUESTS = 50_000
WARM_UP = 15_000
SAMPLE_EVERY = 1_000
CALLERS = 16
MOST_BYTES_A_REQUEST = 250
"""What was kept of a request's task, prediction or trace would be some kilobytes."""

WORDS = Tokens(*(f" word{i}" for i in range(8)))
CUT = Tokens(*(f" word{i}" for i in range(8)), cut_after=3)
HELD = Tokens(" one", " two", gates={1: asyncio.Event()})
ACTS: dict[str, Act] = {"whole": WORDS, "cut": CUT, "failed": Refuse.failed(), "held": HELD}

# What each of a hundred requests is: (the engine's act, streamed, valid, hangs up).
MIX = [
    *[("whole", False, True, False)] * 45,
    *[("whole", True, True, False)] * 35,
    *[("held", True, True, True)] * 6,
    *[("cut", True, True, False)] * 4,
    *[("failed", False, True, False)] * 4,
    *[("whole", False, False, False)] * 6,
]


class Caller:
    """One client after another on one connection: as little work as possible for what it sends and reads."""

    def __init__(self, url: str, key: str) -> None:
        self._where = urlsplit(url)
        self._key = key
        self._reader: asyncio.StreamReader | None = None

    async def ask(self, act: str, *, stream: bool, valid: bool, hangs_up: bool) -> str:
        """Send one request; says how it ended."""
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(self._where.hostname, self._where.port)
        body: dict[str, Any] = {
            "model": "hallmark" if valid else "nobody",
            "messages": [{"role": "user", "content": act}],
            "stream": stream,
            "retrieval": {"mode": "off"},
        }
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self._key}\r\ncontent-length: {len(content)}"
        self._writer.write(head.encode() + b"\r\n\r\n" + content)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        status = head.split(" ", 2)[1]
        if hangs_up:
            await self._reader.readuntil(b"one")
            await self.close()
            return "left"
        length = re.search(r"content-length: (\d+)", head)
        if length:
            await self._reader.readexactly(int(length[1]))
            return status
        text = await self._reader.readuntil(b"0\r\n\r\n")
        return "cut" if b"event: error" in text else f"{status} stream"

    async def close(self) -> None:
        """Hang up."""
        if self._reader is not None:
            self._reader = None
            self._writer.close()
            await self._writer.wait_closed()


async def one_of_many(caller: Caller, requests: Iterator[int], endings: Counter[str], rss: list[int], pid: int) -> None:
    process = psutil.Process(pid)
    for number in requests:
        act, stream, valid, hangs_up = MIX[number * 37 % len(MIX)]
        endings[await caller.ask(act, stream=stream, valid=valid, hangs_up=hangs_up)] += 1
        if number % SAMPLE_EVERY == 0:
            rss.append(process.memory_info().rss)
    await caller.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_memory_stays_flat_over_fifty_thousand_requests_that_end_in_every_way(tmp_path, capsys):
    def act(body: dict[str, Any]) -> Act:
        return ACTS[body["messages"][-1]["content"]]

    async with FakeTGI(default=act) as tgi, service_process(tmp_path, tgi.url) as process:
        endings: Counter[str] = Counter()
        rss: list[int] = []
        requests = iter(range(REQUESTS))
        callers = [Caller(process.url, process.key) for _ in range(CALLERS)]
        forgetting = asyncio.create_task(_forget(tgi))
        await asyncio.gather(*(one_of_many(each, requests, endings, rss, process.pid) for each in callers))
        forgetting.cancel()
    measured = np.array(rss[WARM_UP // SAMPLE_EVERY :])
    slope = float(np.polyfit(np.arange(len(measured)) * SAMPLE_EVERY, measured, 1)[0])
    with capsys.disabled():
        print(
            f"\n{REQUESTS} requests, {dict(endings)}: {measured[0] / 1e6:.1f} MB after {WARM_UP}, "
            f"{measured[-1] / 1e6:.1f} MB at the end, {slope:.0f} bytes a request"
        )
    share = REQUESTS // 100
    assert endings == {
        "200": 45 * share,
        "200 stream": 35 * share,
        "left": 6 * share,
        "cut": 4 * share,
        "502": 4 * share,
        "404": 6 * share,
    }
    assert slope < MOST_BYTES_A_REQUEST


async def _forget(tgi: FakeTGI) -> None:
    """Let the stand-in forget what it was sent: it remembers for tests that ask."""
    for _ in itertools.count():
        tgi.requests.clear()
        await asyncio.sleep(0.5)
