"""Fetching by URL: the file that is there, and every way to be led elsewhere refused."""

import datetime
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from retrieval.addresses import Allowed
from retrieval.errors import LimitExceeded, UnsupportedType, UrlRefused, UrlUnreachable
from retrieval.fetching import MOST_REDIRECTS, Fetcher
from retrieval.parsing.child import XLSX
from tests.office_files import archive
from tests.origin_server import Origin, Page, origin_server
from tests.stopwatch import Stopwatch

PUBLIC = "93.184.216.34"


class Names:
    """A resolver that gives a host's answers one after the other, the last one for ever."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self.answers[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


def no_trust() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def fetcher(*allowed: str, max_bytes: int = 10_000, seconds: float = 20, **options) -> Fetcher:
    options = {"trust": no_trust, **options}
    return Fetcher(allowed=Allowed.of(allowed), max_bytes=max_bytes, seconds=seconds, **options)


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with origin_server() as origin:
        yield origin


async def refusal(fetching: Fetcher, url: str, kind: type[Exception] = UrlRefused) -> str:
    with pytest.raises(kind) as refused:
        await fetching.fetch(url)
    assert str(refused.value).startswith("`url`: ")
    return str(refused.value)


async def test_a_page_is_fetched_with_its_type_and_nothing_of_this_machine_is_sent(origin, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    origin.pages["/a/tea.html?x=1"] = Page(
        b"<p>Tea</p>", headers={"Content-Type": "text/html; charset=latin-1", "ETag": '"1"', "Set-Cookie": "a=b"}
    )
    fetching = fetcher("127.0.0.1")
    for _ in range(2):
        fetched = await fetching.fetch(origin.at("/a/tea.html?x=1#part"))
    assert fetched
    assert (fetched.content, fetched.media_type) == (b"<p>Tea</p>", "text/html; charset=latin-1")
    assert fetched.validator == '"1"'
    for head in origin.asked:
        assert "cookie" not in head.lower()
        assert "authorization" not in head.lower()
        assert f"Host: 127.0.0.1:{origin.port}\r\n" in head


async def test_what_did_not_change_is_not_sent_again(origin):
    origin.pages["/tea.txt"] = Page(b"Tea", headers={"ETag": 'W/"7"'})
    assert await fetcher("127.0.0.1").fetch(origin.at("/tea.txt"), validator='W/"7"') is None
    await fetcher("127.0.0.1").fetch(origin.at("/tea.txt"), validator="Sat, 28 Nov 2026 21:00:00 GMT")
    assert "If-Modified-Since: Sat, 28 Nov 2026 21:00:00 GMT\r\n" in origin.asked[-1]


@pytest.mark.parametrize(
    ("path", "stated", "kind"),
    [
        ("/readme.md", "text/plain; charset=utf-8", "text/markdown; charset=utf-8"),
        ("/readme", "text/plain", "text/plain"),
        ("/", "application/octet-stream", "text/plain"),
        ("/rows.csv", "application/octet-stream", "text/csv"),
        ("/page.txt", "text/html", "text/html"),
    ],
)
async def test_the_type_is_what_the_server_states_and_of_plain_text_what_the_path_says(origin, path, stated, kind):
    origin.pages[path] = Page(b"# Tea", headers={"Content-Type": stated})
    fetched = await fetcher("127.0.0.1").fetch(origin.at(path))
    assert fetched
    assert fetched.media_type == kind


async def test_an_archive_that_names_its_parts_at_its_end_is_fetched_as_it_is_uploaded(origin):
    parts = {"docProps/thumbnail.bin": os.urandom(300_000), "xl/workbook.xml": "x"}
    origin.pages |= {
        "/download": Page(archive(parts), headers={"Content-Type": "application/octet-stream"}),
        "/photos": Page(archive({"photo.jpg": os.urandom(9_000)}), headers={"Content-Type": "application/zip"}),
    }
    fetched = await fetcher("127.0.0.1", max_bytes=400_000).fetch(origin.at("/download"))
    assert fetched
    assert fetched.media_type == XLSX
    await refusal(fetcher("127.0.0.1"), origin.at("/photos"), UnsupportedType)


async def test_a_redirect_to_a_path_that_is_not_escaped_is_read_as_utf_8(origin):
    origin.pages |= {"/old": Page(status=302, headers={"Location": "/zürich"}), "/z%C3%BCrich": Page(b"Tea")}
    fetched = await fetcher("127.0.0.1").fetch(origin.at("/old"))
    assert fetched
    assert fetched.content == b"Tea"


async def test_a_redirect_is_followed_and_looked_at_like_the_first(origin):
    origin.pages |= {
        "/old": Page(status=301, headers={"Location": "/new.txt"}),
        "/new.txt": Page(b"Tea"),
        "/secrets": Page(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data/"}),
        "/number": Page(status=307, headers={"Location": "http://2852039166/"}),
        "/file": Page(status=302, headers={"Location": "file:///etc/passwd"}),
        "/named": Page(status=302, headers={"Location": "http://metadata.test/"}),
        "/round": Page(status=302, headers={"Location": "/round"}),
    }
    fetching = fetcher(
        "127.0.0.1", resolve=Names(**{"127_0_0_1": [["127.0.0.1"]], "metadata_test": [["169.254.169.254"]]})
    )
    fetched = await fetching.fetch(origin.at("/old"))
    assert fetched
    assert fetched.content == b"Tea"
    for path in ("/secrets", "/number", "/file"):
        assert "it redirects to where it may not" in await refusal(fetching, origin.at(path))
    assert "'metadata.test' is no public site" in await refusal(fetching, origin.at("/named"))
    asked = len(origin.asked)
    assert "redirects more than" in await refusal(fetching, origin.at("/round"), UrlUnreachable)
    assert len(origin.asked) - asked == MOST_REDIRECTS + 1


async def test_a_name_that_leads_elsewhere_at_the_second_look_is_refused_then(origin):
    origin.pages["/"] = Page(status=302, headers={"Location": "/again"})
    origin.pages["/again"] = Page(b"the secret")
    rebinding = Names(site_test=[["127.0.0.1"], ["127.0.0.2"]])
    assert "is no public site" in await refusal(fetcher("127.0.0.1", resolve=rebinding), origin.at("/", "site.test"))
    assert rebinding.asked == ["site.test"] * 2
    assert len(origin.asked) == 1


async def test_a_name_is_looked_up_once_for_a_connection_and_that_address_is_connected_to(origin):
    origin.pages["/"] = Page(b"Tea")
    names = Names(site_test=[["127.0.0.1"], ["169.254.169.254"]])
    assert await fetcher("127.0.0.1", resolve=names).fetch(origin.at("/", "site.test"))
    assert names.asked == ["site.test"]
    assert f"Host: site.test:{origin.port}\r\n" in origin.asked[0]


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
)
async def test_one_address_that_is_not_public_is_enough_to_refuse(address):
    names = Names(site_test=[[PUBLIC, address]])
    assert "is no public site" in await refusal(fetcher(resolve=names), "http://site.test/")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://site.test/a",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "//site.test/",
        "site.test/a",
        "http:///a",
        "http://user:secret@site.test/",
        "http://site.test@127.0.0.1/",
        "http://127.0.0.1\\@site.test/",
        "http://site.test/ a",
        "http://site.test/\r\nX: y",
        "http://127.1/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://127.0.0.1./",
        "http://%31%32%37.0.0.1/",
        "http://[fe80::1%25eth0]/",
        "http://[::1]/",
        "http://[::ffff:7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://site.test:0/",
        "http://site.test:70000/",
        f"http://{PUBLIC}:6379/",
        f"http://site.test/{'a' * 2000}",
    ],
)
async def test_a_url_that_may_not_be_fetched_is_refused_by_its_looks(url):
    names = Names()
    assert await refusal(fetcher(resolve=names), url)
    with pytest.raises(UrlRefused):
        fetcher(resolve=names).check(url)
    assert names.asked == []


@given(st.text(max_size=40), st.sampled_from(["http://", "https://", "", "http://127.0.0.1:80/", "http://u@"]))
def test_whatever_is_given_as_a_url_is_taken_or_refused(text, begin):
    is_taken = True
    try:
        fetcher().check(begin + text)
    except UrlRefused:
        is_taken = False
    assert not (is_taken and begin == "http://127.0.0.1:80/")


async def test_odd_ports_are_for_the_operator_to_allow():
    assert "port 6379" in await refusal(fetcher(resolve=Names(site_test=[[PUBLIC]])), "http://site.test:6379/")


async def test_more_than_may_be_is_not_read(origin):
    origin.pages["/stated"] = Page(b"", stated_length=10_001, stays_silent=True)
    origin.pages["/sent"] = Page(b"x" * 10_001, headers={"Transfer-Encoding": "chunked"})
    origin.pages["/sent"].body = b"2711\r\n" + b"x" * 10_001 + b"\r\n0\r\n\r\n"
    assert "more than 10,000 bytes" in await refusal(fetcher("127.0.0.1"), origin.at("/stated"), LimitExceeded)
    assert "more than 10,000 bytes" in await refusal(fetcher("127.0.0.1"), origin.at("/sent"), LimitExceeded)


async def test_comments_without_a_page_are_looked_at_once(origin):
    origin.pages["/notes.draft"] = Page(b"<!---->" * 28 + b"x", headers={"Content-Type": "application/octet-stream"})
    watch = Stopwatch()
    got = await fetcher("127.0.0.1").fetch(origin.at("/notes.draft"))
    assert got.media_type == "text/plain"
    assert watch.seconds < 0.5


async def test_who_takes_too_long_is_left(origin):
    origin.pages["/"] = Page(b"Te", stated_length=3, stays_silent=True)
    said = await refusal(fetcher("127.0.0.1", seconds=0.05), origin.at("/"), UrlUnreachable)
    assert "more than 0.05 s" in said
    assert "ingestion.fetch_seconds" in said


async def test_a_type_that_nothing_reads_is_refused_by_its_first_bytes(origin):
    origin.pages["/film"] = Page(b"\0" * 5_000, 200, {"Content-Type": "video/mp4"}, 9_000, stays_silent=True)
    assert "is video/mp4" in await refusal(fetcher("127.0.0.1"), origin.at("/film"), UnsupportedType)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (Page(status=404), "status 404"),
        (Page(status=304), "status 304"),
        (Page(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), "compressed"),
        (Page(b"Te", stated_length=3), "breaks off"),
    ],
)
async def test_what_is_no_file_is_told(origin, page, said):
    origin.pages["/"] = page
    assert said in await refusal(fetcher("127.0.0.1"), origin.at("/"), UrlUnreachable)


async def test_a_host_without_an_address_is_told():
    assert "does not answer" in await refusal(
        fetcher(resolve=Names(site_test=[[]])), "http://site.test/", UrlUnreachable
    )


async def test_tls_is_for_the_name_whatever_the_address(tmp_path):
    serving, trusting = authority(tmp_path, "site.test")
    names = Names(site_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]])
    async with origin_server(tls=serving) as origin:
        origin.pages["/"] = Page(b"Tea")
        fetching = fetcher("127.0.0.1", resolve=names, trust=lambda: trusting)
        assert await fetching.fetch(origin.at("/", "site.test", "https"))
        assert "no valid certificate" in await refusal(fetching, origin.at("/", "other.test", "https"), UrlUnreachable)
        origin.pages["/"] = Page(status=302, headers={"Location": "http://site.test/"})
        assert "from https to http" in await refusal(fetching, origin.at("/", "site.test", "https"))


def authority(folder: Path, host: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's side with a certificate for a host, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(file)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.load_verify_locations(file)
    return serving, trusting
