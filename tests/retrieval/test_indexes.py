"""Index versions: built beside the live one, followed, compared, switched and gone back from, on both indexes."""

import asyncio
import json
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import MISSING, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qdrant_client import AsyncQdrantClient

from retrieval.documents import Scope
from retrieval.edge import EdgeIndex
from retrieval.embedder import HashingEmbedder
from retrieval.errors import (
    IndexMismatch,
    IndexUnavailable,
    IndexVersionNotFound,
    IndexVersionState,
)
from retrieval.evaluation.comparing import compare
from retrieval.evaluation.sets import EvaluationSet, Question
from retrieval.index import Index, IndexSchema, Vector
from retrieval.indexes import Indexes
from retrieval.jobs import Ingestion, Job, Limits
from retrieval.jobs.building import Builds
from retrieval.jobs.nouns import Item
from retrieval.making import Making
from retrieval.qdrant import MEMORY, QdrantIndex
from retrieval.retriever import Retriever
from retrieval.versions import IndexVersion, State
from tests.lines import LineParser, WatchedIndex, split_lines
from tests.properties import examples

ACME, OTHER = Scope("acme"), Scope("other")
TOWER = b"The tower is 330 metres tall.\nIt stands in Paris.\nIt opened in 1889."
UNCOMPARED = {"uncompared": True}
SCHEMA = IndexSchema("model", 64, 1, 200, "bm25", "store")


class Marked(HashingEmbedder):
    """An embedder of a model of its own; it can be away."""

    def __init__(self, model: str, dimension: int = 64) -> None:
        super().__init__(dimension)
        self.model_id = model
        self.is_away = False

    async def embed(self, texts: Any, kind: Any, *, bulk: bool = False) -> Vector:
        if self.is_away:
            raise IndexUnavailable(f"{self.model_id} is away")
        return await super().embed(texts, kind, bulk=bulk)


@pytest.fixture(params=["edge", "qdrant"])
async def make_index(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Callable[[], Index]]:
    if request.param == "edge":
        yield lambda: EdgeIndex(tmp_path / "index")
        return
    client = AsyncQdrantClient(MEMORY)
    yield lambda: QdrantIndex(MEMORY, client=client)
    await client.close()


def joined_lines(parsed: Any, /, *, target_tokens: int, **options: Any) -> list[Any]:
    """A line is a passage, and with longer passages two lines are one."""
    lines: list[Any] = split_lines(parsed, **options)
    if target_tokens < 300:
        return lines
    pairs = [lines[at : at + 2] for at in range(0, len(lines), 2)]
    ends = [(pair[0].start, pair[-1].end) for pair in pairs]
    return [
        replace(pair[0], n=n, start=start, end=end, text=parsed.text[start:end])
        for n, (pair, (start, end)) in enumerate(zip(pairs, ends, strict=True), 1)
    ]


@asynccontextmanager
async def opened(
    directory: Path, index: Index, now: Marked | None = None, coming: Marked | None = None, tokens: int = 200
) -> AsyncIterator[Retriever]:
    async with Retriever(
        directory,
        embedder=now or Marked("old"),
        index=index,
        parser=LineParser(),
        split=joined_lines,
        coming=Making(coming, tokens) if coming else None,
    ) as retriever:
        yield retriever


def nothing_more(_: str) -> Callable[[sqlite3.Connection], None]:
    return lambda connection: None


async def built(indexes: Indexes) -> IndexVersion:
    """Build what is coming, to its end."""
    version = await indexes.build(nothing_more)
    follower = indexes.follower(version.number)
    assert follower
    async with asyncio.timeout(20):
        await follower.settled.wait()
    return await indexes.version(version.id)


async def states(indexes: Indexes) -> list[str]:
    return [each.state for each in await indexes.versions()]


async def texts(retriever: Retriever, query: str, scope: Scope = ACME, **options: Any) -> list[str]:
    result = await retriever.search(scope, query, top_k=100, **options)
    return sorted(hit.passage.text for hit in result.hits)


async def test_a_version_is_built_beside_the_live_one_switched_to_gone_back_from_and_dropped(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    async with opened(tmp_path, make_index(), Marked("old"), Marked("new", 32), tokens=400) as retriever:
        indexes, old = retriever.indexes, retriever.index_version
        document = (await retriever.add(ACME, name="tower.txt", content=TOWER)).document
        ready = await built(indexes)
        assert (ready.state, ready.documents, ready.passages, ready.missing_documents) == ("ready", 1, 2, 0)
        assert (retriever.index_version, await states(indexes)) == (old, ["live", "ready"])
        assert len(await texts(retriever, "tower")) == 3

        live = await indexes.switch(ready.id, **UNCOMPARED)
        assert (live.state, retriever.index_version, retriever.embedding_model) == ("live", ready.id, "new")
        assert await texts(retriever, "tower Paris") == [
            "It opened in 1889.",
            "The tower is 330 metres tall.\nIt stands in Paris.",
        ]
        current = await retriever.document(ACME, document.id)
        assert (current.index_version, current.passages) == (ready.id, 2)
        assert (await retriever.add(ACME, name="tower.txt", content=TOWER)).outcome == "unchanged"
        await retriever.add(ACME, name="bridge.txt", content=b"The bridge is long.")

        back = await indexes.rollback()
        assert (back.id, retriever.index_version, await states(indexes)) == (old, old, ["live", "retired"])
        assert len(await texts(retriever, "tower bridge")) == 4
        assert (await retriever.document(ACME, document.id)).passages == 3
        await indexes.drop(ready.id)
        assert await states(indexes) == ["live"]
        with pytest.raises(IndexVersionNotFound, match="no index version"):
            await indexes.switch(ready.id)
    async with opened(tmp_path, make_index(), Marked("old")) as retriever:
        assert len(await texts(retriever, "tower bridge")) == 4


async def test_what_is_live_stays_live_when_it_is_opened_again_whichever_setting_names_its_model(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    async with opened(tmp_path, make_index(), Marked("old"), Marked("new", 32)) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER)
        new = (await built(retriever.indexes)).id
        await retriever.indexes.switch(new, **UNCOMPARED)
    async with opened(tmp_path, make_index(), Marked("old"), Marked("new", 32)) as retriever:
        assert (retriever.index_version, retriever.embedding_model) == (new, "new")
        assert len(await texts(retriever, "tower")) == 3
        old = next(each for each in await retriever.indexes.versions() if each.state == "retired")
        with pytest.raises(IndexVersionState, match="set it to 'new'"):
            await retriever.indexes.drop(old.id)
    async with opened(tmp_path, make_index(), Marked("new", 32)) as retriever:
        assert len(await texts(retriever, "tower")) == 3
        with pytest.raises(IndexVersionState, match="is not open: name its embedding model 'old'"):
            await retriever.indexes.rollback()
        assert retriever.indexes.trouble(old) == "No setting names its embedding model, 'old'."
        await retriever.indexes.drop(old.id)
        assert await states(retriever.indexes) == ["live"]


@pytest.mark.parametrize("settings", [("other", 64), ("old", 32)], ids=["model", "dimension"])
async def test_a_start_with_another_embedder_is_refused_and_says_what_helps(
    tmp_path: Path, make_index: Callable[[], Index], settings: tuple[str, int]
) -> None:
    async with opened(tmp_path, make_index()) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER)
    named = rf"embedding model 'old' \(64 .*retrieval.embedding_model names '{settings[0]}' \({settings[1]}"
    with pytest.raises(IndexMismatch, match=named) as refused:
        async with opened(tmp_path, make_index(), Marked(*settings)):
            pass
    assert re.search(r"retrieval.next_embedding_model.*`hallmark index build`", str(refused.value))
    async with opened(tmp_path, make_index(), Marked(*settings), Marked("old")) as retriever:
        assert len(await texts(retriever, "tower")) == 3


async def test_without_its_index_a_store_is_embedded_by_what_the_settings_name(tmp_path: Path) -> None:
    async with opened(tmp_path, EdgeIndex(tmp_path / "index")) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER)
    shutil.rmtree(tmp_path / "index")
    async with opened(tmp_path, EdgeIndex(tmp_path / "index"), Marked("other", 32)) as retriever:
        assert len(await texts(retriever, "tower")) == 3
        (version,) = await retriever.indexes.versions()
        (document,) = await retriever.documents(ACME)
        assert version.id == retriever.index_version == document.index_version
        assert version.schema.embedding_model == "other"


async def test_a_collection_of_another_store_is_refused(tmp_path: Path, make_index: Callable[[], Index]) -> None:
    async with opened(tmp_path / "one", make_index()):
        pass
    with pytest.raises(IndexMismatch, match="another document store: owner is"):
        async with opened(tmp_path / "two", make_index()):
            pass


async def test_what_cannot_be_done_says_why(tmp_path: Path, make_index: Callable[[], Index]) -> None:
    new = Marked("new")
    async with opened(tmp_path, make_index(), Marked("old"), new) as retriever:
        indexes = retriever.indexes
        await retriever.add(ACME, name="tower.txt", content=TOWER)
        with pytest.raises(IndexVersionState, match="No version was live before"):
            await indexes.rollback()
        with pytest.raises(IndexVersionState, match="is live: switch to another"):
            await indexes.drop(retriever.index_version)
        new.is_away = True
        version = await indexes.build(nothing_more)
        for doing in (indexes.switch(version.id, **UNCOMPARED), retriever.search(ACME, "x", index_version=version.id)):
            with pytest.raises(IndexVersionState, match="is not ready: 1 documents are missing"):
                await doing
        with pytest.raises(IndexVersionState, match="already, building"):
            await indexes.build(nothing_more)
        new.is_away = False
        follower = indexes.follower(version.number)
        assert follower
        await follower.settled.wait()
        with pytest.raises(IndexVersionState, match="has not been compared"):
            await indexes.switch(version.id)
        await indexes.switch(version.id, **UNCOMPARED)
        with pytest.raises(IndexVersionState, match="is live already"):
            await indexes.switch(version.id)
        with pytest.raises(IndexVersionState, match="is what the settings would build"):
            await indexes.build(nothing_more)


async def test_a_comparison_ranks_by_both_versions_and_allows_the_switch(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    async with opened(tmp_path, make_index(), Marked("old"), Marked("new", 32)) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER)
        await retriever.add(OTHER, name="tower.txt", content=b"Not for ACME.")
        version = await built(retriever.indexes)
        questions = (Question("1", "How tall is the tower?", {"tower.txt": 1}), Question("2", "Who?", {"gone.txt": 1}))
        await compare(retriever, ACME, EvaluationSet("q", questions), version.id)
        kept = (await retriever.indexes.version(version.id)).comparison
        assert kept
        assert (kept["live"], kept["questions"]) == (retriever.index_version, 2)
        assert [(each["name"], each["value"], each["live"]) for each in kept["figures"]] == [
            ("ndcg@10", 0.5, 0.5),
            ("recall@10", 0.5, 0.5),
            ("mrr@10", 0.5, 0.5),
        ]
        await retriever.indexes.switch(version.id)
        assert retriever.index_version == version.id


async def test_vectors_are_used_again_where_only_the_splitting_is_another(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    embedder = Marked("old")
    async with opened(tmp_path, make_index(), embedder, embedder, tokens=400) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER)
        await retriever.add(ACME, name="note.txt", content=b"One line.")
        before = embedder.encoded_texts
        version = await built(retriever.indexes)
        assert embedder.encoded_texts - before == 1  # Two lines that are one passage now; the others are known.
        await retriever.indexes.switch(version.id, **UNCOMPARED)
        assert "One line." in await texts(retriever, "one line")


async def test_a_build_is_a_job_that_goes_on_at_the_next_start_and_can_be_cancelled(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    new = Marked("new")
    new.is_away = True
    async with opened(tmp_path, make_index(), Marked("old"), new) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER)
        async with Ingestion(retriever, tmp_path / "spool") as ingestion:
            version, job = await ingestion.build(ACME, who="me")
            async with asyncio.timeout(20):
                while not (shown := await ingestion.job(ACME, job.id)).running or not shown.running[0].stage:
                    await asyncio.sleep(0.002)
            (item,) = shown.running
            assert (shown.kind, item.name, item.passages_done, item.passages) == ("build", version.id, 0, 3)
    async with opened(tmp_path, make_index(), Marked("old"), Marked("new")) as retriever:
        async with Ingestion(retriever, tmp_path / "spool") as ingestion:
            shown = await ended(ingestion, job.id)
            assert (shown.state, shown.outcomes) == ("done", {"built": 1})
        assert await states(retriever.indexes) == ["live", "ready"]
        await retriever.indexes.drop(version.id)

    new = Marked("new")
    new.is_away = True
    async with opened(tmp_path, make_index(), Marked("old"), new) as retriever:
        async with Ingestion(retriever, tmp_path / "spool") as ingestion:
            _, first = await ingestion.build(ACME)
            assert (await ingestion.cancel(ACME, first.id)).state == "cancelled"
            assert await states(retriever.indexes) == ["live"]
            again, second = await ingestion.build(ACME)
            await retriever.indexes.drop(again.id)
            assert (await ended(ingestion, second.id)).state == "cancelled"
        await retriever.indexes.build(nothing_more)  # As if killed between the end of its job and its own.
        async with Ingestion(retriever, tmp_path / "spool"):
            async with asyncio.timeout(20):
                while await states(retriever.indexes) != ["live"]:
                    await asyncio.sleep(0.002)


class DroppedMeanwhile:
    """A retriever whose only index version somebody else is dropping, and has dropped when another wants to.

    `items` are the jobs that build it, `state` is what is seen of it, and `written` what is written of them.
    """

    def __init__(self, state: State, *items: Item) -> None:
        self.indexes = self.store = self.file = self
        self.looks = asyncio.Semaphore(0)
        self.written: list[str] = []
        self._state = state
        self._items = list(items)

    async def ready(self) -> None: ...

    async def versions(self) -> list[IndexVersion]:
        self.looks.release()
        return [IndexVersion(2, SCHEMA, self._state, None, datetime.now(UTC), *[None] * 3, *[0] * 4)]

    async def write(self, what: Callable[..., Any], *_: Any) -> list[Item]:
        self.written.append(what.__name__)
        items, self._items = self._items, []
        return items

    async def drop(self, version_id: str) -> None:
        raise IndexVersionNotFound(version_id)


@asynccontextmanager
async def followed(retriever: Any, looks: int) -> AsyncIterator[None]:
    builds = Builds(retriever, SimpleNamespace(live={}), Limits())
    builds.start()
    async with asyncio.timeout(5):
        for _ in range(looks):
            await retriever.looks.acquire()
            builds.wake()
    yield
    await builds.stop()


async def test_builds_are_followed_on_where_somebody_else_drops_the_same_version() -> None:
    async with followed(DroppedMeanwhile("building"), looks=2):
        pass


async def test_a_build_whose_version_is_being_dropped_is_cancelled_and_not_done() -> None:
    facts = {"name": SCHEMA.index_version, "action": "build", "state": "running", "metadata": {}, "attempts": 1}
    unset = {field.name: None for field in fields(Item) if field.default is MISSING}
    item = Item(**{**unset, **facts})
    async with followed(retriever := DroppedMeanwhile("dropped", item), looks=3):
        assert retriever.written[:2] == ["claim_builds", "give_up"]


async def ended(ingestion: Ingestion, job_id: str) -> Job:
    async with asyncio.timeout(20):
        while not (job := await ingestion.job(ACME, job_id)).finished_at:
            await asyncio.sleep(0.002)
    return job


async def test_an_embedder_that_is_away_delays_its_version_and_nothing_else(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    new = Marked("new")
    async with opened(tmp_path, make_index(), Marked("old"), new) as retriever:
        version = await built(retriever.indexes)
        new.is_away = True
        await retriever.add(ACME, name="tower.txt", content=TOWER)
        assert len(await texts(retriever, "tower")) == 3
        follower = retriever.indexes.follower(version.number)
        assert follower
        async with asyncio.timeout(20):
            while follower.trouble != "new is away":
                await asyncio.sleep(0)
        assert (await retriever.indexes.version(version.id)).missing_documents == 1
        new.is_away = False
        await retriever.indexes.switch(version.id, **UNCOMPARED)  # It waits for what the version lacks.
        assert len(await texts(retriever, "tower")) == 3


async def test_a_document_that_is_being_embedded_while_the_version_changes_is_embedded_for_the_new_one(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    index = WatchedIndex(make_index())
    async with opened(tmp_path, index, Marked("old"), Marked("new", 32)) as retriever:
        version = await built(retriever.indexes)
        index.hold("upsert")
        adding = asyncio.create_task(retriever.add(ACME, name="tower.txt", content=TOWER))
        await index.reached["upsert"].wait()
        await retriever.indexes.switch(version.id, **UNCOMPARED)
        index.gates["upsert"].set()
        added = await adding
        assert added.document.index_version == version.id
        assert len(await texts(retriever, "tower")) == 3
        index.gates.clear()
        await retriever.indexes.rollback()
        assert len(await texts(retriever, "tower")) == 3
        assert len(await index.ids()) == 3


class Mixing(Exception):
    """A vector met an index of another model."""


class Strict(WatchedIndex):
    """An index that knows which model its vectors are of: the first number of each says so."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self.model = 0.0
        self.searches = 0

    async def open(self, schema: Any) -> None:
        self.model = MODELS[schema.embedding_model]
        await self.index.open(schema)

    def beside(self) -> "Strict":
        return Strict(self.index.beside())

    async def search(self, where: Any, *, dense: Vector | None, sparse: Any, depth: int) -> Any:
        self.searches += 1
        await asyncio.sleep(0)
        self.check_vector(dense)
        return await self.index.search(where, dense=dense, sparse=sparse, depth=depth)

    async def upsert(self, points: Any) -> None:
        for point in points:
            self.check_vector(point.dense)
        await self.index.upsert(points)

    def check_vector(self, vector: Vector | None) -> None:
        if vector is not None and abs(float(vector[0]) - self.model) > 0.02:
            raise Mixing


MODELS = {"old": 0.9, "new": -0.9}


class Signed(Marked):
    """Its vectors say by their first number which model made them."""

    def encode(self, texts: list[str], kind: Any) -> Vector:
        rows = super().encode(texts, kind)
        rows[:, 0] = 0.0
        rows *= (1 - MODELS[self.model_id] ** 2) ** 0.5 / (rows**2).sum(axis=1, keepdims=True) ** 0.5
        rows[:, 0] = MODELS[self.model_id]
        return rows


async def test_searches_while_the_version_changes_never_mix_models_and_find_all_each_time(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    async with opened(tmp_path, Strict(make_index()), Signed("old"), Signed("new")) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER)
        await built(retriever.indexes)
        is_over = False
        seen: set[tuple[str, str | None]] = set()

        async def search() -> None:
            while not is_over:
                result = await retriever.search(ACME, "How tall is the tower?", top_k=9)
                assert len(result.hits) == 3
                seen.add((result.index_version, result.embedding_model))

        searching = [asyncio.create_task(search()) for _ in range(4)]
        versions = [each.id for each in await retriever.indexes.versions()]
        for turn in range(6):
            await asyncio.sleep(0.005)
            await retriever.indexes.switch(versions[(turn + 1) % 2], **UNCOMPARED)
        is_over = True
        await asyncio.gather(*searching)
        assert seen == {(versions[0], "old"), (versions[1], "new")}


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "delete", "switch"]),
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.sampled_from(["tower", "bridge", "river", "gold"]), min_size=1, max_size=4),
    ),
    max_size=12,
)


@given(before=CHANGES, during=CHANGES)
@examples(20)
def test_any_changes_during_a_build_leave_what_a_fresh_build_would(before: list[Any], during: list[Any]) -> None:
    asyncio.run(both_ways(before, during))


async def both_ways(before: list[Any], during: list[Any]) -> None:
    from tempfile import TemporaryDirectory

    client = AsyncQdrantClient(MEMORY)
    with TemporaryDirectory() as folder:
        index = QdrantIndex(MEMORY, client=client)
        async with opened(Path(folder), index, Marked("old"), Marked("new", 32), tokens=400) as retriever:
            indexes, there = retriever.indexes, dict[str, bytes]()
            await change(retriever, [each for each in before if each[0] != "switch"], there)
            version = await indexes.build(nothing_more)
            await change(retriever, during, there)
            follower = indexes.follower(version.number)
            if follower:
                await follower.settled.wait()
            if retriever.index_version != version.id:
                await indexes.switch(version.id, **UNCOMPARED)
            expected = sorted(
                "\n".join(content.decode().split("\n")[at : at + 2])
                for content in there.values()
                for at in range(0, len(content.decode().split("\n")), 2)
            )
            assert await texts(retriever, "tower bridge river gold") == expected
            lines = sorted(line for content in there.values() for line in content.decode().split("\n"))
            await indexes.rollback()
            assert await texts(retriever, "tower bridge river gold") == lines
            assert len(await index.ids()) == len(lines)
    await client.close()


async def change(retriever: Retriever, changes: list[Any], there: dict[str, bytes]) -> None:
    for action, name, words in changes:
        if action == "put":
            there[name] = "\n".join(f"{word} {name} {n}" for n, word in enumerate(words)).encode()
            await retriever.add(ACME, name=name, content=there[name])
        elif action == "delete" and there.pop(name, None):
            (document,) = [each for each in await retriever.documents(ACME) if each.name == name]
            await retriever.delete(ACME, document.id)
        elif action == "switch":
            for version in await retriever.indexes.versions():
                if version.state in ("ready", "retired"):
                    await retriever.indexes.switch(version.id, **UNCOMPARED)


async def test_a_store_of_before_there_were_versions_goes_on_with_what_it_has(tmp_path: Path) -> None:
    """The file and the pointer as the release before left them."""
    async with opened(tmp_path, EdgeIndex(tmp_path / "index")) as retriever:
        await retriever.add(ACME, name="tower.md", content=b"# Sights\n" + TOWER)
        before = retriever.index_version
    with sqlite3.connect(tmp_path / "documents.db") as connection:
        connection.executescript(BACKWARDS)
    connection.close()
    (tmp_path / "index" / "0001.json").unlink()
    embedder = Marked("old")
    async with opened(tmp_path, EdgeIndex(tmp_path / "index"), embedder, Marked("new", 32), tokens=400) as retriever:
        assert (retriever.index_version, embedder.encoded_texts) == (before, 0)
        assert len(await texts(retriever, "tower")) == 3
        assert (await retriever.add(ACME, name="tower.md", content=b"# Sights\n" + TOWER)).outcome == "unchanged"
        version = await built(retriever.indexes)
        await retriever.indexes.switch(version.id, **UNCOMPARED)
        assert len(await texts(retriever, "tower")) == 2


BACKWARDS = """
    DROP TABLE index_versions; DROP TABLE cuts; DROP TABLE origins; DROP VIEW passage_rows;
    DROP INDEX job_items_running;
    CREATE TABLE older AS SELECT generation, n, text, start, "end", page, heading_path FROM passages;
    DROP TABLE passages;
    CREATE TABLE passages (
        generation INTEGER NOT NULL, n INTEGER NOT NULL, text TEXT NOT NULL, start INTEGER NOT NULL,
        "end" INTEGER NOT NULL, page INTEGER, heading_path TEXT NOT NULL,
        PRIMARY KEY (generation, n)
    ) WITHOUT ROWID;
    INSERT INTO passages SELECT * FROM older;
    DROP TABLE older;
    CREATE VIEW passage_rows AS
        SELECT p.generation, p.n, d.id, d.version, p.text, p.start, p."end", p.page, p.heading_path, d.name, d.title
        FROM passages p JOIN documents d ON d.generation = p.generation;
    ALTER TABLE sources DROP COLUMN structure_zlib;
    PRAGMA user_version = 3;
"""


async def test_points_of_an_older_form_are_written_anew_at_the_start_without_embedding(tmp_path: Path) -> None:
    async with opened(tmp_path, EdgeIndex(tmp_path / "index")) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER)
    with sqlite3.connect(tmp_path / "documents.db") as connection:
        ((stored,),) = connection.execute("SELECT schema FROM index_versions").fetchall()
        older = json.dumps({**json.loads(stored), "schema_version": 0})
        connection.execute("UPDATE index_versions SET schema = ?, id = 'older'", (older,))
    connection.close()
    for file in ("0001.json", "current.json"):
        path = tmp_path / "index" / file
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "schema": json.loads(older)}))
    embedder = Marked("old")
    async with opened(tmp_path, EdgeIndex(tmp_path / "index"), embedder) as retriever:
        assert (embedder.encoded_texts, await states(retriever.indexes)) == (0, ["live"])
        assert len(await texts(retriever, "tower")) == 3
