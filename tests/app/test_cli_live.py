"""The commands that talk to a service, against a live one."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.client import Client
from tests.fake_tgi import FakeTGI, Refuse, Tokens
from tests.origin_server import Page, origin_server
from tests.service import NO_TLS, Service, live_service, until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[FakeTGI]:
    async with FakeTGI() as engine:
        yield engine


@pytest.fixture(scope="module")
async def everyones(engine: FakeTGI, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with live_service(tmp_path_factory.mktemp("cli"), engine_url=engine.url, tenants=30) as service:
        yield service


@pytest.fixture
def tgi(engine: FakeTGI) -> FakeTGI:
    engine.default = Tokens("A hallmark is a", " stamp on gold.")
    return engine


@pytest.fixture
def service(tgi: FakeTGI, everyones: Service) -> Service:
    """The module's service, with the key of a tenant that has nothing."""
    return replace(everyones, key=everyones.tenants.popitem()[1])


async def run(*arguments: str | Path) -> Result:
    """Run a command beside the service, which lives on this thread's loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, [str(argument) for argument in arguments])


def at(service: Service, key: str | None = None) -> tuple[str, ...]:
    return ("--url", service.url, "--key", key or service.key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "papers"
    (folder / "deep").mkdir(parents=True)
    (folder / "gold.md").write_text("# Gold\n\nA hallmark is a stamp on gold.")
    (folder / "deep" / "tea.txt").write_text("Green tea is brewed at eighty degrees.")
    (folder / "notes.bin").write_bytes(b"not for reading")
    return folder


# --- ingest ---


async def test_a_folder_is_loaded_with_its_own_names(service, folder):
    first = await run("ingest", folder, *at(service))
    assert (first.exit_code, first.stdout) == (0, "2 created\n"), first.output
    assert "documents loaded" in first.stderr
    async with service.client() as client:
        documents = (await client.get("/v1/documents")).json()["data"]
    assert {document["name"] for document in documents} == {"gold.md", "deep/tea.txt"}

    (folder / "gold.md").write_text("# Gold\n\nA hallmark is a stamp on gold and silver.")
    again = await run("ingest", folder, *at(service))
    assert (again.exit_code, again.stdout) == (0, "1 replaced, 1 unchanged\n")


async def test_hidden_files_and_folders_are_left_out_but_not_a_hidden_folder_that_is_named(service, folder):
    (folder / ".trash" / "deep").mkdir(parents=True)
    (folder / ".trash" / "deep" / "old.md").write_text("Old.")
    (folder / ".draft.md").write_text("A draft.")
    result = await run("ingest", folder, *at(service))
    assert (result.exit_code, result.stdout) == (0, "2 created\n")
    named = await run("ingest", folder / ".trash", folder / ".draft.md", *at(service))
    assert (named.exit_code, named.stdout) == (0, "2 created\n")


async def test_a_bad_file_is_told_and_the_others_are_loaded(service, folder):
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 no more")
    (folder / "empty[1].md").write_bytes(b"")
    result = await run("ingest", folder, *at(service))
    assert result.exit_code == 1
    assert result.stdout == "2 created, 2 refused\n"
    assert "broken.pdf:" in result.stderr
    assert "empty[1].md:" in result.stderr
    assert "(unreadable_document, status 422)" in result.stderr.replace("\n", " ")


async def test_a_file_that_cannot_be_read_is_told(service, folder):
    (folder / "odd.txt").symlink_to("/proc/self/mem")  # Reading it fails, for root as well.
    result = await run("ingest", folder, *at(service))
    assert (result.exit_code, result.stdout) == (1, "2 created, 1 refused\n")
    assert "odd.txt: It cannot be read" in result.stderr.replace("\n", " ")


async def test_single_files_are_loaded_whatever_their_suffix(service, folder):
    result = await run("ingest", folder / "gold.md", folder / "notes.bin", *at(service))
    assert (result.exit_code, result.stdout) == (0, "2 created\n")


async def test_what_cannot_go_on_stops_at_once(service, folder):
    for number in range(20):
        (folder / f"{number}.txt").write_text("x")
    reader = await service.new_key(scopes=("documents:read",))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for arguments, said in (
        (at(service, "hm_aaaaaaaa_wrong"), "invalid_api_key"),
        (at(service, reader), "insufficient_scope"),
        (("--url", nowhere, "--key", "k"), "cannot be reached"),
    ):
        result = await run("ingest", folder, *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.count(said) == 1


async def test_a_folder_without_documents_is_a_mistake(service, tmp_path):
    (tmp_path / "nothing").mkdir()
    result = await run("ingest", tmp_path / "nothing", *at(service))
    assert result.exit_code == 1
    assert "no document" in result.stderr
    assert (await run("ingest", tmp_path / "absent", *at(service))).exit_code == 2


async def test_documents_of_one_name_in_two_places_are_refused_before_any_is_sent(service, folder, tmp_path):
    other = tmp_path / "old"
    other.mkdir()
    (other / "gold.md").write_text("# Gold\n\nGold was not stamped.")
    for places in ((folder, other), (folder / "gold.md", other / "gold.md")):
        result = await run("ingest", *places, *at(service))
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{places[0]} and {places[1]} both have a document called 'gold.md'" in result.stderr
        assert "give the folder above both" in result.stderr
    async with service.client() as client:
        assert (await client.get("/v1/documents")).json()["data"] == []
    above = await run("ingest", tmp_path, *at(service))
    assert (above.exit_code, above.stdout) == (0, "3 created\n")
    twice = await run("ingest", folder, folder, *at(service))
    assert (twice.exit_code, twice.stdout) == (0, "2 created\n")  # The same place is none other.


# --- ask ---


async def test_an_answer_is_shown_with_what_it_rests_on(service, folder):
    await run("ingest", folder, *at(service))
    result = await run("ask", "What is a hallmark?", *at(service))
    assert result.exit_code == 0, result.output
    answer, sources = result.stdout.split("\n", 1)
    assert answer == "A hallmark is a stamp on gold [1]."
    assert "[1] Gold - Gold (supported)" in sources
    assert '"A hallmark is a stamp on gold."' in sources
    url = re.search(rf"{service.url}/v1/documents/\S+", sources)
    assert url is not None
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as browser:
        assert (await browser.get(url[0])).status_code == 200


async def test_every_quote_is_shown_under_its_source(service, folder, tgi):
    second = "Silver is stamped with a lion."
    (folder / "gold.md").write_text(f"# Gold\n\nA hallmark is a stamp on gold. {second}")
    await run("ingest", folder, *at(service))
    tgi.script(Tokens("A hallmark is a stamp on gold. Silver is stamped with a lion. The stamp on gold is a hallmark."))
    result = await run("ask", "What is a hallmark on gold and silver?", *at(service))
    answer, sources = result.stdout.split("\n", 1)
    assert answer.count("[1]") == 3, result.output
    heading, first, other, url = sources.splitlines()
    assert heading == "[1] Gold - Gold (supported)"
    assert [first.strip(), other.strip()] == ['"A hallmark is a stamp on gold."', f'"{second}"']
    assert url.strip().startswith(service.url)


async def test_an_answer_is_shown_as_it_comes(service, tgi):
    hold = asyncio.Event()
    tgi.script(Tokens("First", " second", gates={1: hold}))

    def ask() -> list[str]:
        with Client(service.url, service.key) as client:
            texts = []
            for chunk in client.stream("Hello", model="hallmark"):
                texts += [choice["delta"].get("content") for choice in chunk["choices"]]
                if texts[-1] == "First":
                    loop.call_soon_threadsafe(hold.set)
            return [text for text in texts if text]

    loop = asyncio.get_running_loop()
    assert await asyncio.to_thread(ask) == ["First", " second"]


async def test_words_of_the_model_are_not_markup(service, tgi):
    tgi.script(Tokens("[red]stop[/red] :key: [", "/", "] done"))
    result = await run("ask", "Hello", *at(service))
    assert (result.exit_code, result.stdout) == (0, "[red]stop[/red] :key: [/] done\n")


async def test_an_abstention_says_why(service, folder):
    await run("ingest", folder, *at(service))
    result = await run("ask", "Who won the election in Peru in 1985?", *at(service))
    assert result.exit_code == 0
    assert "abstained (nothing relevant)" in result.stdout


async def test_a_refusal_is_told(service, tgi):
    unknown = await run("ask", "Hello", "--model", "gpt-4", *at(service))
    assert (unknown.exit_code, unknown.stdout) == (1, "\n")
    assert "model_not_found" in unknown.stderr
    tgi.default = lambda body: Refuse.overloaded()
    busy = await run("ask", "Hello", *at(service))
    assert busy.exit_code == 1
    assert "(overloaded, status 429)" in busy.stderr


async def test_an_answer_that_breaks_off_is_told_after_what_came(service, tgi):
    sent = asyncio.Event()
    tgi.script(Tokens("One", " two", fail_after=1, gates={1: sent}))
    asking = asyncio.create_task(run("ask", "Hello", *at(service)))
    async with service.client() as client:

        async def answering() -> bool:
            return "hallmark_requests_in_flight 1.0" in (await client.get("/metrics")).text

        await until(answering)
    sent.set()
    result = await asking
    assert result.exit_code == 1
    assert "engine" in result.stderr


async def test_a_command_without_a_key_says_how_to_give_one(service):
    result = await run("ask", "Hello", "--url", service.url)
    assert result.exit_code == 2
    assert "--key" in result.stderr


async def test_an_address_without_its_scheme_is_told(monkeypatch):
    monkeypatch.setenv("HALLMARK_URL", "foo")
    result = await run("ask", "Hello", "--key", "k")
    assert (result.exit_code, result.stdout) == (1, "\n")
    assert result.stderr == "error: 'foo' is no address of a service: it must begin with http:// or https://.\n"


@pytest.mark.parametrize("url", ["http://[::1", "http://x:abc"])
async def test_an_address_that_is_none_is_told(url):
    for command in (("ask", "Hello"), ("predictions", "list")):
        result = await run(*command, "--key", "k", "--url", url)
        assert (result.exit_code, type(result.exception)) == (1, SystemExit)
        assert f"error: {url!r} is no address of a service" in result.stderr


@pytest.mark.parametrize("key", ["hm_ü", "hm_secret\n"])
async def test_a_key_that_is_none_is_told_and_not_repeated(service, key):
    result = await run("ask", "Hello", *at(service, key))
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "The API key has a character" in result.stderr
    assert key.strip() not in result.stderr


async def test_what_is_no_text_is_told(service):
    result = await run("ask", "Hello\udcff", *at(service))
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "is no text" in result.stderr


@pytest.mark.parametrize("body", [b"<html>Hello</html>", b"data: <html>\n\n", b'data: {"choices": []}\n\n', b"[]", b""])
async def test_another_server_is_told_from_the_service(body):
    async with origin_server() as origin:
        for path in ("/v1/chat/completions", "/v1/predictions?limit=20"):
            origin.pages[path] = Page(body)
        for command in (("ask", "Hello"), ("predictions", "list")):
            result = await run(*command, "--key", "k", "--url", origin.at(""))
            assert (result.exit_code, type(result.exception)) == (1, SystemExit)
            assert "Hallmark service does" in result.stderr


# --- demo ---


async def test_the_demo_loads_asks_and_shows_the_key(service, folder):
    arguments = ("demo", "--url", service.url, "--examples", folder, "--data-dir", service.data_dir)
    first = await run(*arguments)
    assert first.exit_code == 0, first.output
    assert "2 created" in first.stdout
    assert first.stdout.count("Q ") == first.stdout.count("A ") == 2
    assert re.search(r"prediction [0-9a-f-]{36}, release digest [0-9a-f]{12}", first.stdout)
    key = re.search(r"API key: (hm_\S+)", first.stdout)
    assert key is not None
    async with service.client(key[1]) as client:
        assert (await client.get("/v1/me")).json()["name"] == "demo"
    assert (service.data_dir / "demo.key").stat().st_mode & 0o777 == 0o600

    again = await run(*arguments)
    assert "2 unchanged" in again.stdout
    assert f"API key: {key[1]}" in again.stdout


async def test_the_demo_without_examples_or_service_says_so(service, tmp_path):
    absent = await run("demo", "--url", service.url, "--examples", tmp_path / "absent", "--data-dir", service.data_dir)
    assert absent.exit_code == 1
    assert "--examples" in absent.stderr


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1:1", "http://127.0.0.1:1/v1", "http://10.255.255.1.example:1", "x:1"]
)
async def test_the_demo_starts_a_service_on_this_machine_only(folder, tmp_path, url):
    result = await run("demo", "--start", "--url", url, "--examples", folder, "--data-dir", tmp_path / "data")
    assert result.exit_code == 1
    assert "on this machine only" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "data" / "service.pid").exists()


@pytest.mark.slow
async def test_the_demo_starts_a_service_with_the_engine_that_the_settings_name(tgi, folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALLMARK_", "OTEL_"))}
    arguments = ("demo", "--start", "--url", f"http://localhost:{port}/", "--examples", folder, "--data-dir", "data")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app", *map(str, arguments)),
        env={**clean, "HALLMARK_ENGINE_URL": tgi.url, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(50):
            output, _ = await process.communicate()
    finally:
        for name in ("worker", "service"):
            os.kill(int((tmp_path / "data" / f"{name}.pid").read_text()), signal.SIGTERM)
    assert process.returncode == 0
    assert output.count(b"prediction ") == 2
    assert "Working on" in (tmp_path / "data" / "worker.log").read_text()
    assert "/health" in {request.path for request in tgi.requests}


# --- serve ---


@pytest.mark.slow
async def test_a_service_is_started_asked_and_stopped(tgi, folder, tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALLMARK_", "OTEL_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app", "serve", "--port", "0", "--data-dir", str(tmp_path / "served")),
        env={**clean, "HALLMARK_ENGINE_URL": tgi.url, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(50):
            while not (found := re.search(rb"Serving on (http://[0-9.:]+)", await process.stderr.readline())):
                pass
        url = found[1].decode()
        key = (await run("keys", "create", "x", *SCOPES, "--data-dir", tmp_path / "served")).stdout.strip()
        loaded = await run("ingest", folder, "--url", url, "--key", key)
        asked = await run("ask", "What is a hallmark?", "--url", url, "--key", key)
        async with httpx.AsyncClient(
            base_url=url, headers={"authorization": f"Bearer {key}"}, trust_env=False
        ) as client:
            for model in ("all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
                embedded = (await client.post("/v1/embeddings", json={"model": model, "input": "a kettle"})).json()
                assert (embedded["model"], len(embedded["data"][0]["embedding"])) == (model, 384)
                assert embedded["usage"]["prompt_tokens"] == 2
    finally:
        process.send_signal(signal.SIGTERM)
        rest = (await process.communicate())[1]
    assert (loaded.exit_code, loaded.stdout) == (0, "2 created\n"), loaded.output
    assert asked.stdout.startswith("A hallmark is a stamp on gold [1].")
    assert process.returncode == 0
    assert b"Traceback" not in rest
    assert not [said for said in (b"What is a hallmark", b"stamp on gold", b"kettle", key.encode()) if said in rest]


SCOPES = ("--scope", "chat", "--scope", "documents:read", "--scope", "documents:write")


# --- ingest --sync, jobs ---


async def test_a_folder_is_kept_in_step(service, folder):
    dry = await run("ingest", folder, "--sync", "--dry-run", *at(service))
    assert dry.exit_code == 0, dry.output
    assert dry.stdout == "+ deep/tea.txt\n+ gold.md\npapers: 2 added, 0 modified, 0 deleted, 0 unchanged, 0 failed\n"
    first = await run("ingest", folder, "--sync", *at(service))
    assert (first.exit_code, first.stdout.splitlines()[-1]) == (0, "2 created"), first.output

    (folder / "gold.md").write_text("# Gold\n\nA hallmark is a stamp on gold and silver.")
    (folder / "deep" / "tea.txt").unlink()
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 no more")
    second = await run("ingest", folder, "--sync", *at(service))
    assert second.exit_code == 1  # One document failed, and the others are done.
    assert second.stdout.splitlines()[-1] == "1 deleted, 1 failed, 1 replaced"
    assert "broken.pdf:" in second.stderr
    async with service.client() as client:
        assert [document["name"] for document in (await client.get("/v1/documents")).json()["data"]] == ["gold.md"]

    again = await run("ingest", folder, "--sync", *at(service))
    assert "! broken.pdf: failed before" in again.stdout
    (folder / "broken.pdf").unlink()
    last = await run("ingest", folder, "--sync", *at(service))
    assert (last.exit_code, last.stdout.splitlines()[-1]) == (0, "1 unchanged")

    listed = await run("jobs", "list", *at(service))
    assert listed.stdout.count("sync") == 4
    async with service.client() as client:
        ids = [job["id"] for job in (await client.get("/v1/jobs")).json()["data"]]
    assert [job_id in listed.stdout for job_id in ids] == [True] * 4  # In 80 columns.
    job_id = ids[-1]
    shown = await run("jobs", "show", job_id, *at(service))
    assert "2 created" in shown.stdout
    assert (await run("jobs", "cancel", job_id, *at(service))).stdout == f"{job_id}: done\n"


async def test_an_emptied_folder_deletes_most_documents_only_when_that_is_said(service, folder):
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"Number {number}.")
    await run("ingest", folder, "--sync", *at(service))
    for file in folder.rglob("*.*"):
        file.unlink()
    refused = await run("ingest", folder, "--sync", *at(service))
    assert refused.exit_code == 2
    assert "--max-deletes 8" in refused.stderr
    kept = await run("ingest", folder, "--sync", "--max-deletes", "3", *at(service))
    assert (kept.exit_code, "say --max-deletes 8 if that is meant" in kept.stderr) == (2, True)
    async with service.client() as client:
        assert len((await client.get("/v1/documents")).json()["data"]) == 8
    gone = await run("ingest", folder, "--sync", "--yes", *at(service))
    assert (gone.exit_code, gone.stdout.splitlines()[-1]) == (0, "8 deleted"), gone.output


@pytest.mark.parametrize("arguments", [("--sync",), ("--dry-run",), ("--source", "x")])
async def test_options_that_do_not_go_together_are_a_mistake(folder, arguments):
    paths = (folder, folder) if arguments == ("--sync",) else (folder,)
    result = await run("ingest", *paths, *arguments, "--key", "k")
    assert result.exit_code == 2
    assert "--sync" in result.stderr
