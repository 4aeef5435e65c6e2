"""`hallmark retrain` against a live service, with a program in place of the trainer: every step, and every stop."""

import asyncio
import contextlib
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.retrain_files import EvaluationRead, Plan, RecommendationRead, begin, load
from app.retraining import reasons_to_start
from app.routes.drift_schemas import AlarmObject, DriftReport, ReleaseDrift
from finetune import compare
from finetune.evaluations import ArmResult, Evaluation
from finetune.statistics import Difference, Estimate
from tests.fake_tgi import FakeTGI
from tests.service import Api, Service, live_service

ROOT = Path(__file__).parents[2]
RECIPE = 'task = "classify"\nsplit = {heldout = 0.3}\n'


@dataclass
class World:
    """A service before an engine that takes adapters while it runs, and one run's folder."""

    service: Service
    api: Api
    engine: FakeTGI
    folder: Path

    def control(self, **given: Any) -> None:
        """Say what the trainer does."""
        (self.folder / "control.json").write_text(json.dumps({"weights": self.folder.name, **given}))

    def arguments(self, *more: str) -> list[str]:
        (self.folder / "recipe.toml").write_text(RECIPE)
        trainer = shlex.join([sys.executable, "-m", "tests.fake_trainer", str(self.folder)])
        given = ["retrain", "--release", "hallmark", "--canary", "10%", "--recipe", str(self.folder / "recipe.toml")]
        given += ["--state", str(self.folder / "runs"), "--trainer", trainer]
        return [*given, "--url", self.service.url, "--key", self.api.key, *more]

    async def retrain(self, *more: str) -> Result:
        return await asyncio.to_thread(CliRunner(env={"COLUMNS": "200"}).invoke, app, self.arguments(*more))

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line)["command"] for line in file.read_text().splitlines()] if file.exists() else []

    def state(self, run: int = 1) -> dict[str, Any]:
        return dict(json.loads((self.folder / "runs" / "hallmark" / f"run-{run:04}" / "state.json").read_text()))

    async def rollout(self) -> dict[str, Any]:
        return dict((await self.api.client.get("/v1/rollouts/hallmark")).json())


@pytest.fixture(scope="module")
async def parts(tmp_path_factory) -> AsyncIterator[tuple[Service, Api, FakeTGI]]:
    folder = tmp_path_factory.mktemp("retrain")
    given = {"engine": {"dialect": "embedded", "adapter_folder": folder / "adapters"}}
    async with (
        FakeTGI(lists_adapters=True) as engine,
        live_service(folder / "data", engine_url=engine.url, settings=given, tenants=1) as service,
        service.tenant() as api,
    ):
        for number, question in enumerate(("Where is my card?", "I want money back.", "Change a number?", "Who?")):
            await label(api, question, "card" if number % 2 else "money")
        yield service, api, engine


@pytest.fixture
async def world(parts, tmp_path) -> AsyncIterator[World]:
    world = World(*parts, tmp_path)
    world.control()
    yield world
    if (await world.rollout())["canary"]:
        assert (await world.api.client.post("/v1/rollouts/hallmark/rollback", json={})).status_code == 200


async def label(api: Api, question: str, said: str) -> None:
    stated = {"prediction_id": (await api.answer(question))["id"], "class": said}
    assert (await api.client.post("/v1/labels", json=stated)).status_code == 201


def told(result: Result) -> str:
    return " ".join(result.stderr.split())


async def test_labels_become_a_canary_that_was_evaluated(world):
    done = await world.retrain()
    assert done.exit_code == 0, done.output
    assert world.calls == ["train", "evaluate", "compare"]
    state, rollout = world.state(), await world.rollout()
    assert (state["outcome"], rollout["canary"], rollout["share"]) == ("canary", state["release"], 0.1)
    assert "0.900 [0.800, 0.950]" in done.stdout
    assert "its score is +2.0 points beside hallmark@1 on 100 rows" in done.stdout
    (change, *_) = (await world.api.client.get("/v1/rollouts/hallmark/changes")).json()["data"]
    assert change["why"].startswith(f"evaluation {state['evaluation']}")
    content = (await world.api.client.get(f"/v1/releases/{state['release']}")).json()["content"]
    assert content["lineage"]["dataset_digest"] == state["dataset_digest"]
    lines = [json.loads(line) for line in (world.folder / "calls.jsonl").read_text().splitlines()]
    assert all(line["key"] == world.api.key and world.api.key not in line["arguments"] for line in lines)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"outcome": "too few rows", "value": 0.03, "needed": 240}, "need about 240 more labels"),
        ({"outcome": "worse", "value": 0.2}, "seems worse than allowed"),
        ({"outcome": "a slice is worse", "value": 0.01}, "worse on a part of the rows"),
    ],
)
async def test_what_is_not_shown_to_be_good_enough_gets_no_canary(world, found, said):
    world.control(**found)
    done = await world.retrain()
    assert done.exit_code == 4
    assert "no canary:" in done.stderr
    assert said in told(done)
    assert (await world.rollout())["canary"] is None
    assert world.state()["outcome"] == "refused"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"failures": {"stable": {"engine_unavailable": 30, "timeout": 10}}}, "did not answer 40 of 100 rows for hall"),
        ({"failures": {"candidate": {"503": 2}}, "outcome": "worse", "value": 0.2}, "did not answer 2 of 100 rows for"),
        ({"answered": {"stable": "smaller@4"}}, "smaller@4 answered in place of hallmark@1"),
        ({"answered": {"candidate": "smaller@4"}}, "smaller@4 answered in place of"),
    ],
)
async def test_an_evaluation_that_the_service_was_away_for_decides_nothing_and_is_made_again(world, found, said):
    world.control(**found)
    away = await world.retrain()
    assert away.exit_code == 1, away.output
    assert said in told(away)
    assert "Run this again" in told(away)
    assert ((await world.rollout())["canary"], world.state().get("outcome")) == (None, None)
    world.control(failures={"stable": {"engine_unavailable": 1}, "candidate": {"unfit_answer": 20}})
    done = await world.retrain()
    assert done.exit_code == 0, done.output
    assert world.calls == ["train", "evaluate", "compare", "evaluate", "compare"]


async def test_what_nothing_is_new_for_is_not_trained_again_unless_it_is_told_to(world):
    world.control(outcome="worse", value=0.2)
    assert (await world.retrain()).exit_code == 4
    again = await world.retrain()
    assert (again.exit_code, len(world.calls)) == (0, 3)
    assert "Nothing to do: the rows are those of an earlier run, which ended with refused" in again.stdout
    assert (await world.retrain("--anew")).exit_code == 4
    assert len(world.calls) == 6


@pytest.mark.parametrize("step", ["train", "evaluate", "compare"])
async def test_a_step_that_failed_is_taken_again_and_no_other(world, step):
    world.control(fail=step)
    failed = await world.retrain()
    assert failed.exit_code == 1
    assert "goes on where it was" in told(failed)
    assert (await world.rollout())["canary"] is None
    done = await world.retrain()
    assert done.exit_code == 0, done.output
    assert world.calls == sorted([step, "train", "evaluate", "compare"], key=["train", "evaluate", "compare"].index)


@pytest.mark.parametrize("step", ["train", "compare"])
async def test_whoever_is_killed_half_way_goes_on_where_it_was(world, step):
    world.control(kill=step)
    command = [sys.executable, "-m", "app", *world.arguments()]
    killed = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (await world.rollout())["canary"] is None
    done = await world.retrain()
    assert done.exit_code == 0, done.output
    assert "going on with" in done.stderr
    assert world.calls.count("train") == (2 if step == "train" else 1)
    assert not (world.folder / "runs" / "hallmark" / "run-0002").exists()


async def test_a_run_that_was_cut_off_is_not_finished_as_another(world):
    world.control(fail="train")
    assert (await world.retrain()).exit_code == 1
    other = await world.retrain("--margin", "1%")
    assert other.exit_code == 1
    assert "began with another margin" in told(other)
    assert (await world.retrain("--margin", "1%", "--anew")).exit_code == 0
    assert (world.state(1)["outcome"], world.state(2)["outcome"]) == ("given up", "canary")


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"base_model": "org/other"}, "was trained on 'org/other'"),
        ({"dataset_digest": "0" * 64}, "which was exported for it"),
    ],
)
async def test_an_adapter_of_something_else_is_refused(world, manifest, said):
    world.control(manifest=manifest)
    done = await world.retrain()
    assert done.exit_code == 1
    assert said in told(done)
    assert (await world.rollout())["canary"] is None


async def test_an_adapter_whose_files_were_changed_meanwhile_is_refused(world):
    world.control(fail="evaluate")
    assert (await world.retrain()).exit_code == 1
    weights = world.folder / "runs" / "hallmark" / "run-0001" / "adapter" / "adapter_model.safetensors"
    weights.write_text("other")
    done = await world.retrain()
    assert done.exit_code == 1
    assert "were changed after training" in told(done)


async def test_what_is_stable_by_now_is_evaluated_against(world):
    world.control(fail="compare")
    assert (await world.retrain()).exit_code == 1
    first = world.state()["release"]
    made = (await world.api.client.post("/v1/releases", json={"name": "hallmark", "notes": world.folder.name})).json()
    await world.api.client.post("/v1/rollouts/hallmark/promote", json={"release": made["id"]})
    try:
        done = await world.retrain()
        assert done.exit_code == 0, done.output
        assert (world.state()["stable"], world.state()["release"] != first) == (made["id"], True)
        assert world.calls.count("evaluate") == 2
    finally:
        for step in ("rollback", "rollback"):
            await world.api.client.post(f"/v1/rollouts/hallmark/{step}", json={})


async def test_a_draft_that_was_promoted_by_hand_ends_its_run(world):
    world.control(fail="compare")
    assert (await world.retrain()).exit_code == 1
    draft = world.state()["release"]
    promoted = await world.api.client.post("/v1/rollouts/hallmark/promote", json={"release": draft})
    assert promoted.status_code == 200
    try:
        done = await world.retrain()
        assert done.exit_code == 0, done.output
        assert "was promoted by hand" in done.stdout
        assert ((await world.rollout())["stable"], world.state()["outcome"]) == (draft, "promoted")
        again = await world.retrain()
        assert (again.exit_code, world.calls) == (0, ["train", "evaluate", "compare"])
        assert "Nothing to do: the rows are those of an earlier run, which ended with promoted" in again.stdout
    finally:
        await world.api.client.post("/v1/rollouts/hallmark/rollback", json={})


async def test_a_trial_that_is_under_way_is_not_disturbed(world):
    assert (await world.retrain()).exit_code == 0
    refused = await world.retrain("--anew")
    assert refused.exit_code == 1
    assert "is being tried already" in told(refused)
    idle = await world.retrain("--min-new-labels", "1")
    assert idle.exit_code == 0
    assert "is being tried already" in idle.stdout


async def test_it_begins_only_when_there_are_enough_new_labels(world):
    done = await world.retrain("--dataset", "counted", "--min-new-labels", "4")
    assert done.exit_code == 0, done.output
    assert "4 labels or more and no dataset yet" in told(done)
    assert (await world.api.client.post("/v1/rollouts/hallmark/rollback", json={})).status_code == 200
    idle = await world.retrain("--dataset", "counted", "--min-new-labels", "2")
    assert (idle.exit_code, world.calls.count("train")) == (0, 1)
    assert "not enough new labels" in idle.stdout
    await label(world.api, "Is it open on Sunday?", "card")
    await label(world.api, "Where is the nearest shop?", "money")
    more = await world.retrain("--dataset", "counted", "--min-new-labels", "2")
    assert more.exit_code == 0, more.output
    assert world.calls.count("train") == 2


async def test_without_a_drift_alarm_it_does_not_begin(world):
    idle = await world.retrain("--if-drifted")
    assert (idle.exit_code, world.calls) == (0, [])
    assert "no drift alarm" in idle.stdout


def test_a_drift_alarm_is_a_reason_to_begin():
    raised = AlarmObject(kind="inputs", since=datetime.now(UTC), window=3)
    known = ReleaseDrift(
        release="hallmark@1", alarms=[raised], examples=[], open_sessions=0, compared=4, reference=None, windows=[]
    )

    class Told:
        def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
            assert (method, path, options["params"]["release"]) == ("GET", "/v1/drift", "hallmark@1")
            return DriftReport(data=[known]).model_dump(mode="json")

    asked = {"if_drifted": True, "min_new_labels": None}
    assert reasons_to_start(Told(), "hallmark@1", "d", **asked) == ["hallmark@1 has a drift alarm: inputs"]


async def test_an_engine_that_must_be_started_again_is_waited_for(tmp_path):
    async with restarted(tmp_path, ()) as world:
        world.control()
        await label(world.api, "Where is my card?", "card")
        await label(world.api, "I want my money.", "money")
        waits = await world.retrain()
        assert (waits.exit_code, world.calls) == (3, ["train"])
        (name,) = (each.name for each in (tmp_path / "adapters").iterdir())
        assert f"LORA_ADAPTERS={name}={tmp_path / 'adapters' / name}" in waits.stderr
        assert "Run this again when it is: it goes on here." in told(waits)
    async with restarted(tmp_path, (name,)) as world:
        done = await world.retrain()
        assert (done.exit_code, world.calls) == (0, ["train", "evaluate", "compare"]), done.output
        assert (await world.rollout())["canary"] == "hallmark@2"


@contextlib.asynccontextmanager
async def restarted(folder: Path, adapters: tuple[str, ...]) -> AsyncIterator[World]:
    """A service before TGI, both started with these adapters."""
    settings = {"engine": {"adapters": adapters, "adapter_folder": folder / "adapters"}}
    async with (
        FakeTGI(adapters=adapters) as engine,
        live_service(folder / "data", engine_url=engine.url, settings=settings) as service,
        service.client() as client,
    ):
        yield World(service, Api(client, "default", service.key), engine, folder)


def test_a_run_that_was_killed_before_it_said_anything_is_begun_again(tmp_path):
    plan = Plan(name="hallmark", dataset="tickets")
    (tmp_path / "run-0001").mkdir()
    run = begin(tmp_path, plan)
    assert run == begin(tmp_path, plan) == tmp_path / "run-0001"
    assert load(run).plan == plan


async def test_two_runs_do_not_work_on_one_folder(world):
    from app.retrain_files import alone

    with alone(world.folder / "runs" / "hallmark"):
        done = await world.retrain()
    assert done.exit_code == 1
    assert "Another run is at work" in told(done)


async def test_a_trainer_that_is_not_there_is_told(world):
    done = await world.retrain("--trainer", "/no/where/hallmark-train")
    assert done.exit_code == 1
    assert "Install `hallmark[train]`" in told(done)


@pytest.mark.parametrize("given", [("--margin", "120%"), ("--margin", "0"), ("--canary", "much")])
async def test_a_share_that_is_none_is_a_wrong_command(world, given):
    assert (await world.retrain(*given)).exit_code == 2


def test_what_training_writes_is_what_is_read():
    figure = Estimate(0.5, 0.4, 0.6, 10, 10.0)
    drop = Difference(0.01, -0.02, 0.04, 0.03, 10, 0.01, 0.1)
    arm = ArmResult(
        name="candidate", model="m", url="u", releases=("m@2",), figures={"score": figure}, slices={},
        failures={"timeout": 1}, seconds={"p50": 1.0}, tokens={}, cost=0.0, cost_unit="seconds",
    )  # fmt: skip
    evaluation = Evaluation(
        dataset="d 1", dataset_digest="0" * 64, split="heldout", task="classify", rows=10, sessions=10, concurrency=1,
        started_at=0, arms=(arm,), comparisons=(),
    )  # fmt: skip
    tested = compare.Tested(
        arm="candidate", outcome="too few rows", cost=0, saved=1, drop=drop, slices=(), rows_needed=7
    )
    advice = compare.Recommendation(
        reference="stable", margin=0.05, recommended="stable", reason="", cost_unit="seconds", tested=(tested,)
    )
    read = msgspec.json.decode(msgspec.json.encode(evaluation), type=EvaluationRead)
    assert (read.rows, read.arms[0].figures["score"].low, read.arms[0].releases) == (10, 0.4, ("m@2",))
    found = msgspec.json.decode(msgspec.json.encode(advice), type=RecommendationRead).tested[0]
    assert (found.outcome, found.drop.upper, found.rows_needed) == ("too few rows", 0.03, 7)
