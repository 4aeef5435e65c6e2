"""When the engine has no room: a refusal at once, and readiness, health and other questions as before."""

import asyncio

from app.engines import EngineInfo
from app.engines.tgi import TGIEngine
from app.errors import EngineUnavailable
from app.messages import Generation, Message
from app.settings import Settings
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import Api, live_gateway, live_service
from tests.stopwatch import Stopwatch

PLAIN = {"mode": "off"}


async def test_a_caller_for_whom_no_connection_is_left_is_told_at_once_and_the_service_stays_ready(tmp_path):
    gate = asyncio.Event()
    async with (
        FakeTGI(default=Tokens("Hello", gate=gate)) as tgi,
        live_service(tmp_path, engine_url=tgi.url, settings={"engine": {"max_connections": 1}}) as service,
        service.client() as client,
    ):
        api = Api(client, "default", service.key)
        first = asyncio.create_task(api.ask("Hi", retrieval=PLAIN))
        await tgi.until(lambda: len(tgi.bodies) == 1)
        seconds = []
        for stream in (False, True) * 3:
            watch = Stopwatch()
            refused = await api.ask("Hi", stream=stream, retrieval=PLAIN)
            seconds.append(watch.seconds)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
        assert min(seconds) < 0.1  # All of them, but for the pauses of a busy machine.
        assert max(seconds) < 0.3
        seconds = []
        for _ in range(3):
            watch = Stopwatch()
            ready = await client.get("/readyz")
            seconds.append(watch.seconds)
            assert (ready.status_code, ready.json()["checks"]["engine"]) == (200, "ok")
        assert min(seconds) < 1  # A connection that it waited for would be there in none of the three.
        gate.set()
        assert (await first).status_code == 200


async def test_a_busy_engine_is_healthy_and_counts_and_tells_about_itself():
    gate = asyncio.Event()
    async with FakeTGI(default=Tokens("Hello", gate=gate)) as tgi:
        engine = TGIEngine(tgi.url, max_connections=1)
        answers = engine.generate(Generation([Message("user", "Hi")]))
        first = asyncio.ensure_future(anext(answers))
        await tgi.until(lambda: len(tgi.bodies) == 1)
        assert await engine.healthy()
        assert (await engine.describe()).model_id == tgi.model_id
        assert await engine.count_tokens("a b c") == 3
        gate.set()
        await first
        await answers.aclose()
        await engine.aclose()
        await tgi.until(lambda: tgi.open_connections == 0)


async def test_more_questions_than_their_connections_take_turns():
    async with FakeTGI() as tgi:
        engine = TGIEngine(tgi.url)
        assert await asyncio.gather(*(engine.count_tokens("a b") for _ in range(60))) == [2] * 60
        assert tgi.connections <= 4
        await engine.aclose()


def test_as_many_answers_are_let_in_as_the_engine_has_connections():
    settings = Settings()
    assert settings.limits.max_concurrent_answers == settings.engine.max_connections


class Unwilling(TGIEngine):
    """An engine that has not said what it serves, and counts how often it was asked."""

    asked = 0
    info: EngineInfo | None = None

    async def describe(self) -> EngineInfo:
        self.asked += 1
        if self.info is None:
            raise EngineUnavailable("not now")
        return self.info


async def test_an_engine_that_does_not_tell_its_limits_is_not_asked_for_every_request(tmp_path):
    async with FakeTGI() as tgi:
        engine = Unwilling(tgi.url)
        async with live_gateway(tmp_path, engine_url=tgi.url, engine=engine) as live:
            assert [await live.gateway.engines.token_limit("tgi") for _ in range(3)] == [None] * 3
            assert engine.asked == 1
        engine.info = EngineInfo("m", max_total_tokens=7)
        async with live_gateway(tmp_path, engine_url=tgi.url, engine=engine) as live:
            assert [await live.gateway.engines.token_limit("tgi") for _ in range(3)] == [7] * 3
            assert engine.asked == 2
        await engine.aclose()
