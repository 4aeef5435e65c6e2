"""Predictions and their lineage over HTTP, with a database of one's own and with one that is shared."""

import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pyarrow.parquet as pq
import pytest

from app.lineage import canonical
from app.predictions import FACTS, uuid7
from app.vetting import folder_digest
from tests.fake_tgi import FakeTGI
from tests.lineage_world import dataset_of, digest_of, row_of, run_of
from tests.postgres import Postgres
from tests.service import CHAT, EVERYTHING, Api, Service, live_service, until


@pytest.fixture
async def tgi() -> AsyncIterator[FakeTGI]:
    async with FakeTGI(adapters=("tone",)) as tgi:
        yield tgi


@contextlib.asynccontextmanager
async def serve(
    directory: Path, tgi: FakeTGI, *, tenants: int = 0, **settings: Any
) -> AsyncIterator[tuple[Service, Api]]:
    running = live_service(directory, engine_url=tgi.url, settings=settings, tenants=tenants)
    async with running as service, service.client() as client:
        yield service, Api(client, "default", service.key)


@pytest.fixture
async def api(tmp_path, tgi, shared) -> AsyncIterator[Api]:
    async with serve(tmp_path / "data", tgi, **shared) as (_, api):
        yield api


async def get(api: Api, path: str, *, status: int = 200, **params: Any) -> dict[str, Any]:
    response = await api.client.get(path, params=params)
    assert response.status_code == status, response.text
    return dict(response.json())


async def refused(response: httpx.Response, status: int, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    return str(error["message"])


async def say(api: Api, asked: str, conversation: str | None = None, **fields: Any) -> str:
    """Ask something, and give the prediction's id."""
    headers = {"x-conversation-id": conversation} if conversation else {}
    response = await api.client.post(CHAT, json=api.body(asked, **fields), headers=headers)
    assert response.status_code == 200, response.text
    return response.headers["x-prediction-id"]


# --- finding ---


async def test_predictions_are_found_by_what_they_were(api):
    plain = await say(api, "Hello")
    named = await say(api, "Hello", "chat 7", user="ann", metadata={"ticket": 7})
    pinned = await say(api, "Hello", model="hallmark@1")
    await api.records(3)

    async def found(**filters: Any) -> set[str]:
        page = await get(api, "/v1/predictions", **filters)
        assert (await get(api, "/v1/predictions/count", **filters))["count"] == len(page["data"])
        return {each["id"] for each in page["data"]}

    assert await found(conversation="chat 7") == await found(user="ann") == {named}
    assert await found(model="hallmark@1") == await found(assignment="pinned") == {pinned}
    assert await found(release="hallmark@1") == await found(release="hallmark") == {plain, named, pinned}
    assert await found(release="hallmark@2") == await found(outcome="failed") == await found(adapter="tone") == set()
    digest = (await get(api, f"/v1/predictions/{plain}"))["release_digest"]
    assert await found(release_digest=digest, since="2020-01-01") == {plain, named, pinned}
    assert await found(until="2020-01-01T00:00:00Z") == set()


async def test_predictions_are_found_by_what_is_said_of_them(api):
    asked = [await say(api, f"Question {n}") for n in range(4)]
    await api.records(4)
    for path, body in (
        ("/v1/labels", {"prediction_id": asked[0], "class": "refund"}),
        ("/v1/feedback", {"prediction_id": asked[0], "rating": True}),
        ("/v1/feedback", {"prediction_id": asked[1], "rating": False, "correction": "Four weeks."}),
        ("/v1/feedback", {"prediction_id": asked[2], "rating": 0.5}),
    ):
        assert (await api.client.post(path, json=body)).status_code == 201

    async def found(**filters: Any) -> list[int]:
        page = await get(api, "/v1/predictions", **filters)
        assert (await get(api, "/v1/predictions/count", **filters))["count"] == len(page["data"])
        exported = (await api.client.get("/v1/predictions/export", params=filters)).text.splitlines()
        assert [json.loads(line)["id"] for line in exported] == [each["id"] for each in page["data"]][::-1]
        return sorted(asked.index(each["id"]) for each in page["data"])

    assert await found(label_state="labelled") == await found(feedback_state="positive") == [0]
    assert await found(label_state="unlabelled") == [1, 2, 3]
    assert await found(feedback_state="negative") == await found(feedback_state="corrected") == [1]
    assert await found(feedback_state="given") == [0, 1, 2]
    assert await found(feedback_state="given", label_state="unlabelled") == [1, 2]
    assert await found(feedback_state="none", outcome="finished") == [3]


@pytest.mark.parametrize("shared", ["sqlite"], indirect=True)
async def test_what_is_said_of_predictions_is_told_to_those_only_who_may_read_it(tmp_path, tgi, shared):
    async with serve(tmp_path / "data", tgi, **shared) as (service, _):
        for allowed, refused_filter, scope in (
            ("feedback:read", {"label_state": "labelled"}, "labels:read"),
            ("labels:read", {"feedback_state": "none"}, "feedback:read"),
        ):
            key = await service.new_key(scopes=("predictions:read", allowed))
            async with service.client(key) as client:
                for path in ("", "/count", "/export"):
                    response = await client.get(f"/v1/predictions{path}", params=refused_filter)
                    assert scope in await refused(response, 403)
                    assert (await client.get(f"/v1/predictions{path}")).status_code == 200


@pytest.mark.parametrize("shared", ["sqlite"], indirect=True)
async def test_pages_are_led_from_one_to_the_next(api):
    asked = [await say(api, f"Question {n}") for n in range(5)]
    await api.records(5)
    first = await get(api, "/v1/predictions", limit=3, release="hallmark")
    rest = await get(api, "/v1/predictions", limit=3, release="hallmark", before=first["next"])
    assert [each["id"] for each in first["data"] + rest["data"]] == asked[::-1]
    assert rest["next"] is None


@pytest.mark.parametrize("shared", ["sqlite"], indirect=True)
async def test_a_filter_that_is_none_is_refused_by_name(api):
    for field, value in (
        ("release", "Not a name"),
        ("outcome", "great"),
        ("since", "yesterday"),
        ("until", "0.5"),
        ("user", "a\0"),
        ("releas", "hallmark"),
        ("tenant", "other"),
        ("release_digest", "abc"),
        ("label_state", "yes"),
        ("feedback_state", "bad"),
    ):
        for path in ("/v1/predictions", "/v1/predictions/count", "/v1/predictions/export"):
            await refused(await api.client.get(path, params={field: value}), 400, field)


async def test_what_was_just_answered_is_found_at_once(api):
    for n in range(20):
        asked = await say(api, f"Question {n}")
        assert (await get(api, f"/v1/predictions/{asked}"))["id"] == asked
        assert (await get(api, f"/v1/predictions/{asked}/lineage"))["prediction_id"] == asked
    await refused(await api.client.get(f"/v1/predictions/{uuid7()}"), 404)


async def test_a_replica_finds_what_another_answered(tmp_path, tgi, postgres):
    shared = {"database_url": postgres.create_database()}
    async with serve(tmp_path / "one", tgi, **shared) as (_, one), serve(tmp_path / "two", tgi, **shared) as (_, two):
        asked = await say(one, "Hello")

        async def found() -> bool:
            return (await two.client.get(f"/v1/predictions/{asked}")).status_code == 200

        await until(found)
        assert [each["id"] for each in (await get(two, "/v1/predictions"))["data"]] == [asked]


async def test_the_shared_database_may_be_away_and_gets_everything_later(tmp_path, tgi):
    with Postgres() as server:
        url = server.create_database()
        async with serve(tmp_path / "data", tgi, database_url=url) as (_, api):
            first = await say(api, "Hello")
            await api.records(1)
            server.stop()
            second = await say(api, "Hello again")
            assert (await get(api, f"/v1/predictions/{second}"))["id"] == second
            response = await api.client.get("/v1/predictions")
            assert response.headers["retry-after"]
            await refused(response, 503)

            async def waiting() -> bool:
                return "hallmark_outbox_rows 1.0" in (await api.client.get("/metrics")).text

            await until(waiting)
            assert "hallmark_outbox_lag_seconds" in (await api.client.get("/metrics")).text
            server.start()

            async def shipped() -> bool:
                response = await api.client.get("/v1/predictions")
                return response.status_code == 200 and len(response.json()["data"]) == 2

            await until(shipped)
            assert [each["id"] for each in await api.records(2)] == [second, first]


# --- exporting ---


async def test_an_export_holds_what_was_meant_oldest_first_in_either_format(api):
    asked = [await say(api, f"Wie größer? {n}", user="ann", metadata={"n": n}) for n in range(3)]
    await say(api, "Another", user="bob")
    await api.records(4)
    lines = await api.client.get("/v1/predictions/export", params={"user": "ann"})
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert 'filename="predictions.jsonl"' in lines.headers["content-disposition"]
    rows = [json.loads(line) for line in lines.text.splitlines()]
    assert [row["id"] for row in rows] == asked
    assert rows[0] == await get(api, f"/v1/predictions/{asked[0]}")

    response = await api.client.get("/v1/predictions/export", params={"user": "ann", "format": "parquet"})
    assert response.headers["content-type"] == "application/octet-stream"
    table = pq.read_table(io.BytesIO(response.content))
    assert tuple(table.schema.names) == FACTS
    assert str(table.schema.field("created_at").type) == "timestamp[ms, tz=UTC]"
    for written, row in zip(table.to_pylist(), rows, strict=True):
        for name in ("request", "metadata", "passages"):
            assert json.loads(written.pop(name)) == row.pop(name)
        assert written.pop("created_at").isoformat(timespec="milliseconds")[:23] == row.pop("created_at")[:23]
        assert written == row


@pytest.mark.parametrize("shared", ["sqlite"], indirect=True)
async def test_an_export_of_nothing_is_an_empty_file(api):
    assert (await api.client.get("/v1/predictions/export")).content == b""
    response = await api.client.get("/v1/predictions/export", params={"format": "parquet"})
    assert pq.read_table(io.BytesIO(response.content)).num_rows == 0


# --- lineage ---


async def post(api: Api, path: str, body: Any, *, status: int = 201) -> dict[str, Any]:
    response = await api.client.post(f"/v1/lineage/{path}", json=body)
    assert response.status_code == status, response.text
    return dict(response.json())


def as_json(thing: Any) -> Any:
    return msgspec.to_builtins(thing)


async def test_a_fine_tuned_release_is_traced_both_ways(tmp_path, tgi, shared):
    folder = tmp_path / "adapters" / "tone"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(f"{name} of tone")
    adapter = folder_digest(folder)
    engine = {"adapter_folder": tmp_path / "adapters", "adapters": ["tone"]}
    async with serve(tmp_path / "data", tgi, engine=engine, **shared) as (_, api):
        source = await say(api, "What is gold?")
        rows = [row_of("What is gold? - A metal.", source, uuid7()), row_of("Made up.")]
        dataset = dataset_of("support", "2026-11", rows, notes="first")
        digest = dataset.manifest["digest"]
        told = await post(api, "datasets", as_json(dataset))
        assert (told["object"], told["id"], told["digest"]) == ("dataset", digest, digest)
        assert told["created_by"].startswith("test (key ")
        assert await post(api, "datasets", as_json(dataset), status=200) == told
        base = (await get(api, f"/v1/predictions/{source}"))["base_model"]
        run = run_of("run-1", adapter, digest, learning_rate=1e-05)
        assert (await post(api, "training-runs", as_json(run)))["digest"] == digest_of(canonical(run.manifest))
        lineage = {"training_run": "run-1", "dataset_digest": digest}
        release = {"name": "hallmark", "adapter": "tone", "adapter_digest": adapter, "lineage": lineage}
        made = (await api.client.post("/v1/releases", json=release)).json()
        assert made["approved"], made["problems"]
        asked = [await say(api, "Hello", model="hallmark@2") for _ in range(3)]
        await api.records(4)

        trace = await get(api, f"/v1/predictions/{asked[0]}/lineage")
        assert trace["verified"] is True, trace
        assert trace["release"]["content"] == made["content"]
        assert (trace["adapter"]["digest"], trace["training_run"]["id"]) == (adapter, "run-1")
        assert (trace["dataset"]["name"], trace["dataset"]["rows"]) == ("support", 2)
        assert {row["prediction_id"] for row in trace["rows"]} == {source, None}
        assert {row["prediction"]["outcome"] for row in trace["rows"] if row["prediction"]} == {"finished"}
        assert base is None

        back = {
            f"adapters/{adapter}": "adapter",
            f"dataset-rows/{rows[0].digest}": "dataset_row",
            "releases/hallmark@2": "release",
        }
        for path, kind in back.items():
            found = await get(api, f"/v1/lineage/{path}", limit=2)
            assert (found["kind"], found["releases"], found["verified"]) == (kind, ["hallmark@2"], True)
            rest = await get(api, f"/v1/lineage/{path}", limit=2, before=found["next"])
            assert [each["prediction_id"] for each in found["data"] + rest["data"]] == asked[::-1]
        page = await get(api, f"/v1/lineage/datasets/{digest}", limit=1)
        assert (page["dataset"]["verified"], len(page["data"])) == (True, 1)
        assert page["next"] == page["data"][0]["digest"]

        (folder / "adapter_model.safetensors").write_text("other weights")
        trace = await get(api, f"/v1/predictions/{asked[0]}/lineage")
        assert (trace["verified"], trace["adapter"]["verified"], trace["release"]["verified"]) == (False, False, True)


async def test_a_document_is_traced_both_ways_and_its_quotes_are_looked_up(api):
    text = "Records are kept for ten years in the archive.\n\nThe archive is under the town hall."
    document = await api.add("archive.txt", text)
    asked = (await api.answer("How long are records kept in the archive?"))["id"]
    await api.record()
    recorded = await get(api, f"/v1/predictions/{asked}")
    trace = await get(api, f"/v1/predictions/{asked}/lineage")
    (link,) = trace["documents"]
    assert (link["document_id"], link["document_version"]) == (document["id"], document["version"])
    assert (link["verified"], link["quotes"]) == (True, len(recorded["citations"] or ()))
    assert trace["index_version"] == recorded["index_version"]

    async def used(**params: Any) -> list[str]:
        found = await get(api, f"/v1/lineage/documents/{document['id']}", **params)
        return [each["prediction_id"] for each in found["data"]]

    assert await used() == await used(version=document["version"]) == [asked]
    assert await used(version="0" * 64) == []
    assert await used(cited=link["cited"]) == [asked]
    assert await used(cited=not link["cited"]) == []
    changed = await api.add("archive.txt", text.replace("ten", "two"))
    assert changed["id"] == document["id"]
    (link,) = (await get(api, f"/v1/predictions/{asked}/lineage"))["documents"]
    assert link["verified"] is None
    assert changed["version"] in link["problems"][0]


async def test_a_tenant_reaches_only_its_own(tmp_path, tgi, shared):
    async with serve(tmp_path / "data", tgi, tenants=1, **shared) as (service, api), service.tenant() as other:
        asked = await say(api, "Hello", user="ann")
        await api.records(1)
        rows = [row_of("x", asked)]
        dataset = dataset_of("d", "1", rows)
        await post(api, "datasets", as_json(dataset))
        assert (await get(other, "/v1/predictions", user="ann"))["data"] == []
        assert (await get(other, "/v1/predictions/count"))["count"] == 0
        assert (await other.client.get("/v1/predictions/export")).content == b""
        digest = dataset.manifest["digest"]
        for path in (f"predictions/{asked}", f"predictions/{asked}/lineage", f"lineage/dataset-rows/{rows[0].digest}",
                     f"lineage/datasets/{digest}"):  # fmt: skip
            await get(other, f"/v1/{path}", status=404)
        assert (await get(other, "/v1/lineage/releases/hallmark@1"))["data"] == []
        admin = await service.new_key(tenant="other", scopes=("admin",))
        async with service.client(admin) as client:
            assert (await client.get("/v1/predictions")).json()["data"] == []


@pytest.mark.parametrize("shared", ["sqlite"], indirect=True)
async def test_a_mistake_in_what_is_registered_names_its_field(api):
    dataset = as_json(dataset_of("d", "1", [row_of("x")]))
    wrong = {
        "manifest_digest": {**dataset, "manifest_digest": "0" * 64},
        "rows[0].digest": {**dataset, "rows": [{**dataset["rows"][0], "content_digest": "0" * 64}]},
        "rows[0].prediction_id": {**dataset, "rows": [{**dataset["rows"][0], "prediction_id": "7"}]},
        "rows": {key: value for key, value in dataset.items() if key != "rows"},
        "row": {**dataset, "row": 1},
    }
    for field, body in wrong.items():
        await refused(await api.client.post("/v1/lineage/datasets", json=body), 400, field)
    response = await api.client.post("/v1/lineage/datasets", content=b"{")
    assert "not valid JSON" in await refused(response, 400)
    run = as_json(run_of("run", "a" * 64, None))
    await refused(await api.client.post("/v1/lineage/training-runs", json={**run, "digest": "0" * 64}), 400, "digest")
    await post(api, "training-runs", run)
    other = as_json(run_of("run", "b" * 64, None))
    await refused(await api.client.post("/v1/lineage/training-runs", json=other), 409, "id")


async def test_every_route_wants_its_scope(tmp_path, tgi):
    async with serve(tmp_path / "data", tgi) as (service, _):
        reads = [f"/v1/predictions/{uuid7()}/lineage", "/v1/predictions/export", "/v1/predictions/count",
                 "/v1/lineage/documents/d1", "/v1/lineage/releases/hallmark@1", f"/v1/lineage/adapters/{'0' * 64}",
                 f"/v1/lineage/dataset-rows/{'0' * 64}", f"/v1/lineage/datasets/{'0' * 64}"]  # fmt: skip
        key = await service.new_key(scopes=tuple(set(EVERYTHING) - {"predictions:read", "releases:write"}))
        async with service.client(key) as client:
            for path in reads:
                assert (await client.get(path)).status_code == 403, path
            for path in ("datasets", "training-runs"):
                assert (await client.post(f"/v1/lineage/{path}", json={})).status_code == 403, path
