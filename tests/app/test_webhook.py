"""The webhook: signed as its receiver can check, and never led into the network that the worker stands in."""

import asyncio
import hmac
import json
import shutil
import socket
import ssl
import subprocess
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from app.alerts.addresses import Forbidden, Policy, closed
from app.alerts.webhook import NotDelivered, Webhook, read_secret, signature

KEY = b"k" * 32
SECRET = "whsec_" + b64encode(KEY).decode()
PUBLIC = "93.184.215.14"


@dataclass
class Names:
    """A resolver that says what it is told to, and how often it was asked."""

    answers: list[Sequence[str]]
    asked: list[tuple[str, int]] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


@dataclass
class Receiver:
    """A server that keeps what it got, and answers as it is told."""

    status: int = 200
    headers: str = ""
    port: int = 0
    hangs: bool = False
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    taking: set["asyncio.Task[None] | None"] = field(default_factory=set)

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taking.add(asyncio.current_task())
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {"": first, **dict(line.lower().split(": ", 1) for line in lines)}
            headers["webhook-signature"] = next(line.split(": ")[1] for line in lines if "signature" in line.lower())
            self.got.append((headers, await reader.readexactly(int(headers["content-length"]))))
            if self.hangs:
                await self.over.wait()
                return
            writer.write(f"HTTP/1.1 {self.status} X\r\n{self.headers}content-length: 2\r\n\r\nok".encode())
            await writer.drain()
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@asynccontextmanager
async def listening(receiver: Receiver, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    server = await asyncio.start_server(receiver.take, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        receiver.over.set()
        await asyncio.gather(*filter(None, receiver.taking), return_exceptions=True)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with listening(Receiver()) as receiver:
        yield receiver


def webhook(url: str, *, allow: Sequence[str] = ("127.0.0.1",), **options: object) -> Webhook:
    return Webhook(url, KEY, Policy(allow), **options)  # type: ignore[arg-type]


# --- the signature ---


def verified(secret: str, headers: dict[str, str], body: bytes, now: float, *, window: float = 300.0) -> bool:
    """What docs/alerts.md tells a receiver to do."""
    timestamp = int(headers["webhook-timestamp"])
    if abs(now - timestamp) > window:
        return False
    signed = f"{headers['webhook-id']}.{timestamp}.".encode() + body
    key = b64decode(secret.removeprefix("whsec_"))
    expected = "v1," + b64encode(hmac.new(key, signed, "sha256").digest()).decode()
    return any(hmac.compare_digest(expected, each) for each in headers["webhook-signature"].split(" "))


async def test_what_arrives_is_signed_so_that_its_receiver_can_check(receiver: Receiver) -> None:
    body = json.dumps({"type": "alert.firing"}).encode()
    hook = webhook(f"http://127.0.0.1:{receiver.port}/hooks/1?token=t", clock=lambda: 1_700_000_000.9)
    await hook.send("id-1", body)
    ((headers, got),) = receiver.got
    assert headers[""] == "POST /hooks/1?token=t HTTP/1.1"
    assert (headers["host"], headers["content-type"]) == (f"127.0.0.1:{receiver.port}", "application/json")
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == ("id-1", "1700000000")
    assert verified(SECRET, headers, got, 1_700_000_100)
    assert not verified(SECRET, headers, got + b" ", 1_700_000_100)
    assert not verified(SECRET, {**headers, "webhook-id": "id-2"}, got, 1_700_000_100)
    assert not verified(SECRET, headers, got, 1_700_000_400)  # Replayed.


def test_the_signature_is_that_of_the_standards_own_example() -> None:
    """The example of the specification's reference libraries."""
    key = read_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b'{"test": 2432232314}')
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("text", ["", "secret", "whsec_", "whsec_!", "whsec_" + b64encode(b"short").decode()])
def test_a_secret_that_could_be_guessed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="hallmark alerts secret"):
        read_secret(text)
    assert read_secret(SECRET) == KEY


# --- where it may lead ---


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2001::1", "2001:db8::1",
    ],
)  # fmt: skip
async def test_no_address_inside_is_reached(address: str) -> None:
    assert closed(ip_address(address)) is not None
    with pytest.raises(Forbidden, match="a setting may allow it"):
        await Policy().place("https://hooks.example.com/x", Names([[address]]))


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
async def test_public_addresses_are_reached_under_the_hosts_name(address: str) -> None:
    place = await Policy().place("https://Hooks.Example.com:8443/x", Names([[address]]))
    assert (place.host, place.port, place.is_tls) == ("hooks.example.com", 8443, True)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/x",
        "ftp://hooks.example.com/x",
        "file:///etc/passwd",
        "https:///x",
        "https://user:password@hooks.example.com/x",
    ],
)
async def test_only_https_urls_without_a_password_are_called(url: str) -> None:
    with pytest.raises(Forbidden):
        await Policy().place(url, Names([[PUBLIC]]))


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "0177.0.0.1", "localhost", "127.1"])
async def test_other_ways_to_write_an_inner_address_are_resolved_first(host: str) -> None:
    async def system(name: str, port: int) -> list[str]:
        return [str(each[4][0]) for each in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]

    with pytest.raises(Forbidden):
        await Policy().place(f"https://{host}/x", system)


async def test_one_inner_address_among_public_ones_is_enough_to_refuse() -> None:
    with pytest.raises(Forbidden, match="private"):
        await Policy().place("https://hooks.example.com/", Names([[PUBLIC, "10.0.0.1"]]))


@pytest.mark.parametrize("allow", ["10.0.0.0/8", "10.0.0.1", "hooks.internal", "Hooks.Internal."])
async def test_a_setting_allows_a_host_or_a_network_also_without_tls(allow: str) -> None:
    policy = Policy([allow])
    for scheme in ("http", "https"):
        place = await policy.place(f"{scheme}://hooks.internal/x", Names([["10.0.0.1"]]))
        assert place.address == "10.0.0.1"
    other = "http://other.internal/x" if "nternal" in allow else "http://hooks.internal/x"
    with pytest.raises(Forbidden):
        await policy.place(other, Names([["192.168.0.1"]]))


@pytest.mark.parametrize("allow", ["10.0.0.1/8", "", "https://hooks.internal", "hooks.internal/x"])
def test_a_setting_that_names_neither_host_nor_network_is_refused(allow: str) -> None:
    with pytest.raises(ValueError, match=r"10\.1\.0\.0/16"):
        Policy([allow])


async def test_a_name_that_leads_elsewhere_a_moment_later_leads_nowhere(receiver: Receiver) -> None:
    """DNS rebinding: the address that was judged is the one that is called, and it is judged anew for each call."""
    names = Names([["127.0.0.1"], ["10.0.0.1"]])
    hook = webhook(f"http://hooks.example.com:{receiver.port}/", resolve=names)
    await hook.send("id-1", b"{}")
    assert names.asked == [("hooks.example.com", receiver.port)]  # Once: the client did not ask again.
    assert receiver.got[0][0]["host"] == f"hooks.example.com:{receiver.port}"
    with pytest.raises(NotDelivered, match="private"):
        await hook.send("id-1", b"{}")
    assert len(receiver.got) == 1


async def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    async with listening(Receiver()) as inner:
        receiver.status, receiver.headers = 302, f"location: http://127.0.0.1:{inner.port}/\r\n"
        with pytest.raises(NotDelivered, match="302, and redirects are not followed"):
            await webhook(f"http://127.0.0.1:{receiver.port}/").send("id-1", b"{}")
        assert inner.got == []


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of hooks.example.com and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: it makes the certificate")
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    kind = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-days", "1", "-subj", "/CN=hooks.example.com", "-addext", "subjectAltName=DNS:hooks.example.com"]
    subprocess.run([*kind, *names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key


async def test_certificates_are_checked_against_the_name_and_not_the_address(certificate: tuple[Path, Path]) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificate)
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    async with listening(Receiver(), server) as receiver:
        options = {"resolve": Names([["127.0.0.1"]]), "verify": trusted}
        await webhook(f"https://hooks.example.com:{receiver.port}/", **options).send("id-1", b"{}")
        assert len(receiver.got) == 1
        for url, verify in (
            (f"https://other.example.com:{receiver.port}/", trusted),
            (f"https://hooks.example.com:{receiver.port}/", True),
        ):
            with pytest.raises(NotDelivered, match="cannot be reached: ConnectError"):
                await webhook(url, **{**options, "verify": verify}).send("id-1", b"{}")
        assert len(receiver.got) == 1


# --- what goes wrong ---


@pytest.mark.parametrize(("status", "for_good"), [(400, False), (410, True), (500, False), (503, False)])
async def test_only_a_2xx_is_taken(receiver: Receiver, status: int, for_good: bool) -> None:
    receiver.status = status
    with pytest.raises(NotDelivered, match=f"It answered {status}") as caught:
        await webhook(f"http://127.0.0.1:{receiver.port}/").send("id-1", b"{}")
    assert caught.value.for_good == for_good


async def test_one_that_hangs_is_left_and_one_that_is_not_there_is_told_without_its_url(receiver: Receiver) -> None:
    receiver.hangs = True
    hook = webhook(f"http://127.0.0.1:{receiver.port}/secret-token", timeout_seconds=0.2)
    with pytest.raises(NotDelivered, match=r"within 0\.2 s"):
        await hook.send("id-1", b"{}")
    gone = webhook("http://127.0.0.1:1/secret-token")
    with pytest.raises(NotDelivered, match="ConnectError") as caught:
        await gone.send("id-1", b"{}")
    assert "secret-token" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_a_name_without_an_address_is_tried_again_later() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(NotDelivered, match="gaierror") as caught:
        await webhook("https://hooks.example.com/", resolve=unknown).send("id-1", b"{}")
    assert not caught.value.for_good
