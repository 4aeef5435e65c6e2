"""The kept connections to one engine, so many at most.

The main rule: an exchange is repeated only if a kept connection proves closed before the engine sent a byte, and
only once; whatever else fails is the caller's to judge.
"""

import asyncio
import math
import ssl
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from app.engines.wire import ConnectFailed, Connection, ConnectionLost, PoolExhausted, Response, TimedOut


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, taken from its URL."""

    host: str
    port: int
    secure: bool

    @classmethod
    def of(cls, url: str) -> "Address":
        """Read scheme, host and port of a URL; raises ValueError naming what is wrong with it."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"an engine's URL starts with http:// or https:// and names a host, unlike {url!r}")
        secure = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if secure else 80), secure)


class Connections:
    """At most `max_connections` connections to one address, kept open between exchanges.

    `max_waiting` callers, by default as many again, may wait `pool_seconds` for one; further ones get `PoolExhausted`
    at once. Nothing is opened before the first exchange.
    """

    def __init__(
        self,
        address: Address,
        *,
        max_connections: int = 128,
        connect_seconds: float = 5.0,
        pool_seconds: float = 2.0,
        max_waiting: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._address = address
        self._max_connections = max_connections
        self._connect_seconds = connect_seconds
        self._pool_seconds = pool_seconds
        self._max_waiting = max_connections if max_waiting is None else max_waiting
        self._tls = tls
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._connecting = 0
        self._waiters: deque[asyncio.Future[Connection | None]] = deque()
        self._closed = False
        self._all_lost = asyncio.Event()
        self.heard_at = -math.inf
        """When the server last sent anything, on the loop's clock."""

    async def exchange(self, request: bytes, deadline: float) -> Response:
        """Send one whole request and return once the response's head is in.

        `deadline` is on the loop's clock. Repeated once, on another connection, when a kept one closes before the
        server sent a byte. Nearly always the server had closed it for its idleness and never saw the request; a
        server that died on this very request looks the same, and the repetition then meets whatever took its place.
        """
        connection = self._rested() or await self._acquire()
        was_kept = connection.was_kept
        try:
            return await connection.exchange(request, deadline)
        except ConnectionLost:
            if not was_kept or connection.received_any or self._closed:
                raise
        # The place of the lost one may be a waiter's by now.
        connection = await self._acquire()
        return await connection.exchange(request, deadline)

    @property
    def open_connections(self) -> int:
        """How many connections are open, busy or idle."""
        return len(self._open)

    @property
    def busy_connections(self) -> int:
        """How many exchanges are under way, those that wait for a connection included."""
        return len(self._open) - len(self._idle) + self._connecting + len(self._waiters)

    def give_up(self, asked_before: float) -> None:
        """End the exchanges that began before that moment of the loop's clock and have brought nothing: `TimedOut`."""
        for connection in list(self._open):
            if connection.is_unanswered and connection.asked_at <= asked_before:
                connection.give_up()

    async def aclose(self) -> None:
        """Cut every connection; exchanges in flight fail with `ConnectionLost`."""
        self._closed = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(ConnectFailed("the engine's connections are closed"))
        self._waiters.clear()
        for connection in list(self._open):
            connection.cut()
        if self._open:
            await self._all_lost.wait()

    def _rested(self) -> Connection | None:
        """Take the idle connection that was used last, if there is one."""
        while self._idle and not self._closed:
            connection = self._idle.pop()
            if not connection.is_closing():
                return connection
        return None

    async def _acquire(self) -> Connection:
        """Open a connection, or wait for one."""
        if self._closed:
            raise ConnectFailed("the engine's connections are closed")
        if len(self._open) + self._connecting >= self._max_connections:
            handed = await self._wait_for_one()
            if handed is not None:
                return handed
        else:
            self._connecting += 1
        return await self._connect()

    async def _wait_for_one(self) -> "Connection | None":
        """Wait for a connection to be handed over, or for None: the right to open one (already counted)."""
        if len(self._waiters) >= self._max_waiting:
            raise PoolExhausted("too many callers wait for a connection to the engine")
        waiter: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._pool_seconds):
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._give_up(waiter.result())
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            if isinstance(error, TimeoutError):
                raise PoolExhausted(f"no connection to the engine was free for {self._pool_seconds} s") from error
            raise

    def _give_up(self, handed: "Connection | None") -> None:
        if handed is None:
            self._connecting -= 1
            self._wake_one()
        else:
            self.release(handed)

    async def _connect(self) -> Connection:
        """Open a connection; the caller has counted it in `_connecting`."""
        address = self._address
        try:
            async with asyncio.timeout(self._connect_seconds):
                if address.secure and self._tls is None:
                    self._tls = await asyncio.to_thread(ssl.create_default_context)
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self), address.host, address.port, ssl=self._tls if address.secure else None
                )
        except TimeoutError as error:
            raise TimedOut(f"no connection within {self._connect_seconds} s") from error
        except OSError as error:
            raise ConnectFailed(f"cannot connect to {address.host}:{address.port}") from error
        finally:
            self._connecting -= 1
            # A failed attempt frees its place; after a success nothing is free and this does nothing.
            self._wake_one()
        if self._closed:
            connection.cut()
            raise ConnectFailed("the engine's connections are closed")
        return connection

    def _wake_one(self) -> None:
        """Give a waiter the right to open a connection, if there is room for one."""
        while self._waiters and len(self._open) + self._connecting < self._max_connections:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._connecting += 1
                waiter.set_result(None)

    def release(self, connection: Connection) -> None:
        """Take a connection back whose exchange is complete: hand it to a waiter or keep it."""
        if self._closed or connection.is_closing() or not connection.can_be_kept:
            connection.cut()
            return
        connection.was_kept = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        self._idle.append(connection)
        connection.rest()

    def opened(self, connection: Connection) -> None:
        """Count a connection that has come up."""
        self._open.add(connection)

    def lost(self, connection: Connection) -> None:
        """Forget a connection that is gone, and let a waiter open another."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._closed and not self._open:
            self._all_lost.set()
        self._wake_one()
