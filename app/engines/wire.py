"""The bytes between the gateway and an engine: one HTTP/1.1 connection and the response read from it.

Written here because a streamed answer makes one wake-up per token: httptools parses, one future wakes the reader,
and a deadline is a number compared by one lazy timer per connection, never a timer per read. The main rule: a
connection goes back to its pool only when its response was read to the end; in every other case it is cut at once,
because a closed connection is the only way to tell an engine to stop working.
"""

import asyncio
import socket
from collections.abc import Awaitable, Mapping
from typing import Protocol, cast

import httptools

_PAUSE_READING_BYTES = 256 * 1024
_MAX_HEAD_BYTES = 64 * 1024
_IDLE_SECONDS = 60.0
_FOREVER = float("inf")


class WireError(Exception):
    """The exchange failed below the engine's protocol."""


class ConnectFailed(WireError):
    """No connection could be made."""


class PoolExhausted(WireError):
    """Every connection stayed busy for too long, or too many callers wait already."""


class TimedOut(WireError):
    """A deadline passed: connecting, or waiting for bytes."""


class ConnectionLost(WireError):
    """The connection closed before the response was complete."""


class BadResponse(WireError):
    """What came back is not HTTP/1.1, or is over a limit."""


class Owner(Protocol):
    """What a connection tells the pool it belongs to."""

    heard_at: float
    """When any of its connections last received bytes, on the loop's clock."""

    def opened(self, connection: "Connection") -> None:
        """It has come up."""
        ...

    def release(self, connection: "Connection") -> None:
        """Its exchange is complete."""
        ...

    def lost(self, connection: "Connection") -> None:
        """It is gone."""
        ...


class Connection(asyncio.Protocol):
    """One connection: parses what arrives, wakes one reader, watches one deadline."""

    def __init__(self, pool: Owner) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = _FOREVER
        self._deadline = _FOREVER
        self._busy = False
        self.was_kept = False
        self.asked_at = 0.0
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        # The parser fills these itself: a method of ours would be a call for each of a dozen headers and every token.
        self.on_header = self._headers.__setitem__
        self.on_body = self._parts.append
        self._reset()
        self._parser = httptools.HttpResponseParser(self)

    def _reset(self) -> None:
        self.status = 0
        self.headers: Mapping[bytes, bytes] = {}
        self._headers.clear()
        self.received_any = False
        self.is_complete = False
        self.can_be_kept = False
        self._has_head = False
        self._has_length = False
        self._head_bytes = 0
        self._parts.clear()
        self.buffered_bytes = 0
        self._is_paused = False
        self._error: WireError | None = None

    def is_closing(self) -> bool:
        """Whether it can carry no further exchange."""
        return self._transport is None or self._transport.is_closing()

    @property
    def is_unanswered(self) -> bool:
        """Whether a request was sent and no byte has come back."""
        return self._busy and not self.received_any

    # What the pool and the response call.

    async def exchange(self, request: bytes, deadline: float) -> "Response":
        """Send a request and return once the response's head is in."""
        self._reset()
        self._busy = True
        self.asked_at = self._loop.time()
        if self._transport is None:
            self._busy = False
            raise ConnectionLost("the connection was closed while idle")
        self._transport.write(request)
        try:
            while not self._has_head:
                await self._arrival(deadline)
        except BaseException:
            self.cut()
            raise
        return Response(self)

    async def chunk(self, deadline: float, *, cut_when_late: bool = True) -> bytes:
        """Return the body bytes that have arrived; see `Response.chunk`."""
        while not self._parts:
            if self.is_complete:
                return b""
            await self._arrival(deadline, cut_when_late=cut_when_late)
        return self.take()

    def take(self) -> bytes:
        """Return the body bytes that are here."""
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self.buffered_bytes = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    def finish(self) -> None:
        """Give the connection back if its response is complete and its reading is not paused, else cut it."""
        if self.is_complete and not self._is_paused:
            self._busy = False
            self._pool.release(self)
        else:
            self.cut()

    def rest(self) -> None:
        """Wait in the pool; cut after a minute of idleness."""
        self._watch(self._loop.time() + _IDLE_SECONDS)

    def give_up(self) -> None:
        """Tell the one who waits for an answer that it took too long, and close."""
        self._fail(TimedOut("no bytes in time"))

    def cut(self) -> None:
        """Close at once, sending nothing more."""
        self._deadline = _FOREVER
        if self._transport is not None:
            self._transport.abort()

    # Waiting and deadlines.

    def _arrival(self, deadline: float, *, cut_when_late: bool = True) -> asyncio.Future[None]:
        """What is done when something has arrived, or nothing will; raises why nothing will, if that is known."""
        if self._error is not None:
            raise self._error
        self._watch(deadline)
        self._cut_when_late = cut_when_late
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def _wake(self, error: WireError | None = None) -> None:
        waiter, self._waiter = self._waiter, None
        self._deadline = _FOREVER
        if waiter is None or waiter.done():
            return
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)

    def _watch(self, deadline: float) -> None:
        """Watch a deadline with the one timer: it is only re-armed when it would ring too late."""
        self._deadline = deadline
        if deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._ring)
            self._timer_at = deadline

    def _ring(self) -> None:
        self._timer = None
        self._timer_at = _FOREVER
        if self._deadline == _FOREVER:
            return
        if self._loop.time() < self._deadline:
            self._watch(self._deadline)
        elif self._waiter is None:
            # Idle for long enough.
            self.cut()
        elif self._cut_when_late:
            self._fail(TimedOut("no bytes in time"))
        else:
            self._wake(TimedOut("no end in time"))

    def _fail(self, error: WireError) -> None:
        self._error = self._error or error
        self._wake()
        self.cut()

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the pool; small writes go out at once."""
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._pool.opened(self)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived and wake the reader once."""
        if not self._busy or self.is_complete:
            # Bytes nobody asked for: the connection cannot be trusted with another exchange.
            self.can_be_kept = False
            self.cut()
            return
        self.received_any = True
        self._pool.heard_at = self._loop.time()
        if not self._has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(BadResponse("the answer is not HTTP/1.1"))
            return
        if not self._has_head and self._head_bytes > _MAX_HEAD_BYTES:
            self._fail(BadResponse(f"the response's head is longer than {_MAX_HEAD_BYTES} bytes"))
        else:
            self.buffered_bytes += len(data)
            if self.buffered_bytes > _PAUSE_READING_BYTES and not self._is_paused and self._transport is not None:
                self._is_paused = True
                self._transport.pause_reading()
            if self._has_head:
                self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the reader and the pool."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._busy and not self.is_complete:
            if self._has_head and not self._has_length and self._error is None and exc is None:
                # Without a length or chunks the end of the connection is the end of the body.
                self.is_complete = True
            else:
                self._error = self._error or ConnectionLost("the connection closed before the answer was complete")
        self._wake()
        self._pool.lost(self)

    # httptools' callbacks.

    def on_headers_complete(self) -> None:
        """Note status and headers; interim (1xx) responses are passed over."""
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status
            headers = self._headers
            if not b"".join(headers).islower():  # Most servers write them so.
                headers = {name.lower(): value for name, value in headers.items()}
            self.headers = headers
            self._has_length = b"content-length" in headers or b"transfer-encoding" in headers
            self._has_head = True
        else:
            self._headers.clear()

    def on_message_complete(self) -> None:
        """Note that the response is whole."""
        if self._has_head:
            self.is_complete = True
            self.can_be_kept = self._parser.should_keep_alive()


class Response:
    """One response, whose body arrives in pieces; `close` it in every case."""

    __slots__ = ("_connection", "content_type", "retry_after", "status")

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection
        self.status = connection.status
        self.content_type = connection.headers.get(b"content-type", b"")
        self.retry_after = connection.headers.get(b"retry-after", b"")

    def chunk(self, deadline: float) -> Awaitable[bytes]:
        """Give all body bytes that have arrived, waiting for some until the loop's clock shows `deadline`.

        Empty bytes mean that the body is complete. Awaiting it raises ConnectionLost, TimedOut or BadResponse.
        """
        return self._connection.chunk(deadline) if self._connection else _nothing()

    def arrived(self, *, max_bytes: int) -> bytes:
        """Take the rest of the body if all of it is here, which costs no coroutine; nothing where it is to be read."""
        connection = self._connection
        if connection is not None and connection.is_complete and connection.buffered_bytes <= max_bytes:
            return connection.take()
        return b""

    async def read(self, deadline: float, *, max_bytes: int) -> bytes:
        """Return the rest of the body; raises BadResponse when it is longer than `max_bytes`."""
        parts: list[bytes] = []
        total = 0
        while part := await self.chunk(deadline):
            total += len(part)
            if total > max_bytes:
                raise BadResponse(f"the body is longer than {max_bytes} bytes")
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def beginning(self, deadline: float, *, max_bytes: int) -> bytes:
        """Return the rest of the body, or the first `max_bytes` of a longer one."""
        body = b""
        while len(body) < max_bytes and (part := await self.chunk(deadline)):
            body += part
        return body[:max_bytes]

    async def linger(self, seconds: float) -> None:
        """Wait a moment for the end of a body whose content is known to be over, so that its connection is kept."""
        connection = self._connection
        if connection is None or connection.is_complete:
            return
        try:
            deadline = asyncio.get_running_loop().time() + seconds
            while await connection.chunk(deadline, cut_when_late=False):
                pass
        except WireError:
            # The answer is already whole: a connection that will not end is dropped by `close`.
            return

    def close(self) -> None:
        """Release the connection if the body is complete, else cut it, which stops the engine's work."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.finish()


async def _nothing() -> bytes:
    return b""
