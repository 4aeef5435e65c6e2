"""Reviewing: nobody gets an item that others have, no finding is lost, and a label says where it is from."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import delete, update

from app.database import predictions, review_items
from app.errors import Conflict, Forbidden, InvalidRequest, NotFound
from app.feedback import Stated
from app.predictions import uuid7
from app.review import Finding, Threshold
from app.review.reviews import MAX_LEASED, MAX_SKIPS
from observability.estimates import wilson
from tests.postgres import on_either_kind
from tests.review_world import Clock, World, cited, emptied, person, replica

ANNA, BEN, CLEO = person("anna"), person("ben"), person("cleo")
RIGHT, WRONG = Finding(class_name="right"), Finding(class_name="wrong")


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    return await emptied(module_database_url)


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with replica(database_url) as world:
        yield world


async def filled(world: World, count: int = 3, **rules) -> list[str]:
    """A queue with so many items, by their predictions in the order in which they are given out."""
    await world.queue(**rules)
    made = await world.predict(count)
    await world.fill()
    return made


def given(leased) -> list[str]:
    return [each.prediction.id for each in leased]


# --- leases ---


async def test_items_are_given_out_oldest_first_and_each_to_one_reviewer(world):
    made = await filled(world, 5)
    anna = await world.lease("anna", 2)
    assert given(anna) == made[:2]
    assert given(await world.lease("ben", 2)) == made[2:4]
    assert given(await world.lease("cleo", 2)) == made[4:]
    assert await world.lease("dora") == []
    review = anna[0].review
    assert (review.state, review.reviewer, review.leased_at) == ("leased", "anna", world.clock.now)
    assert review.expires_at == world.clock.now + 1_800_000
    assert (anna[0].queue.name, anna[0].prediction.answer) == ("q", "Four weeks.")


async def test_whoever_asks_again_gets_what_they_hold_first(world):
    made = await filled(world, 5)
    first = await world.lease("anna", 2)
    again = await world.lease("anna", 3)
    assert [each.review.id for each in again[:2]] == [each.review.id for each in first]
    assert given(again) == made[:3]
    assert len(await world.lease("anna", 1_000)) == 5 <= MAX_LEASED


async def test_an_expired_lease_gives_the_item_to_the_next_reviewer(world):
    made = await filled(world, 1, lease_seconds=60)
    (anna,) = await world.lease("anna")
    world.clock.pass_seconds(59.999)
    assert await world.lease("ben") == []
    world.clock.pass_seconds(0.001)
    (ben,) = await world.lease("ben")
    assert ben.prediction.id == made[0]
    with pytest.raises(Conflict, match="expired"):
        await world.reviews.complete(ANNA, anna.review.id, RIGHT)
    with pytest.raises(Conflict):
        await world.reviews.renew(ANNA, anna.review.id)
    await world.reviews.complete(BEN, ben.review.id, WRONG)
    assert [each.author for each in await world.labels.find("acme")] == ["ben"]


async def test_what_comes_late_is_taken_if_nobody_else_has_the_item(world):
    await filled(world, 1, lease_seconds=60)
    (anna,) = await world.lease("anna")
    world.clock.pass_seconds(3_600)
    done = await world.reviews.complete(ANNA, anna.review.id, RIGHT)
    assert (done.state, done.class_name) == ("done", "right")


async def test_the_same_reviewer_may_have_an_item_again_once_the_lease_has_expired(world):
    await filled(world, 1, lease_seconds=60)
    (first,) = await world.lease("anna")
    world.clock.pass_seconds(60)
    (second,) = await world.lease("anna")
    assert second.review.id != first.review.id
    assert (await world.reviews.get("acme", first.review.id)).state == "expired"
    with pytest.raises(Conflict):
        await world.reviews.complete(ANNA, first.review.id, RIGHT)
    await world.reviews.complete(ANNA, second.review.id, RIGHT)
    assert await world.lease("anna") == await world.lease("ben") == []


async def test_a_lease_can_be_renewed_and_given_back(world):
    made = await filled(world, 1, lease_seconds=60)
    (anna,) = await world.lease("anna")
    world.clock.pass_seconds(50)
    assert (await world.reviews.renew(ANNA, anna.review.id)).expires_at == world.clock.now + 60_000
    world.clock.pass_seconds(50)
    assert await world.lease("ben") == []
    assert (await world.reviews.give_back(ANNA, anna.review.id)).state == "returned"
    assert given(await world.lease("ben")) == made


@on_either_kind("module_database_url")
async def test_a_lease_whose_item_was_erased_as_it_was_given_holds_nothing(world):
    made = await filled(world, 3)
    held = await world.lease("anna", 2)
    async with world.database.writing() as connection:
        await connection.execute(delete(review_items).where(review_items.c.prediction_id == made[0]))
        await connection.execute(update(predictions).where(predictions.c.id == made[1]).values(store=False))
    for change in (
        world.reviews.complete(ANNA, held[0].review.id, RIGHT),
        world.reviews.skip(ANNA, held[0].review.id, "other"),
        world.reviews.renew(ANNA, held[0].review.id),
    ):
        with pytest.raises(NotFound, match="erased"):
            await change
    assert given(await world.lease("anna", 3)) == made[2:]


async def test_an_item_that_wants_more_reviewers_is_given_to_so_many_different_ones(world):
    (made,) = await filled(world, 1, overlap=2)
    (anna,), (ben,) = await world.lease("anna"), await world.lease("ben")
    assert anna.prediction.id == ben.prediction.id == made
    assert await world.lease("cleo") == []
    assert [each.review.id for each in await world.lease("anna", 2)] == [anna.review.id]
    await world.reviews.complete(ANNA, anna.review.id, RIGHT)
    assert await world.lease("anna") == await world.lease("cleo") == []
    assert (await world.items())[made].state == "waiting"
    await world.reviews.complete(BEN, ben.review.id, WRONG)
    item = (await world.items())[made]
    assert (item.state, item.done) == ("done", 2)
    assert {each.author: each.class_name for each in await world.labels.find("acme")} == {
        "anna": "right",
        "ben": "wrong",
    }


@on_either_kind("module_database_url")
async def test_many_reviewers_of_two_replicas_at_once_never_get_an_item_beyond_its_overlap(database_url):
    clock = Clock()
    async with replica(database_url, clock) as one, replica(database_url, clock) as two:
        made = await filled(one, 16, overlap=3, overlap_share=0.4, lease_seconds=600)
        chance = random.Random(11)

        async def work(n: int) -> None:
            name, world = f"reviewer {n % 5}", (one, two)[n % 2]  # Each is at work in two windows, on both replicas.
            while leased := await world.lease(name, chance.randint(1, 4)):
                for each in leased:
                    await world.reviews.complete(person(name), each.review.id, RIGHT)

        await asyncio.gather(*(work(n) for n in range(10)))
        items = await one.items()
        assert set(items) == set(made)
        labelled = await one.labels.find("acme", limit=1_000)
        reviewers = Counter(each.prediction_id for each in labelled)
        assert reviewers == {each: item.wanted for each, item in items.items()}
        assert set(reviewers.values()) == {1, 3}
        assert {(item.state, item.done - item.wanted) for item in items.values()} == {("done", 0)}
        for item in items.values():
            _, reviews = await two.findings.item("acme", item.id)
            done = [each.reviewer for each in reviews if each.state == "done"]
            assert len(done) == len(set(done)) == item.wanted


# --- what is found ---


async def test_a_label_says_what_was_found_and_how_its_prediction_was_chosen(world):
    (made,) = await filled(world, 1, uniform=1.0)
    (leased,) = await world.lease("anna")
    finding = Finding(class_name="wrong", answer="Six weeks.", passages=["p1"], comment="See clause 7.")
    done = await world.reviews.complete(ANNA, leased.review.id, finding)
    (label,) = await world.labels.find("acme")
    assert (label.id, label.prediction_id, label.author, label.source) == (done.label_id, made, "anna", "review_queue")
    assert (label.class_name, label.answer, label.passages, label.comment) == (
        "wrong",
        "Six weeks.",
        ["p1"],
        "See clause 7.",
    )
    assert (label.policy, label.sampling_probability) == ("q/uniform", 1.0)
    item, (review,) = await world.findings.item("acme", leased.review.item_id)
    assert (item.prediction_id, item.state, review) == (made, "done", done)


async def test_a_reviewer_may_think_again_and_has_one_label(world):
    await filled(world, 1)
    (leased,) = await world.lease("anna")
    await world.reviews.complete(ANNA, leased.review.id, RIGHT)
    world.clock.pass_seconds(86_400)
    again = await world.reviews.complete(ANNA, leased.review.id, WRONG)
    assert again.class_name == "wrong"
    (label,) = await world.labels.find("acme")
    assert (label.class_name, label.revision) == ("wrong", 2)
    assert [each.done for each in (await world.items()).values()] == [1]


async def test_what_breaks_a_rule_is_refused_and_nothing_is_written(world):
    await filled(world, 1)
    (leased,) = await world.lease("anna")
    for finding, param in (
        (Finding(class_name="perhaps"), "class"),
        (Finding(answer="Six weeks."), "class"),
        (Finding(), "class"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await world.reviews.complete(ANNA, leased.review.id, finding)
        assert refused.value.param == param
    assert await world.labels.find("acme") == []
    assert (await world.reviews.get("acme", leased.review.id)).state == "leased"
    await world.queue("free", classes=())
    await world.fill()
    (free,) = await world.lease("anna", queue="free")
    with pytest.raises(InvalidRequest):
        await world.reviews.complete(ANNA, free.review.id, Finding(comment="hm"))
    await world.reviews.complete(ANNA, free.review.id, Finding(answer="Six weeks."))


async def test_a_review_is_its_reviewers_or_an_administrators(world):
    await filled(world, 1)
    (leased,) = await world.lease("anna")
    for attempt in (
        world.reviews.complete(BEN, leased.review.id, RIGHT),
        world.reviews.skip(BEN, leased.review.id, "unclear"),
        world.reviews.give_back(BEN, leased.review.id),
        world.reviews.renew(BEN, leased.review.id),
    ):
        with pytest.raises(Forbidden, match="another reviewer"):
            await attempt
    stranger = person("anna", "other", is_admin=True)
    for attempt in (
        world.reviews.complete(stranger, leased.review.id, RIGHT),
        world.reviews.get("other", leased.review.id),
        world.findings.item("other", leased.review.item_id),
        world.reviews.get("acme", uuid7()),
    ):
        with pytest.raises(NotFound):
            await attempt
    await world.reviews.complete(person("boss", is_admin=True), leased.review.id, RIGHT)
    (label,) = await world.labels.find("acme")
    assert label.author == "anna"


async def test_a_skipped_item_goes_to_others_and_is_set_aside_when_enough_skip_it(world):
    (made,) = await filled(world, 1)
    for n in range(MAX_SKIPS):
        name = f"reviewer {n}"
        (leased,) = await world.lease(name)
        skipped = await world.reviews.skip(person(name), leased.review.id, "cannot_know")
        assert (skipped.state, skipped.reason) == ("skipped", "cannot_know")
        assert await world.lease(name) == []
        with pytest.raises(Conflict, match="skipped"):
            await world.reviews.complete(person(name), leased.review.id, RIGHT)
    item = (await world.items())[made]
    assert (item.state, item.skipped) == ("set_aside", MAX_SKIPS)
    assert await world.lease("anna") == []
    assert await world.labels.find("acme") == []


@on_either_kind("module_database_url")
async def test_one_reviewer_alone_sets_no_item_aside(world):
    (made,) = await filled(world, 1, lease_seconds=60)
    (returned,) = await world.lease("anna")
    await world.reviews.give_back(ANNA, returned.review.id)
    with pytest.raises(Conflict, match="lease it anew"):
        await world.reviews.skip(ANNA, returned.review.id, "other")
    expired = []
    for _ in range(MAX_SKIPS):
        expired += await world.lease("anna")
        world.clock.pass_seconds(60)
    assert len({each.review.id for each in expired}) == MAX_SKIPS
    for each in expired:
        await world.reviews.skip(ANNA, each.review.id, "other")
    item = (await world.items())[made]
    assert (item.state, item.skipped) == ("waiting", 1)
    assert await world.lease("anna") == []
    assert given(await world.lease("ben")) == [made]


async def test_a_review_that_is_done_is_neither_skipped_nor_given_back(world):
    await filled(world, 1)
    (leased,) = await world.lease("anna")
    await world.reviews.complete(ANNA, leased.review.id, RIGHT)
    for attempt in (
        world.reviews.skip(ANNA, leased.review.id, "other"),
        world.reviews.give_back(ANNA, leased.review.id),
        world.reviews.renew(ANNA, leased.review.id),
    ):
        with pytest.raises(Conflict, match="done"):
            await attempt


# --- gold ---


async def test_gold_is_mixed_in_at_its_share_and_each_reviewer_gets_it_once(world):
    regular = await filled(world, 30, gold_share=0.4, overlap=2)
    gold = await world.predict(20, assignment="shadow")  # Which the queue does not consider.
    for each in gold:
        await world.queues.add_gold("acme", "q", each, "right")
    for name in ("anna", "ben"):
        given_out = given(await _worked_through(world, name, 20))
        assert len(given_out) == len(set(given_out)) == 20
        assert 1 <= len(set(given_out) & set(gold)) <= 16
        assert set(given_out) <= {*regular, *gold}


async def _worked_through(world: World, name: str, count: int):
    done = []
    while len(done) < count:
        done += await world.lease(name, 5)
        for each in done[-5:]:
            await world.reviews.complete(person(name), each.review.id, RIGHT)
    return done


async def test_what_is_only_gold_is_given_to_everybody_and_stands_for_nothing(world):
    await world.queue(uniform=1e-9, gold_share=1.0)
    (made,) = await world.predict()
    await world.queues.add_gold("acme", "q", made, "right")
    for name, class_name in (("anna", "right"), ("ben", "wrong"), ("cleo", "right")):
        await world.review(name, class_name)
        assert await world.lease(name) == []
    assert (await world.items())[made].state == "gold"
    assert await world.findings.shares("acme", "q") == []
    assert {each.sampling_probability for each in await world.labels.find("acme")} == {None}
    reviewers = {each.reviewer: each for each in (await world.findings.progress("acme", "q")).reviewers}
    assert {name: (each.gold, each.gold_right) for name, each in reviewers.items()} == {
        "anna": (1, 1),
        "ben": (1, 0),
        "cleo": (1, 1),
    }
    assert (reviewers["ben"].gold_share, (reviewers["ben"].gold_low, reviewers["ben"].gold_high)) == (
        0.0,
        wilson(0.0, 1),
    )


# --- figures ---


@on_either_kind("module_database_url")
async def test_progress_counts_items_and_what_each_reviewer_did(world):
    await filled(world, 6)
    await world.queue("elsewhere")
    await world.fill()
    await world.lease("cleo", queue="elsewhere")
    anna = await world.lease("anna", 3)
    world.clock.pass_seconds(30)
    for each in anna[:2]:
        await world.reviews.complete(ANNA, each.review.id, RIGHT)
    await world.reviews.skip(ANNA, anna[2].review.id, "unclear")
    await world.lease("ben", 2)
    progress = await world.findings.progress("acme", "q")
    assert [(each.policy, each.state, each.items) for each in progress.items] == [
        ("uniform", "done", 2),
        ("uniform", "waiting", 4),
    ]
    (a, b) = progress.reviewers
    assert (a.reviewer, a.done, a.skipped, a.leased, a.mean_seconds, a.gold_share) == ("anna", 2, 1, 0, 30.0, None)
    assert (b.reviewer, b.done, b.skipped, b.leased, b.mean_seconds) == ("ben", 0, 0, 2, None)
    world.clock.pass_seconds(1_800)
    assert (await world.findings.progress("acme", "q")).reviewers[1].leased == 0


async def test_agreement_compares_what_reviewers_chose_for_the_same_items(world):
    await filled(world, 4, overlap=2)
    for name, classes in (("anna", "rrww"), ("ben", "rwww")):
        for leased, letter in zip(await world.lease(name, 4), classes, strict=True):
            await world.reviews.complete(person(name), leased.review.id, RIGHT if letter == "r" else WRONG)
    found = await world.findings.agreement("acme", "q")
    (pair,) = found.pairs
    assert (pair.reviewers, pair.share, pair.kappa.items) == (("anna", "ben"), 0.75, 4)
    assert pair.kappa.value == pytest.approx(0.5)
    assert found.alpha.value == pytest.approx(1 - 7 * 2 / (2 * 3 * 5))


async def test_shares_are_weighted_and_told_by_release(world):
    await world.queue(uniform=0.5, low_support=Threshold(rate=1.0, below=0.5))
    poor = set(await world.predict(5, **cited(0.1)))
    await world.predict(15, release_name="hallmark@2", **cited(0.9))
    await world.fill()
    items = await world.items()
    while leased := await world.lease("anna", 20):
        for each in leased:
            finding = WRONG if each.prediction.id in poor else RIGHT
            await world.reviews.complete(ANNA, each.review.id, finding)
    shares = {(each.class_name, each.release): each.estimate for each in await world.findings.shares("acme", "q")}
    others = len(items) - 5
    expected = others * 2 / (others * 2 + 5)
    assert shares["right", None].share == pytest.approx(expected)
    assert shares["right", None].unweighted == pytest.approx(others / len(items))
    assert shares["right", "hallmark@1"].share == 0.0
    assert shares["right", "hallmark@2"].share == 1.0
    assert shares["wrong", None].share == pytest.approx(1 - expected)
    assert shares["right", None].low < 15 / 20 < shares["right", None].high


async def test_reviewers_who_differ_count_in_part(world):
    await filled(world, 1, overlap=2)
    await world.review("anna", "right")
    await world.review("ben", "wrong")
    found = {
        each.class_name: each.estimate.share for each in await world.findings.shares("acme", "q") if not each.release
    }
    assert found == {"right": 0.5, "wrong": 0.5}


@on_either_kind("module_database_url")
async def test_items_are_listed_page_by_page_and_by_what_they_are(world):
    made = await filled(world, 7)
    await world.review("anna")
    listed = await world.findings.items("acme", "q", limit=3)
    rest = await world.findings.items("acme", "q", limit=10, before=listed[-1].id)
    assert [each.prediction_id for each in (*listed, *rest)] == made[::-1]
    assert [each.prediction_id for each in await world.findings.items("acme", "q", state="done")] == made[:1]
    assert await world.findings.items("acme", "q", policy="drift") == []
    (found,) = await world.findings.items("acme", "q", prediction_id=made[3])
    assert found.prediction_id == made[3]


async def test_a_label_by_hand_and_one_from_the_queue_are_one_label_of_their_author(world):
    (made,) = await filled(world, 1)
    await world.labels.state(ANNA, Stated(prediction_id=made, class_name="wrong"))
    await world.review("anna", "right")
    (label,) = await world.labels.find("acme")
    assert (label.class_name, label.revision, label.source) == ("right", 2, "review_queue")
