"""Releases and rollouts in the database that replicas share, of either kind."""

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import text, update

from app import rollouts
from app.database import Database, releases
from app.errors import Conflict, EngineUnavailable, InvalidRequest, ModelNotFound, NotFound, Unavailable
from app.registry import SETTINGS, Registry
from app.releases import Prompt, Release
from app.rollouts import Rollout
from tests.migrated import migrated
from tests.postgres import Postgres
from tests.service import until

OWN = Release("hallmark", 0, "tgi", Prompt("answer-1", "{sources} {question}"))


async def fine(_: Release) -> list[str]:
    return []


def variant(notes: str, **fields: object) -> Release:
    return msgspec.structs.replace(OWN, notes=notes, **fields)


@contextlib.asynccontextmanager
async def replica(
    url: str,
    *,
    own: Release = OWN,
    vet: Callable[[Release], Awaitable[list[str]]] = fine,
    memory: Path | None = None,
    timeout_seconds: float = 5.0,
) -> AsyncIterator[Registry]:
    async with (
        Database(url, timeout_seconds=timeout_seconds) as database,
        Registry(database, own=own, vet=vet, memory=memory, poll_seconds=0.05) as registry,
    ):
        yield registry


@pytest.fixture
async def registry(database_url: str) -> AsyncIterator[Registry]:
    async with replica(database_url) as registry:
        yield registry


async def made(registry: Registry, notes: str, **fields: object) -> str:
    entry, _ = await registry.create(variant(notes, **fields), who="me")
    return entry.release.label


def promote_to(number: int) -> Callable[[Rollout, set[int]], Rollout]:
    return lambda rollout, _: rollouts.promote(rollout, number)


def canary(number: int, share: float) -> Callable[[Rollout, set[int]], Rollout]:
    return lambda rollout, _: rollouts.set_canary(rollout, number, share)


async def promote(registry: Registry, number: int, **given: object) -> Rollout:
    return await registry.change("hallmark", "promote", promote_to(number), who="me", joins=number, **given)


# --- releases ---


async def test_the_settings_release_is_enrolled_and_serves(registry):
    assert registry.releases.resolve("hallmark").release.label == "hallmark@1"
    assert (await registry.rollout("hallmark")).stable == 1
    assert (await registry.get("hallmark@1")).created_by == SETTINGS


async def test_a_release_keeps_its_number_and_another_gets_the_next(registry):
    first, is_new = await registry.create(variant("first"), who="me")
    assert (first.release.label, is_new) == ("hallmark@2", True)
    assert await made(registry, "second") == "hallmark@3"
    same, is_new = await registry.create(variant("first"), who="somebody else")
    assert (same.release.label, is_new, same.created_by) == ("hallmark@2", False, "me")
    assert await made(registry, "first", name="other") == "other@1"
    assert [entry.release.label for entry in await registry.find(name=None, limit=9, after=None)] == [
        "hallmark@1",
        "hallmark@2",
        "hallmark@3",
        "other@1",
    ]
    assert [entry.release.label for entry in await registry.find(name=None, limit=2, after="hallmark@2")] == [
        "hallmark@3",
        "other@1",
    ]
    assert [entry.release.label for entry in await registry.find(name="other", limit=9, after=None)] == ["other@1"]


async def test_replicas_that_create_at_once_give_each_release_one_number(database_url):
    async with replica(database_url) as one, replica(database_url) as other:
        labels = await asyncio.gather(*(made((one, other)[n % 2], f"note {n // 2}") for n in range(12)))
    assert sorted(set(labels)) == [f"hallmark@{number}" for number in range(2, 8)]
    assert all(labels[2 * n] == labels[2 * n + 1] for n in range(6))


async def test_a_created_release_can_be_pinned_and_the_bare_name_stays(registry):
    label = await made(registry, "next")
    assert registry.releases.resolve(label).release.notes == "next"
    assert registry.releases.resolve("hallmark").release.label == "hallmark@1"


async def test_a_release_with_problems_is_kept_and_answers_nobody_until_they_are_mended(database_url):
    problems = ["`adapter`: not there."]

    async def vet(_: Release) -> list[str]:
        return list(problems)

    async with replica(database_url, vet=vet) as registry:
        entry, _ = await registry.create(variant("next"), who="me")
        assert (entry.approved_at, entry.problems) == (None, ("`adapter`: not there.",))
        with pytest.raises(ModelNotFound):
            registry.releases.resolve("hallmark@2")
        with pytest.raises(Conflict, match="hallmark@2 cannot serve: `adapter`: not there"):
            await promote(registry, 2)
        assert (await registry.rollout("hallmark")).stable == 1
        problems.clear()
        await promote(registry, 2)
        assert registry.releases.resolve("hallmark").release.label == "hallmark@2"


async def test_an_engine_that_is_away_leaves_a_release_unvetted(database_url):
    async def vet(_: Release) -> list[str]:
        raise EngineUnavailable("the engine is away.")

    async with replica(database_url, vet=vet) as registry:
        entry, _ = await registry.create(variant("next"), who="me")
        assert "the engine is away" in entry.problems[0]
        with pytest.raises(EngineUnavailable):
            await promote(registry, 2)


async def test_a_release_that_serves_is_not_deleted(registry):
    await made(registry, "two")
    await made(registry, "three", fallback="hallmark@2")
    await made(registry, "four")
    await registry.change("hallmark", "canary", canary(3, 0.1), who="me", joins=3)
    with pytest.raises(Conflict, match="hallmark@1 serves"):
        await registry.delete("hallmark@1")
    with pytest.raises(Conflict, match="hallmark@3 serves"):
        await registry.delete("hallmark@3")
    with pytest.raises(Conflict, match="fallback of hallmark@3"):
        await registry.delete("hallmark@2")
    await registry.delete("hallmark@4")
    for refused in (registry.get("hallmark@4"), registry.delete("hallmark@4"), promote(registry, 4)):
        with pytest.raises(NotFound, match="hallmark@4"):
            await refused
    with pytest.raises(ModelNotFound):
        registry.releases.resolve("hallmark@4")
    assert await made(registry, "four") == "hallmark@4"  # Its number is its own for ever.
    assert registry.releases.resolve("hallmark@4").release.notes == "four"


async def test_the_fallback_of_a_fallback_is_not_deleted_while_it_may_answer(database_url):
    async with replica(database_url) as one, replica(database_url) as other:
        await made(one, "last", fallback="extractive")
        await made(one, "middle", fallback="hallmark@2")
        await made(one, "first", fallback="hallmark@3")
        await one.delete(await made(one, "beside", fallback="hallmark@2"))
        await promote(one, 4)
        for label in ("hallmark@2", "hallmark@3"):
            with pytest.raises(Conflict, match="fallback of hallmark@4, which serves"):
                await other.delete(label)
        await promote(one, 1)
        await other.delete("hallmark@2")


async def test_a_fallback_must_exist(registry):
    with pytest.raises(InvalidRequest, match="no release 'small@7'"):
        await made(registry, "x", fallback="small@7")
    assert await made(registry, "x", fallback="hallmark@1") == "hallmark@2"
    assert await made(registry, "x", fallback="extractive") == "hallmark@3"


async def test_a_release_whose_stored_bytes_were_changed_does_not_serve(database_url, caplog):
    async with replica(database_url) as registry:
        await made(registry, "honest")
    async with Database(database_url) as database, database.writing() as connection:
        forged = variant("forged", number=2).canonical.decode()
        await connection.execute(update(releases).where(releases.c.number == 2).values(canonical=forged))
    with caplog.at_level(logging.ERROR):
        async with replica(database_url) as registry:
            with pytest.raises(ModelNotFound):
                registry.releases.resolve("hallmark@2")
            with pytest.raises(Conflict, match="changed after it was made"):
                await registry.get("hallmark@2")
    assert "hallmark@2 cannot serve" in caplog.text


# --- rollouts ---


async def test_every_change_is_on_record_with_who_why_before_and_after(registry):
    await made(registry, "two")
    await registry.change("hallmark", "canary", canary(2, 0.1), who="ann", why="try it", joins=2)
    await registry.change("hallmark", "promote", lambda state, _: rollouts.promote(state), who="bob", why="it is good")
    await registry.change("hallmark", "rollback", rollouts.roll_back, who="ann", why="it is not")
    found = await registry.changes("hallmark", limit=9)
    assert [(each.revision, each.action, each.who, each.why) for each in found] == [
        (4, "rollback", "ann", "it is not"),
        (3, "promote", "bob", "it is good"),
        (2, "canary", "ann", "try it"),
        (1, "promote", SETTINGS, "first start"),
    ]
    for newer, older in itertools.pairwise(found):
        assert newer.before == older.after
    assert found[-1].before is None
    assert found[0].after == await registry.rollout("hallmark")
    assert [each.revision for each in await registry.changes("hallmark", limit=2, before=4)] == [3, 2]


async def test_a_change_decided_on_another_state_is_refused(registry):
    await made(registry, "two")
    await promote(registry, 2, revision=1)
    with pytest.raises(Conflict, match="revision 2, not 1"):
        await registry.change("hallmark", "rollback", rollouts.roll_back, who="me", revision=1)
    assert (await registry.rollout("hallmark")).stable == 2


async def test_of_changes_made_at_once_on_one_state_one_is_made(database_url):
    async with replica(database_url) as one, replica(database_url) as other:
        await made(one, "two")
        await made(one, "three")
        done = await asyncio.gather(
            *(promote((one, other)[n % 2], 2 + n % 2, revision=1) for n in range(6)), return_exceptions=True
        )
        assert sum(isinstance(each, Rollout) for each in done) == 1
        assert sum(isinstance(each, Conflict) for each in done) == 5
        assert len(await one.changes("hallmark", limit=9)) == 2


async def test_changes_made_at_once_are_made_one_after_the_other(database_url):
    async with replica(database_url) as one, replica(database_url) as other:
        await made(one, "two")
        await one.change("hallmark", "canary", canary(2, 0.0), who="me", joins=2)

        def grow(state: Rollout, _: set[int]) -> Rollout:
            return rollouts.set_canary(state, 2, round(state.share + 0.05, 2))

        changes = (each.change("hallmark", "canary", grow, who="me") for _ in range(8) for each in (one, other))
        await asyncio.gather(*changes)
        assert (await one.rollout("hallmark")).share == 0.8
        assert (await one.rollout("hallmark")).revision == 18


async def test_another_replica_follows(database_url):
    async with replica(database_url) as one, replica(database_url) as other:
        await made(one, "two")
        await promote(one, 2)
        assert one.releases.resolve("hallmark").release.label == "hallmark@2"

        async def followed() -> bool:
            return other.releases.resolve("hallmark").release.label == "hallmark@2"

        await until(followed)
        await other.change("hallmark", "rollback", rollouts.roll_back, who="me")

        async def went_back() -> bool:
            return one.releases.resolve("hallmark").release.label == "hallmark@1"

        await until(went_back)


async def test_a_name_begins_with_its_first_promotion(registry):
    assert await made(registry, "x", name="support") == "support@1"
    with pytest.raises(NotFound, match=r"'support' has no rollout; there is 'hallmark'"):
        await registry.change("support", "canary", canary(1, 0.5), who="me", joins=1)
    after = await registry.change("support", "promote", promote_to(1), who="me", joins=1, first=True)
    assert (after.stable, after.revision) == (1, 1)
    assert registry.releases.resolve("support").release.label == "support@1"
    assert [each.name for each in await registry.rollouts()] == ["hallmark", "support"]
    for asked in (registry.rollout("nothing"), registry.changes("nothing", limit=1)):
        with pytest.raises(NotFound):
            await asked


# --- the settings' release ---


async def test_changed_settings_serve_until_a_person_decides(database_url):
    async with replica(database_url, own=variant("a")) as registry:
        assert registry.releases.resolve("hallmark").release.number == 1
    async with replica(database_url, own=variant("b")) as registry:
        assert registry.releases.resolve("hallmark").release.number == 2
        assert [(each.who, each.why) for each in await registry.changes("hallmark", limit=1)] == [
            (SETTINGS, "changed settings")
        ]
    async with replica(database_url, own=variant("a")) as registry:
        assert registry.releases.resolve("hallmark").release.number == 1
        await promote(registry, 2)
    async with replica(database_url, own=variant("c")) as registry:
        assert registry.releases.resolve("hallmark").release.number == 2  # A restart undoes nobody's decision.
        assert registry.releases.resolve("hallmark@3").release.notes == "c"


# --- without the database ---


async def test_what_is_fallen_back_on_is_remembered_with_what_serves(tmp_path):
    memory, url = tmp_path / "serving.json", f"sqlite:///{migrated(tmp_path / 'shared.db')}"
    async with replica(url, memory=memory) as registry:
        small, _ = await registry.create(msgspec.structs.replace(OWN, name="small", notes="x"), who="me")
        label = await made(registry, "safe", fallback=small.release.label)
        await promote(registry, int(label.rpartition("@")[2]))
    kept = json.loads(memory.read_text())["releases"]
    assert {json.loads(each["canonical"])["name"] for each in kept} == {"hallmark", "small"}


@pytest.mark.parametrize("with_memory", [True, False])
async def test_what_served_last_serves_while_the_database_is_away_and_after_a_start_without_it(tmp_path, with_memory):
    memory = tmp_path / "serving.json"
    with Postgres() as server:
        url = server.create_database()
        async with replica(url, memory=memory, timeout_seconds=1.0) as registry:
            await made(registry, "two")
            await promote(registry, 2)
            server.stop()
            with pytest.raises(Unavailable):
                await promote(registry, 1)
            assert registry.releases.resolve("hallmark").release.label == "hallmark@2"
        if not with_memory:
            memory.unlink()
        async with replica(url, memory=memory, timeout_seconds=1.0) as registry:
            expected = "hallmark@2" if with_memory else "hallmark@0"
            assert registry.releases.resolve("hallmark").release.label == expected
            server.start()

            async def current() -> bool:
                return registry.releases.resolve("hallmark").release.label == "hallmark@2"

            await until(current)
            async with replica(url) as other:
                await promote(other, 1)

            async def follows() -> bool:
                return registry.releases.resolve("hallmark").release.label == "hallmark@1"

            await until(follows)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"rollouts": [], "releases": [{"number": 1}]}', b"\xff"])
async def test_a_memory_that_cannot_be_read_is_as_good_as_none(tmp_path, content):
    memory = tmp_path / "serving.json"
    memory.write_bytes(content)
    async with replica("postgresql://nobody@/nothing?host=/nowhere", memory=memory) as registry:
        assert registry.releases.resolve("hallmark").release.label == "hallmark@0"


async def test_a_memory_that_was_tampered_with_does_not_serve(tmp_path):
    memory = tmp_path / "serving.json"
    async with replica(f"sqlite:///{migrated(tmp_path / 'a.db')}", memory=memory):
        kept = json.loads(memory.read_bytes())
    kept["releases"][0]["canonical"] = variant("forged").canonical.decode()
    memory.write_text(json.dumps(kept))
    async with replica("postgresql://nobody@/nothing?host=/nowhere", memory=memory) as registry:
        assert registry.releases.resolve("hallmark").release.notes == ""


async def test_following_goes_on_after_whatever_happens(database_url, caplog):
    async with replica(database_url) as one, replica(database_url) as other:
        await made(one, "two")
        async with Database(database_url) as database, database.writing() as connection:
            await connection.execute(text("UPDATE rollouts SET state = '{'"))
            await connection.execute(text("UPDATE registry SET version = version + 1"))

        async def told() -> bool:
            return "cannot be followed" in caplog.text

        await until(told)
        assert other.releases.resolve("hallmark").release.label == "hallmark@1"
        async with Database(database_url) as database, database.writing() as connection:
            state = rollouts.promote(rollouts.begin("hallmark", 1), 2)
            await connection.execute(
                text("UPDATE rollouts SET state = :state"), {"state": msgspec.json.encode(state).decode()}
            )
            await connection.execute(text("UPDATE registry SET version = version + 1"))

        async def mended() -> bool:
            return other.releases.resolve("hallmark").release.label == "hallmark@2"

        await until(mended)
