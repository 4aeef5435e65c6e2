"""What ingestion costs: its rate beside bare embedding, its memory, and what it does to requests served meanwhile.

Rate: rounds of bare embedding (the same passages, straight into the embedder) and of ingestion (uploads, jobs, parsing
in its child process, splitting, embedding, index, SQLite on the disk) are interleaved, in one process with the packaged
model; the medians of the rounds' ratios, of seconds and of CPU, are reported, and the process's memory at its peak in
the first and in the last round. Serving: chat requests with retrieval, at a steady pace by one process, to a gateway in
another, by turns with and without jobs under way that never run dry; p50 and p99 of both, and the median of the rounds'
ratios of p99.

    python -m tests.benchmarks.ingestion [--passages 10000] [--rounds 5] [--serving-rounds 10] [--engine-ms 0]
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from retrieval.documents import Scope
from retrieval.edge import EdgeIndex
from retrieval.embedder import SentenceTransformerEmbedder
from retrieval.jobs import Ingestion
from retrieval.parsers import Parser
from retrieval.retriever import Retriever

SCOPE = Scope("bench")
SECTIONS = 20
WORDS = (
    "harbour ledger window copper morning treaty garden signal bridge winter cargo pepper lantern council anchor "
    "market clock river tunnel orchard engine letter summit barrel mirror castle thunder paper island bell"
)
CHUNK = 1024
ASK_EVERY_SECONDS = 0.1
TURN_SECONDS = 12.0


def document(number: int, edition: int) -> bytes:
    """A Markdown file of so many sections, each about one passage long and unlike any other."""
    random = np.random.default_rng([number, edition])

    def section(at: int) -> str:
        sentences = [" ".join(random.choice(WORDS.split(), 12)).capitalize() + "." for _ in range(11)]
        return f"## Section {number}.{at}\n\n{' '.join(sentences)}"

    return "\n\n".join([f"# Document {number}", *(section(at) for at in range(SECTIONS))]).encode()


async def rates(passages: int, rounds: int) -> dict[str, Any]:
    """Ingest in rounds, and embed the same passages bare in between."""
    embedder = SentenceTransformerEmbedder()
    ratios: list[float] = []
    cpu_ratios: list[float] = []
    bare_rates: list[float] = []
    memory: list[float] = []
    made = number = 0
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        async with (
            Parser() as parser,
            Retriever(directory, embedder=embedder, index=EdgeIndex(directory / "index"), parser=parser) as retriever,
            Ingestion(retriever, directory / "spool") as ingestion,
        ):
            for at in range(rounds):
                first, texts = number, 0
                started, cpu_started = time.perf_counter(), time.process_time()
                jobs = []
                while texts < passages // rounds:
                    content = await asyncio.to_thread(document, number, at)
                    jobs.append(await ingestion.accept(SCOPE, name=f"{number}.md", content=content))
                    number, texts = number + 1, texts + SECTIONS
                done = await asyncio.gather(*(job.ended for job in jobs))
                seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
                embedded = sum(ingested.embedded_passages for ingested in done)
                made += embedded
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
                corpus = [
                    passage.embedded_text
                    for ingested in done
                    for passage in await retriever.passages(SCOPE, ingested.document.id)
                ]
                assert len(corpus) == embedded
                started, cpu_started = time.perf_counter(), time.process_time()
                for start in range(0, len(corpus), CHUNK):
                    await embedder.embed(corpus[start : start + CHUNK], "document", bulk=True)
                bare = time.perf_counter() - started
                bare_rates.append(embedded / bare)
                ratios.append(bare / seconds)
                cpu_ratios.append((time.process_time() - cpu_started) / cpu_seconds)
                print(
                    f"documents {first}..{number - 1}: {embedded} passages, {embedded / seconds:.0f}/s ingested, "
                    f"{embedded / bare:.0f}/s bare, ratio {bare / seconds:.2f}, peak {memory[-1]:.0f} MiB",
                    file=sys.stderr,
                )
    return {
        "passages": made,
        "ratio": round(statistics.median(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "bare_per_second": round(statistics.median(bare_rates), 1),
        "peak_mib_first": round(memory[0]),
        "peak_mib_last": round(memory[-1]),
    }


# --- serving ---


async def serve(folder: Path, engine_url: str) -> None:
    """Be the gateway, with the packaged embedding model."""
    from tests.service import live_service

    embedder = SentenceTransformerEmbedder()
    async with live_service(folder, engine_url=engine_url, embedder=embedder) as service:
        print(json.dumps({"url": service.url, "key": service.key}), flush=True)
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def gateway(folder: Path, engine_url: str) -> Any:
    arguments = [sys.executable, "-m", "tests.benchmarks.ingestion", "--serve", str(folder), "--engine", engine_url]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    try:
        said = json.loads(await process.stdout.readline())
        headers = {"authorization": f"Bearer {said['key']}"}
        async with httpx.AsyncClient(base_url=said["url"], headers=headers, timeout=120, trust_env=False) as client:
            yield client
    finally:
        process.kill()
        await process.wait()


async def ask(client: httpx.AsyncClient, number: int) -> float:
    words = WORDS.split()
    question = f"Which section tells of the {words[number % 30]} and the {words[number * 7 % 30]} number {number}?"
    body = {"model": "hallmark", "messages": [{"role": "user", "content": question}]}
    started = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return time.perf_counter() - started


async def turn(client: httpx.AsyncClient, first: int) -> list[float]:
    """Ask at a steady pace for a while, whatever the answers take."""
    tasks, number = [], first
    until = time.perf_counter() + TURN_SECONDS
    while time.perf_counter() < until:
        tasks.append(asyncio.create_task(ask(client, number)))
        number += 1
        await asyncio.sleep(ASK_EVERY_SECONDS)
    return await asyncio.gather(*tasks)


async def feed(client: httpx.AsyncClient, first: int, fed: list[int]) -> None:
    """Upload documents so that there are always some waiting."""
    number = first
    while True:
        content = await asyncio.to_thread(document, number, 99)
        response = await client.post("/v1/documents", files={"file": (f"{number}.md", content)})
        assert response.status_code == 202, response.text
        number += 1
        fed[0] = number
        while len((await client.get("/v1/jobs?ended=false")).json()["data"]) > 8:
            await asyncio.sleep(0.2)


async def serving(rounds: int, engine_seconds: float) -> dict[str, Any]:
    """Ask by turns with and without ingestion."""
    from tests.fake_tgi import FakeTGI, Tokens

    quiet: list[float] = []
    busy: list[float] = []
    ratios: list[float] = []
    fed = [10_000]
    answer = Tokens("The section tells", " of the harbour", ".", delay_seconds=engine_seconds / 3)
    with tempfile.TemporaryDirectory() as folder:
        async with FakeTGI(default=answer) as tgi, gateway(Path(folder), tgi.url) as client:
            for number in range(10):
                await client.post("/v1/documents?wait=120", files={"file": (f"{number}.md", document(number, 0))})
            await turn(client, 0)
            for at in range(rounds):
                calm = await turn(client, at * 1_000)
                feeding = asyncio.create_task(feed(client, fed[0], fed))
                await asyncio.sleep(1)
                loaded = await turn(client, at * 1_000 + 500)
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
                while jobs := (await client.get("/v1/jobs?ended=false")).json()["data"]:
                    for job in jobs:
                        await client.post(f"/v1/jobs/{job['id']}/cancel")
                quiet += calm
                busy += loaded
                ratios.append(float(np.quantile(loaded, 0.99) / np.quantile(calm, 0.99)))
                print(f"round {at}: {_figures(calm)} without, {_figures(loaded)} with", file=sys.stderr)
    return {
        "requests": len(quiet) + len(busy),
        "engine_ms": engine_seconds * 1000,
        "p50_ms": [round(float(np.quantile(times, 0.5)) * 1000, 1) for times in (quiet, busy)],
        "p99_ms": [round(float(np.quantile(times, 0.99)) * 1000, 1) for times in (quiet, busy)],
        "p99_ratio_of_rounds": round(statistics.median(ratios), 3),
        "documents_ingested_meanwhile": fed[0] - 10_000,
    }


def _figures(times: list[float]) -> str:
    p50, p99 = np.quantile(times, [0.5, 0.99]) * 1000
    return f"p50 {p50:.1f} p99 {p99:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serving-rounds", type=int, default=10)
    parser.add_argument("--engine-ms", type=float, default=0.0, help="what the stand-in engine takes for an answer")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, given.engine))
        return
    found: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    if given.rounds:
        found["rate"] = asyncio.run(rates(given.passages, given.rounds))
    if given.serving_rounds:
        found["serving"] = asyncio.run(serving(given.serving_rounds, given.engine_ms / 1000))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
