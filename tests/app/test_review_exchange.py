"""To Label Studio and back: what was said there counts once, and a file that has a fault changes nothing."""

import copy
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest, NotFound
from app.predictions import uuid7
from app.review import Finding
from app.review.labelstudio import MAX_TASKS, MAX_TOLD, read_tasks
from tests.postgres import on_either_kind
from tests.properties import examples
from tests.review_world import Clock, World, emptied, person, prediction, replica

FULL = Finding(class_name="wrong", answer="Six weeks.", passages=["p1", "p2"], comment="See\nclause 7.")


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    return await emptied(module_database_url)


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with replica(database_url) as world:
        yield world


async def exported(world: World, **options: Any) -> list[Any]:
    """The tasks as they come out of a file."""
    pages = [page async for page in world.exchange.tasks("acme", "q", **options)]
    return list(json.loads(json.dumps([task for page in pages for task in page])))


async def bring(world: World, tasks: Any) -> tuple[int, int, int]:
    done = await world.exchange.bring("acme", "q", tasks, key_id="k7")
    return done.done, done.skipped, done.unchanged


def annotation(clock: Clock, class_name: str = "right", by: Any = "anna@example.org", **facts: Any) -> dict[str, Any]:
    """What Label Studio's export says of one annotation."""
    at = datetime.fromtimestamp(clock.now / 1000, UTC).isoformat().replace("+00:00", "Z")
    result = [
        {"id": "x1", "from_name": "class", "to_name": "answer", "type": "choices", "value": {"choices": [class_name]}}
    ]
    base = {"id": 1001, "completed_by": {"id": 1, "email": by} if isinstance(by, str) else by, "result": result}
    return {**base, "was_cancelled": False, "created_at": at, "updated_at": at, "lead_time": 4.2, **facts}


async def filled(world: World, count: int = 3, **rules: Any) -> list[Any]:
    await world.queue(**rules)
    await world.predict(count)
    await world.fill()
    return await exported(world)


# --- out ---


async def test_a_task_shows_what_was_asked_and_answered_and_what_is_known_of_the_item(world):
    await world.queue(uniform=1.0, classes=("Four weeks.", "other"))
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "text", "text": "long?"}]},
    ]
    made = prediction(
        request=json.dumps({"messages": turns}).encode(), citations=[{"n": 1, "quote": "The notice period"}]
    )
    await world.ship([made])
    await world.fill()
    (item,) = (await world.items()).values()
    (task,) = await exported(world)
    assert task["data"] == {
        "question": "How\nlong?",
        "answer": "Four weeks.",
        "conversation": "system: Be brief.",
        "quotes": "The notice period",
        "hallmark_item": item.id,
        "prediction_id": made.id,
    }
    assert task["meta"] == {"policy": "uniform", "sampling_probability": 1.0}
    (predicted,) = task["predictions"]
    assert predicted["model_version"] == "hallmark@1"
    assert predicted["result"][0]["value"] == {"choices": ["Four weeks."]}
    assert task["annotations"] == []


@on_either_kind("module_database_url")
async def test_gold_is_not_shown_and_pages_are_put_together(world):
    await world.queue(uniform=1.0)
    made = await world.predict(230)
    await world.fill()
    (hidden,) = await world.predict(assignment="shadow")
    await world.queues.add_gold("acme", "q", hidden, "right")
    tasks = await exported(world)
    assert [task["data"]["prediction_id"] for task in tasks] == made[::-1]
    assert len(await exported(world, state="done")) == 0
    with pytest.raises(NotFound):
        await anext(world.exchange.tasks("other", "q"))


# --- there and back ---


async def test_what_is_exported_can_be_imported_and_changes_nothing(world):
    await filled(world, 3, overlap=2)
    (leased, *_) = await world.lease("anna", 3)
    await world.reviews.complete(person("anna"), leased.review.id, FULL)
    (other, *_) = await world.reviews.lease(person(None), "q")
    await world.reviews.complete(person(None), other.review.id, Finding(class_name="right"))
    (skipped, *_) = await world.lease("ben")
    await world.reviews.skip(person("ben"), skipped.review.id, "unclear")
    tasks, labels = await exported(world), await world.labels.find("acme")
    assert await bring(world, tasks) == (0, 0, 3)
    assert await exported(world) == tasks
    assert await world.labels.find("acme") == labels


async def test_what_one_service_exports_another_queue_with_the_same_items_takes_whole(world):
    """The annotations of a file, taken where nobody has reviewed yet, lead to the same file."""
    blank = await filled(world, 2)
    annotated = copy.deepcopy(blank)
    world.clock.pass_seconds(100)
    at = datetime.fromtimestamp(world.clock.now / 1000, UTC).isoformat()
    texts = {"correction": ["Six weeks."], "comment": ["See\nclause 7."], "passages": ["p1", "p2"]}
    areas = [
        {"from_name": name, "to_name": "answer", "type": "textarea", "value": {"text": text}}
        for name, text in texts.items()
    ]
    choice = {"from_name": "class", "to_name": "answer", "type": "choices", "value": {"choices": ["wrong"]}}
    common = {"completed_by": {"email": "anna"}, "ground_truth": False, "created_at": at, "updated_at": at}
    annotated[0]["annotations"] = [{**common, "was_cancelled": False, "lead_time": 0.0, "result": [choice, *areas]}]
    annotated[1]["annotations"] = [{**common, "was_cancelled": True, "lead_time": 0.0, "result": []}]
    assert await bring(world, annotated) == (1, 1, 0)
    assert await exported(world) == annotated
    (label,) = await world.labels.find("acme")
    assert (label.class_name, label.answer, label.passages, label.comment) == (
        FULL.class_name,
        FULL.answer,
        FULL.passages,
        FULL.comment,
    )
    assert (label.author, label.key_id, label.source, label.policy) == ("anna", "k7", "review_queue", "q/uniform")
    assert label.said_at == world.clock.now
    assert {item.state for item in (await world.items()).values()} == {"done", "waiting"}


async def test_the_same_file_again_changes_nothing_and_a_newer_word_replaces(world):
    tasks = await filled(world, 1)
    tasks[0]["annotations"] = [annotation(world.clock)]
    assert await bring(world, tasks) == (1, 0, 0)
    before = await world.labels.find("acme")
    assert await bring(world, tasks) == (0, 0, 1)
    assert await world.labels.find("acme") == before
    world.clock.pass_seconds(60)
    newer = copy.deepcopy(tasks)
    newer[0]["annotations"] = [annotation(world.clock, "wrong")]
    assert await bring(world, newer) == (1, 0, 0)
    assert await bring(world, tasks) == (0, 0, 1)  # The old file comes once more.
    (label,) = await world.labels.find("acme")
    assert (label.class_name, label.revision) == ("wrong", 2)
    assert (await exported(world))[0]["annotations"][0]["result"][0]["value"] == {"choices": ["wrong"]}


@on_either_kind("module_database_url")
async def test_what_was_cancelled_there_later_is_withdrawn_until_it_is_said_again(world):
    tasks = await filled(world, 1)
    for facts, done in (({}, (1, 0, 0)), ({"was_cancelled": True}, (0, 1, 0)), ({"was_cancelled": True}, (0, 1, 0))):
        tasks[0]["annotations"] = [annotation(world.clock, "right", **facts)]
        assert await bring(world, tasks) == done
        assert await bring(world, tasks) == (0, 0, 1)
        labels = await world.labels.find("acme", withdrawn=True)
        assert [(each.class_name, each.withdrawn) for each in labels] == [("right", bool(facts))]
        world.clock.pass_seconds(60)
    (item,) = (await world.items()).values()
    assert (item.state, item.done, item.skipped) == ("waiting", 0, 1)
    tasks[0]["annotations"] = [annotation(world.clock, "wrong")]
    assert await bring(world, tasks) == (1, 0, 0)
    (label,) = await world.labels.find("acme")
    assert (label.id, label.class_name, label.said_at) == (labels[0].id, "wrong", world.clock.now)
    (item,) = (await world.items()).values()
    assert (item.state, item.done, item.skipped) == ("done", 1, 0)


async def test_who_annotates_is_known_by_email_or_by_number_and_several_may(world):
    tasks = await filled(world, 1, overlap=1)
    world.clock.pass_seconds(1)
    tasks[0]["annotations"] = [
        annotation(world.clock, "right", "anna@example.org"),
        annotation(world.clock, "wrong", 7),
        annotation(world.clock, "wrong", {"id": 9}),
    ]
    assert await bring(world, tasks) == (3, 0, 0)
    assert {each.author: each.class_name for each in await world.labels.find("acme")} == {
        "anna@example.org": "right",
        "label-studio:7": "wrong",
        "label-studio:9": "wrong",
    }
    assert [(item.done, item.state) for item in (await world.items()).values()] == [(3, "done")]


async def test_of_two_annotations_of_one_author_the_later_counts(world):
    tasks = await filled(world, 1)
    early = annotation(world.clock, "right")
    world.clock.pass_seconds(1)
    tasks[0]["annotations"] = [annotation(world.clock, "wrong"), early]
    assert await bring(world, tasks) == (1, 0, 1)
    assert [each.class_name for each in await world.labels.find("acme")] == ["wrong"]


async def test_a_lease_that_is_open_here_is_done_by_what_its_reviewer_said_there(world):
    tasks = await filled(world, 1)
    (leased,) = await world.lease("anna")
    world.clock.pass_seconds(1)
    tasks[0]["annotations"] = [annotation(world.clock, by="anna")]
    assert await bring(world, tasks) == (1, 0, 0)
    assert (await world.reviews.get("acme", leased.review.id)).state == "done"
    assert await world.lease("anna") == []


@on_either_kind("module_database_url")
async def test_reviews_that_were_imported_do_not_count_as_done_in_no_time(world):
    tasks = await filled(world, 4)
    earlier = annotation(world.clock, by="anna")
    world.clock.pass_seconds(60)
    (timed, done_there) = await world.lease("anna", 2)
    world.clock.pass_seconds(30)
    await world.reviews.complete(person("anna"), timed.review.id, Finding(class_name="right"))
    for task in tasks:
        is_mine = task["data"]["hallmark_item"] == timed.review.item_id
        task["annotations"] = [] if is_mine else [earlier, annotation(world.clock, by="ben")]
    assert await bring(world, tasks) == (6, 0, 0)
    (anna, ben) = (await world.findings.progress("acme", "q")).reviewers
    assert (anna.done, anna.mean_seconds) == (4, 30.0)
    assert (ben.done, ben.mean_seconds) == (3, None)
    assert (await world.reviews.get("acme", done_there.review.id)).state == "done"


# --- faults ---


async def test_every_bad_entry_is_named_and_nothing_is_written(world):
    tasks = await filled(world, 12)
    for task in tasks:
        task["annotations"] = [annotation(world.clock)]
    del tasks[0]["data"]
    tasks[1]["data"]["hallmark_item"] = "seven"
    tasks[2]["data"]["hallmark_item"] = uuid7()
    tasks[3]["annotations"] = {"a": 1}
    tasks[4]["annotations"][0]["completed_by"] = None
    tasks[5]["annotations"][0]["updated_at"] = "yesterday"
    tasks[6]["annotations"][0]["updated_at"] = "2999-01-01T00:00:00Z"
    tasks[7]["annotations"][0]["result"] = []
    tasks[8]["annotations"][0]["result"][0]["value"]["choices"] = ["right", "wrong"]
    tasks[9]["annotations"][0]["result"][0]["value"]["choices"] = ["perhaps"]
    tasks[10]["annotations"][0]["completed_by"] = {"email": "key:other"}
    text = {"from_name": "comment", "value": {"text": ["half of a pair: \ud83d"]}}
    tasks[11]["annotations"][0]["result"].append(text)
    with pytest.raises(InvalidRequest) as refused:
        await bring(world, tasks)
    message = refused.value.message
    assert message.startswith("Nothing was imported. ")
    for said in (
        "[0].data: is missing",
        "[1].data.hallmark_item: is not the id",
        "has no item",
        "[3].annotations: is not a list",
        "[4].annotations[0].completed_by",
        "[5].annotations[0].updated_at",
        "[6].annotations[0].updated_at",
        "[7].annotations[0].result: holds neither",
        "[8].annotations[0].result: `class` holds not just one",
        "[9].annotations[0]: `class`: 'perhaps' is none of",
        "[10].annotations[0]: `completed_by`: a name that begins with 'key:'",
        "[11].annotations[0].result: `comment` holds a NUL or half of a surrogate pair",
    ):
        assert said in message
    assert refused.value.param == "[0].data"
    assert await world.labels.find("acme") == []
    assert {item.state for item in (await world.items()).values()} == {"waiting"}


async def test_items_of_another_queue_or_tenant_are_not_known(world):
    tasks = await filled(world, 1)
    await world.queue("elsewhere")
    await world.queue("q", tenant="other")
    tasks[0]["annotations"] = [annotation(world.clock)]
    for tenant, name in (("acme", "elsewhere"), ("other", "q")):
        with pytest.raises(InvalidRequest, match="has no item"):
            await world.exchange.bring(tenant, name, tasks, key_id="k")
    with pytest.raises(NotFound):
        await world.exchange.bring("acme", "nowhere", tasks, key_id="k")


async def test_many_faults_are_counted(world):
    await world.queue()
    with pytest.raises(InvalidRequest, match=f"; and {30 - MAX_TOLD} more"):
        await bring(world, [{} for _ in range(30)])
    for body in ({}, "tasks", None, [{}] * (MAX_TASKS + 1)):
        with pytest.raises(InvalidRequest, match=f"at most {MAX_TASKS} tasks"):
            await bring(world, body)


_texts = st.text(st.characters(), max_size=5)  # With halves of surrogate pairs, which JSON can spell.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_regions = st.fixed_dictionaries(
    {},
    optional={
        "from_name": st.sampled_from(["class", "correction", "comment", "passages", "else"]),
        "value": st.fixed_dictionaries(
            {}, optional={"choices": json_values | st.lists(_texts), "text": json_values | _texts}
        )
        | json_values,
    },
)
_annotations = st.fixed_dictionaries(
    {},
    optional={
        "completed_by": st.just({"email": "anna"}) | json_values,
        "updated_at": st.just("2026-11-24T12:00:00Z") | json_values,
        "was_cancelled": json_values,
        "result": st.lists(_regions, max_size=3) | json_values,
    },
)
_tasks = st.fixed_dictionaries(
    {},
    optional={
        "data": st.fixed_dictionaries({"hallmark_item": st.uuids().map(str) | json_values}) | json_values,
        "annotations": st.lists(_annotations, max_size=3) | json_values,
    },
)


@examples(60)
@given(st.lists(_tasks | json_values, max_size=4) | json_values)
def test_whatever_a_file_holds_is_read_or_told(body):
    found, problems = read_tasks(body, now=2_000_000_000_000)
    for each in found:
        assert each.entry.startswith("[")
        assert msgspec.json.encode(each)  # It refuses halves of surrogate pairs, as databases do.
        assert (
            each.finding is None or each.finding.class_name or each.finding.answer or each.finding.passages is not None
        )
    assert all(isinstance(each, str) and ": " in each for each in problems) or problems == [
        f"send a list of at most {MAX_TASKS} tasks, as Label Studio exports them"
    ]
