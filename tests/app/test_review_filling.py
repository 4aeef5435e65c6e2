"""Filling a queue: every prediction is considered once it has settled, on whichever replica, and never twice."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, labels, predictions, review_items
from app.errors import Conflict, InvalidRequest, NotFound
from app.feedback import Given, Stated
from app.predictions import PredictionLog, Where, created_at, uuid7
from app.predictions.history import History
from app.review import Filler, Finding, Negative, Queue, Queues, Rules, Threshold
from app.review.rules import Offer, draw
from tests.migrated import migrated
from tests.postgres import on_either_kind
from tests.review_world import EPOCH, Clock, World, as_shipped, cited, emptied, person, prediction, replica


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    return await emptied(module_database_url)


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with replica(database_url) as world:
        yield world


async def queue_id(world: World, name: str = "q") -> str:
    return (await world.queues.get("acme", name)).id


# --- who is taken ---


async def test_items_are_those_that_their_number_chooses_with_the_probability_that_did(world):
    await world.queue(uniform=0.2, low_support=Threshold(rate=0.7, below=0.5))
    good = await world.predict(60, **cited(0.9))
    poor = await world.predict(60, **cited(0.1))
    await world.fill()
    id_, items = await queue_id(world), await world.items()
    assert set(items) == {each for each in good if draw(id_, each, "sample") < 0.2} | {
        each for each in poor if draw(id_, each, "sample") < 0.7
    }
    assert {(items[each].policy, items[each].probability) for each in good if each in items} == {("uniform", 0.2)}
    assert {(items[each].policy, items[each].probability) for each in poor if each in items} == {("low_support", 0.7)}
    assert {each.release_name for each in items.values()} == {"hallmark@1"}


async def test_filling_again_changes_nothing(world):
    await world.queue(uniform=0.5)
    await world.predict(50)
    await world.fill()
    before = await world.items()
    assert await world.filler.step() is False
    async with world.database.writing() as connection:  # As if nothing had been considered.
        await connection.exec_driver_sql("UPDATE review_queues SET position = NULL, position_id = NULL")
    await world.fill()
    assert await world.items() == before


async def test_only_finished_answers_that_were_kept_and_shown_are_considered(world):
    await world.queue()
    shown = await world.predict(2)
    for facts in ({"outcome": "failed"}, {"store": False}, {"assignment": "shadow"}, {"tenant": "other"}):
        await world.predict(1, **facts)
    await world.predict(1, assignment="chore")
    await world.predict(1, id="01800000-0000-7000-8000-000000000000")  # In 2022, long before `since` below.
    await world.queue("recent", where=Where(since=created_at(shown[0])))
    await world.queue("shadows", where=msgspec.structs.replace(EPOCH, assignment="shadow"))
    await world.queue("other", where=msgspec.structs.replace(EPOCH, release="hallmark@2"))
    await world.fill()
    assert len(await world.items()) == 3
    assert set(await world.items("recent")) == set(shown)
    assert len(await world.items("shadows")) == 1
    assert await world.items("other") == {}


async def test_a_queue_considers_what_is_predicted_from_the_moment_it_is_made(world):
    world.clock.now = int(datetime.now(UTC).timestamp() * 1000) + 60_000
    early = await world.predict(1)
    await world.queue(where=Where())
    moment = (await world.queues.get("acme", "q")).rules.where.since
    assert moment == datetime.fromtimestamp(world.clock.now / 1000, UTC)
    later = f"{world.clock.now + 5:012x}"
    (late,) = await world.predict(1, id=f"{later[:8]}-{later[8:]}-7000-8000-000000000000")
    await world.fill()
    assert set(await world.items()) == {late}
    assert early[0] not in await world.items()


async def test_rules_that_change_hold_for_what_is_considered_from_then_on(world):
    await world.queue(uniform=0.3)
    early = await world.predict(40)
    await world.fill()
    await world.queue(uniform=0.9)
    late = await world.predict(40)
    await world.fill()
    items = await world.items()
    assert {items[each].probability for each in early if each in items} == {0.3}
    assert {items[each].probability for each in late if each in items} == {0.9}
    assert (await world.queues.get("acme", "q")).revision == 2
    with pytest.raises(Conflict, match="another name"):
        await world.queue(where=msgspec.structs.replace(EPOCH, release="other"))


async def test_a_full_or_paused_queue_is_filled_when_it_may_be_and_leaves_nothing_out(world):
    await world.queue(capacity=10)
    await world.queue("paused", paused=True)
    made = await world.predict(60)
    world.filler = world.new_filler(batch_rows=20)
    await world.fill()
    assert len(await world.items()) == 20
    assert await world.items("paused") == {}
    await world.queue(capacity=100)
    await world.queue("paused")
    await world.fill()
    assert set(await world.items()) == set(await world.items("paused")) == set(made)


# --- feedback ---


async def test_negative_feedback_takes_a_prediction_whether_it_comes_before_or_after(world):
    await world.queue(uniform=1e-6, negative_feedback=Negative(rate=1.0, below=3))
    made = [uuid7() for _ in range(8)]
    await world.rate(made[0])  # Before its prediction has come.
    await world.ship([prediction(id=each) for each in made[:4]])
    await world.rate(made[1])
    await world.fill()
    assert set(await world.items()) == set(made[:2])
    await world.rate(made[2])  # Long after.
    await world.rate(made[3], 2)
    await world.rate(made[4])
    await world.fill()
    await world.rate(made[5], True)
    await world.rate(made[6], 3)
    await world.feedback.give(person("u", "other"), Given(prediction_id=made[7], rating=False))
    await world.ship([prediction(id=each) for each in made[4:]])
    await world.fill()
    items = await world.items()
    assert set(items) == set(made[:5])
    assert {(each.policy, each.probability) for each in items.values()} == {("negative_feedback", 1.0)}


async def test_what_is_taken_back_again_makes_no_difference_however_late_it_is_looked_at(world):
    await world.queue(uniform=1e-6, negative_feedback=Negative(rate=1.0))
    one, other = await world.predict(2)
    await world.rate(one)
    await world.rate(one, True)  # A slip of the finger; some replica may have seen it.
    await world.rate(other, True)
    await world.fill()
    assert set(await world.items()) == {one}


async def test_feedback_raises_the_probability_of_an_item_and_of_its_labels(world):
    await world.queue(uniform=0.3, negative_feedback=Negative(rate=0.8))
    made = await world.predict(40)
    await world.fill()
    before = await world.items()
    await world.review("anna", count=20)
    for each in made:
        await world.rate(each)
    await world.fill()
    after, id_ = await world.items(), await queue_id(world)
    assert set(after) == {each for each in made if draw(id_, each, "sample") < 0.8}
    assert set(before) < set(after)
    assert {each.probability for each in after.values()} == {0.8}
    labels = await world.labels.find("acme", limit=100)
    assert labels
    assert {each.prediction_id for each in labels} <= set(before)
    assert {(each.policy, each.sampling_probability) for each in labels} == {("q/negative_feedback", 0.8)}
    assert {(each.class_name, each.revision) for each in labels} == {("right", 2)}


@on_either_kind("module_database_url")
async def test_weights_hold_up_where_feedback_comes_before_during_and_after_the_review(world):
    """What each prediction counts for is 1 on average, over many queues with numbers of their own."""
    names = [f"q{n}" for n in range(15)]
    for name in names:
        await world.queue(name, uniform=0.2, negative_feedback=Negative(rate=0.6))
    made = await world.predict(20)
    for each in made[:5]:
        await world.rate(each)
    await world.fill()
    for each in made[5:10]:
        await world.rate(each)
    await world.fill()
    weights = dict.fromkeys(made, 0.0)
    for name in names:
        for each, item in (await world.items(name)).items():
            weights[each] += 1 / item.probability / len(names)
    rated, others = [weights[each] for each in made[:10]], [weights[each] for each in made[10:]]
    assert sum(rated) / 10 == pytest.approx(1.0, abs=5 * (0.4 / 0.6 / 150) ** 0.5)
    assert sum(others) / 10 == pytest.approx(1.0, abs=5 * (0.8 / 0.2 / 150) ** 0.5)


# --- drift ---


async def test_a_boost_takes_more_of_a_slice_of_what_was_and_what_will_be(world):
    await world.queue(uniform=0.1)
    early = await world.predict(40, release_name="hallmark@1")
    await world.predict(20, release_name="hallmark@2")
    await world.fill()
    boost = await world.queues.boost(
        "acme", "q", rate=0.6, reason="new topic", where=Where(release="hallmark@1"), who="drift"
    )
    late = await world.predict(40, release_name="hallmark@1")
    await world.fill()
    items, id_ = await world.items(), await queue_id(world)
    for each in (*early, *late):
        assert (each in items) == (draw(id_, each, "sample") < 0.6)
    assert {(each.policy, each.probability) for each in items.values() if each.release_name == "hallmark@1"} == {
        ("drift", 0.6)
    }
    assert {each.probability for each in items.values() if each.release_name == "hallmark@2"} <= {0.1}
    ended = await world.queues.end_boost("acme", "q", boost.id)
    assert ended.ended_at == world.clock.now
    after = await world.predict(40, release_name="hallmark@1")
    await world.fill()
    assert {each for each in after if each in await world.items()} == {
        each for each in after if draw(id_, each, "sample") < 0.1
    }
    assert [each.reason for each in await world.queues.boosts("acme", "q")] == ["new topic"]


async def test_a_cluster_is_boosted_by_naming_its_predictions(world):
    await world.queue(uniform=0.1, where=msgspec.structs.replace(EPOCH, release="hallmark@1"))
    cluster = await world.predict(30)
    elsewhere = await world.predict(1, release_name="hallmark@2")
    foreign = await world.predict(1, tenant="other")
    boost, considered = await world.queues.boost_named(
        "acme", "q", rate=0.5, reason="cluster 7", prediction_ids=[*cluster, *elsewhere, *foreign], who="drift"
    )
    assert considered == 30
    assert boost.ended_at is not None
    id_ = await queue_id(world)
    assert set(await world.items()) == {each for each in cluster if draw(id_, each, "sample") < 0.5}
    await world.fill()
    assert {each.probability for each in (await world.items()).values()} == {0.5}


# --- replicas ---


@on_either_kind("module_database_url")
async def test_replicas_that_fill_at_once_take_everything_once(database_url):
    clock = Clock()
    async with replica(database_url, clock) as one, replica(database_url, clock) as two:
        await one.queue(uniform=0.5, negative_feedback=Negative(rate=0.9))
        made = []
        fillers = [world.new_filler(batch_rows=7) for world in (one, two) for _ in range(2)]
        chance = random.Random(5)

        async def predict() -> None:
            for _ in range(10):
                made.extend(await one.predict(6))
                await two.rate(chance.choice(made))

        async def fill(filler) -> None:
            for _ in range(12):
                await filler.step()

        await asyncio.gather(predict(), *(fill(each) for each in fillers))
        await asyncio.gather(one.fill(), two.fill())
        items = await one.items()
        rated = {each.prediction_id for each in await one.feedback.find("acme", limit=200)}
        id_ = await queue_id(one)
        assert {each: item.probability for each, item in items.items()} == {
            each: (0.9 if each in rated else 0.5)
            for each in made
            if draw(id_, each, "sample") < (0.9 if each in rated else 0.5)
        }
        assert items == await two.items()


async def test_a_row_that_appears_after_one_with_a_higher_number_is_not_missed(postgres):
    """A replica that ships slowly has its numbers, and others ship theirs meanwhile."""
    url = postgres.create_database()
    async with replica(url) as slow, replica(url) as fast:
        await fast.queue()
        (early,) = await fast.predict()
        await fast.fill()
        late = prediction()
        async with slow.database.writing() as connection:
            await slow.database.not_while_one(connection, predictions.name)
            await connection.execute(predictions.insert(), as_shipped(late))
            (meanwhile,) = await fast.predict()
            filling = asyncio.create_task(fast.fill())
            done, _ = await asyncio.wait({filling}, timeout=0.3)
            assert not done  # It waits for its turn: what it saw now would not be all.
            assert set(await fast.items()) == {early}
        await filling
        assert set(await fast.items()) == {early, meanwhile, late.id}


async def test_shippers_wait_for_whoever_looks_what_has_settled_and_not_for_each_other(postgres):
    url = postgres.create_database()
    async with replica(url) as looking, replica(url) as shipping:
        await looking.queue()
        one, other = prediction(), prediction()
        async with looking.database.writing() as connection:
            await looking.database.not_while_one(connection, predictions.name)
            await shipping.ship([one])
        async with looking.database.writing() as connection:
            await looking.database.one_at_a_time(connection, predictions.name)
            ship = asyncio.create_task(shipping.ship([other]))
            done, _ = await asyncio.wait({ship}, timeout=0.3)
            assert not done
        await ship
        await looking.fill()
        assert set(await looking.items()) == {one.id, other.id}


async def test_answers_that_are_still_open_in_the_local_record_are_waited_for(tmp_path):
    path = migrated(tmp_path / "hallmark.db")
    async with PredictionLog(path) as log, replica(f"sqlite:///{path}") as world:
        await world.queue()
        first, slow, last = (prediction(outcome="open") for _ in range(3))
        for each in (first, slow, last):
            log.open(each)
            await log.opened(each)
        for each in (first, last):
            each.outcome = "finished"
            await log.close(each)
        await world.fill()
        assert set(await world.items()) == {first.id}
        slow.outcome = "finished"
        await log.close(slow)
        await world.fill()
        assert set(await world.items()) == {first.id, slow.id, last.id}


async def test_numbers_that_sqlite_gives_a_second_time_are_not_missed(tmp_path):
    async with replica(f"sqlite:///{migrated(tmp_path / 'hallmark.db')}") as world:
        await world.queue()
        made = await world.predict(5)
        await world.fill()
        async with world.database.writing() as connection:
            await connection.execute(delete(predictions).where(predictions.c.id.in_(made[3:])))
        later = await world.predict(2)
        await world.fill()
        assert set(await world.items()) == {*made, *later}


async def test_nothing_settled_is_nothing_to_do(world):
    assert await History(world.database).settled() is None
    await world.queue()
    assert await world.filler.step() is False
    await world.rate(uuid7())
    await world.fill()
    assert await world.items() == {}


# --- defining ---


async def test_a_tenant_has_its_own_queues_and_sees_no_others(world):
    await world.queue()
    await world.queue("mine", tenant="other", uniform=0.5)
    assert [each.name for each in await world.queues.find("acme")] == ["q"]
    for attempt in (
        world.queues.get("other", "q"),
        world.queues.boosts("other", "q"),
        world.queues.add_gold("other", "q", uuid7(), "right"),
        world.queues.boost("other", "q", rate=1.0, reason="", where=Where(), who="x"),
        world.findings.items("other", "q"),
        world.findings.progress("other", "q"),
        world.findings.agreement("other", "q"),
        world.findings.shares("other", "q"),
        world.reviews.lease(person("x", "other"), "q"),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await world.queues.find("nobody") == []


@on_either_kind("module_database_url")
async def test_two_calls_that_define_the_same_queue_at_once_make_one(database_url):
    async with replica(database_url) as one, replica(database_url) as two:
        await one.queues.find("acme")
        outcomes = await asyncio.gather(
            *(each.queues.define("acme", "q", Rules(), who="x") for each in (one, two, one, two)),
            return_exceptions=True,
        )
        made = [each for each in outcomes if not isinstance(each, Conflict)]
        assert [each for each in made if isinstance(each, BaseException)] == []
        assert [is_new for _, is_new in made].count(True) == 1
        assert len(await one.queues.find("acme")) == 1


async def test_gold_must_be_a_prediction_that_was_kept_and_of_a_class_that_there_is(world):
    await world.queue()
    (made,) = await world.predict()
    (foreign,) = await world.predict(tenant="other")
    (dropped,) = await world.predict(store=False)
    for id_ in (foreign, dropped, uuid7()):
        with pytest.raises(NotFound):
            await world.queues.add_gold("acme", "q", id_, "right")
    with pytest.raises(InvalidRequest, match="'right', 'wrong'"):
        await world.queues.add_gold("acme", "q", made, "perhaps")
    first = await world.queues.add_gold("acme", "q", made, "right")
    assert await world.queues.add_gold("acme", "q", made, "wrong") == first
    (item,) = (await world.items()).values()
    assert (item.state, item.gold_class, item.policy, item.probability) == ("gold", "wrong", "gold", None)
    await world.fill()
    (item,) = (await world.items()).values()
    assert (item.state, item.gold_class, item.policy, item.probability) == ("waiting", "wrong", "uniform", 1.0)


async def test_a_label_that_was_stated_anew_by_hand_stays_as_it_was_stated(world):
    await world.queue(uniform=0.5, negative_feedback=Negative(rate=1.0))
    await world.predict(40)
    await world.fill()
    (leased,) = await world.lease("anna")
    made = leased.prediction.id
    await world.reviews.complete(person("anna"), leased.review.id, Finding(class_name="right"))
    await world.labels.state(person("anna"), Stated(prediction_id=made, class_name="wrong", comment="after all"))
    await world.rate(made)
    await world.fill()
    (label,) = await world.labels.find("acme")
    assert (label.class_name, label.comment, label.sampling_probability) == ("wrong", "after all", 1.0)


async def test_what_was_erased_is_not_given_to_reviewers(world):
    await world.queue()
    one, blank, other = await world.predict(3)
    await world.fill()
    async with world.database.writing() as connection:
        await connection.execute(delete(predictions).where(predictions.c.id == one))
        await connection.execute(update(predictions).where(predictions.c.id == blank).values(store=False, answer=None))
        assert len((await connection.execute(select(review_items.c.id))).all()) == 3
    assert [each.prediction.id for each in await world.lease("anna", 5)] == [other]


class Broken(Queues):
    """Queues of which those named "broken" take nothing."""

    async def take(self, connection: AsyncConnection, queue: Queue, offers: Sequence[Offer]) -> None:
        if queue.name == "broken":
            raise ValueError("do not quote me")
        await super().take(connection, queue, offers)


@on_either_kind("module_database_url")
async def test_what_fails_in_one_queue_holds_up_no_other_and_is_logged_once(world, caplog):
    rules = {"uniform": 0.000_1, "negative_feedback": Negative(rate=1.0)}
    await world.queue("broken", **rules)
    await world.queue("whole", **rules)
    (made,) = await world.predict()
    filler = Filler(world.database, Broken(world.database, world.clock), world.history, world.labels)
    await world.fill()
    await world.rate(made)
    for _ in range(3):
        await filler.step()
    assert set(await world.items("whole")) == {made}
    assert await world.items("broken") == {}
    (told,) = [each.getMessage() for each in caplog.records if each.name == "app.review.filling"]
    assert told == f"The review queues go on without the feedback for {await queue_id(world, 'broken')}: ValueError"
    await world.fill()
    assert set(await world.items("broken")) == {made}


@on_either_kind("module_database_url")
async def test_a_label_that_cannot_be_told_its_probability_holds_up_no_other(world):
    await world.queue(uniform=0.999_999, negative_feedback=Negative(rate=1.0))
    lost, other = await world.predict(2)
    await world.fill()
    await world.review("anna", count=2)
    async with world.database.writing() as connection:
        await connection.execute(delete(labels).where(labels.c.prediction_id == lost))
    for each in (lost, other):
        await world.rate(each)
    (third,) = await world.predict()
    await world.fill()
    assert [each.sampling_probability for each in await world.labels.find("acme")] == [1.0]
    assert third in await world.items()


async def test_the_filler_fills_by_itself_and_ends_with_its_block(world):
    await world.queue()
    made = await world.predict(3)
    async with world.new_filler(poll_seconds=0.01):
        async with asyncio.timeout(20):
            while set(await world.items()) != set(made):
                await asyncio.sleep(0.005)
    assert isinstance(world.database, Database)
    assert timedelta(0) < datetime.now(UTC) - created_at(made[0])
