"""A client's connection: how what it sends becomes requests, how their responses leave, how long it is waited for.

It is uvicorn's, with what a request costs left out where that shows.
"""

import asyncio
from collections.abc import Awaitable, Generator
from math import inf

import httptools
from uvicorn._types import ASGISendEvent, HTTPResponseBodyEvent, HTTPResponseStartEvent
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024
"""How long a request's address and headers may be together, and what follows the chunks of a body."""

LEAST_READ_BYTES = 64 * 1024
"""How much of what waits for it a client has to read in the time for which a connection may be idle."""


class _HeadTooLong(Exception):
    """A request's head is over the limit."""


class _HeadWithBody(asyncio.Transport):
    """Writes a response's head together with the first of its body, which is when ASGI wants it sent.

    uvicorn writes it by itself, and uvloop sends every write at once: two packets, and two wake-ups of the client.
    """

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._head:
            self._transport.write(self._head + data)
        else:
            self._head = bytes(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()


_line = b": ".join

_CONTROLS = bytes((*range(9), *range(10, 32), 127))


class _Sent:
    """What is awaited where there is nothing to wait for: a coroutine costs as much as the message."""

    def __await__(self) -> Generator[None, None, None]:
        return iter(())  # type: ignore[return-value]  # A generator that ends at once would cost a coroutine again.


_SENT = _Sent()


class _Cycle(RequestResponseCycle):
    """uvicorn's, but a response begins with one write, and one that is all there is put together in one step.

    uvicorn looks at each header four times and then at the body, which takes a third longer and twice the instructions.
    """

    _start: HTTPResponseStartEvent
    """The head that waits for the first of the body; there once it has come."""

    def send(self, message: ASGISendEvent) -> Awaitable[None]:  # type: ignore[override]  # It is awaited, and no more.
        """Send the head with the first of the body, and whatever is not plain as uvicorn does."""
        # A response to HEAD has no body to wait for.
        if self.response_started or self.scope["method"] == "HEAD":
            return super().send(message)
        if message["type"] == "http.response.start":
            self._start = message
            return _SENT
        if message["type"] != "http.response.body" or not hasattr(self, "_start"):
            return super().send(message)
        if (whole := self._whole(self._start, message)) is None:
            return self._begin(self._start, message)
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(whole)
        self.message_event.set()
        self.on_response()
        return _SENT

    async def _begin(self, start: HTTPResponseStartEvent, message: HTTPResponseBodyEvent) -> None:
        transport = self.transport
        self.transport = _HeadWithBody(transport)
        await super().send(start)
        await super().send(message)
        self.transport = transport

    def _whole(self, start: HTTPResponseStartEvent, message: HTTPResponseBodyEvent) -> bytes | None:
        """The bytes of a response of which all is there; None where it is not, or where uvicorn has to look closer."""
        body, status, headers = message.get("body", b""), start["status"], start.get("headers", ())
        is_ready = self.keep_alive and not self.disconnected and not self.flow.write_paused
        if message.get("more_body") or not is_ready or status in (204, 304):
            return None
        lines = [*map(_line, self.default_headers), *map(_line, headers)]
        text = b"".join(lines)
        if b"connection: " in text or b"transfer-encoding: " in text:
            return None
        if lines[-1:] != [b"content-length: %d" % len(body)] or len(text.translate(None, _CONTROLS)) != len(text):
            return None
        return b"%b%b\r\n\r\n%b" % (STATUS_LINE[status], b"\r\n".join(lines), body)


class ClientConnection(httptools_impl.HttpToolsProtocol):
    """uvicorn's, but one timer watches its idleness as long as it lives, in place of a new one for every response.

    It is idle from its beginning, and again from the end of a response, until a whole request is there; each piece of
    the request's body begins the time anew. Whoever sends half of one and waits does not keep it.
    """

    _idle_since: float | None
    _head_bytes = 0
    """How many bytes have come since a head was complete or a body went on: the next head's, or the trailers'."""
    _reader_timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None
    """What is answered; uvicorn knows the one that came last, which may wait behind it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to be idle."""
        super().connection_made(transport)
        self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever answers, and stop the timers."""
        super().connection_lost(exc)
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        self._unset_keepalive_if_required()
        if self._reader_timer is not None:
            self._reader_timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on, and have a request answered in HTTP/1.1 whatever else it offers to speak."""
        self._head_bytes += len(data)
        rest: bytes | memoryview = data
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as offer:
                    # To the parser such a request has no body, and what follows its head would be one of its own.
                    head = self._head_without_offer()
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # As uvicorn's.
                    self.parser.feed_data(head)
                    rest = memoryview(rest)[offer.args[0] :]
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:  # CONNECT offers without a header.
            if isinstance(error.__context__, _HeadTooLong):
                self._refuse(431, b"The request's head is too long.")
            else:
                self._refuse(400, b"Invalid HTTP request received.")
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, b"The request's head is too long.")
        elif self._idle_since is not None and not self._head_bytes:
            self._idle_since = self.loop.time()  # A head is complete, or a body went on.

    def _refuse(self, status: int, why: bytes) -> None:
        """Say why what came is no request, and close."""
        self.logger.warning(why.decode())
        headers = (
            *self.server_state.default_headers,
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(why)),
            (b"connection", b"close"),
        )
        self.transport.write(b"%b%b\r\n\r\n%b" % (STATUS_LINE[status], b"\r\n".join(map(_line, headers)), why))
        self.transport.close()
        self._rest()

    def _head_without_offer(self) -> bytes:
        start = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [_line(header) for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([start, *lines, b"", b""])

    def _should_upgrade(self) -> bool:
        """Have uvicorn begin nothing with a request that the parser takes for an upgrade: it is read again."""
        return True

    def on_headers_complete(self) -> None:
        """Begin to serve a request, unless its head is too long: one that came with others is measured by itself."""
        if self._head_bytes > MAX_HEAD_BYTES and _length(self.url, self.headers) > MAX_HEAD_BYTES:
            raise _HeadTooLong
        self._head_bytes = 0
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle
        elif len(self.pipeline) == 1:
            self.flow.resume_reading()  # Which uvicorn has paused: it would not be seen that the client leaves.

    def on_body(self, body: bytes) -> None:
        """Keep a piece of a body for whoever reads it, as uvicorn does."""
        self._head_bytes = 0
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Let a request be answered for as long as that takes."""
        if self.parser.should_upgrade() or self.cycle.response_complete:
            return
        self._idle_since = None  # Which the timer will see when it rings.
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """Begin with the request that is next, or to be idle."""
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._running, app = self.pipeline.pop()
                self._start_asgi_task(self._running, app)
                if not self._running.more_body:
                    return
        self._rest()

    def pause_writing(self) -> None:
        """Wait for the client to read on."""
        super().pause_writing()
        self._wait_for_reader(inf)

    def resume_writing(self) -> None:
        """Go on: the client has read nearly all of it."""
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()

    def _wait_for_reader(self, unread_bytes: float) -> None:
        """Cut the connection once too little is read of what waits; closing it would wait for the client again."""
        left_bytes = self.transport.get_write_buffer_size()
        if left_bytes > unread_bytes - LEAST_READ_BYTES:
            self.transport.abort()
        else:
            self._reader_timer = self.loop.call_later(self.timeout_keep_alive, self._wait_for_reader, left_bytes)

    def _rest(self) -> None:
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._ring_in(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it was idle for so long; else look again when it may have been."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        if self.flow.read_paused or self.flow.write_paused:
            self._idle_since = self.loop.time()  # It waits for us, or reads yet, which the other timer watches.
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._ring_in(left)
        elif self.transport.is_closing():
            self.transport.abort()
        else:
            self.transport.close()
            self._ring_in(self.timeout_keep_alive)  # Unless all that was written is read by then.

    def _ring_in(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)


def _length(url: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    return len(url) + sum(len(name) + len(value) + 4 for name, value in headers)


httptools_impl.RequestResponseCycle = _Cycle  # type: ignore[misc]  # Nothing takes the class to make.
