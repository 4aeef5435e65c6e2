"""What a report on quality costs: predictions a second and memory, over rows as large as real ones.

Run it as `python -m tests.benchmarks.quality [--rows N] [--database URL]`; without a URL it is SQLite in a temporary
folder. It writes the rows (half in conversations, one in a hundred with a thumb, one in two hundred labelled), makes
one report in a process of its own, and prints, as the last line as JSON: seconds, rows a second, how far the process's
peak memory rose, and what a million rows would take at that rate. Memory is the largest resident size, after what
importing and a report on nothing takes.

`late_p99_milliseconds` is how late the event loop was for a task that wants it every two milliseconds: while nothing
else happens, while a report is made as for a caller, and while it is made with rests as for `/metrics`.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from app.database import Database, predictions
from app.feedback import FeedbackLog, Given, LabelLog, Speaker, Stated
from app.predictions import Prediction, Where, uuid7
from app.predictions.history import first_id
from app.predictions.rows import to_row
from app.predictions.shipper import shippable
from app.quality import REST, Quality

ANSWER = "The notice period is four weeks to the end of a month, as the contract says. " * 5
BATCH = 500
SPEAKER = Speaker(tenant="acme", key_id="k", user="anna")


def main() -> None:
    """Write, report, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--database", help="The URL of an empty PostgreSQL database.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = given.database or f"sqlite:///{Path(folder) / 'hallmark.db'}"
        started = time.perf_counter()
        asyncio.run(write(url, given.rows))
        print(f"{given.rows} rows written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        with multiprocessing.get_context("spawn").Pool(1) as process:
            print(json.dumps(process.apply(measure, (url, given.rows))))


def measure(url: str, rows: int) -> dict[str, Any]:
    """Make one report, and tell what it took."""
    return asyncio.run(_measure(url, rows))


async def _measure(url: str, rows: int) -> dict[str, Any]:
    async with Database(url) as database:
        await Quality(database).report("nobody", Where())
        before = peak_mebibytes()
        started, cpu = time.perf_counter(), time.process_time()
        report = await Quality(database).report("acme", Where())
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        late = {
            "idle": await lateness(asyncio.sleep(5)),
            "report": await lateness(Quality(database).report("acme", Where())),
            "resting": await lateness(Quality(database, rest=REST).report("acme", Where())),
        }
    found = sum(each.answers for each in report.releases)
    return {
        "rows": rows,
        "answers": found,
        "labelled": sum(each.labelled for each in report.releases),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "rows_per_second": round(rows / seconds),
        "peak_rose_mebibytes": round(peak_mebibytes() - before, 1),
        "minutes_for_a_million": round(seconds / rows * 1e6 / 60, 2),
        "late_p99_milliseconds": late,
    }


async def lateness(work: Coroutine[Any, Any, Any]) -> float:
    """How many milliseconds the event loop comes too late, in the 99th of 100 cases, while `work` is done."""
    task = asyncio.ensure_future(work)
    late = []
    while not task.done():
        due = time.perf_counter() + 0.002
        await asyncio.sleep(0.002)
        late.append(time.perf_counter() - due)
    await task
    return round(statistics.quantiles(late, n=100)[98] * 1000, 2)


def peak_mebibytes() -> float:
    """The process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def write(url: str, count: int) -> None:
    """Fill the database with answers of two releases over the last day, some labelled and rated."""
    chance = random.Random(1)
    async with Database(url) as database, FeedbackLog(database) as feedback, LabelLog(database) as labels:
        for batch in batches(count, chance):
            async with database.writing() as connection:
                await connection.execute(predictions.insert(), [shipped(each) for each in batch])
            rated = [each.id for each in batch if chance.random() < 0.01]
            labelled = [each.id for each in batch if chance.random() < 0.005]
            await asyncio.gather(
                *(feedback.give(SPEAKER, Given(prediction_id=id_, rating=chance.random() < 0.8)) for id_ in rated),
                *(
                    labels.state(SPEAKER, Stated(prediction_id=id_, class_name="right", sampling_probability=0.005))
                    for id_ in labelled
                ),
            )


def batches(count: int, chance: random.Random) -> Iterator[list[Prediction]]:
    """Make the answers, the oldest first."""
    start = datetime.now(UTC) - timedelta(days=1)
    for first in range(0, count, BATCH):
        numbers = range(first, min(count, first + BATCH))
        yield [make(start + timedelta(seconds=80_000 * n / count), n, count, chance) for n in numbers]


def make(at: datetime, number: int, count: int, chance: random.Random) -> Prediction:
    """Make one answer, with two citations and a request."""
    citation = {"status": "supported", "support": 0.8, "answer_start": 0, "answer_end": 76, "quote": ANSWER[:76]}
    asked = {"model": "desk", "messages": [{"role": "user", "content": f"How long is notice {number}? " * 4}]}
    return Prediction(
        id=first_id(at)[:14] + uuid7()[14:],
        tenant="acme",
        outcome="finished",
        user=f"user {chance.randrange(count // 20 + 1)}" if chance.random() < 0.5 else None,
        conversation=f"chat {chance.randrange(count // 6 + 1)}" if chance.random() < 0.5 else None,
        release_name=f"desk@{1 + number % 2}",
        release_digest="d" * 64,
        finish_reason="stop",
        verdict="answered",
        prompt_tokens=600,
        completion_tokens=80 + number % 40,
        first_token_seconds=chance.random(),
        total_seconds=1 + chance.random(),
        citations=[citation, {**citation, "answer_start": 77, "answer_end": 153}],
        passages=[{"document_id": "contract", "n": n, "score": 0.5} for n in range(3)],
        request=json.dumps(asked).encode(),
        question=f"How long is notice {number}?",
        answer=ANSWER,
    )


def shipped(prediction: Prediction) -> dict[str, Any]:
    """The columns of a prediction as a shipper leaves them."""
    key, *rest = to_row(prediction)
    return shippable([bytes(key), *rest])


if __name__ == "__main__":
    main()
