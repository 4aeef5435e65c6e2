"""A canary's plan and its trial over HTTP and by the command line."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.database import Database
from app.guards import Watcher
from app.predictions import History
from app.worker import now
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import CHAT, Service, live_service, until


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    def act(body):
        return Tokens("I'm sorry, but I can't.") if body.get("model") == "new" else Tokens("Hello", " world")

    settings = {"engine": {"adapters": ["new"]}}
    async with (
        FakeTGI(default=act, adapters=("new",)) as tgi,
        live_service(tmp_path / "data", engine_url=tgi.url, settings=settings) as service,
    ):
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.client() as client:
        made = await client.post("/v1/releases", json={"name": "hallmark", "adapter": "new"})
        assert made.json()["approved"], made.text
        yield client


async def run(service: Service, *arguments: str) -> Result:
    given = [*arguments, "--url", service.url, "--key", service.key]
    return await asyncio.to_thread(CliRunner().invoke, app, given)


async def canary(client: httpx.AsyncClient, **body) -> httpx.Response:
    return await client.post("/v1/rollouts/hallmark/canary", json={"release": "hallmark@2", "share": 0.5, **body})


async def test_a_canary_has_the_usual_plan_or_one_of_its_own_which_stays(client):
    usual = (await canary(client)).json()["plan"]
    assert [guard["name"] for guard in usual["guards"]] == ["failed", "refused", "unsupported", "slow"]
    assert (usual["rollback_error"], usual["min_observations"]) == (0.01, 30)
    assert all(guard["tolerance"] <= guard["margin"] for guard in usual["guards"])
    refused = await canary(client, plan={"guards": [{"name": "slow"}]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "plan")
    assert (await canary(client, share=0.7)).json()["plan"] == usual
    await client.post("/v1/rollouts/hallmark/rollback", json={})
    assert (await client.get("/v1/rollouts/hallmark")).json()["plan"] is None
    plan = {"guards": [{"name": "slow", "tolerance": 0.02}, {"name": "disliked"}], "slow_seconds": 2.5}
    own = (await canary(client, plan=plan)).json()["plan"]
    assert [(guard["name"], guard["tolerance"]) for guard in own["guards"]] == [("slow", 0.02), ("disliked", 0.02)]
    assert own["slow_seconds"] == 2.5
    assert (await client.get("/v1/rollouts/hallmark")).json()["plan"] == own


async def test_a_plan_that_makes_no_sense_is_refused_by_name_and_changes_nothing(client):
    before = (await client.get("/v1/rollouts/hallmark")).json()
    for plan in (
        {"guards": []},
        {"guards": [{"name": "kind"}]},
        {"guards": [{"name": "failed"}, {"name": "failed"}]},
        {"guards": [{"name": "failed", "tolerance": 0.5}]},
        {"guards": [{"name": "failed", "margin": 0.0}]},
        {"rollback_error": 0},
        {"min_observations": 0},
        {"slow_seconds": 0},
        {"luck": 1},
    ):
        refused = await canary(client, plan=plan)
        assert refused.status_code == 400, plan
        assert refused.json()["error"]["param"].startswith("plan")
        assert (await client.get("/v1/rollouts/hallmark")).json() == before


async def test_a_trial_is_shown_with_its_evidence_and_its_replay_says_the_same(service, client):
    missing = await client.get("/v1/rollouts/hallmark/trial")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "name")
    assert "hallmark worker" in missing.json()["error"]["message"]
    guarded = ("--guard", "refused=1%", "--guard", "slow", "--slow-seconds", "9")
    done = await run(service, "rollouts", "canary", "hallmark", "50%", "--release", "hallmark@2", *guarded)
    assert done.exit_code == 0, done.output

    async with Database.of_file(service.database) as database:
        watcher = Watcher(database, History(database), now)
        await watcher.step()
        for number in range(24):
            messages = [{"role": "user", "content": "Hello"}]
            body = {"model": "hallmark", "messages": messages, "retrieval": {"mode": "off"}}
            assert (await client.post(CHAT, json=body, headers={"x-conversation-id": f"c{number}"})).status_code == 200

        async def heard():
            await watcher.step()
            found = (await client.get("/v1/rollouts/hallmark/trial")).json()
            return found if found["observations"] == 24 else None

        trial = await until(heard)
    assert (trial["status"], trial["stable"], trial["canary"]) == ("running", "hallmark@1", "hallmark@2")
    refused, slow = trial["evidence"]
    assert (refused["guard"], refused["canary_bad"], refused["stable_bad"]) == ("refused", 1.0, 0.0)
    assert refused["canary_sessions"] + refused["stable_sessions"] == 24
    assert (refused["verdict"], refused["threshold"]) == ("waiting", 200)
    assert refused["e_value"] > 1 > slow["e_value"]
    page = (await client.get("/v1/rollouts/hallmark/trial/observations?limit=20")).json()
    rest = (await client.get(f"/v1/rollouts/hallmark/trial/observations?after={page['next']}")).json()
    assert [each["number"] for each in page["data"] + rest["data"]] == list(range(1, 25))
    assert rest["next"] is None
    assert page["data"][0].keys() == {"number", "kind", "arm", "badness", "at"}  # Not whose it was.

    shown = await run(service, "rollouts", "trial", "hallmark")
    assert "hallmark@2 beside hallmark@1: running, 24 observations" in shown.stdout
    for each in trial["evidence"]:  # Nothing is cut off in 80 columns.
        sessions = (
            f"{each['canary_sessions']} {each['canary_bad']:.1%} {each['stable_sessions']} {each['stable_bad']:.1%}"
        )
        figures = f"{each['guard']} {sessions} {each['e_value']:.4g} 200 waiting {each['safety_e_value']:.4g} "
        assert figures in " ".join(shown.stdout.split())
    replayed = await run(service, "rollouts", "replay", "hallmark")
    assert replayed.exit_code == 0, replayed.output
    assert replayed.stdout == "24 observations replayed: no decision\nthe same, to the last bit\n"


async def test_a_replay_notices_what_was_changed_since(service, client):
    assert (await canary(client)).status_code == 200
    async with Database.of_file(service.database) as database:
        watcher = Watcher(database, History(database), now)
        await watcher.step()
        body = {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}]}
        for number in range(8):
            await client.post(CHAT, json=body, headers={"x-conversation-id": f"c{number}"})

        async def heard():
            await watcher.step()
            return (await client.get("/v1/rollouts/hallmark/trial")).json()["observations"] == 8

        await until(heard)
        async with database.writing() as connection:
            await connection.exec_driver_sql(
                "UPDATE trial_observations SET badness = '{\"failed\":0.5}' WHERE number = 3"
            )
    replayed = await run(service, "rollouts", "replay", "hallmark")
    assert replayed.exit_code == 1
    assert "not the same as then" in replayed.stdout
