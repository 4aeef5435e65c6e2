"""Several engines as one: the one with the least to do answers, and one that fails costs nobody an answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.engines.breaker import Breaker
from app.engines.pool import EnginePool
from app.engines.startup import Startup
from app.engines.tgi import TGIEngine, Timeouts
from app.errors import (
    EngineInterrupted,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    Overloaded,
    ServiceError,
)
from app.messages import Generation, Message
from tests.fake_tgi import Act, Drop, FakeTGI, Hang, Refuse, Tokens
from tests.service import until

A, B = Tokens("from", " a"), Tokens("from", " b")
INVALID = Refuse(422, "Input validation error: `top_p` must be > 0.0 and < 1.0", "validation")


def ask(*, stream: bool = True, adapter: str | None = None) -> Generation:
    return Generation([Message("user", "hello")], stream=stream, adapter=adapter)


async def answer(engine: EnginePool | TGIEngine, generation: Generation | None = None) -> str:
    return "".join([piece.text for batch in [b async for b in engine.generate(generation or ask())] for piece in batch])


@asynccontextmanager
async def pool_of(
    *engines: FakeTGI, dialects: tuple[str, ...] = (), timeouts: Timeouts | None = None, **options: Any
) -> AsyncIterator[EnginePool]:
    """A pool that looks often and loses patience soon."""
    timeouts = timeouts or Timeouts(first_token_seconds=5.0, between_tokens_seconds=5.0, answer_seconds=5.0)
    members = {
        f"e{number}": TGIEngine(engine.url, dialect=(dialects or ("tgi",) * 9)[number], timeouts=timeouts)
        for number, engine in enumerate(engines)
    }
    given = {"every_seconds": 0.02, "probe_seconds": 0.1, "warmups": 0, **options}
    async with EnginePool("tgi", members, **given) as pool:
        yield pool


async def eventually(condition: Callable[[], bool]) -> None:
    async def look() -> bool:
        return condition()

    await until(look)


def states(pool: EnginePool) -> list[str]:
    return [member.state for member in pool.members]


# --- choosing ---


async def test_requests_go_to_the_engine_with_the_fewest_in_flight():
    gate = asyncio.Event()
    async with (
        FakeTGI(default=Tokens("x", gate=gate)) as a,
        FakeTGI(default=Tokens("x", gate=gate)) as b,
        pool_of(a, b) as pool,
    ):
        tasks = []
        for count in range(1, 9):
            tasks.append(asyncio.create_task(answer(pool)))
            await eventually(lambda count=count: len(a.bodies) + len(b.bodies) == count)
        assert (len(a.bodies), len(b.bodies)) == (4, 4)
        gate.set()
        await asyncio.gather(*tasks)


async def test_an_engine_with_a_queue_of_others_requests_gets_none_of_ours():
    async with FakeTGI(default=A) as a, FakeTGI(default=B) as b, pool_of(a, b) as pool:
        a.queue_size, a.batch_size = 20, 8
        await eventually(lambda: pool.members[0].waiting == 20)
        assert [await answer(pool) for _ in range(4)] == ["from b"] * 4
        a.queue_size, a.batch_size, b.queue_size = 0, 0, 3
        await eventually(lambda: [member.waiting for member in pool.members] == [0, 3])
        assert await answer(pool) == "from a"


async def test_idle_engines_take_turns():
    async with FakeTGI(default=A) as a, FakeTGI(default=B) as b, pool_of(a, b) as pool:
        await asyncio.gather(*(answer(pool, ask()) for _ in range(1)))
        assert {await answer(pool), await answer(pool)} == {"from a", "from b"}


async def test_with_one_engine_the_pool_is_not_between_it_and_the_request():
    async with FakeTGI(default=A) as a, pool_of(a) as pool:
        generation = ask()
        ours, its = pool.generate(generation), next(iter(pool.engines.values())).generate(generation)
        assert ours.ag_code is its.ag_code  # type: ignore[attr-defined]
        await ours.aclose()
        await its.aclose()


# --- failing over ---

SICK: dict[str, Callable[[], Act]] = {
    "overloaded": Refuse.overloaded,
    "failed": Refuse.failed,
    "gone without a byte": Drop,
    "garbage": lambda: Refuse(502, "<html>", "x", in_stream=False),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("act", SICK.values(), ids=SICK)
async def test_what_another_engine_can_answer_is_answered(act, stream):
    async with FakeTGI(default=lambda _: act()) as a, FakeTGI(default=B) as b, pool_of(a, b) as pool:
        assert [await answer(pool, ask(stream=stream)) for _ in range(4)] == ["from b"] * 4
        assert pool.failovers >= 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_what_is_invalid_is_refused_once(stream):
    async with FakeTGI(default=INVALID) as a, FakeTGI(default=INVALID) as b, pool_of(a, b) as pool:
        with pytest.raises(EngineRejected):
            await answer(pool, ask(stream=stream))
        assert len(a.bodies) + len(b.bodies) == 1
        assert states(pool) == ["closed", "closed"]


async def test_after_the_first_token_nothing_is_tried_again():
    cut = Tokens("one", " two", cut_after=1)
    async with FakeTGI(default=cut) as a, FakeTGI(default=cut) as b, pool_of(a, b) as pool:
        batches = pool.generate(ask())
        assert [piece.text for piece in await anext(batches)] == ["one"]
        with pytest.raises(EngineInterrupted):
            await anext(batches)
        assert len(a.bodies) + len(b.bodies) == 1


async def test_each_engine_is_tried_once_and_a_full_one_is_the_reason_told():
    async with (
        FakeTGI(default=lambda _: Refuse.overloaded()) as a,
        FakeTGI(default=lambda _: Refuse.failed()) as b,
        pool_of(a, b) as pool,
    ):
        for _ in range(2):
            with pytest.raises(Overloaded):
                await answer(pool)
        assert (len(a.bodies), len(b.bodies)) == (2, 2)


async def test_one_request_waits_no_longer_than_its_patience_for_all_engines_together():
    async with FakeTGI(default=Hang()) as a, FakeTGI(default=Hang()) as b, pool_of(a, b, patience_seconds=0.3) as pool:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(EngineTimeout):
            await answer(pool)
        assert loop.time() - began < 0.8


async def test_a_client_that_leaves_stops_the_engine_and_is_no_failure():
    async with FakeTGI(default=Hang()) as a, FakeTGI(default=Hang()) as b, pool_of(a, b) as pool:
        for count in range(1, 8):
            task = asyncio.create_task(answer(pool))
            await eventually(lambda count=count: len(a.bodies) + len(b.bodies) == count)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: a.cancelled + b.cancelled == 7)
        assert states(pool) == ["closed", "closed"]


# --- out and in again ---


async def test_a_dead_engine_is_out_and_in_again_when_it_is_back():
    async with FakeTGI(default=B) as b, FakeTGI(default=A) as a:
        port = int(a.url.rpartition(":")[2])
        async with pool_of(a, b) as pool:
            assert {await answer(pool) for _ in range(4)} == {"from a", "from b"}
            await a.stop()
            assert [await answer(pool) for _ in range(4)] == ["from b"] * 4
            await eventually(lambda: states(pool) == ["open", "closed"])
            assert pool.members[0].reason
            async with FakeTGI(default=Tokens("again"), port=port):
                await eventually(lambda: states(pool) == ["closed", "closed"])
                assert {await answer(pool) for _ in range(4)} == {"again", "from b"}
            assert pool.members[0].ejections >= 1


async def test_a_hung_engine_is_out_and_who_waits_for_it_is_answered_elsewhere():
    gate = asyncio.Event()
    async with FakeTGI(default=Tokens("late", gate=gate)) as a, FakeTGI(default=B) as b, pool_of(a, b) as pool:
        b.queue_size = 50
        await eventually(lambda: pool.members[1].waiting == 50)
        waiting = [asyncio.create_task(answer(pool, ask(stream=stream))) for stream in (True, False, True)]
        await eventually(lambda: len(a.bodies) == 3)
        a.is_hung = True
        assert await asyncio.gather(*waiting) == ["from b"] * 3
        assert states(pool) == ["open", "closed"]
        assert await answer(pool) == "from b"
        a.is_hung, b.queue_size = False, 0
        gate.set()
        await eventually(lambda: states(pool) == ["closed", "closed"])


async def test_who_waits_for_a_whole_answer_of_the_last_engine_learns_that_it_is_silent():
    timeouts = Timeouts(first_token_seconds=0.3, answer_seconds=50.0)
    async with FakeTGI(default=Hang()) as a, pool_of(a, timeouts=timeouts) as pool:
        waiting = asyncio.create_task(answer(pool, ask(stream=False)))
        await a.until(lambda: len(a.bodies) == 1)
        a.is_hung = True
        with pytest.raises(EngineTimeout):
            await waiting
        assert states(pool) == ["open"]
        await a.until(lambda: a.cancelled == 1)


async def test_a_whole_answer_may_take_longer_than_a_first_token_while_probes_are_answered():
    gate = asyncio.Event()
    timeouts = Timeouts(first_token_seconds=0.1, answer_seconds=50.0)
    async with FakeTGI(default=Tokens("late", gate=gate)) as a, pool_of(a, timeouts=timeouts) as pool:
        waiting = asyncio.create_task(answer(pool, ask(stream=False)))
        await a.until(lambda: len(a.bodies) == 1)
        probed = len(a.requests)
        await a.until(lambda: len(a.requests) > probed + 40)  # A second and more.
        gate.set()
        assert await waiting == "late"


async def test_an_engine_that_leaves_probes_waiting_while_it_answers_is_not_out():
    stream = Tokens(*["token "] * 400, delay_seconds=0.01)
    async with FakeTGI(default=stream) as a, FakeTGI(default=B) as b, pool_of(a, b) as pool:
        b.queue_size = 50
        await eventually(lambda: pool.members[1].waiting == 50)
        batches = pool.generate(ask())
        await anext(batches)
        a.is_hung = True  # From here on: what it is at goes on.
        loop = asyncio.get_running_loop()
        until_then = loop.time() + 0.6
        async for _ in batches:
            assert states(pool) == ["closed", "closed"]
            if loop.time() > until_then:
                break
        await batches.aclose()
        await eventually(lambda: states(pool) == ["open", "closed"])


async def test_an_engine_whose_requests_fail_is_out_though_its_probes_are_answered():
    sick = [True]
    default = lambda _: Refuse.failed() if sick[0] else A  # noqa: E731 - a switch.
    async with (
        FakeTGI(default=default) as a,
        FakeTGI(default=B) as b,
        pool_of(a, b, breaker=lambda: Breaker(open_seconds=0.1)) as pool,
    ):
        for _ in range(8):
            assert await answer(pool) == "from b"
        assert states(pool)[0] != "closed"
        asked = len(a.bodies)
        assert asked == 3
        # Every trial fails, and no caller's request is among them.
        await eventually(lambda: len(a.bodies) >= asked + 1)
        assert await answer(pool) == "from b"
        sick[0] = False
        await eventually(lambda: states(pool) == ["closed", "closed"])
        assert {await answer(pool) for _ in range(4)} == {"from a", "from b"}


async def test_an_engine_that_is_loading_is_out_until_it_says_otherwise():
    async with FakeTGI(default=A) as a, FakeTGI(default=B) as b, pool_of(a, b) as pool:
        a.is_healthy = False
        await eventually(lambda: states(pool) == ["open", "closed"])
        a.is_healthy = True
        await eventually(lambda: states(pool) == ["closed", "closed"])


async def test_a_server_without_the_probes_route_lives():
    async with (
        FakeTGI(default=A) as a,
        FakeTGI(default=B) as b,
        pool_of(a, b, dialects=("sglang", "tgi")) as pool,
    ):  # The stand-in has no `/ready`.
        await eventually(lambda: sum(request.path == "/ready" for request in a.requests) >= 3)
        assert states(pool) == ["closed", "closed"]


async def test_an_engine_that_came_up_is_warmed_up_before_it_gets_a_request():
    gate = asyncio.Event()
    async with FakeTGI(default=Tokens("x", gate=gate)) as a, pool_of(a, warmups=3) as pool:
        a.is_healthy = False
        await eventually(lambda: not pool.is_up)
        a.is_healthy = True
        await eventually(lambda: len(a.bodies) == 1)
        assert (pool.is_up, states(pool)) == (False, ["half_open"])
        gate.set()
        await eventually(lambda: pool.is_up)
        assert [body["max_tokens"] for body in a.bodies] == [1, 1, 1]


async def test_an_engine_that_was_up_from_the_start_is_not_warmed_up():
    async with FakeTGI() as a, pool_of(a, warmups=3) as pool:
        await eventually(lambda: len(a.requests) >= 4)
        assert (a.bodies, pool.is_up) == ([], True)


# --- none left ---


async def test_with_no_engine_left_requests_wait_for_one_that_starts():
    async with FakeTGI() as a:
        port = int(a.url.rpartition(":")[2])
    for_ten = Startup(wait_seconds=10.0)
    async with pool_of(a, startup=for_ten) as pool:
        await eventually(lambda: not pool.is_up)
        waiting = [asyncio.create_task(pool.wait_until_up()) for _ in range(3)]
        await eventually(lambda: for_ten.waiting == 3)
        async with FakeTGI(port=port):
            assert await asyncio.gather(*waiting) == [True] * 3
            assert await pool.wait_until_up() is False
        assert 0 < for_ten.usual_seconds < 10


async def test_who_was_let_down_by_an_engine_taken_for_up_has_it_looked_at():
    async with FakeTGI() as a, pool_of(a, every_seconds=60.0, startup=Startup(wait_seconds=0.0)) as pool:
        await eventually(lambda: len(a.requests) >= 1)
        await a.stop()
        assert pool.is_up
        with pytest.raises(EngineUnavailable) as caught:
            await pool.wait_until_up()
        assert (pool.is_up, caught.value.retry_after_seconds) == (False, pytest.approx(30.0, abs=1.0))


class NotBusyYet(FakeTGI):
    """Says that it is well, and then nothing more: a probe of it goes on for half a second."""

    def get(self, path: str) -> tuple[int, str, bytes] | None:
        self.is_hung = path == "/health"
        return super().get(path)


async def test_a_probe_that_was_answered_before_an_engine_went_is_not_taken_for_a_look_at_it():
    async with NotBusyYet() as a, pool_of(a, every_seconds=60.0, startup=Startup(wait_seconds=0.0)) as pool:
        await eventually(lambda: len(a.requests) >= 2)
        waiting = asyncio.create_task(pool.wait_until_up())
        await asyncio.sleep(0)
        await a.stop()
        with pytest.raises(EngineUnavailable):
            await waiting


async def test_two_engines_that_are_away_are_a_503_that_says_when():
    async with FakeTGI() as a, FakeTGI() as b:
        pass
    async with pool_of(a, b) as pool:
        for call in (answer(pool), pool.count_tokens("x"), pool.describe(), pool.rate("q", ["t"])):
            with pytest.raises(EngineUnavailable) as caught:
                await call
            assert caught.value.retry_after_seconds is not None
        assert await pool.healthy() is False


# --- beside answers ---


async def test_limits_are_the_lowest_and_adapters_those_of_all():
    async with (
        FakeTGI(max_total_tokens=4096, adapters=("tone", "law"), lists_adapters=True) as a,
        FakeTGI(max_total_tokens=2048, adapters=("law",), lists_adapters=True) as b,
        pool_of(a, b, dialects=("embedded", "embedded")) as pool,
    ):
        info = await pool.describe()
        assert (info.model_id, info.max_total_tokens, info.adapters) == ("org/base", 2048, ("law",))


async def test_engines_that_serve_different_models_are_no_group():
    async with FakeTGI() as a, FakeTGI(model_id="org/other") as b, pool_of(a, b) as pool:
        with pytest.raises(EngineUnavailable, match=r"different models.*org/base.*org/other"):
            await pool.describe()


async def test_tokens_are_counted_by_whoever_is_there():
    async with FakeTGI() as a, FakeTGI() as b, pool_of(a, b, every_seconds=60.0) as pool:
        await eventually(lambda: len(a.requests) >= 2 and len(b.requests) >= 2)
        await a.stop()
        assert [await pool.count_tokens("three little words") for _ in range(3)] == [3] * 3


async def test_a_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="urls"):
        EnginePool("big", {})


async def test_nothing_is_left_running_when_it_is_closed():
    before = asyncio.all_tasks()
    async with FakeTGI() as a:
        a.is_hung = True
        async with pool_of(a, probe_seconds=5.0):
            await eventually(lambda: len(a.requests) == 1)
        assert asyncio.all_tasks() <= before
        await a.until(lambda: a.open_connections == 0)


async def test_an_adapter_that_one_engine_has_yet_to_load_is_answered_by_the_other():
    async with (
        FakeTGI(default=A, lists_adapters=True, adapters=("tone",)) as a,
        FakeTGI(default=B, lists_adapters=True, adapters=("tone",)) as b,
        pool_of(a, b, dialects=("embedded",) * 2) as pool,
    ):
        assert {await answer(pool, ask(adapter="tone")) for _ in range(4)} == {"from a", "from b"}
        b.adapters = ()
        assert [await answer(pool, ask(adapter="tone")) for _ in range(8)] == ["from a"] * 8
        a.adapters = ()
        for _ in range(4):
            with pytest.raises(EngineUnavailable, match="has not loaded") as caught:
                await answer(pool, ask(adapter="tone"))
            assert caught.value.retry_after_seconds is not None
        assert states(pool) == ["closed", "closed"]
        assert {await answer(pool) for _ in range(4)} == {"from a", "from b"}


async def test_an_error_of_the_caller_is_none_of_the_engines():
    async with FakeTGI() as a, FakeTGI() as b, pool_of(a, b) as pool:
        for _ in range(4):
            with pytest.raises(ServiceError) as caught:
                await answer(pool, ask(adapter="unknown"))
            assert caught.value.status == 404
        assert states(pool) == ["closed", "closed"]
        assert pool.failovers == 0
