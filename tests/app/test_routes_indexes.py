"""Index versions over HTTP and on the command line: built by a job, compared, switched, gone back from, dropped."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from tests.fake_tgi import FakeTGI
from tests.service import Api, Service, live_service, until

SECTIONS = "\n\n".join(
    f"# Part {n}\n\nThe tower of part {n} is {n}30 metres tall. {'It stands. ' * 30}" for n in range(4)
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    given = {"retrieval": {"next_passage_tokens": 400}}
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("indexes"), engine_url=tgi.url, tenants=9, settings=given) as service,
    ):
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    """A tenant, in a service with nothing but its live version."""
    async with service.tenant() as api:
        yield api
        for version in await versions(api):
            if version["state"] != "live":
                await api.client.delete(f"/v1/indexes/{version['id']}")


async def versions(api: Api) -> list[dict[str, Any]]:
    return list((await api.client.get("/v1/indexes")).json()["data"])


async def built(api: Api) -> str:
    response = await api.client.post("/v1/indexes")
    assert response.status_code == 202, response.text
    begun = response.json()

    async def look() -> dict[str, Any] | None:
        job = (await api.client.get(f"/v1/jobs/{begun['job']['id']}")).json()
        return job if job["finished_at"] else None

    job = await until(look)
    assert (job["kind"], job["state"], job["outcomes"]["built"]) == ("build", "done", 1)
    return str(begun["index"]["id"])


async def move(api: Api, path: str, **body: Any) -> dict[str, Any]:
    response = await api.client.post(f"/v1/indexes/{path}", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_a_version_is_built_compared_switched_to_and_named_by_each_prediction(api: Api) -> None:
    await api.add("towers.md", SECTIONS)
    before = next(each["id"] for each in await versions(api) if each["state"] == "live")
    new = await built(api)
    shown = (await api.client.get(f"/v1/indexes/{new}")).json()
    assert (shown["state"], shown["missing_documents"], shown["made_of"]["passage_tokens"]) == ("ready", 0, 400)

    refused = await api.client.post(f"/v1/indexes/{new}/switch", json={})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert "hallmark index compare" in refused.json()["error"]["message"]
    question = {"question": "How tall is the tower of part 2?", "documents": {"towers.md": 1}}
    compared = await move(api, f"{new}/compare", questions=[question])
    figures = {each["name"]: (each["live"], each["value"]) for each in compared["comparison"]["figures"]}
    assert figures == {"ndcg@10": (1.0, 1.0), "recall@10": (1.0, 1.0), "mrr@10": (1.0, 1.0)}

    await api.answer("How tall is the tower of part 2?")
    assert (await move(api, f"{new}/switch"))["state"] == "live"
    await api.answer("How tall is the tower of part 2?")
    assert [each["index_version"] for each in await api.records(2)] == [new, before]
    found = (await api.client.post("/v1/search", json={"query": "tower"})).json()
    assert found["index_version"] == new
    document = (await api.client.get("/v1/documents")).json()["data"][0]
    assert document["index_version"] == new
    assert (await move(api, "rollback"))["id"] == before


async def test_what_cannot_be_done_is_a_conflict_or_unknown(api: Api) -> None:
    live = (await versions(api))[0]["id"]
    for method, path, body, status, code in (
        ("POST", "/v1/indexes/rollback", None, 409, "conflict"),
        ("DELETE", f"/v1/indexes/{live}", None, 409, "conflict"),
        ("POST", f"/v1/indexes/{live}/switch", {}, 409, "conflict"),
        ("GET", "/v1/indexes/other", None, 404, "not_found"),
        ("POST", f"/v1/indexes/{live}/compare", {"questions": []}, 400, "invalid_request"),
    ):
        response = await api.client.request(method, path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text


async def test_the_job_of_a_build_is_the_tenants_and_shows_no_document(api: Api, service: Service) -> None:
    await api.add("towers.md", SECTIONS)
    async with service.tenant() as other:
        new = await built(other)
        (job,) = (await other.client.get("/v1/jobs")).json()["data"]
        (item,) = (await other.client.get(f"/v1/jobs/{job['id']}/documents")).json()["data"]
        assert (item["action"], item["name"], item["outcome"]) == ("build", new, "built")
        assert (await api.client.get(f"/v1/jobs/{job['id']}")).status_code == 404


async def run(*arguments: str | Path) -> Result:
    """Run a command beside the service, which lives on this thread's loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["index", *map(str, arguments)])


async def test_the_command_line_builds_compares_switches_goes_back_and_drops(
    api: Api, service: Service, tmp_path: Path
) -> None:
    at = ("--url", service.url, "--key", api.key)
    await api.add("towers.md", SECTIONS)
    live = (await versions(api))[0]["id"]
    made = await run("build", *at)
    assert made.exit_code == 0, made.output
    new = made.stdout.partition(":")[0]
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "How tall is part 2?", "documents": ["towers.md"]}) + "\n")
    compared = await run("compare", questions, new, *at)
    assert "1 questions" in compared.stdout
    assert "ndcg@10" in compared.stdout
    assert f"{new} is live" in (await run("switch", new, *at)).stdout
    listed = (await run("list", *at)).stdout
    assert "retired" in listed
    assert f"{new} live" in listed  # In 80 columns.
    assert f"{live} retired" in listed
    refused = await run("drop", new, *at)
    assert (refused.exit_code, "is live" in refused.stderr) == (1, True)
    assert f"{live} is live" in (await run("rollback", *at)).stdout
    assert f"{new} is dropped" in (await run("drop", new, *at)).stdout
    questions.write_text('{"question": "Who?"}\n')
    assert (await run("compare", questions, new, *at)).exit_code == 2
