"""What a process acknowledged is on the disk though it was killed, and what its disk refused is not forgotten."""

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from app.predictions import PredictionLog

# Prints `open <id>` or `closed <id>` when the log says that this much is on the disk: what a client would have seen.
# Only then, so a line that was read is a promise.
REQUESTS_FOR_EVER = """
import asyncio, os, random, sys
from pathlib import Path
from app.predictions import Prediction, PredictionLog, uuid7

async def requests(log):
    while True:
        prediction = Prediction(id=uuid7(), tenant="acme", request=b'{"x": 1}')
        log.open(prediction)
        if random.random() < 0.5:
            await log.opened(prediction)
            os.write(1, f"open {prediction.id}\\n".encode())
        await asyncio.sleep(random.choice([0, 0, 0.001, 0.01]))
        prediction.outcome, prediction.answer = "finished", "a" * 200
        await log.close(prediction)
        os.write(1, f"closed {prediction.id}\\n".encode())

async def main():
    async with PredictionLog(Path(sys.argv[1])) as log:
        print("ready", flush=True)
        await asyncio.gather(*(requests(log) for _ in range(30)))

asyncio.run(main())
"""

# Writes until the process may not make its files any larger, then until it may again.
REQUESTS_ON_A_FULL_DISK = """
import asyncio, resource, signal, sys
from pathlib import Path
from app.errors import RecordUnavailable
from app.predictions import Prediction, PredictionLog, uuid7

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with PredictionLog(Path(sys.argv[1]), commit_seconds=0.2) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        try:
            while True:
                prediction = Prediction(id=uuid7(), tenant="acme", answer="a" * 20_000)
                log.open(prediction)
                prediction.outcome = "finished"
                await log.close(prediction)
                print("closed", prediction.id)
        except RecordUnavailable:
            print("unsure", prediction.id)
        try:
            log.open(Prediction(id=uuid7(), tenant="acme"))
        except RecordUnavailable:
            print("refused", uuid7())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        while not log.healthy:
            await asyncio.sleep(0.01)
        prediction = Prediction(id=uuid7(), tenant="acme", outcome="finished")
        await log.close(prediction)
        print("closed", prediction.id)

asyncio.run(main())
"""


def _rows(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT id, outcome FROM predictions ORDER BY id").fetchall()
    return [(str(UUID(bytes=key)), outcome) for key, outcome in rows]


def _run_and_kill(path: Path, after_seconds: float) -> list[tuple[str, str]]:
    """Give the promises a process made in the time it had before `kill -9`."""
    with subprocess.Popen([sys.executable, "-c", REQUESTS_FOR_EVER, path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        timer = time.monotonic() + after_seconds
        lines = []
        while time.monotonic() < timer:
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
    # A line the kill has torn was not read by anyone.
    return [tuple(line.decode().split()) for line in lines if line.endswith(b"\n")]


async def _rows_after_restart(path: Path) -> list[tuple[str, str]]:
    async with PredictionLog(path):
        return _rows(path)


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_loses_and_doubles_nothing_that_was_promised(tmp_path, rounds):
    path = tmp_path / "hallmark.db"
    finished: set[str] = set()
    shown: set[str] = set()
    for _ in range(rounds):
        promises = _run_and_kill(path, random.uniform(0.05, 0.4))
        assert promises
        finished |= {key for what, key in promises if what == "closed"}
        shown |= {key for _, key in promises}
        rows = asyncio.run(_rows_after_restart(path))
        outcomes = dict(rows)
        assert len(outcomes) == len(rows)
        assert {outcomes.get(key) for key in finished} == {"finished"}
        # A closing row may have reached the disk just before the kill, and its acknowledgement not.
        assert {outcomes.get(key) for key in shown - finished} <= {"finished", "interrupted"}
        assert set(outcomes.values()) <= {"finished", "interrupted"}
    assert "interrupted" in outcomes.values()


def test_what_a_disk_refuses_is_written_when_it_takes_more(tmp_path):
    path = tmp_path / "hallmark.db"
    run = subprocess.run(
        [sys.executable, "-c", REQUESTS_ON_A_FULL_DISK, path], capture_output=True, text=True, timeout=30
    )
    assert run.returncode == 0, run.stderr
    events = [tuple(line.split()) for line in run.stdout.splitlines()]
    assert [what for what, _ in events[-3:]] == ["unsure", "refused", "closed"]
    assert len(events) > 5
    recorded = {key for what, key in events if what in ("closed", "unsure")}
    assert dict(_rows(path)) == dict.fromkeys(recorded, "finished")
