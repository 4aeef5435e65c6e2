"""Priorities and rate limits as a caller meets them: who waits, who is refused, and what the headers say."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.access import revoke_key, update_key
from tests.fake_tgi import FakeTGI, Hang, Refuse, Tokens
from tests.postgres import Postgres
from tests.service import CHAT, Api, Service, live_service, until
from tests.stopwatch import Stopwatch

PLAIN = {"mode": "off"}
LIMITS = [f"x-ratelimit-{name}-{kind}" for name in ("limit", "remaining", "reset") for kind in ("requests", "tokens")]


@contextlib.asynccontextmanager
async def serve(tmp_path: Any, tgi: FakeTGI, **limits: Any) -> AsyncIterator[Service]:
    async with live_service(tmp_path, engine_url=tgi.url, settings={"limits": limits}) as service:
        yield service


@contextlib.asynccontextmanager
async def caller(service: Service, **facts: Any) -> AsyncIterator[Api]:
    """A client with a key of its own."""
    key = await service.new_key(**facts)
    async with service.client(key) as client:
        yield Api(client, facts.get("tenant", "default"), key)


async def sample(api: Api, line: str) -> float:
    """One value of `/metrics`."""
    lines = (await api.client.get("/metrics")).text.splitlines()
    return next((float(each.rsplit(" ", 1)[1]) for each in lines if each.startswith(f"{line} ")), 0.0)


@pytest.fixture(scope="module")
async def tgi() -> AsyncIterator[FakeTGI]:
    async with FakeTGI() as tgi:
        yield tgi


@pytest.fixture(scope="module")
async def narrow(tgi, tmp_path_factory) -> AsyncIterator[Service]:
    """A service with one place."""
    async with serve(tmp_path_factory.mktemp("narrow"), tgi, max_concurrent_answers=1) as service:
        yield service


@pytest.fixture(scope="module")
async def wide(tgi, tmp_path_factory) -> AsyncIterator[Service]:
    """A service with as many places as by default."""
    async with serve(tmp_path_factory.mktemp("wide"), tgi) as service:
        yield service


@pytest.fixture(autouse=True)
def _begin(tgi) -> None:
    tgi.requests.clear()


@contextlib.asynccontextmanager
async def occupied(api: Api, tgi: FakeTGI) -> AsyncIterator[asyncio.Task[Any]]:
    """Take the only place until the end of the block."""
    gate = asyncio.Event()
    tgi.script(Tokens("Hello", gate=gate))
    first = asyncio.create_task(api.ask("first", retrieval=PLAIN))
    await tgi.until(lambda: len(tgi.bodies) == 1)
    try:
        yield first
    finally:
        gate.set()
        assert (await first).status_code == 200


async def until_it_is(api: Api, line: str, value: float) -> None:
    async def look() -> bool:
        return await sample(api, line) == value

    await until(look)


# --- places ---


async def test_a_request_waits_for_a_place_and_the_wait_is_told(tgi, narrow):
    async with caller(narrow, tenant="waits", priority="high") as api:
        seen = await sample(api, 'hallmark_queue_seconds_sum{priority="high"}')
        async with occupied(api, tgi):
            second = asyncio.create_task(api.ask("Hi", retrieval=PLAIN))
            await until_it_is(api, 'hallmark_queue_depth{priority="high"}', 1)
            assert await sample(api, "hallmark_requests_in_flight") == 1
            assert len(tgi.bodies) == 1
        assert (await second).status_code == 200
        later, _ = await api.records(2)
        assert later["queue_seconds"] > later["engine_seconds"]  # The wait for a place is in it.
        assert await sample(api, 'hallmark_queue_seconds_sum{priority="high"}') - seen > 0.5 * later["queue_seconds"]
        assert await sample(api, "hallmark_requests_in_flight") == 0


async def test_a_high_priority_goes_before_those_that_came_earlier(tgi, narrow):
    async with (
        caller(narrow) as normal,
        caller(narrow, priority="low") as low,
        caller(narrow, priority="high") as high,
    ):
        async with occupied(normal, tgi):
            asked = []
            for api, name in ((low, "low"), (normal, "normal"), (high, "high")):
                asked.append(asyncio.create_task(api.ask(name, retrieval=PLAIN)))
                await until_it_is(normal, f'hallmark_queue_depth{{priority="{name}"}}', 1)
        assert {(await task).status_code for task in asked} == {200}
        assert [body["messages"][0]["content"] for body in tgi.bodies] == ["first", "high", "normal", "low"]


async def test_whoever_hangs_up_while_waiting_leaves_the_queue_and_no_record(tgi, narrow):
    async with caller(narrow, tenant="hangs up", priority="low") as api:
        left = (await api.counts())["499", "cancelled"]
        async with occupied(api, tgi):
            second = asyncio.create_task(api.ask("Hi", retrieval=PLAIN))
            await until_it_is(api, 'hallmark_queue_depth{priority="low"}', 1)
            second.cancel()
            await until_it_is(api, 'hallmark_queue_depth{priority="low"}', 0)

        async def counted() -> bool:
            return (await api.counts())["499", "cancelled"] == left + 1

        await until(counted)
        assert len(await api.records(1)) == 1
        assert len(tgi.bodies) == 1


async def test_whoever_waited_in_vain_is_told_so_and_leaves_no_record(tmp_path, tgi):
    async with (
        serve(tmp_path, tgi, max_concurrent_answers=1, max_wait_seconds=0.3) as service,
        caller(service) as api,
    ):
        for _ in range(3):  # So that answers are known to be short, and a request may hope.
            assert (await api.ask("Hi", retrieval=PLAIN)).status_code == 200
        tgi.requests.clear()
        async with occupied(api, tgi):
            refused = await api.ask("Hi", retrieval=PLAIN)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
        await api.records(4)
        assert (await api.counts())["429", "failed"] == 1
        assert await sample(api, 'hallmark_refusals_total{reason="overloaded"}') == 1


async def test_no_answer_outlives_its_deadline_even_if_it_had_to_wait(tmp_path, tgi):
    async with (
        serve(tmp_path, tgi, max_concurrent_answers=1, request_timeout_seconds=1.0) as service,
        caller(service) as api,
    ):
        for _ in range(3):
            assert (await api.ask("Hi", retrieval=PLAIN)).status_code == 200
        tgi.script(*(Hang() for _ in range(6)))
        watch = Stopwatch()
        found = await asyncio.gather(*(api.ask("Hi", retrieval=PLAIN) for _ in range(6)))
        assert watch.seconds < 3  # One second, and generous for a busy machine.
        assert {response.status_code for response in found} <= {429, 504}
        assert (await api.counts())["504", "failed"] >= 1
        tgi.acts.clear()


# --- rates ---


async def test_a_key_with_limits_is_told_how_it_stands_and_refused_when_it_has_had_them(tgi, wide):
    async with caller(wide, tenant="limited", requests_per_minute=2, tokens_per_minute=10_000) as api:
        refusals = await sample(api, 'hallmark_refusals_total{reason="rate_limit_exceeded"}')
        first = await api.ask("Hi", retrieval=PLAIN, max_tokens=50)
        assert first.status_code == 200
        assert [name for name in LIMITS if name not in first.headers] == []
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert 9_900 <= int(first.headers["x-ratelimit-remaining-tokens"]) < 9_950
        second = await api.stream("Hi", retrieval=PLAIN, max_tokens=50)
        assert second.done
        used = sum(first.json()["usage"][kind] for kind in ("prompt_tokens", "completion_tokens"))
        # What the first might have taken was put right by what it did.
        assert int(second.response.headers["x-ratelimit-remaining-tokens"]) == (
            int(first.headers["x-ratelimit-remaining-tokens"]) + 51 - used - 51
        )
        for stream in (False, True):
            refused = await api.ask("Hi", retrieval=PLAIN, stream=stream)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["type"]) == (
                429,
                "rate_limit_exceeded",
                "rate_limit_error",
            )
            assert "2 requests a minute" in error["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
            assert [name for name in LIMITS if name not in refused.headers] == []
        assert len(tgi.bodies) == 2
        await api.records(2)
        assert await sample(api, 'hallmark_refusals_total{reason="rate_limit_exceeded"}') == refusals + 2


async def test_a_key_without_limits_has_no_such_headers(wide):
    async with caller(wide) as api:
        answered = await api.ask("Hi", retrieval=PLAIN)
        assert not [name for name in answered.headers if name.startswith("x-ratelimit")]


async def test_tokens_are_counted_as_the_engine_counted_them_and_used_up(tgi, wide):
    tgi.script(*(Tokens(*(f" word{i}" for i in range(40))) for _ in range(3)))  # 11 and 40 tokens each.
    async with caller(wide, tokens_per_minute=150) as api:
        statuses = [(await api.ask("Hi", retrieval=PLAIN, max_tokens=40)).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]  # 102 of 150 are used: the third fits, a fourth does not.


async def test_what_the_service_had_no_room_for_is_not_counted(tgi, wide):
    async with caller(wide, requests_per_minute=2) as api:
        tgi.script(*(Refuse.overloaded() for _ in range(3)))
        for _ in range(3):
            refused = await api.ask("Hi", retrieval=PLAIN)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert (await api.ask("Hi", retrieval=PLAIN)).headers["x-ratelimit-remaining-requests"] == "1"


async def test_limits_that_are_changed_while_the_service_runs_hold_within_a_second(wide):
    async with caller(wide) as api:
        assert (await api.ask("Hi", retrieval=PLAIN)).status_code == 200
        key_id = api.key.split("_")[1]
        await asyncio.to_thread(update_key, wide.database, key_id, requests_per_minute=1, priority="high")

        async def limited() -> bool:
            return (await api.ask("Hi", retrieval=PLAIN)).status_code == 429

        await until(limited)
        me = (await api.client.get("/v1/me")).json()
        assert (me["priority"], me["requests_per_minute"], me["tokens_per_minute"]) == ("high", 1, None)


async def test_a_web_page_may_read_the_headers(tmp_path, tgi):
    settings = {"cors_origins": ["https://chat.example"]}
    async with (
        live_service(tmp_path, engine_url=tgi.url, settings=settings) as service,
        service.client() as client,
    ):
        page = {"origin": "https://chat.example"}
        body = {"model": "hallmark", "messages": [{"role": "user", "content": "Hi"}]}
        exposed = (await client.post(CHAT, json=body, headers=page)).headers["access-control-expose-headers"]
        assert set(LIMITS) <= {name.strip() for name in exposed.split(",")}


# --- keys in a shared database ---


async def test_a_key_works_on_every_gateway_and_a_revoked_one_on_none_within_a_second(
    tmp_path, tgi, postgres: Postgres
):
    settings = {"database_url": postgres.create_database()}
    async with (
        live_service(tmp_path / "a", engine_url=tgi.url, settings=settings) as one,
        live_service(tmp_path / "b", engine_url=tgi.url, settings=settings) as two,
    ):
        key = await one.new_key()
        async with one.client(key) as first, two.client(key) as second:
            for client in (second, first):
                assert (await client.get("/v1/models")).status_code == 200
            await asyncio.to_thread(revoke_key, one.database, key.split("_")[1])
            watch = Stopwatch()
            for client in (first, second):

                async def refused(client: Any = client) -> bool:
                    return (await client.get("/v1/models")).status_code == 401

                await until(refused)
            assert watch.seconds < 2  # Half a second, and generous for a busy machine.


async def test_a_valid_key_is_never_refused_because_the_database_is_down(tmp_path, tgi):
    with Postgres() as server:
        settings = {"database_url": server.create_database(), "engine": {}}
        unknown = {"authorization": "Bearer hm_aaaaaaaa_wrong"}
        body = {"model": "hallmark", "messages": [{"role": "user", "content": "Hi"}], "retrieval": PLAIN}

        async def check(service: Service) -> None:
            async with service.client() as client:
                for _ in range(3):
                    assert (await client.post(CHAT, json=body)).status_code == 200
                refused = await client.post(CHAT, json=body, headers=unknown)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
                assert int(refused.headers["retry-after"]) >= 1

        async with live_service(tmp_path, engine_url=tgi.url, settings=settings) as service:
            async with service.client() as client:
                assert (await client.post(CHAT, json=body)).status_code == 200
            await asyncio.to_thread(server.stop)
            await check(service)
        async with live_service(tmp_path, engine_url=tgi.url, settings=settings, key=service.key) as again:
            await check(again)
            await asyncio.to_thread(server.start)
            async with again.client() as client:

                async def looks_up() -> bool:
                    return (await client.post(CHAT, json=body, headers=unknown)).status_code == 401

                await until(looks_up)
                assert (await client.post(CHAT, json=body)).status_code == 200


async def test_a_redis_that_is_away_fails_no_request(tmp_path, tgi):
    async with (
        serve(tmp_path, tgi, redis_url="redis://127.0.0.1:1/0") as service,
        caller(service, requests_per_minute=2) as api,
    ):
        statuses = [(await api.ask("Hi", retrieval=PLAIN)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert await sample(api, "hallmark_redis_failures_total") >= 1
