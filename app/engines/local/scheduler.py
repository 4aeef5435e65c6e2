"""The engine thread: it admits, prefills, decodes and hands text back, one iteration of all running requests at a time.

Main rule: only this thread runs the model. A request joins and leaves between two decode steps (continuous batching),
and a long prompt is prefilled in slices between them, so that it delays its neighbours by one slice at most.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from app.engines.local.metrics import Metrics
from app.engines.local.model import Batch, Prefill
from app.engines.local.protocol import Fault
from app.engines.local.reader import Reader
from app.engines.local.sampler import Picked, Sampler, SamplingOptions, leaders
from app.engines.local.text import TextStream

log = logging.getLogger(__name__)

# At about 1,000 tokens per second on one core a slice stalls the running requests for a quarter of a second.
PREFILL_SLICE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to an answer; the last has a finish reason or a fault."""

    text: str = ""
    picked: tuple[Picked, ...] = ()
    finish_reason: str | None = None
    completion_tokens: int = 0
    fault: Fault | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish_reason is not None or self.fault is not None


@dataclass(slots=True, eq=False)
class Job:
    """One request in the engine. `model` is held here, so that unloading an adapter lets its requests finish."""

    model: Any
    prompt: list[int]
    options: SamplingOptions
    max_tokens: int
    text: TextStream
    deltas: asyncio.Queue[Delta] = field(default_factory=asyncio.Queue)
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    sampler: Sampler = field(init=False)
    tokens: int = 0
    next_token: int = 0
    cancelled: bool = False
    unsent: list[Picked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.options)


@dataclass(slots=True, eq=False)
class Rating:
    """Texts to be rated by a question, as prompts; `rated` gets a figure from 0 to 1 for each, in their order."""

    prompts: list[list[int]]
    rated: asyncio.Future[list[float]]
    scores: list[float] = field(default_factory=list)

    def next_slice(self, max_tokens: int) -> list[list[int]]:
        """Give the next prompts that have room in so many tokens, padded to one length; one at least."""
        longest, taken = 0, 0
        for prompt in self.prompts[len(self.scores) :]:
            longest = max(longest, len(prompt))
            if taken and longest * (taken + 1) > max_tokens:
                break
            taken += 1
        return self.prompts[len(self.scores) : len(self.scores) + taken]


class Scheduler:
    """Runs jobs on its own thread; the public methods are called on the event loop given to `start`."""

    def __init__(
        self,
        *,
        end_token_ids: frozenset[int],
        max_batch: int,
        max_queue: int,
        metrics: Metrics,
        reader: Reader | None = None,
    ) -> None:
        self._end_token_ids = end_token_ids
        self._reader = reader
        self._max_batch = max_batch
        self.max_in_flight = max_batch + max_queue
        self._metrics = metrics
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._ratings: deque[Rating] = deque()
        self._stopping = False
        self._in_flight = 0
        self._prefill: tuple[Job, Prefill] | None = None
        self._batches: dict[int, tuple[Batch, list[Job]]] = {}
        self._outbox: list[Callable[[], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; answers are delivered on `loop`."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; requests still running get no more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """The number of requests admitted and not yet finished."""
        return sum(len(jobs) for _, jobs in self._batches.copy().values()) + (self._prefill is not None)

    @property
    def waiting(self) -> int:
        """The number of requests not yet admitted."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Fault: 429 when as many requests as batch and queue together hold are in flight.
        """
        with self._changed:
            if self._in_flight >= self.max_in_flight:
                raise Fault.overloaded()
            self._in_flight += 1
            self._waiting.append(job)
            self._changed.notify()

    def rate(self, rating: Rating) -> None:
        """Queue texts to be rated; cancelling `rated` drops them.

        Raises:
            Fault: 429 when as many requests as batch and queue together hold are in flight.
        """
        with self._changed:
            if self._in_flight >= self.max_in_flight:
                raise Fault.overloaded()
            self._in_flight += 1
            self._ratings.append(rating)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Stop work on a job before the next step; harmless on a finished one."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._leave(job, "dropped")
            self._changed.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._await_work():
                try:
                    self._iterate()
                except Exception as error:  # noqa: BLE001 - whatever torch raises, the engine outlives it.
                    self._fail_all(error)
                self._send()

    def _iterate(self) -> None:
        self._drop_cancelled()
        self._prefill_slice()
        self._rate_slice()
        for key in list(self._batches):
            self._decode(key)

    def _await_work(self) -> bool:
        with self._changed:
            while not (self._stopping or self._waiting or self._ratings or self._prefill or self._batches):
                self._changed.wait()
            return not self._stopping

    def _drop_cancelled(self) -> None:
        if self._prefill and self._prefill[0].cancelled:
            self._leave(self._prefill[0], "dropped")
            self._prefill = None
        for key, (_, jobs) in list(self._batches.items()):
            if gone := [job for job in jobs if job.cancelled]:
                for job in gone:
                    self._leave(job, "dropped")
                self._shrink(key, gone)

    def _prefill_slice(self) -> None:
        """Spend one slice's tokens on prompts: finish several short ones, or a part of a long one."""
        budget = PREFILL_SLICE_TOKENS
        while budget > 0 and (self._prefill or self._admit()):
            assert self._prefill is not None
            job, prefill = self._prefill
            before = prefill.done_tokens
            try:
                logits = prefill.advance(budget)
            except Exception as error:  # noqa: BLE001 - most likely memory, for a long prompt: the others need not fail.
                self._prefill = None
                self._fail([job], error)
                return
            budget -= prefill.done_tokens - before
            if logits is not None:
                self._begin(job, prefill, logits)
                # Only now: what fails before finds the job here, and nobody waits for it for ever.
                self._prefill = None

    def _rate_slice(self) -> None:
        """Spend one slice's tokens on texts to be rated."""
        if not self._ratings:
            return
        assert self._reader is not None
        rating = self._ratings[0]
        fault: Fault | None = None
        if not rating.rated.cancelled():
            try:
                rating.scores += self._reader.rate(rating.next_slice(PREFILL_SLICE_TOKENS))
            except Exception as error:
                log.exception("a forward pass failed")
                fault = Fault.generation(type(error).__name__)
            if not fault and len(rating.scores) < len(rating.prompts):
                return
        self._ratings.popleft()
        with self._changed:
            self._in_flight -= 1
        self._outbox.append(partial(_settle, rating, fault))

    def _admit(self) -> bool:
        with self._changed:
            if not self._waiting or self.running >= self._max_batch:
                return False
            job = self._waiting.popleft()
        job.admitted_at = time.monotonic()
        self._prefill = job, Prefill(job.model, job.prompt)
        return True

    def _begin(self, job: Job, prefill: Prefill, logits: torch.Tensor) -> None:
        if self._advance(job, logits[0], leaders(logits)[0]):
            return
        batch, jobs = self._batches.setdefault(id(job.model), (Batch(job.model), []))
        batch.join(prefill)
        jobs.append(job)

    def _decode(self, key: int) -> None:
        batch, jobs = self._batches[key]
        logits = batch.step([job.next_token for job in jobs])
        rows = zip(jobs, logits, leaders(logits), strict=True)
        if done := [job for job, row, leader in rows if self._advance(job, row, leader)]:
            self._shrink(key, done)

    def _shrink(self, key: int, gone: list[Job]) -> None:
        batch, jobs = self._batches[key]
        rows = [row for row, job in enumerate(jobs) if job not in gone]
        if not rows:
            del self._batches[key]
            return
        jobs[:] = [jobs[row] for row in rows]  # First: who has left must not leave again if the batch fails.
        batch.keep(rows)

    def _advance(self, job: Job, logits: torch.Tensor, leader: int | None) -> bool:
        """Pick a job's next token, post its text, and return whether the job is done; it alone fails if this does."""
        try:
            reason = self._add(job, job.sampler.pick(logits, leader))
        except Exception as error:  # noqa: BLE001 - what torch or the tokenizer raises here concerns no other job.
            self._fail([job], error)
            return True
        if reason:
            self._leave(job, None)
        return reason is not None

    def _add(self, job: Job, picked: Picked) -> str | None:
        """Account for a new token and post its text; return why the job is done, if it is."""
        job.tokens += 1
        job.next_token = picked.token
        if job.options.top_logprobs is not None:
            job.unsent.append(picked)
        text, reason = "", None
        if picked.token in self._end_token_ids:
            reason = "stop"
        else:
            text = job.text.push(picked.token)
            if job.text.stopped:
                reason = "stop_sequence"
            elif job.tokens >= job.max_tokens:
                reason = "length"
        if reason in ("stop", "length"):
            text += job.text.flush()
        if text or reason:
            self._post(job, Delta(text, tuple(job.unsent), reason, job.tokens))
            job.unsent.clear()
        return reason

    def _fail_all(self, error: Exception) -> None:
        jobs = [job for _, batch in self._batches.values() for job in batch]
        if self._prefill:
            jobs.append(self._prefill[0])
        self._batches, self._prefill = {}, None
        self._fail(jobs, error)

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        log.error("a request failed in the engine: %s", type(error).__name__, exc_info=error)
        for job in jobs:
            self._post(job, Delta(completion_tokens=job.tokens, fault=Fault.generation(type(error).__name__)))
            self._leave(job, "generation")

    def _leave(self, job: Job, failure: str | None) -> None:
        with self._changed:
            self._in_flight -= 1
        if failure:
            self._metrics.failed(failure)
            return
        now = time.monotonic()
        self._metrics.finished(
            queue_seconds=job.admitted_at - job.submitted_at,
            inference_seconds=now - job.admitted_at,
            tokens=job.tokens,
            prompt_tokens=len(job.prompt),
        )

    def _post(self, job: Job, delta: Delta) -> None:
        self._outbox.append(partial(job.deltas.put_nowait, delta))

    def _send(self) -> None:
        """Deliver what the iteration made in one call into the event loop: waking it is dearer than the delivery."""
        if not self._outbox or self._loop is None:
            return
        outbox, self._outbox = self._outbox, []
        try:
            self._loop.call_soon_threadsafe(_deliver, outbox)
        except RuntimeError:  # The loop has closed: the process is ending and nobody listens.
            log.debug("dropped %d pieces of news: the event loop is closed", len(outbox))


def _deliver(outbox: list[Callable[[], None]]) -> None:
    for post in outbox:
        post()


def _settle(rating: Rating, fault: Fault | None) -> None:
    if rating.rated.done():
        return  # Whoever asked has left.
    if fault:
        rating.rated.set_exception(fault)
    else:
        rating.rated.set_result(rating.scores)
