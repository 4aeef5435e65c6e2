"""What the engine adapter costs: CPU microseconds of this process per call, beside two baselines in the same run.

`raw` is the least a Python client can do: a kept connection, a prebuilt request, httptools, one future. `hub` is
huggingface-hub's AsyncInferenceClient as it comes. The stand-in TGI runs in its own process. Rounds are interleaved
and medians reported; the last line is JSON.

    python -m tests.benchmarks.engine_adapter [--calls 400] [--rounds 5] [--concurrency 16]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import httptools
import uvloop

from app.engines.tgi import TGIEngine
from app.messages import Generation, Message, Sampling

os.environ.pop("HF_HUB_OFFLINE", None)  # The hub client refuses even loopback when it is set.

TOKENS = 64
PROMPT = "Which of the passages says when the office opens on Fridays? " * 32
BODY = {"model": "tgi", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS}

Call = Callable[[], Awaitable[None]]


class Raw(asyncio.Protocol):
    """The floor: nothing is checked, nothing can fail."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.parser.feed_data(data)

    def on_body(self, body):
        self.body = body

    def on_message_complete(self):
        self.done.set_result(None)


class RawClient:
    def __init__(self, url: str) -> None:
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port
        self.idle: list[Raw] = []

    def call(self, *, stream: bool) -> Call:
        extra = {"stream": True, "stream_options": {"include_usage": True}} if stream else {"stream": False}
        body = json.dumps({**BODY, **extra}, separators=(",", ":")).encode()
        request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        loop = asyncio.get_running_loop()

        async def once() -> None:
            if self.idle:
                link = self.idle.pop()
            else:
                _, link = await loop.create_connection(Raw, self.host, self.port)
            link.done = loop.create_future()
            link.transport.write(request)
            await link.done
            self.idle.append(link)

        return once


def adapter_call(engine: TGIEngine, *, stream: bool) -> Call:
    sampling = Sampling(max_tokens=TOKENS)

    async def once() -> None:
        tokens = 0
        generation = Generation([Message("user", PROMPT)], sampling=sampling, stream=stream)
        async for pieces in engine.generate(generation):
            tokens += len(pieces)
        assert tokens == (TOKENS + 1 if stream else 1)

    return once


def hub_call(client, *, stream: bool) -> Call:
    async def once() -> None:
        answer = await client.chat_completion(
            BODY["messages"], model="tgi", max_tokens=TOKENS, stream=stream, stream_options={"include_usage": True}
        )
        if stream:
            async for _ in answer:
                pass

    return once


async def cpu_us(call: Call, calls: int, concurrency: int) -> float:
    """CPU microseconds of this process per call, `concurrency` of them at a time."""

    async def worker() -> None:
        for _ in range(calls // concurrency):
            await call()

    await asyncio.gather(*(call() for _ in range(concurrency)))
    begun = time.process_time()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return (time.process_time() - begun) / (calls // concurrency * concurrency) * 1e6


async def measure(url: str, calls: int, rounds: int, concurrency: int) -> dict[str, dict[str, float]]:
    from huggingface_hub import AsyncInferenceClient

    raw, engine = RawClient(url), TGIEngine(url)
    found: dict[str, dict[str, list[float]]] = {}
    async with AsyncInferenceClient(base_url=url, token="none") as hub:
        variants = {
            (who, kind): (call, share)
            for kind, stream in (("json", False), (f"stream{TOKENS}", True))
            for who, call, share in (
                ("raw", raw.call(stream=stream), 1),
                ("adapter", adapter_call(engine, stream=stream), 1),
                ("hub", hub_call(hub, stream=stream), 20 if stream else 5),
            )
        }
        for number in range(rounds):
            order = list(variants.items())
            for (who, kind), (call, share) in order[number % len(order) :] + order[: number % len(order)]:
                spent = await cpu_us(call, max(concurrency, calls // share), concurrency)
                found.setdefault(kind, {}).setdefault(who, []).append(spent)
    await engine.aclose()
    for link in raw.idle:
        link.transport.abort()
    return {
        kind: {who: round(statistics.median(spent), 1) for who, spent in whos.items()} for kind, whos in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=16)
    given = parser.parse_args()
    command = [sys.executable, "-m", "tests.fake_tgi", "--tokens", str(TOKENS)]
    results = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            for concurrency in (1, given.concurrency):
                results[f"c{concurrency}"] = uvloop.run(measure(url, given.calls, given.rounds, concurrency))
        finally:
            server.terminate()
    print("CPU us per call (this process only)")
    for load, kinds in results.items():
        for kind, whos in kinds.items():
            row = "  ".join(f"{who} {spent:8.1f}" for who, spent in whos.items())
            print(f"{load:>4} {kind:>9}  {row}   adapter - raw {whos['adapter'] - whos['raw']:6.1f}")
    print(json.dumps({"unit": "cpu_us_per_call", "tokens": TOKENS, **results}))


if __name__ == "__main__":
    main()
