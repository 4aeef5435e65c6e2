"""How the retrieval settings become parts: the embedder, the second look, the index, and the retriever over them."""

from pathlib import Path

from app.settings import RetrievalSettings, Settings
from retrieval.edge import EdgeIndex
from retrieval.embedder import PACKAGED_MODEL, Embedder, SentenceTransformerEmbedder
from retrieval.index import Index
from retrieval.parsers import Parser
from retrieval.reranking import CrossEncoderReranker, RemoteReranker, SecondLook
from retrieval.retriever import Retriever


def open_retriever(settings: Settings, data_dir: Path, parser: Parser, embedder: Embedder | None) -> Retriever:
    """Compose the service's retriever; `embedder` takes the place of the one in the settings."""
    wanted, server = settings.retrieval, settings.qdrant
    directory = data_dir / "retrieval"

    def index() -> Index:
        if server.url is None:
            return EdgeIndex(directory / "index" / server.collection)
        from retrieval.qdrant import QdrantIndex  # Half a second of import that most do not need.

        key = server.api_key.get_secret_value() if server.api_key else None
        return QdrantIndex(
            server.url, alias=server.collection, api_key=key, search_seconds=server.search_timeout_seconds
        )

    return Retriever(
        directory,
        embedder=embedder or embedder_of(wanted),
        index=index(),
        parser=parser,
        fusion=wanted.fusion,
        retry_seconds=5.0 if server.url else None,
        passage_tokens=wanted.passage_tokens,
        second_look=second_look_of(wanted),
        words_alone=wanted.embedding_fallback == "words",
    )


def embedder_of(wanted: RetrievalSettings) -> Embedder:
    """The embedder: on a server where a URL is set, else in this process."""
    if wanted.embedding_url is None:
        return SentenceTransformerEmbedder(
            wanted.embedding_model, threads=wanted.embedding_threads, cache_size=wanted.embedding_cache
        )
    from retrieval.remote_embedder import RemoteEmbedder

    token = wanted.embedding_token
    return RemoteEmbedder(
        wanted.embedding_url,
        dialect=wanted.embedding_dialect,
        model=wanted.embedding_model if wanted.embedding_model != PACKAGED_MODEL else None,
        token=token.get_secret_value() if token else None,
        timeout_seconds=wanted.embedding_timeout_seconds,
        retries=wanted.embedding_retries,
        cache_size=wanted.embedding_cache,
    )


def second_look_of(wanted: RetrievalSettings) -> SecondLook | None:
    """The second look at what was found; None where it is off."""
    if wanted.rerank_url is not None:
        token = wanted.rerank_token
        remote = RemoteReranker(
            wanted.rerank_url,
            token=token.get_secret_value() if token else None,
            timeout_seconds=wanted.rerank_timeout_seconds,
        )
        return SecondLook(remote, depth=wanted.rerank_depth)
    if wanted.rerank_model is not None:
        return SecondLook(
            CrossEncoderReranker(wanted.rerank_model, threads=wanted.embedding_threads), depth=wanted.rerank_depth
        )
    return None
