"""Ingestion as jobs, through its front door: accepted at once, worked on in turn, resumed, and never done twice."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from retrieval.errors import (
    DocumentNotFound,
    IndexOutOfRoom,
    IndexUnavailable,
    JobEnded,
    JobNotFound,
    QueueFull,
    UnreadableDocument,
    UnsupportedType,
)
from retrieval.jobs import Limits
from tests.ingestion_world import ACME, OTHER, TOWER, World, ended, entry, opened


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as world:
        yield world


async def test_a_job_is_listed_at_once_and_says_how_far_it_is(world: World) -> None:
    world.index.hold("upsert")
    accepted = await world.add("tower.txt", who="anna")
    await world.index.reached["upsert"].wait()
    (job,) = await world.ingestion.jobs(ACME)
    assert (job.id, job.kind, job.state, job.created_by) == (accepted.job_id, "upload", "running", "anna")
    assert (job.counts, job.finished_at) == ({"running": 1}, None)
    (item,) = job.running
    assert (item.name, item.stage, item.passages_done, item.passages) == ("tower.txt", "embedding", 0, 3)
    assert await world.found("tower") == []
    world.index.gates["upsert"].set()
    ingested = await accepted.ended
    assert (ingested.outcome, ingested.embedded_passages) == ("created", 3)
    job = await world.ingestion.job(ACME, accepted.job_id)
    assert (job.state, job.counts, job.outcomes) == ("done", {"done": 1}, {"created": 1})
    assert (job.embedded, job.reused, job.running) == (3, 0, ())
    assert job.finished_at is not None
    assert len(await world.found("tower")) == 3
    assert world.spooled() == []


async def test_the_same_bytes_again_are_a_job_that_is_done_before_it_begins(world: World) -> None:
    await world.done("tower.txt", metadata={"year": 1889})
    before = world.embedder.encoded_texts, world.index.written
    again = await world.add("tower.txt", metadata={"year": 1889})
    assert again.ended.done()
    assert again.ended.result().outcome == "unchanged"
    job = await world.ingestion.job(ACME, again.job_id)
    assert (job.state, job.outcomes, job.embedded, job.reused) == ("done", {"unchanged": 1}, 0, 0)
    assert (world.embedder.encoded_texts, world.index.written) == before


async def test_metadata_that_is_not_given_stays_and_none_at_all_clears_it(world: World) -> None:
    async def metadata() -> dict[str, Any]:
        (document,) = await world.retriever.documents(ACME)
        return document.metadata

    await world.done("tower.txt", metadata={"year": 1889})
    assert (await world.done("tower.txt")).outcomes == {"unchanged": 1}
    assert (await world.done("tower.txt", TOWER.replace(b"330", b"331"))).outcomes == {"replaced": 1}
    assert await metadata() == {"year": 1889}
    job = await world.done("tower.txt", TOWER.replace(b"330", b"331"), metadata={})
    assert (job.outcomes, job.embedded) == ({"replaced": 1}, 0)
    assert await metadata() == {}


async def test_an_upload_without_metadata_has_that_of_what_waits_before_it(tmp_path: Path) -> None:
    async with opened(tmp_path, failing={"upsert"}) as world:
        await world.add("tower.txt", metadata={"year": 1889})
        second = await world.add("tower.txt", b"Another tower.")
        assert (await world.ingestion.items(ACME, second.job_id))[0].metadata == {"year": 1889}


async def test_a_changed_document_embeds_what_changed_and_reuses_the_rest(world: World) -> None:
    await world.done("tower.txt")
    job = await world.done("tower.txt", TOWER.replace(b"330", b"331"))
    assert (job.outcomes, job.embedded, job.reused) == ({"replaced": 1}, 1, 2)
    assert len(await world.index.ids()) == 3


async def test_what_cannot_be_read_fails_alone_and_stays_visible(world: World) -> None:
    await world.done("tower.txt")
    job = await world.done("tower.txt", b"unreadable")
    assert (job.state, job.counts) == ("failed", {"failed": 1})
    (item,) = job.failures
    assert (item.error, item.message, item.attempts) == ("UnreadableDocument", "no text", 1)
    (failure,) = await world.ingestion.failures(ACME)
    assert (failure.name, failure.error, failure.job_id) == ("tower.txt", "UnreadableDocument", job.id)
    assert len(await world.found("tower")) == 3  # The version before stays.
    assert world.spooled() == []
    assert await world.ingestion.failures(OTHER) == []

    await world.done("tower.txt", b"The tower is new.")
    assert await world.ingestion.failures(ACME) == []


async def test_who_waits_is_told_why_a_document_failed(world: World) -> None:
    accepted = await world.add("a.txt", b"unreadable")
    with pytest.raises(UnreadableDocument, match="no text"):
        await accepted.ended


async def test_a_type_that_nothing_reads_is_refused_at_the_door(world: World) -> None:
    with pytest.raises(UnsupportedType):
        await world.add("a.png", b"\x89PNG")
    assert await world.ingestion.jobs(ACME) == []
    assert world.spooled() == []


@pytest.mark.parametrize("limits", [Limits(max_documents=2), Limits(max_bytes=2 * len(TOWER))], ids=["many", "large"])
async def test_a_full_queue_refuses_with_the_time_to_come_again(tmp_path: Path, limits: Limits) -> None:
    async with opened(tmp_path, limits=limits) as world:
        world.index.hold("upsert")
        waiting = [await world.add(f"{n}.txt") for n in range(2)]
        with pytest.raises(QueueFull, match="2 documents") as refused:
            await world.add("third.txt")
        assert 1 <= refused.value.retry_after_seconds <= 60
        assert (world.ingestion.waiting_documents, world.ingestion.waiting_bytes) == (2, 2 * len(TOWER))
        world.index.gates["upsert"].set()
        await asyncio.gather(*(accepted.ended for accepted in waiting))
        assert (await world.done("third.txt")).state == "done"
        assert world.ingestion.waiting_documents == 0


async def test_an_upload_without_room_on_the_disk_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, reserve_bytes=2**62) as world:
        with pytest.raises(IndexOutOfRoom):
            await world.add("tower.txt")
        assert (world.spooled(), world.ingestion.waiting_documents) == ([], 0)
        assert await world.ingestion.jobs(ACME) == []


async def test_versions_of_one_document_are_ingested_in_the_order_they_came(world: World) -> None:
    world.index.hold("upsert")
    accepted = [await world.add("tower.txt", f"Version {n}.".encode()) for n in range(4)]
    world.index.gates["upsert"].set()
    outcomes = [(await each.ended).outcome for each in accepted]
    assert outcomes == ["created", "replaced", "replaced", "replaced"]
    assert await world.found("version") == ["Version 3."]


async def test_a_small_upload_does_not_wait_behind_a_large_job(tmp_path: Path) -> None:
    async with opened(tmp_path, workers=1) as world:
        files = {f"{n}.txt": f"Number {n}.".encode() for n in range(6)}
        plan = await world.ingestion.plan(ACME, "folder", [entry(*file) for file in files.items()])
        job = await world.ingestion.begin(ACME, "folder", plan)
        world.index.hold("upsert")
        for name, content in files.items():
            await world.ingestion.deliver(ACME, job.id, name=name, content=content)
        await world.index.reached["upsert"].wait()
        small = await world.add("small.txt")
        world.index.gates["upsert"].set()
        await small.ended
        assert (await world.ingestion.job(ACME, job.id)).counts["waiting"] >= 4


async def test_a_cancelled_job_leaves_what_was_there(world: World) -> None:
    await world.done("tower.txt")
    world.index.hold("upsert")
    accepted = await world.add("tower.txt", b"A new tower.")
    waits = await world.add("tower.txt", b"A newer tower.")
    await world.index.reached["upsert"].wait()
    job = await world.ingestion.cancel(ACME, accepted.job_id)
    assert (job.state, job.counts) == ("cancelled", {"cancelled": 1})
    with pytest.raises(JobEnded, match="cancelled"):
        await accepted.ended
    assert len(await world.found("tower")) == 3
    world.index.gates["upsert"].set()
    assert (await waits.ended).outcome == "replaced"  # The next in turn is not held up by it.
    assert await world.found("tower") == ["A newer tower."]
    assert len(await world.index.ids()) == 1
    assert world.spooled() == []
    assert (await world.ingestion.cancel(ACME, waits.job_id)).state == "done"


async def test_what_is_in_place_before_it_can_be_cancelled_is_said_to_be(world: World) -> None:
    await world.done("tower.txt")
    world.index.hold("delete")
    accepted = await world.add("tower.txt", b"A new tower.")
    await world.index.reached["delete"].wait()  # The new one is in place; the old one is being cleared away.
    (its_task,) = [task for task in asyncio.all_tasks() if task.get_name().startswith("ingesting")]
    cancelling = asyncio.create_task(world.ingestion.cancel(ACME, accepted.job_id))
    while not its_task.cancelling():
        await asyncio.sleep(0.001)
    world.index.gates["delete"].set()
    assert (await cancelling).state == "done"
    with pytest.raises(JobEnded, match="ended before"):
        await accepted.ended
    assert await world.found("tower") == ["A new tower."]


async def test_a_document_that_is_deleted_does_not_come_back_from_the_queue(world: World) -> None:
    await world.done("tower.txt")
    (document,) = await world.retriever.documents(ACME)
    world.index.hold("upsert")
    under_way = await world.add("tower.txt", b"A new tower.")
    waits = await world.add("tower.txt", b"A newer tower.")
    await world.index.reached["upsert"].wait()
    await world.ingestion.delete(ACME, document.id)
    world.index.gates["upsert"].set()
    for accepted in (under_way, waits):
        with pytest.raises(JobEnded, match="deleted"):
            await accepted.ended
        assert (await world.ingestion.job(ACME, accepted.job_id)).state == "cancelled"
    assert await world.found("tower") == []
    assert await world.index.ids() == []
    with pytest.raises(DocumentNotFound):
        await world.ingestion.delete(ACME, document.id)


async def test_a_deletion_that_does_not_happen_leaves_what_waits(world: World) -> None:
    await world.done("tower.txt")
    (document,) = await world.retriever.documents(ACME)
    world.index.hold("upsert")
    under_way = await world.add("tower.txt", b"A new tower.")
    waits = await world.add("tower.txt", b"A newer tower.")
    await world.index.reached["upsert"].wait()
    file = world.retriever.store.file
    await file.write(
        sqlite3.Connection.execute,
        "CREATE TRIGGER full BEFORE INSERT ON tombstones BEGIN SELECT RAISE(ABORT, 'there is no room'); END",
    )
    with pytest.raises(IndexUnavailable, match="there is no room"):
        await world.ingestion.delete(ACME, document.id)
    await file.write(sqlite3.Connection.execute, "DROP TRIGGER full")
    world.index.gates["upsert"].set()
    for accepted in (under_way, waits):
        assert (await accepted.ended).outcome == "replaced"
    assert await world.retriever.source(ACME, document.id) == "A newer tower."
    assert world.spooled() == []


async def test_a_document_that_only_waits_can_be_deleted(world: World) -> None:
    world.index.hold("upsert")
    accepted = await world.add("tower.txt")
    await world.index.reached["upsert"].wait()
    (item,) = await world.ingestion.items(ACME, accepted.job_id)
    await world.ingestion.delete(ACME, item.document_id)
    world.index.gates["upsert"].set()
    assert await world.found("tower") == []
    assert (await world.ingestion.job(ACME, accepted.job_id)).state == "cancelled"


async def test_what_waits_is_ingested_when_the_service_is_back(tmp_path: Path) -> None:
    async with opened(tmp_path, failing={"check"}) as world:
        accepted = await world.add("tower.txt")
        assert (await world.ingestion.job(ACME, accepted.job_id)).state == "waiting"
    assert accepted.ended.cancelled()
    (tmp_path / "spool" / "cut-off.partial").write_bytes(b"half of an upl")
    async with opened(tmp_path) as world:
        await ended(world, accepted.job_id)
        assert len(await world.found("tower")) == 3
        assert world.spooled() == []


async def test_what_is_under_way_at_the_end_of_the_service_goes_on_at_the_next_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:
        world.index.hold("upsert")
        accepted = await world.add("tower.txt")
        await world.index.reached["upsert"].wait()
    async with opened(tmp_path) as world:
        job = await ended(world, accepted.job_id)
        assert (job.state, job.outcomes) == ("done", {"created": 1})
        (item,) = await world.ingestion.items(ACME, job.id)
        assert item.attempts == 1  # That the service was stopped is not the document's fault.
        assert len(await world.index.ids()) == 3


async def test_an_index_that_is_away_is_waited_for(world: World) -> None:
    world.index.failing.add("upsert")
    accepted = await world.add("tower.txt")
    while (await world.ingestion.items(ACME, accepted.job_id))[0].attempts < 2:
        await asyncio.sleep(0)
    world.index.failing.clear()
    assert (await accepted.ended).outcome == "created"


async def test_a_document_goes_on_whose_wait_could_not_be_written(tmp_path: Path, world: World) -> None:
    world.index.hold("upsert")
    accepted = await world.add("tower.txt")
    await world.index.reached["upsert"].wait()
    (its_task,) = [task for task in asyncio.all_tasks() if task.get_name().startswith("ingesting")]
    with closing(sqlite3.connect(tmp_path / "documents.db")) as disk:  # As if it were full.
        disk.execute("CREATE TRIGGER full BEFORE UPDATE ON job_items BEGIN SELECT RAISE(FAIL, 'full'); END")
        world.index.failing.add("upsert")
        world.index.gates["upsert"].set()
        await asyncio.wait([its_task])
        world.index.failing.clear()
        disk.execute("DROP TRIGGER full")
    assert (await ended(world, accepted.job_id)).state == "done"
    assert (await accepted.ended).outcome == "created"


async def test_a_document_that_always_fails_is_given_up(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=Limits(max_attempts=3)) as world:
        world.index.failing.add("upsert")
        accepted = await world.add("tower.txt")
        with pytest.raises(IndexUnavailable, match="made to fail"):
            await accepted.ended
        world.index.failing.clear()
        job = await world.ingestion.job(ACME, accepted.job_id)
        assert (job.state, job.failures[0].attempts) == ("failed", 3)
        assert (await world.done("other.txt")).state == "done"


async def test_a_document_that_ends_the_process_is_not_tried_for_ever(tmp_path: Path) -> None:
    async with opened(tmp_path, failing={"check"}) as world:
        accepted = await world.add("tower.txt")
    with closing(sqlite3.connect(tmp_path / "documents.db")) as left, left:  # As by a process that was killed.
        left.execute("UPDATE job_items SET state = 'running', attempts = 1")
    async with opened(tmp_path, limits=Limits(max_attempts=1)) as world:
        job = await ended(world, accepted.job_id)
        assert (job.state, job.failures[0].error) == ("failed", "UnreadableDocument")


async def test_no_door_leads_to_another_tenants_jobs(world: World) -> None:
    accepted = await world.add("tower.txt")
    await accepted.ended
    assert await world.ingestion.jobs(OTHER) == []
    for door in (
        world.ingestion.job(OTHER, accepted.job_id),
        world.ingestion.items(OTHER, accepted.job_id),
        world.ingestion.cancel(OTHER, accepted.job_id),
        world.ingestion.complete(OTHER, accepted.job_id),
        world.ingestion.deliver(OTHER, accepted.job_id, name="tower.txt", content=b"x"),
        world.ingestion.jobs(OTHER, before=accepted.job_id),
    ):
        with pytest.raises(JobNotFound):
            await door


async def test_jobs_and_documents_of_a_job_are_listed_in_pages(world: World) -> None:
    for n in range(5):
        await world.done(f"{n}.txt", f"Number {n}.".encode())
    first = await world.ingestion.jobs(ACME, limit=3)
    rest = await world.ingestion.jobs(ACME, limit=3, before=first[-1].id)
    numbers = [job.number for job in (*first, *rest)]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) == 5
    assert await world.ingestion.jobs(ACME, is_open=True) == []
    assert len(await world.ingestion.jobs(ACME, is_open=False)) == 5


async def test_old_jobs_are_forgotten_and_failures_are_not(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=Limits(keep_jobs=2)) as world:
        await world.done("bad.txt", b"unreadable")
        for n in range(4):
            await world.done(f"{n}.txt", f"Number {n}.".encode())
        assert len(await world.ingestion.jobs(ACME)) == 2
        assert [failure.name for failure in await world.ingestion.failures(ACME)] == ["bad.txt"]


async def test_old_jobs_are_forgotten_while_nothing_changes_too(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=Limits(keep_jobs=2)) as world:
        for _ in range(4):
            await world.done("a.txt", b"Apples are red.")
        assert len(await world.ingestion.jobs(ACME)) == 2
        same = await world.ingestion.plan(ACME, "folder", [entry("a.txt", b"Apples are red.")])
        for _ in range(4):
            await world.ingestion.begin(ACME, "folder", same)
        assert [job.kind for job in await world.ingestion.jobs(ACME)] == ["sync", "sync"]


async def test_jobs_that_were_cancelled_are_forgotten_as_well(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=Limits(keep_jobs=2)) as world:
        for n in range(5):
            plan = await world.ingestion.plan(ACME, f"folder-{n}", [entry("a.txt", b"Apples are red.")])
            job = await world.ingestion.begin(ACME, f"folder-{n}", plan)
            assert (await world.ingestion.cancel(ACME, job.id)).state == "cancelled"
        assert len(await world.ingestion.jobs(ACME)) == 2
