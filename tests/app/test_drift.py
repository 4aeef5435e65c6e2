"""What drifts raises an alarm that names it, what does not stays quiet, and a worker may be killed at any moment."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete, select

from app.database import drift_followed, drift_reference_rows, drift_streams, predictions, review_boosts
from app.drift import UNKNOWN, DriftGauges
from app.drift.facts import MAX_QUESTIONS, Outputs, Question
from app.drift.following import Stream, stream_of, values_of, windows_in_90_days
from app.drift.judging import judge, permutations_for
from app.drift.references import forget, questions_in
from app.drift.watching import DriftWatcher
from app.errors import InvalidRequest
from app.predictions.embeddings import model_of, pack, unpack
from app.review import Filler
from app.rollouts import Rollout
from observability.metrics import Metrics
from observability.windows import disjoint_windows
from tests.drift_world import MODEL, SMALL, DriftWorld, drift_world
from tests.migrated import migrated
from tests.review_world import EPOCH, World, prediction
from tests.service import until
from tests.worker_process import worker_process

DAY = 24 * 3600 * 1000


@pytest.fixture
async def world(tmp_path):
    async with drift_world(f"sqlite:///{migrated(tmp_path / 'drift.db')}") as world:
        await world.begin()
        yield world


@pytest.fixture
async def any_world(database_url):
    async with drift_world(database_url) as world:
        await world.begin()
        yield world


def refuses(part: int, of: int):
    """Facts of answers of which so many refuse."""
    return lambda number: {"verdict": "abstained:nothing_relevant"} if number % of < part else {}


async def new_topic(world: DriftWorld, windows: int = 2, **common) -> list[str]:
    """Leave windows in which a quarter of the sessions asks something new; gives those predictions."""
    new = []
    for _ in range(windows):
        new += (await world.ask(200, topic=lambda n: 6 if n % 4 == 0 else n % 6, **common))[::4]
    return new


# --- what raises an alarm ---


async def test_a_new_topic_raises_an_alarm_that_names_its_questions_and_has_more_labelled(any_world):
    world = any_world
    await world.queue()
    await world.queue("other releases", where=msgspec.structs.replace(EPOCH, release="else"))
    await world.ask(400)
    new = await new_topic(world, 1)
    await world.ask(1)
    await world.watch()
    assert (await world.drift.state("acme", "hallmark@1")).alarm is False  # It takes two windows in a row.
    new += await new_topic(world, 1)
    await world.ask(1)
    await world.watch()
    state = await world.drift.state("acme", "hallmark@1")
    assert (state.alarm, state.kinds, state.windows, state.is_doubtful) == (True, ("inputs",), 2, True)
    assert state.since == world.clock.now
    assert await world.drift.drifted("acme", ["hallmark@1", "hallmark@2"]) == {"hallmark@1"}
    assert len(state.examples) == 5
    assert set(state.examples) <= set(new)
    (followed,) = await world.drift.followed("acme")
    assert followed.reference is not None
    assert (followed.reference.sessions, followed.reference.source["kind"]) == (400, "first_traffic")
    newest = followed.windows[0]
    assert newest.inputs is not None
    assert (newest.number, newest.sessions) == (2, 200)
    assert newest.inputs.novel_share > 0.1
    async with world.database.reading() as connection:
        (boost,) = (await connection.execute(select(review_boosts))).all()
    slice_ = json.loads(boost.slice)
    assert (boost.rate, boost.created_by, slice_["release"]) == (0.2, "worker:drift", "hallmark@1")
    until = datetime.fromisoformat(slice_["until"])
    assert until == datetime.fromtimestamp(world.clock.now / 1000, UTC) + timedelta(days=7)


async def test_what_an_alarm_has_labelled_ends_by_itself(world, tmp_path):
    await world.queue(uniform=0.001)
    world.clock.now = round(datetime.now(UTC).timestamp() * 1000)
    await world.ask(400)
    await new_topic(world)
    await world.ask(1)
    await world.watch()
    review = World(world.database, None, None, clock=world.clock)  # type: ignore[arg-type]
    await Filler(world.database, review.queues, review.history, None).step()  # type: ignore[arg-type]
    await review.fill()
    policies = [each.policy for each in (await review.items()).values()]
    assert 25 <= policies.count("drift") <= 60  # A fifth of the last window's 201.
    world.clock.pass_seconds(8 * 24 * 3600)
    await world.ask(199)
    await new_topic(world, 2)
    await world.ask(1)
    await world.watch()  # Another alarm ends the boost of the one before.
    async with world.database.reading() as connection:
        boosts = (await connection.execute(select(review_boosts).order_by(review_boosts.c.id))).all()
    assert [each.ended_at is not None for each in boosts] == [True, False]


async def test_answers_that_change_raise_an_alarm_that_says_what_changed(world):
    await world.ask(400, facts=refuses(1, 20))
    await world.ask(400, facts=refuses(5, 20))
    await world.ask(1)
    await world.watch()
    state = await world.drift.state("acme", "hallmark@1")
    assert (state.alarm, state.kinds, state.examples, state.is_doubtful) == (True, ("outputs",), (), False)
    assert await world.drift.drifted("acme", ["hallmark@1"]) == set()
    (followed,) = await world.drift.followed("acme", "hallmark@1", windows=1)
    (newest,) = followed.windows
    least = min(newest.outputs, key=lambda output: output.p_value)
    assert (least.name, least.effect) == ("refused", pytest.approx(0.2))
    shares = {"answered": (0.95, 0.75), "refused": (0.05, 0.25)}
    assert (least.reference, least.window) == pytest.approx(shares[least.at])


# --- what does not ---


async def test_equal_windows_raise_no_alarm_over_many_windows(world):
    await world.ask(400, facts=refuses(1, 10))
    for _ in range(3):
        await world.ask(200, facts=refuses(1, 10))
    await world.ask(1)
    await world.watch()
    windows = await world.windows()
    assert len(windows) == 3
    assert (await world.drift.state("acme", "hallmark@1")).alarm is False
    assert all(each.level == 0.01 for each in windows)


async def test_questions_that_sessions_repeat_raise_no_alarm(world):
    await world.ask(400, each=2)
    for _ in range(3):
        await world.ask(200, each=3)
    await world.ask(1)
    await world.watch()
    windows = await world.windows()
    assert [(each.sessions, each.questions) for each in windows] == [(200, 600)] * 3
    assert (await world.drift.state("acme", "hallmark@1")).alarm is False


async def test_shadows_pinned_and_broken_answers_do_not_count(world):
    await world.ask(300)
    for facts in (
        {"assignment": "shadow"},
        {"assignment": "pinned"},
        {"outcome": "failed"},
        {"release_name": None},
    ):
        await world.ask(50, **facts)
    await world.watch()
    (followed,) = await world.drift.followed("acme")
    assert followed.open_sessions == 300


# --- whose it is ---


async def test_a_tenant_learns_nothing_of_anothers_questions(world):
    await world.ask(400)
    await new_topic(world)
    await world.ask(450, tenant="other")
    await world.ask(1)
    await world.watch()
    assert (await world.drift.state("acme", "hallmark@1")).alarm
    theirs = await world.drift.state("other", "hallmark@1")
    assert (theirs.alarm, theirs.examples, theirs.windows) == (False, (), 0)
    assert await world.drift.state("nobody", "hallmark@1") == UNKNOWN
    assert await world.drift.followed("nobody") == []
    (followed,) = await world.drift.followed("other")
    assert followed.reference is not None
    assert followed.reference.version == 1
    assert followed.windows == ()
    assert followed.open_sessions == 50


async def test_only_so_many_releases_are_followed_and_idle_ones_make_room(world, caplog):
    few = world.new_watcher(plan=msgspec.structs.replace(SMALL, max_streams=2))
    for number in (1, 2, 3):
        await world.ask(3, release_name=f"hallmark@{number}")
    await to_the_end(few)
    async with world.database.reading() as connection:
        assert len((await connection.execute(select(drift_streams))).all()) == 2
    assert "2 releases of tenants at most" in caplog.text
    world.clock.pass_seconds(91 * 24 * 3600)
    await world.ask(3, release_name="hallmark@3")
    await to_the_end(few)
    async with world.database.reading() as connection:
        rows = (await connection.execute(select(drift_streams.c.release))).scalars().all()
    assert rows == ["hallmark@3"]


async def test_metrics_count_tenants_of_serving_releases_and_name_none(world):
    await world.ask(400)
    await new_topic(world)
    await world.ask(1)
    await world.ask(5, release_name="retired@9")
    await world.watch()
    metrics = Metrics(version="0", process=False)

    async def rollouts():
        return [Rollout(name="hallmark", revision=1, stable=1)]

    await DriftGauges(world.drift, rollouts=rollouts, show=metrics.drifted).refresh()
    text = metrics.render()[0].decode()
    assert 'hallmark_drift_alarms{kind="inputs",release="hallmark@1"} 1.0' in text
    assert 'hallmark_drift_alarms{kind="outputs",release="hallmark@1"} 0.0' in text
    assert 'hallmark_drift_windows{release="hallmark@1"} 2.0' in text
    assert "retired" not in text
    assert "acme" not in text


# --- workers ---


async def test_two_workers_at_once_write_each_window_once(any_world):
    world = any_world
    watchers = [world.new_watcher(batch_rows=150), world.new_watcher(batch_rows=230)]
    await world.ask(400)
    for _ in range(2):
        await world.ask(200)
    await world.ask(1)
    for _ in range(40):
        if not any(await asyncio.gather(*(each.step() for each in watchers))):
            break
    windows = await world.windows()
    assert [(each.number, each.sessions) for each in windows] == [(1, 200), (2, 200)]
    (followed,) = await world.drift.followed("acme")
    assert followed.open_sessions == 1


async def test_a_worker_that_is_killed_while_it_writes_leaves_nothing_and_another_finds_the_same(world):
    killed = []

    async def kill(connection, noticed):
        killed.append(noticed.release)
        raise asyncio.CancelledError

    await world.ask(400)
    await new_topic(world)
    await world.ask(1)
    dying = world.new_watcher(on_alarm=kill)
    with pytest.raises(asyncio.CancelledError):
        await to_the_end(dying)
    assert killed == ["hallmark@1"]
    assert len(await world.windows()) == 1
    assert (await world.drift.state("acme", "hallmark@1")).alarm is False
    while await world.new_watcher().step():  # Each step could be another worker's.
        pass
    await world.watch()
    assert len(await world.windows()) == 2
    assert (await world.drift.state("acme", "hallmark@1")).kinds == ("inputs",)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_worker_process_that_is_killed_is_followed_by_another(tmp_path):
    settings = {"HALLMARK_DRIFT_REFERENCE_SESSIONS": "400", "HALLMARK_DRIFT_WINDOW_SESSIONS": "200"}
    async with drift_world(f"sqlite:///{migrated(tmp_path / 'hallmark.db')}") as world:
        await world.ask(1)

        async def has_begun():
            async with world.database.reading() as connection:
                return (await connection.execute(select(drift_followed))).all()

        async with worker_process(tmp_path, settings=settings):
            await until(has_begun, seconds=60)
            await world.ask(400)
        await new_topic(world)
        await world.ask(1)

        async def is_alarmed():
            return (await world.drift.state("acme", "hallmark@1")).alarm

        async with worker_process(tmp_path, settings=settings):
            await until(is_alarmed, seconds=120)
        assert [each.sessions for each in await world.windows()] == [200, 200]


async def test_a_watcher_begins_with_what_is_asked_from_then_on_and_looks_at_an_idle_service_seldom(tmp_path):
    async with drift_world(f"sqlite:///{migrated(tmp_path / 'drift.db')}") as world:
        assert await world.new_watcher().step() is False  # Nothing was ever asked.
        await world.ask(30)
        await world.watch()
        assert await world.drift.followed("acme") == []
        patient = world.new_watcher(pace_seconds=15.0)
        assert await patient.step() is False
        await world.ask(3)
        assert await patient.step() is False
        assert await world.drift.followed("acme") == []
        world.clock.pass_seconds(15)
        await patient.step()
        (followed,) = await world.drift.followed("acme")
        assert followed.open_sessions == 3


async def test_erased_predictions_are_missed_by_nobody(world):
    ids = await world.ask(400)
    await world.ask(1)
    await world.watch()
    gone = await world.ask(199)
    await world.watch()
    async with world.database.writing() as connection:
        await connection.execute(delete(predictions).where(predictions.c.id.in_(gone[:150])))
        await forget(connection, "acme", ids[:10])
    await world.ask(1)
    await world.watch()
    (window,) = await world.windows()
    assert (window.sessions, window.inputs, window.outputs) == (50, None, None)
    async with world.database.reading() as connection:
        assert len(await questions_in(connection, "acme", "hallmark@1", 1)) == 390
    # The last row went, and SQLite gives its number to another.
    (last,) = await world.ask(1)
    await world.watch()
    async with world.database.writing() as connection:
        await connection.execute(delete(predictions).where(predictions.c.id == last))
    await world.ask(2)
    await world.watch()
    (followed,) = await world.drift.followed("acme")
    assert followed.open_sessions == 4


# --- references ---


async def test_another_reference_is_the_next_version_and_ends_what_the_last_one_raised(world):
    first = await world.ask(400)
    await new_topic(world)
    await world.ask(1)
    await world.watch()
    assert (await world.drift.state("acme", "hallmark@1")).alarm
    before = await stored(world, 1)
    again = [prediction(assignment="stable", question_embedding=None) for _ in range(3)]
    await world.ship(again)
    soon = datetime.now(UTC) + timedelta(minutes=1)
    made = await world.references.from_traffic(
        "acme", "hallmark@1", since=datetime(2026, 1, 1, tzinfo=UTC), until=soon, who="test"
    )
    assert (made.version, made.questions, made.embedded, made.created_by) == (2, 805, 801, "test")
    await new_topic(world, 1)
    await world.watch()
    assert (await world.drift.state("acme", "hallmark@1")).alarm is False
    assert await stored(world, 1) == before
    assert {each.prediction_id for each in before} == set(first)


async def to_the_end(watcher: DriftWatcher) -> None:
    while await watcher.step():
        pass


async def stored(world: DriftWorld, version: int) -> list[Question]:
    async with world.database.reading() as connection:
        return await questions_in(connection, "acme", "hallmark@1", version)


async def test_a_reference_of_questions_alone_is_compared_with_questions_alone(world):
    embeddings = [(number.to_bytes(8), pack(np.eye(24, dtype=np.float32)[number % 24], MODEL)) for number in range(400)]
    made = await world.references.from_questions("acme", "hallmark@1", embeddings, name="faq", who="test")
    assert (made.source, made.sessions) == ({"kind": "questions", "name": "faq"}, 400)
    await world.ask(201)
    await world.watch()
    (window,) = await world.windows()
    assert json.loads(window.inputs)["p_value"] <= 0.01
    assert window.outputs is None


async def test_vectors_of_another_length_or_model_stop_nobody(world):
    """Whoever sets a reference for one tenant must not keep the worker from the others'."""
    for size, model in ((16, MODEL), (24, "another model")):
        wrong = [(n.to_bytes(8), pack(np.ones(size, np.float32), model)) for n in range(400)]
        await world.references.from_questions("acme", "hallmark@1", wrong, name="wrong", who="test")
        await world.ask(201, passages=[{"dense_score": "high"}])
        await world.watch()
    assert [each.inputs for each in await world.windows()] == [None, None]


async def test_questions_of_references_that_were_replaced_long_ago_are_let_go(world):
    faq = [(number.to_bytes(8), pack(np.ones(4, np.float32), MODEL)) for number in range(400)]
    for _ in range(6):
        made = await world.references.from_questions("acme", "hallmark@1", faq, name="faq", who="test")
    assert made.version == 6
    assert [len(await stored(world, version)) for version in (1, 2, 6)] == [0, 400, 400]


async def test_too_few_sessions_are_no_reference(world):
    await world.ask(50)
    with pytest.raises(InvalidRequest, match="at least 400 sessions, better 1,000: these are 51"):
        await world.references.from_traffic(
            "acme",
            "hallmark@1",
            since=datetime(2026, 1, 1, tzinfo=UTC),
            until=datetime.now(UTC) + timedelta(minutes=1),
            who="test",
        )
    with pytest.raises(InvalidRequest, match="these are 0"):
        await world.references.from_dataset("acme", "hallmark@1", "0" * 64, who="test")
    async with world.database.reading() as connection:
        assert (await connection.execute(select(drift_reference_rows))).all() == []


# --- embeddings ---


class Words:
    """An embedder that knows how often each letter occurs."""

    model_id = "letters"

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def embed(self, texts, kind, *, bulk=False):
        assert (kind, bulk) == ("query", True)
        self.texts += texts
        letters = [[1.0 + text.count(chr(97 + at)) for at in range(26)] for text in texts]
        return np.array(letters, np.float32)


async def test_the_worker_embeds_kept_questions_only_where_it_is_told_to(world):
    def asked(number):
        message = {"role": "user", "content": f"{'abcdef'[number % 6] * 3} number {number}"}
        return {"request": json.dumps({"messages": [message]}).encode(), "question_embedding": None}

    words = Words()
    embedding = world.new_watcher(embedder=words)
    await world.ask(399, facts=asked)
    await world.ask(1, facts=asked, store=False)
    await world.ask(1)
    await to_the_end(embedding)
    questions = await stored(world, 1)
    assert len(words.texts) == 399
    assert sum(each.embedding is not None for each in questions) == 399
    assert {model_of(each.embedding) for each in questions if each.embedding} == {model_of(pack(np.ones(1), "letters"))}
    async with world.database.reading() as connection:
        kept = select(predictions.c.question_embedding).where(predictions.c.question_embedding.is_not(None))
        assert len((await connection.execute(kept)).all()) == 1  # They are kept in the reference, not with predictions.


def test_an_embedding_keeps_its_model_and_half_its_precision():
    vector = np.random.default_rng(1).normal(size=384).astype(np.float32)
    vector /= np.linalg.norm(vector)
    packed = pack(vector, "a model")
    assert len(packed) == 776
    (read,) = unpack([packed])
    assert float(read @ vector) > 0.999999
    with pytest.raises(ValueError, match="several models"):
        unpack([packed, pack(vector, "another model")])


# --- pure ---


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=200), st.integers(1, 8))
def test_sessions_belong_to_the_window_in_which_they_began(asked, size):
    stream = Stream("acme", "hallmark@1", 0)
    ended = []
    for row, (session, is_kept_apart) in enumerate(asked):
        answer = SimpleNamespace(row=row, id=f"id {row}", user=None, conversation=f"c{session}")
        if not stream.take(answer, size):  # type: ignore[arg-type]
            ended.append(stream.next_window())
            assert stream.take(answer, size)  # type: ignore[arg-type]
        if is_kept_apart:
            columns = values_of(stream, now=1)
            stream = stream_of(SimpleNamespace(**columns))  # type: ignore[arg-type]
    expected = disjoint_windows([session for session, _ in asked], size)
    assert [window.rows for window in ended] == [first_questions(rows, asked) for rows in expected]
    assert all(len(window.sessions) == size for window in ended)


def first_questions(rows, asked) -> list[int]:
    """Of each session at most as many as count."""
    seen: dict[int, int] = {}
    kept = []
    for row in rows:
        session = asked[row][0]
        seen[session] = seen.get(session, 0) + 1
        if seen[session] <= MAX_QUESTIONS:
            kept.append(int(row))
    return kept


def test_what_was_not_tested_stays_as_it_was():
    stream = Stream("acme", "hallmark@1", 0)
    assert stream.hear({"inputs": 0.001, "outputs": 0.001}, 1, 0.01, now=1) == []
    raised = stream.hear({"inputs": 0.001, "outputs": None}, 1, 0.01, now=2)
    assert [(each.kind, each.since, each.window) for each in raised] == [("inputs", 2, 2)]
    assert stream.hear({"inputs": None, "outputs": 0.5}, 1, 0.01, now=3) == []
    assert [each.kind for each in stream.alarms] == ["inputs"]
    assert stream.hear({"inputs": 0.001, "outputs": 0.5}, 1, 0.01, now=4) == []  # It is told once.
    stream.hear({"inputs": 0.5, "outputs": 0.5}, 1, 0.01, now=5)
    assert stream.alarms == ()
    stream.hear({"inputs": 0.001, "outputs": 0.5}, 2, 0.01, now=6)
    assert stream.hear({"inputs": 0.001, "outputs": 0.5}, 3, 0.01, now=7) == []  # Each has another reference.


def test_the_level_follows_from_how_often_is_looked():
    now = 100 * DAY
    assert windows_in_90_days([(0, now)], now=now) == 180  # The first window of a day: as if each day had one.
    assert windows_in_90_days([(9, 10 * DAY), (0, now)], now=now) == pytest.approx(20 + 180)
    assert permutations_for(0.01, 2) == 999
    assert permutations_for(0.01, 6) == 1_999
    assert permutations_for(0.0001, 6) == 9_999


def test_any_number_of_classes_is_compared_in_bounded_memory():
    def side(shift):
        return [
            Question(number.to_bytes(8), None, None, Outputs(predicted_class=f"class {number * 7 % 300 + shift}"))
            for number in range(600)
        ]

    judged = judge(side(0), side(600), level=0.01)
    (output,) = [each for each in judged.outputs if each.name == "class"]
    assert output.p_value <= 0.01
    assert judged.inputs is None
