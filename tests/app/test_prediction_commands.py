"""`hallmark predictions` against a live service, and against one that breaks off."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner, Result

from app.cli import app
from tests.fake_tgi import FakeTGI
from tests.service import Api, Service, live_service, serving


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with FakeTGI() as tgi, live_service(tmp_path / "data", engine_url=tgi.url) as service:
        yield service


@pytest.fixture
async def asked(service) -> AsyncIterator[list[str]]:
    """The ids of some predictions, oldest first."""
    async with service.client() as client:
        api = Api(client, "default", service.key)
        yield [(await api.answer(f"Question [bold] {n}", user=f"user {n % 2}"))["id"] for n in range(5)]


async def run(
    service: Service, *arguments: str | Path, key: str | None = None, url: str | None = None, columns: str = "250"
) -> Result:
    given = ["predictions", *map(str, arguments), "--url", url or service.url, "--key", key or service.key]
    return await asyncio.to_thread(CliRunner(env={"COLUMNS": columns}).invoke, app, given)


async def test_predictions_are_listed(service, asked):
    listed = await run(service, "list", "--limit", "2")
    assert listed.exit_code == 0, listed.output
    assert asked[4] in listed.stdout
    assert asked[3] in listed.stdout
    assert asked[2] not in listed.stdout
    assert "hallmark@1" in listed.stdout
    some = (await run(service, "list", "--user", "user 1")).stdout
    assert [asked[n] in some for n in range(5)] == [False, True, False, True, False]
    for columns, is_wide in (("80", False), ("120", True)):
        lines = (await run(service, "list", columns=columns)).stdout.splitlines()
        assert [line[:36] for line in lines[1:]] == asked[::-1]
        assert max(map(len, lines)) <= int(columns)
        assert all("hallmark@1" in line and "finished" in line for line in lines[1:])
        assert ["Question [bold] 4" in line for line in lines[1:]] == [is_wide, False, False, False, False]
    async with service.client() as client:
        await client.post("/v1/labels", json={"prediction_id": asked[4], "class": "refund"})
        await client.post("/v1/feedback", json={"prediction_id": asked[3], "rating": False})
    some = (await run(service, "list", "--label-state", "unlabelled", "--feedback-state", "negative")).stdout
    assert [asked[n] in some for n in range(5)] == [False, False, False, True, False]
    some = (await run(service, "list", "--label-state", "labelled")).stdout
    assert [asked[n] in some for n in range(5)] == [False, False, False, False, True]
    refused = await run(service, "list", "--outcome", "great")
    assert refused.exit_code == 1
    assert "outcome" in refused.stderr


async def test_predictions_are_exported_as_lines(service, asked, tmp_path):
    target = tmp_path / "out.jsonl"
    done = await run(service, "export", "--out", target)
    assert (done.exit_code, done.stdout) == (0, f"5 predictions in {target}\n"), done.output
    assert "exporting predictions" in done.stderr
    assert [json.loads(line)["id"] for line in target.read_text().splitlines()] == asked
    await run(service, "export", "--out", target, "--user", "user 0")
    assert [json.loads(line)["id"] for line in target.read_text().splitlines()] == asked[::2]
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == ["out.jsonl"]


async def test_predictions_are_exported_as_parquet(service, asked, tmp_path):
    target = tmp_path / "out.parquet"
    done = await run(service, "export", "--format", "parquet", "--out", target)
    assert done.exit_code == 0, done.output
    table = pq.read_table(target)
    assert table.column("id").to_pylist() == asked
    assert json.loads(table.column("request").to_pylist()[0])["user"] == "user 0"
    nothing = await run(service, "export", "--format", "parquet", "--out", target, "--user", "nobody")
    assert nothing.exit_code == 0
    assert pq.read_table(target).num_rows == 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
async def test_an_export_that_breaks_off_leaves_what_was_there(service, tmp_path, kind):
    async def broken() -> AsyncIterator[bytes]:
        yield b'{"id": "1"}\n' * 1000
        raise OSError("the cable was cut")

    async def export(_: object) -> StreamingResponse:
        return StreamingResponse(broken())

    async def count(_: object) -> JSONResponse:
        return JSONResponse({"count": 2000})

    target = tmp_path / "out"
    target.write_text("before")
    routes = [Route("/v1/predictions/export", export), Route("/v1/predictions/count", count)]
    async with serving(Starlette(routes=routes)) as url:
        done = await run(service, "export", "--out", target, "--format", kind, url=url)
    assert done.exit_code == 1
    assert "broke off" in done.stderr
    assert target.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("out")] == ["out"]


async def test_an_export_that_is_refused_makes_no_file(service, asked, tmp_path):
    target = tmp_path / "out.jsonl"
    key = await service.new_key(scopes=("chat",))
    assert (await run(service, "export", "--out", target, key=key)).exit_code == 1
    nowhere = await run(service, "export", "--out", tmp_path / "no" / "out.jsonl")
    assert nowhere.exit_code == 1
    assert f"There is no folder '{tmp_path / 'no'}' to write out.jsonl into." in nowhere.stderr
    assert not target.exists()


def test_without_pyarrow_parquet_is_refused_with_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['pyarrow'] = None; from app.cli import app; "
        "app(['predictions', 'export', '--format', 'parquet', '--out', sys.argv[1], '--key', 'k'])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True, timeout=50)
    assert done.returncode == 2, done.stderr
    assert "pip install 'hallmark[export]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


async def test_a_lineage_is_shown_and_what_does_not_verify_is_an_error(service, asked):
    shown = await run(service, "lineage", asked[0])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["release"]["id"] == "hallmark@1"
    trace = {"verified": False, "release": {"problems": ["It was changed."]}}

    async def lineage(_: object) -> JSONResponse:
        return JSONResponse(trace)

    async with serving(Starlette(routes=[Route("/v1/predictions/x/lineage", lineage)])) as url:
        told = await run(service, "lineage", "x", url=url)
    assert told.exit_code == 1
    assert json.loads(told.stdout) == trace
