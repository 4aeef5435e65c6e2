"""`GET /v1/drift`, references, and `hallmark drift` against a live service; and a topic that real embeddings tell."""

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.database import Database
from app.drift import Drift, DriftPlan
from app.drift.watching import DriftWatcher
from app.predictions import History
from app.predictions.embeddings import model_of, pack
from retrieval.embedder import SentenceTransformerEmbedder
from tests.fake_tgi import FakeTGI
from tests.review_world import Clock
from tests.service import CHAT, Api, Service, live_service

RELEASE = "hallmark@1"
PLAN = DriftPlan(reference_sessions=400, window_sessions=200)


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("drift"), engine_url=tgi.url, tenants=8) as service,
    ):
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


def vectors(count: int = 400, **changed) -> dict:
    random = np.random.default_rng(3)
    made = [b64encode(random.normal(size=16).astype("<f2").tobytes()).decode() for _ in range(count)]
    return {"name": "faq", "model": "m", "vectors": made, **changed}


async def run(service: Service, api: Api, *arguments: str) -> Result:
    given = ["drift", *arguments, "--url", service.url, "--key", api.key]
    return await asyncio.to_thread(CliRunner(env={"COLUMNS": "200"}).invoke, app, given)


async def follow(service: Service, *watchers: DriftWatcher) -> None:
    for watcher in watchers:
        while await watcher.step():
            pass


async def test_nothing_is_known_before_a_worker_has_looked(service, api):
    assert (await api.client.get("/v1/drift")).json() == {"object": "drift", "data": []}
    assert "nothing is followed yet" in (await run(service, api, "show")).stdout


async def test_a_reference_of_questions_is_kept_under_a_version_for_its_own_tenant(service, api):
    for version in (1, 2):
        made = await api.client.post("/v1/drift/references", json={"release": RELEASE, "questions": vectors()})
        assert made.status_code == 201, made.text
        facts = made.json()
        assert (facts["version"], facts["sessions"], facts["embedded"]) == (version, 400, 400)
        assert facts["source"] == {"kind": "questions", "name": "faq"}
    async with service.tenant() as other:
        made = await other.client.post("/v1/drift/references", json={"release": RELEASE, "questions": vectors()})
        assert made.json()["version"] == 1


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "since"),
        ({"since": "2026-11-01T00:00:00Z"}, 400, "since"),
        ({"since": "2026-11-01T00:00:00Z", "until": "2026-11-02T00:00:00Z", "dataset": "0" * 64}, 400, None),
        ({"since": "2026-11-01T00:00:00Z", "until": "2026-11-02T00:00:00Z"}, 400, "reference"),
        ({"dataset": "0" * 64}, 400, "reference"),
        ({"dataset": "no digest"}, 400, "dataset"),
        ({"questions": vectors(10)}, 400, "reference"),
        ({"questions": vectors(1, vectors=["!!!!"])}, 400, "questions.vectors[0]"),
        ({"questions": vectors(1, vectors=[b64encode(bytes(4)).decode()])}, 400, "questions.vectors[0]"),
        ({"questions": vectors(1, vectors=[b64encode(b"\0\x7e" * 4).decode()])}, 400, "questions.vectors[0]"),
        ({"questions": vectors(1, vectors=["AAAB", "AAEAAQ=="])}, 400, "questions.vectors[0]"),
        ({"questions": vectors(2, vectors=["ADwAPA==", "ADwAPAA8ADw="])}, 400, "questions.vectors"),
        ({"questions": vectors(2, sessions=["one"])}, 400, "questions.sessions"),
        ({"release": "hallmark@9", "dataset": "0" * 64}, 404, "release"),
        ({"release": "hallmark", "dataset": "0" * 64}, 400, "release"),
    ],
)
async def test_a_reference_that_cannot_be_is_refused_by_field(service, body, status, field):
    async with service.client() as client:
        refused = await client.post("/v1/drift/references", json={"release": RELEASE, **body})
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["param"] == field


async def test_reading_and_setting_need_their_scopes(service):
    async with service.client(await service.new_key(scopes=("releases:read",))) as client:
        assert (await client.get("/v1/drift")).status_code == 403
    async with service.client(await service.new_key(scopes=("quality:read",))) as client:
        assert (await client.get("/v1/drift")).status_code == 200
        body = {"release": RELEASE, "questions": vectors()}
        assert (await client.post("/v1/drift/references", json=body)).status_code == 403


async def test_what_is_searched_for_is_kept_as_a_vector_and_shown_to_nobody(service, api):
    await api.add("stamps.md", "# Stamps\n\nA hallmark is a stamp on gold.")
    kept, dropped = [
        (await api.answer("What is a hallmark?", **facts))["id"] for facts in ({"user": "a"}, {"store": False})
    ]
    async with Database.of_file(service.data_dir / "hallmark.db") as database, database.reading() as connection:
        found = await connection.exec_driver_sql("SELECT lower(hex(id)), question_embedding FROM predictions")
        embeddings = {row[0]: row[1] for row in found}
    stored = embeddings[kept.replace("-", "")]
    assert model_of(stored) == model_of(pack(np.ones(1, np.float32), "hashing"))
    assert embeddings[dropped.replace("-", "")] is None
    shown = await api.client.get(f"/v1/predictions/{kept}")
    assert "embedding" not in shown.text
    exported = await api.client.get("/v1/predictions/export")
    assert "embedding" not in exported.text


THINGS = (
    "the invoice",
    "my password",
    "a delivery",
    "the contract",
    "an account",
    "the refund",
    "a licence",
    "my order",
)
VERBS = ("change", "cancel", "find", "print", "extend", "check", "share", "delete", "track", "renew")
WAYS = ("on my phone", "for a colleague", "from abroad", "before Friday", "without an email", "at the weekend")
DISHES = (
    "lasagne",
    "risotto",
    "ratatouille",
    "pancakes",
    "goulash",
    "ramen",
    "a curry",
    "sourdough",
    "gnocchi",
    "stew",
)
STEPS = ("How long do I bake {}?", "Which herbs go into {}?", "Can {} be frozen?", "How much salt does {} need?")


def usual(number: int) -> str:
    verb, thing = VERBS[number % len(VERBS)], THINGS[number // len(VERBS) % len(THINGS)]
    return f"How do I {verb} {thing} {WAYS[number // (len(VERBS) * len(THINGS)) % len(WAYS)]}?"


def strange(number: int) -> str:
    return STEPS[number % len(STEPS)].format(DISHES[number // len(STEPS) % len(DISHES)])


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_real_embeddings_tell_a_topic_that_is_new_through_the_service(tmp_path):
    """The reference is of a file, embedded by the command line; the windows are of the service's own searches."""
    faq = tmp_path / "faq.jsonl"
    faq.write_text("".join(json.dumps({"question": usual(number)}) + "\n" for number in range(480)), "utf-8")
    async with (
        FakeTGI() as tgi,
        live_service(
            tmp_path / "data", engine_url=tgi.url, embedder=SentenceTransformerEmbedder(), tenants=1
        ) as service,
        service.tenant() as api,
        Database.of_file(service.data_dir / "hallmark.db") as database,
    ):
        set_ = await run(service, api, "reference", RELEASE, "--questions", str(faq))
        assert set_.exit_code == 0, set_.output
        assert "480 embedded" in set_.stdout
        clock = Clock()
        watcher = DriftWatcher(database, History(database), clock, plan=PLAN, pace_seconds=0.0)
        await api.answer("Where does it begin?")
        await follow(service, watcher)
        asked: dict[str, str] = {}

        async def ask(number: int) -> None:
            # A fifth of the sessions ask what nobody asked before.
            text = strange(number) if number % 5 == 0 else usual(number * 7)
            body = {"model": "hallmark", "messages": [{"role": "user", "content": text}], "user": f"u{number}"}
            answer = await api.client.post(CHAT, json=body)
            assert answer.status_code == 200, answer.text
            asked[answer.headers["x-prediction-id"]] = text

        for first in range(0, 404, 4):
            await asyncio.gather(*(ask(number) for number in range(first, first + 4)))
        await follow(service, watcher)
        state = await Drift(database).state(api.name, RELEASE)
        assert state.kinds == ("inputs",)
        assert state.examples
        assert all(any(dish in asked[example] for dish in DISHES) for example in state.examples)
        report = (await api.client.get("/v1/drift", params={"release": RELEASE})).json()
        (release,) = report["data"]
        assert release["examples"] == list(state.examples)
        assert [each["kind"] for each in release["alarms"]] == ["inputs"]
        assert [each["number"] for each in release["windows"]] == [2, 1]
        assert release["windows"][0]["inputs"]["novel_share"] > 0.05
        shown = await run(service, api, "show")
        assert "inputs have drifted since" in shown.stdout
        assert state.examples[0] in shown.stdout
