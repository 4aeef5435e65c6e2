"""Two engines as processes, one killed and one hung in turn under load: before a first token no client learns of it."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service import Api, live_service

CALLERS = 24
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(120)]


class Engine:
    """A stand-in engine in a process of its own, always on the same port."""

    def __init__(self, port: int = 0) -> None:
        # Each answer takes a while to begin, so that many have not when a fault comes.
        answers = ["--tokens", "4", "--delay-ms", "10", "--prefill-ms", "200"]
        command = [sys.executable, "-m", "tests.fake_tgi", "--port", str(port), *answers]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)

    async def url(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def send(self, what: signal.Signals) -> None:
        os.kill(self.process.pid, what)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@asynccontextmanager
async def load(api: Api, callers: int) -> AsyncIterator[Counter[str]]:
    """Ask without a pause, half of it streamed; gives what became of the requests, counted as they end."""
    seen: Counter[str] = Counter()
    is_over = False
    lots = random.Random(7)

    async def ask() -> None:
        while not is_over:
            # By lot: callers in step would send one engine all streams and the other all whole answers.
            if lots.random() < 0.5:
                response = await api.ask("Hello", retrieval={"mode": "off"})
                seen["answered" if response.status_code == 200 else f"refused {response.text}"] += 1
            else:
                stream = await api.stream("Hello", retrieval={"mode": "off"})
                if stream.done:
                    seen["answered"] += 1
                else:
                    seen["cut" if stream.text else f"refused {stream.error}"] += 1

    tasks = [asyncio.create_task(ask()) for _ in range(callers)]
    try:
        yield seen
    finally:
        is_over = True
        await asyncio.gather(*tasks)


async def samples(api: Api, name: str) -> list[tuple[dict[str, str], float]]:
    """The values of a metric, by their labels."""
    families = text_string_to_metric_families((await api.client.get("/metrics")).text)
    return [(each.labels, each.value) for family in families for each in family.samples if each.name == name]


async def state_of(api: Api, url: str) -> str:
    found = await samples(api, "hallmark_engine_state")
    return next((labels["state"] for labels, _ in found if labels["member"] == url.removeprefix("http://")), "")


async def failovers(api: Api) -> float:
    ((_, count),) = await samples(api, "hallmark_engine_failovers_total")
    return count


async def seconds_until(api: Api, url: str, state: str) -> float:
    began = time.monotonic()
    async with asyncio.timeout(20):
        while await state_of(api, url) != state:
            await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_one_killed_and_one_hung_in_turn_cost_no_client_its_answer(tmp_path, capsys):
    a, b = Engine(), Engine()
    engines = [a, b]
    try:
        first, second = await a.url(), await b.url()
        settings = {"engine": {"urls": [second]}}
        async with (
            live_service(tmp_path, engine_url=first, settings=settings) as service,
            service.client() as client,
        ):
            api = Api(client, "default", service.key)
            began = time.monotonic()
            async with load(api, callers=CALLERS) as seen:
                await asyncio.sleep(1.0)

                a.send(signal.SIGSTOP)
                hung = await seconds_until(api, first, "open")
                answered = seen["answered"]
                await asyncio.sleep(4.0)  # Those that wait for it are answered elsewhere by now.
                assert seen["answered"] > answered
                moved = [await failovers(api)]
                a.send(signal.SIGCONT)
                back_from_hang = await seconds_until(api, first, "closed")
                await asyncio.sleep(1.0)  # So that both are at work again.

                b.send(signal.SIGKILL)
                killed = await seconds_until(api, second, "open")
                moved.append(await failovers(api) - moved[0])
                await asyncio.sleep(0.5)
                b.close()
                engines.append(again := Engine(int(second.rpartition(":")[2])))
                assert await again.url() == second
                back_from_death = await seconds_until(api, second, "closed")
                await asyncio.sleep(0.5)
                rate = seen["answered"] / (time.monotonic() - began)
        with capsys.disabled():
            print(
                f"\nhung: out after {hung:.1f} s, in again {back_from_hang:.1f} s after it went on; killed: out after "
                f"{killed:.1f} s, in again {back_from_death:.1f} s after its port opened; {rate:.0f} answers a second "
                f"of {CALLERS} callers, {moved} sent to the other engine; {dict(seen)}"
            )
        assert [what for what in seen if what.startswith("refused")] == []
        assert hung <= 5.0
        assert killed <= 5.0
        assert max(back_from_hang, back_from_death) <= 5.0
        assert seen["cut"] <= CALLERS  # A stream of which the client has seen a part ends in an error event.
        assert min(moved) >= 3, "a fault met hardly any request"
        assert rate > 20, "there was no load"
    finally:
        for engine in engines:
            engine.close()
