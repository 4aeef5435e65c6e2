"""What the periodic report on quality costs over a million predictions, and what requests notice of it.

It fills a data directory (half of the answers in conversations, one in a hundred with a thumb, one in two hundred
labelled, rows of about 1.5 KB), starts the service on it with a stand-in engine, sends it requests at a steady pace,
and has the report computed as `hallmark worker` does: by a process of its own, at the lowest priority, with rests. That
process is stopped and let go on by turns of a few seconds, so that requests with it and without are seconds apart and
whatever else the machine does falls on both. Intervals come from drawing turns again.

    python -m tests.benchmarks.quality [--rows 1000000] [--rate 50] [--turn 3] [--folder DIR]

`--folder` keeps the filled directory, and uses one that is filled. The last line is JSON: `on_seconds` is how long the
report took while it was let run, `peak_mebibytes` the largest resident size of its process. The exit code is 1 where a
figure is over its bound. For the bound on p99 to mean something the machine must do nothing else.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from sqlalchemy import delete

from app.access import create_key
from app.database import Database, connect, quality_reports
from app.feedback import FeedbackLog, Given, LabelLog, Speaker, Stated
from app.predictions import Prediction, uuid7
from app.predictions.history import first_id
from app.predictions.rows import COLUMNS, to_row
from app.quality import Apart, Keeper, Kept
from app.quality.keeping import REST
from tests.benchmarks.gateway import Connection, Target, child

ANSWER = "The notice period is four weeks to the end of a month, as the contract says. " * 5
BATCH = 5_000
SPEAKER = Speaker(tenant="acme", key_id="k", user="anna")
BOUNDS = {"on_seconds": 600.0, "peak_mebibytes": 400.0, "p99_ratio": 1.05}


def main() -> int:
    """Fill, serve, report, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=50.0, help="Requests a second.")
    parser.add_argument("--turn", type=float, default=3.0, help="Seconds with the report, and without, by turns.")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "hallmark.db").exists():
            started = time.perf_counter()
            fill(folder / "hallmark.db", given.rows)
            print(f"{given.rows} rows written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        engine_url, _ = stack.enter_context(child("tests.fake_tgi", "--answer", "The office opens at nine."))
        serve = ("tests.benchmarks.gateway", "--serve", str(folder), "--engine", engine_url, "--passages", "0")
        line, _ = stack.enter_context(child(*serve))
        started = json.loads(line)
        target = Target(started["url"], started["key"], "hallmark")
        found = asyncio.run(measure(folder / "hallmark.db", target, given.rate, given.turn))
    measured = {
        "on_seconds": found["on_seconds"],
        "peak_mebibytes": found["peak_mebibytes"],
        "p99_ratio": found["p99"]["ratio"],
    }
    kept = {name: value <= BOUNDS[name] for name, value in measured.items()}
    conditions = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rate": given.rate,
        "turn": given.turn,
        "megabytes": round((folder / "hallmark.db").stat().st_size / 1e6) if given.folder else None,
    }
    print(json.dumps({"conditions": conditions, **found, "bounds": BOUNDS, "kept": kept}))
    return 0 if all(kept.values()) else 1


async def measure(database: Path, target: Target, rate: float, turn_seconds: float) -> dict[str, Any]:
    """Compute the report beside requests, by turns."""
    clock = Turns()
    async with steady(target, rate, clock):
        await asyncio.sleep(turn_seconds)  # Everything is warm after this.
        clock.latencies.clear()
        cost = await job(f"sqlite:///{database}", clock, turn_seconds)
    return {**cost, "requests": sum(map(len, clock.latencies.values())), **compared(clock.latencies)}


@dataclass
class Turns:
    """Which turn it is, and what requests took in each: even ones are without the report."""

    number: int = 0
    latencies: dict[int, list[float]] = field(default_factory=dict)


class KeptOpen(Connection):
    """A connection that says when it was closed in the middle of a request."""

    def connection_lost(self, error: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionResetError())

    async def ask(self, request: bytes) -> None:
        if self.transport.is_closing():
            raise ConnectionResetError
        await super().ask(request)


@contextlib.asynccontextmanager
async def steady(target: Target, rate: float, clock: Turns) -> AsyncIterator[None]:
    """Send requests at a pace that does not wait for answers; each counts from when it was due."""
    where, loop = urlsplit(target.url), asyncio.get_running_loop()
    request = target.request(stream=False, retrieval=False)
    free: list[KeptOpen] = []
    asking: set[asyncio.Task[None]] = set()

    async def ask(due: float, turn: int) -> None:
        while True:
            connection = free.pop() if free else (await loop.create_connection(KeptOpen, where.hostname, where.port))[1]
            with contextlib.suppress(ConnectionError):  # The service closes what is idle, and a request may cross that.
                await connection.ask(request)
                break
        clock.latencies.setdefault(turn, []).append(time.perf_counter() - due)
        free.append(connection)

    async def pace() -> None:
        due = time.perf_counter()
        while True:
            due += random.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(ask(due, clock.number))
            asking.add(task)
            task.add_done_callback(asking.discard)

    pacing = asyncio.create_task(pace())
    try:
        yield
    finally:
        pacing.cancel()
        await asyncio.gather(pacing, *asking, return_exceptions=True)


async def job(url: str, clock: Turns | None = None, turn_seconds: float = 3.0) -> dict[str, Any]:
    """Have the report computed as a worker does, stopped and let go on by turns where there is a clock."""
    async with Database(url) as database:
        async with database.writing() as connection:
            await connection.execute(delete(quality_reports))
        keeper = Keeper(
            database, Apart(database.secret_url, rest=REST, idle=True).make, lambda: time.time_ns() // 1_000_000
        )
        working = asyncio.create_task(keeper.step())
        cost = await asyncio.gather(working, watch(working, clock, turn_seconds))
        report = await Kept(database).report()
    assert report is not None
    return {"answers": sum(each.answers for each in report.releases), **cost[1]}


async def watch(working: asyncio.Task[bool], clock: Turns | None, turn_seconds: float) -> dict[str, Any]:
    """Look at the process that computes until it ends."""
    process = None
    while process is None and not working.done():
        await asyncio.sleep(0.01)
        process = next(
            (each for each in psutil.Process().children() if "app.quality" in " ".join(each.cmdline())), None
        )
    on, peak, cpu, since = 0.0, 0, 0.0, time.perf_counter()
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
        while process is not None and not working.done():
            if clock is not None:
                os.kill(process.pid, signal.SIGSTOP)
                clock.number = 2 * (clock.number // 2 + 1)
                await asyncio.sleep(turn_seconds)
                os.kill(process.pid, signal.SIGCONT)
                clock.number += 1
            since = time.perf_counter()
            await asyncio.wait([working], timeout=turn_seconds if clock is not None else 0.05)
            on += time.perf_counter() - since
            times, peak = process.cpu_times(), max(peak, peak_kibibytes(process.pid))
            cpu = times.user + times.system
    await working
    return {"on_seconds": round(on, 1), "cpu_seconds": round(cpu, 1), "peak_mebibytes": round(peak / 1024, 1)}


def peak_kibibytes(pid: int) -> int:
    """A process's largest resident size so far; 0 once it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def compared(latencies: dict[int, list[float]]) -> dict[str, Any]:
    """Latencies with the report over those without, with intervals from drawing turns again."""
    sides = [[np.array(each) for turn, each in latencies.items() if turn % 2 == side and turn > 1] for side in (0, 1)]
    chance = np.random.default_rng(1)

    def ratio(share: float, turns: Sequence[Sequence[np.ndarray]]) -> float:
        without, beside = (float(np.quantile(np.concatenate(side), share)) for side in turns)
        return beside / without

    found = {}
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        drawn = [
            ratio(share, [[side[at] for at in chance.integers(0, len(side), len(side))] for side in sides])
            for _ in range(500)
        ]
        without, beside = (float(np.quantile(np.concatenate(side), share)) * 1e3 for side in sides)
        found[name] = {
            "without_ms": round(without, 3),
            "beside_ms": round(beside, 3),
            "ratio": round(beside / without, 3),
            "ratio_95": [round(each, 3) for each in np.quantile(drawn, [0.025, 0.975])],
        }
    return {"turns": sum(map(len, sides)), **found}


def fill(path: Path, count: int) -> None:
    """Fill a database with answers of a release over the last day, some labelled and rated."""
    connect(path).close()  # Migrated.
    create_key(path, name="acme", scopes=("chat",), tenant="acme")
    chance = random.Random(1)
    rated, labelled = [], []
    names = ", ".join(f'"{name}"' for name in COLUMNS)
    insert = f"INSERT INTO predictions ({names}) VALUES ({', '.join('?' * len(COLUMNS))})"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        for batch in batches(count, chance):
            with connection:
                connection.executemany(insert, [to_row(each) for each in batch])
            rated += [each.id for each in batch if chance.random() < 0.01]
            labelled += [each.id for each in batch if chance.random() < 0.005]
    asyncio.run(say(path, rated, labelled, chance))


async def say(path: Path, rated: Sequence[str], labelled: Sequence[str], chance: random.Random) -> None:
    """Rate and label."""
    async with Database.of_file(path) as database, FeedbackLog(database) as feedback, LabelLog(database) as labels:
        for at in range(0, len(rated), 500):
            thumbs = [Given(prediction_id=id_, rating=chance.random() < 0.8) for id_ in rated[at : at + 500]]
            await asyncio.gather(*(feedback.give(SPEAKER, each) for each in thumbs))
        for at in range(0, len(labelled), 500):
            said = [
                Stated(
                    prediction_id=id_,
                    class_name="right" if chance.random() < 0.8 else "wrong",
                    sampling_probability=0.005,
                )
                for id_ in labelled[at : at + 500]
            ]
            await asyncio.gather(*(labels.state(SPEAKER, each) for each in said))


def batches(count: int, chance: random.Random) -> Iterator[list[Prediction]]:
    """Make the answers, the oldest first."""
    start = datetime.now(UTC) - timedelta(hours=23)
    for first in range(0, count, BATCH):
        numbers = range(first, min(count, first + BATCH))
        yield [make(start + timedelta(seconds=80_000 * n / count), n, count, chance) for n in numbers]


def make(at: datetime, number: int, count: int, chance: random.Random) -> Prediction:
    """Make one answer, with two citations and a request."""
    support = chance.random()
    citation = {"status": "supported", "support": support, "answer_start": 0, "answer_end": 76, "quote": ANSWER[:76]}
    asked = {"model": "desk", "messages": [{"role": "user", "content": f"How long is notice {number}? " * 4}]}
    return Prediction(
        id=first_id(at)[:14] + uuid7()[14:],
        tenant="acme",
        outcome="finished",
        user=f"user {chance.randrange(count // 20 + 1)}" if chance.random() < 0.5 else None,
        conversation=f"chat {chance.randrange(count // 6 + 1)}" if chance.random() < 0.5 else None,
        release_name="hallmark@1",
        release_digest="d" * 64,
        finish_reason="stop",
        verdict="answered",
        prompt_tokens=600,
        completion_tokens=80 + number % 40,
        first_token_seconds=chance.random(),
        total_seconds=1 + chance.random(),
        citations=[citation, {**citation, "answer_start": 77, "answer_end": 153}],
        passages=[{"document_id": "contract", "n": n, "dense_score": chance.random()} for n in range(3)],
        request=json.dumps(asked).encode(),
        question=f"How long is notice {number}?",
        answer=ANSWER,
    )


if __name__ == "__main__":
    sys.exit(main())
