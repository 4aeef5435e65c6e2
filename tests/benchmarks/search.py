"""What a search costs at 20,000 passages, or at 100,000, and whether the event loop stays free meanwhile.

Real passages (SQuAD, Cranfield, CISI) and random mixtures of their vectors fill an index through the retriever; then
real questions, no two alike, are searched by one caller and by 32 at once, while a heartbeat on the loop measures the
longest stall. CPU is that of the whole process, the query's embedding included. The last line is JSON; the exit code is
1 when a lone hybrid search costs over 6 ms of CPU (25 from 20,001 passages on) or the loop stalls for 50 ms while 32
searches run.

    python -m tests.benchmarks.search --data ../shared/data [--passages 20000] [--searches 400]
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import uvloop

from retrieval.documents import ParsedDocument, Passage, Scope
from retrieval.edge import EdgeIndex
from retrieval.embedder import SentenceTransformerEmbedder
from retrieval.evaluation.sets import load
from retrieval.retriever import Retriever

CPU_BUDGETS_MS = {20_000: 6.0, 100_000: 25.0}
"""Up to so many passages."""
STALL_BUDGET_MS = 50.0
SETS = ("squad2_cs224n_dev", "cranfield", "cisi")
PASSAGES_PER_DOCUMENT = 40
SCOPE = Scope("benchmark")


class SyntheticEmbedder(SentenceTransformerEmbedder):
    """The real model for questions; mixtures of three real vectors for documents, so that filling is quick."""

    async def __aenter__(self):
        await super().__aenter__()
        self.random = np.random.default_rng(7)
        self.real = np.empty((0, self.dimension), np.float32)
        return self

    async def embed(self, texts, kind, *, bulk=False):
        if not (bulk and len(self.real)):
            return await super().embed(texts, kind, bulk=bulk)
        rows = self.random.integers(len(self.real), size=(len(texts), 3))
        weights = self.random.dirichlet([1, 1, 1], size=len(texts)).astype(np.float32)
        mixed = np.einsum("nk,nkd->nd", weights, self.real[rows])
        return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


class Lines:
    """Stands in for the parser: the content is the text."""

    async def parse(self, content, *, name, media_type=None):
        return ParsedDocument(content.decode())


def split_lines(parsed, /, *, document_id, document_version, document_name, **_):
    passages, start = [], 0
    for n, line in enumerate(parsed.text.split("\n"), 1):
        passages.append(Passage(document_id, document_version, n, line, start, start + len(line)))
        start += len(line) + 1
    return passages


class Heartbeat:
    """The longest the loop took to come back from a sleep of one millisecond."""

    async def __aenter__(self):
        self.longest_ms = 0.0
        self.task = asyncio.create_task(self.run())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()

    async def run(self):
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            self.longest_ms = max(self.longest_ms, (time.perf_counter() - before) * 1000 - 1)


async def fill(retriever: Retriever, texts: Sequence[str], passages: int) -> None:
    rng = random.Random(7)
    for number in range(passages // PASSAGES_PER_DOCUMENT):
        lines = [f"{number}.{n} {rng.choice(texts)}" for n in range(PASSAGES_PER_DOCUMENT)]
        await retriever.add(SCOPE, name=f"{number}.txt", content="\n".join(lines).encode())


async def measure(work: Callable[[str], Awaitable[object]], questions: Sequence[str], callers: int) -> dict[str, float]:
    """Run the questions through `callers` closed loops."""
    waiting = iter(questions)
    times: list[float] = []

    async def caller() -> None:
        for question in waiting:
            before = time.perf_counter()
            await work(question)
            times.append((time.perf_counter() - before) * 1000)

    async with Heartbeat() as heart:
        cpu, wall = time.process_time(), time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    times.sort()
    return {
        "n": len(times),
        "cpu_ms": round(cpu * 1000 / len(times), 2),
        "per_second": round(len(times) / wall),
        "p50_ms": round(statistics.median(times), 2),
        "p99_ms": round(times[int(len(times) * 0.99)], 2),
        "stall_ms": round(heart.longest_ms, 1),
    }


async def run(options: argparse.Namespace) -> dict[str, object]:
    sets = [load(options.data / name) for name in SETS]
    texts = [each.text.replace("\n", " ") for judged in sets for each in judged.texts]
    questions = list(dict.fromkeys(q.text for judged in sets for q in judged.questions if len(q.text) < 200))
    random.Random(7).shuffle(questions)
    embedder = SyntheticEmbedder(threads=options.threads, precision=options.precision)
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        index = EdgeIndex(Path(folder, "index"))
        retriever = Retriever(Path(folder), embedder=embedder, index=index, parser=Lines(), split=split_lines)
        async with retriever:
            embedder.real = await embedder.embed(texts[:400], "document", bulk=True)
            began = time.perf_counter()
            async with Heartbeat() as heart:
                await fill(retriever, texts, options.passages)
            results["fill"] = {
                "passages_per_second": round(options.passages / (time.perf_counter() - began)),
                "stall_ms": round(heart.longest_ms, 1),
            }
            works: dict[str, Callable[[str], Awaitable[object]]] = {
                "embed": lambda question: embedder.embed([question], "query"),
                "sparse": lambda question: retriever.search(SCOPE, question, mode="sparse"),
                "hybrid": lambda question: retriever.search(SCOPE, question),
            }
            unseen = iter(questions)
            for callers in (1, 32):
                for name, work in works.items():
                    taken = [next(unseen) for _ in range(options.searches)]
                    results[f"{name}, {callers} at once"] = await measure(work, taken, callers)
            seen = taken
            results["hybrid seen before, 1 at once"] = await measure(works["hybrid"], seen, 1)
            results["hybrid during an ingest, 4 at once"] = await during_ingest(
                retriever, embedder, texts, works, unseen
            )
    return results


async def during_ingest(retriever, embedder, texts, works, unseen):
    """Questions against documents that are really embedded."""
    embedder.real = embedder.real[:0]
    content = "\n".join(texts[1000:1400]).encode()
    ingest = asyncio.create_task(retriever.add(SCOPE, name="late.txt", content=content))
    taken = [next(unseen) for _ in range(40)]
    measured = await measure(works["hybrid"], taken, 4)
    assert not ingest.done(), "the ingest ended before the questions did"
    ingest.cancel()
    await asyncio.gather(ingest, return_exceptions=True)
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description="What a search costs, and whether the loop stays free.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--searches", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", options
    )
    results = uvloop.run(run(options))
    for name, facts in results.items():
        print(f"{name:<36}", facts)
    print(json.dumps(results))
    lone, crowd = results["hybrid, 1 at once"], results["hybrid, 32 at once"]
    assert isinstance(lone, dict)
    assert isinstance(crowd, dict)
    budget = next((ms for most, ms in CPU_BUDGETS_MS.items() if options.passages <= most), float("inf"))
    return int(lone["cpu_ms"] > budget or crowd["stall_ms"] >= STALL_BUDGET_MS)


if __name__ == "__main__":
    sys.exit(main())
