"""Versions of datasets: built, compared, traced, erased; the same on both kinds of database."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from app.database import Database, dataset_examples, dataset_members, dataset_series, labels
from app.datasets import Build, Builder, read_recipe
from app.datasets.builds import Builds
from app.datasets.reading import Reading
from app.datasets.store import Addition, Store
from app.errors import Conflict, InvalidRequest, NotFound, Overloaded
from app.lineage import canonical, dataset_digest, row_digest
from app.parquet import read_parquet
from app.predictions import uuid7
from tests.dataset_world import World, open_world
from tests.lineage_world import dataset_of, digest_of, row_of
from tests.migrated import migrated
from tests.postgres import on_either_kind

CLASSES = ("card", "refund", "pin")


@pytest.fixture
async def world(module_database_url) -> AsyncIterator[World]:
    async with open_world(module_database_url, empty=True) as world:
        yield world


@pytest.fixture(scope="module")
def lite_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{migrated(tmp_path_factory.mktemp('datasets') / 'hallmark.db')}"


@pytest.fixture
async def lite(lite_url: str) -> AsyncIterator[World]:
    """A world for what no SQL decides."""
    async with open_world(lite_url, empty=True) as world:
        yield world


def asked(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Questions that are not alike, and classes."""
    chance = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choice(letters) for _ in range(6)) for _ in range(count * 8)]
    return [(" ".join(words[n * 8 : n * 8 + 8]), CLASSES[n % 3]) for n in range(count)]


# --- building ---


@on_either_kind("module_database_url")
async def test_a_version_has_the_labelled_predictions_and_says_what_was_left_out(world):
    made = await world.classified(*asked(6))
    hidden = world.prediction("A secret?", "card", store=False)
    await world.put(world.prediction("Nobody said anything of it?"), hidden)
    await world.label(hidden, class_name="card")
    build = await world.build()
    assert (build.state, build.version, build.step) == ("done", 1, "done"), build.error
    query = build.report["steps"][0]
    assert query == {
        "name": "query",
        "kept": 6,
        "dropped": {"not_stored": 1, "unlabelled": 1},
        "noted": {"predictions": 8},
    }
    rows = await world.rows()
    assert {row["question"]: row["label"] for row in rows} == dict(asked(6))
    assert {row["messages"][-1]["content"] for row in rows} == set(CLASSES)
    assert {each.answer for each in made} == set(CLASSES)


async def test_the_same_predictions_give_the_same_digest_whatever_order_they_came_in(lite):
    chance = random.Random(3)
    made = [
        lite.prediction(question, name, conversation=f"c{n // 2}" if n > 11 else None)
        for n, (question, name) in enumerate(asked(24))
    ]
    made += [lite.prediction(f"{question} too", name) for question, name in asked(6)]  # They nearly repeat others.
    label_ids = {each.id: uuid7() for each in made}
    digests = set()
    for _ in range(3):
        async with open_world(f"sqlite:///{lite.database.url.database}", empty=True) as world:
            for each in chance.sample(made, len(made)):
                await world.put(each)
            for each in chance.sample(made, len(made)):
                await world.label(each, class_name=each.answer)
            await _rename_labels(world, label_ids)
            build = await world.build(balance={"max_per_class": 5})
            assert build.state == "done", build.error
            steps = {step["name"]: step["dropped"] for step in build.report["steps"]}
            assert steps["dedup"]["near_duplicate"]
            assert steps["balance"]["over_cap"]
            digests.add((await world.datasets.store.version("acme", "data", "1")).digest)
    assert len(digests) == 1


async def test_building_again_without_news_makes_no_version(world):
    await world.classified(*asked(4))
    first = await world.build()
    again = await world.build()
    assert (again.state, again.version, again.step) == ("done", first.version, "unchanged")
    await world.classified(*asked(2, seed=9))
    third = await world.build()
    assert third.version == 2
    versions = await world.datasets.store.versions(await world.datasets.store.series("acme", "data"), limit=9)
    assert [(each.number, each.rows) for each in versions] == [(2, 6), (1, 4)]
    assert versions[0].manifest["parent"] == versions[1].digest


async def test_a_recipe_narrows_by_the_filters_of_predictions(world):
    await world.classified(*asked(2))
    await world.classified(*asked(3, seed=5), release_name="other@2")
    build = await world.build(query={"release": "other"})
    assert build.report["steps"][0]["noted"] == {"predictions": 3}
    assert len(await world.rows()) == 3
    build = await world.build(name="none", query={"review_queue": "no such queue"})
    assert (build.state, build.error["param"]) == ("failed", "query")
    assert "No row is left" in build.error["message"]


async def test_corrections_make_preference_pairs(world):
    liked, disliked = world.prediction("What is it?", "It is A."), world.prediction("Where is it?", "It is here.")
    await world.put(liked, disliked)
    feedback_id = await world.correct(disliked, "It is there.")
    await world.correct(liked, "It is B.", source="judge")
    build = await world.build(task="preference")
    assert build.state == "done", build.error
    (row,) = await world.rows()
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("It is there.", "It is here.")
    assert row["meta"]["feedback_id"] == feedback_id


async def test_what_was_withdrawn_says_nothing(lite):
    (made, other) = await lite.classified(*asked(2))
    await lite.label(made, withdrawn=True)
    await lite.build()
    assert [row["question"] for row in await lite.rows()] == [json.loads(other.request)["messages"][0]["content"]]


async def test_near_duplicate_sessions_are_dropped_whole(lite):
    one = await lite.classified(("How do I get my card back?", "card"), ("And where do I wait for it?", "card"),
                                conversation="first")  # fmt: skip
    await lite.classified(("how do i get my card back", "card"), ("And where do I wait for it", "card"),
                          conversation="second")  # fmt: skip
    await lite.classified(("How do I get my card back?", "card"), conversation="shorter")
    build = await lite.build()
    dedup = next(step for step in build.report["steps"] if step["name"] == "dedup")
    assert dedup == {"name": "dedup", "kept": 3, "dropped": {"near_duplicate": 2}, "noted": {}}
    found = await lite.datasets.store.version("acme", "data", "latest")
    rows = await lite.datasets.store.page(found.series, 1, limit=10)
    assert {one[0].id, one[1].id} < {row.prediction_id for row in rows}
    build = await lite.build(name="all", dedup={"near": False}, split={"heldout": 0})
    assert len(await lite.rows("all")) == 5


async def test_no_conversation_is_on_both_sides(lite):
    for n in range(20):
        await lite.classified(*asked(2, seed=n), conversation=f"c{n}")
    await lite.build(split={"heldout": 0.5})
    sides: dict[str, set[str]] = {}
    for row in await lite.rows():
        sides.setdefault(row["session"], set()).add(row["split"])
    assert len(sides) == 20
    assert all(len(found) == 1 for found in sides.values())
    before = {row["session"]: row["split"] for row in await lite.rows()}
    await lite.classified(*asked(5, seed=77))
    await lite.build(split={"heldout": 0.5})
    after = {row["session"]: row["split"] for row in await lite.rows()}
    assert before.items() < after.items()


async def test_no_question_is_trained_on_that_is_held_out_word_for_word(lite):
    common = ("How do I reset my PIN?", "pin")
    own = [question for question, _ in asked(30)]
    for n, question in enumerate(own):  # Sessions that are not alike, though all ask the same first.
        again = common if n % 2 else ("how do I reset my pin", "pin")
        await lite.classified(again, (question, "card"), conversation=f"c{n}")
    build = await lite.build(split={"heldout": 0.3})
    rows = await lite.rows()
    sides = {side: [row["question"] for row in rows if row["split"] == side] for side in ("train", "heldout")}
    assert {question.casefold().rstrip("?") for question in sides["heldout"]} - set(own) == {"how do i reset my pin"}
    assert set(sides["train"]) == set(own) - set(sides["heldout"])  # The rest of each conversation stays.
    step = next(step for step in build.report["steps"] if step["name"] == "heldout")
    assert step["dropped"] == {"held_out": len(sides["train"])}
    assert len(rows) + step["dropped"]["held_out"] == 60
    assert (await lite.build(split={"heldout": 0.3})).step == "unchanged"


# --- evaluation sets ---


@pytest.mark.parametrize("action", ["drop", "refuse", "report"])
async def test_what_an_evaluation_set_asks_is_not_trained_on(lite, action):
    questions = asked(6)
    await lite.classified(*questions[:2], release_name="measured@1", conversation="kept apart")
    measured = await lite.build("gold", purpose="evaluation", query={"release": "measured"})
    assert measured.report["rows"]["train"] == {}
    await lite.classified((questions[0][0].upper() + "!", "card"))  # Word for word.
    await lite.classified((questions[1][0] + " ok", "card"))  # Nearly.
    await lite.classified(("A question of its own", "pin"), conversation="kept apart")
    await lite.classified(*questions[2:])
    build = await lite.build(query={"release": "support"}, leakage={"action": action})
    if action == "refuse":
        assert (build.state, build.error["code"], build.error["param"]) == ("failed", "conflict", "leakage")
        assert "3 in gold" in build.error["message"]
        return
    leakage = next(step for step in build.report["steps"] if step["name"] == "leakage")
    assert leakage["noted"] == {"in gold": 3}
    if action == "report":
        assert (leakage["dropped"], leakage["kept"]) == ({}, 7)
    else:
        assert leakage["dropped"] == {"leak_exact": 1, "leak_near": 1, "leak_session": 1}
        assert {row["question"] for row in await lite.rows()} == {question for question, _ in questions[2:]}


@pytest.mark.parametrize(("measured_by", "trained_by"), [("conversation", "user"), ("user", "conversation")])
async def test_a_conversation_is_known_again_whatever_the_split_keeps_together(lite, measured_by, trained_by):
    first, second, others = asked(3)
    await lite.classified(first, conversation="c", user="eve", release_name="measured@1")
    gold = await lite.build("gold", purpose="evaluation", query={"release": "measured"}, split={"by": measured_by})
    assert gold.state == "done", gold.error
    await lite.classified(second, conversation="c", user="eve")
    await lite.classified(others, conversation="d", user="bob")
    build = await lite.build(query={"release": "support"}, split={"by": trained_by})
    leakage = next(step for step in build.report["steps"] if step["name"] == "leakage")
    assert leakage["dropped"] == {"leak_session": 1}
    assert [row["question"] for row in await lite.rows()] == [others[0]]


async def test_a_row_has_its_conversation_beside_its_session_where_users_are_kept_together(lite, tmp_path):
    (made,) = await lite.classified(*asked(1), conversation="c", user="eve")
    for by in ("conversation", "user"):
        await lite.build(by, split={"by": by, "heldout": 0})
    (plain,), (kept,) = await lite.rows("conversation"), await lite.rows("user")
    assert "conversation" not in plain
    assert kept["conversation"] == plain["session"] != kept["session"]
    path = tmp_path / "train.parquet"
    path.write_bytes(await lite.file("user", "train.parquet"))
    with path.open("rb") as file:
        assert [row["conversation"] for row in read_parquet(file)] == [kept["conversation"]]
    page = await lite.tracer.dataset("acme", (await lite.datasets.store.version("acme", "user", "1")).digest)
    assert page.dataset.verified, page.dataset.problems
    assert [row.prediction_id for row in page.data] == [made.id]


async def test_an_evaluation_set_has_nothing_to_train_on_and_stays_one(world):
    await world.classified(*asked(4))
    await world.build("gold", purpose="evaluation")
    assert await world.file("gold", "train.jsonl") == b""
    assert (await world.file("gold", "heldout.jsonl")).count(b"\n") == 4
    assert json.loads(await world.file("gold", "manifest.json"))["purpose"] == "evaluation"
    for changed, field in (({"purpose": "training"}, "purpose"), ({"purpose": "evaluation", "task": "answer"}, "task")):
        with pytest.raises(Conflict) as refused:
            await world.build("gold", **changed)
        assert refused.value.param == field
    # What was measured by is trained on no more, and the other way.
    build = await world.build("data")
    assert build.error["message"].startswith("No row is left: 4 leak_exact")


class Crossed(Store):
    """A store in which something comes between a build's comparison and its publishing."""

    def __init__(self, database: Database, meanwhile: Callable[[], Awaitable[Any]]) -> None:
        super().__init__(database)
        self._meanwhile = meanwhile

    async def write(self, *page: Any, **rows: Any) -> None:
        await super().write(*page, **rows)
        await self._meanwhile()


async def built_while(world: World, name: str, meanwhile: Callable[[], Awaitable[Any]]) -> Build:
    """Build a training set on a replica of its own while something else happens."""
    store = Crossed(world.database, meanwhile)
    async with Builds(store, Builder(store, Reading(world.database, world.history))) as builds:
        recipe = read_recipe({"task": "classify", "query": {"release": "support"}})
        started = await builds.from_predictions("acme", name, recipe, purpose="training", who="test")
        await asyncio.wait(set(builds._tasks.values()))
        return await builds.get("acme", name, started.id)


@on_either_kind("module_database_url")
async def test_an_evaluation_set_that_is_built_meanwhile_is_not_trained_on_either(world):
    await world.classified(*asked(2), conversation="measured")
    await world.classified(*asked(3, seed=5))

    async def measure() -> None:
        await world.build("gold", purpose="evaluation", query={"conversation": "measured"})

    build = await built_while(world, "data", measure)
    assert (build.state, build.version) == ("done", 1), build.error
    steps = [step["name"] for step in build.report["steps"]]
    assert len(steps) == len(set(steps))
    assert build.report["steps"][steps.index("leakage")]["dropped"] == {"leak_exact": 2}
    assert {row["question"] for row in await world.rows("data")} == {question for question, _ in asked(3, seed=5)}
    assert {row["question"] for row in await world.rows("gold")} == {question for question, _ in asked(2)}


async def test_a_build_does_not_compare_for_ever(lite):
    await lite.classified(*asked(2))
    measured = itertools.count()

    async def measure() -> None:
        question = (f"Number {next(measured)}?", "pin")
        await lite.classified(question, release_name="measured@1")
        await lite.build("gold", purpose="evaluation", query={"release": "measured"}, dedup={"near": False})

    build = await built_while(lite, "data", measure)
    assert (build.state, build.error["code"]) == ("failed", "conflict")
    assert "evaluation get versions all the while" in build.error["message"]
    with pytest.raises(NotFound):
        await lite.datasets.store.series("acme", "data")
    assert (await lite.build(query={"release": "support"})).state == "done"


# --- versions ---


@on_either_kind("module_database_url")
async def test_versions_are_compared_row_by_row_and_stay_as_they_were(world):
    first = await world.classified(*asked(5))
    await world.build()
    before = {row["question"]: row["label"] for row in await world.rows()}
    relabelled, withdrawn = first[0], first[1]
    await world.label(relabelled, class_name="pin")
    await world.label(withdrawn, withdrawn=True)
    await world.classified(*asked(2, seed=8))
    await world.build()
    changes, series = world.datasets.changes, await world.datasets.store.series("acme", "data")
    found = await changes.difference(series, 1, 2)
    assert (found.added, found.removed, found.changed) == (3, 2, 1)
    assert sorted((each.change, each.prediction_id == relabelled.id) for each in found.data) == [
        ("added", False), ("added", False), ("added", True), ("removed", False), ("removed", True),
    ]  # fmt: skip
    back = await changes.difference(series, 2, 1)
    assert (back.added, back.removed, back.changed) == (2, 3, 1)
    assert (await changes.difference(series, 2, 2)).data == []
    assert {row["question"]: row["label"] for row in await world.rows(version="1")} == before
    # A row that comes again is in the versions between which it was away, and in no others.
    await world.label(withdrawn, class_name="refund", said_at=None)
    await world.label(relabelled, class_name="card")
    await world.build()
    assert len(await world.rows(version="2")) == 6
    assert len(await world.rows(version="3")) == 7
    paged, after = [], ""
    while after is not None:
        page = await changes.difference(series, 1, 3, limit=2, after=after)
        paged += [each.digest for each in page.data]
        after = page.next
    whole = await changes.difference(series, 1, 3, limit=50)
    assert paged == [each.digest for each in whole.data]
    assert len(set(paged)) == len(paged) == whole.added + whole.removed


async def test_tags_move(world):
    await world.classified(*asked(2))
    await world.build()
    await world.classified(*asked(2, seed=4))
    await world.build()
    store, changes = world.datasets.store, world.datasets.changes
    series = await store.series("acme", "data")
    await changes.tag(series, "good", 1, who="test")
    assert (await store.version("acme", "data", "good")).number == 1
    await changes.tag(series, "good", 2, who="test")
    assert (await store.version("acme", "data", "good")).tags == ("good",)
    assert (await store.version("acme", "data", "1")).tags == ()
    assert await changes.untag(series, "good")
    assert not await changes.untag(series, "good")
    for missing in ("good", "3", "0"):
        with pytest.raises(NotFound):
            await store.version("acme", "data", missing)
    for word in ("latest", "7"):
        with pytest.raises(InvalidRequest):
            await changes.tag(series, word, 1, who="test")


async def test_a_tenant_sees_its_own_alone(lite):
    await lite.classified(*asked(2))
    await lite.build()
    store = lite.datasets.store
    assert await store.all_series("other", limit=10) == []
    with pytest.raises(NotFound):
        await store.version("other", "data", "1")
    (row, *_) = await store.page(await store.series("acme", "data"), 1, limit=5)
    assert await lite.datasets.changes.places("other", prediction_id=row.prediction_id) == []


# --- lineage ---


@on_either_kind("module_database_url")
async def test_lineage_verifies_a_built_version_both_ways(world):
    made = await world.classified(*asked(4))
    await world.build()
    await world.label(made[0], class_name="pin")
    await world.build()
    for number in ("1", "2"):
        version = await world.datasets.store.version("acme", "data", number)
        page = await world.tracer.dataset("acme", version.digest)
        assert page.dataset.verified, page.dataset.problems
        assert (page.dataset.name, page.dataset.version, page.dataset.rows) == ("data", number, 4)
        assert {row.prediction_id for row in page.data} == {each.id for each in made}
        for row in page.data:
            assert row.verified
            assert row.prediction.id == row.prediction_id == row.label.prediction_id
    places = await world.datasets.changes.places("acme", prediction_id=made[0].id)
    assert [(each.dataset, each.first, each.end) for each in places] == [("data", 1, 2), ("data", 2, None)]
    found = await world.datasets.changes.places("acme", label_id=places[1].label_id, prediction_id=made[0].id)
    again = found[1]
    assert again == places[1]
    used = await world.uses.of_dataset_row("acme", again.digest, limit=5)
    assert (used.prediction_id, used.datasets) == (made[0].id, (version.digest,))
    async with world.database.writing() as connection:
        await connection.execute(update(dataset_examples).values(content_digest=digest_of("something else")))
    assert (await world.tracer.dataset("acme", version.digest)).dataset.verified is False


# --- exports ---


async def test_exports_are_the_same_bytes_each_time_and_verify(world):
    made = await world.classified(*asked(30))
    await world.build(split={"heldout": 0.3})
    manifest = json.loads(await world.file("data", "manifest.json"))
    rows = []
    for split in ("train", "heldout"):
        content = await world.file("data", f"{split}.jsonl")
        assert content == await world.file("data", f"{split}.jsonl")
        lines = content.decode().splitlines()
        assert manifest["splits"][split] == {"rows": len(lines), "sha256": digest_of(content.decode())}
        assert lines == sorted(lines, key=lambda line: json.loads(line)["row"])
        for line in lines:
            row = json.loads(line)
            assert line == canonical(row)
            said = {name: row.pop(name) for name in ("row", "content_digest", "prediction_id", "label_id")}
            assert digest_of(canonical(row)) == said["content_digest"]
            assert row_digest(said["content_digest"], said["prediction_id"], said["label_id"]) == said["row"]
            assert row["split"] == split
            rows.append(said)
    assert dataset_digest(row["row"] for row in rows) == manifest["digest"]
    assert {row["prediction_id"] for row in rows} == {each.id for each in made}
    assert manifest["labels"] == sorted(CLASSES)
    with pytest.raises(NotFound, match=r"it has manifest\.json"):
        await world.file("data", "train.csv")


async def test_exports_are_the_same_bytes_from_either_database(tmp_path, postgres):
    files: list[dict[str, bytes]] = []
    made, label_ids = None, {}
    for url in (f"sqlite:///{migrated(tmp_path / 'one.db')}", postgres.create_database()):
        async with open_world(url) as world:
            made = made or [world.prediction(question, name, conversation=name) for question, name in asked(40)]
            await world.put(*made)
            for each in made:
                await world.label(each, class_name=each.answer)
            # The labels of both databases have the same ids, as a copy of it would.
            label_ids = label_ids or {each.id: uuid7() for each in made}
            await _rename_labels(world, label_ids)
            build = await world.build(
                query={"until": "2026-12-31T00:00:00Z"}, split={"heldout": 0.4}, dedup={"near": False}
            )
            assert build.state == "done", build.error
            names = ("manifest.json", "train.jsonl", "heldout.jsonl", "train.parquet", "heldout.parquet")
            files.append({name: await world.file("data", name) for name in names})
    manifests = [json.loads(each.pop("manifest.json")) for each in files]
    for manifest in manifests:
        del manifest["recipe"]["query"]["until"]  # The moment of the build.
    assert manifests[0] == manifests[1]
    assert files[0] == files[1]


async def _rename_labels(world: World, ids: dict[str, str]) -> None:
    async with world.database.writing() as connection:
        for prediction_id, label_id in ids.items():
            named = update(labels).where(labels.c.prediction_id == prediction_id)
            await connection.execute(named.values(id=label_id))


async def test_parquet_holds_what_the_lines_hold(lite, tmp_path):
    await lite.classified(*asked(10))
    plan = {"feature": "customer:plan", "value": "pro", "state": "read", "entity": "c"}
    await lite.classified(("Which plan is mine, please?", "card"), features=[plan])
    await lite.build(split={"heldout": 0})
    path = tmp_path / "train.parquet"
    path.write_bytes(await lite.file("data", "train.parquet"))
    assert path.read_bytes() == await lite.file("data", "train.parquet")
    lines = [json.loads(line) for line in (await lite.file("data", "train.jsonl")).splitlines()]
    with path.open("rb") as file:
        rows = list(read_parquet(file))
    assert {name for row in rows for name, value in row.items() if value is not None} == {
        name for line in lines for name, value in line.items() if value is not None
    }
    assert [row["row"] for row in rows] == [line["row"] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        told = {name: json.loads(row[name]) if name in ("messages", "meta", "features") else row[name] for name in line}
        assert told == line


# --- erasure ---


async def test_an_erased_row_is_gone_from_every_version_and_each_says_so(world):
    mine = await world.classified(*asked(2), user="eve")
    await world.classified(*asked(3, seed=6), user="bob")
    await world.build()
    await world.classified(*asked(1, seed=7), user="bob")
    await world.build()
    erased = await world.datasets.changes.erase("acme", prediction_ids=[mine[0].id], subjects=["eve"])
    assert len(erased.rows) == 2
    assert [(name, number) for name, number, _ in erased.versions] == [("data", 1), ("data", 2)]
    for number, rows in (("1", 3), ("2", 4)):
        version = await world.datasets.store.version("acme", "data", number)
        assert (version.erased, version.rows) == (2, rows + 2)
        assert len(await world.rows(version=number)) == rows
        manifest = json.loads(await world.file("data", "manifest.json", number))
        assert manifest["erased"] == erased.rows
        lines = []
        for split in ("train", "heldout"):
            content = await world.file("data", f"{split}.jsonl", number)
            assert digest_of(content.decode()) == manifest["splits"][split]["sha256"]
            lines += [json.loads(line)["row"] for line in content.splitlines()]
        assert dataset_digest([*lines, *manifest["erased"]]) == manifest["digest"] == version.digest
        page = await world.tracer.dataset("acme", version.digest)
        assert page.dataset.verified
        assert sorted(row.digest for row in page.data if row.erased) == erased.rows
    places = await world.datasets.changes.places("acme", prediction_id=mine[0].id)
    assert [each.erased for each in places] == [True]
    assert (await world.datasets.changes.erase("acme", subjects=["eve"])).rows == []
    # Though the predictions are still there, what was erased does not come back.
    build = await world.build()
    assert build.report["steps"][-1]["dropped"] == {"erased": 2}
    assert (await world.datasets.store.version("acme", "data", "3")).erased == 0


# --- builds ---


async def test_a_build_that_was_killed_left_nothing_and_the_next_one_cleans_up(world):
    await world.classified(*asked(3))
    await world.build()
    before = await world.rows()
    store, series = world.datasets.store, await world.datasets.store.series("acme", "data")
    dead = uuid7()
    async with world.database.writing() as connection:
        await store.claim(connection, "acme", "data", task="classify", purpose="training", build=dead, who="test")
    stray = Addition(digest=digest_of("x"), content_digest=digest_of("y"), prediction_id=None, label_id=None,
                     split="train", subject=None, content="{}")  # fmt: skip
    await store.write(series, dead, added=[stray], removed=sorted(await store.digests(series, 1)))
    assert await world.rows() == before
    assert (await store.version("acme", "data", "latest")).number == 1
    with pytest.raises(Conflict, match="is being built"):
        await world.build()
    async with world.database.writing() as connection:
        await connection.execute(update(dataset_series).values(build_expires_at=1))
    await world.classified(*asked(1, seed=9))
    build = await world.build()
    assert build.version == 2
    assert len(await world.rows()) == 4
    assert await world.rows(version="1") == before
    async with world.database.reading() as connection:
        for table in (dataset_examples, dataset_members):
            count = select(func.count()).select_from(table).where(table.c.digest == stray.digest)
            assert (await connection.execute(count)).scalar_one() == 0
    with pytest.raises(Conflict, match="interrupted"):
        await store.write(series, dead, added=[stray])


async def test_an_erasure_interrupts_builds_that_may_have_read_what_is_erased(lite):
    await lite.classified(*asked(3))
    store = lite.datasets.store
    build = uuid7()
    async with lite.database.writing() as connection:
        series = await store.claim(
            connection, "acme", "data", task="classify", purpose="training", build=build, who="test"
        )
    await lite.datasets.changes.erase("acme", subjects=["eve"])
    assert not await store.renew(series.id, build)
    with pytest.raises(Conflict, match="erasure"):
        await store.write(series, build)


async def test_a_build_can_be_cancelled_and_others_wait_within_a_bound(lite):
    await lite.classified(*asked(3))
    builds = lite.datasets.builds
    recipe = {"task": "classify"}
    async with builds._turn:
        started = [
            await builds.from_predictions("acme", f"data-{n}", read_recipe(recipe), purpose="training", who="test")
            for n in range(9)
        ]
        assert {each.state for each in started} == {"waiting"}
        with pytest.raises(Overloaded):
            await builds.from_predictions("acme", "more", read_recipe(recipe), purpose="training", who="test")
        ended = await builds.cancel("acme", "data-0", started[0].id)
        assert ended.state == "cancelled"
    assert [(await lite.ended(each)).state for each in started[1:]] == ["done"] * 8
    assert (await builds.get("acme", "data-0", started[0].id)).state == "cancelled"
    assert [each.id for each in await builds.find("acme", "data-1")] == [started[1].id]
    with pytest.raises(NotFound):
        await builds.get("other", "data-1", started[1].id)


async def test_a_name_that_was_registered_elsewhere_is_refused(lite):
    await lite.provenance.add_dataset("acme", dataset_of("theirs", "1", [row_of("x")]), who="test")
    await lite.classified(*asked(1))
    with pytest.raises(Conflict) as refused:
        await lite.build("theirs")
    assert refused.value.param == "name"


@pytest.mark.slow
@pytest.mark.alone
async def test_comparing_two_versions_of_ten_thousand_rows_takes_under_a_twentieth_of_reading_one(tmp_path: Path):
    async with open_world(f"sqlite:///{tmp_path / 'h.db'}") as world:
        made = [world.prediction(question, name) for question, name in asked(10_000)]
        await world.put(*made)
        for at in range(0, len(made), 500):
            await asyncio.gather(*(world.label(each, class_name=each.answer) for each in made[at : at + 500]))
        assert (await world.build(dedup={"near": False})).state == "done"
        await world.classified(*asked(100, seed=99))
        assert (await world.build(dedup={"near": False})).version == 2
        series = await world.datasets.store.series("acme", "data")
        best = {"diff": 9.0, "read": 9e9}
        for _ in range(10):
            started = time.process_time()
            found = await world.datasets.changes.difference(series, 1, 2)
            best["diff"] = min(best["diff"], time.process_time() - started)
            started = time.process_time()
            await world.file("data", "train.jsonl")
            best["read"] = min(best["read"], time.process_time() - started)
        assert found.added == 100
        assert best["diff"] < best["read"] / 20, best
