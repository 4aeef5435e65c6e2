"""One suite over every index: what holds for the one in the process holds for a Qdrant server."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient

from retrieval.documents import Scope
from retrieval.edge import EdgeIndex
from retrieval.errors import IndexOutOfRoom, IndexUnavailable, InvalidFilter
from retrieval.index import (
    Index,
    IndexPoint,
    IndexSchema,
    Legs,
    SparseVector,
    point_id,
    point_key,
)
from retrieval.qdrant import MEMORY, QdrantIndex
from retrieval.scoping import IndexFilter, labels, tenant_filter
from tests.fake_qdrant import fake_qdrant, fake_qdrant_server
from tests.faults import FaultyProxy
from tests.index_points import AXES, SCHEMA, point
from tests.service import until
from tests.small_disk import SmallDisk
from tests.stopwatch import Stopwatch

EVERYTHING = IndexFilter("acme")
ROOT = Path(__file__).parents[2]


def words(*ids: int) -> SparseVector:
    return SparseVector(list(ids), [1.0] * len(ids))


def found(leg: list[tuple[int, float]]) -> list[tuple[int, int]]:
    return [point_key(number) for number, _ in leg]


@pytest.fixture(params=["edge", "qdrant", "qdrant over HTTP"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Callable[[], Index]]:
    """Make indexes that look at the same data, one after the other."""
    if request.param == "edge":
        yield lambda: EdgeIndex(tmp_path / "index")
        return
    if request.param == "qdrant over HTTP":
        async with fake_qdrant() as url:
            yield lambda: QdrantIndex(url)
        return
    client = AsyncQdrantClient(MEMORY)
    yield lambda: QdrantIndex(MEMORY, client=client)
    await client.close()


@asynccontextmanager
async def opened(index: Index, schema: IndexSchema = SCHEMA) -> AsyncIterator[Index]:
    await index.open(schema)
    try:
        yield index
    finally:
        await index.close()


async def test_an_empty_index_finds_nothing(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        legs = await index.search(EVERYTHING, dense=AXES[0], sparse=words(7), depth=5)
        assert (legs.dense, legs.sparse, await index.ids()) == ([], [], [])
        await index.check()


async def test_each_leg_ranks_by_its_own_score(make: Callable[[], Index]) -> None:
    near = IndexPoint(point_id(1, 1), np.array([0.8, 0.6, 0, 0], np.float32), words(1), "acme")
    nearer = IndexPoint(point_id(1, 2), AXES[0], words(2, 3), "acme")
    lexical = IndexPoint(point_id(1, 3), AXES[3], words(4, 5), "acme")
    async with opened(make()) as index:
        await index.upsert([near, nearer, lexical])
        legs = await index.search(EVERYTHING, dense=AXES[0], sparse=words(4, 5, 1), depth=2)
    assert found(legs.dense) == [(1, 2), (1, 1)]
    assert [score for _, score in legs.dense] == pytest.approx([1.0, 0.8], abs=1e-3)
    assert found(legs.sparse) == [(1, 3), (1, 1)]
    assert legs.sparse[0][1] > legs.sparse[1][1] > 0


async def test_a_rare_word_weighs_more_than_a_common_one(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, n, words=(7,)) for n in range(1, 6)] + [point(1, 6, words=(9,))])
        legs = await index.search(EVERYTHING, dense=None, sparse=words(7, 9), depth=10)
    assert found(legs.sparse)[0] == (1, 6)
    assert legs.dense == []


async def test_a_leg_without_a_vector_stays_empty(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, 1), point(1, 2, words=())])
        assert (await index.search(EVERYTHING, dense=AXES[0], sparse=None, depth=5)).sparse == []
        only_stop_words = await index.search(EVERYTHING, dense=None, sparse=words(), depth=5)
        assert (only_stop_words.dense, only_stop_words.sparse) == ([], [])


async def test_a_point_written_again_replaces_itself(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, 1, dense=0)])
        await index.upsert([point(1, 1, dense=2, words=(8,))])
        assert await index.ids() == [point_id(1, 1)]
        legs = await index.search(EVERYTHING, dense=AXES[2], sparse=words(7), depth=5)
    assert legs.dense[0][1] == pytest.approx(1.0)
    assert legs.sparse == []


async def test_deleted_points_are_not_found(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, n) for n in range(1, 4)])
        await index.delete([point_id(1, 1), point_id(1, 3), point_id(9, 9)])
        legs = await index.search(EVERYTHING, dense=AXES[0], sparse=words(7), depth=5)
        assert found(legs.dense) == found(legs.sparse) == [(1, 2)]


async def test_a_first_and_a_second_tenant_find_their_own_points_only(make: Callable[[], Index]) -> None:
    async def finds(index: Index, tenant: str) -> list[tuple[int, int]]:
        legs = await index.search(IndexFilter(tenant), dense=AXES[0], sparse=words(7), depth=10)
        assert found(legs.dense) == found(legs.sparse)
        return found(legs.dense)

    async with opened(make()) as index:
        await index.upsert([point(1, 1, tenant="acme")])
        assert (await finds(index, "acme"), await finds(index, "umbrella")) == ([(1, 1)], [])
    async with opened(make()) as index:
        assert (await finds(index, "acme"), await finds(index, "umbrella")) == ([(1, 1)], [])
        await index.upsert([point(2, 1, tenant="umbrella")])
        assert (await finds(index, "acme"), await finds(index, "umbrella")) == ([(1, 1)], [(2, 1)])
    async with opened(make()) as index:
        assert (await finds(index, "acme"), await finds(index, "umbrella")) == ([(1, 1)], [(2, 1)])


async def test_a_tenant_finds_its_own_points_only(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, 1, tenant="acme"), point(2, 1, tenant="umbrella"), point(3, 1, tenant="acm")])
        for tenant, generation in (("acme", 1), ("umbrella", 2), ("acm", 3)):
            legs = await index.search(IndexFilter(tenant), dense=AXES[0], sparse=words(7), depth=10)
            assert found(legs.dense) == found(legs.sparse) == [(generation, 1)]
        nobody = await index.search(IndexFilter("nobody"), dense=AXES[0], sparse=words(7), depth=10)
        assert (nobody.dense, nobody.sparse) == ([], [])


# Whom the points of generations 1 to 4 are for, and which of these generations each reader finds.
FOR_GROUPS: dict[int, tuple[str, ...]] = {1: (), 2: ("staff",), 3: ("law", "board"), 4: ('["staff"]',)}
READERS: list[tuple[frozenset[str] | None, set[int]]] = [
    (frozenset(), {1}),
    (frozenset({"staff"}), {1, 2}),
    (frozenset({"board", "staff"}), {1, 2, 3}),
    (frozenset({"sta", "STAFF", ""}), {1}),
    (frozenset({'["staff"]'}), {1, 4}),
    (None, {1, 2, 3, 4}),
]


async def test_a_reader_finds_what_is_for_all_or_for_a_group_of_theirs(make: Callable[[], Index]) -> None:
    def points(generation: int, tenant: str) -> IndexPoint:
        its = labels({"groups": "staff", "": "staff"}, FOR_GROUPS[generation])
        return replace(point(generation, 1, tenant=tenant), labels=its)

    async def check(index: Index) -> None:
        for groups, generations in READERS:
            where = tenant_filter(Scope("acme", groups=groups))
            legs = await index.search(where, dense=AXES[0], sparse=words(7), depth=10)
            assert {generation for generation, _ in found(legs.dense)} == generations, groups
            assert found(legs.dense) == found(legs.sparse)

    async with opened(make()) as index:
        await index.upsert([points(1, "acme")])
        legs = await index.search(tenant_filter(Scope("acme")), dense=AXES[0], sparse=None, depth=10)
        assert found(legs.dense) == [(1, 1)]
        await index.upsert([points(generation, "acme") for generation in (2, 3, 4)])
        await check(index)
    async with opened(make()) as index:
        await check(index)
        await index.upsert([replace(points(2, "umbrella"), id=point_id(9, 1))])
        await check(index)


async def test_a_tenants_scores_do_not_change_with_what_others_have(make: Callable[[], Index]) -> None:
    own = [point(1, n, words=(7,)) for n in range(1, 4)] + [point(1, 4, words=(7, 9))]
    # Another tenant for whom the first's common word is rare, and its rare word common.
    others = [point(2, n, words=(9,), tenant="umbrella") for n in range(1, 30)]

    async def scores(index: Index) -> list[tuple[int, float]]:
        legs = await index.search(EVERYTHING, dense=None, sparse=words(7, 9), depth=10)
        return [(number, round(score, 5)) for number, score in sorted(legs.sparse)]

    async with opened(make()) as index:
        await index.upsert(own)
        alone = await scores(index)
        await index.upsert(others)
        assert await scores(index) == alone
        hers = await index.search(IndexFilter("umbrella"), dense=None, sparse=words(9), depth=1)
        assert hers.sparse[0][1] < alone[-1][1]
    async with opened(make()) as index:
        assert await scores(index) == alone


FILTERS: list[tuple[dict[str, object], set[int]]] = [
    ({}, {1, 2, 3}),
    ({"product": "x"}, {1, 3}),
    ({"product": "x", "year": 2024}, {1}),
    ({"year": [2023, 2024]}, {1, 2}),
    ({"year": 2024.0}, {1}),
    ({"year": "2024"}, set()),
    ({"year": True}, set()),
    ({"public": True}, {2}),
    ({"tags": "red"}, {3}),
    ({"tags": ["blue", "red"]}, {3}),
    ({"price": 1.5}, {2}),
    ({"absent": "x"}, set()),
]


async def test_a_filter_keeps_what_matches_every_key(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert(
            [
                point(1, 1, product="x", year=2024),
                point(2, 1, product="y", year=2023, public=True, price=1.5),
                point(3, 1, product="x", tags=["red", "green"]),
            ]
        )
        for wanted, generations in FILTERS:
            legs = await index.search(tenant_filter(Scope("acme", wanted)), dense=AXES[0], sparse=words(7), depth=10)
            assert {generation for generation, _ in found(legs.dense)} == generations, wanted
            assert {generation for generation, _ in found(legs.sparse)} == generations, wanted


async def test_hidden_generations_are_not_found(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, 1), point(2, 1), point(2, 2), point(3, 1)])
        where = tenant_filter(Scope("acme"), hidden={2, 3})
        legs = await index.search(where, dense=AXES[0], sparse=words(7), depth=10)
    assert found(legs.dense) == found(legs.sparse) == [(1, 1)]


async def test_vectors_come_back_as_written(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, 1, dense=1), point(1, 2, dense=3, words=())])
        vectors = await index.vectors([point_id(1, 1), point_id(1, 2), point_id(5, 5)])
    assert vectors.keys() == {point_id(1, 1), point_id(1, 2)}
    np.testing.assert_allclose(vectors[point_id(1, 2)], AXES[3])


async def test_many_points_are_written_listed_and_deleted(make: Callable[[], Index]) -> None:
    numbers = [point_id(1, n) for n in range(1, 301)]
    async with opened(make()) as index:
        await index.upsert([point(1, n) for n in range(1, 301)])
        assert sorted(await index.ids()) == numbers
        await index.delete(numbers[:250])
        assert sorted(await index.ids()) == numbers[250:]


async def test_points_survive_closing(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, 1), point(2, 5, dense=2)])
    async with opened(make()) as index:
        legs = await index.search(EVERYTHING, dense=AXES[2], sparse=words(7), depth=5)
        assert found(legs.dense)[0] == (2, 5)
        assert len(legs.sparse) == 2


OTHER_SCHEMA = replace(SCHEMA, embedding_model="acme/other", dimension=5)


async def test_each_schema_has_its_own_collection_whatever_differs(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, 1)])
    for change in ({"embedding_model": "acme/other"}, {"sparse_model": "bm25-k2"}, {"owner": "store-2"}):
        async with opened(make(), replace(SCHEMA, **change)) as other:
            assert await other.ids() == []
    async with opened(make()) as index:
        assert await index.ids() == [point_id(1, 1)]


async def test_two_collections_of_a_place_are_open_together_and_keep_apart(make: Callable[[], Index]) -> None:
    async with opened(make()) as index, opened(index.beside(), OTHER_SCHEMA) as beside:
        await index.upsert([point(1, 1), point(2, 1)])
        await beside.upsert([replace(point(1, 1), dense=np.eye(5, dtype=np.float32)[4])])
        await index.delete([point_id(1, 1)])
        assert (await index.ids(), await beside.ids()) == ([point_id(2, 1)], [point_id(1, 1)])
        legs = await beside.search(EVERYTHING, dense=np.eye(5, dtype=np.float32)[4], sparse=words(7), depth=5)
        assert (found(legs.dense), found(legs.sparse)) == ([(1, 1)], [(1, 1)])


async def test_a_place_names_the_collection_that_was_promoted_last(make: Callable[[], Index]) -> None:
    index = make()
    assert await index.named() is None
    async with opened(index), opened(index.beside(), OTHER_SCHEMA) as beside:
        assert await index.named() is None
        for one, schema in ((index, SCHEMA), (beside, OTHER_SCHEMA), (index, SCHEMA), (index, SCHEMA)):
            await one.promote()
            assert await index.named() == await beside.named() == asdict(schema)
    again = make()
    assert await again.named() == asdict(SCHEMA)
    await again.close()


async def test_a_dropped_collection_is_gone_and_the_others_are_not(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        await index.upsert([point(1, 1)])
        async with opened(index.beside(), OTHER_SCHEMA) as beside:
            await beside.upsert([replace(point(1, 1), dense=np.ones(5, np.float32))])
            await beside.promote()
            await index.promote()
            await beside.drop()
            with pytest.raises(IndexUnavailable, match="not open"):
                await beside.ids()
        assert await index.ids() == [point_id(1, 1)]
    async with opened(make(), OTHER_SCHEMA) as again:
        assert await again.ids() == []


async def test_a_closed_index_is_unavailable(make: Callable[[], Index]) -> None:
    index = make()
    with pytest.raises(IndexUnavailable, match="not open"):
        await index.check()
    await index.open(SCHEMA)
    await index.close()
    await index.close()
    with pytest.raises(IndexUnavailable, match="not open"):
        await index.search(EVERYTHING, dense=AXES[0], sparse=None, depth=1)
    with pytest.raises(IndexUnavailable, match="not open"):
        await index.upsert([point(1, 1)])


async def test_a_vector_of_the_wrong_length_is_an_index_error(make: Callable[[], Index]) -> None:
    async with opened(make()) as index:
        with pytest.raises(IndexUnavailable):
            await index.upsert([replace(point(1, 1), dense=np.ones(3, np.float32))])


async def test_an_embedded_index_has_one_owner(tmp_path: Path) -> None:
    async with opened(EdgeIndex(tmp_path / "index")):
        second = EdgeIndex(tmp_path / "index")
        with pytest.raises(IndexUnavailable, match="Another process has the index open"):
            await second.open(SCHEMA)


async def test_an_embedded_index_on_a_full_disk_refuses_to_write_and_to_open_and_works_again_with_room(
    tmp_path: Path,
) -> None:
    with SmallDisk(tmp_path / "disk", megabytes=128) as disk:
        directory = disk.folder / "index"
        async with opened(EdgeIndex(directory)) as index:
            await index.upsert([point(1, 1)])
            disk.fill()
            for refused in (index.upsert([point(1, 2)]), index.delete([point_id(1, 1)])):
                with pytest.raises(IndexOutOfRoom, match="make room"):
                    await refused
            assert await index.ids() == [point_id(1, 1)]
        with pytest.raises(IndexOutOfRoom, match="make room"):
            await EdgeIndex(directory).open(SCHEMA)
        disk.free()
        async with opened(EdgeIndex(directory)) as index:
            await index.upsert([point(1, 2)])
            assert await index.ids() == [point_id(1, 1), point_id(1, 2)]


def shards_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


async def test_an_embedded_index_leaves_no_shard_that_was_dropped_or_never_whole(tmp_path: Path) -> None:
    (tmp_path / "0001").mkdir()
    async with opened(EdgeIndex(tmp_path)) as index:
        assert shards_in(tmp_path) == ["0002"]
        async with opened(index.beside(), OTHER_SCHEMA) as beside:
            assert shards_in(tmp_path) == ["0002", "0003"]
            await beside.drop()
    assert shards_in(tmp_path) == ["0002"]


async def test_a_shard_of_before_shards_had_files_of_their_own_is_found_by_the_pointer(tmp_path: Path) -> None:
    async with opened(EdgeIndex(tmp_path)) as index:
        await index.upsert([point(1, 1)])
        await index.promote()
    (tmp_path / "0001.json").unlink()
    async with opened(EdgeIndex(tmp_path)) as index:
        assert await index.ids() == [point_id(1, 1)]
        async with opened(index.beside(), OTHER_SCHEMA) as beside:
            assert shards_in(tmp_path) == ["0001", "0002"]
            await beside.promote()
    async with opened(EdgeIndex(tmp_path)) as index:
        assert await index.ids() == [point_id(1, 1)]


WRITER = """
import asyncio, sys
from pathlib import Path
from retrieval.edge import EdgeIndex
from tests.index_points import SCHEMA, point

async def main():
    index = EdgeIndex(Path(sys.argv[1]))
    await index.open(SCHEMA)
    n = 0
    while True:
        n += 1
        await index.upsert([point(n, 1)])
        print(n, flush=True)

asyncio.run(main())
"""


def written_until_killed(directory: Path) -> set[int]:
    """Start a writer, kill it after 200 acknowledged points, return all that it acknowledged."""
    command = [sys.executable, "-c", WRITER, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    try:
        acknowledged = [int(process.stdout.readline()) for _ in range(200)]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
    return {point_id(n, 1) for n in (*acknowledged, *map(int, rest.split()))}


async def test_acknowledged_points_survive_kill_nine(tmp_path: Path) -> None:
    acknowledged = written_until_killed(tmp_path)
    async with opened(EdgeIndex(tmp_path)) as index:
        ids = await index.ids()
    assert acknowledged <= set(ids)
    assert len(ids) <= len(acknowledged) + 1


async def test_a_server_that_is_down_is_unavailable() -> None:
    index = QdrantIndex("http://127.0.0.1:1", timeout_seconds=1)
    with pytest.raises(IndexUnavailable, match=r"Qdrant server at http://127\.0\.0\.1:1 failed"):
        await index.open(SCHEMA)
    await index.close()


async def test_a_server_that_hangs_costs_one_caller_a_moment_and_the_others_nothing() -> None:
    async with (
        fake_qdrant() as url,
        FaultyProxy(urlsplit(url).netloc) as proxy,
        opened(QdrantIndex(proxy.url, search_seconds=0.3)) as index,
    ):

        async def search() -> Legs:
            return await index.search(EVERYTHING, dense=AXES[0], sparse=None, depth=1)

        await index.upsert([point(1, 1)])
        await proxy.become("hang")
        with pytest.raises(IndexUnavailable, match="TimeoutError"):
            await search()
        watch = Stopwatch()
        for refused in (search(), index.ids(), index.check()):
            with pytest.raises(IndexUnavailable, match="a moment ago"):
                await refused
        assert watch.seconds < 0.2
        await proxy.become(None)

        async def answers() -> bool:
            with contextlib.suppress(IndexUnavailable):
                return bool((await search()).dense)
            return False

        await until(answers)
        await search()


async def test_a_call_that_the_server_finds_wrong_is_no_reason_to_spare_it_others() -> None:
    async with fake_qdrant() as url, opened(QdrantIndex(url)) as index:
        with pytest.raises(IndexUnavailable, match="UnexpectedResponse"):
            await index.upsert([replace(point(1, 1), dense=np.ones(3, np.float32))])
        assert await index.ids() == []


async def test_a_server_is_told_of_tenants_and_refuses_a_search_that_would_look_at_all_of_them() -> None:
    async with fake_qdrant_server() as (url, server):
        async with opened(QdrantIndex(url)) as index:
            await index.upsert([point(1, 1)])
        (collection,) = server.indexes
        assert server.indexes[collection]["tenant"].is_tenant
        assert server.strict[collection].enabled
        # As an older version left it.
        server.strict.clear()
        async with opened(QdrantIndex(url)) as index:
            assert found((await index.search(EVERYTHING, dense=AXES[0], sparse=None, depth=1)).dense) == [(1, 1)]
            del server.indexes[collection]["tenant"]
            with pytest.raises(IndexUnavailable, match="UnexpectedResponse"):
                await index.search(EVERYTHING, dense=AXES[0], sparse=None, depth=1)


def test_a_point_number_holds_its_generation_and_passage() -> None:
    assert point_key(point_id(2**32, 2**20 - 1)) == (2**32, 2**20 - 1)
    assert point_id(2**32, 2**20 - 1) < 2**53
    with pytest.raises(ValueError, match="at most 1,048,575 passages"):
        point_id(1, 2**20)  # That is the next generation's passage 0.


def test_the_index_version_names_model_dimension_and_splitting() -> None:
    version = SCHEMA.index_version
    assert version.startswith("tiny-model-d4-s1-")
    assert len(version.rsplit("-", 1)[1]) == 8
    assert replace(SCHEMA, owner="store-2").index_version == version
    assert replace(SCHEMA, sparse_model="other").index_version != version
    assert replace(SCHEMA, passage_tokens=100).index_version != version


@pytest.mark.parametrize("bad", [None, {"nested": 1}, [["list"]], [], [None], float("nan"), ["x"] * 101])
def test_a_filter_that_cannot_be_matched_is_refused_by_name(bad: object) -> None:
    with pytest.raises(InvalidFilter, match="'colour'"):
        tenant_filter(Scope("acme", {"colour": bad}))


def test_a_scope_without_a_tenant_finds_nothing_at_all() -> None:
    with pytest.raises(InvalidFilter, match="tenant"):
        tenant_filter(Scope(""))


def test_only_scalars_of_the_metadata_become_labels() -> None:
    assert labels({"a": {"deep": 1}, "b": None, "c": [1, 1, [2]], "d": "ß"}) == ('["c", 1]', '["d", "ß"]')
