"""A second look at what was found, by a model that reads question and passage together: off unless it is set up.

The main rule: it changes the order of hits and nothing else, and where it fails the order stays as it was, and says so.
A score is from 0 to 1.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from retrieval.documents import SearchResult
from retrieval.errors import IndexUnavailable
from retrieval.remote import RemoteModel

_BATCH_TEXTS = 32
_log = logging.getLogger(__name__)
MAX_WAITING_SEARCHES = 64


class Reranker(Protocol):
    """What tells how well passages answer a question."""

    @property
    def model_id(self) -> str:
        """Which model it is."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """Score each text, 0 to 1.

        Raises:
            IndexUnavailable: it does not answer, or too much is waiting.
        """
        ...


class SecondLook:
    """Orders the first `depth` hits of a search by what a reranker thinks of them; use it in an `async with` block."""

    def __init__(self, reranker: Reranker, *, depth: int = 20) -> None:
        self.depth = depth
        self.failures = 0
        self._reranker = reranker

    async def __aenter__(self) -> Self:
        await self._reranker.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._reranker.__aexit__(kind, error, trace)

    async def order(self, question: str, result: SearchResult, top_k: int) -> SearchResult:
        """Give the first `top_k` hits in the reranker's order, or as they were where it does not answer."""
        hits = result.hits
        if not hits:
            return result
        started = time.perf_counter()
        try:
            scores = await self._reranker.scores(question, [hit.passage.embedded_text for hit in hits])
        except IndexUnavailable as error:
            if not self.failures:
                _log.warning("Hits stay in the order of the fusion: %s", error)
            self.failures += 1
            return replace(result, hits=hits[:top_k], rerank_seconds=time.perf_counter() - started)
        # The sort is stable: of equals the one that the fusion put first comes first.
        order = sorted(range(len(hits)), key=lambda at: -scores[at])[:top_k]
        return replace(
            result,
            hits=tuple(replace(hits[at], score=scores[at], rerank_score=scores[at]) for at in order),
            rerank_seconds=time.perf_counter() - started,
            reranking_model=self._reranker.model_id,
        )


class _Info(msgspec.Struct):
    model_id: str
    max_client_batch_size: int = _BATCH_TEXTS


class _Rank(msgspec.Struct):
    index: int
    score: float


class RemoteReranker:
    """Text Embeddings Inference with a reranker, by `/rerank`. One that is down at the start is met once it is up."""

    def __init__(self, url: str, *, token: str | None = None, timeout_seconds: float = 2.0, retries: int = 1) -> None:
        self._server = RemoteModel(url, what="reranker", token=token, timeout_seconds=timeout_seconds, retries=retries)
        self._model_id = ""
        self._batch_texts = _BATCH_TEXTS

    @property
    def model_id(self) -> str:
        """What the server says it serves; its address until it was asked."""
        return self._model_id or self._server.url

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.__aexit__(kind, error, trace)

    async def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """See `Reranker.scores`."""
        if not self._model_id:
            info = await self._server.call("/info", None, _Info)
            self._batch_texts = max(1, min(_BATCH_TEXTS, info.max_client_batch_size))
            self._model_id = info.model_id
        size = self._batch_texts
        batches = [list(texts[start : start + size]) for start in range(0, len(texts), size)]
        scored = await asyncio.gather(*(self._batch(question, each) for each in batches))
        return [score for scores in scored for score in scores]

    async def _batch(self, question: str, texts: list[str]) -> list[float]:
        body = {"query": question, "texts": texts, "truncate": True, "raw_scores": False, "return_text": False}
        ranks = await self._server.call("/rerank", body, list[_Rank])
        scores = {rank.index: rank.score for rank in ranks}
        if len(ranks) != len(texts) or scores.keys() != set(range(len(texts))):
            raise self._server.wrong(f"it ranked {len(ranks)} of {len(texts)} texts")
        return [scores[at] for at in range(len(texts))]


class CrossEncoderReranker:
    """A sentence-transformers CrossEncoder on a thread of its own, one search after the other."""

    def __init__(self, model: str, *, threads: int = 1, max_waiting_searches: int = MAX_WAITING_SEARCHES) -> None:
        self._source = model
        self._threads = threads
        self._max_waiting = max_waiting_searches
        self._waiting = 0
        self._model: Any = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reranker")

    @property
    def model_id(self) -> str:
        """The hub id or folder it was loaded from."""
        return self._source

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().run_in_executor(self._pool, self._load)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """See `Reranker.scores`."""
        if self._waiting >= self._max_waiting:
            raise IndexUnavailable(f"The reranker has {self._waiting} searches waiting; try again in a moment.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._scores, question, list(texts))
        finally:
            self._waiting -= 1

    # What follows runs on the pool's thread.

    def _load(self) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        torch.set_num_threads(self._threads)
        try:
            self._model = CrossEncoder(self._source, device="cpu", num_labels=1, activation_fn=torch.nn.Sigmoid())
        except (OSError, ValueError, ImportError) as error:
            raise IndexUnavailable(
                f"The reranking model {self._source!r} cannot be loaded: name a folder or a hub id of a CrossEncoder."
            ) from error

    def _scores(self, question: str, texts: list[str]) -> list[float]:
        try:
            found = self._model.predict([(question, text) for text in texts], show_progress_bar=False)
        except Exception as error:  # The library maps nothing.
            raise IndexUnavailable(f"The reranking model failed: {type(error).__name__}.") from error
        return [float(score) for score in found]
