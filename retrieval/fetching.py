"""Fetches a file by a URL that a caller named, from where the caller may have it fetched and nowhere else.

The main rule: what is connected to is the very address that was looked at. A URL is parsed once, by the parser whose
host the connection gets; the host is resolved once, when it is connected to; each redirect is a URL like the first. No
cookie, credential or proxy of this machine takes part.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import PurePosixPath
from typing import Any, Final

import httpcore
import httpx

from retrieval.addresses import Address, Allowed, is_odd_number, is_public
from retrieval.errors import LimitExceeded, UnsupportedType, UrlRefused, UrlUnreachable
from retrieval.media_types import ARCHIVE, media_type_of

MOST_URL_CHARACTERS: Final = 2_000
MOST_REDIRECTS: Final = 5
MOST_VALIDATOR_CHARACTERS: Final = 256
_MOST_ADDRESSES: Final = 3
_CONNECT_SECONDS: Final = 5.0
_PORTS: Final = {"http": 80, "https": 443}
_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_FIRST_BYTES: Final = 4_096
_LISTED: Final = "the service's operator can name it in the setting `ingestion.fetch_allowed`"

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives the addresses of a host."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file as it was at a URL."""

    content: bytes
    media_type: str
    validator: str
    """Its ETag, or else when it was last modified: what asks whether it is still the same; empty where not told."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL in its parts, as they go to the connection."""

    url: httpx.URL
    port: int

    @property
    def host(self) -> str:
        return self.url.raw_host.decode("ascii")

    def for_connection(self) -> httpcore.URL:
        url = self.url
        return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=self.port, target=url.raw_path)


class Fetcher:
    """Fetches files of at most `max_bytes` within `seconds`; stand-ins may resolve, and say whom TLS trusts."""

    def __init__(
        self,
        *,
        allowed: Allowed,
        max_bytes: int,
        seconds: float,
        resolve: Resolve | None = None,
        trust: Callable[[], ssl.SSLContext] = httpx.create_ssl_context,
    ) -> None:
        self._allowed = allowed
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._backend = _CheckedBackend(allowed, resolve or _resolve)
        self._load_trust = trust
        self._trust: ssl.SSLContext | None = None

    def check(self, url: str) -> None:
        """Raise UrlRefused for a URL that can be refused by its looks."""
        self._target(url)

    async def fetch(self, url: str, *, validator: str = "") -> Fetched | None:
        """What is at the URL; None where it is what the validator was given for.

        Raises:
            UrlRefused: It leads to where this service does not go.
            UrlUnreachable: No file comes from there, or not in time.
            UnsupportedType: Nothing reads files of its type.
            LimitExceeded: It is too large.
        """
        target = self._target(url)
        if self._trust is None:
            self._trust = await asyncio.to_thread(self._load_trust)
        try:
            async with (
                asyncio.timeout(self._seconds),
                httpcore.AsyncConnectionPool(
                    ssl_context=self._trust, max_keepalive_connections=0, network_backend=self._backend
                ) as pool,
            ):
                for _ in range(MOST_REDIRECTS + 1):
                    found = await self._get(pool, target, validator)
                    if not isinstance(found, _Target):
                        return found
                    target = found
        except TimeoutError:
            slow = f"{target.host!r} took more than {self._seconds:g} s (setting `ingestion.fetch_seconds`)"
            raise UrlUnreachable(f"`url`: {slow}") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            reason = "does not answer, or has no valid certificate" if isinstance(error, httpcore.NetworkError) else ""
            message = f"`url`: {target.host!r} {reason or 'breaks off, or does not speak HTTP'}; try it in a browser"
            raise UrlUnreachable(message) from error
        raise UrlUnreachable(f"`url`: it redirects more than {MOST_REDIRECTS} times; give the address it ends at")

    async def _get(
        self, pool: httpcore.AsyncConnectionPool, target: _Target, validator: str
    ) -> Fetched | _Target | None:
        url = target.for_connection()
        extensions = {"timeout": {"connect": _CONNECT_SECONDS}}
        async with pool.stream("GET", url, headers=_headers(target, validator), extensions=extensions) as response:
            headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in headers:
                return self._target(_location(headers[b"location"]), base=target)
            if response.status == 304 and validator:
                return None
            if response.status != 200:
                raise UrlUnreachable(f"`url`: {target.host!r} answers with status {response.status}, not with a file")
            if headers.get(b"content-encoding", "identity") != "identity":
                raise UrlUnreachable(f"`url`: {target.host!r} sends it compressed without being asked; upload the file")
            stated = headers.get(b"content-length", "")
            if stated.isdigit() and int(stated) > self._max_bytes:
                raise self._too_large(target)
            content = await self._read(response, target, headers.get(b"content-type"))
        media_type = _media_type(content, target, headers.get(b"content-type"))
        told = headers.get(b"etag") or headers.get(b"last-modified", "")
        return Fetched(content, media_type, told if len(told) <= MOST_VALIDATOR_CHARACTERS else "")

    async def _read(self, response: httpcore.Response, target: _Target, stated: str | None) -> bytes:
        """Read a body as far as it may go, and no further than its first bytes where they are of no use."""
        content = bytearray()
        is_looked_at = False
        async for piece in response.aiter_stream():
            content += piece
            if len(content) > self._max_bytes:
                raise self._too_large(target)
            if not is_looked_at and len(content) >= _FIRST_BYTES:
                is_looked_at = True
                # What an archive is may stand at its end only.
                if not content.startswith(ARCHIVE):
                    _media_type(bytes(content), target, stated)
        return bytes(content)

    def _too_large(self, target: _Target) -> LimitExceeded:
        return LimitExceeded(f"`url`: what {target.host!r} sends has more than {self._max_bytes:,} bytes", "bytes")

    def _target(self, url: str, *, base: _Target | None = None) -> _Target:
        """Parse a URL, or a redirect's target; raises UrlRefused."""
        where = "`url`: it redirects to where it may not: " if base else "`url`: "
        if len(url) > MOST_URL_CHARACTERS or not url.isprintable() or any(sign in url for sign in " \\"):
            raise UrlRefused(f"{where}write it without spaces and backslashes, in {MOST_URL_CHARACTERS} characters")
        try:
            parsed = base.url.join(url) if base else httpx.URL(url)
            host = parsed.raw_host.decode("ascii")
        except (httpx.InvalidURL, ValueError) as error:
            raise UrlRefused(f"{where}it is no URL; write https://host/path") from error
        if parsed.scheme not in _PORTS or not host:
            raise UrlRefused(f"{where}it must begin with http:// or https:// and name a host")
        if base and base.url.scheme == "https" and parsed.scheme == "http":
            raise UrlRefused(f"{where}from https to http; give the address it ends at")
        if parsed.userinfo:
            raise UrlRefused(f"{where}credentials are not sent; leave out what stands before the @")
        if "%" in host or is_odd_number(host):
            raise UrlRefused(f"{where}write the host as a name, or as an address of four decimal numbers")
        port = _PORTS[parsed.scheme] if parsed.port is None else parsed.port
        if not 0 < port < 65_536:
            raise UrlRefused(f"{where}its port is no port")
        with contextlib.suppress(ValueError):  # A name is looked at when it is resolved.
            _check(host, port, [ip_address(host)], self._allowed, where)
        return _Target(parsed, port)


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, by the number that was checked."""

    def __init__(self, allowed: Allowed, resolve: Resolve) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._plain = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the protocol's own.
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = [ip_address(each) for each in await self._resolve(host, port)]
        except (OSError, ValueError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} has no address") from error
        _check(host, port, addresses, self._allowed, "`url`: ")
        failure = httpcore.ConnectError(f"{host} has no address")
        for address in addresses[:_MOST_ADDRESSES]:
            try:
                return await self._plain.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = httpcore.ConnectError(str(error))
        raise failure

    async def sleep(self, seconds: float) -> None:
        await self._plain.sleep(seconds)


def _check(host: str, port: int, addresses: Sequence[Address], allowed: Allowed, where: str) -> None:
    """Raise UrlRefused unless each address of a host is public, and the port is the web's, or the operator named it."""
    for address in addresses:
        if allowed.names(host, address):
            continue
        if not is_public(address):
            raise UrlRefused(f"{where}{host!r} is no public site; {_LISTED}")
        if port not in _PORTS.values():
            raise UrlRefused(f"{where}port {port} is not the web's; use 80 or 443, or {_LISTED}")


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _location(raw: str) -> str:
    """What a redirect's header says: servers that do not escape their paths write UTF-8, as browsers read it."""
    try:
        return raw.encode("latin-1").decode()
    except UnicodeDecodeError:
        return raw


def _headers(target: _Target, validator: str) -> dict[bytes | str, bytes | str]:
    headers: dict[bytes | str, bytes | str] = {
        "Host": target.url.netloc.decode("ascii"),
        "User-Agent": "hallmark",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
    }
    if validator:
        headers["If-None-Match" if validator.endswith('"') else "If-Modified-Since"] = validator
    return headers


def _media_type(content: bytes, target: _Target, stated: str | None) -> str:
    """What the parsers are to take a file for, with its charset; raises UnsupportedType.

    Servers call Markdown and tables plain text: then the path's ending says more.
    """
    kind, semicolon, parameters = (stated or "").partition(";")
    name = PurePosixPath(target.url.path).name
    is_told_by_name = kind.strip().lower() == "text/plain" and "." in name
    try:
        found = media_type_of(content, name=name or target.host, media_type="" if is_told_by_name else kind)
    except UnsupportedType as error:
        raise UnsupportedType(f"`url`: {error}") from None
    return f"{found}{semicolon}{parameters}"
