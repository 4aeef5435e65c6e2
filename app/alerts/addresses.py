"""Where a webhook may lead: not into the network that the worker stands in, unless a setting names the place.

The main rule: a name is resolved once, every address it has must be allowed, and the connection goes to one of those
addresses and not to the name: so a name that leads elsewhere a moment later leads nowhere.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

import msgspec

from retrieval.addresses import Address, is_public

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives the addresses of a host's name."""


class Forbidden(Exception):
    """The webhook must not be called there; the message says why."""


class Place(msgspec.Struct, frozen=True):
    """Where to connect, and what the server is called."""

    address: str
    port: int
    host: str
    is_tls: bool


class Policy:
    """Which hosts and networks a webhook may lead to although they are not public."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        """`allowed` are host names, addresses and networks as `10.1.0.0/16`.

        Raises:
            ValueError: one of them is none of these.
        """
        self._networks = []
        self._hosts = set()
        for each in allowed:
            try:
                self._networks.append(ip_network(each))
            except ValueError:
                if "/" in each or not each or ":" in each:
                    raise ValueError(
                        f"{each!r} is neither a host nor a network: write hooks.internal or 10.1.0.0/16"
                    ) from None
                self._hosts.add(each.lower().rstrip("."))

    async def place(self, url: str, resolve: Resolve) -> Place:
        """Find out where a URL leads; raises Forbidden, or OSError where its name has no address."""
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        if parts.scheme not in ("http", "https") or not host:
            raise Forbidden("it is no https:// URL")
        if parts.username or parts.password:
            raise Forbidden("its user and password would be sent: leave them out")
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        found = [ip_address(each.partition("%")[0]) for each in await resolve(host, port)]
        if not found:
            raise OSError(f"{host} has no address")
        named = host in self._hosts
        for address in found:
            if not named and not self._is_listed(address) and (why := closed(address)):
                raise Forbidden(f"{host} leads to {address}, which is {why}; a setting may allow it")
        if not is_tls and not named and not all(map(self._is_listed, found)):
            raise Forbidden("it is not https://; a setting may allow its host")
        return Place(str(found[0]), port, host, is_tls)

    def _is_listed(self, address: Address) -> bool:
        return any(address.version == each.version and address in each for each in self._networks)


def closed(address: Address) -> str | None:
    """Why nobody outside should be able to send a worker to an address; None where it is public."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    for flag in ("is_unspecified", "is_loopback", "is_link_local", "is_multicast", "is_private", "is_reserved"):
        if getattr(address, flag):
            return flag.removeprefix("is_").replace("_", "-")
    return None if is_public(address) else "not public"


async def resolved(host: str, port: int) -> list[str]:
    """The addresses that the system gives for a name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]
