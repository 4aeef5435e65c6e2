"""Releases change hands under traffic: two processes that share one PostgreSQL, at 200 requests a second."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest

from tests.fake_tgi import FakeTGI, Tokens
from tests.postgres import Postgres
from tests.service import CHAT
from tests.service_process import service_process

REQUESTS_A_SECOND = 200
CONVERSATIONS = 40
FOLLOWED_WITHIN_SECONDS = 1.0
HOLD_SECONDS = 2.0
"""How long each state is held: twice as long as every process may take to follow."""


@dataclass(frozen=True)
class Answer:
    """Who answered which conversation, when it was asked."""

    asked_at: float
    process: int
    conversation: int
    prediction_id: str
    release: str


class Traffic:
    """Requests at a steady pace to each process in turn: every other pair streams, each is in some conversation."""

    def __init__(self, clients: list[httpx.AsyncClient]) -> None:
        self._clients = clients
        self.answers: list[Answer] = []

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        pacing = asyncio.create_task(self._pace())
        try:
            yield
        finally:
            pacing.cancel()
            await asyncio.gather(pacing, return_exceptions=True)
            await asyncio.gather(*self._asking)  # An answer that was no answer is raised here.

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._asking: list[asyncio.Task[None]] = []
        for number in itertools.count():
            self._asking.append(asyncio.create_task(self._ask(number)))
            await asyncio.sleep(max(0.0, started + (number + 1) / REQUESTS_A_SECOND - loop.time()))

    async def _ask(self, number: int) -> None:
        process, conversation = number % 2, number // 4 % CONVERSATIONS
        stream = number // 2 % 2 == 0
        body = {"model": "hallmark", "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
        headers = {"x-conversation-id": f"conversation {conversation}"}
        asked_at = time.perf_counter()
        response = await self._clients[process].post(CHAT, json=body, headers=headers)
        assert response.status_code == 200, response.text
        release = response.headers["x-release"]
        if stream:
            events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
            assert events.pop() == "[DONE]"
            marks = {json.loads(event)["system_fingerprint"] for event in events}
            assert len(marks) == 1, "an answer changed its release midway"
        self.answers.append(Answer(asked_at, process, conversation, response.headers["x-prediction-id"], release))

    def settled(self, change: "Change", following: "Change") -> list[Answer]:
        """What was asked when a change had to be known, and before the next was asked for."""
        since = change.made_at + FOLLOWED_WITHIN_SECONDS
        return [each for each in self.answers if since <= each.asked_at < following.wanted_at]

    def seconds_of(self, release: str, change: "Change", following: "Change") -> float:
        """How long after a change a release still answered."""
        span = (each for each in self.answers if change.made_at <= each.asked_at < following.wanted_at)
        return max((each.asked_at - change.made_at for each in span if each.release == release), default=0.0)


@dataclass(frozen=True)
class Change:
    """When a change was asked for, and when its maker was told that it is made."""

    wanted_at: float
    made_at: float


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(120)
async def test_canary_promote_and_rollback_fail_no_request_and_are_followed_within_a_second(
    tmp_path, postgres: Postgres, capsys
):
    settings = {"database_url": postgres.create_database()}
    async with (
        FakeTGI(default=Tokens(*(f" word{i}" for i in range(12)))) as tgi,
        service_process(tmp_path / "a", tgi.url, settings) as one,
        service_process(tmp_path / "b", tgi.url, settings) as two,
        one.client() as first,
        two.client() as second,
    ):
        made = await first.post("/v1/releases", json={"name": "hallmark", "notes": "the next one"})
        assert made.json()["approved"], made.text

        async def step(client: httpx.AsyncClient, action: str, **body: object) -> Change:
            wanted_at = time.perf_counter()
            response = await client.post(f"/v1/rollouts/hallmark/{action}", json={"why": "test", **body})
            assert response.status_code == 200, response.text
            return Change(wanted_at, time.perf_counter())

        traffic = Traffic([first, second])
        changes = []
        async with traffic.flowing():
            await asyncio.sleep(0.5)
            changes.append(await step(first, "canary", release="hallmark@2", share=0.25))
            await asyncio.sleep(HOLD_SECONDS)
            changes.append(await step(second, "canary", share=0.75))
            await asyncio.sleep(HOLD_SECONDS)
            changes.append(await step(first, "promote"))
            await asyncio.sleep(HOLD_SECONDS)
            changes.append(await step(second, "rollback"))
            await asyncio.sleep(HOLD_SECONDS)
        over = Change(time.perf_counter(), time.perf_counter())
        quarter, most, promoted, back = (traffic.settled(*span) for span in itertools.pairwise([*changes, over]))

        # Every process answers a conversation with the same release, and a larger share only adds conversations.
        canaries = [{each.conversation for each in phase if each.release == "hallmark@2"} for phase in (quarter, most)]
        others = [{each.conversation for each in phase if each.release == "hallmark@1"} for phase in (quarter, most)]
        assert canaries[0]
        assert canaries[1] - canaries[0]
        assert not canaries[0] & others[1]
        assert not canaries[0] & others[0]
        assert not canaries[1] & others[1]
        assert {each.process for each in quarter} == {0, 1}
        assert {each.release for each in promoted} == {"hallmark@2"}
        assert {each.release for each in back} == {"hallmark@1"}

        # What is on record is what was said.
        for each in traffic.answers[:: len(traffic.answers) // 20]:
            shown = (await (first, second)[each.process].get(f"/v1/predictions/{each.prediction_id}")).json()
            assert shown["release_name"] == each.release
        with capsys.disabled():
            seconds = (
                traffic.seconds_of("hallmark@1", *changes[2:4]),
                traffic.seconds_of("hallmark@2", changes[3], over),
            )
            print(
                f"\n{len(traffic.answers)} answers; the release before still answered {seconds[0]:.2f} s after a "
                f"promotion and {seconds[1]:.2f} s after a rollback"
            )
