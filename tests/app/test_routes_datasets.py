"""`/v1/datasets` and `hallmark datasets` against a live service."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from tests.fake_tgi import FakeTGI
from tests.lineage_world import digest_of
from tests.service import Api, Service, live_service, until

RECIPE = {"task": "classify", "split": {"heldout": 0.3}}
QUESTIONS = ["Where is my card at last?", "I want my money back.", "How do I change the number?", "Who opened this?"]


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("datasets"), engine_url=tgi.url, tenants=12) as service,
    ):
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


async def labelled(api: Api, questions: list[str] = QUESTIONS) -> list[str]:
    ids = []
    for number, question in enumerate(questions):
        ids.append((await api.answer(question, user=f"user {number}"))["id"])
        stated = {"prediction_id": ids[-1], "class": "card" if number % 2 else "money"}
        assert (await api.client.post("/v1/labels", json=stated)).status_code == 201
    return ids


async def ended(api: Api, response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 202, response.text
    build = response.json()

    async def done() -> dict[str, Any] | None:
        found = (await api.client.get(f"/v1/datasets/{build['dataset']}/builds/{build['id']}")).json()
        return found if found["state"] not in ("waiting", "running") else None

    return await until(done)


async def built(api: Api, **given: Any) -> dict[str, Any]:
    body = {"recipe": RECIPE, **given}
    return await ended(api, await api.client.post("/v1/datasets/support/builds", json=body))


async def run(service: Service, api: Api, *arguments: str | Path) -> Result:
    given = ["datasets", *map(str, arguments), "--url", service.url, "--key", api.key]
    return await asyncio.to_thread(CliRunner(env={"COLUMNS": "200"}).invoke, app, given)


async def test_a_dataset_is_built_listed_compared_traced_and_exported(api):
    ids = await labelled(api)
    build = await built(api)
    assert (build["state"], build["version"]) == ("done", 1), build
    assert build["report"]["steps"][0]["noted"] == {"predictions": 4}
    version = (await api.client.get("/v1/datasets/support/versions/latest")).json()
    assert (version["rows"], version["manifest"]["digest"], version["erased"]) == (4, version["digest"], 0)
    (listed,) = (await api.client.get("/v1/datasets")).json()["data"]
    assert (listed["name"], listed["version"], listed["purpose"]) == ("support", 1, "training")
    assert (await api.client.get("/v1/datasets/support")).json() == listed
    rows = (await api.client.get("/v1/datasets/support/versions/1/rows", params={"limit": 3})).json()
    more = await api.client.get("/v1/datasets/support/versions/1/rows", params={"after": rows["next"]})
    found = rows["data"] + more.json()["data"]
    assert {row["prediction_id"] for row in found} == set(ids)
    assert {row["content"]["question"] for row in found} == set(QUESTIONS)
    lines = b""
    for split in ("train", "heldout"):
        file = await api.client.get(f"/v1/datasets/support/versions/1/files/{split}.jsonl")
        assert (file.status_code, file.headers["x-dataset-digest"]) == (200, version["digest"])
        assert version["manifest"]["splits"][split]["sha256"] == digest_of(file.text)
        lines += file.content
    assert len(lines.splitlines()) == 4
    for each in (b"PAR1", b"PAR1"):
        parquet = await api.client.get("/v1/datasets/support/versions/1/files/train.parquet")
        assert parquet.content[:4] == parquet.content[-4:] == each
    traced = (await api.client.get(f"/v1/lineage/datasets/{version['digest']}")).json()
    assert traced["dataset"]["verified"] is True
    assert {row["prediction_id"] for row in traced["data"]} == set(ids)
    await labelled(api, ["A question that nobody had asked before?"])
    assert (await built(api))["version"] == 2
    diff = (await api.client.get("/v1/datasets/support/diff", params={"old": "1"})).json()
    assert (diff["added"], diff["removed"], diff["changed"], diff["new"]) == (1, 0, 0, 2)
    assert diff["data"][0]["content"]["label"] == "money"
    places = (await api.client.get("/v1/dataset-rows", params={"prediction_id": ids[0]})).json()["data"]
    assert [(each["dataset"], each["first"], each["end"]) for each in places] == [("support", 1, None)]
    tagged = await api.client.put("/v1/datasets/support/tags/good", json={"version": 1})
    assert tagged.json()["tags"] == ["good"]
    assert (await api.client.get("/v1/datasets/support/versions/good")).json()["version"] == 1
    assert (await api.client.delete("/v1/datasets/support/tags/good")).status_code == 200
    assert (await api.client.delete("/v1/datasets/support/tags/good")).status_code == 404
    versions = (await api.client.get("/v1/datasets/support/versions")).json()["data"]
    assert [each["version"] for each in versions] == [2, 1]
    builds = (await api.client.get("/v1/datasets/support/builds")).json()["data"]
    assert [each["version"] for each in builds] == [2, 1]


async def test_files_are_imported_or_each_bad_line_is_told(api):
    good = b'{"text": "Where is my card?", "label": "card"}\n{"text": "I want my money.", "label": "money"}\n'
    form = {"recipe": json.dumps({"task": "classify"})}
    files = [
        ("files", ("data/train-0.jsonl", good)),
        ("files", ("data/test-0.csv", b"text,label\nWhy is it so?,card\n")),
    ]
    build = await ended(api, await api.client.post("/v1/datasets/mine/imports", data=form, files=files))
    assert build["report"]["rows"] == {"train": {"card": 1, "money": 1}, "heldout": {"card": 1}}
    bad = [("files", ("train.jsonl", good + b'{"text": "no label"}\n'))]
    refused = await api.client.post("/v1/datasets/mine/imports", data=form, files=bad)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert "train.jsonl line 3: `label` is missing" in error["message"]
    assert error["param"] == "files"
    assert (await api.client.get("/v1/datasets/mine")).json()["version"] == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"recipe": {"task": "rank"}}, "recipe.task"),
        ({"recipe": {"task": "classify", "query": {"relase": "x"}}}, "recipe.query.relase"),
        ({"recipe": {"task": "extract"}}, "schema"),
        ({"recipe": {"task": "classify", "columns": {"label": "x"}}}, "columns"),
        ({"recipe": {"task": "classify"}, "purpose": "fun"}, "purpose"),
        ({}, "recipe"),
    ],
)
async def test_a_recipe_that_cannot_be_is_refused_by_field(service, body, field):
    async with service.client() as client:
        refused = await client.post("/v1/datasets/x/builds", json=body)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"content": b"x", "headers": {"content-type": "text/csv"}}, 415),
        ({"data": {"recipe": "{}"}, "files": [("other", ("a.csv", b"x"))]}, 400),
        ({"data": {"recipe": "no"}, "files": [("files", ("a.csv", b"x"))]}, 400),
        ({"data": {"recipe": '{"task": "classify"}', "purpose": "fun"}, "files": [("files", ("a.csv", b"x"))]}, 400),
        ({"data": {"recipe": '{"task": "classify"}'}, "files": [("files", ("a.csv", b"x"))] * 2}, 400),
        ({"data": {"recipe": '{"task": "classify"}'}, "files": [("files", ("a.exe", b"x"))]}, 400),
    ],
)
async def test_a_form_that_cannot_be_read_is_refused(service, given, status):
    async with service.client() as client:
        refused = await client.post("/v1/datasets/x/imports", **given)
        assert refused.status_code == status, refused.text
        assert refused.json()["error"]["code"] in ("invalid_request", "unsupported_media_type")
        assert (await client.get("/v1/datasets/x")).status_code == 404


async def test_a_key_may_only_what_its_scopes_say(service):
    reader = await service.new_key(scopes=("datasets:read",))
    writer = await service.new_key(scopes=("datasets:write", "predictions:read"))
    async with service.client(reader) as client:
        assert (await client.get("/v1/datasets")).status_code == 200
        for call in (
            client.post("/v1/datasets/x/builds", json={"recipe": RECIPE}),
            client.post("/v1/datasets/x/imports", data={"recipe": "{}"}, files=[("files", ("a.csv", b"x"))]),
            client.put("/v1/datasets/x/tags/t", json={"version": 1}),
            client.delete("/v1/datasets/x/tags/t"),
        ):
            assert (await call).status_code == 403
    async with service.client(writer) as client:
        assert (await client.get("/v1/datasets")).status_code == 403
        # Whoever builds sees what it is made of.
        refused = await client.post("/v1/datasets/x/builds", json={"recipe": RECIPE})
        assert (refused.status_code, "labels:read" in refused.json()["error"]["message"]) == (403, True)


async def test_another_tenants_dataset_is_none(service, api):
    await labelled(api)
    await built(api)
    async with service.tenant() as other:
        for path in (
            "",
            "/versions",
            "/versions/1",
            "/versions/1/rows",
            "/versions/1/files/train.jsonl",
            "/diff?old=1",
        ):
            assert (await other.client.get(f"/v1/datasets/support{path}")).status_code == 404, path
        assert (await other.client.get("/v1/datasets")).json()["data"] == []
        assert (await other.client.get("/v1/datasets/support/builds")).json()["data"] == []


async def test_the_command_line_builds_imports_compares_and_exports(service, api, tmp_path):
    await labelled(api)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('task = "classify"\n[split]\nheldout = 0.3\n')
    done = await run(service, api, "build", "support", recipe)
    assert (done.exit_code, "support@1 made" in done.output) == (0, True), done.output
    again = await run(service, api, "build", "support", recipe)
    assert "support@1 unchanged" in again.output
    await labelled(api, ["A question that nobody had asked before?"])
    assert (await run(service, api, "build", "support", recipe)).exit_code == 0
    diff = await run(service, api, "diff", "support", "1")
    assert "1 added, 0 removed, 0 of them changed" in diff.output
    assert "A question that nobody" in diff.output
    assert (await run(service, api, "tag", "support@1", "good")).output == "support@1 is good\n"
    shown = await run(service, api, "show", "support@good")
    assert "support@1 (good), classify, training" in shown.output
    out = tmp_path / "out"
    exported = await run(service, api, "export", "support@good", "--out", out)
    assert exported.exit_code == 0, exported.output
    manifest = json.loads((out / "manifest.json").read_text())
    for split, said in manifest["splits"].items():
        assert digest_of((out / f"{split}.jsonl").read_text()) == said["sha256"]
    folder = tmp_path / "theirs"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text('{"text": "Where is my card?", "label": "card"}\n')
    (folder / "README.md").write_text("not read")
    brought = await run(service, api, "import", "mine", recipe, folder)
    assert (brought.exit_code, "mine@1 made" in brought.output) == (0, True), brought.output
    (folder / "data" / "test.csv").write_text("text\nx\n")
    refused = await run(service, api, "import", "mine", recipe, folder)
    assert refused.exit_code == 1
    assert "data/test.csv line 2: `label` is missing" in refused.output
    listed = await run(service, api, "list")
    assert "support" in listed.output
    assert "mine" in listed.output
    failed = await run(service, api, "build", "none", _written(tmp_path, {"task": "classify", "query": {"user": "x"}}))
    assert failed.exit_code == 1
    assert "No row is left" in failed.output


def _written(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


async def test_an_end_of_a_window_without_a_zone_is_utc(api):
    ids = await labelled(api, QUESTIONS[:1])
    exported = await api.client.get("/v1/predictions/export", params={"until": "2100-01-01"})
    assert [json.loads(line)["id"] for line in exported.text.splitlines()] == ids
