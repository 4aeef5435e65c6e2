"""What the durable record costs: rows a second and CPU a record, against one INSERT and one commit for each row.

Run it as `python -m tests.benchmarks.prediction_log [--records N] [--rounds N] [--linger SECONDS]`. All variants run
in one process, interleaved, on the same disk; the medians of the rounds are printed and, as the last line, JSON.

- `naive`: what a service usually does: one thread with a connection, INSERT and COMMIT for each row, awaited.
- `awaited`: PredictionLog, opened and closed at once, the commit awaited (a fast JSON answer: one row written).
- `not awaited`: the same by `close_nowait`.
- `no content`: awaited, with `store: false`: what the facts alone cost; the rest is 2 KB on its way to the disk.
- `stream`: the opening row awaited too (two writes for each record, as for a stream).

Read the ratio between variants; seconds say something about this machine's disk and neighbours only.
"""

import argparse
import asyncio
import json
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import uvloop

from app import database
from app.predictions import Prediction, PredictionLog, uuid7
from app.predictions.rows import to_row, upsert

REQUEST = json.dumps(
    {"model": "handbook", "messages": [{"role": "user", "content": "How long is a record kept? " * 4}], "stream": False}
).encode()

Record = Callable[[Prediction], Awaitable[None]]


def make() -> Prediction:
    """Make a prediction as large as a typical one: three passages, two citations, some 2 KB."""
    return Prediction(
        id=uuid7(),
        tenant="acme",
        key_id="abcd2345",
        model="handbook",
        release_name="handbook@3",
        release_digest="d" * 64,
        base_model="smollm2-135m",
        prompt_version="grounded-2",
        index_version="minilm-1",
        retrieval_mode="auto",
        retrieval_outcome="found",
        trace_id="0af7651916cd43dd8448eb211c80319c",
        request=REQUEST,
        question="How long is a record kept?",
        passages=[
            {
                "document_id": "d1",
                "document_version": "v" * 64,
                "n": n,
                "score": 0.5,
                "dense_score": 0.7,
                "sparse_score": 11.2,
                "start": 100,
                "end": 500,
                "text": "Records are kept until they are erased. " * 5,
            }
            for n in range(1, 4)
        ],
    )


def answer(prediction: Prediction) -> None:
    """Fill in what the engine's answer adds."""
    prediction.answer = "Records are kept until they are erased [1]. " * 4
    prediction.citations = [
        {"n": n, "start": 0, "end": 40, "quote": "kept until", "support": "supported"} for n in (1, 2)
    ]
    prediction.outcome, prediction.finish_reason, prediction.verdict = "finished", "stop", "supported"
    prediction.prompt_tokens, prediction.completion_tokens = 812, 64
    prediction.retrieve_seconds, prediction.first_token_seconds, prediction.total_seconds = 0.011, 0.152, 1.31


async def naive(path: Path, producers: int, records: int) -> tuple[float, float]:
    with ThreadPoolExecutor(1) as thread, closing(database.connect(path)) as connection:
        loop = asyncio.get_running_loop()

        def write(prediction: Prediction) -> None:
            connection.execute("BEGIN")
            connection.execute(*upsert([to_row(prediction)]))
            connection.execute("COMMIT")

        async def record(prediction: Prediction) -> None:
            answer(prediction)
            await loop.run_in_executor(thread, write, prediction)

        return await produce(record, producers, records)


def with_log(exit_by: str, linger_seconds: float) -> Callable[[Path, int, int], Awaitable[tuple[float, float]]]:
    async def run(path: Path, producers: int, records: int) -> tuple[float, float]:
        async with PredictionLog(path, capacity=100_000, linger_seconds=linger_seconds) as log:

            async def awaited(prediction: Prediction) -> None:
                log.open(prediction)
                answer(prediction)
                await log.close(prediction)

            async def not_awaited(prediction: Prediction) -> None:
                log.open(prediction)
                answer(prediction)
                log.close_nowait(prediction)
                await asyncio.sleep(0)

            async def no_content(prediction: Prediction) -> None:
                prediction.store = False
                await awaited(prediction)

            async def stream(prediction: Prediction) -> None:
                log.open(prediction)
                await log.opened(prediction)
                answer(prediction)
                await log.close(prediction)

            variants = {"awaited": awaited, "not awaited": not_awaited, "no content": no_content, "stream": stream}
            return await produce(variants[exit_by], producers, records, until=lambda: log.backlog == 0)

    return run


async def produce(
    record: Record, producers: int, records: int, until: Callable[[], bool] = lambda: True
) -> tuple[float, float]:
    """Give seconds on the clock and of CPU for `records` records, less what making them costs."""
    predictions = [make() for _ in range(records)]
    queue = iter(predictions)

    async def producer() -> None:
        for prediction in queue:
            await record(prediction)

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(producer() for _ in range(producers)))
    while not until():
        await asyncio.sleep(0.001)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(records: int, rounds: int, linger_seconds: float) -> list[dict[str, object]]:
    variants = {"naive": naive} | {
        name: with_log(name, linger_seconds) for name in ("awaited", "not awaited", "no content", "stream")
    }
    results: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="prediction-log-") as folder:
        for round_number in range(rounds):
            for producers in (1, 16, 64):
                for name, variant in variants.items():
                    path = Path(folder) / f"{round_number}-{name}-{producers}.db"
                    count = records // 10 if producers == 1 or name == "naive" else records
                    wall, cpu = uvloop.run(variant(path, producers, count))
                    with closing(sqlite3.connect(path)) as connection:
                        assert connection.execute(
                            "SELECT count(*) FROM predictions WHERE outcome = 'finished'"
                        ).fetchone() == (count,)
                    results.setdefault((name, producers), []).append((count / wall, cpu / count * 1e6))
    return [
        {
            "variant": name,
            "producers": producers,
            "records_per_second": round(statistics.median(rate for rate, _ in runs)),
            "cpu_us_per_record": round(statistics.median(cpu for _, cpu in runs), 1),
        }
        for (name, producers), runs in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--linger", type=float, default=0.003)
    options = parser.parse_args()
    rows = measure(options.records, options.rounds, options.linger)
    conditions = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "machine": platform.platform(),
        "records": options.records,
        "rounds": options.rounds,
    }
    print(f"{'variant':<14}{'producers':>10}{'records/s':>12}{'CPU us/record':>16}")
    for row in rows:
        print(
            f"{row['variant']:<14}{row['producers']:>10}{row['records_per_second']:>12,}{row['cpu_us_per_record']:>16}"
        )
    print(json.dumps({"benchmark": "prediction_log", **conditions, "results": rows}))


if __name__ == "__main__":
    sys.exit(main())
