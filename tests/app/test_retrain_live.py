"""The whole loop with a real model: labels, dataset, LoRA, evaluation, canary, promotion, and an answer's lineage."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.engines.local import DEFAULT_MODEL
from app.engines.local.weights import WeightsUnavailable, find_weights
from finetune.tickets import PROMPT, TEAMS, write_tickets
from tests.embedded_engine import embedded_engine
from tests.service import Api, Service, live_service

TRAIN, HELD_OUT = 240, 48
RELEASE = {
    "name": "support",
    "task": {"kind": "classify", "labels": TEAMS},
    "prompt": {"version": "ticket-1", "template": PROMPT},
    "retrieval": {"mode": "off"},
    "max_tokens": 8,
}
RECIPE = {
    "task": "classify",
    "classes": TEAMS,
    "query": {"model": "support"},
    "split": {"heldout": 0.0},
    "dedup": {"near": False},
}


def tickets(folder: Path, split: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [(row["messages"][0]["content"], row["label"]) for row in rows]


@pytest.fixture
def model() -> str:
    try:
        return find_weights(DEFAULT_MODEL, Path.home() / ".cache" / "hallmark").location
    except WeightsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
async def service(tmp_path: Path, model: str) -> AsyncIterator[Service]:
    with embedded_engine(model, {}) as url:
        settings = {"engine": {"dialect": "embedded", "adapter_folder": tmp_path / "adapters"}}
        async with live_service(tmp_path / "data", engine_url=url, settings=settings) as service:
            yield service


async def run(service: Service, *arguments: str | Path) -> str:
    given = [*map(str, arguments), "--url", service.url, "--key", service.key]
    done = await asyncio.to_thread(CliRunner(env={"COLUMNS": "160"}).invoke, app, given)
    print(done.output)
    assert done.exit_code == 0, done.output
    return done.stdout


async def ask_and_label(api: Api, asked: list[tuple[str, str]]) -> None:
    """What a team's past is: each ticket is answered, and somebody says where it belonged."""
    room = asyncio.Semaphore(8)

    async def one(question: str, team: str) -> None:
        async with room:
            answered = await api.ask(question, model="support")
        told = {"prediction_id": answered.headers["x-prediction-id"], "class": team}
        assert (await api.client.post("/v1/labels", json=told)).status_code == 201

    await asyncio.gather(*(one(*each) for each in asked))


@pytest.mark.long
@pytest.mark.timeout(5400)  # Five minutes on two idle cores; beside other work much longer.
async def test_labels_become_an_adapter_that_answers_and_can_be_traced(service: Service, model: str, tmp_path: Path):
    write_tickets(tmp_path / "tickets", train=TRAIN, heldout=HELD_OUT)
    exam = tmp_path / "exam.jsonl"
    exam.write_text(
        "".join(json.dumps({"question": q, "label": t}) + "\n" for q, t in tickets(tmp_path / "tickets", "heldout"))
    )
    for name, written in (
        ("release.json", RELEASE),
        ("recipe.json", RECIPE),
        ("exam.json", {"task": "classify", "classes": TEAMS, "split": {"heldout": 1.0}, "dedup": {"near": False}}),
    ):
        (tmp_path / name).write_text(json.dumps(written))
    config = tmp_path / "train.toml"
    config.write_text(f'base = "{model}"\nmax_tokens = 128\ncheck_every_steps = 1000\npatience = 0\n')
    await run(service, "releases", "create", tmp_path / "release.json")
    await run(service, "rollouts", "promote", "support", "--release", "support@1")
    async with service.client() as client:
        client.timeout = 600
        api = Api(client, "default", service.key)
        await ask_and_label(api, tickets(tmp_path / "tickets", "train"))
        await run(service, "datasets", "import", "exam", tmp_path / "exam.json", exam, "--purpose", "evaluation")

        options = ("--recipe", tmp_path / "recipe.json", "--config", config, "--evaluation", "exam")
        places = ("--state", tmp_path / "runs", "--trainer", f"{sys.executable} -m finetune")
        told = await run(service, "retrain", "--release", "support", "--canary", "10%", *options, *places)
        assert "support: canary support@2 0.1" in told
        state = json.loads((tmp_path / "runs" / "support" / "run-0001" / "state.json").read_text())
        found = tmp_path / "runs" / "support" / "run-0001" / "evaluation-of-support@2-beside-support@1"
        evaluation = json.loads((found / "evaluation.json").read_text())
        (change,) = evaluation["comparisons"]  # How much better the stable release is than the candidate.
        assert change["difference"]["high"] < 0, change

        await run(service, "rollouts", "promote", "support", "--why", f"evaluation {state['evaluation']}")
        question, team = tickets(tmp_path / "tickets", "heldout")[0]
        answered = await api.ask(question, model="support")
        assert (answered.status_code, answered.headers["x-release"]) == (200, "support@2"), answered.text
        traced = await lineage(api, answered.headers["x-prediction-id"])
        assert traced["verified"] is True, traced
        assert traced["release"]["id"] == "support@2"
        assert traced["adapter"]["digest"] == state["adapter_digest"]
        assert traced["dataset"]["digest"] == state["dataset_digest"]
        assert all(row["label"] and row["prediction"] for row in traced["rows"]), traced["rows"][:2]
        print(question, team, answered.json()["choices"][0]["message"]["content"])
        print(json.dumps({part: traced[part] for part in ("release", "adapter", "training_run", "dataset")}, indent=1))


async def lineage(api: Api, prediction: str) -> dict[str, Any]:
    return dict((await api.client.get(f"/v1/predictions/{prediction}/lineage")).json())
