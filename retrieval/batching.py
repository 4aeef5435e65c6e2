"""One worker thread around a synchronous model, and a queue that makes batches of what waits.

The main rule: nobody waits for a batch to fill. A batch is whatever queued up while the last one ran, so a lone
question starts at once and 32 concurrent ones share a pass, at under half of the CPU each. Questions go before
documents, which are encoded in batches short enough that a question never waits long behind an ingest.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import numpy as np

from retrieval.errors import IndexUnavailable
from retrieval.index import Vector

TextKind = Literal["query", "document"]

MAX_BATCH_TEXTS = 32
MAX_BATCH_TOKENS = 1024
"""About 80 ms of one core for MiniLM: the longest a question waits behind a batch of documents."""
MAX_WAITING_TEXTS = 4096
_QUESTIONS_PER_BULK_BATCH = 4


@dataclass(slots=True, eq=False)
class _Job:
    """One caller's texts; `vectors` fill in as batches come back."""

    kind: TextKind
    texts: list[str]
    done: asyncio.Future[Vector]
    order: deque[int]
    vectors: dict[int, Vector] = field(default_factory=dict)


class BatchingEmbedder:
    """The queue, the cache and the worker thread around a synchronous model; see the module's rule."""

    def __init__(self, *, cache_size: int, max_waiting_texts: int) -> None:
        self._cache: OrderedDict[tuple[TextKind, str], Vector] = OrderedDict()
        self._cache_size = cache_size
        self._max_waiting_texts = max_waiting_texts
        self._waiting_texts = 0
        self._urgent: deque[_Job] = deque()
        self._bulk: deque[_Job] = deque()
        self._urgent_batches = 0
        self._wake = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="embedder")
        self._runner: asyncio.Task[None] | None = None

    @property
    def dimension(self) -> int:
        """Numbers per vector."""
        raise NotImplementedError

    def load(self) -> None:
        """Make the model ready; called once, on the worker thread."""

    def encode(self, texts: list[str], kind: TextKind) -> Vector:
        """Embed one batch; called on the worker thread."""
        raise NotImplementedError

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the model's tokens per text, special tokens left out."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().run_in_executor(self._pool, self.load)
        self._runner = asyncio.create_task(self._run(), name="embedder")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        runner, self._runner = self._runner, None
        if runner:
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)
        _fail_all([(job, 0) for job in (*self._urgent, *self._bulk)], IndexUnavailable("The embedder is closed."))
        self._urgent.clear()
        self._bulk.clear()
        self._pool.shutdown(wait=False)

    async def embed(self, texts: Sequence[str], kind: TextKind, *, bulk: bool = False) -> Vector:
        """See `Embedder.embed`. Vectors of texts that are not bulk are cached by the exact text."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        if bulk:
            return await self._submit(list(texts), kind, self._bulk)
        found = {text: vector for text in texts if (vector := self._cached(kind, text)) is not None}
        if missing := [text for text in dict.fromkeys(texts) if text not in found]:
            vectors = await self._submit(missing, kind, self._urgent)
            found.update(zip(missing, vectors, strict=True))
            for text in missing:
                self._cache[kind, text] = found[text]
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return np.stack([found[text] for text in texts])

    def _cached(self, kind: TextKind, text: str) -> Vector | None:
        vector = self._cache.get((kind, text))
        if vector is not None:
            self._cache.move_to_end((kind, text))
        return vector

    async def _submit(self, texts: list[str], kind: TextKind, queue: deque[_Job]) -> Vector:
        if self._runner is None or self._runner.done():
            raise IndexUnavailable("The embedder is not open.")
        if self._waiting_texts + len(texts) > self._max_waiting_texts and self._waiting_texts:
            raise IndexUnavailable(f"The embedder has {self._waiting_texts} texts waiting; try again in a moment.")
        # Texts of like length share a batch, so that little of it is padding.
        order = deque(sorted(range(len(texts)), key=lambda i: len(texts[i])))
        job = _Job(kind, texts, asyncio.get_running_loop().create_future(), order)
        self._waiting_texts += len(texts)
        queue.append(job)
        self._wake.set()
        try:
            return await job.done
        finally:
            self._waiting_texts -= len(texts)

    async def _run(self) -> None:
        """Encode batch after batch for as long as the embedder is open."""
        loop = asyncio.get_running_loop()
        while True:
            batch = self._next_batch()
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            kind = batch[0][0].kind
            texts = [job.texts[i] for job, i in batch]
            try:
                vectors = await loop.run_in_executor(self._pool, self.encode, texts, kind)
            except asyncio.CancelledError:
                _fail_all(batch, IndexUnavailable("The embedder is closed."))
                raise
            except Exception as error:  # noqa: BLE001 - the task's outermost edge: one bad batch must not end the others
                failure = IndexUnavailable(f"The embedding model failed: {type(error).__name__}.")
                failure.__cause__ = error
                _fail_all(batch, failure)
                continue
            for (job, i), vector in zip(batch, vectors, strict=True):
                _deliver(job, i, vector)

    def _next_batch(self) -> list[tuple[_Job, int]]:
        """Take from the urgent queue, but every fifth time from the bulk queue, so that neither starves."""
        urgent, bulk = _drop_finished(self._urgent), _drop_finished(self._bulk)
        if urgent and (not bulk or self._urgent_batches < _QUESTIONS_PER_BULK_BATCH):
            self._urgent_batches += 1
            return _take(urgent)
        self._urgent_batches = 0
        return _take(bulk)


def _drop_finished(queue: deque[_Job]) -> deque[_Job]:
    """Forget jobs that were delivered, failed or whose caller has left."""
    while queue and (queue[0].done.done() or not queue[0].order):
        queue.popleft()
    return queue


def _take(queue: deque[_Job]) -> list[tuple[_Job, int]]:
    """Take texts of one kind from the front until the batch is full; a token is taken for about four characters."""
    batch: list[tuple[_Job, int]] = []
    longest = 0
    for job in queue:
        if job.done.done():
            continue
        if batch and job.kind != batch[0][0].kind:
            break
        while job.order:
            longest = max(longest, min(len(job.texts[job.order[0]]) // 4, 512))
            if batch and (len(batch) >= MAX_BATCH_TEXTS or longest * (len(batch) + 1) > MAX_BATCH_TOKENS):
                return batch
            batch.append((job, job.order.popleft()))
    return batch


def _deliver(job: _Job, i: int, vector: Vector) -> None:
    job.vectors[i] = vector
    if len(job.vectors) == len(job.texts) and not job.done.done():
        job.done.set_result(np.stack([job.vectors[i] for i in range(len(job.texts))]))


def _fail_all(batch: list[tuple[_Job, int]], error: IndexUnavailable) -> None:
    for job, _ in batch:
        if not job.done.done():
            job.done.set_exception(error)
