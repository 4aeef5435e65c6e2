"""The command line of training: what it prints, and what it says when something is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.dataset import read_dataset
from finetune.manifest import ADAPTER_CONFIG, WEIGHTS, adapter_digest
from tests.finetune.conftest import class_row
from tests.finetune.openai_stub import completion, openai_stub

ROOT = Path(__file__).parents[2]
runner = CliRunner(env={"COLUMNS": "400"})


def test_example_writes_a_dataset_and_prints_its_digest(tmp_path: Path) -> None:
    done = runner.invoke(app, ["example", str(tmp_path / "d"), "--train", "12", "--heldout", "6"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == read_dataset(tmp_path / "d").manifest.digest


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--dataset", "d", "--base", "b"], "output: is missing; give it in the file or as --output"),
        (
            ["train", "--dataset", "/nowhere", "--base", "b", "--output", "o"],
            "name the folder that a dataset was exported",
        ),
        (["train", "--set", "rank"], "write NAME=VALUE"),
        (["train", "--base", "b", "--set", "base=c"], "--set base: --base is given, too; give one of them"),
        (["evaluate", "--dataset", "d", "--output", "o"], "arms: there are none"),
        (["evaluate", "--arm", "base"], "write NAME=MODEL"),
        (["evaluate", "--arm", "base=m,retrieval=maybe"], "retrieval"),
        (["evaluate", "--arm", "base=m", "--url", "http://[::1"], "is no URL"),
        (
            ["evaluate", "--dataset", "d", "--output", "o", "--arm", "base=m,url=localhost:8080/v1"],
            "is no address of a",
        ),
        (["probe", "--dataset", "d", "--output", "o", "--url", "http://[::1"], "arms.0.url: http://[::1 is no URL"),
        (["probe", "--dataset", "d", "--output", "o", "--cost", "-1"], "arms.0.cost: Input should be greater than or"),
        (["register", ".", "--url", "localhost:8080/v1"], "--url localhost:8080/v1 is no address of a server"),
        (["compare", "/nowhere", "--output", "o"], "name a folder that `evaluate` wrote"),
    ],
)
def test_what_is_wrong_is_told_without_a_trace(arguments: list[str], told: str) -> None:
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2
    assert told in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dataset", "/elsewhere/manifest.json: No such file or directory"),
        ("base", "base: there is no folder /elsewhere"),
        ("output", "holds a finished adapter of another run"),
    ],
)
def test_any_setting_of_a_file_may_be_set_anew(
    name: str, told: str, write: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    folder = write([class_row(1, "red")])
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "manifest.json").write_text('{"run": "r1"}')
    file = tmp_path / "train.toml"
    file.write_text(f'dataset = "{folder.name}"\nbase = "{tiny_base}"\noutput = "adapter"\nthreads = 1\nmax_steps = 1')
    value = str(tmp_path / "finished") if name == "output" else "/elsewhere"
    done = runner.invoke(app, ["train", str(file), "--set", f"{name}={value}"])
    assert done.exit_code == 2, done.output
    assert told in done.output


def test_evaluate_asks_the_arms_with_the_key_and_prints_the_report(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write(heldout=[class_row(n, "red") for n in range(8)])
    with openai_stub(lambda *_: completion("red")) as (url, seen):
        arguments = ["evaluate", "--dataset", str(folder), "--output", str(tmp_path / "o"), "--url", url]
        done = runner.invoke(
            app, [*arguments, "--arm", "one=m,cost=2", "--limit", "5"], env={"HALLMARK_API_KEY": "secret"}
        )
    assert done.exit_code == 0, done.output
    assert "| one | 100.0% (" in done.stdout
    assert len(seen) == 5
    assert seen[0]["authorization"] == "Bearer secret"
    assert json.loads((tmp_path / "o" / "evaluation.json").read_text())["arms"][0]["cost"] == 2


def test_register_sends_the_run_only_if_the_folder_is_what_its_manifest_says(tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    manifest = {
        "format": "hallmark-adapter/1",
        "run": "r1",
        "adapter_digest": adapter_digest(tmp_path),
        "base_model": "m",
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    def act(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        assert path == "/v1/lineage/training-runs"
        return 201, {"id": body["id"]}, {}

    with openai_stub(act) as (url, seen):
        done = runner.invoke(app, ["register", str(tmp_path), "--url", url, "--key", "k"])
        assert (done.exit_code, done.stdout.strip()) == (0, "registered: r1")
        (tmp_path / WEIGHTS).write_bytes(b"others")
        done = runner.invoke(app, ["register", str(tmp_path), "--url", url])
    assert done.exit_code == 2
    assert "its files have the digest" in done.output
    assert len(seen) == 1


def test_the_command_line_loads_no_library_before_it_needs_it() -> None:
    code = "import finetune.cli, sys; print(*sorted(module.partition('.')[0] for module in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=True
    )
    assert {"torch", "trl", "datasets", "peft", "matplotlib", "sklearn", "app"}.isdisjoint(done.stdout.split())
