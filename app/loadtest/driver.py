"""Sends requests when they are due, whether or not earlier ones were answered, and times each from when it was due.

A driver that waits for a slow server sends less just when the server is slow, and so hides it (coordinated omission).
Here a request that could not be sent in time, because `in_flight` others were out, has waited all the same: its times
count from its due time, and how late it was is reported. No more than `in_flight` requests exist at any moment.
"""

import asyncio
import contextlib
import ipaddress
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from app.errors import InvalidRequest
from app.loadtest.arrivals import MAX_TOKENS, Arrival
from app.loadtest.measures import Measures, Objective, Sample

_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """The endpoint under test: where its `/chat/completions` is, and what is sent with every request."""

    url: str
    model: str
    key: str | None = None
    timeout_seconds: float = 120.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the body, as `{"ignore_eos": true}`."""


def check_host(url: str, *, allow_remote: bool) -> None:
    """Refuse a target on another machine unless that is meant: a load test is an attack on whom it was not agreed with.

    Raises:
        InvalidRequest: the URL is none, or its host is not this machine.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"`--url`: {url[:100]!r} is no http URL.", param="url")
    try:
        local = ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        local = parts.hostname == "localhost"
    if not local and not allow_remote:
        raise InvalidRequest(
            f"`--url`: {parts.hostname} is another machine; give --allow-remote if its owner agreed.", param="url"
        )


async def drive(
    target: Target,
    arrivals: Iterable[Arrival],
    objective: Objective,
    *,
    in_flight: int = 1000,
    paced: bool = True,
    on_sample: Callable[[Sample], None] = lambda _: None,
    seed: int = 0,
) -> Measures:
    """Run the arrivals and measure; not `paced`, each is due when one of `in_flight` callers is free to send it."""
    if in_flight < 1:
        raise InvalidRequest(f"`--in-flight`: {in_flight} is not above 0.", param="in-flight")
    loop = asyncio.get_running_loop()
    measures, places, chance = Measures(objective), asyncio.Semaphore(in_flight), random.Random(seed)  # noqa: S311

    async def one(due: float, body: bytes) -> None:
        try:
            with clients.lent() as client:
                sample = await _ask(client, target, body, due)
        finally:
            places.release()
        measures.add(sample)
        measures.seconds = loop.time() - start
        measures.driver_seconds = time.process_time() - used
        on_sample(sample)

    async with _Clients(target.key) as clients, asyncio.TaskGroup() as tasks:
        start, used = loop.time(), time.process_time()
        for arrival in arrivals:
            body = _body(target, arrival, chance)
            due = start + arrival.due_seconds
            if paced:
                await asyncio.sleep(max(0.0, due - loop.time()))
            await places.acquire()
            tasks.create_task(one(due if paced else loop.time(), body))
    return measures


class _Clients:
    """A client with one connection for each request that is out at once, used again by later ones.

    One client with many connections looks at all of them for each request: with 64 that was 14 ms of processor time a
    request, against 4 so, and would have been put down to the server.
    """

    def __init__(self, key: str | None) -> None:
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._tls = ssl.create_default_context()
        self._free: list[httpx.AsyncClient] = []
        self._open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._open.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self._open.__aexit__(*raised)

    @contextlib.contextmanager
    def lent(self) -> Iterator[httpx.AsyncClient]:
        """A client that nobody else has."""
        client = self._free.pop() if self._free else self._made()
        try:
            yield client
        finally:
            self._free.append(client)

    def _made(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=1)
        client = httpx.AsyncClient(
            timeout=None,  # noqa: S113 - `_ask` has one for the whole answer.
            limits=limits,
            headers=self._headers,
            verify=self._tls,
            trust_env=False,
        )
        self._open.push_async_callback(client.aclose)
        return client


def _body(target: Target, arrival: Arrival, chance: random.Random) -> bytes:
    """A prompt of about so many tokens (most words are one), unlike the others from its start, so no cache helps."""
    words = " ".join(chance.choices(_WORDS, k=arrival.prompt_tokens))
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": words}],
        "max_tokens": arrival.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    return json.dumps(body, separators=(",", ":")).encode()


async def _ask(client: httpx.AsyncClient, target: Target, body: bytes, due: float) -> Sample:
    """Send one request and read its answer; whatever happens becomes a sample."""
    clock = asyncio.get_running_loop().time
    late = max(0.0, clock() - due)
    try:
        async with (
            asyncio.timeout(target.timeout_seconds),
            client.stream(
                "POST",
                f"{target.url.rstrip('/')}/chat/completions",
                content=body,
                headers={"content-type": "application/json"},
            ) as response,
        ):
            if response.status_code != 200:
                return Sample(str(response.status_code), late)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                return Sample("no_stream", late)
            return await _read(response, due, late)
    except TimeoutError:
        return Sample("timeout", late)
    except httpx.ConnectError:
        return Sample("no_connection", late)
    except (httpx.HTTPError, httpx.StreamError):
        return Sample("cut_off", late)


async def _read(response: httpx.Response, due: float, late: float) -> Sample:
    """Read a stream of events: the first text, the last, and how many tokens it says it had."""
    clock = asyncio.get_running_loop().time
    first = last = None
    pieces, said, done = 0, None, False
    async for data in _events(response):
        if data == b"[DONE]":
            done = True
            continue
        try:
            event = json.loads(data)
            if "error" in event:
                return Sample("error_in_stream", late)
            said = (event.get("usage") or {}).get("completion_tokens", said)
            text = any((choice.get("delta") or {}).get("content") for choice in event.get("choices") or ())
        except (ValueError, AttributeError, TypeError, RecursionError):
            return Sample("garbage", late)
        if text:
            pieces, last = pieces + 1, clock() - due
            first = last if first is None else first
    if not done or first is None:
        return Sample("cut_off" if not done else "empty", late)
    return Sample("ok", late, first, last, said if isinstance(said, int) and 0 < said <= MAX_TOKENS else pieces)


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event as it arrives; a line that does not end is given as it is, and is no JSON."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(rest) > _MAX_LINE_BYTES:
            yield rest
            return
