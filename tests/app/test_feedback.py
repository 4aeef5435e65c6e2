"""Feedback and labels in the database that replicas share, of either kind: each counts once, however often it comes."""

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, insert

from app.database import Database, predictions
from app.database import feedback as feedback_table
from app.errors import Conflict, Forbidden, InvalidRequest, NotFound, Overloaded, Unavailable
from app.feedback import Counts, Feedback, FeedbackLog, Given, Label, LabelLog, Speaker, Stated
from app.feedback.calls import Row, call, revised
from app.predictions import uuid7
from tests.postgres import Postgres
from tests.properties import examples

ANNA = Speaker(tenant="acme", key_id="k1", user="anna")
BEN = Speaker(tenant="acme", key_id="k1", user="ben")
KEY = Speaker(tenant="acme", key_id="k1")
ADMIN = Speaker(tenant="acme", key_id="k9", is_admin=True)
STRANGER = Speaker(tenant="other", key_id="k5", user="anna")
PREDICTION = "019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55"


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[FeedbackLog]:
    async with Database(url, timeout_seconds=20.0) as database, FeedbackLog(database, **options) as log:
        yield log


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database(database_url) as database:
        yield database


@pytest.fixture
async def feedback(database: Database) -> AsyncIterator[FeedbackLog]:
    async with FeedbackLog(database) as log:
        yield log


@pytest.fixture
async def labels(database: Database) -> AsyncIterator[LabelLog]:
    async with LabelLog(database) as log:
        yield log


async def give(log: FeedbackLog, speaker: Speaker = ANNA, /, **said: Any) -> Feedback:
    if "conversation" not in said:
        said.setdefault("prediction_id", PREDICTION)
    return Feedback.of((await log.give(speaker, Given(**said))).row)


async def state(log: LabelLog, speaker: Speaker = ANNA, /, **stated: Any) -> Label:
    return Label.of((await log.state(speaker, Stated(prediction_id=PREDICTION, **stated))).row)


async def the_only(log: FeedbackLog, **filters: Any) -> Feedback:
    (found,) = await log.find("acme", **filters)
    return found


def rated(entries: Sequence[Feedback]) -> list[Any]:
    return [entry.rating for entry in entries]


# --- one call ---


async def test_what_is_given_is_found_as_it_was_given(feedback):
    facts = {"rating": True, "comment": "é\n'\"", "correction": "x" * 100_000, "metadata": {"b": 1, "a": ["é", None]}}
    given = await give(feedback, **facts, category="helpful", source="judge")
    assert (given.revision, given.author, given.key_id, given.withdrawn) == (1, "anna", "k1", False)
    assert {name: getattr(given, name) for name in facts} == facts
    assert given.prediction_id == PREDICTION
    assert abs(given.at - time.time() * 1000) < 60_000
    assert await feedback.get("acme", given.id) == given == await the_only(feedback)


async def test_a_rating_stays_the_boolean_or_the_number_that_it_was(feedback):
    for rating in (True, False, 0.0, 1.0, -2.5, 1e15, None):
        found = await feedback.get("acme", (await give(feedback, rating=rating, comment="c")).id)
        assert (found.rating, type(found.rating)) == (rating, type(rating))


async def test_who_names_nobody_speaks_for_the_key(feedback):
    assert (await give(feedback, KEY, rating=1.0)).author == "key:k1"


async def test_feedback_about_nothing_or_that_says_nothing_is_refused(feedback):
    for said, param in (
        ({"rating": True}, "prediction_id"),
        ({"rating": True, "prediction_id": PREDICTION, "conversation": "c"}, "prediction_id"),
        ({"rating": True, "prediction_id": "7"}, "prediction_id"),
        ({"prediction_id": PREDICTION}, "rating"),
        ({"prediction_id": PREDICTION, "withdrawn": True, "rating": False}, "rating"),
        ({"prediction_id": PREDICTION, "withdrawn": True, "comment": "c"}, "comment"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await feedback.give(ANNA, Given(**said))
        assert refused.value.param == param
    assert await feedback.find("acme", withdrawn=True) == []


async def test_another_tenant_finds_nothing_and_changes_nothing(feedback):
    given = await give(feedback, rating=True)
    assert await feedback.find("other") == []
    assert await feedback.counts("other", [PREDICTION]) == []
    stranger_admin = Speaker(tenant="other", key_id="k", is_admin=True)
    for speaker in (STRANGER, stranger_admin):
        for attempt in (
            feedback.get(speaker.tenant, given.id),
            feedback.change(speaker, given.id, {"rating": False}),
            feedback.withdraw(speaker, given.id),
        ):
            with pytest.raises(NotFound):
                await attempt
    assert await feedback.history("other", given.id) == []
    theirs = await give(feedback, STRANGER, rating=False, idempotency_key="k")
    ours = await give(feedback, rating=True, idempotency_key="k")
    assert theirs.id != ours.id == given.id


# --- counts once ---


async def test_a_later_word_of_the_same_author_replaces_the_earlier_one(feedback):
    first = await give(feedback, rating=True, comment="good")
    second = await give(feedback, rating=False)
    assert (second.id, second.revision, second.rating, second.comment) == (first.id, 2, False, None)
    assert await the_only(feedback) == second


async def test_a_prediction_is_the_same_however_its_id_is_written(feedback, labels):
    given = await give(feedback, rating=True)
    assert (await give(feedback, rating=False, prediction_id=PREDICTION.upper())).id == given.id
    withdrawn = await feedback.withdraw(ANNA, given.id)
    assert (withdrawn.row["id"], withdrawn.row["revision"]) == (given.id, 3)
    await state(labels, class_name="a")
    again = await labels.state(ANNA, Stated(prediction_id=PREDICTION.replace("-", ""), class_name="b"))
    assert again.row["revision"] == 2


async def test_another_author_thing_source_or_category_is_another_feedback(feedback):
    variants = [
        await give(feedback, rating=True),
        await give(feedback, BEN, rating=True),
        await give(feedback, KEY, rating=True),
        await give(feedback, rating=True, category="tone"),
        await give(feedback, rating=True, source="reviewer"),
        await give(feedback, rating=True, conversation=PREDICTION),
        await give(feedback, rating=True, prediction_id=uuid7()),
    ]
    assert len({each.id for each in variants}) == len(variants)
    assert {each.revision for each in variants} == {1}


async def test_the_same_call_again_gets_the_first_answer(feedback):
    given = Given(prediction_id=PREDICTION, rating=True, metadata={"a": 1, "b": 2}, idempotency_key="once")
    first = await feedback.give(ANNA, given)
    await give(feedback, rating=False)
    again = await feedback.give(ANNA, Given(**{**as_dict(given), "metadata": {"b": 2, "a": 1}}))
    assert (first.is_new, again.is_new) == (True, False)
    assert Feedback.of(again.row) == Feedback.of(first.row)
    assert (await the_only(feedback)).rating is False
    assert len(await feedback.history("acme", first.row["id"])) == 2


def as_dict(given: Given) -> dict[str, Any]:
    return {name: getattr(given, name) for name in given.__struct_fields__}


async def test_an_idempotency_key_with_another_content_is_refused_and_writes_nothing(feedback):
    first = await give(feedback, rating=True, idempotency_key="once")
    others = ({"rating": False}, {"comment": "c"}, {"prediction_id": uuid7()}, {"source": "judge"}, {"said_at": 5})
    for other in others:
        with pytest.raises(Conflict, match="another content") as refused:
            await give(feedback, **{"rating": True, "idempotency_key": "once", **other})
        assert refused.value.param == "idempotency_key"
    with pytest.raises(Conflict):
        await give(feedback, BEN, rating=True, idempotency_key="once")
    assert await the_only(feedback, withdrawn=True) == first


async def test_the_same_content_of_the_same_moment_is_the_same_call_without_a_key(feedback):
    first = await give(feedback, rating=True, said_at=1_000)
    assert await give(feedback, rating=True, said_at=1_000) == first
    assert (await give(feedback, rating=True, said_at=1_001)).revision == 2
    assert first.idempotency_key is None


async def test_calls_without_a_time_count_in_the_order_of_arrival_even_after_one_from_a_clock_ahead(feedback):
    ahead = int(time.time() * 1000) + 200_000
    await give(feedback, rating=1.0, said_at=ahead)
    for rating in (2.0, 3.0, 4.0):
        assert (await give(feedback, rating=rating)).rating == rating
    assert (await the_only(feedback)).said_at == ahead + 3


# --- changing and withdrawing ---


async def test_a_change_sets_what_it_names_and_leaves_the_rest(feedback):
    given = await give(feedback, rating=True, comment="good", metadata={"a": 1})
    written = await feedback.change(ANNA, given.id, {"rating": 4, "comment": None})
    changed = Feedback.of(written.row)
    assert (changed.revision, changed.rating, changed.comment, changed.metadata) == (2, 4.0, None, {"a": 1})
    assert await the_only(feedback) == changed


async def test_what_is_withdrawn_counts_no_more_and_comes_back_when_given_again(feedback):
    given = await give(feedback, rating=True)
    withdrawn = Feedback.of((await feedback.withdraw(ANNA, given.id)).row)
    assert (withdrawn.id, withdrawn.revision, withdrawn.withdrawn) == (given.id, 2, True)
    assert await feedback.find("acme") == []
    assert await feedback.find("acme", withdrawn=True) == [withdrawn]
    assert await feedback.counts("acme", [PREDICTION]) == []
    changed = await feedback.change(ANNA, given.id, {"rating": False})
    assert changed.row["withdrawn"] is True
    assert (await give(feedback, rating=True)).revision == 4
    assert rated(await feedback.find("acme")) == [True]


async def test_only_the_author_or_an_administrator_changes_or_withdraws(feedback):
    given = await give(feedback, rating=True)
    own = await give(feedback, KEY, rating=True)
    for speaker, about in ((BEN, given), (KEY, given), (ANNA, own), (Speaker(tenant="acme", key_id="k2"), own)):
        with pytest.raises(Forbidden, match="another author"):
            await feedback.change(speaker, about.id, {"rating": False})
        with pytest.raises(Forbidden):
            await feedback.withdraw(speaker, about.id)
    # A key that replaces another speaks for the same users.
    same_user = Speaker(tenant="acme", key_id="k2", user="anna")
    assert (await feedback.change(same_user, given.id, {"rating": 2.0})).row["key_id"] == "k2"
    changed = Feedback.of((await feedback.change(ADMIN, given.id, {"rating": False})).row)
    assert (changed.author, changed.key_id, changed.rating) == ("anna", "k9", False)


async def test_history_keeps_every_call_also_one_that_came_too_late_to_count(feedback):
    given = await give(feedback, rating=True, comment="good", said_at=1_000)
    await feedback.change(ANNA, given.id, {"comment": "great"}, said_at=3_000)
    await give(feedback, rating=False, comment="late", metadata={"a": 1}, said_at=2_000)
    await feedback.withdraw(ANNA, given.id, said_at=4_000)
    history = await feedback.history("acme", given.id)
    assert [(each.revision, each.said_at) for each in history] == [(1, 1_000), (2, 3_000), (3, 2_000), (4, 4_000)]
    whole = {"correction": None, "withdrawn": False}
    assert [each.said for each in history] == [
        {**whole, "rating": True, "comment": "good", "metadata": None},
        {"comment": "great"},
        {**whole, "rating": False, "comment": "late", "metadata": {"a": 1}},
        {"withdrawn": True},
    ]
    now = await feedback.get("acme", given.id)
    assert (now.rating, now.comment, now.withdrawn, now.said_at) == (False, "great", True, 4_000)


# --- in any order ---


async def test_a_withdrawal_that_overtakes_what_it_withdraws_still_withdraws_it(feedback):
    await give(feedback, withdrawn=True, said_at=2_000)
    late = await give(feedback, rating=True, said_at=1_000)
    assert (late.withdrawn, late.revision) == (True, 2)
    assert await feedback.find("acme") == []
    assert rated([await give(feedback, rating=False, said_at=3_000)]) == [False]
    assert (await the_only(feedback)).withdrawn is False


async def test_an_edit_that_overtakes_the_original_stands(feedback):
    await give(feedback, rating=False, comment="no", said_at=2_000)
    late = await give(feedback, rating=True, comment="yes", said_at=1_000)
    assert (late.rating, late.comment) == (False, "no")


SAYINGS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "at": st.integers(1, 6),
                "rating": st.sampled_from([True, False, 1.0, 2.5]),
                "comment": st.sampled_from("abc"),
            }
        ),
        st.fixed_dictionaries({"at": st.integers(1, 6), "withdrawn": st.just(True)}),
        st.fixed_dictionaries(
            {"at": st.integers(1, 6)},
            optional={"rating": st.sampled_from([None, 3.0]), "comment": st.sampled_from("xyz")},
        ).map(lambda said: {**said, "partly": True}),
    ),
    min_size=1,
    max_size=8,
)
BLANK: Row = {"rating": None, "comment": None, "withdrawn": False}


def outcome(sayings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state after sayings, by the rule itself."""
    row: Row | None = None
    for said in sayings:
        content = {name: value for name, value in said.items() if name not in ("at", "partly")}
        is_whole = "partly" not in said and "withdrawn" not in said
        says = content | {"withdrawn": False} if is_whole else content
        made = call(ANNA, {"prediction_id": PREDICTION}, says, said_at=said["at"], is_whole=is_whole)
        row = revised(row, made, blank=BLANK, now=100)
    assert row is not None
    assert row["revision"] == len(sayings)
    return {name: row[name] for name in BLANK}


@examples(400)
@given(SAYINGS, st.randoms(use_true_random=False))
def test_the_state_depends_neither_on_the_order_of_calls_nor_on_how_often_they_come(sayings, chance):
    shuffled = [*sayings, *chance.choices(sayings, k=3)]
    chance.shuffle(shuffled)
    assert outcome(shuffled) == outcome(sayings)


@examples(200)
@given(SAYINGS)
def test_the_latest_word_about_each_field_stands(sayings):
    sayings = [{**said, "at": number} for number, said in enumerate(sayings, 1)]
    expected = dict(BLANK)
    for said in sayings:
        partly = "partly" in said or "withdrawn" in said
        expected |= {} if partly else {"withdrawn": False}
        expected |= {name: value for name, value in said.items() if name in BLANK}
    for order in (sayings, sayings[::-1], sorted(sayings, key=str)):
        assert outcome(order) == expected


def everything_said(chance: random.Random, calls: int) -> tuple[list[tuple[Speaker, Given]], dict[Any, Any]]:
    """So many calls, with repeats, and what must hold when all have arrived: the rating by author and prediction."""
    ids = [uuid7() for _ in range(max(1, calls // 10))]
    sayings: list[tuple[Speaker, Given]] = []
    latest: dict[Any, tuple[int, Any]] = {}
    while len(sayings) < calls:
        user, about = f"user {chance.randrange(3)}", chance.choice(ids)
        said_at = len(sayings) + 1
        rating = chance.choice([True, False, None])
        speaker = Speaker(tenant="acme", key_id=f"k{chance.randrange(2)}", user=user)
        content: dict[str, Any] = {"withdrawn": True} if rating is None else {"rating": rating}
        if chance.random() < 0.5:
            content["idempotency_key"] = f"call-{said_at}"
        one = Given(prediction_id=about, said_at=said_at, **content)
        sayings += [(speaker, one)] * min(calls - len(sayings), chance.choice([1, 1, 2, 4]))
        latest[user, about] = max(latest.get((user, about), (0, None)), (said_at, rating), key=lambda each: each[0])
    chance.shuffle(sayings)
    return sayings, {key: rating for key, (_, rating) in latest.items()}


async def check_counts(log: FeedbackLog, expected: dict[Any, Any]) -> None:
    """Everything is found as expected, one by one and counted."""
    found: dict[Any, Any] = {}
    before = None
    while page := await log.find("acme", limit=5_000, withdrawn=True, before=before):
        for each in page:
            assert (each.author, each.prediction_id) not in found
            found[each.author, each.prediction_id] = None if each.withdrawn else each.rating
        before = page[-1].id
    assert found == expected
    by_rating = Counter(rating for rating in expected.values() if rating is not None)
    ids = sorted({about for _, about in expected})
    counts: list[Counts] = []
    for at in range(0, len(ids), 1_000):
        counts += await log.counts("acme", ids[at : at + 1_000])
    assert sum(each.positive for each in counts) == by_rating[True]
    assert sum(each.negative for each in counts) == by_rating[False]
    assert sum(each.total for each in counts) == by_rating.total()


async def test_two_replicas_that_hear_everything_at_once_count_it_once(database_url):
    sayings, expected = everything_said(random.Random(7), 1_200)
    async with opened(database_url) as one, opened(database_url) as other:
        replicas = itertools.cycle((one, other))
        written = await asyncio.gather(*(next(replicas).give(*said) for said in sayings))
        distinct = {str((speaker.user, given)) for speaker, given in sayings}
        assert sum(each.is_new for each in written) == len(distinct)
        await check_counts(one, expected)
        numbers = [number for number, _ in await other.after(0, limit=5_000)]
        assert len(numbers) == len(distinct)


async def test_authors_who_say_the_same_twice_at_once_have_one_feedback(feedback):
    written = await asyncio.gather(*(give(feedback, rating=True) for _ in range(50)))
    assert sorted(each.revision for each in written) == list(range(1, 51))
    assert len({each.id for each in written}) == 1
    (counts,) = await feedback.counts("acme", [PREDICTION])
    assert (counts.total, counts.positive) == (1, 1)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("kind", "calls"), [("sqlite", 100_000), ("postgresql", 30_000)])
async def test_very_many_concurrent_calls_with_repeats_and_in_any_order_count_exactly(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, calls: int
):
    server: Postgres | None = request.getfixturevalue("postgres") if kind == "postgresql" else None
    url = server.create_database() if server else f"sqlite:///{tmp_path / 'hallmark.db'}"
    sayings, expected = everything_said(random.Random(11), calls)
    async with opened(url, capacity=calls) as log:
        started = time.perf_counter()
        await asyncio.gather(*(log.give(*said) for said in sayings))
        seconds = time.perf_counter() - started
        print(f"\n{kind}: {calls} calls in {seconds:.1f} s, {calls / seconds:.0f} a second")
        await check_counts(log, expected)


# --- reading ---


async def test_feedback_is_listed_newest_first_by_pages_and_filters(feedback):
    made = [
        await give(feedback, Speaker(tenant="acme", key_id="k", user=str(number)), rating=float(number))
        for number in range(5)
    ]
    made += [await give(feedback, rating=5.0, conversation="c", category="tone", source="judge")]
    assert rated(await feedback.find("acme", limit=4)) == [5, 4, 3, 2]
    assert rated(await feedback.find("acme", limit=4, before=made[2].id)) == [1, 0]
    assert rated(await feedback.find("acme", conversation="c")) == [5]
    assert rated(await feedback.find("acme", category="tone")) == [5]
    assert rated(await feedback.find("acme", source="judge")) == [5]
    assert rated(await feedback.find("acme", source="judge", prediction_id=PREDICTION)) == []
    assert rated(await feedback.find("acme", prediction_id=PREDICTION)) == [4, 3, 2, 1, 0]
    last = made[-1].at
    assert rated(await feedback.find("acme", since=last + 1)) == []
    await asyncio.sleep(0.002)
    await feedback.change(Speaker(tenant="acme", key_id="k", user="0"), made[0].id, {"rating": 9})
    assert rated(await feedback.find("acme", since=last + 1)) == [9]


async def test_counts_are_of_what_holds_now_by_source_and_category(feedback):
    other = uuid7()
    await give(feedback, rating=True, comment="c")
    await give(feedback, BEN, rating=False, correction="x")
    await give(feedback, KEY, comment="only words")
    await give(feedback, category="stars", rating=4.0)
    await give(feedback, BEN, category="stars", rating=1.0)
    gone = await give(feedback, KEY, category="stars", rating=5.0)
    await feedback.withdraw(KEY, gone.id)
    await give(feedback, rating=True, prediction_id=other, source="judge")
    await give(feedback, STRANGER, rating=True)
    common = {"prediction_id": PREDICTION, "source": "end_user"}
    none = Counts(
        **common, category=None, total=0, positive=0, negative=0, numbers=0, mean=None, comments=0, corrections=0
    )
    found = {(each.prediction_id, each.category): each for each in await feedback.counts("acme", [PREDICTION, other])}
    facts = {name: getattr(none, name) for name in none.__struct_fields__}
    assert found.pop((PREDICTION, None)) == Counts(
        **facts | {"total": 3, "positive": 1, "negative": 1, "comments": 2, "corrections": 1}
    )
    assert found.pop((PREDICTION, "stars")) == Counts(
        **facts | {"category": "stars", "total": 2, "numbers": 2, "mean": 2.5}
    )
    judged = found.pop((other, None))
    assert (judged.source, judged.total, judged.positive) == ("judge", 1, 1)
    assert found == {}


async def test_whoever_follows_by_number_misses_nothing_and_sees_nothing_twice(database_url):
    async with opened(database_url) as one, opened(database_url) as other:
        seen: list[tuple[int, Feedback]] = []
        done = asyncio.Event()

        async def follow() -> None:
            while True:
                was_done = done.is_set()
                fresh = await one.after(seen[-1][0] if seen else 0, limit=7)
                seen.extend(fresh)
                if was_done and not fresh:
                    return

        async def say(log: FeedbackLog, speaker: str) -> None:
            for number in range(40):
                await give(log, Speaker(tenant=speaker, key_id="k"), rating=float(number))

        follower = asyncio.create_task(follow())
        await asyncio.gather(say(one, "a"), say(other, "b"), say(one, "c"), say(other, "d"))
        done.set()
        await follower
    numbers = [number for number, _ in seen]
    assert numbers == sorted(set(numbers))
    assert Counter(each.tenant for _, each in seen) == dict.fromkeys("abcd", 40)
    assert rated([each for _, each in seen if each.tenant == "a"]) == list(range(40))


async def test_a_number_never_becomes_visible_before_a_smaller_one(database, feedback):
    first = (await feedback.give(ANNA, Given(prediction_id=PREDICTION, rating=True))).row
    async with Database(database.url) as other, other.writing() as connection:
        await other.one_at_a_time(connection, "feedback")
        # A replica that has its number and takes long to commit.
        slow = first | {"id": uuid7(), "slot": bytes(16), "author": "slow"}
        await connection.execute(insert(feedback_table).values(**slow))
        task = asyncio.create_task(give(feedback, BEN, rating=False))
        await asyncio.wait({task}, timeout=0.2)
        seen = await feedback.after(0)
    await task
    seen += await feedback.after(seen[-1][0])
    assert [each.author for _, each in seen] == ["anna", "slow", "ben"]


async def test_the_answer_tells_whether_the_prediction_is_on_record_yet(database, feedback, labels):
    async def is_stored(**said: Any) -> bool:
        return (await feedback.give(ANNA, Given(rating=True, **said))).is_stored

    assert await is_stored(prediction_id=PREDICTION) is False
    row = {"id": PREDICTION, "tenant": "acme"}
    async with database.writing() as connection:
        await connection.execute(insert(predictions).values(**row, outcome="finished", stream=False, store=True))
    assert await is_stored(prediction_id=PREDICTION) is True
    assert await is_stored(prediction_id=uuid7()) is False
    assert await is_stored(conversation="c") is False
    assert (await feedback.give(STRANGER, Given(rating=True, prediction_id=PREDICTION))).is_stored is False
    assert await feedback.is_stored("acme", PREDICTION) is True
    assert await feedback.is_stored("other", PREDICTION) is False
    assert (await labels.state(ANNA, Stated(prediction_id=PREDICTION, class_name="a"))).is_stored is True


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_nothing_reads_a_whole_table(database, feedback, labels):
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and "alembic" not in statement and parameters:
            asked.append((statement, parameters))

    event.listen(database._engine.sync_engine, "before_cursor_execute", note)
    one, other = (Given(prediction_id=uuid7(), rating=True, idempotency_key=f"{number}") for number in range(2))
    made = await asyncio.gather(
        *(feedback.give(speaker, said) for speaker in (ANNA, STRANGER) for said in (one, other))
    )
    await feedback.change(ANNA, made[0].row["id"], {"rating": False})
    await feedback.history("acme", made[0].row["id"])
    await feedback.find("acme", before=uuid7())
    await feedback.find("acme", prediction_id=PREDICTION)
    await feedback.find("acme", conversation="c")
    await feedback.counts("acme", [PREDICTION])
    await feedback.after(5)
    await state(labels, class_name="a", idempotency_key="k")
    await labels.find("acme", prediction_id=PREDICTION)
    assert len(asked) > 12
    async with database.reading() as connection:
        for statement, parameters in asked:
            found = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plan = " | ".join(row[-1] for row in found)
            assert "SCAN" not in plan.replace("CORRELATED SCALAR", ""), (statement, plan)


# --- when the database is away, full or closing ---


async def test_a_database_that_is_down_is_told_to_everyone_and_nothing_is_written_twice(postgres: Postgres):
    url = postgres.create_database()
    async with Database(url, timeout_seconds=2.0) as database, FeedbackLog(database) as log:
        await give(log, rating=True, idempotency_key="first")
        postgres.stop()
        try:
            told = await asyncio.gather(
                *(give(log, rating=float(number), idempotency_key=f"key-{number}") for number in range(600)),
                return_exceptions=True,
            )
        finally:
            postgres.start()
        assert {type(each) for each in told} == {Unavailable}
        assert {each.retry_after_seconds for each in told} == {1.0}
        await asyncio.gather(
            *(give(log, rating=float(number), idempotency_key=f"key-{number}") for number in range(600))
        )
        assert len(await log.history("acme", (await the_only(log)).id)) == 601


async def test_calls_beyond_the_capacity_are_refused_at_once(database_url):
    async with opened(database_url, capacity=10) as log:
        told = await asyncio.gather(*(give(log, rating=float(n)) for n in range(30)), return_exceptions=True)
        refused = [each for each in told if isinstance(each, Overloaded)]
        assert len(refused) == 20
        assert {each.retry_after_seconds for each in refused} == {1.0}
        assert (await the_only(log)).revision == 10


async def test_one_call_that_cannot_be_written_does_not_fail_those_beside_it(feedback):
    made = await asyncio.gather(
        give(feedback, rating=1.0),
        give(feedback, BEN, rating=2.0, said_at=2**63),
        give(feedback, KEY, rating=3.0),
        return_exceptions=True,
    )
    assert [isinstance(each, Feedback) for each in made] == [True, False, True]
    assert sorted(rated(await feedback.find("acme"))) == [1, 3]


async def test_a_caller_who_leaves_before_the_writing_began_leaves_nothing_behind(feedback):
    first = asyncio.create_task(give(feedback, rating=1.0))
    second = asyncio.create_task(give(feedback, BEN, rating=2.0))
    await asyncio.sleep(0)
    second.cancel()
    await first
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (await give(feedback, KEY, rating=3.0)).rating == 3.0
    assert sorted(rated(await feedback.find("acme"))) == [1, 3]


async def test_what_waits_when_the_log_closes_is_written_and_later_calls_are_refused(database_url):
    async with Database(database_url) as database:
        async with FeedbackLog(database) as log:
            tasks = [
                asyncio.create_task(give(log, Speaker(tenant="acme", key_id="k", user=str(number)), rating=True))
                for number in range(600)
            ]
            await asyncio.sleep(0)
        assert {(await task).revision for task in tasks} == {1}
        with pytest.raises(Unavailable, match="closing"):
            await give(log, rating=True)
        assert len(await log.find("acme", limit=1_000)) == 600


# --- labels ---


async def test_a_label_is_found_as_it_was_stated(labels):
    facts = {
        "class_name": "refund",
        "answer": "Four weeks.",
        "passages": ["a:1", "b:2"],
        "comment": "é",
        "policy": "uniform",
        "sampling_probability": 0.05,
        "source": "review_queue",
    }
    label = await state(labels, **facts)
    assert {name: getattr(label, name) for name in facts} == facts
    assert await labels.get("acme", label.id) == label
    assert await labels.find("acme", prediction_id=PREDICTION) == [label]
    assert await labels.find("acme", source="reviewer") == []
    with pytest.raises(NotFound):
        await labels.get("other", label.id)


async def test_that_no_passage_is_relevant_is_another_thing_than_saying_nothing_of_them(labels):
    assert (await state(labels, passages=[])).passages == []
    assert (await state(labels, class_name="a")).passages is None


async def test_a_later_label_of_the_same_author_replaces_the_earlier_whole(labels):
    first = await state(labels, class_name="refund", answer="x", policy="uniform", sampling_probability=1.0)
    second = await state(labels, passages=["a:1"], source="application")
    assert (second.id, second.revision, second.source) == (first.id, 2, "application")
    assert (second.class_name, second.answer, second.policy, second.sampling_probability) == (None,) * 4
    other = await state(labels, BEN, class_name="other")
    assert await labels.find("acme") == [other, second]
    assert [each.said.get("class") for each in await labels.history("acme", first.id)] == ["refund", None]


async def test_a_label_that_states_nothing_is_refused(labels):
    for stated in ({}, {"comment": "c"}, {"withdrawn": True, "answer": "x"}):
        with pytest.raises(InvalidRequest):
            await state(labels, **stated)
    assert await labels.find("acme", withdrawn=True) == []


async def test_a_label_is_withdrawn_by_its_author_in_whatever_order_that_arrives(labels):
    label = await state(labels, class_name="refund", said_at=1_000)
    with pytest.raises(Forbidden):
        await labels.withdraw(BEN, label.id)
    await labels.withdraw(ANNA, label.id, said_at=3_000)
    assert await labels.find("acme") == []
    assert (await state(labels, class_name="late", said_at=2_000)).withdrawn is True
    assert (await state(labels, class_name="again", said_at=4_000)).withdrawn is False
    await state(labels, BEN, withdrawn=True, said_at=2_000)
    assert (await state(labels, BEN, class_name="overtaken", said_at=1_000)).withdrawn is True
    assert [each.class_name for each in await labels.find("acme")] == ["again"]


async def test_the_same_label_twice_is_one_and_another_content_of_its_key_is_refused(labels):
    first = await state(labels, class_name="refund", idempotency_key="once")
    assert await state(labels, class_name="refund", idempotency_key="once") == first
    with pytest.raises(Conflict):
        await state(labels, class_name="other", idempotency_key="once")
    ((number, followed),) = await labels.after(0)
    assert followed == first
    assert await labels.after(number) == []
