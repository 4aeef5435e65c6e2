"""Two worker threads around a synchronous model, and queues that make batches of what waits.

The main rule: nobody waits for a batch to fill. A batch is whatever queued up while the last one ran, so a lone
question starts at once and 32 concurrent ones share a pass, at under half of the CPU each. Documents are encoded apart,
so that no question waits behind them: many in a process of their own, where there is one; a few, or without one, on a
second thread, and in short batches while questions come.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType
from typing import Self

import numpy as np

from retrieval.caching import TextKind, VectorCache
from retrieval.embedding_process import PROBE, EmbeddingProcess
from retrieval.errors import IndexUnavailable
from retrieval.index import Vector

MAX_BATCH_TEXTS = 32
MAX_BATCH_TOKENS = 1024
"""About 80 ms of one core for MiniLM."""
BUSY_BATCH_TOKENS = 256
"""Of a batch of documents while questions come: about 20 ms in which a question shares the processor with it."""
_BUSY_SECONDS = 1.0
"""So long after a question others are expected."""
_GIVE_WAY_SECONDS = 0.25
"""The longest that documents wait for questions before their next batch, so that they never starve."""
MAX_WAITING_TEXTS = 4096


@dataclass(slots=True, eq=False)
class _Job:
    """One caller's texts; `vectors` fill in as batches come back."""

    kind: TextKind
    texts: list[str]
    done: asyncio.Future[Vector]
    order: deque[int]
    vectors: dict[int, Vector] = field(default_factory=dict)


class BatchingEmbedder(ABC):
    """The queue, the cache and the worker thread around a synchronous model; see the module's rule."""

    def __init__(self, *, cache_size: int, max_waiting_texts: int, process: EmbeddingProcess | None = None) -> None:
        self.cache = VectorCache(cache_size)
        self.process = process
        """Where many documents are encoded; None encodes them here."""
        self._max_waiting_texts = max_waiting_texts
        self._waiting_texts = 0
        self._urgent = _Lane("embedder")
        self._bulk = _Lane("embedder-bulk")
        self._last_question_at = -_BUSY_SECONDS
        self._lanes: list[asyncio.Task[None]] = []

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Numbers per vector."""

    def load(self) -> None:  # noqa: B027 - a model may have nothing to make ready.
        """Make the model ready; called once, on a worker thread."""

    def settle(self) -> None:  # noqa: B027 - likewise.
        """Prepare a worker thread; called once on each, after `load`."""

    @abstractmethod
    def encode(self, texts: list[str], kind: TextKind) -> Vector:
        """Embed one batch; called on either worker thread, on both at once too."""

    @abstractmethod
    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the model's tokens per text, special tokens left out."""

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().run_in_executor(self._urgent.pool, self.load)
        for lane in (self._urgent, self._bulk):
            await asyncio.get_running_loop().run_in_executor(lane.pool, self.settle)
        if self.process:
            probe = asyncio.get_running_loop().run_in_executor(self._urgent.pool, self.encode, [PROBE], "document")
            self.process.open((await probe)[0])
        self._lanes = [
            asyncio.create_task(self._answer_questions(), name="embedder"),
            asyncio.create_task(self._embed_documents(), name="bulk embedder"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lanes, self._lanes = self._lanes, []
        for task in lanes:
            task.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
        if self.process:
            await self.process.close()
        for lane in (self._urgent, self._bulk):
            _fail_all([(job, 0) for job in lane.jobs], IndexUnavailable("The embedder is closed."))
            lane.jobs.clear()
            lane.pool.shutdown(wait=False)

    async def embed(self, texts: Sequence[str], kind: TextKind, *, bulk: bool = False) -> Vector:
        """See `Embedder.embed`. Vectors of texts that are not bulk are cached."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        if bulk and self.process and self.process.takes(len(texts)):
            with self._places(len(texts)):
                return await self.process.embed(texts, kind)
        if bulk:
            return await self._submit(list(texts), kind, self._bulk)
        found = {text: vector for text in texts if (vector := self.cache.get(kind, text)) is not None}
        if missing := [text for text in dict.fromkeys(texts) if text not in found]:
            vectors = await self._submit(missing, kind, self._urgent)
            found.update(zip(missing, vectors, strict=True))
            for text in missing:
                self.cache.put(kind, text, found[text])
        return np.stack([found[text] for text in texts])

    async def _submit(self, texts: list[str], kind: TextKind, lane: "_Lane") -> Vector:
        if not self._lanes or any(task.done() for task in self._lanes):
            raise IndexUnavailable("The embedder is not open.")
        with self._places(len(texts)):
            # Texts of like length share a batch, so that little of it is padding.
            order = deque(sorted(range(len(texts)), key=lambda i: len(texts[i])))
            job = _Job(kind, texts, asyncio.get_running_loop().create_future(), order)
            lane.jobs.append(job)
            lane.wake.set()
            return await job.done

    @contextmanager
    def _places(self, texts: int) -> Iterator[None]:
        """Have so many texts wait, if that is not too many; they alone never are."""
        if self._waiting_texts + texts > self._max_waiting_texts and self._waiting_texts:
            raise IndexUnavailable(f"The embedder has {self._waiting_texts} texts waiting; try again in a moment.")
        self._waiting_texts += texts
        try:
            yield
        finally:
            self._waiting_texts -= texts

    async def _answer_questions(self) -> None:
        """Encode batch after batch of what is asked, for as long as the embedder is open."""
        lane = self._urgent
        while True:
            if batch := _take(_drop_finished(lane.jobs), MAX_BATCH_TOKENS):
                lane.idle.clear()
                await self._encode(lane, batch)
                self._last_question_at = monotonic()
            else:
                lane.idle.set()
                await lane.sleep()

    async def _embed_documents(self) -> None:
        """Encode batch after batch of documents, letting questions pass before each."""
        lane = self._bulk
        while True:
            if not self._urgent.idle.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_GIVE_WAY_SECONDS):
                        await self._urgent.idle.wait()
            is_busy = not self._urgent.idle.is_set() or monotonic() - self._last_question_at < _BUSY_SECONDS
            if batch := _take(_drop_finished(lane.jobs), BUSY_BATCH_TOKENS if is_busy else MAX_BATCH_TOKENS):
                await self._encode(lane, batch)
            else:
                await lane.sleep()

    async def _encode(self, lane: "_Lane", batch: list[tuple[_Job, int]]) -> None:
        texts = [job.texts[i] for job, i in batch]
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(lane.pool, self.encode, texts, batch[0][0].kind)
        except asyncio.CancelledError:
            _fail_all(batch, IndexUnavailable("The embedder is closed."))
            raise
        except Exception as error:  # noqa: BLE001 - the task's outermost edge: one bad batch must not end the others
            failure = IndexUnavailable(f"The embedding model failed: {type(error).__name__}.")
            failure.__cause__ = error
            _fail_all(batch, failure)
            return
        for (job, i), vector in zip(batch, vectors, strict=True):
            _deliver(job, i, vector)


class _Lane:
    """What waits for one thread, and that thread."""

    def __init__(self, name: str) -> None:
        self.jobs: deque[_Job] = deque()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.wake = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    async def sleep(self) -> None:
        """Wait until something was put in, which may have been before this call."""
        await self.wake.wait()
        self.wake.clear()


def _drop_finished(queue: deque[_Job]) -> deque[_Job]:
    """Forget jobs that were delivered, failed or whose caller has left."""
    while queue and (queue[0].done.done() or not queue[0].order):
        queue.popleft()
    return queue


def _take(queue: deque[_Job], most_tokens: int) -> list[tuple[_Job, int]]:
    """Take texts of one kind from the front until the batch is full."""
    batch: list[tuple[_Job, int]] = []
    longest = 0
    for job in queue:
        if job.done.done():
            continue
        if batch and job.kind != batch[0][0].kind:
            break
        while job.order:
            longest = max(longest, about_tokens(job.texts[job.order[0]]))
            if batch and (len(batch) >= MAX_BATCH_TEXTS or longest * (len(batch) + 1) > most_tokens):
                return batch
            batch.append((job, job.order.popleft()))
    return batch


def about_tokens(text: str) -> int:
    """How many tokens of a text a model reads, at about four characters each."""
    return min(len(text) // 4, 512)


def _deliver(job: _Job, i: int, vector: Vector) -> None:
    job.vectors[i] = vector
    if len(job.vectors) == len(job.texts) and not job.done.done():
        job.done.set_result(np.stack([job.vectors[i] for i in range(len(job.texts))]))


def _fail_all(batch: list[tuple[_Job, int]], error: IndexUnavailable) -> None:
    for job, _ in batch:
        if not job.done.done():
            job.done.set_exception(error)
