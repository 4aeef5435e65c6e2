"""The call of an engine for one answer: what it is sent, the span around it, what is let through, and how answers end.

The main rule: what the consumer takes between two batches is not the engine's time, and waiting for an engine that is
away is.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from time import perf_counter, time_ns
from typing import Literal

import msgspec

from app.admission import Place
from app.chat import ChatRequest
from app.engines import Engine
from app.errors import EngineTimeout, UnfitAnswer
from app.grounding import is_for_a_program
from app.messages import FinishReason, Generation, Message, Piece, Sampling, Usage
from app.predictions import Outcome, Prediction
from app.releases import Release
from app.tasks import Misfit, Task
from observability import genai
from observability.spans import NOT_RECORDED, Facts, TraceSpan
from observability.traces import Profile, RequestTrace
from retrieval.citations import AnswerChecker, Citation, Verdict
from retrieval.documents import Hit, Passage
from retrieval.links import LinkFilter


class Conclusion(msgspec.Struct, frozen=True):
    """What is known once an answer is complete and on record: always the last event."""

    finish_reason: FinishReason
    usage: Usage
    citations: Sequence[Citation] = ()
    verdict: Verdict | None = None
    passages: Sequence[Passage] = ()
    """What the engine was shown, where its own numbers were kept: `[n]` is the n-th of them."""
    rewritten: str | None = None
    """What was searched for in place of the last question, where the engine put that into words of its own."""


StopReason = Literal["client_left", "timeout", "dropped"]

# What a cancellation goes on record as, by who asked for it: nobody who said so is the service itself, stopping.
CANCELLED: dict[StopReason | None, tuple[Outcome, str]] = {
    "client_left": ("cancelled", "client_left"),
    "timeout": ("failed", EngineTimeout.code),
    "dropped": ("cancelled", "dropped"),
    None: ("interrupted", "shutdown"),
}


class EngineCall(msgspec.Struct, eq=False):
    """One answer's use of an engine; of a second attempt the times are added to those of the first."""

    _request: ChatRequest
    _prediction: Prediction
    _trace: RequestTrace
    _place: Place
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    unfit_text: str = ""
    """What the engine said where that was not what its release's task asks for."""
    _has_called: bool = False

    def generate(
        self, engine: Engine, release: Release, sampling: Sampling, messages: list[Message]
    ) -> AsyncGenerator[list[Piece], None]:
        """Let the engine answer, noting how it ended and how long it was waited for; what answers a task is looked at.

        Raises:
            UnfitAnswer: the answer is not what the task asks for.
        """
        batches = self._generated(engine, release, sampling, messages)
        return batches if release.task.is_answer else self._fitted(batches, release.task)

    async def _generated(
        self, engine: Engine, release: Release, sampling: Sampling, messages: list[Message]
    ) -> AsyncGenerator[list[Piece], None]:
        request, prediction = self._request, self._prediction
        span = genai.start_generation(
            self._trace,
            model=release.base_model or release.name,
            prediction_id=prediction.id,
            is_first=not self._has_called,
            tell=partial(_facts, self._trace.conventions.profile, prediction, release, sampling),
        )
        generation = Generation(
            messages=messages,
            adapter=release.adapter,
            adapter_digest=release.adapter_digest,
            sampling=sampling,
            tools=request.tools,
            tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls,
            response_format=request.response_format,
            labels=release.task.labels,
            schema=release.task.schema,
            stream=prediction.stream,
            traceparent=self._trace.traceparent_under(span),
        )
        self._has_called = True
        asked = began = perf_counter()
        waited = prediction.engine_seconds or 0.0
        first_chunk: float | None = None
        first_token_ns: int | None = None
        error: BaseException | None = None
        batches = engine.generate(generation)
        try:
            try:
                async for batch in batches:
                    came = perf_counter()
                    waited += came - asked
                    if prediction.queue_seconds is None:
                        prediction.queue_seconds = waited + (self._place.waited_seconds or 0.0)
                        first_chunk = came - began
                        first_token_ns = time_ns()
                    asked = 0.0
                    if batch:  # How an answer ended stands in its last piece.
                        last = batch[-1]
                        self.finish_reason = last.finish_reason or self.finish_reason
                        self.usage = last.usage or self.usage
                    yield batch
                    asked = perf_counter()
            finally:  # As `aclosing` does, without the two coroutines that it makes.
                await batches.aclose()
        except BaseException as failure:
            error = failure
            raise
        finally:
            prediction.engine_seconds = waited + (perf_counter() - asked if asked else 0.0)
            usage = self.usage
            genai.end_generation(
                span,
                first_token_ns=first_token_ns,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                finish_reason=self.finish_reason,
                error=error,
            )
            if self._trace.conventions.record is not None:
                genai.count_generation(
                    self._trace,
                    model=release.base_model or release.name,
                    provider=release.engine,
                    seconds=perf_counter() - began,
                    first_chunk_seconds=first_chunk if prediction.stream else None,
                    prompt_tokens=usage.prompt_tokens or None,
                    completion_tokens=usage.completion_tokens or None,
                    error=error,
                )

    async def _fitted(
        self, batches: AsyncGenerator[list[Piece], None], task: Task
    ) -> AsyncGenerator[list[Piece], None]:
        """Hold an answer until it is whole, and send it on in the form that the task has."""
        prediction = self._prediction
        pieces: list[Piece] = []
        async with aclosing(batches):
            async for batch in batches:
                pieces += batch
        text = "".join([piece.text for piece in pieces])
        try:
            answer = task.read(text)
        except Misfit as misfit:
            self.unfit_text = text
            prediction.valid = False
            prediction.finish_reason = self.finish_reason
            cut = " It was cut off: raise `max_tokens`." if self.finish_reason == "length" else ""
            raise UnfitAnswer(f"The answer is not what the release's task asks for: {misfit}{cut}") from misfit
        prediction.valid = True
        prediction.predicted_class = answer if task.labels else None
        yield [Piece(text=answer), *(Piece(logprobs=piece.logprobs) for piece in pieces if piece.logprobs)]


def _facts(profile: Profile, prediction: Prediction, release: Release, sampling: Sampling) -> Facts:
    """What the span of a call says of it; what it is told by leads to no span, or the collector had to free both."""
    return genai.generation_facts(
        profile,
        model=release.base_model or release.name,
        provider=release.engine,
        release=release.label,
        prediction_id=prediction.id,
        conversation=prediction.conversation,
        prompt_name=release.name,
        prompt_version=release.prompt.version,
        adapter=release.adapter,
        stream=prediction.stream,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=sampling.stop,
    )


def filter_of(request: ChatRequest, task: Task, hits: Sequence[Hit], allowed: Sequence[str]) -> LinkFilter | None:
    """What takes links and images out of an answer that rests on documents; none for an answer that a program reads."""
    if not task.is_answer or is_for_a_program(request):
        return None
    # Of what stands in the sources or was said by the callers themselves, addresses may be told.
    return LinkFilter([*(hit.passage.text for hit in hits), *(message.text for message in request.messages)], allowed)


async def filtered(batches: AsyncGenerator[list[Piece], None], links: LinkFilter) -> AsyncGenerator[list[Piece], None]:
    """Send an answer on that nobody checks, without links."""
    async with aclosing(batches):
        async for batch in batches:
            if text := links.feed("".join([piece.text for piece in batch])):
                yield [Piece(text=text)]
    if text := links.finish():
        yield [Piece(text=text)]


async def checked(
    batches: AsyncGenerator[list[Piece], None], checker: AnswerChecker, trace: RequestTrace, mode: str
) -> AsyncGenerator[list[Piece], None]:
    """Send on what the checker lets through, and what it puts in place of the rest."""
    check = _Check(checker, trace, mode)
    error: BaseException | None = None
    try:
        async with aclosing(batches):
            async for batch in batches:
                text = await check.feed("".join([piece.text for piece in batch]))
                kept = [Piece(text=text)] if text else []
                kept += [
                    Piece(tool_calls=piece.tool_calls, logprobs=piece.logprobs)
                    for piece in batch
                    if piece.tool_calls or piece.logprobs
                ]
                if kept:
                    yield kept
        if text := await check.finish():
            yield [Piece(text=text)]
    except BaseException as failure:
        error = failure
        raise
    finally:
        check.end(error)


class _Check:
    """A checker with its span, which lies from the first text to the end and counts what the check itself took."""

    __slots__ = ("_checker", "_mode", "_seconds", "_span", "_trace")

    def __init__(self, checker: AnswerChecker, trace: RequestTrace, mode: str) -> None:
        self._checker = checker
        self._trace = trace
        self._mode = mode
        self._span: TraceSpan | None = None
        self._seconds = 0.0

    async def feed(self, text: str) -> str:
        """Give the checker what the engine said next."""
        if self._span is None:
            self._span = genai.start_check(self._trace, mode=self._mode)
        if self._span is NOT_RECORDED:
            return await self._checker.feed(text)
        began = perf_counter()
        try:
            return await self._checker.feed(text)
        finally:
            self._seconds += perf_counter() - began

    async def finish(self) -> str:
        """Have the checker conclude."""
        began = perf_counter()
        try:
            return await self._checker.finish()
        finally:
            self._seconds += perf_counter() - began

    def end(self, error: BaseException | None) -> None:
        """End the span; an answer of which nothing came has none."""
        if self._span is not None:
            checker = self._checker
            statuses = [citation.status for citation in checker.citations]
            genai.end_check(
                self._span, seconds=self._seconds, citations=statuses, verdict=checker.verdict.label, error=error
            )
