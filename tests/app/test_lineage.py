"""Every link of a lineage is found and verified, both ways, and no byte of it changes unnoticed."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, update

from app.database import Database, dataset_rows, datasets, releases, training_runs
from app.errors import Conflict, InvalidRequest, NotFound
from app.lineage import Trace, canonical
from app.predictions import Prediction, uuid7
from app.releases import Lineage, Prompt, Release
from retrieval.documents import Document, Scope
from retrieval.errors import DocumentNotFound, IndexUnavailable
from tests.lineage_world import World, dataset_of, digest_of, row_of, run_of
from tests.migrated import migrated
from tests.postgres import on_either_kind
from tests.properties import examples


@pytest.fixture
async def world(tmp_path, usual_database_url) -> AsyncIterator[World]:
    async with Database(usual_database_url) as database:
        yield World(database, tmp_path / "adapters")


def problems(trace: Trace) -> dict[str, tuple[str, ...]]:
    """What each link complains of."""
    links = {name: getattr(trace, name) for name in ("release", "adapter", "training_run", "dataset")}
    found = {name: link.problems for name, link in links.items() if link is not None and link.problems}
    found |= {f"row {row.digest}": row.problems for row in trace.rows if row.problems}
    return found | {each.document_id: each.problems for each in trace.documents if each.problems}


async def alter(world: World, table: Any, **values: Any) -> None:
    async with world.database.writing() as connection:
        await connection.execute(update(table).values(**values))


# --- forward ---


@on_either_kind("usual_database_url")
async def test_a_prediction_is_traced_to_what_its_adapter_was_trained_on(world):
    release = await world.trained("tone", examples=3)
    prediction = world.prediction(release, index_version="minilm-1")
    await world.put(prediction)
    trace = await world.tracer.trace(prediction)
    assert trace.verified, problems(trace)
    assert (trace.release.id, trace.release.digest, trace.release.deleted) == ("hallmark@1", release.digest, False)
    assert bytes(trace.release.content) == release.canonical
    assert (trace.adapter.name, trace.adapter.digest) == ("tone", release.adapter_digest)
    assert (trace.training_run.id, trace.training_run.manifest["base_model"]) == ("tone-run", "smollm2")
    assert (trace.dataset.name, trace.dataset.version, trace.dataset.rows) == ("tone-data", "1", 3)
    assert trace.index_version == "minilm-1"
    assert len(trace.rows) == 3
    for row in trace.rows:
        assert row.prediction.id == row.prediction_id == row.label.prediction_id
        assert (row.label.source, row.label.withdrawn) == ("reviewer", False)
    assert trace.next_row is None


async def test_a_plain_release_has_neither_adapter_nor_run(world):
    prediction = world.prediction(await world.release())
    trace = await world.tracer.trace(prediction)
    assert trace.verified
    assert (trace.adapter, trace.training_run, trace.dataset, trace.rows) == (None, None, None, ())


async def test_what_no_release_made_is_neither_true_nor_false(world):
    trace = await world.tracer.trace(world.prediction())
    assert (trace.verified, trace.release) == (None, None)


async def test_an_adapter_that_is_elsewhere_is_not_said_to_be_verified(world, tmp_path):
    release = await world.trained()
    for file in sorted((world.adapters / "tone").iterdir()):
        file.unlink()
    trace = await world.tracer.trace(world.prediction(release))
    assert (trace.verified, trace.adapter.verified) == (False, False)
    (world.adapters / "tone").rmdir()
    trace = await world.tracer.trace(world.prediction(release))
    assert (trace.verified, trace.adapter.verified) == (None, None)
    assert trace.adapter.problems == ("Its folder is not on this machine.",)


async def test_a_run_that_the_release_does_not_name_is_found_by_the_adapter(world):
    trained = await world.trained()
    release = await world.release(adapter="tone", adapter_digest=trained.adapter_digest, notes="other")
    trace = await world.tracer.trace(world.prediction(release))
    assert trace.verified, problems(trace)
    assert trace.training_run.id == "tone-run"
    assert trace.dataset.rows == 5


@pytest.mark.parametrize("missing", ["release", "training_run", "dataset"])
async def test_a_link_that_is_missing_is_told(world, missing):
    release = await world.trained()
    prediction = world.prediction(release)
    table = {"release": releases, "training_run": training_runs, "dataset": datasets}[missing]
    async with world.database.writing() as connection:
        await connection.execute(table.delete())
    trace = await world.tracer.trace(prediction)
    assert trace.verified is False
    assert problems(trace)[missing] == ("It is not registered.",)


async def test_a_deleted_release_is_still_traced_to(world):
    release = await world.trained()
    await alter(world, releases, deleted_at=1)
    trace = await world.tracer.trace(world.prediction(release))
    assert (trace.verified, trace.release.deleted) == (True, True)


async def test_what_the_prediction_says_otherwise_than_its_release_is_told(world):
    release = await world.trained()
    trace = await world.tracer.trace(world.prediction(release, adapter="other", prompt_version="p9"))
    assert [problem.split()[0] for problem in trace.release.problems] == ["`adapter`", "`prompt_version`"]


async def test_a_run_of_another_adapter_or_dataset_is_told(world):
    release = await world.trained()
    other = await world.trained("other")
    mixed = await world.release(
        adapter="tone",
        adapter_digest=release.adapter_digest,
        base_model="llama",
        lineage=Lineage(training_run="other-run", dataset_digest=release.lineage.dataset_digest),
    )
    trace = await world.tracer.trace(world.prediction(mixed))
    told = [problem.split()[0] for problem in trace.training_run.problems]
    assert told == ["`adapter_digest`", "`dataset_digest`", "`base_model`"]
    assert trace.dataset.digest == other.lineage.dataset_digest


async def test_another_tenant_s_dataset_is_verified_and_not_shown(world):
    release = await world.trained(tenant="other")
    trace = await world.tracer.trace(world.prediction(release))
    assert trace.verified
    assert (trace.dataset.rows, trace.dataset.name, trace.dataset.manifest) == (5, None, None)
    assert (trace.training_run.id, trace.training_run.manifest, trace.rows) == ("tone-run", None, ())


@on_either_kind("usual_database_url")
async def test_rows_come_in_pages(world):
    release = await world.trained(examples=45)
    trace = await world.tracer.trace(world.prediction(release))
    found = list(trace.rows)
    after = trace.next_row
    while after is not None:
        page = await world.tracer.dataset("acme", release.lineage.dataset_digest, limit=10, after=after)
        assert page.dataset.verified
        found += page.data
        after = page.next
    assert len({row.digest for row in found}) == len(found) == 45


async def test_a_row_whose_prediction_is_gone_says_so(world):
    row = row_of("x", uuid7())
    dataset = dataset_of("d", "1", [row])
    await world.provenance.add_dataset("acme", dataset, who="test")
    page = await world.tracer.dataset("acme", dataset.manifest["digest"])
    assert (page.data[0].prediction_id, page.data[0].prediction, page.data[0].verified) == (
        row.prediction_id,
        None,
        True,
    )


async def test_a_label_that_was_withdrawn_since_or_is_of_another_answer_is_told(world):
    withdrawn, other, strange = predictions = [world.prediction() for _ in range(3)]
    await world.put(*predictions)
    labels = await world.label(*predictions)
    await world.label(withdrawn, class_name=None, withdrawn=True)
    rows = [
        row_of("a", withdrawn.id, labels[0]),
        row_of("b", other.id, labels[2]),
        row_of("c", None, labels[2]),
        row_of("d", strange.id, uuid7()),
    ]
    dataset = dataset_of("d", "1", rows)
    await world.provenance.add_dataset("acme", dataset, who="test")
    page = await world.tracer.dataset("acme", dataset.manifest["digest"])
    found = {link.digest: link for link in page.data}
    first, second, third, fourth = (found[row.digest] for row in rows)
    assert (first.label.withdrawn, first.verified) == (True, True)
    assert (second.verified, second.problems) == (False, (f"Its label is about the prediction {strange.id}.",))
    assert (third.label.prediction_id, third.verified) == (strange.id, True)
    assert (fourth.label, fourth.verified) == (None, True)


# --- documents ---


class Shelf:
    """Documents by id: version and text."""

    def __init__(self, **documents: tuple[str, str]) -> None:
        self.documents = documents
        self.fails: Exception | None = None

    async def document(self, scope: Scope, document_id: str) -> Document:
        if self.fails:
            raise self.fails
        if scope.tenant != "acme" or document_id not in self.documents:
            raise DocumentNotFound("It is not there.")
        version, text = self.documents[document_id]
        now = datetime.now(UTC)
        return Document(
            document_id, scope.tenant, "n", version, "text/plain", "t", len(text), 1, 1, 0, "i", {}, now, now
        )

    async def source(self, scope: Scope, document_id: str) -> str:
        return self.documents[document_id][1]


def citing(world: World, *, quote: str | None = "gold", version: str = "v1", start: int = 4) -> Any:
    place = {"document_id": "d1", "document_version": version}
    quoted = {"source_start": start, "source_end": start + 4, "n": 1, **({"quote": quote} if quote else {})}
    return world.prediction(passages=[place, {**place, "document_id": "d2"}], citations=[{**place, **quoted}])


async def test_a_quote_is_looked_up_where_its_document_still_has_that_version(world):
    shelf = Shelf(d1=("v1", "The gold."), d2=("v1", "Silver."))
    world = World(world.database, world.adapters, documents=shelf)
    first, second = (await world.tracer.trace(citing(world))).documents
    assert (first.document_id, first.cited, first.quotes, first.verified) == ("d1", True, 1, True)
    assert (second.document_id, second.cited, second.quotes, second.verified) == ("d2", False, 0, True)
    changed = (await world.tracer.trace(citing(world, quote="Gold"))).documents[0]
    assert (changed.verified, changed.problems) == (
        False,
        ("Its characters 4 to 8 are not what was quoted as [1].",),
    )
    assert (await world.tracer.trace(citing(world, quote=None))).documents[0].verified
    shelf.documents["d1"] = ("v2", "The gold.")
    replaced = (await world.tracer.trace(citing(world))).documents[0]
    assert (replaced.verified, replaced.problems) == (None, ("It was replaced by version v2.",))
    shelf.documents.clear()
    assert (await world.tracer.trace(citing(world))).documents[0].problems == ("It was deleted.",)
    shelf.fails = IndexUnavailable("away")
    assert (await world.tracer.trace(citing(world))).documents[0].problems == ("It cannot be looked up at present.",)


async def test_a_quote_that_was_kept_redacted_is_looked_up_by_what_is_left_of_it(world):
    world = World(world.database, world.adapters, documents=Shelf(d1=("v1", "Ask a@b.example or c@d.example now.")))

    async def verified(quote: str, **facts: Any) -> bool | None:
        prediction = citing(world, quote=quote)
        prediction.citations = [{**prediction.citations[0], "source_end": 35}]
        return (await world.tracer.trace(msgspec.structs.replace(prediction, **facts))).documents[0].verified

    assert await verified("[email] or [email] now.", kept="redacted")
    assert await verified("a@b.example or c@d.example now.", kept="redacted")
    for other in ("[email] and [email] now.", "[email] or [email] then.", "Or [email] now.", "[email] now. now."):
        assert await verified(other, kept="redacted") is False
    assert await verified("[email] or [email] now.", kept="full") is False


# --- back ---


async def used(found: Any) -> list[str]:
    return [each.prediction_id for each in (await found).data]


@on_either_kind("usual_database_url")
async def test_everything_on_the_way_leads_back_to_the_predictions(world):
    release, plain = await world.trained(examples=2), await world.release()
    predictions = [world.prediction(release) for _ in range(3)]
    await world.put(*predictions, world.prediction(plain), world.prediction(release, tenant="other"))
    ids = sorted((each.id for each in predictions), reverse=True)
    rows = await world.provenance.rows("acme", release.lineage.dataset_digest)
    ways = {
        "release": world.uses.of_release("acme", "hallmark@1", limit=50),
        "adapter": world.uses.of_adapter("acme", release.adapter_digest, limit=50),
        "dataset_row": world.uses.of_dataset_row("acme", rows[0].digest, limit=50),
    }
    for kind, way in ways.items():
        found = await way
        assert [each.prediction_id for each in found.data] == ids
        assert (found.kind, found.releases, found.verified, found.next) == (kind, ("hallmark@1",), True, None)
        if kind != "release":
            assert (found.training_runs, found.datasets) == (("tone-run",), (release.lineage.dataset_digest,))
    assert (found.prediction_id, found.label_id) == (rows[0].prediction_id, rows[0].label_id)
    assert found.data[0].release_name == "hallmark@1"


async def test_the_way_back_comes_in_pages(world):
    release = await world.trained(examples=1)
    predictions = [world.prediction(release) for _ in range(7)]
    await world.put(*predictions)
    first = await world.uses.of_adapter("acme", release.adapter_digest, limit=4)
    rest = await world.uses.of_adapter("acme", release.adapter_digest, limit=4, before=first.next)
    assert [each.prediction_id for each in first.data + rest.data] == sorted(each.id for each in predictions)[::-1]
    assert rest.next is None


async def test_a_row_of_very_many_versions_is_traced(world):
    release = await world.trained(examples=1)
    prediction = world.prediction(release)
    await world.put(prediction)
    (row,) = await world.provenance.rows("acme", release.lineage.dataset_digest)
    async with world.database.writing() as connection:
        for table, name in ((datasets, "digest"), (dataset_rows, "dataset_digest")):
            (one,) = (await connection.execute(select(table))).all()
            more = [{**one._asdict(), "version": f"v{n}", name: f"{n:064x}"} for n in range(1_200)]
            kept = {column.name for column in table.columns}
            await connection.execute(table.insert(), [{key: each[key] for key in each if key in kept} for each in more])
    found = await world.uses.of_dataset_row("acme", row.digest, limit=5)
    assert len(found.datasets) == 1_201
    assert (found.releases, [each.prediction_id for each in found.data]) == (("hallmark@1",), [prediction.id])


async def test_what_nobody_knows_is_not_found(world):
    await world.trained()
    for way in (
        world.uses.of_release("acme", "hallmark@9", limit=5),
        world.uses.of_adapter("acme", "0" * 64, limit=5),
        world.uses.of_dataset_row("acme", "0" * 64, limit=5),
    ):
        with pytest.raises(NotFound):
            await way
    with pytest.raises(InvalidRequest):
        await world.uses.of_release("acme", "hallmark", limit=5)
    rows = await world.provenance.rows("acme", (await world.trained("two")).lineage.dataset_digest)
    with pytest.raises(NotFound):
        await world.uses.of_dataset_row("other", rows[0].digest, limit=5)


async def test_a_release_that_was_changed_is_told_on_the_way_back(world):
    release = await world.trained()
    await alter(world, releases, canonical=release.canonical.decode().replace('"top_k":5', '"top_k":6'))
    found = await world.uses.of_adapter("acme", release.adapter_digest, limit=5)
    assert found.verified is False
    assert "was changed after it was made" in found.problems[0]


@on_either_kind("usual_database_url")
async def test_documents_lead_back_with_their_versions(world):
    release = await world.release()
    given, cited = (
        world.prediction(release, passages=[{"document_id": "d1", "document_version": "v1"}]),
        world.prediction(release, citations=[{"document_id": "d1", "document_version": "v2"}]),
    )
    await world.put(given, cited)
    found = await world.uses.of_document("acme", "d1", limit=50)
    assert [(each.prediction_id, each.document_version, each.cited) for each in found.data] == [
        (cited.id, "v2", True),
        (given.id, "v1", False),
    ]
    assert found.releases == ("hallmark@1",)
    assert found.data[0].outcome == "finished"
    assert await used(world.uses.of_document("acme", "d1", version="v1", limit=50)) == [given.id]
    assert await used(world.uses.of_document("acme", "d1", cited=True, limit=50)) == [cited.id]
    assert await used(world.uses.of_document("other", "d1", limit=50)) == []


# --- registering ---


@on_either_kind("usual_database_url")
async def test_what_is_registered_twice_is_there_once(world):
    dataset = dataset_of("d", "1", [row_of(str(n)) for n in range(3)])
    assert [(await world.provenance.add_dataset("acme", dataset, who="t"))[1] for _ in range(2)] == [True, False]
    assert (await world.provenance.add_dataset("other", dataset, who="t"))[1]
    run = run_of("run", "a" * 64, dataset.manifest["digest"], learning_rate=1e-05)
    assert [(await world.provenance.add_training_run("acme", run, who="t"))[1] for _ in range(2)] == [True, False]


async def test_a_dataset_that_a_crash_left_half_registered_is_completed(world):
    dataset = dataset_of("d", "1", [row_of(str(n)) for n in range(3)])
    digest = dataset.manifest["digest"]
    half = {"tenant": "acme", "dataset_digest": digest, **msgspec.structs.asdict(dataset.rows[0])}
    async with world.database.writing() as connection:
        await connection.execute(dataset_rows.insert(), half)
    with pytest.raises(NotFound):
        await world.uses.of_dataset_row("acme", dataset.rows[0].digest, limit=5)
    await world.provenance.add_dataset("acme", dataset, who="t")
    page = await world.tracer.dataset("acme", digest)
    assert (page.dataset.verified, page.dataset.rows) == (True, 3)


async def test_digests_that_are_wrong_are_refused_by_name_and_nothing_is_kept(world):
    good = dataset_of("d", "1", [row_of("a"), row_of("b")])
    replace = msgspec.structs.replace
    rows = [good.rows[0], replace(good.rows[1], content_digest="0" * 64)]
    manifest = {**good.manifest, "digest": "0" * 64}
    wrong = {
        "manifest_digest": replace(good, manifest_digest="0" * 64),
        "rows[1].digest": replace(good, rows=rows),
        "manifest.digest": replace(good, manifest=manifest, manifest_digest=_digest(manifest)),
        "rows": replace(good, rows=[good.rows[0], good.rows[0]]),
        "manifest.name": replace(good, manifest={"version": "1"}, manifest_digest=_digest({"version": "1"})),
    }
    for field, dataset in wrong.items():
        with pytest.raises(InvalidRequest) as refusal:
            await world.provenance.add_dataset("acme", dataset, who="t")
        assert refusal.value.param == field
    run = run_of("run", "a" * 64, None)
    for field, broken in {
        "digest": replace(run, digest="0" * 64),
        "manifest.adapter_digest": replace(run, manifest={"base_model": "m"}, digest=_digest({"base_model": "m"})),
    }.items():
        with pytest.raises(InvalidRequest) as refusal:
            await world.provenance.add_training_run("acme", broken, who="t")
        assert refusal.value.param == field
    assert await world.provenance.rows("acme", good.manifest["digest"]) == []
    assert await world.provenance.training_run("run") is None


def _digest(manifest: dict[str, Any]) -> str:
    return digest_of(canonical(manifest))


async def test_a_version_and_an_id_are_given_once(world):
    add = world.provenance
    await add.add_dataset("acme", dataset_of("d", "1", [row_of("a")]), who="t")
    with pytest.raises(Conflict) as refusal:
        await add.add_dataset("acme", dataset_of("d", "1", [row_of("b")]), who="t")
    assert refusal.value.param == "manifest.version"
    with pytest.raises(Conflict) as refusal:
        await add.add_dataset("acme", dataset_of("d", "2", [row_of("a")]), who="t")
    assert refusal.value.param == "manifest"
    await add.add_training_run("acme", run_of("run", "a" * 64, None), who="t")
    for tenant, adapter in (("acme", "b"), ("other", "a")):
        with pytest.raises(Conflict):
            await add.add_training_run(tenant, run_of("run", adapter * 64, None), who="t")


@on_either_kind("usual_database_url")
async def test_many_at_once_register_a_dataset_once(world):
    dataset = dataset_of("d", "1", [row_of(str(n)) for n in range(50)])
    done = await asyncio.gather(*(world.provenance.add_dataset("acme", dataset, who="t") for _ in range(5)))
    assert {row.digest for row, _ in done} == {dataset.manifest["digest"]}
    assert (await world.tracer.dataset("acme", dataset.manifest["digest"])).dataset.verified


# --- no byte changes unnoticed ---


COLUMNS = {
    "release": (releases, "canonical"),
    "release's digest": (releases, "digest"),
    "run": (training_runs, "manifest"),
    "run's digest": (training_runs, "digest"),
    "run's adapter": (training_runs, "adapter_digest"),
    "run's base model": (training_runs, "base_model"),
    "dataset": (datasets, "manifest"),
    "dataset's name": (datasets, "name"),
    "row's content": (dataset_rows, "content_digest"),
    "adapter": ("adapter_model.safetensors", None),
    "adapter's configuration": ("adapter_config.json", None),
}


@pytest.fixture(scope="module")
def past(tmp_path_factory) -> tuple[Path, Prediction, Release]:
    """A folder with a world in it, and a prediction of its only release."""
    folder = tmp_path_factory.mktemp("world")

    async def make() -> tuple[Path, Prediction, Release]:
        async with Database.of_file(migrated(folder / "hallmark.db")) as database:
            world = World(database, folder / "adapters")
            release = await world.trained(examples=1)
            return folder, world.prediction(release), release

    return asyncio.run(make())


@pytest.mark.parametrize("part", COLUMNS)
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 127))
@examples(15)
def test_any_byte_that_is_changed_is_noticed(past, part, place, change):
    folder, prediction, _ = past
    where, column = COLUMNS[part]

    async def check() -> None:
        async with Database.of_file(folder / "hallmark.db") as database:
            world = World(database, folder / "adapters")
            if column is None:
                file = world.adapters / "tone" / where
                whole = file.read_bytes()
                file.write_bytes(_changed(whole, place, change))
                trace = await world.tracer.trace(prediction)
                file.write_bytes(whole)
            else:
                async with database.reading() as connection:
                    (row,) = (await connection.execute(where.select())).all()
                whole = getattr(row, column)
                await alter(world, where, **{column: _changed(whole.encode(), place, change).decode()})
                trace = await world.tracer.trace(prediction)
                await alter(world, where, **{column: whole})
            assert trace.verified is False
            assert (await world.tracer.trace(prediction)).verified

    asyncio.run(check())


def _changed(content: bytes, place: float, change: int) -> bytes:
    """Change one bit or more of one byte; ASCII stays ASCII."""
    at = int(place * len(content))
    return content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]


@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 127))
@examples(25)
def test_a_prompt_that_is_changed_is_noticed_also_when_its_release_s_digest_is_changed_along(past, place, change):
    folder, prediction, release = past
    parts = msgspec.json.decode(release.canonical)
    template = parts["prompt"]["template"].encode("ascii", "replace")
    parts["prompt"]["template"] = _changed(template, place, change).decode()
    written = msgspec.json.encode(parts, order="sorted").decode()

    async def check() -> None:
        async with Database.of_file(folder / "hallmark.db") as database:
            world = World(database, folder / "adapters")
            await alter(world, releases, canonical=written, digest=digest_of(written))
            trace = await world.tracer.trace(prediction)
            await alter(world, releases, canonical=release.canonical.decode(), digest=release.digest)
            assert trace.verified is False
            assert trace.release.problems

    asyncio.run(check())


@pytest.mark.slow
async def test_there_is_no_byte_of_a_release_its_prompt_and_its_adapter_that_may_change(world):
    release = await world.trained()
    prediction, chance = world.prediction(release), random.Random(11)
    whole = release.canonical.decode()
    assert await trace_problems(world, prediction) == {}
    for at in range(len(whole)):
        other = chr(chance.choice([code for code in range(1, 128) if code != ord(whole[at])]))
        await alter(world, releases, canonical=f"{whole[:at]}{other}{whole[at + 1 :]}")
        assert "release" in await trace_problems(world, prediction), at
    await alter(world, releases, canonical=whole)
    for file in sorted((world.adapters / "tone").iterdir()):
        content = file.read_bytes()
        for at in range(len(content)):
            file.write_bytes(content[:at] + bytes([content[at] ^ chance.randrange(1, 256)]) + content[at + 1 :])
            assert set(await trace_problems(world, prediction)) == {"adapter"}, at
        file.write_bytes(content)
    assert await trace_problems(world, prediction) == {}


async def trace_problems(world: World, prediction: Prediction) -> dict[str, tuple[str, ...]]:
    """What a lineage complains of, which is nothing if and only if it is verified."""
    trace = await world.tracer.trace(prediction)
    found = problems(trace)
    assert trace.verified is not bool(found)
    return found


CURRENT = "v2"
TEXT = "What is gold? Gold is a metal."
QUOTE = {"source_start": 14, "source_end": 30, "quote": TEXT[14:30], "n": 1}


async def traced(world: World, prediction: Prediction) -> None:
    """Check that a prediction is traced to all that it was made of, and that all of it verifies."""
    read = await world.history.get("acme", prediction.id)
    trace = await world.tracer.trace(read)
    links = [link for link in (trace.release, trace.adapter, trace.training_run, trace.dataset) if link is not None]
    assert [link.verified for link in links] == [True] * (4 if prediction.adapter else 1), problems(trace)
    assert (trace.release.id, trace.release.digest) == (prediction.release_name, prediction.release_digest)
    given = [(each["document_id"], each["document_version"]) for each in prediction.passages]
    assert [(each.document_id, each.document_version) for each in trace.documents] == given
    assert [(each.cited, each.quotes) for each in trace.documents] == [(True, 1), (False, 0), (False, 0)]
    # Of a version that was replaced the text is gone, and with it what a quote could be held against.
    assert [each.verified for each in trace.documents] == [True if version == CURRENT else None for _, version in given]
    assert trace.verified is (True if {version for _, version in given} == {CURRENT} else None)
    assert len(trace.rows) == (20 if prediction.adapter else 0)
    for row in trace.rows:
        assert row.verified
        assert row.prediction.id == row.prediction_id == row.label.prediction_id


async def everything(way: Any) -> list[str]:
    """Walk through all pages of a way back."""
    found, before = [], None
    while True:
        page = await way(limit=200, before=before)
        found += [each.prediction_id for each in page.data]
        if (before := page.next) is None:
            return found


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_ten_thousand_predictions_of_five_releases_resolve_both_ways(world):
    chance = random.Random(7)
    shelf = Shelf(**{f"d{n}": (CURRENT, TEXT) for n in range(20)})
    world = World(world.database, world.adapters, documents=shelf)
    made = [await world.trained(f"adapter-{n}", examples=25) for n in range(3)]
    made += [await world.release(prompt=Prompt("p2", "Read {sources}. Then answer {question}.")), await world.release()]
    documents = [(f"d{n}", f"v{version}") for n in range(20) for version in range(3)]
    current = [place for place in documents if place[1] == CURRENT]
    expected: dict[str, list[str]] = {release.label: [] for release in made}
    using: dict[tuple[str, str], list[str]] = {place: [] for place in documents}
    predictions = []
    for _ in range(10_000):
        release = chance.choice(made)
        places = chance.sample(chance.choice((documents, current)), 3)
        facts = [{"document_id": document, "document_version": version} for document, version in places]
        cited = [{**facts[0], **QUOTE}]
        prediction = world.prediction(release, passages=facts, citations=cited, index_version="minilm-1")
        expected[release.label].append(prediction.id)
        for place in places:
            using[place].append(prediction.id)
        predictions.append(prediction)
    await world.put(*predictions)

    started = time.perf_counter()
    for at in range(0, len(predictions), 4):
        await asyncio.gather(*(traced(world, prediction) for prediction in predictions[at : at + 4]))
    print(f"{(time.perf_counter() - started) / len(predictions) * 1000:.2f} ms a lineage on {world.database.kind}")
    for release in made:
        wanted, digest = expected[release.label][::-1], release.adapter_digest
        assert await everything(partial(world.uses.of_release, "acme", release.label)) == wanted
        if digest is None:
            continue
        assert await everything(partial(world.uses.of_adapter, "acme", digest)) == wanted
        for row in (await world.provenance.rows("acme", release.lineage.dataset_digest))[:3]:
            assert await everything(partial(world.uses.of_dataset_row, "acme", row.digest)) == wanted
    for (document, version), ids in using.items():
        assert await everything(partial(world.uses.of_document, "acme", document, version=version)) == ids[::-1]
