"""How responses leave the server: the head together with the first of the body, and nothing kept back for ever."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.service import serving


class Slow:
    """Sends a head at once, and the body when it may."""

    def __init__(self) -> None:
        self.head_sent = asyncio.Event()
        self.may_go_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        self.head_sent.set()
        await self.may_go_on.wait()
        await send({"type": "http.response.body", "body": b"first ", "more_body": True})
        await send({"type": "http.response.body", "body": b"last"})


class Whole:
    """Sends a response of which all is there."""

    def __init__(self, *headers: tuple[bytes, bytes], status: int = 200, body: bytes = b"all of it") -> None:
        self.headers = headers
        self.status = status
        self.body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


@contextlib.asynccontextmanager
async def connected(app: ASGIApp) -> AsyncIterator[socket.socket]:
    async with serving(app) as url, connected_to(url) as connection:
        yield connection


@contextlib.asynccontextmanager
async def connected_to(url: str) -> AsyncIterator[socket.socket]:
    with socket.socket() as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", int(url.rpartition(":")[2])))
        yield connection


async def send(
    connection: socket.socket, method: str, *headers: str, body: bytes = b"", last: bool = True, version: str = "1.1"
) -> None:
    closing = ["connection: close"] if last else []
    head = "\r\n".join([f"{method} / HTTP/{version}", "host: x", *closing, *headers, "", ""]).encode()
    await asyncio.get_running_loop().sock_sendall(connection, head + body)


async def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    async with asyncio.timeout(50):
        while part := await asyncio.get_running_loop().sock_recv(connection, 65_536):
            received += part
    return received


async def test_a_head_is_sent_with_the_first_of_its_body() -> None:
    app = Slow()
    async with connected(app) as connection:
        await send(connection, "GET")
        await app.head_sent.wait()
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        app.may_go_on.set()
        head, _, body = (await rest(connection)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == b"6\r\nfirst \r\n4\r\nlast\r\n0\r\n\r\n"


async def test_a_response_to_head_is_its_head() -> None:
    app = Slow()
    app.may_go_on.set()
    async with connected(app) as connection:
        await send(connection, "HEAD")
        response = await rest(connection)
    assert response.startswith(b"HTTP/1.1 200 OK\r\n")
    assert response.endswith(b"\r\n\r\n")


async def test_a_client_that_asks_whether_to_go_on_is_told_at_once() -> None:
    app = Slow()
    app.may_go_on.set()
    async with connected(app) as connection:
        await send(connection, "POST", "expect: 100-continue", "content-length: 4")
        async with asyncio.timeout(50):
            told = await asyncio.get_running_loop().sock_recv(connection, 65_536)
        assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(connection, b"body")
        assert (await rest(connection)).endswith(b"first \r\n4\r\nlast\r\n0\r\n\r\n")


async def test_a_whole_response_has_its_headers_in_their_order_and_its_connection_stays() -> None:
    app = Whole((b"content-type", b"text/plain"), (b"x-name", "Zoë".encode("latin-1")), (b"x-tab", b"a\tb"))
    async with connected(app) as connection:
        for last in (False, False, True):
            await send(connection, "GET", last=last)
        head = b"content-type: text/plain\r\nx-name: Zo\xeb\r\nx-tab: a\tb\r\ncontent-length: 9\r\n"
        received = await rest(connection)
    first, second, third = received.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert first == second
    assert first.startswith(b"date: ")
    assert first.endswith(b"GMT\r\n" + head + b"\r\nall of it")
    assert third.endswith(head + b"connection: close\r\n\r\nall of it")  # Which uvicorn says and does.


async def test_a_client_of_an_older_version_is_answered_and_let_go() -> None:
    async with connected(Whole()) as connection:
        await send(connection, "GET", last=False, version="1.0")
        assert (await rest(connection)).endswith(b"content-length: 9\r\nconnection: close\r\n\r\nall of it")


@pytest.mark.parametrize(
    "header", [(b"x-name", b"a\r\nset-cookie: b"), (b"x-name", b"a\nb"), (b"x-name", b"a\0"), (b"x\r\ny", b"a")]
)
async def test_a_header_that_breaks_its_line_is_not_sent(header: tuple[bytes, bytes]) -> None:
    async with connected(Whole(header)) as connection:
        await send(connection, "GET", last=False)  # A response that is put together in one step, were it plain.
        await send(connection, "GET")
        response = await rest(connection)
    assert b"cookie" not in response
    assert b"all of it" not in response


@pytest.mark.parametrize("status", [204, 304])
async def test_a_status_without_a_body_is_sent(status: int) -> None:
    async with connected(Whole(status=status, body=b"")) as connection:
        await send(connection, "GET")
        assert (await rest(connection)).startswith(b"HTTP/1.1 %d " % status)


async def test_a_response_of_another_length_than_it_says_is_broken_off() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"longer"})

    async with connected(app) as connection:
        await send(connection, "GET", last=False)
        assert b"longer" not in await rest(connection)


async def test_the_application_says_that_the_connection_ends() -> None:
    async with connected(Whole((b"connection", b"close"))) as connection:
        await send(connection, "GET", last=False)
        assert (await rest(connection)).endswith(b"connection: close\r\ncontent-length: 9\r\n\r\nall of it")


async def test_an_application_that_fails_between_head_and_body_sends_an_error() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("of our own")

    async with connected(app) as connection:
        await send(connection, "GET")
        response = await rest(connection)
    assert response.startswith(b"HTTP/1.1 500 ")
    assert response.endswith(b"Internal Server Error")


async def test_a_body_without_a_head_sends_an_error() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"all of it"})

    async with connected(app) as connection:
        await send(connection, "GET")
        assert (await rest(connection)).startswith(b"HTTP/1.1 500 ")


async def test_a_connection_is_closed_when_it_was_idle_for_long_enough() -> None:
    async with serving(Whole(), keep_alive_seconds=0.2) as url, connected_to(url) as connection:
        began = asyncio.get_running_loop().time()
        for _ in range(3):  # Each begins the time anew.
            await send(connection, "GET", last=False)
        assert (await rest(connection)).count(b"all of it") == 3
        assert asyncio.get_running_loop().time() - began >= 0.19


async def test_idleness_counts_from_the_last_response() -> None:
    async with serving(Whole(), keep_alive_seconds=2) as url, connected_to(url) as connection:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.get_running_loop().sock_recv(connection, 1)
        sent_at = asyncio.get_running_loop().time()
        await send(connection, "GET", last=False)
        assert (await rest(connection)).endswith(b"all of it")
        assert asyncio.get_running_loop().time() - sent_at >= 1.95


async def test_a_connection_that_is_used_is_not_idle_however_long_its_answer_takes() -> None:
    slow, whole = Slow(), Whole()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (slow if scope["method"] == "POST" else whole)(scope, receive, send)

    async with (
        serving(app, keep_alive_seconds=0.2) as url,
        connected_to(url) as busy,
        connected_to(url) as idle,
    ):
        await send(busy, "GET", last=False)
        async with asyncio.timeout(50):
            first = await asyncio.get_running_loop().sock_recv(busy, 65_536)
        assert first.endswith(b"all of it")
        await send(busy, "POST", last=False)
        await slow.head_sent.wait()
        await send(idle, "GET", last=False)
        assert (await rest(idle)).endswith(b"all of it")  # It is closed, so the time of the other is over as well.
        slow.may_go_on.set()
        assert (await rest(busy)).endswith(b"first \r\n4\r\nlast\r\n0\r\n\r\n")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"POST / HTTP/1.1\r\nx"])
async def test_a_connection_that_sends_no_whole_head_is_closed_like_an_idle_one(sent: bytes) -> None:
    async with serving(Whole(), keep_alive_seconds=0.2) as url, connected_to(url) as connection:
        began = asyncio.get_running_loop().time()
        await asyncio.get_running_loop().sock_sendall(connection, sent)
        assert await rest(connection) == b""
        assert asyncio.get_running_loop().time() - began >= 0.19
