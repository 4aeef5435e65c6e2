"""Which addresses the service may connect to where somebody else names the host.

The main rule: an address is judged, never a name, and by what it is at the end: an IPv4 address inside an IPv6 one
counts as itself. What is not an ordinary public address needs the operator's word.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64: Final = IPv6Network("64:ff9b::/96")
_PUBLIC_V6: Final = IPv6Network("2000::/3")
"""All that is routed between sites; every other block of IPv6 is local, reserved, or another form of something."""
_NO_SITES: Final = (
    IPv6Network("2001::/32"),  # Teredo
    IPv6Network("2002::/16"),  # 6to4
    IPv4Network("192.88.99.0/24"),  # The relays of 6to4.
    IPv4Network("192.0.0.0/24"),  # For protocols; Python's list has parts of it.
)
_ISATAP: Final = frozenset((0x0000_5EFE, 0x0200_5EFE))
_DOCUMENTATION: Final = IPv6Network("3fff::/20")
_METADATA: Final = tuple(map(ip_address, ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254")))
"""Where clouds tell a machine its secrets, beside the link-local addresses; one of them is public."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the operator names: networks in which everything may be reached, and hosts that may be in private ones."""

    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[str]) -> Self:
        """Read addresses, networks (`10.1.0.0/16`) and names of hosts; raises ValueError where a network is none."""
        networks, hosts = [], set()
        for entry in entries:
            try:
                networks.append(ip_network(entry))
            except ValueError:
                if "/" in entry:
                    raise
                hosts.add(entry.lower().rstrip("."))
        return cls(tuple(networks), frozenset(hosts))

    def names(self, host: str, address: Address) -> bool:
        """Whether the operator's word is there for this address of this host."""
        address = _inner(address)
        if any(address in network for network in self.networks):
            return True
        return host.lower().rstrip(".") in self.hosts and not _is_never_a_site(address)


def is_public(address: Address) -> bool:
    """Whether an address is an ordinary public one, of one machine."""
    address = _inner(address)
    if _is_never_a_site(address) or not address.is_global or any(address in network for network in _NO_SITES):
        return False
    if isinstance(address, IPv4Address):
        return True
    is_isatap = int(address) >> 32 & 0xFFFF_FFFF in _ISATAP
    return address in _PUBLIC_V6 and address not in _DOCUMENTATION and not is_isatap


def is_odd_number(host: str) -> bool:
    """Whether a host is meant as an IPv4 address in another form than four decimal numbers.

    Resolvers take `2130706433`, `0x7f.1` and `0177.0.0.1` for 127.0.0.1, and not all of them alike.
    """
    last = host.rstrip(".").rpartition(".")[2].lower()
    if not (last.isdigit() or last.startswith("0x")):
        return False
    try:
        IPv4Address(host)
    except ValueError:
        return True
    return False


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it is that and nothing else."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _is_never_a_site(address: Address) -> bool:
    is_reserved = address.is_reserved and not address.is_loopback
    is_local = address.is_link_local or address.is_unspecified or address.is_multicast
    is_scoped = isinstance(address, IPv6Address) and address.scope_id is not None
    return is_local or is_reserved or is_scoped or address in _METADATA
