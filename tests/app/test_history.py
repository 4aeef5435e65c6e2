"""What was predicted is found by what it was, in either database; pages lose and repeat nothing."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from app.database import Database
from app.feedback import FeedbackLog, Given, LabelLog, Speaker, Stated
from app.predictions import History, Prediction, Where, uuid7
from app.predictions.history import first_id
from app.predictions.rows import to_row
from app.predictions.shipper import Shipper, shippable


async def put(database: Database, *predictions: Prediction) -> None:
    """Put predictions into the shared database as they come there from an outbox."""
    rows = [to_row(prediction) for prediction in predictions]
    facts = [shippable([bytes(key), *others]) for key, *others in rows]
    await Shipper(None, database)._upsert(facts)


def made(at: datetime, **facts: Any) -> Prediction:
    """A prediction of that moment."""
    start = first_id(at)
    return Prediction(**{"id": start[:14] + uuid7()[14:], "tenant": "acme", "outcome": "finished", **facts})


NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


@pytest.fixture
async def database(database_url) -> AsyncIterator[Database]:
    async with Database(database_url) as database:
        yield database


@pytest.fixture
def history(database) -> History:
    return History(database)


async def test_a_prediction_is_read_back_as_it_was_written(database, history):
    written = made(
        NOON,
        user="ann",
        release_name="handbook@3",
        release_digest="d" * 64,
        stream=True,
        prompt_tokens=12,
        total_seconds=0.5,
        metadata={"ticket": 7, "é": "\u0000"},
        passages=[{"document_id": "d1", "document_version": "v", "n": 1, "score": 0.5}],
        request=b'{"a":  1e9, "messages":[{"content":"Wie gr\xc3\xb6\xc3\x9fer?"}]}',
        answer="So. \N{MUSICAL SYMBOL G CLEF}",
    )
    await put(database, written)
    read = await history.get("acme", written.id)
    assert msgspec.json.encode(read.as_dict()) == msgspec.json.encode(written.as_dict())
    assert read.handed_over
    assert await history.get("other", written.id) is None
    assert await history.get("acme", uuid7()) is None


FACTS = {
    "release_digest": ("a" * 64, "b" * 64),
    "outcome": ("finished", "failed"),
    "user": ("ann", "bob"),
    "conversation": ("c 1", "c 2"),
    "model": ("handbook", "handbook@2"),
    "adapter": ("tone", "routing"),
    "assignment": ("stable", "canary"),
}


@pytest.mark.parametrize("field", FACTS)
async def test_each_filter_finds_what_has_the_value_and_nothing_else(database, history, field):
    one, other = FACTS[field]
    mine, theirs = made(NOON, **{field: one}), made(NOON, **{field: other})
    await put(database, mine, theirs, made(NOON, tenant="other", **{field: one}), made(NOON, outcome="cancelled"))
    where = Where(**{field: one})
    assert [each.id for each in await history.find("acme", where)] == [mine.id]
    assert await history.count("acme", where) == 1


async def test_a_release_is_one_of_a_name_or_all_of_it(database, history):
    names = ("a_b@1", "a_b@12", "axb@1", "a_b2@1", None)
    predictions = {name: made(NOON, release_name=name) for name in names}
    await put(database, *predictions.values())

    async def found(release: str) -> set[str]:
        return {str(each.release_name) for each in await history.find("acme", Where(release=release))}

    assert await found("a_b@1") == {"a_b@1"}
    assert await found("a_b") == {"a_b@1", "a_b@12"}
    assert await found("b") == set()


async def test_a_verdict_is_meant_with_its_reason_or_whatever_the_reason(database, history):
    verdicts = ("abstained:nothing_relevant", "abstained:engine_abstained", "answered", None)
    await put(database, *(made(NOON, verdict=verdict) for verdict in verdicts))
    assert await history.count("acme", Where(verdict="abstained")) == 2
    assert await history.count("acme", Where(verdict="abstained:nothing_relevant")) == 1
    assert await history.count("acme", Where(verdict="answered")) == 1
    assert await history.count("acme", Where(verdict="abst")) == 0


async def test_times_are_a_half_open_range_in_any_zone(database, history):
    moments = [NOON + timedelta(milliseconds=offset) for offset in (-1, 0, 999, 1000)]
    predictions = [made(moment) for moment in moments]
    await put(database, *predictions)
    until = (NOON + timedelta(seconds=1)).astimezone(timezone(timedelta(hours=5)))
    for since in (NOON, NOON.replace(tzinfo=None)):
        found = await history.find("acme", Where(since=since, until=until))
        assert {each.id for each in found} == {predictions[1].id, predictions[2].id}
    assert await history.count("acme", Where(since=datetime(1, 1, 1, tzinfo=UTC))) == 4
    assert await history.count("acme", Where(until=datetime(1, 1, 1, tzinfo=UTC))) == 0
    assert await history.count("acme", Where(since=datetime(9999, 1, 1, tzinfo=UTC))) == 0


# --- what is said of them ---


@pytest.fixture
async def labels(database) -> AsyncIterator[LabelLog]:
    async with LabelLog(database) as labels:
        yield labels


@pytest.fixture
async def feedback(database) -> AsyncIterator[FeedbackLog]:
    async with FeedbackLog(database) as feedback:
        yield feedback


def speaker(user: str = "ann", tenant: str = "acme") -> Speaker:
    return Speaker(tenant=tenant, key_id="k", user=user)


async def meant(history: History, **filters: Any) -> set[str]:
    """The ids that a filter finds, which its count and its export agree with."""
    where = Where(**filters)
    found = [each.id for each in await history.find("acme", where, limit=200)]
    assert await history.count("acme", where) == len(found) == len(set(found))
    assert [each.id for page in [page async for page in history.pages("acme", where)] for each in page] == found[::-1]
    return set(found)


async def test_what_is_labelled_is_told_from_what_is_not(database, history, labels):
    first, second, third = predictions = [made(NOON) for _ in range(3)]
    await put(database, *predictions, made(NOON, tenant="other"))
    assert await meant(history, label_state="labelled") == set()
    for user, about in (("ann", first), ("ben", first), ("ann", second)):
        await labels.state(speaker(user), Stated(prediction_id=about.id, class_name="refund"))
    await labels.state(speaker(tenant="other"), Stated(prediction_id=third.id, class_name="refund"))
    assert await meant(history, label_state="labelled") == {first.id, second.id}
    assert await meant(history, label_state="unlabelled") == {third.id}
    for user, about in (("ann", first), ("ann", second)):
        await labels.state(speaker(user), Stated(prediction_id=about.id, withdrawn=True))
    assert await meant(history, label_state="labelled") == {first.id}
    assert await meant(history, label_state="unlabelled") == {second.id, third.id}
    await labels.state(speaker("ann"), Stated(prediction_id=second.id, answer="Four weeks."))
    assert await meant(history, label_state="labelled") == {first.id, second.id}


async def test_a_label_that_came_before_its_prediction_counts(database, history, labels):
    prediction = made(NOON)
    await labels.state(speaker(), Stated(prediction_id=prediction.id, class_name="refund"))
    assert await meant(history, label_state="labelled") == set()
    await put(database, prediction)
    assert await meant(history, label_state="labelled") == {prediction.id}


async def test_feedback_is_told_by_what_it_says(database, history, feedback):
    kinds: dict[str, list[dict[str, Any]]] = {
        "silence": [],
        "good": [{"rating": True}],
        "bad": [{"rating": False, "category": "tone"}],
        "number": [{"rating": 0.0}],
        "corrected": [{"rating": False, "correction": "Four weeks."}],
        "comment": [{"comment": "Hm."}],
        "changed": [{"rating": False, "correction": "Four weeks."}, {"rating": True}],
        "withdrawn": [{"rating": False}, {"withdrawn": True}],
    }
    predictions = {kind: made(NOON) for kind in (*kinds, "disputed")}
    await put(database, *predictions.values())
    for kind, calls in kinds.items():
        for said in calls:
            await feedback.give(speaker(), Given(prediction_id=predictions[kind].id, **said))
    for user, rating in (("ann", True), ("ben", False)):
        await feedback.give(speaker(user), Given(prediction_id=predictions["disputed"].id, rating=rating))
    await feedback.give(speaker(), Given(conversation="chat 7", rating=False))

    async def found(state: str) -> set[str]:
        ids = await meant(history, feedback_state=state)
        return {kind for kind, prediction in predictions.items() if prediction.id in ids}

    assert await found("positive") == {"good", "changed", "disputed"}
    assert await found("negative") == {"bad", "corrected", "disputed"}
    assert await found("corrected") == {"corrected"}
    assert await found("none") == {"silence", "withdrawn"}
    assert await found("given") == predictions.keys() - {"silence", "withdrawn"}
    await feedback.give(speaker("ben"), Given(prediction_id=predictions["good"].id, withdrawn=True))
    assert "good" in await found("positive")


async def test_the_filters_agree_with_what_authors_say_whatever_they_said_before(database, history, labels, feedback):
    chance = random.Random(3)
    predictions = [made(NOON, user=chance.choice(("ann", "bob"))) for _ in range(25)]
    await put(database, *predictions)
    for _ in range(150):
        about, by = chance.choice(predictions).id, speaker(chance.choice(("ann", "ben", "cy")))
        said_at = chance.choice((None, chance.randrange(10**9)))
        if chance.random() < 0.5:
            says = chance.choice(({"withdrawn": True}, {"class_name": "refund"}))
            await labels.state(by, Stated(prediction_id=about, said_at=said_at, **says))
        else:
            says = chance.choice(({"withdrawn": True}, {"rating": True}, {"rating": False}, {"correction": "No."}))
            await feedback.give(by, Given(prediction_id=about, said_at=said_at, **says))

    labelled = {each.prediction_id for each in await labels.find("acme", limit=200)}
    entries = await feedback.find("acme", limit=200)
    ids = {prediction.id for prediction in predictions}

    def about_those(entries: Iterable[Any]) -> set[str]:
        return {entry.prediction_id for entry in entries}

    assert 0 < len(labelled) < len(ids)
    assert await meant(history, label_state="labelled") == labelled
    assert await meant(history, label_state="unlabelled") == ids - labelled
    negative = about_those(each for each in entries if each.rating is False)
    assert await meant(history, feedback_state="given") == about_those(entries)
    assert await meant(history, feedback_state="none") == ids - about_those(entries)
    assert await meant(history, feedback_state="positive") == about_those(each for each in entries if each.rating)
    assert await meant(history, feedback_state="negative") == negative
    assert await meant(history, feedback_state="corrected") == about_those(each for each in entries if each.correction)
    anns = {prediction.id for prediction in predictions if prediction.user == "ann"}
    both = await meant(history, user="ann", label_state="unlabelled", feedback_state="negative")
    assert both == (anns & negative) - labelled


# --- pages ---


async def test_pages_go_back_through_time_and_lose_and_repeat_nothing(database, history):
    predictions = [made(NOON, user="ann" if n % 3 else "bob") for n in range(30)]
    await put(database, *predictions)
    found, before = [], None
    while page := await history.find("acme", Where(user="ann"), limit=7, before=before):
        found += page
        before = page[-1].id
    expected = sorted((each.id for each in predictions if each.user == "ann"), reverse=True)
    assert [each.id for each in found] == expected


async def test_pages_stay_as_they_are_while_predictions_and_labels_arrive(database, history, labels):
    predictions = sorted((made(NOON) for _ in range(30)), key=lambda each: each.id)
    await put(database, *predictions)
    for prediction in predictions[::2]:
        await labels.state(speaker(), Stated(prediction_id=prediction.id, class_name="refund"))
    found, before = [], None
    while page := await history.find("acme", Where(label_state="labelled"), limit=4, before=before):
        found += [each.id for each in page]
        before = page[-1].id
        new = made(NOON + timedelta(minutes=1))
        await put(database, new)
        for about in (new, predictions[-1]):  # One that is new, and one that the first page came before.
            await labels.state(speaker("ben"), Stated(prediction_id=about.id, class_name="refund"))
    assert found == [each.id for each in predictions[::2]][::-1]


@pytest.mark.parametrize("page_rows", [1, 7, 10, 100])
async def test_an_export_has_everything_once_the_oldest_first_and_nothing_newer_than_its_start(
    database, history, page_rows
):
    predictions = [made(NOON, user="ann") for _ in range(20)]
    await put(database, *predictions, made(NOON, user="bob"), made(NOON, tenant="other", user="ann"))
    pages = []
    async for page in history.pages("acme", Where(user="ann"), page_rows=page_rows):
        pages.append(page)
        await put(database, made(datetime.now(UTC) + timedelta(minutes=1), user="ann"))
    assert [each.id for page in pages for each in page] == sorted(each.id for each in predictions)
    assert {len(page) for page in pages[:-1]} <= {page_rows}


async def test_several_releases_are_listed_as_one(database, history):
    digests = ("a" * 64, "b" * 64, "c" * 64)
    predictions = [made(NOON, release_digest=digests[n % 3]) for n in range(12)]
    await put(database, *predictions)
    expected = sorted((each.id for n, each in enumerate(predictions) if n % 3 < 2), reverse=True)
    first = await history.of_releases("acme", digests[:2], limit=5)
    rest = await history.of_releases("acme", digests[:2], limit=50, before=first[-1].id)
    assert [each.id for each in first + rest] == expected
    assert await history.of_releases("other", digests, limit=5) == []


async def test_only_those_on_record_are_mentioned(database, history):
    predictions = [made(NOON) for _ in range(3)]
    await put(database, *predictions)
    found = await history.mentions("acme", [predictions[0].id, uuid7()])
    assert list(found) == [predictions[0].id]
    assert await history.mentions("other", [predictions[0].id]) == {}


async def test_a_page_that_nobody_waits_for_holds_no_connection(database, history):
    await put(database, *(made(NOON) for _ in range(4)))
    exports = [history.pages("acme", page_rows=2) for _ in range(12)]  # More than there are connections.
    assert [len(await anext(pages)) for pages in exports] == [2] * 12
    assert await asyncio.wait_for(history.count("acme"), 5) == 4
    for pages in exports:
        await pages.aclose()
