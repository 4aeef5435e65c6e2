"""A shadow's answer is on record and nowhere else, and whatever becomes of it the one that is shown does not notice."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_tgi import Act, FakeTGI, Hang, Refuse, Tokens
from tests.service import Api, live_service, until

SHADOW = "tone"
"""The adapter by which the engine tells the shadow from the rest."""


@contextlib.asynccontextmanager
async def shadowed(
    directory: Path, shadow: Act | Callable[[], Act], *, shown: Act | None = None, **limits: Any
) -> AsyncIterator[tuple[FakeTGI, Api]]:
    """A service whose every answer has a shadow."""

    def act(body: dict[str, Any]) -> Act:
        if body["model"] != SHADOW:
            return shown or Tokens("Shown.")
        return shadow() if callable(shadow) else shadow

    settings = {"engine": {"adapters": [SHADOW]}, "limits": limits}
    async with (
        FakeTGI(adapters=(SHADOW,), default=act) as tgi,
        live_service(directory, engine_url=tgi.url, settings=settings) as service,
        service.client() as client,
    ):
        made = await client.post("/v1/releases", json={"name": "hallmark", "adapter": SHADOW})
        assert made.json()["approved"], made.text
        begun = await client.post("/v1/rollouts/hallmark/shadow", json={"release": "hallmark@2", "rate": 1.0})
        assert begun.status_code == 200, begun.text
        tgi.requests.clear()
        yield tgi, Api(client, "default", service.key)


async def dropped(api: Api) -> float:
    lines = (await api.client.get("/metrics")).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("hallmark_shadows_dropped_total ")))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_shadow_is_recorded_beside_the_answer_that_was_shown(tmp_path, stream):
    async with shadowed(tmp_path, Tokens("Un", "seen.")) as (tgi, api):
        asked = await api.client.post(
            "/v1/chat/completions",
            json=api.body("Hello", stream=stream, user="ann"),
            headers={"x-conversation-id": "c"},
        )
        assert "Shown." in asked.text
        assert "seen" not in asked.text
        assert asked.headers["x-release"] == "hallmark@1"
        shadow, shown = await api.records(2)
        assert (shadow["answer"], shown["answer"]) == ("Unseen.", "Shown.")
        assert (shadow["assignment"], shown["assignment"]) == ("shadow", "stable")
        assert (shadow["shadow_of"], shown["shadow_of"]) == (shown["id"], None)
        assert shown["id"] == asked.headers["x-prediction-id"]
        assert (shadow["release_name"], shadow["adapter"]) == ("hallmark@2", SHADOW)
        for name in ("tenant", "key_id", "user", "conversation", "model", "request", "stream", "trace_id"):
            assert shadow[name] == shown[name], name
        messages = [body["messages"] for body in tgi.bodies]
        assert messages[0] == messages[1]
        assert sum((await api.counts()).values()) == 1  # Nobody asked for the second.


async def test_a_shadow_retrieves_and_checks_as_its_release_says(tmp_path):
    answer = Tokens("A hallmark is a stamp on gold.")
    async with shadowed(tmp_path, answer, shown=answer) as (_, api):
        await api.add("gold.txt", "A hallmark is a stamp on gold.")
        await api.answer("What is a hallmark?")
        shadow, shown = await api.records(2)
        assert shadow["answer"] == shown["answer"] == "A hallmark is a stamp on gold [1]."
        assert shadow["citations"] == shown["citations"]


async def test_what_is_not_to_be_stored_of_the_answer_is_not_stored_of_its_shadow(tmp_path):
    async with shadowed(tmp_path, Tokens("Unseen.")) as (_, api):
        await api.answer("Hello", store=False)
        for row in await api.records(2):
            assert (row["store"], row["answer"], row["request"]) == (False, None, None)


async def test_a_shadow_that_fails_is_a_record_and_no_more(tmp_path):
    async with shadowed(tmp_path, Refuse.failed) as (_, api):
        answers = [await api.answer("Hello") for _ in range(3)]
        assert {answer["choices"][0]["message"]["content"] for answer in answers} == {"Shown."}
        rows = await api.records(6)
        assert [row["outcome"] for row in rows if row["assignment"] == "shadow"] == ["failed"] * 3
        assert [row["outcome"] for row in rows if row["assignment"] == "stable"] == ["finished"] * 3


async def test_shadows_that_hang_are_few_and_slow_nobody(tmp_path):
    async with shadowed(tmp_path, Hang()) as (tgi, api):
        for _ in range(20):
            async with asyncio.timeout(20):
                await api.answer("Hello")
        assert sum(body["model"] == SHADOW for body in tgi.bodies) == 4
        assert await dropped(api) == 16
        metrics = (await api.client.get("/metrics")).text
        assert "hallmark_requests_in_flight 0.0" in metrics  # They take nobody's place.


async def test_a_shadow_that_takes_too_long_is_cut(tmp_path):
    async with shadowed(tmp_path, Hang(), request_timeout_seconds=0.5) as (_, api):
        await api.answer("Hello")
        shadow, _ = await api.records(2)
        assert (shadow["outcome"], shadow["error_code"]) == ("failed", "engine_timeout")
        assert await dropped(api) == 0


async def test_shadows_are_dropped_first_when_the_service_is_busy(tmp_path):
    hold = asyncio.Event()
    async with shadowed(tmp_path, Hang(), max_concurrent_answers=4) as (tgi, api):
        await api.answer("Hello")

        async def running() -> bool:
            return sum(body["model"] == SHADOW for body in tgi.bodies) == 1

        await until(running)
        tgi.script(*(Tokens("Slow.", gates={0: hold}) for _ in range(3)))
        slow = [asyncio.create_task(api.stream("Hello")) for _ in range(3)]

        async def gone() -> bool:
            return await dropped(api) == 1

        await until(gone)
        hold.set()
        assert all(answer.done for answer in await asyncio.gather(*slow))

        async def cut() -> list[dict[str, Any]]:
            found = (await api.client.get("/v1/predictions")).json()["data"]
            return [row for row in found if row["error_code"] == "dropped"]

        (row,) = await until(cut)
        assert (row["outcome"], row["assignment"]) == ("cancelled", "shadow")


async def test_an_answer_that_failed_has_no_shadow(tmp_path):
    async with shadowed(tmp_path, Tokens("Unseen."), shown=Refuse.failed()) as (_, api):
        assert (await api.ask("Hello")).status_code >= 500
        assert (await api.record())["outcome"] == "failed"


async def test_a_pinned_answer_has_no_shadow(tmp_path):
    async with shadowed(tmp_path, Tokens("Unseen.")) as (_, api):
        await api.answer("Hello", model="hallmark@1")
        assert (await api.record())["assignment"] == "pinned"


async def test_a_service_that_stops_does_not_wait_for_shadows(tmp_path):
    async with asyncio.timeout(30):
        async with shadowed(tmp_path, Hang()) as (tgi, api):
            await api.answer("Hello")

            async def running() -> bool:
                return sum(body["model"] == SHADOW for body in tgi.bodies) == 1

            await until(running)
    async with FakeTGI() as tgi, live_service(tmp_path, engine_url=tgi.url) as service, service.client() as client:
        found = (await client.get("/v1/predictions")).json()["data"]
        assert {(row["assignment"], row["outcome"]) for row in found} == {
            ("shadow", "interrupted"),
            ("stable", "finished"),
        }
