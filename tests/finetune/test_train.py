"""A LoRA run: the same inputs give the same bytes, also when it was cut off, and the service takes what comes of it."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.engines.local.adapters import merged_copy
from app.engines.local.model import load
from app.engines.local.weights import Weights
from app.lineage.provenance import RunManifest, canonical, sha256
from app.vetting import folder_digest
from finetune.config import TrainConfig
from finetune.dataset import write_dataset
from finetune.errors import BadConfig, BadDataset, BadOutput
from finetune.manifest import registration
from finetune.resuming import Work
from finetune.train import train
from tests.finetune.conftest import class_row, preference_row

ROOT = Path(__file__).parents[2]
ROWS = [class_row(n, ("red", "blue")[n % 2]) for n in range(30)]


class Cut(Exception):
    """The run is ended in the middle, as a test wishes."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": ROWS[:24], "heldout": ROWS[24:]}
    write_dataset(folder, splits, name="tickets", version="1", task="classify", labels=["red", "blue"], licence="CC0")
    return folder


@pytest.fixture(scope="module")
def settings(dataset: Path, tiny_base: Path) -> dict[str, Any]:
    return {
        "dataset": dataset, "base": str(tiny_base), "base_model": "tiny-llama", "epochs": 2, "batch_size": 4, "rank": 4,
        "max_tokens": 96, "check_every_steps": 3, "threads": 1, "dropout": 0.1, "device": "cpu", "precision": "fp32",
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nothing disturbed: its folder and its manifest."""
    output = tmp_path_factory.mktemp("run") / "adapter"
    return output, train(TrainConfig(**settings, output=output))


def test_the_manifest_says_what_the_adapter_was_made_of(finished: tuple[Path, dict[str, Any]], dataset: Path) -> None:
    output, manifest = finished
    assert json.loads((output / "manifest.json").read_text()) == manifest
    assert manifest["adapter_digest"] == folder_digest(output)
    assert (manifest["base_model"], manifest["base_revision"]) == ("tiny-llama", None)
    assert len(manifest["base_digest"]) == 64
    assert manifest["dataset_digest"] == json.loads((dataset / "manifest.json").read_text())["digest"]
    assert manifest["dataset"] == {"name": "tickets", "version": "1", "licence": "CC0"}
    assert manifest["config"]["rank"] == 4
    assert manifest["libraries"].keys() >= {"torch", "transformers", "peft", "trl", "python"}
    assert manifest["hardware"]["device"] == "cpu"
    assert manifest["rows"] == {"train": 24, "heldout": 6}
    assert (manifest["same_bytes_again"], manifest["why_bytes_may_differ"]) == (True, [])
    assert manifest["metrics"]["steps"] == 12
    assert manifest["metrics"]["last_loss"] < manifest["metrics"]["first_loss"]
    assert manifest["metrics"]["heldout_loss"] > 0


def test_the_folder_holds_the_adapter_its_curve_and_nothing_of_this_machine(
    finished: tuple[Path, dict[str, Any]], tiny_base: Path
) -> None:
    output, _ = finished
    assert {path.name for path in output.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "manifest.json", "loss.csv", "loss.png"
    }  # fmt: skip
    rows = (output / "loss.csv").read_text().splitlines()
    assert rows[0] == "step,epoch,loss,heldout_loss,learning_rate,grad_norm"
    assert len(rows) == 13
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = (output / "adapter_config.json").read_text()
    assert str(tiny_base) not in config + (output / "manifest.json").read_text()
    assert json.loads(config)["target_modules"] == sorted(json.loads(config)["target_modules"])


def test_lineage_takes_the_manifest_as_a_training_run(finished: tuple[Path, dict[str, Any]]) -> None:
    body = registration(finished[0])
    assert body["digest"] == sha256(canonical(body["manifest"]))
    assert msgspec.convert(body["manifest"], RunManifest).adapter_digest == folder_digest(finished[0])
    # It comes to the same digest when it has been through the wire.
    assert sha256(canonical(msgspec.json.decode(msgspec.json.encode(body["manifest"])))) == body["digest"]


def test_the_embedded_engine_loads_the_adapter(finished: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    base = load(Weights(str(tiny_base), "tiny-llama", "r1"), "fp32")
    merged = merged_copy(base, finished[0])
    assert not merged.model.layers[0].mlp.down_proj.weight.equal(base.model.model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize("cut_at", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    cut_at: int, finished: tuple[Path, dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    def cut(told: dict[str, float]) -> None:
        if told["step"] == cut_at:
            raise Cut

    config = TrainConfig(**settings, output=tmp_path / "adapter")
    with pytest.raises(Cut):
        train(config, cut)
    half_written, half_removed = (config.output / "work" / f"checkpoint-{step}" for step in (9, 12))
    half_written.mkdir()
    half_removed.mkdir()
    (half_removed / "whole").touch()
    manifest = train(config)
    assert manifest["resumed_from_step"] == {2: None, 8: 6}[cut_at]
    assert manifest["adapter_digest"] == finished[1]["adapter_digest"]
    assert manifest["metrics"] == finished[1]["metrics"]
    assert not (config.output / "work").exists()


def test_the_newest_checkpoints_and_the_best_are_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    seen: list[set[int]] = []

    def look(told: dict[str, float]) -> None:
        seen.append({int(path.name.partition("-")[2]) for path in (tmp_path / "work").glob("checkpoint-*")})

    hot = settings | {"learning_rate": 0.5, "schedule": "constant", "patience": 9, "check_every_steps": 1}
    best = train(TrainConfig(**hot, max_steps=6, output=tmp_path), look)["metrics"]["kept_step"]
    assert seen[-1] == {best, 5, 6}


def test_a_checkpoint_is_marked_before_an_older_one_goes_whose_mark_goes_first(tmp_path: Path) -> None:
    for name in ("elsewhere", "checkpoint-2", "checkpoint-3"):
        (tmp_path / "work" / name).mkdir(parents=True)
    (tmp_path / "work" / "elsewhere" / "whole").touch()
    (tmp_path / "work" / "checkpoint-1").symlink_to(tmp_path / "work" / "elsewhere")  # It cannot be removed.
    with pytest.raises(OSError, match="symbolic link"):
        Work(tmp_path / "work", {}).mark_whole(3, best_step=None)
    marked = {path.parent.name for path in (tmp_path / "work").glob("*/whole")}
    assert marked == {"checkpoint-3"}


def test_a_finished_run_is_left_as_it_is_and_another_is_not_written_over_it(
    finished: tuple[Path, dict[str, Any]], settings: dict[str, Any]
) -> None:
    output, manifest = finished
    assert train(TrainConfig(**settings, output=output)) == manifest
    with pytest.raises(BadOutput, match=r"holds a finished adapter of another run \(its config differ"):
        train(TrainConfig(**(settings | {"seed": 1}), output=output))


@pytest.mark.parametrize(
    ("weights", "told"), [(b"", "its files have the digest"), (None, r"adapter_model\.safetensors: No such file")]
)
def test_a_finished_run_whose_files_were_changed_is_not_taken_for_done(
    weights: bytes | None, told: str, finished: tuple[Path, dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    output = shutil.copytree(finished[0], tmp_path / "adapter")
    (output / "adapter_model.safetensors").unlink()
    if weights is not None:
        (output / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(BadOutput, match=told):
        train(TrainConfig(**settings, output=output))


def test_checkpoints_of_other_inputs_are_not_gone_on_from(settings: dict[str, Any], tmp_path: Path) -> None:
    def cut(told: dict[str, float]) -> None:
        raise Cut

    with pytest.raises(Cut):
        train(TrainConfig(**settings, output=tmp_path), cut)
    with pytest.raises(BadOutput, match="has checkpoints of a run with another config; put that back"):
        train(TrainConfig(**(settings | {"rank": 8}), output=tmp_path))


@pytest.mark.parametrize(
    ("how", "moved"),
    [
        ({"check_every_steps": 1, "patience": 1, "epochs": 20}, False),
        ({"check_every_steps": 2, "patience": 1, "epochs": 20}, True),
        ({"check_every_steps": 3, "patience": 2, "max_steps": 8}, True),
        ({"check_every_steps": 3, "patience": 0, "max_steps": 8}, False),
    ],
)
def test_a_run_that_was_cut_off_after_its_last_step_only_writes_its_adapter(
    how: dict[str, Any], moved: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    given = settings | {"learning_rate": 0.5, "schedule": "constant"} | how
    expected = train(TrainConfig(**given, output=tmp_path / "whole"))

    def cut(told: dict[str, float]) -> None:
        last = tmp_path / "a" / "work" / f"checkpoint-{expected['metrics']['steps']}" / "whole"
        if last.exists():  # What is told once it is marked is what the whole run came to.
            raise Cut

    with pytest.raises(Cut):
        train(TrainConfig(**given, output=tmp_path / "a"), cut)
    output = (tmp_path / "a").rename(tmp_path / "b") if moved else tmp_path / "a"
    found = train(TrainConfig(**given, output=output))
    assert found["metrics"] == expected["metrics"]
    assert found["adapter_digest"] == expected["adapter_digest"]
    assert (output / "loss.csv").read_bytes() == (tmp_path / "whole" / "loss.csv").read_bytes()


def test_without_patience_the_last_step_is_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    hot = settings | {"learning_rate": 0.5, "schedule": "constant", "patience": 0, "check_every_steps": 1}
    metrics = train(TrainConfig(**hot, max_steps=2, output=tmp_path))["metrics"]
    assert metrics["kept_step"] == metrics["steps"] == 2


@pytest.mark.slow
def test_it_stops_when_the_held_out_rows_get_worse_and_keeps_the_best(settings: dict[str, Any], tmp_path: Path) -> None:
    hot = settings | {"learning_rate": 0.5, "patience": 1, "epochs": 20, "check_every_steps": 1, "schedule": "constant"}
    metrics = train(TrainConfig(**hot, output=tmp_path / "a"))["metrics"]
    assert metrics["steps"] < 20
    assert metrics["kept_step"] == metrics["steps"] - 1
    assert metrics["heldout_loss"] <= metrics["first_heldout_loss"]


@pytest.mark.slow
def test_packed_rows_do_not_see_each_other(settings: dict[str, Any], tmp_path: Path) -> None:
    """Before the first step the loss of packed rows is that of the same rows one by one."""
    one_step = settings | {"max_steps": 1, "dropout": 0.0, "patience": 0, "warmup_steps": 0}
    alone = train(TrainConfig(**(one_step | {"batch_size": 24}), output=tmp_path / "alone"))
    packed = train(TrainConfig(**(one_step | {"batch_size": 24, "packing": True}), output=tmp_path / "packed"))
    assert packed["metrics"]["first_loss"] == pytest.approx(alone["metrics"]["first_loss"], rel=1e-4)


@pytest.mark.slow
def test_preferences_are_trained_on_by_dpo(settings: dict[str, Any], tmp_path: Path) -> None:
    splits = {"train": [preference_row(n) for n in range(8)], "heldout": [preference_row(n) for n in range(8, 12)]}
    write_dataset(tmp_path / "pairs", splits, name="pairs", version="1", task="preference")
    config = TrainConfig(**(settings | {"dataset": tmp_path / "pairs", "max_steps": 3}), output=tmp_path / "adapter")
    manifest = train(config)
    assert manifest["metrics"]["first_loss"] == pytest.approx(0.693, abs=0.01)  # The logarithm of 2: no preference yet.
    assert manifest["metrics"]["heldout_loss"] < manifest["metrics"]["first_loss"]
    assert folder_digest(config.output) == manifest["adapter_digest"]


@pytest.mark.slow
def test_rows_that_are_too_long_are_refused_or_dropped_and_counted(
    settings: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    long = class_row(1, "red") | {
        "messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "red"}]
    }
    given = settings | {"dataset": write([*ROWS[:4], long]), "max_steps": 1}
    with pytest.raises(
        BadDataset, match=r"1 rows of train have more than max_tokens = 96 tokens, the longest \d+\. Raise"
    ):
        train(TrainConfig(**given, output=tmp_path / "a"))
    manifest = train(TrainConfig(**given, long_rows="drop", output=tmp_path / "a"))
    assert (manifest["rows"], manifest["rows_dropped"]) == ({"train": 4}, {"train": 1})


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"base": "/nowhere/model"}, BadConfig, "base: there is no folder /nowhere/model"),
        ({"device": "cuda"}, BadConfig, "device: torch sees no GPU"),
        ({"device": "auto", "quantize": "nf4"}, BadConfig, "quantize: bitsandbytes needs a GPU, and torch sees none"),
        ({"report_to": "mlflow"}, BadConfig, "report_to: it needs the package mlflow"),
    ],
)
def test_what_this_machine_cannot_do_is_told(
    given: dict[str, Any], error: type[Exception], told: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available() and "device" in given:
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=told):
        train(TrainConfig(**(settings | given), output=tmp_path / "a"))


def test_a_set_that_was_made_to_evaluate_with_is_not_trained_on(
    settings: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write([], ROWS[:4], purpose="evaluation")
    with pytest.raises(BadDataset, match="made to evaluate with"):
        train(TrainConfig(**(settings | {"dataset": folder}), output=tmp_path / "a"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    finished: tuple[Path, dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    at = random.randint(1, 11)
    given = settings | {"output": tmp_path / "adapter"}
    code = (
        "import os, signal, sys, json; from finetune.config import TrainConfig; from finetune.train import train\n"
        f"train(TrainConfig(**json.loads(sys.argv[1])), lambda told: told['step'] == {at} and os.kill(os.getpid(), 9))"
    )
    written = json.dumps(given, default=str)
    killed = subprocess.run([sys.executable, "-c", code, written], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    file = tmp_path / "train.toml"
    file.write_text("\n".join(f"{name} = {json.dumps(value, default=str)}" for name, value in given.items()))
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "train", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["adapter_digest"] == finished[1]["adapter_digest"], f"killed at step {at}"
    assert manifest["adapter_digest"] in done.stdout


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_gpu_trains_in_bf16_and_in_four_bits(quantize: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    given = settings | {"device": "cuda", "precision": "bf16", "quantize": quantize, "threads": None}
    manifest = train(TrainConfig(**given, output=tmp_path / "a"))
    assert manifest["metrics"]["last_loss"] < manifest["metrics"]["first_loss"]
    assert manifest["same_bytes_again"] == (quantize == "none")


@pytest.mark.slow
def test_a_report_goes_to_tensorboard_where_it_is_installed(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    given = settings | {"report_to": "tensorboard", "max_steps": 2}
    train(TrainConfig(**given, output=tmp_path / "a"))
    assert list((tmp_path / "a" / "work" / "runs").rglob("events*"))
