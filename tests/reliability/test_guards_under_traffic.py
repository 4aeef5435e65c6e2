"""A canary goes bad under traffic: a worker takes it back within five seconds, and stable users notice nothing."""

import asyncio
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from app.cli import app
from tests.fake_tgi import FakeTGI, Refuse, Tokens
from tests.postgres import Postgres
from tests.service import CHAT, until
from tests.service_process import ServiceProcess, service_process
from tests.worker_process import worker_process

REQUESTS_A_SECOND = 40
BACK_WITHIN_SECONDS = 5.0
DECLINE = "I'm sorry, but I can't help with that."


class Traffic:
    """Requests at a steady pace, each a conversation of its own: who answered, and how, when it was asked."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.answers: list[tuple[float, str, int]] = []

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        asking: list[asyncio.Task[None]] = []
        pacing = asyncio.create_task(self._pace(asking))
        try:
            yield
        finally:
            pacing.cancel()
            await asyncio.gather(pacing, return_exceptions=True)
            await asyncio.gather(*asking)

    async def _pace(self, asking: list[asyncio.Task[None]]) -> None:
        for number in itertools.count():
            asking.append(asyncio.create_task(self._ask(number)))
            await asyncio.sleep(1 / REQUESTS_A_SECOND)

    async def _ask(self, number: int) -> None:
        body = {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}]}
        asked_at = time.time()
        response = await self._client.post(CHAT, json=body, headers={"x-conversation-id": f"c{number}"})
        release = response.headers.get("x-release", "")
        self.answers.append((asked_at, release, response.status_code))


def engine(how: str) -> FakeTGI:
    """Answers for the base model, and for the adapter `new` as its release is to behave."""

    def act(body: dict[str, Any]) -> Any:
        if body.get("model") != "new" or how == "equal":
            return Tokens("Hello", " world")
        return Tokens(DECLINE) if how == "refuses" else Refuse.overloaded()

    return FakeTGI(default=act, adapters=("new",))


@asynccontextmanager
async def on_trial(tmp_path, tgi: FakeTGI, settings: dict[str, Any]) -> AsyncIterator[tuple[ServiceProcess, Any]]:
    settings = {**settings, "engine": {"adapters": ["new"]}}
    async with service_process(tmp_path, tgi.url, settings) as process, process.client() as client:
        given = {"name": "hallmark", "adapter": "new", "retrieval": {"mode": "off"}}
        made = await client.post("/v1/releases", json=given)
        assert made.json()["approved"], made.text
        step = await client.post("/v1/rollouts/hallmark/canary", json={"release": "hallmark@2", "share": 0.4})
        assert step.status_code == 200, step.text
        yield process, client


async def trial_of(client: httpx.AsyncClient) -> dict[str, Any] | None:
    response = await client.get("/v1/rollouts/hallmark/trial")
    return dict(response.json()) if response.status_code == 200 else None


async def rolled_back(client: httpx.AsyncClient) -> dict[str, Any] | None:
    trial = await trial_of(client)
    return trial if trial and trial["status"] == "rolled_back" else None


async def replay(process: ServiceProcess) -> str:
    arguments = ["rollouts", "replay", "hallmark", "--url", process.url, "--key", process.key]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "sqlite":
        return {}
    server: Postgres = request.getfixturevalue("postgres")
    return {"database_url": server.create_database()}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("how", "guards"), [("refuses", {"refused"}), ("fails", {"error_burst", "failed"})])
async def test_a_bad_canary_is_at_nothing_within_five_seconds_and_the_others_notice_nothing(
    tmp_path, settings, how, guards, capsys
):
    async with (
        engine(how) as tgi,
        on_trial(tmp_path, tgi, settings) as (process, client),
        worker_process(tmp_path, settings.get("database_url")),
    ):
        await until(lambda: trial_of(client), seconds=30)
        traffic = Traffic(client)
        async with traffic.flowing():
            trial = await until(lambda: rolled_back(client), seconds=90)
            await asyncio.sleep(2.0)
        change = (await client.get("/v1/rollouts/hallmark/changes")).json()["data"][0]
        assert trial["decision"]["guard"] in guards
        assert (change["who"], change["action"]) == (f"guard:{trial['decision']['guard']}", "rollback")
        assert change["after"]["canary"] is None
        assert "the same, to the last bit" in await replay(process)
        # The observation that decided is one of those that the canary gave last.
        heard = (await client.get("/v1/rollouts/hallmark/trial/observations")).json()["data"]
        nth = sum(each["arm"] == "canary" for each in heard)
        bad = sorted(at for at, release, status in traffic.answers if release == "hallmark@2" or status != 200)
        decided_at = bad[min(nth, len(bad)) - 1]
        seconds = max(at for at in bad) - decided_at
        with capsys.disabled():
            print(f"\n{how}: {nth} canary sessions, {change['who']}; the last canary answer {seconds:.2f} s after it")
        assert seconds < BACK_WITHIN_SECONDS
        found = (await client.get("/v1/predictions", params={"outcome": "failed", "limit": 200})).json()["data"]
        assert {each["release_name"] for each in found} <= {"hallmark@2"}
        assert len(found) == sum(status != 200 for *_, status in traffic.answers)
        assert bool(found) == (how == "fails")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(180)
async def test_an_equal_canary_stays_and_a_killed_worker_is_taken_over(tmp_path, settings):
    url = settings.get("database_url")
    async with (
        engine("equal") as tgi,
        on_trial(tmp_path, tgi, settings) as (_, client),
        worker_process(tmp_path, url) as one,
        worker_process(tmp_path, url) as other,
    ):
        await until(lambda: trial_of(client), seconds=30)

        async def heard(more_than: int) -> int:
            trial = await trial_of(client)
            return trial["observations"] if trial and trial["observations"] > more_than else 0

        traffic = Traffic(client)
        async with traffic.flowing():
            seen = await until(lambda: heard(40), seconds=60)
            os.kill(one.pid, signal.SIGKILL)
            seen = await until(lambda: heard(seen + 40), seconds=60)
            # Whichever of them had the lease: one is gone, and the trial goes on.
            async with worker_process(tmp_path, url):
                os.kill(other.pid, signal.SIGKILL)
                seen = await until(lambda: heard(seen + 120), seconds=60)
        assert {status for _, _, status in traffic.answers} == {200}
        assert (await client.get("/v1/rollouts/hallmark")).json()["canary"] == "hallmark@2"
        trial = await trial_of(client)
        assert trial is not None
        assert {each["verdict"] for each in trial["evidence"]} == {"no_harm_found"}
        sessions = Counter(release for _, release, _ in traffic.answers)
        (failed, *_) = trial["evidence"]
        assert failed["canary_sessions"] <= sessions["hallmark@2"]
        assert failed["stable_sessions"] <= sessions["hallmark@1"]
