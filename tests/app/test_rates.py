"""What a key may take in a minute is counted before it is taken, put right afterwards, and never a reason to fail."""

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from app.access import Caller
from app.errors import RateLimited
from app.rates import RATE_HEADERS, RateLimits, Taken
from tests.redis_server import Redis
from tests.service import until
from tests.stopwatch import Stopwatch


def caller(requests: int | None = None, tokens: int | None = None, key_id: str = "key") -> Caller:
    return Caller(key_id, "acme", frozenset({"chat"}), requests_per_minute=requests, tokens_per_minute=tokens)


def remaining(taken: Taken, kind: str) -> int:
    return int(dict(taken.headers)[f"x-ratelimit-remaining-{kind}".encode()])


async def finished(limits: RateLimits) -> None:
    """Wait until what was to be counted in the background is."""
    await asyncio.gather(*limits._settling)


@pytest.fixture
def redis(tmp_path) -> Iterator[Redis]:
    with Redis(tmp_path) as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
async def limits(request) -> AsyncIterator[RateLimits]:
    url = request.getfixturevalue("redis").url if request.param == "redis" else None
    # On a busy machine an answer may take longer than a request should be made to wait for it.
    async with RateLimits(url, patience_seconds=2.0) as limits:
        yield limits
        assert limits.failures == 0


async def test_so_many_requests_are_let_through_and_the_next_is_told_when_to_come_back(limits):
    for left in (2, 1, 0):
        taken = await limits.take(caller(requests=3), 10)
        assert remaining(taken, "requests") == left
    with pytest.raises(RateLimited) as refusal:
        await limits.take(caller(requests=3), 10)
    assert 50 < refusal.value.retry_after_seconds <= 60
    assert "3 requests a minute" in refusal.value.message
    assert dict(refusal.value.headers)[b"x-ratelimit-remaining-requests"] == b"0"
    await limits.take(caller(requests=3, key_id="another"), 10)


async def test_headers_are_named_and_written_as_openai_does(limits):
    taken = await limits.take(caller(requests=60, tokens=1000), 100)
    headers = {name.decode(): value.decode() for name, value in taken.headers}
    assert set(headers) == set(RATE_HEADERS)
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "59"
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert headers["x-ratelimit-remaining-tokens"] == "900"
    for kind in ("requests", "tokens"):
        assert re.fullmatch(r"\d+(\.\d+)?s", headers[f"x-ratelimit-reset-{kind}"])
        assert 50 < float(headers[f"x-ratelimit-reset-{kind}"][:-1]) <= 60


async def test_a_key_with_one_limit_has_the_headers_of_that_one(limits):
    taken = await limits.take(caller(tokens=1000), 100)
    assert {name.rsplit(b"-", 1)[1] for name, _ in taken.headers} == {b"tokens"}


async def test_tokens_that_were_not_needed_are_given_back_and_more_than_expected_are_taken(limits):
    someone = caller(tokens=1000)
    for expected, took, left in ((400, 100, 900), (100, 300, 600), (50, 50, 550)):
        limits.settle(await limits.take(someone, expected), took)
        await finished(limits)
        assert remaining(await limits.take(someone, 0), "tokens") == left
    limits.settle(await limits.take(someone, 500), 900)  # So it has had more than it may.
    await finished(limits)
    with pytest.raises(RateLimited, match="1000 tokens a minute"):
        await limits.take(someone, 1)


async def test_requests_beside_each_other_cannot_take_more_than_there_is(limits):
    someone = caller(requests=1000, tokens=1000)
    taken = await asyncio.gather(*(limits.take(someone, 300) for _ in range(20)), return_exceptions=True)
    let_in = [each for each in taken if isinstance(each, Taken)]
    # At the very edge one may be refused beside another that is being refused, but none is let in.
    assert 1 <= len(let_in) <= 3
    for each in let_in:
        limits.settle(each, 10)
    await finished(limits)
    again = await limits.take(someone, 100)
    assert remaining(again, "tokens") == 1000 - 10 * len(let_in) - 100
    assert remaining(again, "requests") == 1000 - len(let_in) - 1  # Who was refused was not counted.


async def test_a_request_larger_than_the_limit_is_let_through_once_a_minute(limits):
    someone = caller(tokens=100)
    await limits.take(someone, 5000)
    with pytest.raises(RateLimited):
        await limits.take(someone, 1)


async def test_a_request_that_is_given_back_was_never_counted(limits):
    someone = caller(requests=1, tokens=100)
    for _ in range(3):
        limits.give_back(await limits.take(someone, 100))
        await finished(limits)
    await limits.take(someone, 100)


async def test_another_limit_begins_anew(limits):
    await limits.take(caller(requests=1), 1)
    with pytest.raises(RateLimited):
        await limits.take(caller(requests=1), 1)
    await limits.take(caller(requests=2), 1)


async def test_what_was_counted_in_a_minute_that_is_over_is_not_given_back_in_the_next(limits):
    someone = caller(tokens=100)
    taken = await limits.take(someone, 60)
    ended = [standing._replace(resets_at=time.time()) for standing in taken.standings]
    limits.settle(replace(taken, standings=ended), 0)
    await finished(limits)
    with pytest.raises(RateLimited):
        await limits.take(someone, 60)


# --- Redis ---


async def test_gateways_count_together(redis):
    someone = caller(requests=4, tokens=1000)
    async with (
        RateLimits(redis.url, patience_seconds=2.0) as one,
        RateLimits(redis.url, patience_seconds=2.0) as other,
    ):
        for limits in (one, other, one, other):
            limits.settle(await limits.take(someone, 200), 100)
            await finished(limits)
        for limits in (one, other):
            with pytest.raises(RateLimited, match="4 requests") as refusal:
                await limits.take(someone, 0)
            assert dict(refusal.value.headers)[b"x-ratelimit-remaining-tokens"] == b"600"
        assert (one.failures, other.failures) == (0, 0)


async def test_while_redis_is_down_a_gateway_counts_by_itself_and_then_together_again(redis, caplog):
    someone = caller(requests=2)
    async with RateLimits(redis.url, patience_seconds=1.0, away_seconds=0.05) as limits:
        await limits.take(someone, 1)
        await limits.take(someone, 1)
        await asyncio.to_thread(redis.stop)
        for _ in range(2):  # By itself: as many again.
            await limits.take(someone, 1)
        with pytest.raises(RateLimited):
            await limits.take(someone, 1)
        assert limits.failures == 1
        await asyncio.to_thread(redis.start)

        async def together() -> bool:
            return not limits._shared.is_away

        await until(together)
        taken = await limits.take(someone, 1)
        assert remaining(taken, "requests") == 1  # It was started anew, and has forgotten.
    told = [entry.message for entry in caplog.records if entry.name == "app.rates"]
    assert len(told) == 2
    assert "by itself" in told[0]
    assert "together" in told[1]


async def test_a_start_without_redis_counts_by_itself_until_it_is_there(redis):
    await asyncio.to_thread(redis.stop)
    async with RateLimits(redis.url, patience_seconds=1.0, away_seconds=0.05) as limits:
        taken = await limits.take(caller(requests=5), 1)
        limits.give_back(taken)
        await asyncio.to_thread(redis.start)

        async def together() -> bool:
            return not limits._shared.is_away

        await until(together)
        assert (await limits.take(caller(requests=5), 1)).store is limits._shared.store


@contextlib.asynccontextmanager
async def listening(answer: bytes | None) -> AsyncIterator[str]:
    """Something that takes connections and answers whatever it is sent, or nothing; gives its URL."""
    writers = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with contextlib.suppress(ConnectionError):
            while await reader.read(65_536):
                if answer is not None:
                    writer.write(answer)
                    await writer.drain()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()


BAD = {
    "hangs": None,
    "talks nonsense": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "sends numbers that are none": b":many\r\n",
    "says it is loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "wants a password": b"-NOAUTH Authentication required.\r\n",
}


@pytest.mark.parametrize("bad", BAD)
async def test_a_redis_that_is_none_fails_no_request_and_holds_none_up(bad):
    async with listening(BAD[bad]) as url, RateLimits(url) as limits:
        assert limits.failures == 1
        watch = Stopwatch()
        for left in (1, 0):
            assert remaining(await limits.take(caller(requests=2), 1), "requests") == left
        with pytest.raises(RateLimited):
            await limits.take(caller(requests=2), 1)
        assert watch.seconds < 0.5


async def test_a_redis_that_begins_to_hang_holds_up_one_request_for_a_moment(redis):
    async with RateLimits(redis.url, away_seconds=60.0) as limits:
        await until(lambda: _counts_together(limits))
        redis.process.send_signal(signal.SIGSTOP)  # The kernel still takes its connections.
        try:
            seconds = []
            for _ in range(20):
                watch = Stopwatch()
                await limits.take(caller(requests=100), 1)
                seconds.append(watch.seconds)
        finally:
            redis.process.send_signal(signal.SIGCONT)
        assert limits.failures == 1
        assert seconds[0] < 0.5  # Fifty milliseconds, and generous for a busy machine.
        assert sorted(seconds)[10] < 0.02


async def _counts_together(limits: RateLimits) -> bool:
    return (await limits.take(caller(requests=100), 1)).store is limits._shared.store
