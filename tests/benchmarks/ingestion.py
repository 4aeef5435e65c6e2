"""What ingestion costs: its rate beside bare embedding, its memory, and what it does to requests served meanwhile.

Rate: rounds of bare embedding (the same passages, straight into an embedder on one thread) and of ingestion (uploads,
jobs, parsing in its child process, splitting, embedding in its own, index, SQLite on the disk) are interleaved, with
the packaged model; the median of the rounds' ratios of seconds is reported. Memory: what the service's process and the
one that embeds hold of their own (RssAnon: mapped files, which the system may drop, left out) before, after each round,
and when the latter was idle. Serving: chat requests, every second one with retrieval, at a steady pace by one process,
to a gateway in another, by turns with and without jobs under way that never run dry; for each speed of the stand-in
engine p50 and p99 of both turns, and the ratio of p99, of all requests and as the median of the rounds'.

    python -m tests.benchmarks.ingestion [--passages 10000] [--rounds 5] [--serving-rounds 7] [--engine-ms 0 300 1000]
                                         [--threads 1]

`--threads 0` embeds in the service's process.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from retrieval.children import usable_cores
from retrieval.documents import Scope
from retrieval.edge import EdgeIndex
from retrieval.embedder import PACKAGED_MODEL, SentenceTransformerEmbedder
from retrieval.embedding_process import EmbeddingProcess, Recipe
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
IDLE_SECONDS = 5.0


def document(number: int, edition: int) -> bytes:
    """A Markdown file of so many sections, each about one passage long and unlike any other."""
    random = np.random.default_rng([number, edition])

    def section(at: int) -> str:
        sentences = [" ".join(random.choice(WORDS.split(), 12)).capitalize() + "." for _ in range(11)]
        return f"## Section {number}.{at}\n\n{' '.join(sentences)}"

    return "\n\n".join([f"# Document {number}", *(section(at) for at in range(SECTIONS))]).encode()


def embedder_with(threads: int) -> SentenceTransformerEmbedder:
    recipe = Recipe(PACKAGED_MODEL, threads)
    return SentenceTransformerEmbedder(process=EmbeddingProcess(recipe, idle_seconds=IDLE_SECONDS) if threads else None)


def own_mib(pid: int | None) -> int:
    """Memory that only this process has, in MiB; 0 for none."""
    if pid is None:
        return 0
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) // 1024


async def rates(passages: int, rounds: int, threads: int) -> dict[str, Any]:
    """Ingest in rounds, and embed the same passages bare in between."""
    embedder = embedder_with(threads)
    ratios: list[float] = []
    bare_rates: list[float] = []
    memory: list[tuple[int, int]] = []
    made = number = 0

    def look() -> None:
        memory.append((own_mib(os.getpid()), own_mib(embedder.process.pid if embedder.process else None)))

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        async with (
            SentenceTransformerEmbedder() as bare_embedder,
            Parser() as parser,
            Retriever(directory, embedder=embedder, index=EdgeIndex(directory / "index"), parser=parser) as retriever,
            Ingestion(retriever, directory / "spool") as ingestion,
        ):
            look()
            for at in range(rounds):
                first, texts = number, 0
                started = time.perf_counter()
                jobs = []
                while texts < passages // rounds:
                    content = await asyncio.to_thread(document, number, at)
                    jobs.append(await ingestion.accept(SCOPE, name=f"{number}.md", content=content))
                    number, texts = number + 1, texts + SECTIONS
                done = await asyncio.gather(*(job.ended for job in jobs))
                seconds = time.perf_counter() - started
                look()
                embedded = sum(ingested.embedded_passages for ingested in done)
                made += embedded
                corpus = [
                    passage.embedded_text
                    for ingested in done
                    for passage in await retriever.passages(SCOPE, ingested.document.id)
                ]
                assert len(corpus) == embedded
                started = time.perf_counter()
                for start in range(0, len(corpus), CHUNK):
                    await bare_embedder.embed(corpus[start : start + CHUNK], "document", bulk=True)
                bare = time.perf_counter() - started
                bare_rates.append(embedded / bare)
                ratios.append(bare / seconds)
                print(
                    f"documents {first}..{number - 1}: {embedded} passages, {embedded / seconds:.0f}/s ingested, "
                    f"{embedded / bare:.0f}/s bare, ratio {bare / seconds:.2f}, MiB {memory[-1]}",
                    file=sys.stderr,
                )
            while embedder.process and embedder.process.pid:
                await asyncio.sleep(0.5)
            look()
    return {
        "passages": made,
        "ratio": round(statistics.median(ratios), 3),
        "bare_per_second": round(statistics.median(bare_rates), 1),
        "service_mib": [service for service, _ in memory],
        "embedding_process_mib": [process for _, process in memory],
    }


# --- serving ---


async def serve(folder: Path, engine_url: str, threads: int) -> None:
    """Be the gateway, with the packaged embedding model."""
    from app.access import create_key
    from app.main import open_service
    from app.serving import serve as serve_app
    from app.settings import Settings
    from observability import logs

    settings = Settings(data_dir=folder, engine={"url": engine_url}, log_format="json")  # type: ignore[arg-type]
    _, key = create_key(folder / "hallmark.db", name="bench", scopes=("chat", "documents:read", "documents:write"))
    with (folder / "log").open("wb") as stream:
        log = logs.configure("INFO", "json", stream=stream)
        async with open_service(settings, log, embedder=embedder_with(threads)) as app:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            host, port = listener.getsockname()
            serving = asyncio.create_task(serve_app(app, listener))
            print(json.dumps({"url": f"http://{host}:{port}", "key": key}), flush=True)
            await serving
        log.close()


@contextlib.asynccontextmanager
async def gateway(folder: Path, engine_url: str, threads: int) -> Any:
    arguments = ["--serve", str(folder), "--engine", engine_url, "--threads", str(threads)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.benchmarks.ingestion", *arguments, stdout=asyncio.subprocess.PIPE
    )
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
    """Ask a question that nobody asked before, every second one without retrieval."""
    words = WORDS.split()
    question = f"Which section tells of the {words[number % 30]} and the {words[number * 7 % 30]} number {number}?"
    mode = "auto" if number % 2 else "off"
    body = {
        "model": "hallmark",
        "messages": [{"role": "user", "content": question}],
        "retrieval": {"mode": mode},
    }
    started = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return time.perf_counter() - started


async def turn(client: httpx.AsyncClient, first: int) -> list[float]:
    """Ask at a steady pace for a while, whatever the answers take; gives their seconds in order."""
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


async def serving(rounds: int, engine_seconds: float, threads: int) -> dict[str, Any]:
    """Ask by turns with and without ingestion."""
    from tests.fake_tgi import FakeTGI, Tokens

    turns: list[tuple[list[float], list[float]]] = []
    fed = [10_000]
    answer = Tokens("The section tells", " of the harbour", ".", delay_seconds=engine_seconds / 3)
    with tempfile.TemporaryDirectory() as folder:
        async with FakeTGI(default=answer) as tgi, gateway(Path(folder), tgi.url, threads) as client:
            for number in range(10):
                await client.post("/v1/documents?wait=120", files={"file": (f"{number}.md", document(number, 0))})
            await turn(client, 0)
            for at in range(1, rounds + 1):
                calm = await turn(client, at * 1_000)
                feeding = asyncio.create_task(feed(client, fed[0], fed))
                await asyncio.sleep(1)
                busy = await turn(client, at * 1_000 + 500)
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
                while jobs := (await client.get("/v1/jobs?ended=false")).json()["data"]:
                    for job in jobs:
                        await client.post(f"/v1/jobs/{job['id']}/cancel")
                await asyncio.sleep(2)  # In which what is being embedded comes to its end.
                turns.append((calm, busy))
                print(f"round {at}: {_figures(calm)} without, {_figures(busy)} with", file=sys.stderr)
    return {
        "engine_ms": engine_seconds * 1000,
        "documents_ingested_meanwhile": fed[0] - 10_000,
        "all": _compared(turns),
        "without_retrieval": _compared([(calm[::2], busy[::2]) for calm, busy in turns]),
        "with_retrieval": _compared([(calm[1::2], busy[1::2]) for calm, busy in turns]),
    }


def _compared(turns: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Both kinds of turns: the quantiles of all requests, and the ratios of p99."""
    whole = [[seconds for turn in kind for seconds in turn] for kind in zip(*turns, strict=True)]
    p50, p99 = ([round(float(np.quantile(times, q)) * 1000, 1) for times in whole] for q in (0.5, 0.99))
    ratios = [float(np.quantile(busy, 0.99) / np.quantile(calm, 0.99)) for calm, busy in turns]
    return {
        "requests": sum(map(len, whole)),
        "p50_ms": p50,
        "p99_ms": p99,
        "p99_ratio": round(p99[1] / p99[0], 3),
        "p99_ratio_of_rounds": round(statistics.median(ratios), 3),
    }


def _figures(times: list[float]) -> str:
    p50, p99 = np.quantile(times, [0.5, 0.99]) * 1000
    return f"p50 {p50:.1f} p99 {p99:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serving-rounds", type=int, default=7)
    parser.add_argument(
        "--engine-ms", type=float, nargs="+", default=[300.0], help="what the stand-in engine takes for an answer"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, usable_cores() - 1),
        help="of the process that embeds; 0: the service's own embeds",
    )
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, given.engine, given.threads))
        return
    found: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "threads": given.threads}
    if given.rounds:
        found["rate"] = asyncio.run(rates(given.passages, given.rounds, given.threads))
    if given.serving_rounds:
        found["serving"] = [
            asyncio.run(serving(given.serving_rounds, milliseconds / 1000, given.threads))
            for milliseconds in given.engine_ms
        ]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
