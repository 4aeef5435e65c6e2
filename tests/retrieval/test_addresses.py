"""Which addresses may be connected to: every form of a private one is private, whatever it is written as."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrieval.addresses import Allowed, is_odd_number, is_public

LOCAL_NETWORKS = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.2.0/24",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "168.63.129.16/32",
]
NETWORKS = [ip_network(network) for network in LOCAL_NETWORKS]
local = st.sampled_from(NETWORKS).flatmap(
    lambda network: st.integers(int(network.network_address), int(network.broadcast_address)).map(IPv4Address)
)
public = st.ip_addresses(v=4).filter(lambda address: address.is_global and not address.is_multicast)


def embedded(address: IPv4Address) -> list[IPv6Address]:
    """The forms in which an IPv6 address can stand for an IPv4 one."""
    number = int(address)
    return [
        IPv6Address((0xFFFF << 32) | number),  # mapped
        IPv6Address(number),  # compatible
        IPv6Address(int(IPv6Address("64:ff9b::")) | number),
        IPv6Address(int(IPv6Address("64:ff9b:1::")) | number),
        IPv6Address(int(IPv6Address("2002::")) | number << 80),
        IPv6Address(int(IPv6Address("2001::")) | (number ^ 0xFFFF_FFFF)),
        IPv6Address(int(IPv6Address("2a00:1450::5efe:0:0")) | number),
        IPv6Address(int(IPv6Address("fe80::")) | number),
    ]


@given(local)
@example(IPv4Address("169.254.169.254"))
@example(IPv4Address("127.0.0.1"))
def test_a_local_address_is_local_in_every_form(address):
    for form in (address, *embedded(address)):
        assert not is_public(form), form


@given(public.filter(lambda address: not any(address in network for network in NETWORKS)))
@example(IPv4Address("1.1.1.1"))
def test_a_public_address_is_public_and_so_is_what_translates_to_it(address):
    mapped, _, nat64, *_ = embedded(address)
    assert is_public(address)
    assert is_public(mapped)
    assert is_public(nat64)


@given(st.ip_addresses(v=6))
def test_of_ipv6_only_what_is_routed_between_sites_is_public(address):
    if is_public(address):
        assert address in IPv6Network("2000::/3") or address in IPv6Network("64:ff9b::/96") or address.ipv4_mapped


@pytest.mark.parametrize(
    "address",
    [
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "2001:db8::1",
        "3fff::1",
        "fec0::1",
    ],
)
def test_addresses_of_ipv6_that_are_no_site(address):
    assert not is_public(ip_address(address))


def test_an_ordinary_address_of_ipv6_is_public():
    assert is_public(ip_address("2606:4700:4700::1111"))


@given(st.ip_addresses(v=4))
def test_a_number_that_is_no_dotted_address_is_odd(address):
    number = int(address)
    first, rest = number >> 24, number & 0xFF_FFFF
    odd = [
        str(number),
        hex(number),
        f"0{number:o}",
        f"{first}.{rest}",
        f"{first:#x}.{rest}",
        f"{address}.",
        f"0{address}",
    ]
    assert not is_odd_number(str(address))
    for form in odd:
        assert is_odd_number(form), form


@pytest.mark.parametrize("host", ["example.com", "3com.com", "a.b.c.d", "0.pool.ntp.org", "::1", "1e100.net", "x0x1"])
def test_a_name_is_no_odd_number(host):
    assert not is_odd_number(host)


def test_what_the_operator_names_is_allowed_and_nothing_beside_it():
    allowed = Allowed.of(["wiki.corp", "10.1.0.0/16", "127.0.0.1"])
    assert allowed.names("anything", ip_address("10.1.2.3"))
    assert allowed.names("anything", ip_address("::ffff:10.1.2.3"))
    assert not allowed.names("anything", ip_address("10.2.0.1"))
    assert allowed.names("Wiki.Corp.", ip_address("192.168.1.1"))
    assert not allowed.names("evil.wiki.corp", ip_address("192.168.1.1"))
    assert not allowed.names("anything", ip_address("127.0.0.2"))


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "fd00:ec2::254", "168.63.129.16", "0.0.0.0", "fe80::1", "::ffff:169.254.169.254"]
)
def test_a_host_that_the_operator_names_does_not_lead_to_a_cloud_s_secrets(address):
    assert not Allowed.of(["wiki.corp"]).names("wiki.corp", ip_address(address))


def test_a_network_that_is_none_is_told():
    with pytest.raises(ValueError, match="host bits"):
        Allowed.of(["10.1.2.3/16"])
