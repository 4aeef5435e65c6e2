"""A service with a reranker: what a search, a record and the metrics say of it; and what the settings compose."""

import pytest
from pydantic import ValidationError

from app.retrieval_wiring import embedder_of, second_look_of
from app.settings import IngestionSettings, RetrievalSettings
from retrieval.embedder import SentenceTransformerEmbedder
from tests.fake_models import fake_models
from tests.fake_tgi import FakeTGI
from tests.service import live_service

WORDS = "how tall is the tower"


async def test_a_search_and_a_record_say_what_the_reranker_thought_and_took(tmp_path) -> None:
    async with fake_models() as (fake, url), FakeTGI() as tgi:
        settings = {"retrieval": {"rerank_url": url}}
        async with (
            live_service(tmp_path, engine_url=tgi.url, settings=settings, tenants=1) as service,
            service.tenant() as api,
        ):
            for n, text in enumerate(("tower tower tower", "how tall the tower is", "the tower is tall")):
                await api.add(f"{n}.txt", text)
            found = (await api.client.post("/v1/search", json={"query": WORDS, "top_k": 2})).json()
            assert [hit["passage"]["text"] for hit in found["hits"]] == ["how tall the tower is", "the tower is tall"]
            assert [hit["rerank_score"] for hit in found["hits"]] == [1.0, 0.8]
            assert found["reranking_model"] == "acme/embedder"
            assert found["rerank_seconds"] > 0
            await api.answer(WORDS)
            assert [passage["rerank_score"] for passage in (await api.record())["passages"]] == [1.0, 0.8, 0.2]
            fake.failures = [500] * 4
            failed = (await api.client.post("/v1/search", json={"query": WORDS})).json()
            assert (failed["reranking_model"], failed["hits"][0]["rerank_score"]) == (None, None)
            shown = dict(line.rsplit(" ", 1) for line in (await api.client.get("/metrics")).text.splitlines())
    assert float(shown["hallmark_rerank_seconds_count"]) == 3
    assert float(shown["hallmark_rerank_failures_total"]) == 1
    assert float(shown["hallmark_searches_by_words_total"]) == 0
    assert float(shown["hallmark_embedding_cache_hits_total"]) >= 2
    assert float(shown["hallmark_embedding_cache_misses_total"]) >= 1


async def test_the_settings_compose_an_embedder_in_the_process_or_on_a_server() -> None:
    assert isinstance(embedder_of(RetrievalSettings()), SentenceTransformerEmbedder)
    for ingestion in (None, IngestionSettings(embedding_threads=0)):
        assert embedder_of(RetrievalSettings(), ingestion).process is None
    assert embedder_of(RetrievalSettings(), IngestionSettings()).process is not None
    assert second_look_of(RetrievalSettings()) is None
    second_look = second_look_of(RetrievalSettings(rerank_model="some/model", rerank_depth=7))
    assert second_look is not None
    assert second_look.depth == 7
    async with fake_models() as (fake, url):
        wanted = RetrievalSettings(embedding_url=url, embedding_token="secret", embedding_cache=1)
        async with embedder_of(wanted) as embedder:
            assert (embedder.model_id, embedder.dimension) == ("acme/embedder", 16)
        assert fake.tokens == {"Bearer secret"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embedding_url": "http://h", "embedding_dialect": "openai"}, "embedding_model: name the model"),
        ({"rerank_url": "http://h", "rerank_model": "m"}, "exclude each other"),
        ({"embedding_url": "http://h", "embedding_backend": "onnx-int8"}, "embedding_backend: the server"),
        ({"rerank_depth": 0}, "rerank_depth"),
        ({"embedding_url": "h"}, "must start with http"),
    ],
)
def test_settings_that_do_not_fit_are_told(given, message) -> None:
    with pytest.raises(ValidationError, match=message):
        RetrievalSettings(**given)
