"""A link opens the passage it names and nothing else, and its secret is nobody's guess."""

import stat
from pathlib import Path
from urllib.parse import quote

from hypothesis import assume, given
from hypothesis import strategies as st

from app.links import SECRET_BYTES, VERSION_DIGITS, PassageLinks, load_secret

LINKS = PassageLinks(b"a secret")
NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
NUMBERS = st.integers(1, 10**6)
VERSIONS = st.text("0123456789abcdef", min_size=64, max_size=64)
PARTS = st.tuples(NAMES, NAMES, NUMBERS, VERSIONS)


def opened(link: str, links: PassageLinks = LINKS) -> str | None:
    path, _, query = link.partition("?")
    return links.tenant(path, query.encode())


@given(PARTS)
def test_a_link_names_the_tenant_whose_passage_it_opens(parts):
    tenant, *_ = parts
    assert opened(LINKS.path(*parts)) == tenant


@given(PARTS, PARTS)
def test_a_signature_is_good_for_its_own_passage_only(one, other):
    assume((one[:3], one[3][:VERSION_DIGITS]) != (other[:3], other[3][:VERSION_DIGITS]))
    signature = LINKS.path(*one).rpartition("=")[2]
    unsigned = LINKS.path(*other).rpartition("=")[0]
    assert opened(f"{unsigned}={signature}") is None


@given(PARTS, st.text("0123456789abcdef", max_size=40))
def test_no_other_signature_opens_it(parts, guess):
    link = LINKS.path(*parts)
    unsigned, _, signature = link.rpartition("=")
    assume(guess != signature)
    assert opened(f"{unsigned}={guess}") is None


@given(PARTS)
def test_another_secret_signs_otherwise(parts):
    assert opened(LINKS.path(*parts), PassageLinks(b"another secret")) is None


@given(st.binary(max_size=200))
def test_no_query_breaks_the_check(query):
    assert LINKS.tenant("/v1/documents/a/passages/1", query) is None


def test_a_field_given_twice_opens_nothing():
    link = LINKS.path("acme", "a", 1, "0" * 64)
    assert opened(f"{link}&tenant=acme") is None
    assert opened(f"{link}&version={'0' * VERSION_DIGITS}") is None


def test_a_tenant_cannot_be_hidden_in_another_field():
    """Path, version and tenant are told apart in what is signed."""
    link = LINKS.path("acme", "a", 1, "0" * 64)
    signature = link.rpartition("=")[2]
    forged = f"/v1/documents/a/passages/1?version={quote('0' * 16 + chr(10) + 'acme')}&tenant=&signature={signature}"
    assert opened(forged) is None


def test_the_secret_is_made_once_and_its_owner_s(tmp_path: Path):
    path = tmp_path / "links.secret"
    secret = load_secret(path)
    assert len(secret) == SECRET_BYTES
    assert load_secret(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secret(tmp_path / "other.secret") != secret


def test_half_a_secret_from_a_crash_is_replaced_by_a_whole_one(tmp_path: Path):
    path = tmp_path / "links.secret"
    for left_behind in (b"", b"half"):
        path.write_bytes(left_behind)
        path.with_name("links.secret.new").write_bytes(b"x")
        secret = load_secret(path)
        assert len(secret) == SECRET_BYTES
        assert load_secret(path) == secret
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
