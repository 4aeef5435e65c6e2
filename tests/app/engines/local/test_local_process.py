"""The engine as a process: how it starts, and that it ends with its parent."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.engines.local import EngineSettings
from app.engines.local.__main__ import settings_from
from app.engines.supervisor import LocalEngineSupervisor
from tests.app.engines.local.tiny_engine import chat, until

ENGINE = (sys.executable, "-m", "app.engines.local")
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([*sys.argv[1:], "--parent-pid", str(os.getpid())])
time.sleep(120)
"""


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"ready on (\S+)", line):
            return found[1]
    raise AssertionError("the engine did not start:\n" + "".join(lines))


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def arguments(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--port", "0", "--dtype", "fp32", "--threads", "1"]


@pytest.fixture
def orphan(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that starts an engine and forgets it."""
    command = [sys.executable, "-c", PARENT, *ENGINE, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_the_engine_ends_when_its_parent_is_killed(orphan: subprocess.Popen[str]) -> None:
    url = address(orphan)
    assert answers(url)
    orphan.kill()
    until(lambda: not answers(url))


@pytest.mark.slow
def test_a_request_to_end_ends_it_cleanly(arguments: list[str]) -> None:
    process = subprocess.Popen([*ENGINE, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert answers(address(process))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


def test_a_model_that_is_not_there_is_told_in_one_line() -> None:
    done = subprocess.run([*ENGINE, "--model", "/nowhere/model"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "/nowhere/model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_adapter_that_is_not_there_is_told_in_one_line(arguments: list[str]) -> None:
    command = [*ENGINE, *arguments, "--adapter", "tone=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ERROR --adapter: lora_path: /nowhere has no adapter_config.json")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "given",
    ["--threads -1", "--threads 0", "--max-batch 0", "--max-queue -1", "--max-adapters 0", "--port 65536", "--port x"],
)
def test_a_number_that_cannot_be_is_told_with_its_option(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        settings_from([given.replace(" ", "=")])
    assert ended.value.code == 2
    assert f"argument {given.split()[0]}: " in capsys.readouterr().err


@pytest.mark.slow
async def test_a_supervised_engine_answers_those_who_have_its_token(tiny_folder: Path) -> None:
    settings = EngineSettings(model=str(tiny_folder), dtype="fp32", threads=1)
    async with LocalEngineSupervisor(settings) as supervisor:
        await supervisor.ready(50)
        async with httpx.AsyncClient(base_url=supervisor.base_url, trust_env=False) as client:
            url, headers = "/v1/chat/completions", {"authorization": f"Bearer {supervisor.token}"}
            assert (await client.post(url, json=chat())).status_code == 401
            assert (await client.post(url, json=chat(), headers=headers)).status_code == 200


def test_the_command_line_sets_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "--model m --host ::1 --port 5 --threads 2 --dtype bf16 --max-queue 3 --max-batch 4 --max-total-tokens 99 "
        f"--max-adapters 1 --cache-dir /c --adapter a=/x --adapter b=/y=z --token t --parent-pid {os.getpid()}"
    )
    assert settings_from(text.split()) == EngineSettings(
        model="m",
        host="::1",
        port=5,
        threads=2,
        dtype="bf16",
        max_queue=3,
        max_batch=4,
        max_total_tokens=99,
        max_adapters=1,
        cache_dir=Path("/c"),
        adapters=(("a", Path("/x")), ("b", Path("/y=z"))),
        token="t",
        parent_pid=os.getpid(),
    )
    assert settings_from([]) == EngineSettings()
