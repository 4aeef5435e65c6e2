"""What the gateway costs a request: its CPU and its added time, beside calling the stand-in engine directly.

Everything is on: API key, durable record awaited, metrics, access log, tracing with 1 % of requests sampled and sent to
a collector on loopback. The gateway is one process, the stand-in engine another, the load this one; rounds of direct
and gateway are interleaved, and medians are reported. CPU is the gateway process's own user and system time, all its
threads included. The last line is JSON.

    python -m tests.benchmarks.gateway [--requests 8000] [--rounds 5] [--passages 20000] [--sampled 0.01]
                                       [--against ../another-checkout [--processes 2]] [--bound]

On a machine that others use too, figures of two runs say nothing about two versions. `--against` starts the gateway of
another checkout beside this one, in this environment; in every round both are measured, in turn, and the medians of the
rounds' ratios are reported, with their quartiles: many short rounds (`--rounds 30 --requests 1000`) say more than few
long ones. Processes of one version differ by up to 4 %, so that `--processes` starts several of each; a round's figure
of a version is then the mean of theirs.

`--bound` has gateways and echo keep to one core, and the engine and the load to another, as the budget's figures were
measured; else the system places them.

Beside them a bare ASGI application that sends a body back is measured under uvicorn, the least that a request can cost:
what another machine takes for that says how far its figures are from these.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools
import numpy as np
import psutil
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

TOKENS = 64
PROMPT = "Which of the passages says when the office opens on Fridays? " * 32

# 64 words in four sentences that every passage of the benchmark supports: what is measured is an answer that stands.
ANSWER = (
    "The door of the great hall opens at nine in the morning on every working day of the week. "
    "Visitors show their ticket at the desk beside the stairs and leave their coats with the porter. "
    "The keeper of the keys may change the rule after a vote of the council held in the spring. "
    "Nobody enters after the evening bell has been rung."
)

BUDGET = {  # Microseconds of CPU, and milliseconds added at one caller.
    "json_cpu_us": 150,
    "stream_cpu_us": 400,
    "added_p50_ms": 0.6,
    "retrieval_cpu_us": 6_000,
}


class Connection(asyncio.Protocol):
    """One kept connection of the load: sends a request, waits for the whole response."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.done: asyncio.Future[None] | None = None
        self.last = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.last = body

    def on_message_complete(self) -> None:
        assert self.done is not None
        if self.parser.get_status_code() != 200:
            self.done.set_exception(AssertionError(f"status {self.parser.get_status_code()}: {self.last[:300]!r}"))
        else:
            self.done.set_result(None)
        self.parser = httptools.HttpResponseParser(self)

    async def ask(self, request: bytes) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self.done


@dataclass
class Target:
    """Where to send requests, and what kind."""

    url: str
    key: str | None
    model: str

    def request(self, *, stream: bool, retrieval: bool | None, question: str | None = None) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question or PROMPT}],
            "max_tokens": TOKENS,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        if retrieval is not None:
            body["retrieval"] = {"mode": "auto" if retrieval else "off"}
        encoded = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(self.url).netloc}\r\n"
        head += "content-type: application/json\r\n" + (f"authorization: Bearer {self.key}\r\n" if self.key else "")
        return head.encode() + b"content-length: %d\r\n\r\n" % len(encoded) + encoded


async def load(target: Target, requests: list[bytes], concurrency: int) -> list[float]:
    """Send the requests over `concurrency` connections; gives each one's seconds."""
    where = urlsplit(target.url)
    loop = asyncio.get_running_loop()
    pending = list(reversed(requests))
    seconds: list[float] = []

    async def one_connection() -> None:
        _, connection = await loop.create_connection(Connection, where.hostname, where.port)
        while pending:
            request = pending.pop()
            started = time.perf_counter()
            await connection.ask(request)
            seconds.append(time.perf_counter() - started)
        connection.transport.close()

    await asyncio.gather(*(one_connection() for _ in range(concurrency)))
    return seconds


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time so far; by Linux' clock of the process, since what psutil gives has steps of 10 ms."""
    if sys.platform == "linux":
        return time.clock_gettime((~process.pid << 3) | 2)  # clock_getcpuclockid(3) of another process.
    times = process.cpu_times()
    return times.user + times.system


@contextlib.contextmanager
def child(
    *command: str, env: dict[str, str] | None = None, cwd: Path | None = None, core: int | None = None
) -> Iterator[tuple[str, psutil.Process]]:
    """Run a child that prints its address first, from the code in `cwd`; on one core alone if that is named."""
    with subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, cwd=cwd
    ) as process:
        try:
            if core is not None:
                os.sched_setaffinity(process.pid, {core})
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            yield line, psutil.Process(process.pid)
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[str]:
    """Take what an exporter sends and say that it was well received."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    int(v)
                    for k, _, v in (h.partition(":") for h in head.decode().lower().split("\r\n"))
                    if k == "content-length"
                )
                await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@dataclass
class Version:
    """A checkout under test: the gateways started of it, and what was measured, for each kind of request its rounds."""

    gateways: list[tuple[Target, psutil.Process]]
    rounds: dict[str, list[dict[str, float]]]


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    checkouts = {"this": Path.cwd()} | ({"against": given.against.resolve()} if given.against else {})
    core, others = sorted(os.sched_getaffinity(0))[:2] if given.bound else (None, None)
    if others is not None:
        os.sched_setaffinity(0, {others})
    async with collector() as sink:
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": sink,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": str(given.sampled),
        }
        with contextlib.ExitStack() as stack:
            engine_url, _ = stack.enter_context(child("tests.fake_tgi", "--answer", ANSWER))
            echo_url, echo = stack.enter_context(child("tests.benchmarks.gateway", "--echo", core=core))
            versions = {name: Version([], {}) for name in checkouts}
            for name in list(checkouts) * given.processes:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                serve = ("tests.benchmarks.gateway", "--serve", folder, "--engine", engine_url)
                line, process = stack.enter_context(
                    child(*serve, "--passages", str(given.passages), env=env, cwd=checkouts[name], core=core)
                )
                started = json.loads(line)
                versions[name].gateways.append((Target(started["url"], started["key"], "hallmark"), process))
            echoing = Target(echo_url, None, "echo"), echo
            return await compare(given, Target(engine_url, None, "tgi"), echoing, versions)


async def compare(
    given: argparse.Namespace, direct: Target, echo: tuple[Target, psutil.Process], versions: dict[str, Version]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    echoes: list[dict[str, float]] = []
    numbers = iter(range(10**9))  # No question is asked twice: a cached vector costs nothing.
    for name, stream, retrieval in (
        ("json", False, False),
        ("stream", True, False),
        ("json_retrieval", False, True),
        ("stream_retrieval", True, True),
    ):
        if retrieval and not given.passages:
            continue
        for number in range(given.rounds):
            echoes.append({"cpu_us": await echo_round(given, *echo)})
            turns: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
            for at in range(given.processes):
                for version in list(versions)[:: 1 if (number + at) % 2 else -1]:
                    gateway = versions[version].gateways[at]
                    turns[version].append(await one_round(given, direct, *gateway, stream, retrieval, numbers))
            for version, measured in turns.items():
                mean = {key: statistics.fmean(one[key] for one in measured) for key in measured[0]}
                versions[version].rounds.setdefault(name, []).append(mean)
        found[name] = summary(versions["this"].rounds[name])
        if "against" in versions:
            theirs = versions["against"].rounds[name]
            ratios = [
                {key: ours[key] / their[key] for key in ("cpu_us", "cpu_us_one_caller", "p50_ms")}
                for ours, their in zip(versions["this"].rounds[name], theirs, strict=True)
            ]
            found[name] |= {"against": summary(theirs), "ratio": summary(ratios), "ratio_quartiles": quartiles(ratios)}
        print(name, found[name], flush=True)
    return found | {"echo": summary(echoes)}


async def echo_round(given: argparse.Namespace, target: Target, process: psutil.Process) -> float:
    """The microseconds of CPU that the echo takes for a JSON request of the gateway's, with many callers."""
    requests = batch(target, given.requests, stream=False)
    before = cpu_seconds(process)
    await load(target, requests, given.concurrency)
    return (cpu_seconds(process) - before) / given.requests * 1e6


async def one_round(
    given: argparse.Namespace,
    direct: Target,
    target: Target,
    process: psutil.Process,
    stream: bool,
    retrieval: bool,
    numbers: Iterator[int],
) -> dict[str, float]:
    """Measure one gateway, and the engine without it, with one caller and with many."""
    count = given.requests if not retrieval else max(200, given.requests // 8)
    few = max(100, count // 8)
    alone = statistics.median(await load(direct, batch(direct, few, stream=stream), 1)) * 1e3
    before = cpu_seconds(process)
    one = await load(target, batch(target, few, stream=stream, retrieval=retrieval, numbers=numbers), 1)
    one_caller = (cpu_seconds(process) - before) / few * 1e6
    await load(direct, batch(direct, few, stream=stream), given.concurrency)
    requests = batch(target, count, stream=stream, retrieval=retrieval, numbers=numbers)
    before, started = cpu_seconds(process), time.perf_counter()
    many = await load(target, requests, given.concurrency)
    seconds = time.perf_counter() - started
    p50 = statistics.median(one) * 1e3
    return {
        "cpu_us": (cpu_seconds(process) - before) / count * 1e6,
        "cpu_us_one_caller": one_caller,
        "added_p50_ms": p50 - alone,
        "p50_ms": p50,
        "direct_p50_ms": alone,
        "p99_ms": statistics.quantiles(many, n=100)[98] * 1e3,
        "requests_per_second": count / seconds,
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}


def quartiles(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """The lower and the upper quartile of each figure."""
    if len(rounds) < 2:
        return {}
    cuts = {key: statistics.quantiles((one[key] for one in rounds), n=4) for key in rounds[0]}
    return {key: [round(lower, 3), round(upper, 3)] for key, (lower, _, upper) in cuts.items()}


def batch(
    target: Target, count: int, *, stream: bool, retrieval: bool | None = None, numbers: Iterator[int] | None = None
) -> list[bytes]:
    """Requests to send: with retrieval each asks something else."""
    if not retrieval or numbers is None:
        return [target.request(stream=stream, retrieval=retrieval)] * count
    asked = [question(next(numbers)) for _ in range(count)]
    return [target.request(stream=stream, retrieval=True, question=text) for text in asked]


def question(number: int) -> str:
    """A question unlike the others, so that no vector is found in a cache."""
    subjects = ("office", "warranty", "engine", "invoice", "release", "passage", "harbour", "lantern")
    return (
        f"When does the {subjects[number % 8]} of section {number} open, and who may change rule {number * 7 % 1009}?"
    )


async def serve(given: argparse.Namespace) -> None:
    """Be the gateway under test: the real composition, with passages whose vectors cost nothing to make."""
    from app.access import create_key
    from app.main import open_service
    from app.serving import serve as serve_app
    from app.settings import Settings
    from observability import logs
    from retrieval.embedder import SentenceTransformerEmbedder

    class CheapBulk(SentenceTransformerEmbedder):
        """Real vectors for questions; for documents, mixtures of a few real ones."""

        async def embed(self, texts, kind, *, bulk=False):  # type: ignore[no-untyped-def]
            if not bulk:
                return await super().embed(texts, kind, bulk=bulk)
            if not hasattr(self, "basis"):
                self.basis = await super().embed([question(number) for number in range(64)], kind, bulk=True)
            weights = np.random.default_rng(len(texts)).dirichlet(np.ones(64) / 8, len(texts))
            mixed = (weights @ self.basis).astype(np.float32)
            return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)

        def count_tokens(self, texts):  # type: ignore[no-untyped-def]
            return [len(text) // 4 for text in texts]

    folder = Path(given.serve)
    settings = Settings(data_dir=folder, engine={"url": given.engine}, log_format="json")
    _, key = create_key(folder / "hallmark.db", name="bench", scopes=("chat", "documents:write"))
    with (folder / "log").open("wb") as stream:
        log = logs.configure("INFO", "json", stream=stream)
        async with open_service(settings, log, embedder=CheapBulk()) as app:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            serving = asyncio.create_task(serve_app(app, listener))
            if given.passages:
                await fill(url, key, given.passages)
            print(json.dumps({"url": url, "key": key}), flush=True)
            await serving
        log.close()


async def echo() -> None:
    """Be the least that uvicorn serves: an application that sends back what it is sent."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(sent_back, http="httptools", log_config=None, access_log=False, lifespan="off")
    await uvicorn.Server(config).serve(sockets=[listener])


async def sent_back(_: Scope, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def fill(url: str, key: str, passages: int) -> None:
    """Ingest documents of 500 sections each until there are as many passages."""
    import httpx

    made = 0
    async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=600) as client:
        while made < passages:
            text = "\n\n".join(
                f"# Section {made + at}\n\n" + f"The {question(made + at)[9:-1]} is answered here. {ANSWER} "
                for at in range(500)
            )
            added = await client.post("/v1/documents?wait=300", json={"name": f"{made}.md", "text": text})
            added.raise_for_status()
            made += added.json()["document"]["passages"]
    print(f"{made} passages", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--sampled", type=float, default=0.01)
    parser.add_argument("--against", type=Path, help="another checkout, to be measured in turn with this one")
    parser.add_argument("--processes", type=int, default=1, help="how many gateways of each checkout")
    parser.add_argument("--bound", action="store_true", help="gateways on one core, engine and load on another")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        uvloop.run(serve(given))
        return
    if given.echo:
        uvloop.run(echo())
        return
    found = uvloop.run(measure(given))
    base = found["json"]["cpu_us"]
    verdict = {
        "json_cpu_us": found["json"]["cpu_us"],
        "stream_cpu_us": found["stream"]["cpu_us"],
        "added_p50_ms": found["json"]["added_p50_ms"],
    }
    if "json_retrieval" in found:
        verdict["retrieval_cpu_us"] = found["json_retrieval"]["cpu_us"] - base
    conditions = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "concurrency": given.concurrency,
        "passages": given.passages,
        "sampled": given.sampled,
        "bound": given.bound,
    }
    kept = {name: value <= BUDGET[name] for name, value in verdict.items()}
    print(json.dumps({"conditions": conditions, "found": found, "budget": BUDGET, "measured": verdict, "kept": kept}))


if __name__ == "__main__":
    main()
