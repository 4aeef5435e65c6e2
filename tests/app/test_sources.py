"""Places of documents that a command reads: buckets and Git repositories, by their own protocols on loopback."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import InvalidRequest
from app.sources import SUFFIXES, FileFailure, SourceFailure, open_source
from app.sources.bucket import Bucket
from app.sources.repository import Repository
from retrieval.media_types import EXTENSIONS
from tests.app.test_cli_live import at, run
from tests.bucket_server import BucketServer, bucket_server, etag_of
from tests.fake_tgi import FakeTGI
from tests.git_server import commit, git, git_server, make_repository
from tests.origin_server import Page, origin_server
from tests.service import Service, live_service


@pytest.fixture(scope="module")
async def everyones(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    given = {"ingestion": {"fetch_urls": True, "fetch_allowed": ["127.0.0.1"]}}
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("sources"), engine_url=tgi.url, tenants=10, settings=given) as service,
    ):
        yield service


@pytest.fixture
def service(everyones: Service) -> Service:
    """The module's service, with the key of a tenant that has nothing."""
    return replace(everyones, key=everyones.tenants.popitem()[1])


async def documents(service: Service) -> dict[str, str]:
    async with service.client() as client:
        found = (await client.get("/v1/documents")).json()["data"]
    return {document["name"]: document["source"] for document in found}


# --- buckets ---


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    with bucket_server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        server.objects = {
            "docs/a.md": b"# A\n\nApples are red.",
            "docs/deep/b c+d.txt": b"Bananas are yellow.",
            "docs/c.md": b"# C\n\nCherries are dark.",
            "docs/photo.jpg": b"\xff\xd8\xff",
            "docs/": b"",
            "docs-old/d.md": b"# D\n\nDates are brown.",
        }
        yield server


def test_a_bucket_s_documents_are_listed_with_their_etags_page_by_page(bucket):
    opened = Bucket("s3://papers/docs")
    assert opened.name == "papers/docs"
    assert opened.names() == ["a.md", "c.md", "deep/b c+d.txt"]
    assert opened.manifest()[0] == {"name": "a.md", "etag": etag_of(b"# A\n\nApples are red.")}
    read = opened.read("deep/b c+d.txt")
    assert (read.data, read.etag) == (b"Bananas are yellow.", etag_of(b"Bananas are yellow."))
    assert Bucket("s3://papers").names()[0] == "docs-old/d.md"


def test_an_object_that_is_gone_is_one_failure_and_a_bucket_that_refuses_fails(bucket):
    with pytest.raises(FileFailure, match="cannot be read"):
        Bucket("s3://papers/docs").read("gone.md")
    bucket.refuses = True
    with pytest.raises(SourceFailure, match="AWS_ENDPOINT_URL") as refused:
        Bucket("s3://papers/docs").names()
    assert "secret" not in str(refused.value)
    for address in ("s3://", "s3:///docs", "s3://key@papers", "s3://papers/docs?x=1"):
        with pytest.raises(InvalidRequest, match="no bucket"):
            Bucket(address)


async def test_a_bucket_is_kept_in_step_and_only_what_changed_is_downloaded(service, bucket):
    first = await run("ingest", "s3://papers/docs", "--sync", *at(service))
    assert (first.exit_code, first.stdout.splitlines()[-1]) == (0, "3 created"), first.output
    assert await documents(service) == dict.fromkeys(["a.md", "c.md", "deep/b c+d.txt"], "papers/docs")

    bucket.got.clear()
    bucket.objects["docs/a.md"] = b"# A\n\nApples are green."
    bucket.objects["docs/broken.pdf"] = b"%PDF-1.7 no more"
    del bucket.objects["docs/c.md"]
    second = await run("ingest", "s3://papers/docs", "--sync", *at(service))
    assert second.exit_code == 1
    assert second.stdout.splitlines()[-1] == "1 deleted, 1 failed, 1 replaced, 1 unchanged"
    assert sorted(bucket.got) == ["docs/a.md", "docs/broken.pdf"]

    bucket.got.clear()
    third = await run("ingest", "s3://papers/docs", "--sync", *at(service))
    assert "! broken.pdf: failed before" in third.stdout
    assert (third.stdout.splitlines()[-1], bucket.got) == ("1 failed, 2 unchanged", [])


# --- Git ---

FILES = {
    "docs/a.md": b"# A\n\nApples are red.",
    "docs/deep/b.txt": b"Bananas are yellow.",
    "docs/c.md": b"# C\n\nCherries are dark.",
    "docs/film.bin": b"\0" * 1000,
    "README.md": b"# Read me",
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    repository = make_repository(tmp_path / "served" / "papers.git")
    commit(repository, FILES)
    return repository


@pytest.fixture
def served(repository: Path) -> Iterator[str]:
    with git_server(repository.parent) as url:
        yield f"git+{url}/papers.git"


def test_a_repository_is_read_at_a_branch_a_tag_or_a_commit(repository):
    first = git(repository, "rev-parse", "HEAD").decode().strip()
    git(repository, "tag", "v1")
    git(repository, "checkout", "-qb", "next/one")
    commit(repository, {"docs/a.md": b"# A\n\nApples are green.", "docs/c.md": None})
    git(repository, "checkout", "-q", "main")
    address = f"git+file://{repository}"
    for ref, content in (("", b"red"), ("@v1", b"red"), (f"@{first}", b"red"), ("@next/one", b"green")):
        with open_source(f"{address}{ref}#docs") as opened:
            assert opened.name == "papers/docs"
            assert opened.names() == ["a.md", "c.md", "deep/b.txt"][:: 2 if ref == "@next/one" else 1]
            assert content in opened.read("a.md").data
    with Repository(address) as whole:
        assert (whole.name, len(whole.names())) == ("papers", 4)


def test_only_what_is_wanted_is_fetched_and_the_copy_is_gone_afterwards(served):
    with Repository(f"{served}#docs") as opened:
        there = git(opened._copy, "cat-file", "--batch-check", "--batch-all-objects").decode()
        assert " blob " not in there
        opened.expect(["a.md"])
        there = git(opened._copy, "cat-file", "--batch-check", "--batch-all-objects").decode()
        assert there.count(" blob ") == 1
        read = opened.read("a.md")
        assert read.data == FILES["docs/a.md"]
        assert {"name": "a.md", "etag": read.etag} in opened.manifest()
        copy = opened._copy
    assert not copy.exists()


def test_links_and_hooks_of_a_repository_are_nothing_to_us(repository):
    (repository / "docs" / "passwords.txt").symlink_to("/etc/passwd")
    (repository / ".gitattributes").write_text("*.md filter=evil\n")
    git(repository, "config", "filter.evil.clean", "cat")
    commit(repository, {"docs/d\n.md": b"A name that is none."})
    with Repository(f"git+file://{repository}#docs") as opened:
        assert opened.names() == ["a.md", "c.md", "deep/b.txt"]
        assert opened.read("a.md").data == FILES["docs/a.md"]


@pytest.mark.parametrize(
    "address",
    [
        "git+ext://sh -c touch% /tmp/x",
        "git+https://user:secret@host/papers.git",
        "git+https://host",
        "git+file:///srv/papers.git@--upload-pack=touch",
        "git+https://host/papers.git@a b",
        "git+https://host/papers.git?x=1",
    ],
)
def test_an_address_that_is_no_repository_is_a_mistake(address):
    with pytest.raises(InvalidRequest) as refused, open_source(address):
        pass
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("wrong", ["#absent", "@absent", "/absent.git"])
def test_what_git_says_is_told(repository, wrong):
    with pytest.raises(SourceFailure, match="git says"), open_source(f"git+file://{repository}{wrong}"):
        pass


async def test_a_repository_is_kept_in_step_and_only_what_changed_is_fetched(service, repository, served):
    first = await run("ingest", f"{served}#docs", "--sync", *at(service))
    assert (first.exit_code, first.stdout.splitlines()[-1]) == (0, "3 created"), first.output
    assert set((await documents(service)).values()) == {"papers/docs"}
    commit(repository, {"docs/a.md": b"# A\n\nApples are green.", "docs/c.md": None, "docs/e.md": b"# E\n\nElder."})
    second = await run("ingest", f"{served}@main#docs", "--sync", *at(service))
    assert second.stdout.splitlines()[-1] == "1 created, 1 deleted, 1 replaced, 1 unchanged", second.output
    assert "+ e.md" in second.stdout
    last = await run("ingest", f"{served}#docs", "--sync", "--dry-run", *at(service))
    assert "0 added, 0 modified, 0 deleted, 3 unchanged, 0 failed" in last.stdout


# --- all together ---


async def test_places_and_urls_are_loaded_together(service, bucket, served, tmp_path):
    (tmp_path / "own.txt").write_text("My own words.")
    async with origin_server() as origin:
        origin.pages["/web.md"] = Page(b"# Web\n\nWebs are sticky.")
        urls = (origin.at("/web.md"), origin.at("/absent.md"))
        result = await run(
            "ingest", tmp_path / "own.txt", "s3://papers/docs", f"{served}#docs/deep", *urls, *at(service)
        )
    assert (result.exit_code, result.stdout) == (1, "6 created, 1 refused\n"), result.output
    assert "status 404" in result.stderr
    assert set(await documents(service)) == {"own.txt", "a.md", "c.md", "deep/b c+d.txt", "b.txt", urls[0]}


@pytest.mark.parametrize("arguments", [("http://site.test/", "--sync"), ("s3://", "--sync"), ("absent-folder",)])
async def test_a_place_that_is_none_is_a_mistake(arguments):
    result = await run("ingest", *arguments, "--key", "k")
    assert result.exit_code == 2, result.output


def test_what_is_picked_can_be_read():
    # Lines of JSON are data in most folders that hold them, as in the examples'.
    assert set(EXTENSIONS) - SUFFIXES == {".jsonl", ".ndjson"}
    assert set(EXTENSIONS) >= SUFFIXES
