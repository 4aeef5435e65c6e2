"""`hallmark releases publish` against a live service: a trained adapter on its way to a canary, and what stops it."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from tests.adapter_folder import write_adapter, write_dataset
from tests.fake_tgi import FakeTGI
from tests.service import Service, live_service, until


@dataclass
class World:
    """A service before an engine that takes adapters while it runs."""

    service: Service
    engine: FakeTGI
    adapters: Path


@pytest.fixture(scope="module")
async def world(tmp_path_factory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("publishing")
    given = {"engine": {"dialect": "embedded", "adapter_folder": folder / "adapters"}}
    async with (
        FakeTGI(lists_adapters=True) as engine,
        live_service(folder / "data", engine_url=engine.url, settings=given) as service,
    ):
        yield World(service, engine, folder / "adapters")


async def run(service: Service, *arguments: str | Path) -> Result:
    given = [*map(str, arguments), "--url", service.url, "--key", service.key]
    return await asyncio.to_thread(CliRunner(env={"COLUMNS": "200"}).invoke, app, given)


async def publish(service: Service, folder: Path, *arguments: str | Path) -> Result:
    return await run(service, "releases", "publish", folder, "--name", "hallmark", *arguments)


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


async def test_an_adapter_becomes_a_release_with_its_lineage_and_a_canary(world, tmp_path):
    dataset = write_dataset(tmp_path / "dataset", "one", "two")
    digest = write_adapter(tmp_path / "adapter", dataset)
    name = f"hallmark-{digest[:16]}"
    given = ("--dataset", tmp_path / "dataset", "--canary", "10%", "--guard", "failed=2%")
    done = await publish(world.service, tmp_path / "adapter", *given)
    assert done.exit_code == 0, done.output
    label = done.stdout.split()[0]
    assert f"canary {label} 0.1" in done.stdout
    assert name in world.engine.adapters
    assert {each.name for each in (world.adapters / name).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    async with world.service.client() as client:
        content = (await client.get(f"/v1/releases/{label}")).json()["content"]
        assert (content["adapter"], content["adapter_digest"]) == (name, digest)
        assert content["lineage"] == {"training_run": f"run-{digest[:8]}", "dataset_digest": dataset}
        rollout = (await client.get("/v1/rollouts/hallmark")).json()
        assert [guard["name"] for guard in rollout["plan"]["guards"]] == ["failed"]
        answer = await client.post(
            "/v1/chat/completions", json={"model": label, "messages": [{"role": "user", "content": "Hi?"}]}
        )
        assert world.engine.bodies[-1]["model"] == name
        traced = (await client.get(f"/v1/predictions/{answer.headers['x-prediction-id']}/lineage")).json()
    assert traced["verified"] is True, traced
    refused = await publish(world.service, tmp_path / "adapter", "--canary", "10%")
    assert refused.exit_code == 1
    assert "is being tried already" in said(refused)
    assert (await run(world.service, "rollouts", "rollback", "hallmark")).exit_code == 0
    again = await publish(world.service, tmp_path / "adapter")
    assert again.exit_code == 0, again.output
    assert again.stdout.split()[0] == label


async def test_a_folder_that_was_changed_after_training_is_refused(world, tmp_path):
    write_adapter(tmp_path / "adapter", write_dataset(tmp_path / "dataset", "three"), weights="three")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("other")
    done = await publish(world.service, tmp_path / "adapter", "--dataset", tmp_path / "dataset")
    assert done.exit_code == 1
    assert "were changed after training" in said(done)


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ({"base_model": "org/other"}, "was trained on 'org/other'"),
        ({"base_revision": "1" * 40}, "the engine serves"),
        ({"dataset_digest": None}, "names no `dataset_digest`"),
        ({"dataset_digest": "0" * 64}, "is not registered. Give the folder of its export"),
        ({"format": "other/1"}, "its format is 'other/1'"),
        ({"run": 3}, "Expected `str`"),
    ],
)
async def test_what_does_not_fit_is_refused_before_anything_is_changed(world, tmp_path, manifest, told):
    digest = write_adapter(tmp_path / "adapter", "0" * 64, weights=json.dumps(manifest), **manifest)
    done = await publish(world.service, tmp_path / "adapter")
    assert (done.exit_code, done.stdout) == (1, "")
    assert told in said(done)
    assert not (world.adapters / f"hallmark-{digest[:16]}").exists()


async def test_the_export_of_another_dataset_is_refused(world, tmp_path):
    write_dataset(tmp_path / "dataset", "five")
    write_adapter(tmp_path / "adapter", "1" * 64, weights="five")
    done = await publish(world.service, tmp_path / "adapter", "--dataset", tmp_path / "dataset")
    assert done.exit_code == 1
    assert f"the adapter was trained on {'1' * 64}" in said(done)


async def test_nothing_is_written_over(world, tmp_path):
    digest = write_adapter(tmp_path / "adapter", write_dataset(tmp_path / "dataset", "six"), weights="six")
    there = world.adapters / f"hallmark-{digest[:16]}"
    write_adapter(there, None, weights="something else")
    done = await publish(world.service, tmp_path / "adapter", "--dataset", tmp_path / "dataset")
    assert done.exit_code == 1
    assert "holds another adapter" in said(done)
    assert (there / "adapter_model.safetensors").read_text() == "something else"
    assert not list(world.adapters.glob(".*partial"))


async def test_a_folder_that_is_not_on_this_machine_is_told(world, tmp_path):
    write_adapter(tmp_path / "adapter", write_dataset(tmp_path / "dataset", "seven"), weights="seven")
    given = ("--dataset", tmp_path / "dataset", "--adapters", tmp_path / "no" / "where")
    done = await publish(world.service, tmp_path / "adapter", *given)
    assert done.exit_code == 1
    assert "mount it and name it with --adapters" in said(done)


async def test_what_an_engine_forgot_is_loaded_again_for_a_release_that_answers(world, tmp_path):
    digest = write_adapter(tmp_path / "adapter", write_dataset(tmp_path / "dataset", "eight"), weights="eight")
    done = await publish(world.service, tmp_path / "adapter", "--dataset", tmp_path / "dataset", "--canary", "0.1")
    assert done.exit_code == 0, done.output
    world.engine.adapters = ()

    async def loaded() -> bool:
        return f"hallmark-{digest[:16]}" in world.engine.adapters

    assert await until(loaded)
    assert (await run(world.service, "rollouts", "rollback", "hallmark")).exit_code == 0


async def test_a_key_without_the_scope_sees_no_engines(world):
    async with world.service.client(await world.service.new_key(scopes=("releases:read",))) as client:
        assert (await client.get("/v1/engines")).status_code == 403


async def test_an_engine_that_takes_adapters_at_its_start_only_gets_its_arguments(tmp_path):
    write_adapter(tmp_path / "adapter", write_dataset(tmp_path / "dataset", "one"))
    name = f"hallmark-{json.loads((tmp_path / 'adapter' / 'manifest.json').read_text())['adapter_digest'][:16]}"
    folders = {"adapter_folder": tmp_path / "adapters", "adapter_folder_on_engine": Path("/data/adapters")}
    given = (tmp_path / "adapter", "--dataset", tmp_path / "dataset", "--canary", "10%")
    async with FakeTGI(adapters=("tone",)) as engine:
        settings = {"engine": {"adapters": ("tone",), **folders}}
        async with live_service(tmp_path / "data", engine_url=engine.url, settings=settings) as service:
            waits = await publish(service, *given)
            assert waits.exit_code == 3
            assert f"LORA_ADAPTERS=tone=/data/adapters/tone,{name}=/data/adapters/{name}" in waits.stderr
            assert f'["tone","{name}"]' in waits.stderr
            assert (tmp_path / "adapters" / name).is_dir()
            async with service.client() as client:
                assert (await client.get("/v1/rollouts/hallmark")).json()["canary"] is None
        settings = {"engine": {"adapters": ("tone", name), **folders}}
        async with live_service(tmp_path / "data", engine_url=engine.url, settings=settings) as service:
            done = await publish(service, *given)
            assert done.exit_code == 0, done.output
            assert "canary hallmark@2 0.1" in done.stdout
