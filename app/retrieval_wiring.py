"""How the retrieval settings become parts: the embedder, the second look, the index, the retriever, and its jobs."""

from pathlib import Path

from app.settings import IngestionSettings, RetrievalSettings, Settings
from retrieval.addresses import Allowed
from retrieval.children import usable_cores
from retrieval.edge import EdgeIndex
from retrieval.embedder import PACKAGED_MODEL, Embedder, SentenceTransformerEmbedder
from retrieval.embedding_process import EmbeddingProcess, Recipe
from retrieval.fetching import Fetcher
from retrieval.index import Index
from retrieval.jobs import Ingestion, Limits, Tally
from retrieval.making import Making
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

    now = embedder or embedder_of(wanted, settings.ingestion)
    return Retriever(
        directory,
        embedder=now,
        index=index(),
        parser=parser,
        coming=_coming(settings, now),
        fusion=wanted.fusion,
        retry_seconds=5.0 if server.url else None,
        passage_tokens=wanted.passage_tokens,
        second_look=second_look_of(wanted),
        words_alone=wanted.embedding_fallback == "words",
    )


def _coming(settings: Settings, now: Embedder) -> Making | None:
    """What the next index version is made with, where the settings say that it is another."""
    wanted = settings.retrieval
    passage_tokens = wanted.next_passage_tokens or wanted.passage_tokens
    if wanted.next_embedding_model is None and wanted.next_embedding_url is None:
        return Making(now, passage_tokens) if wanted.next_passage_tokens else None
    changes = {
        "embedding_model": wanted.next_embedding_model or PACKAGED_MODEL,
        "embedding_url": wanted.next_embedding_url,
        "embedding_dialect": wanted.next_embedding_dialect,
        "embedding_token": wanted.next_embedding_token,
    }
    return Making(embedder_of(wanted.model_copy(update=changes), settings.ingestion), passage_tokens)


def embedding_names(wanted: RetrievalSettings, retriever: Retriever) -> tuple[str, ...]:
    """What the model that embeds at present may be called: its name in the settings, and its full id."""
    named = wanted.next_embedding_model if retriever.indexes.is_coming_live else wanted.embedding_model
    return tuple(dict.fromkeys((named or retriever.embedding_model, retriever.embedding_model)))


def open_ingestion(settings: Settings, data_dir: Path, retriever: Retriever, tally: Tally) -> Ingestion:
    """Compose what takes documents in, above an open retriever."""
    wanted = settings.ingestion
    return Ingestion(
        retriever,
        data_dir / "retrieval" / "spool",
        limits=Limits(
            max_documents=wanted.max_waiting_documents,
            max_bytes=wanted.max_waiting_bytes,
            max_attempts=wanted.max_attempts,
            keep_jobs=wanted.keep_jobs,
        ),
        workers=wanted.workers,
        reserve_bytes=settings.limits.disk_reserve_bytes,
        tally=tally,
        fetcher=_fetcher(settings) if wanted.fetch_urls else None,
    )


def _fetcher(settings: Settings) -> Fetcher:
    return Fetcher(
        allowed=Allowed.of(settings.ingestion.fetch_allowed),
        max_bytes=settings.limits.max_document_bytes,
        seconds=settings.ingestion.fetch_seconds,
    )


def embedder_of(wanted: RetrievalSettings, ingestion: IngestionSettings | None = None) -> Embedder:
    """The embedder: on a server where a URL is set, else in this process, and where documents come in one beside it."""
    if wanted.embedding_url is None:
        return SentenceTransformerEmbedder(
            wanted.embedding_model,
            backend=wanted.embedding_backend,
            threads=wanted.embedding_threads,
            cache_size=wanted.embedding_cache,
            process=_process_of(wanted, ingestion) if ingestion else None,
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


def _process_of(wanted: RetrievalSettings, ingestion: IngestionSettings) -> EmbeddingProcess | None:
    """What embeds beside this process: on as many threads as are set, or as there are cores but one; none on 0."""
    threads = ingestion.embedding_threads
    if threads is None:
        threads = max(1, usable_cores() - 1)
    recipe = Recipe(wanted.embedding_model, threads, backend=wanted.embedding_backend)
    return EmbeddingProcess(recipe, idle_seconds=ingestion.embedding_idle_seconds) if threads else None


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
