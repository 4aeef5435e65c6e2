"""How responses leave the server: the head together with the first of the body, and nothing kept back for ever."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from starlette.types import Receive, Scope, Send

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


@contextlib.asynccontextmanager
async def connected(app: Slow) -> AsyncIterator[socket.socket]:
    async with serving(app) as url:
        with socket.socket() as connection:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", int(url.rpartition(":")[2])))
            yield connection


async def send(connection: socket.socket, method: str, *headers: str, body: bytes = b"") -> None:
    head = "\r\n".join([f"{method} / HTTP/1.1", "host: x", "connection: close", *headers, "", ""]).encode()
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
