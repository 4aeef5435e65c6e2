"""What a client may send, and how long it is waited for: offers to upgrade, long heads, half requests, no reading."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from app.connections import MAX_HEAD_BYTES
from tests.service import serving, until

OFFER = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQBAAAAAAIAAAAA\r\n"
"""What Java's HttpClient and `curl --http2` send with their first request."""


class Echo:
    """Answers with each request's method, path and body, and notes them."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        else:
            return
        self.bodies.append(body)
        said = f"{scope['method']} {scope['path']} ".encode() + body
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
        await send({"type": "http.response.body", "body": said})


class Client:
    """One connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *parts: str | bytes) -> None:
        """Send each part in a packet of its own, which the server has taken before the next is sent."""
        for part in parts:
            self.writer.write(part.encode() if isinstance(part, str) else part)
            await self.writer.drain()
            # The server runs on this loop: it reads what has come whenever the loop turns.
            for _ in range(20):
                await asyncio.sleep(0)

    async def response(self) -> tuple[int, bytes]:
        """Read one response with a length: its status and body."""
        async with asyncio.timeout(50):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            return int(head.split(b" ")[1]), await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        async with asyncio.timeout(50):
            return await self.reader.read()


@contextlib.asynccontextmanager
async def connected_to(url: str) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(app: ASGIApp, *, keep_alive_seconds: float = 600) -> AsyncIterator[Client]:
    async with serving(app, keep_alive_seconds=keep_alive_seconds) as url, connected_to(url) as client:
        yield client


def post(path: str, *, offer: str = OFFER, length: int = 5) -> str:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{offer}content-length: {length}\r\n\r\n"


CHUNKED = f"POST /a HTTP/1.1\r\nhost: x\r\n{OFFER}transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [post("/a") + "hello"],
        [post("/a"), "hello"],
        [post("/a") + "he", "llo"],
        [post("/a")[:90], post("/a")[90:] + "hello"],
        [CHUNKED + "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"],
        [CHUNKED, "2\r\nhe\r\n", "3\r\nll", "o\r\n0\r\n\r\n"],
    ],
    ids=["one-packet", "head-and-body", "body-in-two", "head-in-two", "chunked", "chunked-in-four"],
)
async def test_a_request_that_offers_to_upgrade_is_answered_like_any_other(parts: Sequence[str]) -> None:
    async with connected(Echo()) as client:
        for _ in range(2):  # Its connection stays.
            await client.send(*parts)
            assert await client.response() == (200, b"POST /a hello")


async def test_a_body_is_no_request_of_its_own_whatever_its_head_offers() -> None:
    inner = "GET /inner HTTP/1.1\r\nhost: x\r\n\r\n"
    echo = Echo()
    async with connected(echo) as client:
        await client.send(post("/outer", length=len(inner)), inner)
        await client.send("GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert await client.response() == (200, b"POST /outer " + inner.encode())
        assert await client.response() == (200, b"GET /last ")
        assert await client.rest() == b""
    assert echo.bodies == [inner.encode(), b""]


async def test_many_requests_that_offer_to_upgrade_come_in_one_packet() -> None:
    async with connected(Echo()) as client:
        await client.send("".join(f"{post(f'/{n}')}{n:05}" for n in range(300)))
        for n in range(300):
            assert await client.response() == (200, f"POST /{n} {n:05}".encode())


@pytest.mark.parametrize("offer", ["websocket", "h2c", "anything"])
async def test_whoever_closes_after_an_offer_gets_the_answer_first(offer: str) -> None:
    async with connected(Echo()) as client:
        await client.send(f"GET /a HTTP/1.1\r\nhost: x\r\nconnection: close, upgrade\r\nupgrade: {offer}\r\n\r\n")
        assert await client.response() == (200, b"GET /a ")
        assert await client.rest() == b""


async def test_a_request_for_a_tunnel_is_refused_and_nothing_in_it_answered() -> None:
    echo = Echo()
    async with connected(echo) as client:
        await client.send("CONNECT x:80 HTTP/1.1\r\nhost: x:80\r\n\r\nGET /inner HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.response())[0] == 400
        assert await client.rest() == b""
    assert echo.bodies == []


def get(*, head_bytes: int, end: str = "\r\n\r\n") -> str:
    """A request whose address and headers are so long, with the colon and the ends of their lines."""
    headers = ("host: x\r\nx-long: ", "\r\n\r\n")
    return "GET / HTTP/1.1\r\n" + headers[0] + "a" * (head_bytes - 1 - len(headers[0]) - 2) + end


async def test_a_head_is_taken_up_to_its_limit_in_however_many_packets() -> None:
    whole = get(head_bytes=MAX_HEAD_BYTES - 100)
    async with connected(Echo()) as client:
        for parts in ([whole], [whole[:100], whole[100:50_000], whole[50_000:]], [whole]):
            await client.send(*parts)
            assert await client.response() == (200, b"GET / ")


@pytest.mark.parametrize("end", ["\r\n\r\n", ""], ids=["complete", "going-on"])
async def test_a_longer_head_is_refused_and_its_connection_closed(end: str) -> None:
    echo = Echo()
    async with connected(echo) as client:
        await client.send(get(head_bytes=MAX_HEAD_BYTES + 10, end=end))
        assert await client.response() == (431, b"The request's head is too long.")
        assert await client.rest() == b""
    assert echo.bodies == []


async def test_a_long_address_counts_as_the_headers_do() -> None:
    async with connected(Echo()) as client:
        await client.send(f"GET /{'a' * (MAX_HEAD_BYTES - 4)}")
        assert (await client.response())[0] == 431


async def test_what_follows_the_chunks_of_a_body_is_as_limited_as_a_head() -> None:
    async with connected(Echo()) as client:
        chunks = "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"
        await client.send(chunks, "x-long: " + "a" * (MAX_HEAD_BYTES - 7))
        assert (await client.response())[0] == 431


async def test_a_long_body_and_many_requests_in_one_packet_are_no_long_head() -> None:
    body = "b" * (3 * MAX_HEAD_BYTES)
    async with connected(Echo()) as client:
        await client.send(post("/a", offer="", length=len(body)) + body + "GET /b HTTP/1.1\r\nhost: x\r\n\r\n" * 3_000)
        assert await client.response() == (200, b"POST /a " + body.encode())
        for _ in range(3_000):
            assert await client.response() == (200, b"GET /b ")


async def test_what_is_no_http_is_a_400() -> None:
    async with connected(Echo()) as client:
        await client.send("hello\r\n\r\n")
        assert await client.response() == (400, b"Invalid HTTP request received.")
        assert await client.rest() == b""


class Long:
    """Sends a long body: in pieces or, as one that is all there, in one."""

    def __init__(self, *, pieces: int, piece_bytes: int) -> None:
        self.pieces = pieces
        self.piece = b"a" * piece_bytes
        self.ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = b"%d" % (self.pieces * len(self.piece))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for left in reversed(range(self.pieces)):
            await send({"type": "http.response.body", "body": self.piece, "more_body": left > 0})
        self.ended.set()


@pytest.mark.parametrize("closing", ["", "connection: close\r\n"], ids=["stays", "closes"])
@pytest.mark.parametrize(("pieces", "piece_bytes"), [(200, 200_000), (1, 40_000_000)], ids=["streamed", "whole"])
async def test_a_client_that_stops_reading_is_cut_off(pieces: int, piece_bytes: int, closing: str) -> None:
    app = Long(pieces=pieces, piece_bytes=piece_bytes)
    async with connected(app, keep_alive_seconds=0.2) as client:
        await client.send(f"GET / HTTP/1.1\r\nhost: x\r\n{closing}\r\n")

        async def is_cut() -> bool:
            client.writer.write(b"\r\n")  # Which may stand between requests.
            return client.writer.transport.is_closing()

        await until(is_cut)
        async with asyncio.timeout(50):
            await app.ended.wait()


async def test_a_client_that_reads_on_is_waited_for_however_long_it_takes() -> None:
    app = Long(pieces=1, piece_bytes=40_000_000)
    async with connected(app, keep_alive_seconds=1) as client:
        await client.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await client.reader.readuntil(b"\r\n\r\n")
        loop, read_bytes = asyncio.get_running_loop(), 0
        ends_at = loop.time() + 2.5

        async def is_late() -> bool:
            nonlocal read_bytes
            read_bytes += len(await client.reader.readexactly(400_000))
            return loop.time() > ends_at

        await until(is_late)
        async with asyncio.timeout(50):
            await client.reader.readexactly(40_000_000 - read_bytes)


HALVES = {
    "head-alone": [post("/a", offer="")],
    "body-begun": [post("/a", offer="") + "he"],
    "in-two": [post("/a", offer=""), "he"],
    "chunk-begun": [CHUNKED + "5\r\nhe"],
    "last-chunk-missing": [CHUNKED + "5\r\nhello\r\n"],
}


@pytest.mark.parametrize("parts", HALVES.values(), ids=HALVES)
async def test_a_client_that_sends_half_of_a_request_is_let_go_like_an_idle_one(parts: Sequence[str]) -> None:
    async with connected(Echo(), keep_alive_seconds=0.2) as client:
        await client.send(*parts)
        assert await client.rest() == b""


@pytest.mark.parametrize("packets", [1, 2])
async def test_half_of_a_request_behind_another_is_let_go_too(packets: int) -> None:
    parts = [post("/a", offer="") + "hello", post("/b", offer="") + "he"]
    async with connected(Echo(), keep_alive_seconds=0.2) as client:
        await client.send(*(parts if packets == 2 else ["".join(parts)]))
        assert await client.response() == (200, b"POST /a hello")
        assert await client.rest() == b""


async def test_each_piece_of_a_body_begins_the_time_anew() -> None:
    loop = asyncio.get_running_loop()
    async with connected(Echo(), keep_alive_seconds=1) as client:
        await client.send(post("/a", offer="", length=1_000_000))
        ends_at, sent_bytes = loop.time() + 2.5, 0

        async def is_late() -> bool:
            nonlocal sent_bytes
            await client.send(b"b")
            sent_bytes += 1
            return loop.time() > ends_at

        await until(is_late)
        await client.send(b"b" * (1_000_000 - sent_bytes))
        assert await client.response() == (200, b"POST /a " + b"b" * 1_000_000)


async def test_a_client_whose_body_is_not_read_yet_is_not_idle() -> None:
    echo, may_read = Echo(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await may_read.wait()
        await echo(scope, receive, send)

    body = "b" * 1_000_000
    async with serving(app, keep_alive_seconds=0.2) as url, connected_to(url) as busy, connected_to(url) as idle:
        sending = asyncio.create_task(busy.send(post("/slow", offer="", length=len(body)) + body))
        await idle.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await idle.rest()).endswith(b"GET / ")  # It is closed, so the time of the other is over as well.
        may_read.set()
        await sending
        assert await busy.response() == (200, b"POST /slow " + body.encode())


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading."""
    await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


async def test_an_answer_that_does_not_wait_for_the_body_leaves_the_connection_to_its_time() -> None:
    async with connected(refuse, keep_alive_seconds=0.2) as client:
        await client.send(post("/a", offer="", length=10), "he")
        assert await client.response() == (413, b"")
        assert await client.rest() == b""


async def test_what_is_left_of_an_answered_request_s_body_is_passed_over() -> None:
    async with connected(refuse, keep_alive_seconds=0.2) as client:
        for _ in range(2):
            await client.send(post("/a", offer=""))
            assert await client.response() == (413, b"")
            await client.send("hel", "lo")
        assert await client.rest() == b""


@pytest.mark.parametrize("waiting", [0, 1])
async def test_it_is_seen_that_a_client_leaves_also_when_its_next_request_waits(waiting: int) -> None:
    began, left = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"] == "/first"
        await receive()
        began.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async with connected(app) as client:
        await client.send("GET /first HTTP/1.1\r\nhost: x\r\n\r\n")
        await began.wait()
        await client.send("GET /next HTTP/1.1\r\nhost: x\r\n\r\n" * waiting)
        client.writer.close()
        async with asyncio.timeout(50):
            await left.wait()


async def test_requests_that_come_before_their_turn_are_answered_in_their_order() -> None:
    async with connected(Echo()) as client:
        await client.send("".join(post(f"/{n}", offer="") + "hello" for n in range(5)))
        for n in range(5):
            assert await client.response() == (200, f"POST /{n} hello".encode())
