"""Documents in, passages out, through the front door, on both indexes; a passage is a line, the embedder a stand-in."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient

from retrieval.documents import Scope, SearchResult
from retrieval.edge import EdgeIndex
from retrieval.embedder import HashingEmbedder
from retrieval.errors import (
    DocumentChanged,
    DocumentNotFound,
    IndexOutOfRoom,
    IndexUnavailable,
    InvalidFilter,
    UnreadableDocument,
    UnsupportedType,
)
from retrieval.index import Index
from retrieval.qdrant import MEMORY, QdrantIndex
from retrieval.retriever import Retriever
from retrieval.variety import Variety
from tests.lines import LineParser, WatchedIndex, split_lines

ACME, OTHER = Scope("acme"), Scope("other")
TOWER = b"The tower is 330 metres tall.\nIt stands in Paris.\nIt opened in 1889."


@pytest.fixture(params=["edge", "qdrant"])
async def make_index(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Callable[[], Index]]:
    if request.param == "edge":
        yield lambda: EdgeIndex(tmp_path / "index")
        return
    client = AsyncQdrantClient(MEMORY)
    yield lambda: QdrantIndex(MEMORY, client=client)
    await client.close()


@asynccontextmanager
async def opened(directory: Path, index: Index, embedder: HashingEmbedder | None = None, **options: Any):
    embedder = embedder or HashingEmbedder()
    async with Retriever(
        directory, embedder=embedder, index=index, parser=LineParser(), split=split_lines, **options
    ) as retriever:
        yield retriever


@pytest.fixture
async def embedder() -> HashingEmbedder:
    return HashingEmbedder()


@pytest.fixture
async def index(make_index: Callable[[], Index]) -> WatchedIndex:
    return WatchedIndex(make_index())


@pytest.fixture
async def retriever(tmp_path: Path, index: WatchedIndex, embedder: HashingEmbedder) -> AsyncIterator[Retriever]:
    async with opened(tmp_path, index, embedder) as retriever:
        yield retriever


def texts(result: SearchResult) -> list[str]:
    return [hit.passage.text for hit in result.hits]


async def test_a_document_is_found_with_both_legs_ranks(retriever: Retriever) -> None:
    added = await retriever.add(ACME, name="tower.txt", content=TOWER, metadata={"year": 2024})
    result = await retriever.search(ACME, "How tall is the tower?", top_k=2)
    best = result.hits[0]
    assert best.passage.text == "The tower is 330 metres tall."
    assert (best.dense_rank, best.sparse_rank) == (1, 1)
    assert best.dense_score is not None
    assert 0 < best.dense_score <= 1
    assert best.sparse_score is not None
    assert best.sparse_score > 0
    assert len(result.hits) == 2
    assert result.hits[0].score > result.hits[1].score
    assert result.index_version == added.document.index_version == retriever.index_version
    assert result.embed_seconds > 0 < result.search_seconds


async def test_what_was_added_can_be_read_back(retriever: Retriever) -> None:
    content = b"# Sights\nThe tower is tall.\nThe bridge is long."
    added = await retriever.add(ACME, name="sights.md", content=content, metadata={"tags": ["a"], "deep": {"x": 1}})
    document = added.document
    assert (added.outcome, added.embedded_passages) == ("created", 2)
    assert (document.title, document.passages, document.length) == ("Sights", 2, len(content))
    assert (document.size_bytes, document.media_type) == (len(content), "text/markdown")
    assert document.version == hashlib.sha256(content).hexdigest()
    assert document == await retriever.document(ACME, document.id)
    source = await retriever.source(ACME, document.id)
    passages = await retriever.passages(ACME, document.id)
    assert source == content.decode()
    assert [source[p.start : p.end] for p in passages] == [p.text for p in passages]
    second = await retriever.passage(ACME, document.id, 2, version=document.version)
    assert second == passages[1]
    assert (second.document_name, second.document_title) == ("sights.md", "Sights")
    assert second in [hit.passage for hit in (await retriever.search(ACME, "bridge")).hits]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
async def test_one_leg_alone_fills_only_its_own_fields(retriever: Retriever, mode: Any) -> None:
    await retriever.add(ACME, name="tower.txt", content=TOWER)
    best = (await retriever.search(ACME, "tower metres", mode=mode)).hits[0]
    assert (best.dense_rank, best.sparse_rank) == ((1, None) if mode == "dense" else (None, 1))
    assert best.score == (best.dense_score if mode == "dense" else best.sparse_score)


async def test_the_same_bytes_again_change_nothing(
    retriever: Retriever, index: WatchedIndex, embedder: HashingEmbedder
) -> None:
    first = await retriever.add(ACME, name="tower.txt", content=TOWER, metadata={"year": 2024})
    before = (embedder.encoded_texts, index.written)
    again = await retriever.add(ACME, name="tower.txt", content=TOWER, metadata={"year": 2024})
    assert (again.outcome, again.embedded_passages, again.document) == ("unchanged", 0, first.document)
    assert (embedder.encoded_texts, index.written) == before


async def test_a_changed_document_replaces_the_old_one(
    retriever: Retriever, index: WatchedIndex, embedder: HashingEmbedder
) -> None:
    first = await retriever.add(ACME, name="tower.txt", content=TOWER)
    before = embedder.encoded_texts
    second = await retriever.add(ACME, name="tower.txt", content=b"It stands in Paris.\nThe tower is 331 metres tall.")
    assert (second.outcome, second.embedded_passages) == ("replaced", 1)
    assert embedder.encoded_texts == before + 1
    assert second.document.id == first.document.id
    assert second.document.created_at == first.document.created_at < second.document.updated_at
    found = texts(await retriever.search(ACME, "The tower is 330 metres tall. It opened in 1889."))
    assert sorted(found) == ["It stands in Paris.", "The tower is 331 metres tall."]
    assert len(await index.ids()) == 2
    with pytest.raises(DocumentChanged, match=second.document.version):
        await retriever.passage(ACME, first.document.id, 1, version=first.document.version)


async def test_going_back_to_an_older_version_works(retriever: Retriever) -> None:
    for content in (TOWER, b"Something else.", TOWER):
        added = await retriever.add(ACME, name="tower.txt", content=content)
    assert added.outcome == "replaced"
    assert len(texts(await retriever.search(ACME, "tower Paris opened something"))) == 3


async def test_changed_metadata_is_filtered_by_at_once_without_embedding(retriever: Retriever) -> None:
    await retriever.add(ACME, name="tower.txt", content=TOWER, metadata={"year": 2023})
    changed = await retriever.add(ACME, name="tower.txt", content=TOWER, metadata={"year": 2024})
    assert (changed.outcome, changed.embedded_passages) == ("replaced", 0)
    assert len(texts(await retriever.search(Scope("acme", {"year": 2024}), "tower"))) == 3
    assert texts(await retriever.search(Scope("acme", {"year": 2023}), "tower")) == []


async def test_documents_of_the_same_text_are_told_apart(retriever: Retriever) -> None:
    one = await retriever.add(ACME, name="one.txt", content=TOWER)
    two = await retriever.add(ACME, name="two.txt", content=TOWER)
    named = await retriever.add(ACME, name="one.txt", content=TOWER, document_id="mine")
    assert len({one.document.id, two.document.id, named.document.id}) == 3
    await retriever.delete(ACME, one.document.id)
    found = {hit.passage.document_id for hit in (await retriever.search(ACME, "tower", top_k=9)).hits}
    assert found == {two.document.id, "mine"}


async def test_a_deleted_document_is_gone(retriever: Retriever, index: WatchedIndex) -> None:
    added = await retriever.add(ACME, name="tower.txt", content=b"A secret word: xyzzy.")
    await retriever.delete(ACME, added.document.id)
    assert texts(await retriever.search(ACME, "secret xyzzy")) == []
    assert await retriever.documents(ACME) == []
    assert await index.ids() == []
    for read in (retriever.document, retriever.passages, retriever.source, retriever.delete):
        with pytest.raises(DocumentNotFound, match=added.document.id):
            await read(ACME, added.document.id)
    again = await retriever.add(ACME, name="tower.txt", content=b"A secret word: xyzzy.")
    assert again.outcome == "created"


async def test_one_document_does_not_fill_the_hits(retriever: Retriever) -> None:
    for name, count in (("many.txt", 6), ("few.txt", 2)):
        lines = [f"The kettle boils water, part {n} of {name}." for n in range(count)]
        await retriever.add(ACME, name=name, content="\n".join(lines).encode())
    every = await retriever.search(ACME, "The kettle boils water", top_k=8)
    assert Counter(hit.passage.document_name for hit in every.hits) == {"many.txt": 6, "few.txt": 2}
    some = await retriever.search(ACME, "The kettle boils water", top_k=3, variety=Variety(per_document=2))
    shown = Counter(hit.passage.document_name for hit in some.hits)
    assert (max(shown.values()), shown.total()) == (2, 3)
    assert [text for text in texts(every) if text in texts(some)] == texts(some), "The order stays."


async def test_what_is_said_already_waits_for_what_is_not(retriever: Retriever) -> None:
    said = "The kettle boils one litre of water in ninety seconds."
    for name, text in (("a", said), ("b", said), ("c", "A kettle has a lid of steel, and its cord is long.")):
        await retriever.add(ACME, name=name, content=text.encode())
    plain = await retriever.search(ACME, said, top_k=3)
    assert texts(plain)[:2] == [said, said]
    varied = await retriever.search(ACME, said, top_k=2, variety=Variety(mmr=0.3))
    assert varied.hits == (plain.hits[0], plain.hits[2]), "Each hit says of itself what it said."
    assert (await retriever.search(ACME, said, top_k=3, variety=Variety(mmr=1.0))).hits == plain.hits


async def test_an_empty_collection_and_an_empty_question_find_nothing(retriever: Retriever) -> None:
    assert texts(await retriever.search(ACME, "anything")) == []
    await retriever.add(ACME, name="tower.txt", content=TOWER)
    assert texts(await retriever.search(ACME, " \n")) == []
    assert len(texts(await retriever.search(ACME, "the of and"))) == 3


async def test_a_document_without_passages_is_kept(retriever: Retriever) -> None:
    added = await retriever.add(ACME, name="empty.txt", content=b"\n")
    assert (added.document.passages, await retriever.passages(ACME, added.document.id)) == (0, [])


async def test_a_very_long_question_is_searched_by_its_ends(retriever: Retriever) -> None:
    await retriever.add(ACME, name="tower.txt", content=TOWER)
    question = "Here is a log.\n" + "noise " * 100_000 + "\nWhen was it opened, 1889?"
    assert texts(await retriever.search(ACME, question, top_k=1)) == ["It opened in 1889."]


async def test_no_door_leads_to_another_tenants_documents(retriever: Retriever) -> None:
    mine = await retriever.add(ACME, name="tower.txt", content=TOWER)
    theirs = await retriever.add(OTHER, name="tower.txt", content=b"Other tower text.")
    assert mine.document.id != theirs.document.id
    assert texts(await retriever.search(OTHER, "The tower is 330 metres tall.")) == ["Other tower text."]
    assert [document.id for document in await retriever.documents(OTHER)] == [theirs.document.id]
    for read in (retriever.document, retriever.passages, retriever.source, retriever.delete):
        with pytest.raises(DocumentNotFound):
            await read(OTHER, mine.document.id)
    with pytest.raises(DocumentNotFound):
        await retriever.passage(OTHER, mine.document.id, 1)
    taken = await retriever.add(OTHER, name="x.txt", content=b"Mine now?", document_id=mine.document.id)
    assert taken.outcome == "created"
    assert (await retriever.document(ACME, mine.document.id)).name == "tower.txt"


async def test_documents_are_listed_in_pages(retriever: Retriever) -> None:
    for name in "dbace":
        await retriever.add(ACME, name=name, content=name.encode(), media_type="text/plain", document_id=name)
    first = await retriever.documents(ACME, limit=3)
    rest = await retriever.documents(ACME, limit=3, after=first[-1].id)
    assert [document.id for document in (*first, *rest)] == list("abcde")


async def test_a_passage_that_is_not_there_is_not_found(retriever: Retriever) -> None:
    added = await retriever.add(ACME, name="tower.txt", content=TOWER)
    with pytest.raises(DocumentNotFound, match="no passage 4"):
        await retriever.passage(ACME, added.document.id, 4)


async def test_a_bad_filter_is_refused_before_anything_is_computed(
    retriever: Retriever, embedder: HashingEmbedder
) -> None:
    with pytest.raises(InvalidFilter, match="'year'"):
        await retriever.search(Scope("acme", {"year": {"gte": 2024}}), "tower")
    assert embedder.encoded_texts == 0


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [("x.txt", b"unreadable", UnreadableDocument), ("x.png", b"\x89PNG", UnsupportedType)],
)
async def test_a_file_that_cannot_be_read_changes_nothing(
    retriever: Retriever, name: str, content: bytes, error: type[Exception]
) -> None:
    added = await retriever.add(ACME, name="tower.txt", content=TOWER)
    with pytest.raises(error):
        await retriever.add(ACME, name=name, content=content, document_id=added.document.id)
    assert await retriever.document(ACME, added.document.id) == added.document


async def test_while_a_document_is_replaced_only_the_old_version_is_found(
    retriever: Retriever, index: WatchedIndex
) -> None:
    await retriever.add(ACME, name="tower.txt", content=b"The tower, first edition.")
    index.hold("upsert")
    replacing = asyncio.create_task(
        retriever.add(ACME, name="tower.txt", content=b"The tower, second edition.\nThe tower, more of it.")
    )
    await index.reached["upsert"].wait()
    assert len(await index.ids()) == 2
    assert texts(await retriever.search(ACME, "tower edition")) == ["The tower, first edition."]
    index.hold("delete")
    index.gates["upsert"].set()
    await index.reached["delete"].wait()
    assert len(await index.ids()) == 3
    assert sorted(texts(await retriever.search(ACME, "tower edition"))) == [
        "The tower, more of it.",
        "The tower, second edition.",
    ]
    index.gates["delete"].set()
    await replacing
    assert len(await index.ids()) == 2


async def test_searches_during_replacements_see_exactly_one_version(retriever: Retriever) -> None:
    def edition(n: int) -> bytes:
        return f"Edition {n} begins.\nEdition {n} goes on.\nEdition {n} ends.".encode()

    await retriever.add(ACME, name="book.txt", content=edition(0))
    done = asyncio.Event()

    async def read() -> int:
        searches = 0
        while not done.is_set():
            found = texts(await retriever.search(ACME, "edition", top_k=10))
            assert len(found) == 3
            assert len({text.split()[1] for text in found}) == 1
            searches += 1
        return searches

    readers = [asyncio.create_task(read()) for _ in range(4)]
    for n in range(1, 16):
        await retriever.add(ACME, name="book.txt", content=edition(n))
    done.set()
    assert all(await asyncio.gather(*readers))


async def test_the_same_document_added_many_times_at_once_ends_in_one_version(
    retriever: Retriever, index: WatchedIndex
) -> None:
    await asyncio.gather(*(retriever.add(ACME, name="x.txt", content=f"text {n}".encode()) for n in range(8)))
    assert len(texts(await retriever.search(ACME, "text"))) == len(await index.ids()) == 1


async def test_a_failed_write_leaves_the_old_version(retriever: Retriever, index: WatchedIndex) -> None:
    added = await retriever.add(ACME, name="tower.txt", content=TOWER)
    index.failing.add("upsert")
    with pytest.raises(IndexUnavailable, match="made to fail"):
        await retriever.add(ACME, name="tower.txt", content=b"A new tower.")
    index.failing.clear()
    assert await retriever.document(ACME, added.document.id) == added.document
    assert len(texts(await retriever.search(ACME, "tower", top_k=9))) == 3


async def test_a_cancelled_ingest_leaves_the_old_version(retriever: Retriever, index: WatchedIndex) -> None:
    added = await retriever.add(ACME, name="tower.txt", content=TOWER)
    index.hold("upsert")
    adding = asyncio.create_task(retriever.add(ACME, name="tower.txt", content=b"A new tower."))
    await index.reached["upsert"].wait()
    adding.cancel()
    await asyncio.gather(adding, return_exceptions=True)
    assert adding.cancelled()
    assert await retriever.document(ACME, added.document.id) == added.document
    index.gates["upsert"].set()
    assert (await retriever.add(ACME, name="tower.txt", content=b"A new tower.")).outcome == "replaced"


async def test_a_cancellation_during_the_commit_takes_effect_after_it(
    retriever: Retriever, index: WatchedIndex
) -> None:
    added = await retriever.add(ACME, name="tower.txt", content=TOWER)
    index.hold("delete")
    deleting = asyncio.create_task(retriever.delete(ACME, added.document.id))
    await index.reached["delete"].wait()
    deleting.cancel()
    index.gates["delete"].set()
    await asyncio.gather(deleting, return_exceptions=True)
    assert deleting.cancelled()
    assert await index.ids() == []


async def test_points_that_cannot_be_removed_stay_invisible_and_go_at_the_next_start(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    index = WatchedIndex(make_index())
    async with opened(tmp_path, index) as retriever:
        added = await retriever.add(ACME, name="tower.txt", content=TOWER)
        await retriever.add(ACME, name="stays.txt", content=b"The tower stays.")
        index.failing.add("delete")
        await retriever.delete(ACME, added.document.id)
        assert texts(await retriever.search(ACME, "tower")) == ["The tower stays."]
        assert len(await index.ids()) == 4
    index = WatchedIndex(make_index())
    async with opened(tmp_path, index) as retriever:
        assert texts(await retriever.search(ACME, "tower")) == ["The tower stays."]
        assert len(await index.ids()) == 1


async def test_lost_points_are_embedded_again_at_the_next_start(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    index = WatchedIndex(make_index())
    async with opened(tmp_path, index) as retriever:
        await retriever.add(ACME, name="tower.txt", content=TOWER, metadata={"year": 2024})
        await index.delete((await index.ids())[1:])
    embedder = HashingEmbedder()
    async with opened(tmp_path, WatchedIndex(make_index()), embedder) as retriever:
        assert embedder.encoded_texts == 2
        assert len(texts(await retriever.search(Scope("acme", {"year": 2024}), "tower"))) == 3


async def test_everything_is_there_after_reopening(tmp_path: Path, make_index: Callable[[], Index]) -> None:
    async with opened(tmp_path, make_index()) as retriever:
        first = await retriever.add(ACME, name="tower.txt", content=TOWER)
        before = await retriever.search(ACME, "How tall?")
    async with opened(tmp_path, make_index()) as retriever:
        after = await retriever.search(ACME, "How tall?")
        assert after.hits == before.hits
        assert (await retriever.add(ACME, name="tower.txt", content=TOWER)).outcome == "unchanged"
        assert (await retriever.add(ACME, name="tower.txt", content=b"New.")).outcome == "replaced"
        assert texts(await retriever.search(ACME, "tower new")) == ["New."]
        assert first.document.id == (await retriever.documents(ACME))[0].id


async def test_a_second_process_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, EdgeIndex(tmp_path / "index")):
        with pytest.raises(IndexUnavailable, match="Another process has"):
            async with opened(tmp_path, EdgeIndex(tmp_path / "index")):
                pass
    async with opened(tmp_path, EdgeIndex(tmp_path / "index")) as retriever:
        await retriever.ready()


async def test_ready_tells_the_truth(tmp_path: Path, index: WatchedIndex) -> None:
    async with opened(tmp_path, index) as retriever:
        await retriever.ready()
        index.failing.add("check")
        with pytest.raises(IndexUnavailable, match="made to fail"):
            await retriever.ready()
    with pytest.raises(IndexUnavailable, match="not open"):
        await retriever.ready()
    assert retriever.index_version == ""


async def test_embeddings_and_similarities_come_from_the_same_model(retriever: Retriever) -> None:
    vectors = await retriever.embed(["the tower", "a cat"])
    assert vectors.shape == (2, 64)
    assert vectors.dtype == np.float32
    near, far = await retriever.similarity("the tower", ["the tower", "a cat"])
    assert near == pytest.approx(1.0)
    assert far == pytest.approx(float(vectors[0] @ vectors[1]))
    assert await retriever.similarity("alone", []) == []
    assert retriever.embedding_model == "hashing"


WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_retriever import ACME, EdgeIndex, opened

async def main():
    directory = Path(sys.argv[1])
    async with opened(directory, EdgeIndex(directory / "index")) as retriever:
        for n in range(10_000):
            await retriever.add(ACME, name=f"{n % 20}.txt", content=f"Number {n}.\\nMore of {n}.".encode())
            print(n, flush=True)

asyncio.run(main())
"""


def written_until_killed(directory: Path, documents: int) -> int:
    """Start a writer, kill it after so many acknowledged documents, return the last it acknowledged."""
    command = [sys.executable, "-c", WRITER, str(directory), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        for _ in range(documents):
            assert process.stdout.readline()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
    return documents - 1 + len(rest.split())


@pytest.mark.parametrize("documents", [25, 47])
async def test_acknowledged_documents_survive_kill_nine(tmp_path: Path, documents: int) -> None:
    last = await asyncio.to_thread(written_until_killed, tmp_path, documents)
    async with opened(tmp_path, EdgeIndex(tmp_path / "index")) as retriever:
        for n in range(last - 19, last + 1):
            found = texts(await retriever.search(ACME, f"Number {n}", top_k=50))
            # The one being written when the process ended may have replaced the oldest.
            assert f"Number {n}." in found or n == last - 19
            assert len(found) == 40


class LateIndex(WatchedIndex):
    """A server that is down when retrieval opens, until `is_up` is set."""

    def __init__(self, index: Index, error: IndexUnavailable | None = None) -> None:
        super().__init__(index)
        self.error = error or IndexUnavailable("the server is down")
        self.is_up = False
        self.opened = asyncio.Event()

    async def open(self, schema: Any) -> None:
        if not self.is_up:
            raise self.error
        await self.index.open(schema)
        self.opened.set()


async def test_retrieval_opens_without_a_server_that_is_down_and_finds_it_later(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    index = LateIndex(make_index())
    async with opened(tmp_path, index, retry_seconds=0.001) as retriever:
        for refused in (
            retriever.ready(),
            retriever.search(ACME, "tower"),
            retriever.add(ACME, name="tower.txt", content=TOWER),
            retriever.delete(ACME, "any"),
        ):
            with pytest.raises(IndexUnavailable, match="the server is down"):
                await refused
        index.is_up = True
        await index.opened.wait()
        while not retriever.index_version:
            await asyncio.sleep(0)
        await retriever.add(ACME, name="tower.txt", content=TOWER)
        assert texts(await retriever.search(ACME, "How tall is the tower?", top_k=1)) == [
            "The tower is 330 metres tall."
        ]


async def test_a_local_index_without_room_on_its_disk_is_waited_for(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    index = LateIndex(make_index(), IndexOutOfRoom("make room"))
    async with opened(tmp_path, index) as retriever:
        with pytest.raises(IndexUnavailable, match="make room"):
            await retriever.search(ACME, "tower")


async def test_a_local_index_that_cannot_be_opened_fails_the_start(
    tmp_path: Path, make_index: Callable[[], Index]
) -> None:
    with pytest.raises(IndexUnavailable, match="the server is down"):
        async with opened(tmp_path, LateIndex(make_index())):
            pass
