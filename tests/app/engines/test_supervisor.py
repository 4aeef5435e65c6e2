"""The supervisor with a stand-in for the engine: a script that takes its arguments and does as it is told."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.engines.local import EngineSettings
from app.engines.supervisor import LocalEngineSupervisor
from app.errors import EngineUnavailable

STAND_IN = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
token = sys.stdin.readline().strip()
print("INFO loading", file=sys.stderr, flush=True)
started = folder / "starts.jsonl"
with started.open("a") as file:
    file.write(json.dumps({"arguments": sys.argv[2:], "token": token}) + "\\n")
orders = (folder / "orders").read_text().split()
order = orders[min(len(started.read_text().splitlines()), len(orders)) - 1]
if order == "fail":
    print("ERROR no such model", file=sys.stderr, flush=True)
    sys.exit(7)
if order == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if order == "chatty":
    print("x" * 200_000 + "\\nprogress 10%\\rprogress 90%", file=sys.stderr, flush=True)
print("INFO ready on http://127.0.0.1:1", file=sys.stderr, flush=True)
if order == "crash":
    sys.exit(9)
time.sleep(120)
"""


@pytest.fixture
def supervise(tmp_path: Path) -> Callable[..., LocalEngineSupervisor]:
    def make(*orders: str, **options: Any) -> LocalEngineSupervisor:
        (tmp_path / "orders").write_text(" ".join(orders))
        command = (sys.executable, "-c", STAND_IN, str(tmp_path))
        settings = options.pop("settings", EngineSettings())
        return LocalEngineSupervisor(settings, command=command, first_backoff_seconds=0.01, **options)

    return make


def starts(tmp_path: Path) -> list[Any]:
    file = tmp_path / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_the_engine_runs_inside_the_context_and_not_after(supervise: Callable[..., Any], tmp_path: Path) -> None:
    async with supervise("serve") as supervisor:
        await supervisor.ready(20)
        pid = supervisor.pid
        assert alive(pid)
    assert not alive(pid)
    assert supervisor.pid is None
    assert len(starts(tmp_path)) == 1


async def test_the_engine_is_given_its_settings_parent_and_token(supervise: Callable[..., Any], tmp_path: Path) -> None:
    settings = EngineSettings(model="m", threads=3, dtype="fp32", max_queue=5, adapters=(("a", Path("/b")),))
    async with supervise("serve", settings=settings) as supervisor:
        await supervisor.ready(20)
        (start,) = starts(tmp_path)
        port = supervisor.base_url.rsplit(":", 1)[1]
    text = " ".join(start["arguments"])
    for option in ("--model m", "--threads 3", "--dtype fp32", "--max-queue 5", "--adapter a=/b", f"--port {port}"):
        assert option in text
    assert f"--parent-pid {os.getpid()}" in text
    assert start["token"] == supervisor.token
    assert supervisor.token not in text


async def test_every_supervisor_has_its_own_token(supervise: Callable[..., Any]) -> None:
    assert supervise("serve").token != supervise("serve").token


async def test_a_crashed_engine_is_started_again_at_the_same_address(
    supervise: Callable[..., Any], tmp_path: Path
) -> None:
    async with supervise("crash", "fail", "serve") as supervisor:
        url = supervisor.base_url
        await until(lambda: len(starts(tmp_path)) == 3)
        await supervisor.ready(20)
        assert supervisor.base_url == url
        assert supervisor.restarts == 2
        assert supervisor.last_exit == "exit status 7"
        assert starts(tmp_path)[0] == starts(tmp_path)[2]


async def test_a_killed_engine_is_started_again(supervise: Callable[..., Any]) -> None:
    async with supervise("serve") as supervisor:
        await supervisor.ready(20)
        first = supervisor.pid
        os.kill(first, 9)
        await until(lambda: supervisor.pid not in (None, first))
        await supervisor.ready(20)
        assert supervisor.last_exit == "signal SIGKILL"


async def test_restarts_back_off(supervise: Callable[..., Any], tmp_path: Path, caplog: Any) -> None:
    async with supervise("fail") as supervisor:
        await until(lambda: supervisor.restarts == 3)
    waits = [record.args[1] for record in caplog.records if "starting it again" in record.msg]
    assert waits[:3] == [0.01, 0.02, 0.04]


async def test_a_stable_engine_starts_the_backoff_anew(supervise: Callable[..., Any], caplog: Any) -> None:
    async with supervise("fail", stable_after_seconds=0) as supervisor:
        await until(lambda: supervisor.restarts == 2)
    waits = [record.args[1] for record in caplog.records if "starting it again" in record.msg]
    assert waits[:2] == [0.01, 0.01]


async def test_waiting_for_an_engine_that_cannot_start_tells_why(supervise: Callable[..., Any]) -> None:
    async with supervise("fail") as supervisor:
        await until(lambda: supervisor.restarts)
        with pytest.raises(EngineUnavailable, match="exit status 7"):
            await supervisor.ready(0.05)


async def test_a_missing_program_is_told(tmp_path: Path) -> None:
    supervisor = LocalEngineSupervisor(EngineSettings(), command=(str(tmp_path / "nothing"),))
    async with supervisor:
        with pytest.raises(EngineUnavailable, match="No such file"):
            await supervisor.ready(0.3)


async def test_the_engines_lines_reach_the_log_and_the_progress(supervise: Callable[..., Any], caplog: Any) -> None:
    shown: list[str] = []
    caplog.set_level(logging.INFO, logger="hallmark.engine")
    async with supervise("chatty", on_progress=shown.append) as supervisor:
        await supervisor.ready(20)
    assert shown[0] == "loading"
    assert "progress 90%" in shown
    assert shown[-1].startswith("ready on ")
    assert ("hallmark.engine", logging.INFO, "loading") in caplog.record_tuples


async def test_an_error_line_is_an_error_in_the_log(supervise: Callable[..., Any], caplog: Any) -> None:
    async with supervise("fail") as supervisor:
        await until(lambda: supervisor.restarts)
    assert ("hallmark.engine", logging.ERROR, "no such model") in caplog.record_tuples


async def test_an_engine_that_ignores_the_request_to_end_is_killed(supervise: Callable[..., Any]) -> None:
    async with supervise("stubborn", terminate_seconds=0.1) as supervisor:
        await supervisor.ready(20)
        pid = supervisor.pid
    assert not alive(pid)


async def test_leaving_during_the_start_leaves_no_process(supervise: Callable[..., Any]) -> None:
    async with supervise("serve") as supervisor:
        await until(lambda: supervisor.pid)
        pid = supervisor.pid
    assert not alive(pid)


async def test_a_cancelled_context_leaves_no_process(supervise: Callable[..., Any]) -> None:
    supervisor = supervise("serve")

    async def hold() -> None:
        async with supervisor:
            await asyncio.Event().wait()

    holder = asyncio.create_task(hold())
    await until(lambda: supervisor.pid)
    await supervisor.ready(20)
    pid = supervisor.pid
    holder.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder
    assert not alive(pid)


def test_making_one_does_nothing(supervise: Callable[..., Any], tmp_path: Path) -> None:
    supervise("serve")
    assert not starts(tmp_path)
