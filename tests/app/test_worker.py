"""The worker shares its work with others, goes on whatever fails, and is a small process of its own."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.alerts import Webhook
from app.alerts.addresses import Policy
from app.database import Database
from app.erasure import Erasures
from app.errors import Unavailable
from app.leases import Leases
from app.predictions import Keeper
from app.privacy.rings import FileRing
from app.privacy.sealing import MasterKeys, new_key
from app.privacy_wiring import Privacy
from app.worker import Step, Worker, kinds_of_work, now
from tests.review_world import Clock

ROOT = Path(__file__).parents[2]


class Seconds:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Job:
    """A kind of work that counts its steps and fails when told."""

    def __init__(self) -> None:
        self.steps = 0
        self.error: Exception | None = None

    async def __call__(self) -> bool:
        if self.error is not None:
            raise self.error
        self.steps += 1
        return True


@pytest.fixture
async def database(database_url):
    async with Database(database_url, timeout_seconds=20.0) as database:
        yield database


async def test_one_process_holds_a_lease_until_it_expires_or_is_given_back(database):
    clock = Clock()
    one, other = Leases(database, "one", clock), Leases(database, "other", clock)
    assert await one.take("a", seconds=3)
    assert await one.take("a", seconds=3)
    assert not await other.take("a", seconds=3)
    assert await other.take("b", seconds=3)
    clock.pass_seconds(2.9)
    assert not await other.take("a", seconds=3)
    clock.pass_seconds(0.1)
    assert await other.take("a", seconds=3)
    assert not await one.take("a", seconds=3)
    await one.give_back("a")  # What is not held cannot be given back.
    assert not await one.take("a", seconds=3)
    await other.give_back("a")
    assert await one.take("a", seconds=3)


async def test_of_those_who_ask_at_once_one_gets_the_lease(database):
    clock = Clock()
    holders = [Leases(database, str(number), clock) for number in range(4)]
    for _ in range(3):
        assert sum(await asyncio.gather(*(each.take("a", seconds=3) for each in holders))) == 1
        clock.pass_seconds(3)


async def test_a_killed_workers_work_is_taken_over(database):
    clock, seconds, job, others = Clock(), Seconds(), Job(), Job()
    worker = Worker(Leases(database, "killed", clock), {"a": job}, clock=seconds)
    other = Worker(Leases(database, "other", clock), {"a": others}, clock=seconds)
    assert await worker.turn("a")
    assert not await other.turn("a")
    for _ in range(4):  # While it lives it renews what it holds.
        clock.pass_seconds(1)
        seconds.now += 1
        assert await worker.turn("a")
        assert not await other.turn("a")
    clock.pass_seconds(3)
    assert await other.turn("a")
    seconds.now += 3
    assert not await worker.turn("a")
    assert (job.steps, others.steps) == (5, 1)


@pytest.mark.parametrize("error", [Unavailable("away"), ValueError("what a user said")])
async def test_work_that_fails_is_told_once_without_content_and_tried_again(database, caplog, error):
    job = Job()
    worker = Worker(Leases(database, "one", Clock()), {"a": job})
    job.error = error
    assert not await worker.turn("a")
    assert not await worker.turn("a")
    job.error = None
    assert await worker.turn("a")
    assert len(caplog.messages) == 1
    assert "what a user said" not in caplog.text


class Counted(Leases):
    """Leases that are lost after so many times."""

    def __init__(self, *given, lasts: int) -> None:
        super().__init__(*given)
        self.lasts = lasts
        self.taken = 0

    async def take(self, work, *, seconds):
        self.taken += 1
        return self.taken <= self.lasts and await super().take(work, seconds=seconds)


@pytest.mark.parametrize("lasts", [4, 2])
async def test_a_long_step_keeps_its_lease_and_is_given_up_when_that_is_lost(database, lasts):
    leases = Counted(database, "one", Clock(), lasts=lasts)
    ended = []

    async def step() -> bool:
        try:
            async with asyncio.timeout(20):
                while leases.taken < 4:
                    await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            ended.append("given up")
            raise
        ended.append("done")
        return True

    # Renewed every few milliseconds.
    worker = Worker(leases, {"a": step}, lease_seconds=0.015)
    assert await worker.turn("a") is (lasts == 4)
    assert ended == ["done" if lasts == 4 else "given up"]


def work_of(database: Database, **options: Any) -> dict[str, Step]:
    usual: dict[str, Any] = {"adapter_folders": {}, "drift": None, "embedder": None, "webhook": None, "is_local": True}
    usual |= {"alerts_every_seconds": 60, "privacy": Privacy(Keeper()), "longest_wait_seconds": 10}
    return kinds_of_work(database, **usual | options)


async def test_a_worker_does_every_kind_of_work_that_the_settings_ask_for(database, tmp_path):
    async def kinds(webhook: Webhook | None, privacy: Privacy | None = None) -> set[str]:
        return set(work_of(database, webhook=webhook, privacy=privacy or Privacy(Keeper())))

    usual = {"guards", "drift", "quality", "alerts", "erasure", "retention"}
    assert await kinds(None) == usual
    assert await kinds(Webhook("https://hooks.example/x", b"k" * 32, Policy(()))) == usual | {"notifications"}
    masters = MasterKeys.parse(new_key())
    ring = FileRing(tmp_path / "keys.db", masters)
    assert await kinds(None, Privacy(Keeper(), ring=ring, masters=masters)) == usual | {"subject keys"}


@pytest.mark.parametrize(("longest_wait_seconds", "state"), [(10, "done"), (3600, "running")])
async def test_a_worker_ends_an_erasure_when_nobody_waits_for_a_place_since_before(
    database, longest_wait_seconds, state
):
    asked = Erasures(database, lambda: now() - 60_000)
    erasure = await asked.request("acme", "user", "anna", who="k1")
    work = work_of(database, longest_wait_seconds=longest_wait_seconds)
    for _ in range(4):
        await work["erasure"]()
    assert (await asked.get("acme", erasure.id)).state == state


async def test_a_worker_that_is_stopped_gives_back_what_it_held(database):
    clock, job = Clock(), Job()
    working = asyncio.create_task(Worker(Leases(database, "one", clock), {"a": job}).run())
    async with asyncio.timeout(20):
        while not job.steps:
            await asyncio.sleep(0.005)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert await Leases(database, "other", clock).take("a", seconds=3)


def test_the_worker_loads_neither_torch_nor_the_web_server():
    code = (
        "import sys, app.worker; heavy = ('torch', 'transformers', 'fastapi', 'scipy', 'sklearn'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert done.stdout.strip() == "[]", done.stderr
