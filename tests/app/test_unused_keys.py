"""A subject's key goes with the last that it opens, and never while somebody seals by it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text

from app.database import Database, dataset_examples, drift_reference_rows, predictions, subject_keys
from app.datasets import sealing
from app.erasure import ErasureFollower, Retention, Terms, UnusedKeys
from app.erasure.erasing import Eraser
from app.features import FeatureRow, FeatureView, SqlFeatures
from app.feedback import FeedbackLog, Given, LabelLog, Stated, Words
from app.leases import Leases
from app.predictions import History, Keeper, PredictionLog, Shipper, uuid7
from app.predictions.shipper import shippable
from app.privacy.rings import FileRing, SharedRing
from app.privacy.sealing import DataKey, MasterKeys, new_key
from app.privacy.subject_keys import SubjectKeys
from tests.migrated import migrated
from tests.review_world import Clock, World, person, prediction, replica
from tests.small_disk import reading

DAY_MS = 24 * 3600 * 1000
MASTERS = MasterKeys.parse(new_key())


def later() -> Clock:
    """A clock that is ten days ahead of what is made now."""
    from time import time

    return Clock(round(time() * 1000) + 10 * DAY_MS)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    migrated(tmp_path / "hallmark.db")
    return tmp_path


@pytest.fixture
async def database(files: Path) -> AsyncIterator[Database]:
    async with Database.of_file(files / "hallmark.db") as database:
        yield database


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with replica(database_url) as world:
        yield world


def ring_of(files: Path) -> FileRing:
    """The keys as another process has them: by connections of its own."""
    return FileRing(files / "keys.db", MASTERS)


def subjects_in(files: Path) -> list[str]:
    keys = SubjectKeys(files / "keys.db", MASTERS)
    found = sorted(key.subject for key in keys._all())
    keys.close()
    return found


async def all_of(step: Callable[[], Any]) -> None:
    while await step():
        pass


async def expire(database: Database, clock: Clock) -> None:
    """Let go of all content but the last prediction's, which stays until another follows."""
    await all_of(Retention(database, clock, Terms(content_days=1, feedback_days=1)).step)


async def drop(database: Database, ring: Any, clock: Clock) -> None:
    """Go through all keys once."""
    await all_of(UnusedKeys(database, ring, clock).step)


async def record(log: PredictionLog, *made: Any) -> None:
    for each in made:
        await log.close(each)


# --- a single database ---


async def test_a_key_goes_with_the_last_content_of_its_subject(files, database):
    with_keys = SubjectKeys(files / "keys.db", MASTERS)
    annas, bens = prediction(user="anna"), prediction(user="ben")
    async with PredictionLog(files / "hallmark.db", keeper=Keeper(keys=with_keys)) as log:
        await record(log, annas, bens)
        await drop(database, ring_of(files), later())
        assert subjects_in(files) == ["anna", "ben"]
        await expire(database, later())
        await drop(database, ring_of(files), later())
        # Ben's is the newest prediction, which stays.
        assert subjects_in(files) == ["ben"]
        assert (await History(database, keys=ring_of(files)).get("acme", bens.id)).answer == bens.answer
        # Who comes again gets another key, also in the process that had the old one at hand.
        again = prediction(user="anna")
        await record(log, again)
        assert subjects_in(files) == ["anna", "ben"]
        assert (await History(database, keys=ring_of(files)).get("acme", again.id)).answer == again.answer
    with_keys.close()


async def test_a_key_that_went_while_somebody_read_its_file_is_on_no_disk_after_the_next_round(files, database):
    ring, clock, path = ring_of(files), later(), files / "keys.db"
    key = (await ring.sealing("acme", ["anna"]))["anna"]
    wrapped = (await ring.wrapped([key.id]))[key.id].wrapped
    assert await ring.empty_log()
    rounds = UnusedKeys(database, ring, clock)
    with reading(path):
        await rounds.step()
        assert subjects_in(files) == []
        assert wrapped in path.read_bytes()
    clock.pass_seconds(2 * 3600)
    await rounds.step()
    assert wrapped not in path.read_bytes()


async def test_a_key_stays_for_as_long_as_anything_is_left_that_it_opens(files, database):
    ring = ring_of(files)
    about, labelled, made_of = uuid7(), uuid7(), uuid7()
    rows = [
        {"digest": "1" * 64, "content": "said", "subject": "dora", "prediction_id": None},
        {"digest": "2" * 64, "content": "said", "subject": None, "prediction_id": made_of},
    ]
    constant = {"tenant": "acme", "content_digest": "c", "split": "train", "label_id": None, "erased_at": None}
    async with (
        FeedbackLog(database, words=Words(ring=ring)) as feedback,
        LabelLog(database, words=Words(ring=ring)) as labels,
    ):
        await feedback.give(person("anna"), Given(prediction_id=uuid7(), comment="mine"))
        await feedback.give(person("rita"), Given(prediction_id=about, comment="of it", source="reviewer"))
        await feedback.give(person("rita"), Given(conversation="c1", comment="of it", source="reviewer"))
        await labels.state(person("rita"), Stated(prediction_id=labelled, answer="four"))
        kept = [{**constant, **row} for row in await sealing.sealed(ring, "acme", rows)]
        async with database.writing() as connection:
            await connection.execute(insert(dataset_examples), kept)
        await ring.sealing("acme", ["nobody"])
        used = ["anna", "conversation:c1", "dora", *(f"prediction:{each}" for each in (about, labelled, made_of))]
        await drop(database, ring, later())
        assert subjects_in(files) == sorted(used)
        await expire(database, later())
        await drop(database, ring, later())
        assert subjects_in(files) == ["dora", f"prediction:{made_of}"]


PEOPLE = FeatureView(name="people", entity="user", subject="user", features={"plan": "string"})
TALKS = FeatureView(name="talks", entity="conversation", subject="conversation", features={"plan": "string"})


async def put_plan(store: SqlFeatures, view: FeatureView, entity: str) -> None:
    await store.define(view, who="test")
    await store.put("acme", view, [FeatureRow(entity=entity, event_at=1, values={"plan": "gold"})])


async def plan_of(store: SqlFeatures, view: FeatureView, entity: str) -> Any:
    (found,) = await store.read("acme", view.name, ["plan"], entity)
    return found.value


async def test_the_key_of_a_subject_of_whom_there_are_only_features_stays_with_them(world, tmp_path):
    ring = shared_or_own(world.database, tmp_path)
    store = SqlFeatures(world.database, world.clock, ring=ring, pseudonym=MASTERS.pseudonym)
    for view in (PEOPLE, TALKS):
        await put_plan(store, view, "anna")
    subjects = [MASTERS.pseudonym("acme", "anna"), "conversation:anna"]
    other = await ring.sealing("acme", ["anna"])
    before = await ring.sealing("acme", subjects)
    await drop(world.database, ring, later())
    assert [await plan_of(store, view, "anna") for view in (PEOPLE, TALKS)] == ["gold", "gold"]
    assert await ring.opening([key.id for key in other.values()]) == {}  # It has sealed nothing.
    await store.delete("people")
    await store.delete("talks")
    await drop(world.database, ring, later())
    assert await ring.opening([key.id for key in before.values()]) == {}


async def test_a_young_key_is_left_alone_and_rounds_have_a_pause(files, database):
    ring, clock = ring_of(files), later()
    await ring.sealing("acme", ["anna"])
    clock.pass_seconds(-10 * 24 * 3600)
    rounds = UnusedKeys(database, ring, clock)
    assert not await rounds.step()
    clock.pass_seconds(3000)
    await rounds.step()
    assert subjects_in(files) == ["anna"]
    clock.pass_seconds(700)
    await rounds.step()
    assert subjects_in(files) == []


class Interleaved(SubjectKeys):
    """Keys of the writer's process, after which another process has its turn: before the rows are written."""

    then: Callable[[], None] | None = None

    @contextmanager
    def making(self) -> Iterator[None]:
        with super().making():
            yield
        if (then := self.then) is not None:
            self.then = None
            then()


@pytest.mark.parametrize("others", [0, 1])
async def test_a_key_that_goes_while_a_prediction_is_sealed_by_it_does_not_seal_it(files, database, others):
    with_keys = Interleaved(files / "keys.db", MASTERS)
    first, second = prediction(user="anna"), prediction(user="anna")

    def another_process() -> None:
        async def work() -> None:
            async with Database.of_file(files / "hallmark.db") as other:
                await drop(other, ring_of(files), later())

        asyncio.run(work())
        assert subjects_in(files) == ["ben"]

    async with PredictionLog(files / "hallmark.db", keeper=Keeper(keys=with_keys)) as log:
        await record(log, first, prediction(user="ben"))
        await expire(database, later())
        with_keys.then = another_process
        for _ in range(others):
            log.close_nowait(prediction(user="ben"))
        await record(log, second)
        assert with_keys.then is None
        assert subjects_in(files) == ["anna", "ben"]
        found = await History(database, keys=ring_of(files)).get("acme", second.id)
        assert (found.kept, found.answer) == ("full", second.answer)
    with_keys.close()


async def test_a_key_that_goes_within_a_batch_is_noticed(files):
    keys = SubjectKeys(files / "keys.db", MASTERS)
    keeper = Keeper(keys=keys)
    with keeper.making():
        keeper.row(prediction(user="anna"))
    with keeper.making():
        rows = [keeper.row(prediction(user="anna"))]
        await ring_of(files).destroy("acme", ["anna"])
        rows.append(keeper.row(prediction(user="ben")))
    assert not keeper.can_open(rows)
    with keeper.making():
        assert keeper.can_open([keeper.row(prediction(user="anna"))])
    keys.close()


class InterleavedRing:
    """A ring, after which another process has its turn: before what is sealed is written."""

    def __init__(self, ring: FileRing | SharedRing, then: Callable[[], Any]) -> None:
        self._ring = ring
        self._then: Callable[[], Any] | None = then

    async def sealing(self, tenant: str, subjects: Any) -> dict[str, DataKey]:
        keys = dict(await self._ring.sealing(tenant, subjects))
        if (then := self._then) is not None:
            self._then = None
            await then()
        return keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)


def shared_or_own(database: Database, files: Path) -> FileRing | SharedRing:
    return ring_of(files) if database.kind == "sqlite" else SharedRing(database, MASTERS)


async def test_words_are_never_under_a_key_that_went_while_they_were_sealed(world, tmp_path):
    real = shared_or_own(world.database, tmp_path)
    ring = InterleavedRing(real, lambda: drop(world.database, real, later()))
    await real.sealing("acme", ["anna"])
    async with FeedbackLog(world.database, words=Words(ring=ring)) as feedback:
        await feedback.give(person("anna"), Given(prediction_id=uuid7(), comment="mine"))
        assert [each.comment for each in await feedback.find("acme")] == ["mine"]
    ring = InterleavedRing(real, lambda: drop(world.database, real, later()))
    async with LabelLog(world.database, words=Words(ring=ring)) as labels, world.database.writing() as connection:
        stated = [(person("rita"), Stated(prediction_id=uuid7(), answer="four"))]
        if world.database.kind == "sqlite":
            ring._then = None  # Nothing else is written beside a transaction that writes.
        (written,) = await labels.state_in(connection, stated)
    assert (await LabelLog(world.database, words=Words(ring=real)).get("acme", written.row["id"])).answer == "four"


async def test_rows_of_datasets_are_never_under_a_key_that_went_while_they_were_sealed(world, tmp_path):
    ring = shared_or_own(world.database, tmp_path)
    rows = [{"digest": "1" * 64, "content": "said", "subject": "dora", "prediction_id": None}]
    kept = await sealing.sealed(ring, "acme", rows)
    await drop(world.database, ring, later())
    async with world.database.writing() as connection:
        again = await sealing.lasting(ring, connection, "acme", rows, kept)
        assert again != kept
        assert await sealing.lasting(ring, connection, "acme", rows, again) is again


async def test_features_are_never_under_a_key_that_went_while_they_were_sealed(world, tmp_path):
    real = shared_or_own(world.database, tmp_path)
    ring = InterleavedRing(real, lambda: drop(world.database, real, later()))
    await put_plan(SqlFeatures(world.database, world.clock, ring=ring), PEOPLE, "anna")
    assert await plan_of(SqlFeatures(world.database, world.clock, ring=real), PEOPLE, "anna") == "gold"


# --- replicas that share a PostgreSQL ---


@pytest.fixture
async def shared(postgres: Any) -> AsyncIterator[World]:
    async with replica(postgres.create_database()) as world:
        yield world


async def sealed_facts(files: Path, *made: Any) -> list[dict[str, Any]]:
    """What a shipper reads from the outbox of a replica that seals."""
    keys = SubjectKeys(files / "keys.db", MASTERS)
    keeper = Keeper(keys=keys)
    with keeper.making():
        rows = [keeper.row(each) for each in made]
    keys.close()
    return [shippable([bytes(row[0]), *row[1:]]) for row in rows]


def shipper_of(world: World, files: Path) -> Shipper:
    return Shipper(None, world.database, keys=ring_of(files))  # type: ignore[arg-type]


async def test_a_key_that_is_shipped_at_this_moment_stays(shared, tmp_path):
    ring, clock = SharedRing(shared.database, MASTERS), later()
    annas = prediction(user="anna")
    (facts,) = await sealed_facts(tmp_path, annas)
    key_id = facts["subject_key"]
    await shipper_of(shared, tmp_path)._upsert([facts])
    await shared.predict()
    await expire(shared.database, clock)
    (again,) = await sealed_facts(tmp_path, prediction(user="anna"))
    assert again["subject_key"] == key_id
    async with shared.database.writing() as shipping:
        # As the shipper does it: the key is there, and the row that needs it not yet to be seen.
        await shared.database.not_while_one(shipping, predictions.name)
        await shipping.execute(predictions.insert(), [again])
        dropping = asyncio.create_task(drop(shared.database, ring, clock))
        async with asyncio.timeout(20):
            while not await _waiting(shared.database):
                assert not dropping.done()
                await asyncio.sleep(0.005)
    await dropping
    assert (await shared.history.get("acme", again["id"])).kept == "unreadable"
    history = History(shared.database, keys=ring)
    assert (await history.get("acme", again["id"])).answer == "Four weeks."


async def _waiting(database: Database) -> int:
    async with database.reading() as connection:
        return (await connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar_one()


async def test_a_key_that_went_from_the_shared_database_comes_back_with_what_a_replica_still_has(shared, tmp_path):
    ring, clock = SharedRing(shared.database, MASTERS), later()
    late = prediction(user="anna")
    first, second = await sealed_facts(tmp_path, prediction(user="anna"), late)
    await shipper_of(shared, tmp_path)._upsert([first])
    await shared.predict()
    await expire(shared.database, clock)
    await drop(shared.database, ring, clock)
    async with shared.database.reading() as connection:
        assert (await connection.execute(select(func.count()).select_from(subject_keys))).scalar_one() == 0
    await shipper_of(shared, tmp_path)._upsert([second])
    assert (await History(shared.database, keys=ring).get("acme", late.id)).answer == late.answer


async def test_a_replica_drops_what_neither_its_outbox_nor_the_shared_database_needs(shared, files, database):
    ring, clock = ring_of(files), later()
    waits, shipped = prediction(user="anna"), prediction(user="ben")
    keys = SubjectKeys(files / "keys.db", MASTERS)
    async with PredictionLog(files / "hallmark.db", keeper=Keeper(keys=keys)) as log:
        await record(log, waits)
    keys.close()
    (facts,) = await sealed_facts(files, shipped)
    await shipper_of(shared, files)._upsert([facts])
    await ring.sealing("acme", ["carl"])
    elsewhere = SharedRing(shared.database, MASTERS).held
    own = UnusedKeys(database, ring, clock, elsewhere=elsewhere)
    follower = ErasureFollower(
        shared.database,
        Eraser(shared.database, clock),
        Leases(shared.database, "h", clock),
        keys=ring,
        drop_unused=own.step,
    )
    await follower.turn()
    assert subjects_in(files) == ["anna", "ben"]
    await shared.predict()
    await expire(shared.database, clock)
    await drop(shared.database, SharedRing(shared.database, MASTERS), clock)
    clock.pass_seconds(4000)
    await follower.turn()
    assert subjects_in(files) == ["anna"]


# --- embeddings ---


async def test_a_sealed_embedding_goes_at_its_own_time_and_its_copies_with_the_content(files, database):
    keys, ring = SubjectKeys(files / "keys.db", MASTERS), ring_of(files)
    made = prediction(user="anna", question="How long?", question_embedding=b"12345678" * 4)
    async with PredictionLog(files / "hallmark.db", keeper=Keeper(keys=keys)) as log:
        await record(log, made, prediction())
        row = {"tenant": "acme", "release": "hallmark@1", "version": 1, "number": 0, "session": b"12345678"}
        async with database.writing() as connection:
            copy = {"prediction_id": made.id, "embedding": b"copy"}
            await connection.execute(drift_reference_rows.insert(), {**row, **copy})
        assert (await log.get("acme", made.id)).question_embedding is None
        assert await embeddings(database, ring) == [made.question_embedding]
        await all_of(Retention(database, later(), Terms(embeddings_days=1)).step)
        assert await embeddings(database, ring) == [None]
        assert (await History(database, keys=ring).get("acme", made.id)).question == "How long?"
        async with database.writing() as connection:
            await connection.execute(drift_reference_rows.update().values(embedding=b"copy"))
        await all_of(Retention(database, later(), Terms(content_days=1)).step)
        async with database.reading() as connection:
            assert (await connection.execute(select(drift_reference_rows.c.embedding))).scalars().all() == [None]
    keys.close()


async def embeddings(database: Database, ring: FileRing) -> list[bytes | None]:
    """Those of all questions but the last, as drift reads them."""
    from app.predictions.sealed import opened

    async with database.reading() as connection:
        rows = (await connection.execute(select(predictions).order_by(predictions.c.row))).all()
    keys = await ring.opening(sorted({row.subject_key for row in rows}))
    return [opened(row._asdict(), keys)["question_embedding"] for row in rows[:-1]]
