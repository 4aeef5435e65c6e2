"""The files for training on many GPUs: accelerate takes them, and the Job runs what the image has."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from typer.main import get_command

from app import retrain_commands
from app.cli import app as hallmark
from finetune.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LAUNCHERS = ("accelerate-fsdp.yaml", "accelerate-deepspeed.yaml")


def job() -> tuple[dict[str, Any], dict[str, Any]]:
    """The Job's specification, and its one container."""
    (found,) = [each for each in yaml.safe_load_all((DEPLOY / "training.yaml").read_text()) if each["kind"] == "Job"]
    (container,) = found["spec"]["template"]["spec"]["containers"]
    return found["spec"], container


@pytest.mark.parametrize("file", LAUNCHERS)
def test_accelerate_takes_the_configuration(file: str) -> None:
    """Its parser refuses keys that it does not know."""
    config = load_config_from_file(str(DEPLOY / file))
    assert config.mixed_precision == "bf16"
    assert config.distributed_type.value == {"fsdp": "FSDP", "deepspeed": "DEEPSPEED"}[file.split("-")[1].split(".")[0]]
    assert (config.fsdp_config or config.deepspeed_config) == yaml.safe_load((DEPLOY / file).read_text())[
        "fsdp_config" if config.fsdp_config else "deepspeed_config"
    ]


@pytest.mark.parametrize("file", LAUNCHERS)
def test_their_settings_are_those_that_the_libraries_read(file: str) -> None:
    written = yaml.safe_load((DEPLOY / file).read_text())
    names = set(written.get("fsdp_config") or written["deepspeed_config"])
    launch = Path(__import__("accelerate").__file__).parent / "commands" / "launch.py"
    known = set(re.findall(r'"--(\w+)"', launch.read_text()))
    assert names <= known


def test_the_job_runs_a_command_of_the_image_on_the_pool_that_is_its_own() -> None:
    spec, container = job()
    pod = spec["template"]["spec"]
    words = container["command"] + container["args"]
    assert words[:2] == ["accelerate", "launch"]
    at = words.index("-m")
    assert (ROOT / words[at + 1] / "__main__.py").is_file()
    assert words[at + 2] in {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    assert int(words[words.index("--num_processes") + 1]) == int(container["resources"]["limits"]["nvidia.com/gpu"])
    (label,) = pod["nodeSelector"].items()
    assert {(each["key"], each["value"]) for each in pod["tolerations"]} == {label}
    assert {"trl", "accelerate"} <= {re.split("[>=]", each)[0] for each in extra("train")}


def test_the_job_goes_on_after_its_node_has_gone() -> None:
    spec, container = job()
    assert spec["backoffLimit"] > 0
    assert spec["template"]["spec"]["restartPolicy"] == "OnFailure"
    volumes = {each["name"]: each for each in spec["template"]["spec"]["volumes"]}
    mounted = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert "persistentVolumeClaim" in mounted["/scratch"]
    configs = {each["configMap"]["name"] for each in mounted["/config"]["projected"]["sources"]}
    created = set(re.findall(r"kubectl create configmap (\w+)", (DEPLOY / "training.yaml").read_text()))
    assert configs == created


def test_the_image_for_training_starts_the_training_command() -> None:
    image = (ROOT / "Dockerfile").read_text()
    train = image.partition("AS train\n")[2].partition("\nFROM")[0]
    assert 'ENTRYPOINT ["hallmark-train"]' in train
    assert "'.[train]'" in image.partition("AS build-train\n")[2]
    assert "train" not in image.partition("AS serve\n")[2]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["hallmark-train"] == "finetune.cli:main"


def extra(name: str) -> list[str]:
    found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][name]
    return found


def test_what_runs_on_a_schedule_is_the_command_that_there_is() -> None:
    (found,) = yaml.safe_load_all((DEPLOY / "retraining.yaml").read_text())
    spec = found["spec"]["jobTemplate"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["hallmark", "retrain"]
    command = get_command(hallmark).commands["retrain"]
    with command.make_context("retrain", [*container["args"], "--key", "hm_x", "--config", __file__]) as context:
        assert context.params["if_drifted"]
        assert context.params["min_new_labels"] == 200
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, retrain_commands.NEEDS_RESTART, retrain_commands.REFUSED]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(context.params["adapters"]), "/config", "/scratch"} <= mounts
    assert {volume["name"] for volume in spec["template"]["spec"]["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
