"""Documents that are for groups of a tenant: who sees, replaces and deletes them, and who sees their jobs."""

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.documents import Scope
from retrieval.errors import DocumentNotFound, DocumentOwned, JobNotFound
from retrieval.jobs import Entry
from retrieval.scoping import may_see, visible
from retrieval.sqlite_file import fetch
from tests.ingestion_world import TOWER, World, ended, entry, opened

EVERYTHING = Scope.whole("acme")
BOARD, CLERK = Scope("acme", groups=frozenset({"board"})), Scope("acme")
PLAN = b"The plan is secret.\nIt names a price."
GROUPS = st.sampled_from(["board", "Board", "", "[]", '"', "b\u00f6rd", "role:admin", "'; --"])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as world:
        yield world


async def names(world: World, scope: Scope) -> list[str]:
    return sorted(document.name for document in await world.retriever.documents(scope))


@given(
    documents=st.lists(st.tuples(st.sampled_from(["acme", "other"]), st.lists(GROUPS, max_size=3)), max_size=6),
    groups=st.none() | st.frozensets(GROUPS),
)
def test_tables_and_python_agree_on_who_sees_what(
    documents: list[tuple[str, list[str]]], groups: frozenset[str] | None
) -> None:
    scope = Scope("acme", groups=groups)
    rows = [(n, tenant, json.dumps(its)) for n, (tenant, its) in enumerate(documents)]
    condition, parameters = visible(scope)
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE documents (id, tenant, for_groups)")
        connection.executemany("INSERT INTO documents VALUES (?, ?, ?)", rows)
        found = {n for (n,) in fetch(connection, f"SELECT id FROM documents WHERE {condition}", parameters)}
    assert found == {n for n, (tenant, its) in enumerate(documents) if may_see(scope, tenant, its)}


async def test_what_is_for_a_group_is_there_for_its_members_alone_also_after_a_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:
        await world.done("tower.txt", TOWER, CLERK)
        job = await world.done("plan.txt", PLAN, BOARD, groups=["board"])
        plan = (await world.ingestion.items(BOARD, job.id))[0].document_id
        await check_that_only_the_board_sees(world, plan)
    async with opened(tmp_path) as world:
        await check_that_only_the_board_sees(world, plan)


async def check_that_only_the_board_sees(world: World, plan: str) -> None:
    for scope in (BOARD, EVERYTHING):
        assert await names(world, scope) == ["plan.txt", "tower.txt"]
        assert "The plan is secret." in await world.found("secret plan", scope)
        assert await world.retriever.source(scope, plan) == PLAN.decode()
    for scope in (CLERK, Scope("acme", groups=frozenset({"staff"}))):
        assert await names(world, scope) == ["tower.txt"]
        assert "The plan is secret." not in await world.found("secret plan", scope)
        for look in (world.retriever.document, world.retriever.source, world.retriever.passages):
            with pytest.raises(DocumentNotFound):
                await look(scope, plan)
        with pytest.raises(DocumentNotFound):
            await world.retriever.passage(scope, plan, 1)


async def test_hidden_documents_take_no_places_from_those_that_are_seen(world: World) -> None:
    # More of them than a search looks at.
    plans = b"\n".join(b"The tower is secret, the tower is high." for _ in range(150))
    await world.done("plans.txt", plans, BOARD, groups=["board"])
    await world.done("tower.txt", TOWER, CLERK)
    assert "The tower is 330 metres tall." in await world.found("The tower is secret, the tower is high.", CLERK)


async def test_who_does_not_see_a_document_can_neither_replace_nor_delete_it(world: World) -> None:
    job = await world.done("plan.txt", PLAN, BOARD, groups=["board"])
    plan = (await world.ingestion.items(BOARD, job.id))[0].document_id
    for content in (b"Mine.", PLAN):
        with pytest.raises(DocumentOwned, match=r"plan\.txt.*another name"):
            await world.add("plan.txt", content, CLERK)
        with pytest.raises(DocumentOwned):
            await world.retriever.add(CLERK, name="plan.txt", content=content)
    for delete in (world.ingestion.delete, world.retriever.delete):
        with pytest.raises(DocumentNotFound):
            await delete(CLERK, plan)
    assert await world.retriever.source(BOARD, plan) == PLAN.decode()
    assert world.spooled() == []


async def test_a_synchronisation_that_is_refused_leaves_the_one_before_it_at_work(tmp_path: Path) -> None:
    async with opened(tmp_path, workers=1) as world:
        world.index.hold("upsert")
        manifest = [entry("tower.txt", TOWER)]
        first = await world.ingestion.begin(BOARD, "folder", await world.ingestion.plan(BOARD, "folder", manifest))
        await world.ingestion.deliver(BOARD, first.id, name="tower.txt", content=TOWER)
        await world.index.reached["upsert"].wait()
        # Waits behind it, and the board does not see it.
        await world.add("plan.txt", PLAN, EVERYTHING, groups=["staff"])
        second = await world.ingestion.plan(BOARD, "folder", [*manifest, entry("plan.txt", b"Mine.")])
        with pytest.raises(DocumentOwned):
            await world.ingestion.begin(BOARD, "folder", second)
        world.index.gates["upsert"].set()
        assert (await ended(world, first.id, BOARD)).outcomes == {"created": 1}
        (item,) = await world.ingestion.items(BOARD, first.id)
        assert item.attempts == 1  # That it was stopped is not the document's fault.


async def test_groups_that_are_not_named_stay_and_others_cost_no_embedding(world: World) -> None:
    await world.done("plan.txt", PLAN, EVERYTHING, groups=["board"])
    assert (await world.done("plan.txt", b"Another plan.", EVERYTHING)).outcomes == {"replaced": 1}
    assert await names(world, CLERK) == []
    for groups, sees in ([["staff"], []], [[], ["plan.txt"]]):
        job = await world.done("plan.txt", b"Another plan.", EVERYTHING, groups=groups)
        assert (job.outcomes, job.embedded) == ({"replaced": 1}, 0)
        assert await names(world, CLERK) == sees
        assert (await world.done("plan.txt", b"Another plan.", EVERYTHING)).outcomes == {"unchanged": 1}
    assert await world.found("another plan", CLERK) == ["Another plan."]


async def test_an_upload_that_names_no_groups_is_for_those_of_what_waits_before_it(tmp_path: Path) -> None:
    async with opened(tmp_path, failing={"upsert"}) as world:
        await world.add("plan.txt", PLAN, EVERYTHING, groups=["board"])
        with pytest.raises(DocumentOwned):
            await world.add("plan.txt", b"Mine.", CLERK)
        second = await world.add("plan.txt", b"Another plan.", EVERYTHING)
        assert (await world.ingestion.items(EVERYTHING, second.job_id))[0].groups == ("board",)
        assert await world.ingestion.jobs(CLERK) == []


async def test_a_job_is_seen_by_who_sees_all_of_its_documents(world: World) -> None:
    for content in (b"unreadable", PLAN):
        job = await world.done("plan.txt", content, BOARD, groups=["board"])
        assert (await world.ingestion.job(EVERYTHING, job.id)).id == job.id
        for asked in (
            world.ingestion.job(CLERK, job.id),
            world.ingestion.items(CLERK, job.id),
            world.ingestion.cancel(CLERK, job.id),
            world.ingestion.complete(CLERK, job.id),
            world.ingestion.deliver(CLERK, job.id, name="plan.txt", content=PLAN),
            world.ingestion.jobs(CLERK, before=job.id),
        ):
            with pytest.raises(JobNotFound):
                await asked
    assert await world.ingestion.jobs(CLERK) == []


async def test_what_failed_is_listed_to_those_whom_it_is_for(world: World) -> None:
    await world.done("plan.txt", b"unreadable", BOARD, groups=["board"])
    assert [failure.name for failure in await world.ingestion.failures(BOARD)] == ["plan.txt"]
    assert await world.ingestion.failures(CLERK) == []


def entries(**files: bytes) -> list[Entry]:
    return [entry(name, content) for name, content in files.items()]


async def synced(world: World, scope: Scope, files: dict[str, bytes], groups: list[str] | None = None) -> str:
    plan = await world.ingestion.plan(scope, "folder", entries(**files), groups=groups)
    job = await world.ingestion.begin(scope, "folder", plan, max_deletes=9)
    for wanted in (*plan.added, *plan.modified):
        await world.ingestion.deliver(scope, job.id, name=wanted.name, content=files[wanted.name])
    await world.ingestion.complete(scope, job.id)
    return job.id


async def test_a_synchronisation_leaves_alone_what_its_caller_does_not_see(world: World) -> None:
    await world.done("b", b"unseen", EVERYTHING, groups=["staff"])
    first = await synced(world, BOARD, {"a": b"One.", "c": b"Two."}, ["board"])
    await ended(world, first, EVERYTHING)
    plan = await world.ingestion.plan(CLERK, "folder", entries(b=b"unseen", d=b"New."))
    assert ([entry.name for entry in plan.added], plan.deleted, plan.unchanged) == (["d"], (), 0)
    assert plan.owned == ((entries(b=b"unseen")[0], ""),)
    second = await synced(world, CLERK, {"d": b"New.", "b": b"unseen"})
    await ended(world, second, EVERYTHING)
    failed = await world.ingestion.items(CLERK, second, state="failed")
    assert [(item.name, item.error) for item in failed] == [("b", "DocumentOwned")]
    assert "staff" not in (failed[0].message or "")
    assert await names(world, EVERYTHING) == ["a", "b", "c", "d"]
    # To be for others is a change, and all that is seen of a source is kept up.
    third = await synced(world, BOARD, {"a": b"One.", "d": b"New."}, ["board"])
    await ended(world, third, EVERYTHING)
    assert (await names(world, EVERYTHING), await names(world, CLERK)) == (["a", "b", "d"], [])


async def test_a_synchronisation_does_not_end_one_that_its_caller_does_not_see(world: World) -> None:
    plan = await world.ingestion.plan(BOARD, "folder", entries(a=b"One."), groups=["board"])
    job = await world.ingestion.begin(BOARD, "folder", plan)
    await synced(world, CLERK, {"b": b"Mine."})
    await world.ingestion.deliver(BOARD, job.id, name="a", content=b"One.")
    assert (await ended(world, job.id, EVERYTHING)).outcomes == {"created": 1}
