"""The review queue through the service: answers come in by chat, reviewers take them, labels and figures come out."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner, Result

from app.cli import app
from app.predictions import uuid7
from tests.fake_tgi import FakeTGI
from tests.service import Api, Service, live_service, until

QUEUE = "/v1/review/queues/answers"
RULES = {
    "question": "Is it right?",
    "classes": ["right", "wrong"],
    "uniform": 1.0,
    "where": {"since": "2020-01-01T00:00:00Z"},
}


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("review"), engine_url=tgi.url, tenants=40) as service,
    ):
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


async def call(api: Api, method: str, path: str, status: int = 200, **body: Any) -> Any:
    response = await api.client.request(method, path, json=body)
    assert response.status_code == status, response.text
    return response.json()


async def get(api: Api, path: str, **params: Any) -> Any:
    response = await api.client.get(path, params=params)
    assert response.status_code == 200, response.text
    return response.json()


async def filled(api: Api, count: int = 3, **rules: Any) -> list[str]:
    """Ask so many questions, and wait until their answers are in a queue."""
    asked = [(await api.answer(f"Question {n}"))["id"] for n in range(count)]
    await call(api, "PUT", QUEUE, 201, **{**RULES, **rules})

    async def all_there() -> bool:
        return len((await get(api, f"{QUEUE}/items"))["data"]) == count

    await until(all_there)
    return asked


async def lease(api: Api, **body: Any) -> list[dict[str, Any]]:
    return list((await call(api, "POST", f"{QUEUE}/leases", **body))["data"])


async def test_an_answer_is_reviewed_and_becomes_a_label_that_says_how_it_was_chosen(api):
    (asked,) = await filled(api, 1)
    (held,) = await lease(api, reviewer="anna")
    assert held["messages"] == [{"role": "user", "content": "Question 0"}]
    assert (held["question"], held["classes"], held["prediction_id"]) == ("Is it right?", ["right", "wrong"], asked)
    assert held["answer"]
    assert not {"policy", "probability", "release_name", "gold_class"} & set(held)  # So that it sways nobody.
    assert await lease(api, reviewer="ben") == []
    path = f"/v1/review/reviews/{held['review_id']}"
    await call(api, "POST", f"{path}/renew", reviewer="anna")
    done = await call(api, "POST", f"{path}/complete", reviewer="anna", **{"class": "wrong"}, comment="No.")
    assert (done["state"], done["class"], done["reviewer"]) == ("done", "wrong", "anna")
    assert await get(api, path) == done
    label = await get(api, f"/v1/labels/{done['label_id']}")
    assert (label["prediction_id"], label["author"], label["source"]) == (asked, "anna", "review_queue")
    assert (label["class"], label["comment"]) == ("wrong", "No.")
    assert (label["policy"], label["sampling_probability"]) == ("answers/uniform", 1.0)
    item = await get(api, f"/v1/review/items/{done['item_id']}")
    assert (item["state"], item["policy"], item["probability"], item["release_name"]) == (
        "done",
        "uniform",
        1.0,
        "hallmark@1",
    )
    assert item["reviews"] == [done]
    (share, _) = (await get(api, f"{QUEUE}/shares"))["data"][:2]
    assert (share["class"], share["release"], share["estimate"]["share"]) == ("right", None, 0.0)
    metrics = (await api.client.get("/metrics")).text
    samples = [each for family in text_string_to_metric_families(metrics) for each in family.samples]
    assert any(each.labels == {"source": "review_queue", "kind": "label"} for each in samples)


async def test_skipping_giving_back_and_progress(api):
    await filled(api, 2)
    first, second = await lease(api, reviewer="anna", count=2)
    skipped = await call(
        api, "POST", f"/v1/review/reviews/{first['review_id']}/skip", reviewer="anna", reason="cannot_know"
    )
    assert (skipped["state"], skipped["reason"]) == ("skipped", "cannot_know")
    path = f"/v1/review/reviews/{second['review_id']}"
    assert (await api.client.delete(path)).status_code == 403
    given = await api.client.delete(path, params={"reviewer": "anna"})
    assert given.json()["state"] == "returned"
    queue = await get(api, QUEUE)
    assert queue["items"] == [{"policy": "uniform", "state": "waiting", "items": 2}]
    (anna,) = queue["reviewers"]
    assert (anna["reviewer"], anna["done"], anna["skipped"], anna["leased"]) == ("anna", 0, 1, 0)
    assert [each["prediction_id"] for each in await lease(api, reviewer="ben", count=5)] == [
        first["prediction_id"],
        second["prediction_id"],
    ]


async def test_queues_are_defined_shown_and_given_other_rules(api):
    made = await call(api, "PUT", QUEUE, 201, **RULES, low_support={"rate": 0.5, "below": 0.6})
    assert (made["name"], made["revision"]) == ("answers", 1)
    assert made["rules"]["low_support"] == {"rate": 0.5, "below": 0.6}
    assert made["rules"]["where"]["since"] == "2020-01-01T00:00:00Z"
    again = await call(api, "PUT", QUEUE, 200, **{**RULES, "where": {}}, negative_feedback={"rate": 1.0, "below": 3})
    assert (again["id"], again["revision"]) == (made["id"], 2)
    assert again["rules"]["where"] == made["rules"]["where"]
    assert again["rules"]["low_support"] is None
    assert [each["name"] for each in (await get(api, "/v1/review/queues"))["data"]] == ["answers"]
    # What is shown can be sent again.
    await call(api, "PUT", QUEUE, 200, **again["rules"])
    error = (await call(api, "PUT", QUEUE, 409, **{**RULES, "where": {"release": "hallmark@2"}}))["error"]
    assert error["param"] == "where"


async def test_rules_that_cannot_be_kept_are_refused_by_name(api):
    for rules, param in (
        ({"uniform": 0}, "uniform"),
        ({"uniform": 1.5}, "uniform"),
        ({"low_support": {"rate": 0.5}}, "low_support.below"),
        ({"negative_feedback": {"rate": 0}}, "negative_feedback.rate"),
        ({"classes": ["a", ""]}, "classes.1"),
        ({"overlap": 11}, "overlap"),
        ({"lease_seconds": 1}, "lease_seconds"),
        ({"where": {"since": 5}}, "where.since"),
        ({"where": {"until": "2026-01-01T00:00:00"}}, "where.until"),
        ({"where": {"release": "no such thing"}}, "where.release"),
        ({"where": {"outcome": "failed"}}, "where.outcome"),
        ({"shuffle": True}, "shuffle"),
    ):
        error = (await call(api, "PUT", QUEUE, 400, **rules))["error"]
        assert error["param"] == param
    assert (await get(api, "/v1/review/queues"))["data"] == []


async def test_findings_that_break_a_rule_are_refused_by_name(api):
    await filled(api, 1)
    (held,) = await lease(api)
    path = f"/v1/review/reviews/{held['review_id']}/complete"
    for body, param in (
        ({"class": "perhaps"}, "class"),
        ({}, "class"),
        ({"class": "right", "reviewer": "key:other"}, "reviewer"),
        ({"class": "right", "passages": [""]}, "passages.0"),
        ({"class": "right", "why": "x"}, "why"),
    ):
        assert (await call(api, "POST", path, 400, **body))["error"]["param"] == param
    assert (await get(api, "/v1/labels"))["data"] == []
    assert (await call(api, "POST", path, **{"class": "right"}))["reviewer"].startswith("key:")


async def test_gold_and_agreement(api):
    asked = await filled(api, 2, overlap=2, gold_share=1.0)
    for each in asked:
        await call(api, "POST", f"{QUEUE}/gold", 201, prediction_id=each, **{"class": "right"})
    await call(api, "POST", f"{QUEUE}/gold", 404, prediction_id=uuid7(), **{"class": "right"})
    await call(api, "POST", f"{QUEUE}/gold", 400, prediction_id=asked[0], **{"class": "perhaps"})
    for reviewer, classes in (("anna", ("right", "wrong")), ("ben", ("right", "right"))):
        for held, said in zip(await lease(api, reviewer=reviewer, count=2), classes, strict=True):
            path = f"/v1/review/reviews/{held['review_id']}/complete"
            await call(api, "POST", path, reviewer=reviewer, **{"class": said})
    reviewers = {each["reviewer"]: each for each in (await get(api, QUEUE))["reviewers"]}
    assert (reviewers["anna"]["gold"], reviewers["anna"]["gold_right"], reviewers["anna"]["gold_share"]) == (2, 1, 0.5)
    assert reviewers["ben"]["gold_share"] == 1.0
    agreement = await get(api, f"{QUEUE}/agreement")
    (pair,) = agreement["pairs"]
    assert (pair["reviewers"], pair["share"], pair["kappa"]["items"]) == (["anna", "ben"], 0.5, 2)
    assert agreement["alpha"]["value"] == 0.0


async def test_drift_detection_can_raise_what_is_taken(api):
    await call(api, "PUT", QUEUE, 201, **{**RULES, "uniform": 1e-6})
    asked = [(await api.answer(f"Question {n}"))["id"] for n in range(2)]
    named = await call(
        api, "POST", f"{QUEUE}/boosts", 201, rate=1.0, reason="cluster", prediction_ids=[asked[0], uuid7()]
    )
    assert (named["considered"], named["where"]) == (1, None)
    assert named["ended_at"] is not None
    slice_ = {"release": "hallmark@1", "since": "2020-01-01T00:00:00Z"}
    boost = await call(api, "POST", f"{QUEUE}/boosts", 201, rate=1.0, reason="drift", where=slice_)
    assert (boost["where"], boost["ended_at"]) == (slice_, None)

    async def both() -> bool:
        found = (await get(api, f"{QUEUE}/items", policy="drift"))["data"]
        return {each["prediction_id"] for each in found} == set(asked)

    await until(both)
    assert (await get(api, f"{QUEUE}/items", prediction_id=asked[0]))["data"][0]["probability"] == 1.0
    ended = await call(api, "DELETE", f"{QUEUE}/boosts/{boost['id']}")
    assert ended["ended_at"] is not None
    assert (await get(api, f"{QUEUE}/boosts"))["data"] == [ended, {**named, "considered": None}]
    assert await get(api, f"{QUEUE}/boosts/{boost['id']}") == ended
    for body in ({"where": {}, "prediction_ids": asked}, {}):
        error = await call(api, "POST", f"{QUEUE}/boosts", 400, rate=0.5, reason="r", **body)
        assert error["error"]["param"] == "where"


async def test_tasks_go_out_and_annotations_come_back(api):
    asked = await filled(api, 3)
    tasks = await get(api, f"{QUEUE}/export")
    assert [each["data"]["prediction_id"] for each in tasks] == asked[::-1]
    (held,) = await lease(api, reviewer="anna")
    await call(api, "POST", f"/v1/review/reviews/{held['review_id']}/complete", reviewer="anna", **{"class": "wrong"})
    annotated = await get(api, f"{QUEUE}/export", state="done")
    assert annotated[0]["annotations"][0]["completed_by"] == {"email": "anna"}
    assert (await get(api, f"{QUEUE}/export", state="done", annotations=False))[0]["annotations"] == []
    tasks[0]["annotations"] = [{**annotated[0]["annotations"][0], "completed_by": 7}]
    first = await api.client.post(f"{QUEUE}/import", json=[*tasks, *annotated])
    assert first.json() == {"object": "review.import", "done": 1, "skipped": 0, "unchanged": 1}
    assert (await api.client.post(f"{QUEUE}/import", json=tasks)).json()["unchanged"] == 1
    refused = await api.client.post(f"{QUEUE}/import", json=[{}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "[0].data")
    assert {each["author"] for each in (await get(api, "/v1/labels"))["data"]} == {"anna", "label-studio:7"}
    await call(api, "PUT", "/v1/review/queues/empty", 201)
    assert await get(api, "/v1/review/queues/empty/export") == []


@pytest.mark.slow
async def test_reviewers_of_two_services_that_share_a_database_never_get_the_same_item(tmp_path: Path, postgres):
    settings = {"database_url": postgres.create_database()}
    async with contextlib.AsyncExitStack() as parts:
        tgi = await parts.enter_async_context(FakeTGI())
        apis = []
        for n in range(2):
            directory = tmp_path / str(n)
            service = await parts.enter_async_context(live_service(directory, engine_url=tgi.url, settings=settings))
            client = await parts.enter_async_context(service.client())
            apis.append(Api(client, "default", service.key))
        await call(apis[0], "PUT", QUEUE, 201, **RULES)
        asked = [answer["id"] for answer in await asyncio.gather(*(apis[n % 2].answer(str(n)) for n in range(24)))]

        async def all_there() -> bool:
            return len((await get(apis[1], f"{QUEUE}/items", limit=100))["data"]) == len(asked)

        await until(all_there)

        async def work(n: int) -> list[str]:
            api, seen = apis[n % 2], []
            while held := await lease(api, reviewer=f"reviewer {n}", count=2):
                for each in held:
                    seen.append(each["prediction_id"])
                    path = f"/v1/review/reviews/{each['review_id']}/complete"
                    await call(api, "POST", path, reviewer=f"reviewer {n}", **{"class": "right"})
            return seen

        seen = Counter(each for found in await asyncio.gather(*(work(n) for n in range(8))) for each in found)
        assert seen == dict.fromkeys(asked, 1)


# --- the command line ---


async def run(service: Service, api: Api, *arguments: str | Path, typed: str = "") -> Result:
    given = ["review", *map(str, arguments), "--url", service.url, "--key", api.key]
    return await asyncio.to_thread(CliRunner(env={"COLUMNS": "200"}).invoke, app, given, typed)


async def test_the_commands_define_work_and_show(service, api, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text(
        'question = "Is it right?"\nclasses = ["right", "wrong"]\nuniform = 1.0\n'
        'where = { since = "2020-01-01T00:00:00Z" }\n'
    )
    made = await run(service, api, "define", "answers", rules)
    assert (made.exit_code, made.stdout) == (0, "answers revision 1\n"), made.output
    assert "answers" in (await run(service, api, "list")).stdout
    await api.answer("What is [bold] here?")
    await api.answer("And there?")

    async def both() -> bool:
        return len((await get(api, f"{QUEUE}/items"))["data"]) == 2

    await until(both)
    worked = await run(service, api, "work", "answers", "--reviewer", "anna", typed="hm\nright\nskip\n")
    assert worked.exit_code == 0, worked.output
    assert "What is [bold] here?" in worked.stdout
    assert "Is it right?" in worked.stdout
    assert "none of them" in worked.stderr
    assert "Nothing is left" in worked.stdout
    shown = await run(service, api, "show", "answers")
    assert shown.exit_code == 0, shown.output
    for said in ("uniform", "anna", "right", "alpha"):
        assert said in shown.stdout
    assert [each["class"] for each in (await get(api, "/v1/labels"))["data"]] == ["right"]
    stopped = await run(service, api, "work", "answers", "--reviewer", "ben", typed="stop\n")
    assert stopped.exit_code == 0
    (ben,) = [each for each in (await get(api, QUEUE))["reviewers"] if each["reviewer"] == "ben"]
    assert (ben["done"], ben["leased"]) == (0, 0)


async def test_the_commands_exchange_files_and_tell_what_is_wrong(service, api, tmp_path):
    (asked,) = await filled(api, 1)
    file = tmp_path / "tasks.json"
    done = await run(service, api, "export", "answers", "--out", file)
    assert done.exit_code == 0, done.output
    assert [each["data"]["prediction_id"] for each in json.loads(file.read_text())] == [asked]
    assert (await run(service, api, "import", "answers", file)).stdout == "0 done, 0 skipped, 0 unchanged\n"
    file.write_text("[{}]")
    refused = await run(service, api, "import", "answers", file)
    assert (refused.exit_code, "[0].data" in refused.stderr) == (1, True)
    for wrong in (b"{}", b"[1]", b"[{", b'[{"a": "\xff"}]'):
        file.write_bytes(wrong)
        refused = await run(service, api, "import", "answers", file)
        assert (refused.exit_code, "tasks.json is not what Label Studio" in refused.stderr) == (2, True)
    assert (await run(service, api, "gold", "answers", asked, "right")).exit_code == 0
    assert (await run(service, api, "boost", "answers", "--rate", "0.5", "--reason", "drift")).exit_code == 0
    assert (await run(service, api, "show", "nowhere")).exit_code == 1
    broken = tmp_path / "rules.toml"
    broken.write_text("classes = [")
    assert (await run(service, api, "define", "answers", broken)).exit_code == 2
