"""The pool and its connections: bounds, deadlines, back-pressure, and what becomes of a connection."""

import asyncio
import contextlib
import socket
import ssl
import subprocess

import pytest

from app.engines.connections import Address, Connections
from app.engines.wire import (
    BadResponse,
    ConnectFailed,
    ConnectionLost,
    PoolExhausted,
    TimedOut,
)
from tests.fake_tgi import Drop, FakeTGI, Hang, Reply, Tokens
from tests.service import until

BODY = b'{"messages":[]}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
GET = b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


def soon(seconds=5.0):
    return asyncio.get_running_loop().time() + seconds


async def fetch(pool, request=POST, *, seconds=5.0, max_bytes=1 << 20):
    response = await pool.exchange(request, soon(seconds))
    try:
        return response.status, await response.read(soon(seconds), max_bytes=max_bytes)
    finally:
        response.close()


async def test_no_more_connections_are_opened_than_allowed():
    async with FakeTGI() as tgi:
        pool = Connections(Address.of(tgi.url), max_connections=3, pool_seconds=5)
        answers = await asyncio.gather(*(fetch(pool) for _ in range(6)))
        assert {status for status, _ in answers} == {200}
        assert (tgi.connections, pool.open_connections) == (3, 3)
        await pool.aclose()
        assert pool.open_connections == 0


async def test_waiting_callers_are_served_in_order():
    gates = [asyncio.Event() for _ in range(4)]
    async with FakeTGI(*(Tokens(str(i), gate=gate) for i, gate in enumerate(gates))) as tgi:
        pool = Connections(Address.of(tgi.url), max_connections=2, pool_seconds=5)
        done = []

        async def one(name):
            await fetch(pool)
            done.append(name)

        tasks = []
        for name in "abcd":
            tasks.append(asyncio.create_task(one(name)))
            await asyncio.sleep(0)
        await tgi.until(lambda: len(tgi.requests) == 2)
        for gate in gates:
            gate.set()
        await asyncio.gather(*tasks)
        assert done.index("c") < done.index("d")
        await pool.aclose()


async def test_a_full_waiting_room_refuses_at_once_and_a_place_is_waited_for_only_so_long():
    async with FakeTGI(default=Hang()) as tgi:
        pool = Connections(Address.of(tgi.url), max_connections=1, pool_seconds=0.2)
        busy = asyncio.create_task(fetch(pool))
        await tgi.until(lambda: len(tgi.requests) == 1)
        waiting = asyncio.create_task(fetch(pool))
        await asyncio.sleep(0)
        with pytest.raises(PoolExhausted, match="too many"):
            await fetch(pool)
        with pytest.raises(PoolExhausted, match=r"0\.2 s"):
            await waiting
        busy.cancel()
        await asyncio.wait([busy])
        await pool.aclose()


async def test_a_waiter_that_leaves_as_it_is_served_passes_its_connection_on():
    async with FakeTGI() as tgi:
        pool = Connections(Address.of(tgi.url), max_connections=1, pool_seconds=5)
        response = await pool.exchange(POST, soon())
        await response.read(soon(), max_bytes=1 << 20)
        leaving = asyncio.create_task(fetch(pool))
        await asyncio.sleep(0)
        response.close()
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        assert (await fetch(pool))[0] == 200
        assert tgi.connections == 1
        await pool.aclose()


async def test_a_place_is_free_again_after_a_connection_was_cut():
    async with FakeTGI(Hang(), Hang()) as tgi:
        pool = Connections(Address.of(tgi.url), max_connections=1, pool_seconds=5)
        for _ in range(2):
            with pytest.raises(TimedOut):
                await fetch(pool, seconds=0.05)
        assert (await fetch(pool))[0] == 200
        assert tgi.connections == 3
        await pool.aclose()


async def test_a_failed_attempt_to_connect_frees_its_place_for_the_next_waiter():
    async with FakeTGI() as tgi:
        address = Address.of(tgi.url)
    pool = Connections(address, max_connections=1, pool_seconds=5)
    results = await asyncio.gather(*(fetch(pool) for _ in range(2)), return_exceptions=True)
    assert [type(result) for result in results] == [ConnectFailed, ConnectFailed]
    await pool.aclose()


async def test_a_stale_connection_is_retried_once_and_a_fresh_one_never():
    async with FakeTGI() as tgi:
        pool = Connections(Address.of(tgi.url))
        await fetch(pool)
        tgi.script(Drop(), Drop(), Tokens("never asked"))
        with pytest.raises(ConnectionLost):
            await fetch(pool)
        assert len(tgi.requests) == 3
        assert len(tgi.acts) == 1
        await pool.aclose()


async def test_a_repetition_takes_no_place_that_a_waiter_has_got():
    peak = 0

    class Counting(FakeTGI):
        def joined(self, link):
            nonlocal peak
            super().joined(link)
            peak = max(peak, self.open_connections)

    gate = asyncio.Event()
    async with Counting() as tgi:
        pool = Connections(Address.of(tgi.url), max_connections=1, pool_seconds=5)
        await fetch(pool)
        tgi.script(Drop(gate=gate))
        repeated = asyncio.create_task(fetch(pool))
        await tgi.until(lambda: len(tgi.requests) == 2)
        waiting = asyncio.create_task(fetch(pool))
        await asyncio.sleep(0)
        gate.set()
        assert [status for status, _ in await asyncio.gather(repeated, waiting)] == [200, 200]
        assert peak == 1
        await pool.aclose()


async def test_after_the_first_byte_nothing_is_retried():
    async with FakeTGI() as tgi:
        pool = Connections(Address.of(tgi.url))
        await fetch(pool)
        tgi.script(Reply(b"HTTP/1.1 200 OK\r\ncontent-", framing="raw"), Tokens("never asked"))
        with pytest.raises(ConnectionLost):
            await fetch(pool)
        assert len(tgi.acts) == 1
        await pool.aclose()


async def test_a_body_over_the_limit_is_not_read_to_its_end():
    endless = Reply(b"x" * 300_000, b"", gates={1: asyncio.Event()})
    async with FakeTGI(endless) as tgi:
        pool = Connections(Address.of(tgi.url))
        with pytest.raises(BadResponse, match="200000"):
            await fetch(pool, max_bytes=200_000)
        await tgi.until(lambda: tgi.open_connections == 0)
        await pool.aclose()


async def test_a_reader_that_falls_behind_slows_the_engine_down():
    """The server's writes stall while nobody reads, and everything arrives once somebody does."""
    total, sent = 64 * 1024 * 1024, 0

    async def serve(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        while sent < total:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()
        writer.close()
        finished.set()

    finished = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    pool = Connections(Address("127.0.0.1", server.sockets[0].getsockname()[1], secure=False))
    response = await pool.exchange(GET, soon())
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.1)
    assert sent < total // 2
    read = 0
    while chunk := await response.chunk(soon()):
        read += len(chunk)
    assert read == total
    response.close()
    await asyncio.wait_for(finished.wait(), 5)
    await pool.aclose()
    server.close()
    await server.wait_closed()


async def test_a_response_that_is_whole_but_was_too_much_to_be_read_costs_the_connection():
    rest, asked_again = 256 * 1024 + 1, asyncio.Event()  # With the last byte there is too much.

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        if not asked_again.is_set():
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n1" % (rest + 1))
            await first_read.wait()
            writer.write(b"x" * rest)
            await reader.read()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    first_read = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    pool = Connections(Address("127.0.0.1", server.sockets[0].getsockname()[1], secure=False))
    response = await pool.exchange(GET, soon())
    assert await response.chunk(soon()) == b"1"
    (connection,) = pool._open
    first_read.set()

    async def is_whole():
        return connection.is_complete

    await until(is_whole)
    response.close()
    asked_again.set()
    assert await fetch(pool, GET) == (200, b"ok")
    await pool.aclose()
    server.close()


async def test_an_interim_response_is_passed_over():
    raw = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    async with FakeTGI(Reply(raw, framing="raw")) as tgi:
        pool = Connections(Address.of(tgi.url))
        assert await fetch(pool) == (200, b"ok")
        await pool.aclose()


@pytest.mark.parametrize("header", [b"connection: close\r\n", b""])
async def test_a_connection_is_kept_only_if_the_server_keeps_it(header):
    version = b"HTTP/1.1" if header else b"HTTP/1.0"
    raw = version + b" 200 OK\r\n" + header + b"content-length: 2\r\n\r\nok"
    async with FakeTGI(Reply(raw, b"", framing="raw", gates={1: asyncio.Event()})) as tgi:
        pool = Connections(Address.of(tgi.url))
        assert await fetch(pool) == (200, b"ok")
        assert await fetch(pool, GET) == (200, b"")
        assert tgi.connections == 2
        await pool.aclose()


async def test_bytes_nobody_asked_for_cost_the_connection():
    raw = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    more = asyncio.Event()
    gates = {1: more, 2: asyncio.Event()}
    async with FakeTGI(Reply(raw, b"HTTP/1.1 200 OK\r\n", b"", framing="raw", gates=gates)) as tgi:
        pool = Connections(Address.of(tgi.url))
        assert await fetch(pool) == (200, b"ok")
        more.set()
        await tgi.until(lambda: tgi.open_connections == 0)
        assert (await fetch(pool))[0] == 200
        await pool.aclose()


async def test_connecting_gives_up_in_time():
    # The queue of the listening socket is kept full, so that the kernel answers a further attempt with silence.
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        pool = Connections(Address("127.0.0.1", listening.getsockname()[1], secure=False), connect_seconds=0.2)
        begun = loop.time()
        with pytest.raises(TimedOut):
            await pool.exchange(GET, soon())
        assert loop.time() - begun < 2
        await pool.aclose()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *kind, *name, "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed: no certificate to test TLS with")
    return key, cert


async def test_tls_is_spoken_and_the_certificate_checked(certificate):
    key, cert = certificate
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(cert, key)

    async def serve(reader, writer):
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=ours)
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1], secure=True)
    trusting = Connections(address, tls=ssl.create_default_context(cafile=cert))
    assert [await fetch(trusting, GET) for _ in range(2)] == [(200, b"ok")] * 2
    assert trusting.open_connections == 1
    wary = Connections(address)
    with pytest.raises(ConnectFailed):
        await fetch(wary, GET)
    await trusting.aclose()
    await wary.aclose()
    server.close()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h", Address("h", 80, secure=False)),
        ("https://h", Address("h", 443, secure=True)),
        ("https://h:8443/v1", Address("h", 8443, secure=True)),
        ("http://[::1]:3000", Address("::1", 3000, secure=False)),
    ],
)
def test_an_address_is_read_off_a_url(url, address):
    assert Address.of(url) == address
