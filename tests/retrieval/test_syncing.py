"""A source kept equal to a manifest: what is added, modified and deleted, and what nobody may touch."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval.errors import JobEnded, NotExpected, TooManyDeletions
from retrieval.jobs import Job, Plan
from tests.ingestion_world import ACME, OTHER, World, ended, entry, opened

FOLDER = {"a.txt": b"Apples are red.", "b.txt": b"Bananas are yellow.", "c.txt": b"Cherries are dark."}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as world:
        yield world


async def planned(world: World, files: Mapping[str, bytes], source: str = "folder", **options: Any) -> Plan:
    return await world.ingestion.plan(ACME, source, [entry(*file) for file in files.items()], **options)


async def synced(world: World, files: Mapping[str, bytes], source: str = "folder", **options: Any) -> Job:
    """Make the source equal to the files, as a client does; gives the job when it has ended."""
    most = options.pop("max_deletes", None)
    plan = await planned(world, files, source, **options)
    job = await world.ingestion.begin(ACME, source, plan, max_deletes=most)
    for wanted in (*plan.added, *plan.modified):
        await world.ingestion.deliver(ACME, job.id, name=wanted.name, content=files[wanted.name])
    return await ended(world, job.id)


async def names(world: World) -> dict[str, str]:
    return {document.name: document.source for document in await world.retriever.documents(ACME, limit=500)}


async def test_a_folder_is_added_then_followed(world: World) -> None:
    first = await synced(world, FOLDER)
    assert (first.kind, first.source, first.state) == ("sync", "folder", "done")
    assert (first.outcomes, first.embedded) == ({"created": 3}, 3)
    assert await names(world) == dict.fromkeys(FOLDER, "folder")

    changed = {"a.txt": b"Apples are green.", "b.txt": FOLDER["b.txt"], "d.txt": b"Dates are brown."}
    plan = await planned(world, changed)
    assert [each.name for each in plan.added] == ["d.txt"]
    assert [each.name for each in plan.modified] == ["a.txt"]
    assert [name for name, _ in plan.deleted] == ["c.txt"]
    assert (plan.unchanged, plan.present) == (1, 3)
    second = await synced(world, changed)
    assert (second.outcomes, second.unchanged) == ({"created": 1, "replaced": 1, "deleted": 1}, 1)
    assert await world.found("are") == ["Apples are green.", "Bananas are yellow.", "Dates are brown."]
    assert len(await world.index.ids()) == 3
    assert len(await world.retriever.store.tombstones("acme")) == 1


async def test_a_folder_that_has_not_changed_costs_nothing(world: World) -> None:
    await synced(world, FOLDER)
    before = world.embedder.encoded_texts, world.index.written
    job = await synced(world, FOLDER)
    assert (job.state, job.unchanged, job.counts) == ("done", 3, {})
    assert (world.embedder.encoded_texts, world.index.written) == before


async def test_a_renamed_file_is_found_throughout(world: World) -> None:
    await synced(world, {"old.txt": b"Apples are red."})
    plan = await planned(world, {"new.txt": b"Apples are red."})
    job = await world.ingestion.begin(ACME, "folder", plan)
    assert await names(world) == {"old.txt": "folder"}  # What goes waits for what comes.
    assert (await world.ingestion.job(ACME, job.id)).counts == {"expected": 1, "waiting": 1}
    await world.ingestion.deliver(ACME, job.id, name="new.txt", content=b"Apples are red.")
    await ended(world, job.id)
    assert await names(world) == {"new.txt": "folder"}
    assert await world.found("apples") == ["Apples are red."]


async def test_other_sources_and_what_was_added_by_hand_are_left_alone(world: World) -> None:
    await world.done("note.txt", b"A note by hand.")
    await synced(world, {"other.txt": b"Of another folder."}, "elsewhere")
    await world.done("a.txt", b"Not this tenant's.", OTHER)
    await synced(world, FOLDER)
    await synced(world, {"a.txt": FOLDER["a.txt"]}, max_deletes=2)
    assert await names(world) == {"note.txt": "", "other.txt": "elsewhere", "a.txt": "folder"}
    assert await world.found("tenant", OTHER) == ["Not this tenant's."]


async def test_what_was_added_by_hand_under_the_same_name_is_taken_over_without_embedding(world: World) -> None:
    await world.done("a.txt", FOLDER["a.txt"])
    before = world.embedder.encoded_texts, world.index.written
    job = await synced(world, {"a.txt": FOLDER["a.txt"]})
    assert (job.unchanged, job.counts) == (1, {})
    assert await names(world) == {"a.txt": "folder"}
    assert (world.embedder.encoded_texts, world.index.written) == before


async def test_a_name_of_another_source_is_a_failure_and_stays_its(world: World) -> None:
    await synced(world, {"a.txt": FOLDER["a.txt"]}, "first")
    job = await synced(world, {"a.txt": b"Mine now.", "b.txt": FOLDER["b.txt"]}, "second")
    assert (job.state, job.counts) == ("failed", {"done": 1, "failed": 1})
    assert [item.error for item in job.failures] == ["DocumentOwned"]
    assert await names(world) == {"a.txt": "first", "b.txt": "second"}


async def test_most_documents_go_only_when_that_is_said(world: World) -> None:
    await synced(world, {f"{n}.txt": f"Number {n}.".encode() for n in range(12)})
    plan = await planned(world, {"0.txt": b"Number 0."})
    with pytest.raises(TooManyDeletions, match="delete 11 of the source's 12 documents, and 6 may go"):
        await world.ingestion.begin(ACME, "folder", plan)
    with pytest.raises(TooManyDeletions):
        await world.ingestion.begin(ACME, "folder", plan, max_deletes=10)
    assert len(await names(world)) == 12
    job = await world.ingestion.begin(ACME, "folder", plan, max_deletes=11)
    assert (await ended(world, job.id)).outcomes == {"deleted": 11}
    assert await names(world) == {"0.txt": "folder"}


async def test_nothing_is_deleted_where_that_is_not_wanted(world: World) -> None:
    await synced(world, FOLDER)
    job = await synced(world, {"a.txt": FOLDER["a.txt"]}, delete=False)
    assert job.counts == {}
    assert len(await names(world)) == 3


async def test_what_failed_is_not_asked_for_again_until_its_bytes_change(world: World) -> None:
    files = {"good.txt": b"All is well.", "bad.txt": b"unreadable"}
    assert (await synced(world, files)).state == "failed"
    plan = await planned(world, files)
    assert (plan.added, plan.modified, [failure.name for failure in plan.failed]) == ((), (), ["bad.txt"])
    again = await synced(world, files)
    assert (again.state, again.counts) == ("failed", {"failed": 1})  # It is still said.
    assert [item.name for item in again.failures] == ["bad.txt"]
    assert [each.name for each in (await planned(world, files, retry_failed=True)).added] == ["bad.txt"]
    mended = await synced(world, {**files, "bad.txt": b"It can be read."})
    assert (mended.state, mended.outcomes) == ("done", {"created": 1})
    assert await world.ingestion.failures(ACME) == []


async def test_a_file_that_failed_and_is_gone_is_no_failure_any_more(world: World) -> None:
    await synced(world, {"bad.txt": b"unreadable"})
    assert len(await world.ingestion.failures(ACME)) == 1
    assert (await synced(world, {})).state == "done"
    assert await world.ingestion.failures(ACME) == []


async def test_a_job_takes_what_it_waits_for_and_each_once(world: World) -> None:
    job = await world.ingestion.begin(ACME, "folder", await planned(world, FOLDER))
    with pytest.raises(NotExpected, match=r"z\.txt"):
        await world.ingestion.deliver(ACME, job.id, name="z.txt", content=b"x")
    await world.ingestion.deliver(ACME, job.id, name="a.txt", content=FOLDER["a.txt"])
    with pytest.raises(NotExpected, match=r"a\.txt"):
        await world.ingestion.deliver(ACME, job.id, name="a.txt", content=FOLDER["a.txt"])
    await world.ingestion.complete(ACME, job.id)
    done = await ended(world, job.id)
    assert (done.state, done.counts) == ("failed", {"done": 1, "failed": 2})
    assert {item.error for item in done.failures} == {"NotUploaded"}
    with pytest.raises(JobEnded):
        await world.ingestion.deliver(ACME, job.id, name="b.txt", content=FOLDER["b.txt"])


async def test_a_new_synchronisation_of_a_source_takes_the_place_of_one_that_is_not_done(world: World) -> None:
    old = await world.ingestion.begin(ACME, "folder", await planned(world, FOLDER))
    new = await synced(world, {"a.txt": FOLDER["a.txt"]})
    assert (await world.ingestion.job(ACME, old.id)).state == "cancelled"
    assert new.state == "done"
    assert await names(world) == {"a.txt": "folder"}


async def test_metadata_of_the_manifest_is_compared_too(world: World) -> None:
    await synced(world, {"a.txt": FOLDER["a.txt"]})
    plan = await world.ingestion.plan(ACME, "folder", [entry("a.txt", FOLDER["a.txt"], year=2026)])
    assert [each.name for each in plan.modified] == ["a.txt"]
    job = await world.ingestion.begin(ACME, "folder", plan)
    await world.ingestion.deliver(ACME, job.id, name="a.txt", content=FOLDER["a.txt"])
    done = await ended(world, job.id)
    assert (done.outcomes, done.embedded, done.reused) == ({"replaced": 1}, 0, 1)
    (document,) = await world.retriever.documents(ACME)
    assert document.metadata == {"year": 2026}


async def test_metadata_that_a_manifest_does_not_give_stays(world: World) -> None:
    await world.done("a.txt", FOLDER["a.txt"], metadata={"year": 2026})
    assert (await synced(world, {"a.txt": FOLDER["a.txt"]})).state == "done"
    assert (await synced(world, {"a.txt": b"Other words."})).outcomes == {"replaced": 1}
    (document,) = await world.retriever.documents(ACME)
    assert (document.metadata, document.source) == ({"year": 2026}, "folder")


NAMES = st.sampled_from(["a.txt", "b.txt", "c.txt"])
TEXTS = st.lists(st.sampled_from(["One line.", "Another line.", "A third.", "unread", "The last."]), max_size=4)
CONTENTS = st.one_of(TEXTS.map(lambda lines: "\n".join(lines).encode()), st.just(b"unreadable"))
STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, CONTENTS),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("cancel"), NAMES, CONTENTS),
    st.tuples(st.just("sync"), st.dictionaries(NAMES, CONTENTS)),
    st.tuples(st.just("reopen")),
)


async def walk(directory: Path, steps: list[tuple[Any, ...]]) -> None:
    """Take the steps, then compare what is there with the same documents put into an empty place."""
    before: World | None = None
    while True:
        async with opened(directory / "walked") as world:
            while steps and steps[0][0] != "reopen":
                await take(world, steps.pop(0))
            if not steps:
                before = world
                await settled(world)
                state = await snapshot(world)
                sources = {
                    document.name: await world.retriever.source(ACME, document.id)
                    for document in await world.retriever.documents(ACME)
                }
                break
            steps.pop(0)
    assert before
    async with opened(directory / "fresh") as fresh:
        for name, text in sources.items():
            await fresh.done(name, text.encode())
        assert state == await snapshot(fresh)


async def take(world: World, step: tuple[Any, ...]) -> None:
    match step:
        case ("put", name, content):
            await world.add(name, content)
        case ("cancel", name, content):
            await world.ingestion.cancel(ACME, (await world.add(name, content)).job_id)
        case ("delete", name):
            for document in await world.retriever.documents(ACME):
                if document.name == name:
                    await world.ingestion.delete(ACME, document.id)
        case ("sync", files):
            await synced(world, files, max_deletes=9)


async def settled(world: World) -> None:
    for job in await world.ingestion.jobs(ACME, is_open=True):
        await ended(world, job.id)


async def snapshot(world: World) -> list[tuple[str, int, str, list[float]]]:
    """Every passage with its vector; a point of the index that is no passage's is an error."""
    found, points = [], set(await world.index.ids())
    for document in await world.retriever.documents(ACME, limit=500):
        stored = await world.retriever.store.find(ACME, document.id)
        assert stored
        for passage in await world.retriever.passages(ACME, document.id):
            point = stored.generation << 20 | passage.n
            points.remove(point)
            vector = (await world.index.vectors([point]))[point]
            found.append((document.name, passage.n, passage.text, [round(float(x), 3) for x in vector]))
    assert not points, "points that no passage has"
    return sorted(found)


@pytest.mark.slow
@given(steps=st.lists(STEPS, max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_way_to_a_state_leaves_what_a_fresh_index_of_it_has(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(walk(Path(directory), list(steps)))
