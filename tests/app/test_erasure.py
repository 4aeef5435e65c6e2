"""Who is erased is on no disk and in no copy any more, whoever finishes it; and others' content is where it was."""

import asyncio
import io
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from sqlalchemy import select, update
from typer.testing import CliRunner

from app.cli import app
from app.database import (
    Database,
    dataset_rows,
    drift_reference_rows,
    erasures,
    feature_values,
    metadata,
    predictions,
    reviews,
    training_runs,
)
from app.datasets import sealing
from app.drift.facts import questions_of
from app.drift.references import keep, questions_in, sealing_keys
from app.erasure import Eraser, ErasureFollower, Erasures, Retention, Terms
from app.errors import InvalidRequest, NotFound
from app.features import FeatureRow, FeatureView, Point, SqlFeatures
from app.feedback import Feedback, FeedbackLog, Given, Label, LabelLog, Stated, Words
from app.leases import Leases
from app.predictions import History, Keeper, Prediction, Shipper, created_at, uuid7
from app.predictions.embeddings import pack
from app.predictions.shipper import shippable
from app.privacy.policies import Policy
from app.privacy.rings import FileRing, SharedRing
from app.privacy.sealing import MasterKeys, new_key
from app.privacy.subject_keys import SubjectKeys
from app.quality.rows import Rows
from app.review import Finding, Negative
from app.settings import PrivacySettings
from tests.fake_tgi import FakeTGI
from tests.origin_server import Page, origin_server
from tests.postgres import on_either_kind
from tests.review_world import EPOCH, Clock, World, as_shipped, person, prediction, replica
from tests.service import live_service
from tests.small_disk import reading

VECTOR = pack(np.linspace(-1, 1, 32, dtype=np.float32), "m")


def canary(number: int, whose: str = "anna") -> str:
    return f"canary-{whose}-{number:03}"


def said_by(whose: str, **facts: Any) -> Prediction:
    """A prediction with something of theirs in every column that can hold it."""
    request = json.dumps({"user": whose, "messages": [{"role": "user", "content": canary(1, whose)}]}).encode()
    return prediction(
        user=f"{whose}@mail.example",
        conversation=f"conversation-of-{whose}",
        request=request,
        messages=[{"role": "system", "content": canary(2, whose)}],
        question=canary(3, whose),
        answer=canary(4, whose) * 200,
        metadata={"note": canary(5, whose)},
        tool_calls=[{"arguments": canary(6, whose)}],
        passages=[{"id": "p1", "document_id": "d1", "dense_score": 0.5, "text": canary(7, whose)}],
        citations=[{"document_id": "d1", "quote": canary(8, whose), "support": 0.5}],
        question_embedding=VECTOR if whose == "anna" else None,
        features=[
            {"feature": "customer:plan", "entity": canary(9, whose), "value": canary(17, whose), "state": "read"}
        ],
        **facts,
    )


async def contents(database: Database) -> bytes:
    """All that can be read: every file of SQLite with its log, or every table of PostgreSQL."""
    if database.kind == "sqlite":
        folder = Path(database.url.database or "").parent
        return b"".join(each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file())
    async with database.reading() as connection:
        rows = [row for table in metadata.sorted_tables for row in (await connection.execute(select(table))).all()]
    return repr([[bytes(v).hex() if isinstance(v, bytes | memoryview) else v for v in row] for row in rows]).encode()


def traces(found: bytes, whose: str = "anna") -> list[str]:
    """Which of their canaries can be found."""
    needles = [canary(number, whose) for number in range(30)] + [f"{whose}@mail.example", f"conversation-of-{whose}"]
    seen = [needle for needle in needles if needle.encode() in found]
    is_embedded = whose == "anna" and (VECTOR in found or VECTOR.hex().encode() in found)
    return [*seen, "embedding"] if is_embedded else seen


@pytest.fixture
async def world(usual_database_url: str) -> AsyncIterator[World]:
    async with replica(usual_database_url) as world:
        yield world


async def plant(world: World, whose: str) -> str:
    """Leave something of a person everywhere; gives the id of their prediction."""
    made = said_by(whose)
    await world.ship([made])
    user = person(f"{whose}@mail.example")
    words = {"comment": canary(10, whose), "correction": canary(11, whose), "metadata": {"m": canary(12, whose)}}
    first = await world.feedback.give(user, Given(prediction_id=made.id, rating=False, **words))
    await world.feedback.change(user, first.row["id"], {"comment": canary(13, whose)})
    about = Given(conversation=f"conversation-of-{whose}", comment=canary(14, whose))
    await world.feedback.give(person("reviewer"), about)
    stated = Stated(prediction_id=made.id, class_name="right", answer=canary(15, whose), comment=canary(16, whose))
    await world.labels.state(person("reviewer"), stated)
    row = {"tenant": "acme", "release": "hallmark@1", "version": 1, "number": 0 if whose == "anna" else 1}
    copied = {"session": b"12345678", "prediction_id": made.id, "embedding": made.question_embedding}
    async with world.database.writing() as connection:
        await connection.execute(drift_reference_rows.insert(), {**row, **copied})
    return made.id


async def erase(world: World, *, user: str | None = None, conversation: str | None = None, **options: Any) -> Any:
    asked = Erasures(world.database, world.clock)
    kind, name = ("user", user) if user else ("conversation", conversation)
    erasure = await asked.request("acme", kind, name or "", who="k1")
    world.clock.pass_seconds(60)
    eraser = Eraser(world.database, world.clock, **options)
    for _ in range(20):
        await eraser.step()
    return await asked.get("acme", erasure.id)


@on_either_kind("usual_database_url")
async def test_an_erased_person_is_in_no_table_and_others_are(world):
    annas, bens = await plant(world, "anna"), await plant(world, "ben")
    assert len(traces(await contents(world.database))) > 15
    erasure = await erase(world, user="anna@mail.example")
    assert (erasure.state, erasure.counts["predictions"], erasure.counts["labels"]) == ("done", 1, 1)
    # What a reviewer said of the conversation is not this person's by any name that was given here.
    assert set(traces(await contents(world.database))) == {canary(14), "conversation-of-anna"}
    assert set(traces(await contents(world.database), "ben")) >= {canary(n, "ben") for n in (1, 2, 3, 4, 5, 10, 15)}
    gone = await world.history.get("acme", annas)
    assert (gone.kept, gone.user, gone.answer, gone.outcome) == ("erased", None, None, "finished")
    assert gone.passages == [{"id": "p1", "document_id": "d1", "dense_score": 0.5}]
    kept = await world.history.get("acme", bens)
    assert kept.answer == canary(4, "ben") * 200
    (words,) = await world.feedback.find("acme", prediction_id=annas)
    assert (words.rating, words.comment, words.author) == (False, None, "erased")
    (label,) = await world.labels.find("acme", prediction_id=annas)
    assert (label.class_name, label.answer) == ("right", None)


async def test_an_erased_conversation_takes_what_was_said_of_it_along(world):
    await plant(world, "anna")
    await erase(world, conversation="conversation-of-anna")
    await erase(world, user="anna@mail.example")
    assert traces(await contents(world.database)) == []


@on_either_kind("usual_database_url")
async def test_an_erasure_reaches_reviews_and_tells_what_was_trained_on_it(world):
    annas = await plant(world, "anna")
    await world.queue()
    await world.filler.step()
    await world.reviews.lease(person("rita"), "q")
    digest, adapter = "a" * 64, "b" * 64
    row = {"tenant": "acme", "dataset_digest": digest, "digest": "c" * 64, "content_digest": "d" * 64}
    run = {"id": "run-1", "tenant": "acme", "manifest": "{}", "digest": "e" * 64, "created_at": 1, "created_by": "x"}
    made = {"adapter_digest": adapter, "base_model": "m", "base_revision": None, "dataset_digest": digest}
    async with world.database.writing() as connection:
        await connection.execute(update(reviews).values(reason=canary(20)))
        await connection.execute(dataset_rows.insert(), {**row, "prediction_id": annas, "label_id": None})
        await connection.execute(training_runs.insert(), {**run, **made})
    erasure = await erase(world, user="anna@mail.example")
    assert canary(20) not in traces(await contents(world.database))
    assert list(erasure.dataset_digests) == [digest]
    trained = await Erasures(world.database, world.clock).trained(erasure)
    assert (list(trained.training_runs), list(trained.adapters)) == (["run-1"], [adapter])


@on_either_kind("usual_database_url")
async def test_the_label_of_an_erased_reviewer_is_told_its_new_probability(world):
    await world.queue(uniform=0.999_999, negative_feedback=Negative(rate=1.0))
    (made,) = await world.predict()
    await world.fill()
    await world.review("ben@mail.example", "wrong")
    await erase(world, user="ben@mail.example")
    await world.rate(made)
    await world.fill()
    (label,) = await world.labels.find("acme")
    assert (label.author, label.class_name, label.policy, label.sampling_probability) == (
        ("erased", "wrong", "q/negative_feedback", 1.0)
    )


@on_either_kind("usual_database_url")
async def test_a_reviewer_holds_nothing_that_was_erased_and_goes_on_with_other_items(world):
    await world.queue()
    await world.predict(user="anna@mail.example")
    (other,) = await world.predict()
    await world.fill()
    (held,) = await world.lease("rita")
    await erase(world, user="anna@mail.example")
    with pytest.raises(NotFound):
        await world.reviews.complete(person("rita"), held.review.id, Finding(class_name="right"))
    assert [each.prediction.id for each in await world.lease("rita", 5)] == [other]
    assert set(await world.items()) == {other}


@on_either_kind("usual_database_url")
async def test_what_some_have_reviewed_of_an_erased_person_is_done_and_shown_to_nobody(world):
    await world.queue(overlap=2)
    (made,) = await world.predict(user="anna@mail.example")
    await world.fill()
    await world.review("rita")
    (held,) = await world.lease("sam")
    await erase(world, user="anna@mail.example")
    assert await world.lease("sam") == await world.lease("cleo") == []
    with pytest.raises(NotFound):
        await world.reviews.complete(person("sam"), held.review.id, Finding(class_name="right"))
    item = (await world.items())[made]
    assert (item.state, item.done, item.wanted) == ("done", 1, 1)
    assert [task async for page in world.exchange.tasks("acme", "q") for task in page] == []
    assert [each.class_name for each in await world.labels.find("acme")] == ["right"]


@on_either_kind("usual_database_url")
async def test_an_administrator_takes_back_what_an_erased_person_said(world):
    made = await plant(world, "anna")
    await world.labels.state(person("anna@mail.example"), Stated(prediction_id=made, class_name="wrong"))
    await erase(world, user="anna@mail.example")
    admin = person(None, is_admin=True)
    (label,) = [each for each in await world.labels.find("acme") if each.author == "erased"]
    (said,) = [each for each in await world.feedback.find("acme") if each.author == "erased"]
    assert (await world.labels.withdraw(admin, label.id)).row["withdrawn"]
    assert (await world.feedback.withdraw(admin, said.id)).row["withdrawn"]
    assert label.id not in {each.id for each in await world.labels.find("acme")}


class Datasets:
    """Stands for the versions of datasets."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def erase(self, tenant: str, *, prediction_ids: Any = (), subjects: Any = ()) -> Any:
        self.asked.append((tenant, list(prediction_ids), list(subjects)))
        self.rows = ["c" * 64] if prediction_ids else []
        self.versions = [("faq", 3, "f" * 64)] if prediction_ids else []
        return self


@on_either_kind("usual_database_url")
async def test_an_erasure_reaches_every_version_of_datasets(world):
    annas, datasets = await plant(world, "anna"), Datasets()
    erasure = await erase(world, user="anna@mail.example", datasets=datasets)
    assert ("acme", [annas], []) in datasets.asked
    assert ("acme", [], ["anna@mail.example"]) in datasets.asked
    assert erasure.counts["dataset_rows"] == 1
    assert list(erasure.dataset_digests) == ["f" * 64]


class Read(NamedTuple):
    """A row as it is read."""

    digest: str
    content: str | None
    subject: str | None
    prediction_id: str | None


async def test_what_one_process_began_another_finishes(world):
    for _ in range(5):
        await world.ship([said_by("anna")])
    asked = Erasures(world.database, world.clock)
    erasure = await asked.request("acme", "user", "anna@mail.example", who="k1")
    await Eraser(world.database, world.clock, rows_at_once=2).step()
    found = await asked.get("acme", erasure.id)
    assert (found.state, found.counts["predictions"]) == ("running", 2)
    world.clock.pass_seconds(60)
    other = Eraser(world.database, world.clock, rows_at_once=2)
    for _ in range(20):
        await other.step()
    done = await asked.get("acme", erasure.id)
    assert (done.state, done.counts["predictions"]) == ("done", 5)
    assert traces(await contents(world.database)) == []


async def test_an_answer_that_is_under_way_is_erased_when_it_ends(world):
    made = said_by("anna", outcome="open")
    await world.ship([made])
    asked = Erasures(world.database, world.clock)
    erasure = await asked.request("acme", "user", "anna@mail.example", who="k1")
    world.clock.pass_seconds(60)
    eraser = Eraser(world.database, world.clock)
    for _ in range(6):
        await eraser.step()
    assert (await asked.get("acme", erasure.id)).state == "running"
    async with world.database.writing() as connection:
        await connection.execute(update(predictions).values(outcome="finished"))
    for _ in range(6):
        await eraser.step()
    assert (await asked.get("acme", erasure.id)).state == "done"
    assert traces(await contents(world.database)) == []


async def test_an_answer_that_waited_for_its_place_as_long_as_it_may_is_erased(world):
    made = said_by("anna")
    world.clock.now = round(created_at(made.id).timestamp() * 1000)
    asked = Erasures(world.database, world.clock)
    erasure = await asked.request("acme", "user", "anna@mail.example", who="k1")
    eraser = Eraser(world.database, world.clock, longest_wait_seconds=30)
    world.clock.pass_seconds(30)
    for _ in range(6):
        await eraser.step()
    async with world.database.writing() as connection:  # Its row comes now, with the id that it got before it waited.
        await connection.execute(predictions.insert(), as_shipped(made))
    world.clock.pass_seconds(1)
    for _ in range(6):
        await eraser.step()
    assert (await asked.get("acme", erasure.id)).state == "done"
    assert traces(await contents(world.database)) == []


@on_either_kind("usual_database_url")
async def test_what_another_replica_ships_later_comes_without_content(world):
    late = said_by("anna")
    await erase(world, user="anna@mail.example")
    new = said_by("ben")
    await world.ship([late, new])
    assert traces(await contents(world.database)) == []
    assert (await world.history.get("acme", late.id)).kept == "erased"
    assert (await world.history.get("acme", new.id)).answer == new.answer


@on_either_kind("usual_database_url")
@pytest.mark.parametrize("is_shipped_later", [False, True])
async def test_a_shadow_made_after_the_erasure_goes_with_the_answer_of_before(world, is_shipped_later):
    before = uuid7()
    world.clock.now = round(created_at(before).timestamp() * 1000)
    late = [said_by("anna", id=_made_later(before), shadow_of=before), said_by("anna", id=_made_later(before))]
    if not is_shipped_later:
        await world.ship(late)
    await erase(world, user="anna@mail.example")
    if is_shipped_later:
        await world.ship(late)
    assert [(await world.history.get("acme", each.id)).question for each in late] == [None, canary(3)]


def _made_later(than: str) -> str:
    """An id of a later millisecond."""
    while created_at(made := uuid7()) <= created_at(than):
        pass
    return made


async def test_what_a_person_says_after_the_erasure_is_kept(world):
    world.clock.now = 1_000_000_000_000  # Before every prediction of now.
    made = said_by("anna")
    asked = Erasures(world.database, world.clock)
    await asked.request("acme", "user", "anna@mail.example", who="k1")
    await world.ship([made])
    world.clock.pass_seconds(60)
    eraser = Eraser(world.database, world.clock)
    for _ in range(10):
        await eraser.step()
    assert (await world.history.get("acme", made.id)).answer == made.answer


async def test_another_tenants_person_of_the_same_name_stays(world):
    made = said_by("anna", tenant="other")
    await world.ship([made])
    await erase(world, user="anna@mail.example")
    assert (await world.history.get("other", made.id)).answer == made.answer
    assert await Erasures(world.database, world.clock).find("other") == []


@pytest.mark.parametrize("name", ["", "  "])
async def test_an_erasure_of_nobody_is_refused(world, name):
    with pytest.raises(InvalidRequest, match="name whom"):
        await Erasures(world.database, world.clock).request("acme", "user", name, who="k1")


async def test_the_record_of_an_erasure_names_nobody(world):
    await erase(world, user="anna@mail.example")
    async with world.database.reading() as connection:
        row = (await connection.execute(select(erasures))).one()
    assert row.names is None
    assert "anna" not in repr(row._asdict())


# --- what is too old ---


@on_either_kind("usual_database_url")
async def test_content_is_let_go_of_and_figures_stay(world):
    old, new = said_by("anna"), said_by("ben")
    await world.ship([old])
    await world.feedback.give(person("u"), Given(prediction_id=old.id, rating=True, comment=canary(10)))
    await world.ship([new])
    world.clock.now = created_at(new.id).timestamp() * 1000 + 10 * 24 * 3600 * 1000
    terms = Terms(content_days=9, feedback_days=9, embeddings_days=9)
    retention = Retention(world.database, world.clock, terms, batch_rows=1)
    while await retention.step():
        pass
    # Who it was is no content: only names are left.
    assert set(traces(await contents(world.database))) == {"anna@mail.example", "conversation-of-anna"}
    gone = await world.history.get("acme", old.id)
    assert (gone.kept, gone.answer, gone.outcome, gone.user) == ("expired", None, "finished", "anna@mail.example")
    assert (await world.feedback.find("acme"))[0].rating is True
    # The last row is what followers go by: its turn comes with the next.
    assert (await world.history.get("acme", new.id)).answer == new.answer


async def test_features_that_were_replaced_long_ago_are_let_go_of_and_every_later_moment_is_as_it_was(world):
    now, day = world.clock(), 24 * 3600 * 1000
    store = SqlFeatures(world.database, lambda: now)
    view = FeatureView(name="customer", entity="customer", features={"n": "integer"})
    await store.define(view, who="test")
    days = [(-60, -60, 0), (-40, -40, 1), (-40, -5, 2), (-30, -30, 3), (-20, -1, 4)]  # Event, known, value.
    rows = [
        FeatureRow(entity=entity, event_at=now + event * day, created_at=now + known * day, values={"n": n})
        for event, known, n in days
        for entity in ("a", "b")
    ]
    await store.put("acme", view, [*rows, FeatureRow(entity="c", event_at=now - 99 * day, values={"n": 9})])
    points = [Point(entity, now - back * day) for entity in "abc" for back in range(10)]
    before = await store.join("acme", "customer", ["n"], points)
    retention = Retention(world.database, world.clock, Terms(features_days=10), batch_rows=2)
    while await retention.step():
        pass
    assert await store.join("acme", "customer", ["n"], points) == before
    async with world.database.reading() as connection:
        left = sorted((row.entity, row.content) for row in await connection.execute(select(feature_values)))
    # Of what was known ten days ago the last, and all that was learnt since.
    assert left == sorted([("c", '{"n":9}'), *((entity, f'{{"n":{n}}}') for entity in "ab" for n in (3, 4))])


async def test_nothing_is_let_go_of_before_its_time(world):
    made, last = said_by("anna"), said_by("ben")
    await world.ship([made, last])
    world.clock.now = created_at(made.id).timestamp() * 1000 + 8 * 24 * 3600 * 1000
    retention = Retention(world.database, world.clock, Terms(content_days=9, predictions_days=9, review_days=9))
    assert not await retention.step()
    assert (await world.history.get("acme", made.id)).answer == made.answer


async def test_the_longest_term_of_one_class_lets_the_others_go_on(world):
    made, last = said_by("anna"), said_by("ben")
    await world.ship([made, last])
    days = PrivacySettings(content_days=36_500).content_days
    terms = dict.fromkeys(Terms.__struct_fields__, days) | {"predictions_days": 9}
    world.clock.now = created_at(last.id).timestamp() * 1000 + 10 * 24 * 3600 * 1000
    retention = Retention(world.database, world.clock, Terms(**terms))
    while await retention.step():
        pass
    assert [each.id for each in await world.history.find("acme")] == [last.id]


@on_either_kind("usual_database_url")
async def test_whole_records_and_review_items_are_let_go_of(world):
    made, last = said_by("anna"), said_by("ben")
    await world.ship([made, last])
    await world.queue()
    await world.filler.step()
    assert len(await world.items()) == 2
    world.clock.now = created_at(last.id).timestamp() * 1000 + 10 * 24 * 3600 * 1000
    retention = Retention(world.database, world.clock, Terms(predictions_days=9, review_days=9))
    while await retention.step():
        pass
    assert [each.id for each in await world.history.find("acme")] == [last.id]
    assert traces(await contents(world.database)) == []
    assert len(await world.items()) == 0


# --- what is said of answers, by the policy ---


async def test_words_of_feedback_and_labels_are_kept_as_the_tenants_policy_has_it(world):
    said = "call me: anna@mail.example"
    given = Given(prediction_id=uuid7(), comment=said, metadata={"mail": [said]}, idempotency_key="i1", rating=True)
    for level, comment in (("redacted", "call me: [email]"), ("metadata", None)):
        words = Words(Policy(tenants={level: level}))
        async with (
            FeedbackLog(world.database, words=words) as feedback,
            LabelLog(world.database, words=words) as labels,
        ):
            first = await feedback.give(person("u", level), given)
            again = await feedback.give(person("u", level), given)
            assert (first.is_new, again.is_new) == (True, False)
            (found,) = await feedback.find(level)
            assert (found.comment, found.rating) == (comment, True)
            assert found.metadata == (None if comment is None else {"mail": [comment]})
            stated = Stated(prediction_id=uuid7(), class_name="right", answer=said)
            assert Label.of((await labels.state(person("r", level), stated)).row).answer == comment
    assert b"anna@mail.example" not in await contents(world.database)


async def test_a_label_of_which_nothing_would_be_kept_is_refused(world):
    async with LabelLog(world.database, words=Words(Policy(level="metadata"))) as labels:
        with pytest.raises(InvalidRequest, match="`answer`: no answers are kept"):
            await labels.state(person("r"), Stated(prediction_id=uuid7(), answer="four weeks"))


async def test_end_users_are_kept_by_pseudonyms_and_go_on_speaking_for_themselves(world):
    masters = MasterKeys.parse(new_key())
    async with FeedbackLog(world.database, words=Words(pseudonym=masters.pseudonym)) as feedback:
        anna = person("anna@mail.example")
        first = await feedback.give(anna, Given(prediction_id=uuid7(), rating=True))
        assert first.row["author"] == masters.pseudonym("acme", "anna@mail.example")
        assert (await feedback.change(anna, first.row["id"], {"rating": False})).row["revision"] == 2
        reviewer = await feedback.give(person("rita"), Given(prediction_id=uuid7(), rating=True, source="reviewer"))
        assert reviewer.row["author"] == "rita"


# --- the command line ---


def test_a_new_master_key_is_one():
    result = CliRunner().invoke(app, ["privacy", "new-key"])
    assert result.exit_code == 0
    assert MasterKeys.parse(result.stdout).current == result.stdout.split(":")[0]


@pytest.mark.parametrize("options", [(), ("--user", "a", "--conversation", "b")])
def test_an_erasure_by_command_names_one_subject(options):
    given = ["privacy", "erase", *options, "--key", "k"]
    assert CliRunner().invoke(app, given).exit_code == 2


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("running", 1)])
async def test_an_erasure_by_command_ends_well_only_where_it_is_done(state, code):
    erasure = {"id": "e1", "state": state, "counts": {"predictions": 2}, "trained": {}}
    async with origin_server() as origin:
        origin.pages = {"/v1/erasures": Page(json.dumps(erasure).encode())}
        given = ["privacy", "erase", "--user", "anna", "--wait", "0", "--url", origin.at(""), "--key", "k"]
        result = await asyncio.to_thread(CliRunner().invoke, app, given)
    assert result.exit_code == code
    assert result.stdout == f"e1 {state}: 2 predictions\n"
    assert ("it goes on" in result.stderr) is (state != "done")


# --- sealed ---


async def test_words_are_sealed_and_known_again(world, tmp_path):
    masters = MasterKeys.parse(new_key())
    ring = SharedRing(world.database, masters)
    words = Words(pseudonym=masters.pseudonym, ring=ring)
    anna = person("anna@mail.example")
    given = Given(prediction_id=uuid7(), comment=canary(10), metadata={"m": canary(12)}, idempotency_key="i1")
    async with FeedbackLog(world.database, words=words) as feedback, LabelLog(world.database, words=words) as labels:
        first = await feedback.give(anna, given)
        again = await feedback.give(anna, given)
        assert (first.is_new, again.is_new, again.row["comment"]) == (True, False, canary(10))
        await feedback.change(anna, first.row["id"], {"correction": canary(11)})
        stated = Stated(prediction_id=given.prediction_id or "", answer=canary(15))
        label = Label.of((await labels.state(person("rita"), stated)).row)
        assert traces(await contents(world.database)) == []
        (found,) = await feedback.find("acme")
        assert (found.comment, found.correction, found.metadata) == (canary(10), canary(11), {"m": canary(12)})
        assert [each.said.get("comment") for each in await feedback.history("acme", found.id)] == [canary(10), None]
        assert (await labels.get("acme", label.id)).answer == canary(15)
        blind = FeedbackLog(world.database)
        assert (await blind.find("acme"))[0].comment is None
        await ring.destroy("acme", [found.author])
        assert (await feedback.find("acme"))[0].comment is None
        assert (await labels.get("acme", label.id)).answer == canary(15)


async def test_a_replica_destroys_the_keys_in_its_own_file(world, tmp_path):
    masters = MasterKeys.parse(new_key())
    path = tmp_path / "keys" / "keys.db"
    keys = SubjectKeys(path, masters)
    for subject in ("anna@mail.example", "ben@mail.example", "conversation:c1"):
        keys.made_for("acme", subject)
    ring = FileRing(path, masters)
    leases = Leases(world.database, "h", world.clock)
    follower = ErasureFollower(world.database, Eraser(world.database, world.clock), leases, keys=ring)
    asked = Erasures(world.database, world.clock)
    await asked.request("acme", "user", "anna@mail.example", who="k1")
    await asked.request("acme", "conversation", "c1", who="k1")
    await follower.turn()
    assert [key.subject for key in keys._all()] == ["ben@mail.example"]
    keys.close()


async def test_a_key_whose_file_somebody_reads_is_on_no_disk_afterwards(world, key_in_file):
    path, ring, wrapped = key_in_file
    leases = Leases(world.database, "h", world.clock)
    follower = ErasureFollower(world.database, Eraser(world.database, world.clock), leases, keys=ring)
    await Erasures(world.database, world.clock).request("acme", "user", "anna@mail.example", who="k1")
    with reading(path):
        await follower.turn()
        assert wrapped in path.read_bytes()
    await follower.turn()
    assert not any(wrapped in each.read_bytes() for each in path.parent.iterdir())


async def test_an_erasure_is_done_when_nobody_reads_the_file_of_keys_any_more(world, key_in_file):
    path, ring, wrapped = key_in_file
    with reading(path):
        erasure = await erase(world, user="anna@mail.example", shredder=ring)
        assert (erasure.state, erasure.counts["keys"]) == ("running", 1)
    await Eraser(world.database, world.clock, shredder=FileRing(path, MasterKeys.parse(new_key()))).step()
    assert (await Erasures(world.database, world.clock).get("acme", erasure.id)).state == "done"
    assert not any(wrapped in each.read_bytes() for each in path.parent.iterdir())


@pytest.fixture
async def key_in_file(tmp_path: Path) -> tuple[Path, FileRing, bytes]:
    """Where a key of Anna's lies that was put from the log into its file, the ring that has it, and the key wrapped."""
    path = tmp_path / "keys" / "keys.db"
    ring = FileRing(path, MasterKeys.parse(new_key()))
    key = (await ring.sealing("acme", ["anna@mail.example"]))["anna@mail.example"]
    assert await ring.empty_log()
    return path, ring, (await ring.wrapped([key.id]))[key.id].wrapped


async def test_a_key_that_was_destroyed_is_not_shipped_again(world, tmp_path):
    masters = MasterKeys.parse(new_key())
    keys = SubjectKeys(tmp_path / "keys" / "keys.db", masters)
    keeper = Keeper(keys=keys)
    with keeper.making():
        key, *rest = keeper.row(said_by("anna"))
    await erase(world, user="anna@mail.example")
    shipper = Shipper(None, world.database, keys=FileRing(tmp_path / "keys" / "keys.db", masters))  # type: ignore[arg-type]
    await shipper._upsert([shippable([bytes(key), *rest])])
    subjects = metadata.tables["subject_keys"]
    async with world.database.reading() as connection:
        assert (await connection.execute(select(subjects))).all() == []
    keys.close()


async def test_rows_of_datasets_are_sealed_by_whose_predictions_they_were_made_of(world):
    ring = SharedRing(world.database, MasterKeys.parse(new_key()))
    rows: list[dict[str, Any]] = [
        {"digest": "1" * 64, "content": canary(1), "subject": "sub_anna", "prediction_id": uuid7()},
        {"digest": "2" * 64, "content": canary(2), "subject": None, "prediction_id": uuid7()},
        {"digest": "3" * 64, "content": "imported", "subject": None, "prediction_id": None},
    ]
    kept = await sealing.sealed(ring, "acme", rows)
    assert traces(repr(kept).encode()) == []
    read = [Read(**row) for row in kept]
    assert [row.content for row in await sealing.opened(ring, "acme", read)] == [canary(1), canary(2), "imported"]
    assert [row.content for row in await sealing.opened(None, "acme", read)] == [None, None, "imported"]
    await ring.destroy("acme", ["sub_anna"])
    assert [row.content for row in await sealing.opened(ring, "acme", read)] == [None, canary(2), "imported"]
    moved = [read[1]._replace(digest="4" * 64)]
    assert [row.content for row in await sealing.opened(ring, "acme", moved)] == [None]


async def test_figures_and_references_are_made_of_what_is_sealed(world, tmp_path):
    masters = MasterKeys.parse(new_key())
    keys = SubjectKeys(tmp_path / "keys" / "keys.db", masters)
    ring, keeper = SharedRing(world.database, masters), Keeper(keys=keys)
    made = said_by("anna", assignment="stable", verdict="answered")
    with keeper.making():
        key, *rest = keeper.row(made)
    shipper = Shipper(None, world.database, keys=FileRing(tmp_path / "keys" / "keys.db", masters))  # type: ignore[arg-type]
    await shipper._upsert([shippable([bytes(key), *rest])])
    async with LabelLog(world.database, words=Words(ring=ring)) as labels:
        await labels.state(person("rita"), Stated(prediction_id=made.id, answer=made.answer, class_name="right"))
    async with world.database.reading() as connection:
        row = (await connection.execute(select(predictions))).one()
    assert (row.answer, row.question, row.answer_characters, row.called_tools) == (None, None, len(made.answer), True)
    for opens, expected in ((ring, made.answer), (None, None)):
        pages = [page async for page in Rows(world.database, opens).labelled("acme", EPOCH)]
        ((found,),) = [group for page in pages for group in page]
        assert (found.answer, found.right_answer) == (expected, expected)
    (question,) = await questions_of(world.database, "acme", "hallmark@1", [row.row], ring=ring)
    assert (question.embedding, question.key) == (VECTOR, row.subject_key)
    held = await sealing_keys(ring, [question])
    async with world.database.writing() as connection:
        whose = (world.database, connection, "acme", "hallmark@1", 1, [question], {})
        await keep(*whose, who="t", now=1, keys=held)
    assert traces(await contents(world.database)) == ["anna@mail.example", "conversation-of-anna"]
    async with world.database.reading() as connection:
        (copied,) = await questions_in(connection, "acme", "hallmark@1", 1, ring=ring)
        assert copied.embedding == VECTOR
        await ring.destroy("acme", ["anna@mail.example"])
        (copied,) = await questions_in(connection, "acme", "hallmark@1", 1, ring=ring)
        assert copied.embedding is None
    keys.close()


# --- the whole service ---


async def test_over_http_a_person_is_erased_from_the_disk_and_from_the_backup(tmp_path):
    data, backup, log = tmp_path / "data", tmp_path / "backup", io.BytesIO()
    settings = {"privacy": {"master_key": new_key()}}
    async with FakeTGI() as tgi, live_service(data, engine_url=tgi.url, settings=settings, log_stream=log) as service:
        async with service.client() as client:
            for whose in ("anna", "ben"):
                asked = {"messages": [{"role": "user", "content": canary(1, whose)}], "user": f"{whose}@mail.example"}
                body = {"model": "hallmark", **asked, "metadata": {"note": canary(5, whose)}}
                answered = await client.post("/v1/chat/completions", json=body)
                about = {"prediction_id": answered.headers["x-prediction-id"], "author": f"{whose}@mail.example"}
                given = {**about, "comment": canary(10, whose), "rating": True}
                assert (await client.post("/v1/feedback", json=given)).status_code == 201
                stated = {"prediction_id": about["prediction_id"], "answer": canary(15, whose), "author": "rita"}
                assert (await client.post("/v1/labels", json=stated)).status_code == 201
            shown = (await client.get(f"/v1/predictions/{about['prediction_id']}")).json()
            assert (shown["question"], shown["metadata"]) == (canary(1, "ben"), {"note": canary(5, "ben")})
            assert "subject_key" not in shown
            # With the whole service running: what is sealed is in no file of it.
            shutil.copytree(data, backup, ignore=shutil.ignore_patterns("subject-keys", "*.lock"))
            refused = await client.post("/v1/erasures", json={"user": "a", "conversation": "b"})
            assert refused.status_code == 400
            assert (await client.post("/v1/erasures", json={"user": "anna@mail.example"})).status_code == 202
            erased = (await client.get("/v1/erasures")).json()["data"]
            assert [each["kind"] for each in erased] == ["user"]
            detail = (await client.get(f"/v1/erasures/{erased[0]['id']}")).json()
            assert detail["trained"] == {"datasets": [], "training_runs": [], "adapters": [], "releases": []}
            listed = ["privacy", "erasures", "--url", service.url, "--key", service.key]
            shown = await asyncio.to_thread(CliRunner(env={"COLUMNS": "200"}).invoke, app, listed)
            assert (erased[0]["id"] in shown.stdout, shown.exit_code) == (True, 0)
            metrics = (await client.get("/metrics")).content
            weak = await service.new_key(scopes=("chat", "predictions:read"))
        async with service.client(weak) as client:
            assert (await client.post("/v1/erasures", json={"user": "b"})).status_code == 403
    # The service ended half-way: a worker does the rest, a minute later.
    clock = Clock()
    clock.now = 1_900_000_000_000
    masters = MasterKeys.parse(settings["privacy"]["master_key"])
    ring = FileRing(data / "subject-keys" / "subject-keys.db", masters)
    async with Database.of_file(data / "hallmark.db") as database:
        eraser = Eraser(database, clock, shredder=ring)
        for _ in range(10):
            await eraser.step()
        history = History(database, keys=ring, pseudonym=masters.pseudonym)
        left = {each.kept: each.question for each in await history.find("default")}
        assert left == {"erased": None, "full": canary(1, "ben")}
        (kept,) = await FeedbackLog(database, words=Words(ring=ring)).find("default", limit=1)
        assert isinstance(kept, Feedback)
    # An index keeps room for what is to come: nothing is looked for in a hundred megabytes of zeros.
    files = [each for folder in (data, backup) for each in folder.rglob("*") if each.is_file()]
    everything = b"".join(each.read_bytes().replace(bytes(4096), b"\0") for each in files)
    assert traces(everything) == []
    assert traces(everything, "ben") == []  # Sealed: to be read with the key only.
    assert traces(log.getvalue() + metrics) == []
    # The backup's rows open with the keys there still are: ben's, and not anna's.
    async with Database.of_file(backup / "hallmark.db") as database:
        found = await History(database, keys=ring).find("default")
        assert {each.kept: each.question for each in found} == {"erased": None, "full": canary(1, "ben")}
