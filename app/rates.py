"""How much a key may take in a minute: requests, and tokens of prompts and answers together.

The main rule: a limit is counted where all gateways see it, in Redis, and where there is none in this process. A Redis
that does not answer at once costs a request a few hundredths of a second at most, and no request its answer: this
process then counts by itself until Redis is back.

A minute begins with the first request after the one before has ended. What a request may cost is counted before it is
answered, so that requests beside each other cannot take more than there is, and put right when its tokens are known.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, NamedTuple, Self

from limits.aio.storage import MemoryStorage, RedisStorage, Storage

from app.access import Caller
from app.errors import RateLimited, Unavailable

log = logging.getLogger(__name__)

Kind = Literal["requests", "tokens"]

WINDOW_SECONDS = 60
PATIENCE_SECONDS = 0.05
"""How long Redis may take for one request."""

AWAY_SECONDS = 2.0
"""How long Redis is not asked after it failed to answer."""

RATE_HEADERS = tuple(
    f"x-ratelimit-{name}-{kind}" for name in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
)
"""How OpenAI names the headers that tell how a key stands."""

_CONNECT_SECONDS = 1.0
_CONNECTIONS = 8
"""They are opened before they are needed: a request has no time for that."""


class Standing(NamedTuple):
    """How a key stands within one of its limits."""

    kind: Kind
    limit: int
    used: int
    resets_at: float
    """In seconds since 1970."""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The response's headers, as OpenAI names them."""
        remaining, resets = max(0, self.limit - self.used), max(0.0, self.resets_at - time.time())
        values = ("limit", str(self.limit)), ("remaining", str(remaining)), ("reset", f"{resets:.3g}s")
        return [(f"x-ratelimit-{name}-{self.kind}".encode(), value.encode()) for name, value in values]


@dataclass(frozen=True, slots=True)
class Taken:
    """What a request was counted for, and where."""

    key_id: str
    store: Storage
    amounts: Mapping[Kind, int]
    standings: Sequence[Standing]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The response's headers."""
        return [header for standing in self.standings for header in standing.headers]


class RateLimits:
    """Counts what keys take; use it in an `async with` block.

    Args:
        redis_url: where all gateways count; None counts in this process alone.
        patience_seconds: how long it may take for one request.
        away_seconds: how long it is not asked after it failed to answer.

    Raises:
        Unavailable: the client of Redis is not installed.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        away_seconds: float = AWAY_SECONDS,
    ) -> None:
        self._own = MemoryStorage()
        self._shared = _Redis(redis_url, patience_seconds, away_seconds) if redis_url else None
        self._patience_seconds = patience_seconds
        self._settling: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Connect to Redis; one that is away is waited for in the background."""
        if self._shared is not None:
            await self._shared.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Finish counting and close the connections."""
        await asyncio.gather(*self._settling)
        if self._shared is not None:
            await asyncio.shield(self._shared.aclose())

    @property
    def failures(self) -> int:
        """How often Redis did not answer when it was asked."""
        return self._shared.failures if self._shared else 0

    async def take(self, caller: Caller, tokens: int) -> Taken:
        """Count a request that may cost so many tokens.

        A request that may cost more than the limit allows in a minute is counted as the whole of it.

        Raises:
            RateLimited: the key has used up a limit; nothing is counted.
        """
        limits: dict[Kind, int] = {}
        amounts: dict[Kind, int] = {}
        if caller.requests_per_minute is not None:
            limits["requests"], amounts["requests"] = caller.requests_per_minute, 1
        if caller.tokens_per_minute is not None:
            limits["tokens"], amounts["tokens"] = caller.tokens_per_minute, min(tokens, caller.tokens_per_minute)
        store, standings = await self._count(caller.key_id, limits, amounts)
        taken = Taken(caller.key_id, store, amounts, standings)
        for standing in standings:
            if standing.used > standing.limit:
                await self._change(taken, _negative(amounts))
                raise _refusal(standing, taken)
        return taken

    def give_back(self, taken: Taken) -> None:
        """Have a request not counted at all, because it was refused for a reason that is not its own."""
        self._settle(taken, _negative(taken.amounts))

    def settle(self, taken: Taken, tokens: int) -> None:
        """Count the tokens that an answer took in place of those it might have."""
        if "tokens" in taken.amounts:
            self._settle(taken, {"tokens": tokens - taken.amounts["tokens"]})

    async def _count(
        self, key_id: str, limits: Mapping[Kind, int], amounts: Mapping[Kind, int]
    ) -> tuple[Storage, list[Standing]]:
        shared = self._shared
        if shared is not None and not shared.is_away:
            try:
                async with asyncio.timeout(self._patience_seconds):
                    return shared.store, await _count_in(shared.store, key_id, limits, amounts)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with a store is no reason to refuse a request.
                shared.lose(error)
        return self._own, await _count_in(self._own, key_id, limits, amounts)

    def _settle(self, taken: Taken, changes: Mapping[Kind, int]) -> None:
        """Change what was counted, in the background: whoever finishes a request may be cancelled."""
        task = asyncio.create_task(self._change(taken, changes), name="settle")
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _change(self, taken: Taken, changes: Mapping[Kind, int]) -> None:
        shared = self._shared
        if shared is None or taken.store is self._own:
            await _change_in(self._own, taken, changes)
        elif not shared.is_away:
            try:
                async with asyncio.timeout(self._patience_seconds):
                    await _change_in(shared.store, taken, changes)
            except Exception as error:  # noqa: BLE001 - as above.
                shared.lose(error)


class _Redis:
    """The store that all gateways count in, and whether it can be asked."""

    def __init__(self, url: str, patience_seconds: float, away_seconds: float) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ModuleNotFoundError as error:
            raise Unavailable("Redis needs its client: pip install 'hallmark[redis]'.") from error

        pool: Any = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_CONNECT_SECONDS,
            socket_timeout=_CONNECT_SECONDS,
            socket_connect_timeout=_CONNECT_SECONDS,
            retry=Retry(NoBackoff(), 1),  # For a connection that was closed while nobody used it.
        )
        self.store = RedisStorage(f"async+{url}", implementation="redispy", key_prefix="hallmark", connection_pool=pool)
        self._client = Redis.from_pool(pool)
        self._patience_seconds = patience_seconds
        self._away_seconds = away_seconds
        self._lost = asyncio.Event()
        self.failures = 0

    @property
    def is_away(self) -> bool:
        """Whether it failed to answer and has not been found to answer again."""
        return self._lost.is_set()

    async def open(self) -> None:
        """Connect, and from then on do so again whenever it was lost."""
        if not await self._answers():
            self.lose(ConnectionError())
        self._watcher = asyncio.create_task(self._watch(), name="redis")

    async def aclose(self) -> None:
        """Close every connection."""
        self._watcher.cancel()
        with suppress(asyncio.CancelledError):
            await self._watcher
        await self._client.aclose()

    def lose(self, error: Exception) -> None:
        """Do without it until it is found to answer again."""
        self.failures += 1
        if not self.is_away:
            kind = type(error).__name__
            log.error("Redis does not answer (%s): this process counts rate limits by itself until it does", kind)
        self._lost.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._away_seconds)
            await self._lost.wait()
            if await self._answers():
                self._lost.clear()
                log.warning("Redis answers again: rate limits are counted together")

    async def _answers(self) -> bool:
        """Open all connections, and see whether an answer comes as soon as a request needs it."""
        client = self._client
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await asyncio.gather(*(client.ping() for _ in range(_CONNECTIONS)))
            async with asyncio.timeout(self._patience_seconds):
                await client.ping()
        except Exception:  # noqa: BLE001 - as above.
            return False
        return True


async def _count_in(
    store: Storage, key_id: str, limits: Mapping[Kind, int], amounts: Mapping[Kind, int]
) -> list[Standing]:
    standings = []
    for kind, limit in limits.items():
        key = _key(kind, key_id, limit)
        used = int(await store.incr(key, WINDOW_SECONDS, amounts[kind]))
        standings.append(Standing(kind, limit, used, float(await store.get_expiry(key))))
    return standings


async def _change_in(store: Storage, taken: Taken, changes: Mapping[Kind, int]) -> None:
    for standing in taken.standings:
        change = changes.get(standing.kind, 0)
        # What was counted in a minute that is over is forgotten: it must not be given back in the next.
        if change and time.time() < standing.resets_at - 1:
            await store.incr(_key(standing.kind, taken.key_id, standing.limit), WINDOW_SECONDS, change)


def _key(kind: Kind, key_id: str, limit: int) -> str:
    return f"{kind}/{key_id}/{limit}"


def _negative(amounts: Mapping[Kind, int]) -> dict[Kind, int]:
    return {kind: -amount for kind, amount in amounts.items()}


def _refusal(reached: Standing, taken: Taken) -> RateLimited:
    seconds = max(1.0, reached.resets_at - time.time())
    before = [each._replace(used=each.used - taken.amounts[each.kind]) for each in taken.standings]
    return RateLimited(
        f"This API key may take {reached.limit} {reached.kind} a minute, and this request does not fit into what is "
        f"left of them; try again in {ceil(seconds)} s.",
        retry_after_seconds=ceil(seconds),
        headers=[header for each in before for header in each.headers],
    )
