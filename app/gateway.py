"""One request, top to bottom: resolve the release, retrieve, build the prompt, generate, check and cite, record.

`Gateway.begin` admits a request; iterating `Answering.events` answers it. Whatever way the iteration ends - finished,
failed, cancelled by a client that left - exactly one record is closed and the request's telemetry ends once. The
record's rows bracket what a client can see: the opening row is on disk before the first streamed byte, the closing
one before the last.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from app.access import Caller
from app.chat import ChatRequest
from app.engines import Engine, EngineInfo
from app.errors import EngineInterrupted, EngineTimeout, Overloaded, RecordUnavailable, ServiceError
from app.grounding import Grounds, Ratings, Search, citation_facts, find_grounds, fit_prompt, hit_facts, plan_for
from app.messages import FinishReason, Generation, Message, Piece, Usage, whole_tool_calls
from app.predictions import Outcome, Prediction, PredictionLog, uuid7
from app.prompts import question_of, search_query
from app.releases import Choice, Releases
from app.rollouts import identity_of
from observability import genai
from observability.traces import RequestTrace
from retrieval.citations import AnswerChecker, Citation, Verdict, plain_marker
from retrieval.documents import Passage, Scope

INFO_SECONDS = 60.0
"""How long an engine's description of its limits is believed before it is asked again."""

NO_INFO_SECONDS = 5.0
"""How long an engine that did not describe itself is not asked again."""


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What is known once an answer is complete and on record: always the last event."""

    finish_reason: FinishReason
    usage: Usage
    citations: Sequence[Citation] = ()
    verdict: Verdict | None = None
    passages: Sequence[Passage] = ()
    """What the engine was shown, where its own numbers were kept: `[n]` is the n-th of them."""


StopReason = Literal["client_left", "timeout", "dropped"]

# What a cancellation goes on record as, by who asked for it: nobody who said so is the service itself, stopping.
_CANCELLED: dict[StopReason | None, tuple[Outcome, str]] = {
    "client_left": ("cancelled", "client_left"),
    "timeout": ("failed", EngineTimeout.code),
    "dropped": ("cancelled", "dropped"),
    None: ("interrupted", "shutdown"),
}


class Gateway:
    """Answers requests with the releases, the engine and the passages it was given."""

    def __init__(
        self,
        *,
        releases: Releases,
        engine: Engine,
        search: Search | None,
        predictions: PredictionLog,
        max_concurrent: int = 512,
        record_required: bool = True,
    ) -> None:
        self.releases = releases
        self.engine = engine
        self.search = search
        self.predictions = predictions
        self.max_concurrent = max_concurrent
        self.record_required = record_required
        self.in_flight = 0
        self._info: EngineInfo | None = None
        self._info_until = 0.0

    def begin(
        self, request: ChatRequest, body: bytes, caller: Caller, trace: RequestTrace, *, conversation: str | None = None
    ) -> "Answering":
        """Admit a request, or raise what the caller should see; `body` is what goes on record.

        Raises:
            ModelNotFound: no such release.
            Overloaded: as many answers are in flight as the setting `limits.max_concurrent_answers` allows.
        """
        choice = self.releases.resolve(request.model, identity_of(caller.tenant, conversation, request.user))
        if self.in_flight >= self.max_concurrent:
            raise Overloaded("Too many answers are in flight; try again shortly.", retry_after_seconds=1)
        return Answering(self, request, body, caller, choice, trace)

    async def token_limit(self) -> int | None:
        """Tokens a prompt and its answer may have together; None when the engine does not say."""
        if perf_counter() > self._info_until:
            try:
                self._info = await self.engine.describe()
                self._info_until = perf_counter() + INFO_SECONDS
            except ServiceError:
                # The call itself is about to tell what is wrong with the engine; what it said before still holds.
                self._info_until = perf_counter() + NO_INFO_SECONDS
        return (self._info.max_total_tokens or self._info.max_input_tokens) if self._info else None


class Answering:
    """One request being answered: its record, its release, and its events."""

    def __init__(
        self, gateway: Gateway, request: ChatRequest, body: bytes, caller: Caller, choice: Choice, trace: RequestTrace
    ) -> None:
        self.request = request
        self.choice = choice
        self.release = release = choice.release
        self.trace = trace
        self.plan = plan_for(request, release.retrieval)
        self.sampling = request.sampling(max_tokens=release.max_tokens, temperature=release.temperature)
        self.prediction = Prediction(
            id=uuid7(),
            tenant=caller.tenant,
            key_id=caller.key_id,
            user=request.user,
            model=request.model,
            release_name=release.label,
            release_digest=release.digest,
            assignment=choice.role,
            base_model=release.base_model,
            adapter=release.adapter,
            prompt_version=release.prompt.version,
            retrieval_mode=self.plan.mode,
            retrieval_outcome="off",
            stream=bool(request.stream),
            store=request.store is not False,
            trace_id=trace.trace_id,
            metadata=request.metadata,
            request=body,
        )
        self._scope = Scope(caller.tenant, (request.retrieval and request.retrieval.filter) or {})
        self._gateway = gateway
        self._started = perf_counter()
        self.embed_seconds: float | None = None
        self._texts: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._finish_reason: FinishReason | None = None
        self._usage = Usage()
        self._checker: AnswerChecker | None = None
        self._rate: Ratings | None = None
        self._passages: Sequence[Passage] = ()
        self.verdict: Verdict | None = None
        self.marker: Callable[[int, Passage], str] = plain_marker
        """How a citation is written into the answer; by default `[n]`."""
        self._stopped: StopReason | None = None

    def stop(self, reason: StopReason) -> bool:
        """Note why the work is about to be cancelled; False when it is not to be: the answer is complete already."""
        if reason != "client_left" and self.prediction.handed_over:
            return False
        self._stopped = self._stopped or reason
        return True

    async def events(self) -> AsyncGenerator[list[Piece] | Conclusion, None]:
        """Answer: batches of pieces that arrived together, then one Conclusion.

        An error before the first event is to be sent with its status; a later one ends a stream. Close the
        generator, or cancel the task that iterates it, when the client has left.
        """
        gateway, prediction, texts = self._gateway, self.prediction, self._texts
        place = self.choice.role != "shadow"  # What nobody waits for takes nobody's place.
        gateway.in_flight += place
        try:
            self._open()
            async with aclosing(await self._answer()) as batches:
                async for batch in batches:
                    if prediction.first_token_seconds is None:
                        prediction.first_token_seconds = perf_counter() - self._started
                        if prediction.stream:
                            await self._recorded(gateway.predictions.opened(prediction))
                    for piece in batch:
                        texts.append(piece.text)
                        if piece.tool_calls:
                            self._tool_calls += piece.tool_calls
                    yield batch
            conclusion = self._conclude()
            await self._recorded(gateway.predictions.close(prediction))
            yield conclusion
        except (asyncio.CancelledError, GeneratorExit):
            self._break_off(*_CANCELLED[self._stopped])
            raise
        except ServiceError as error:
            self._break_off("failed", error.code)
            raise
        except BaseException:
            self._break_off("failed", ServiceError.code)
            raise
        finally:
            gateway.in_flight -= place

    def _open(self) -> None:
        try:
            self._gateway.predictions.open(self.prediction)
        except RecordUnavailable:
            # It stays without a record: rows that nobody promised would pile up behind a disk that takes none.
            self.prediction.handed_over = True
            if self._gateway.record_required:
                raise

    async def _recorded(self, done: Awaitable[None]) -> None:
        """Wait for a step of the record, which may be skipped only if the settings say that answers go first."""
        try:
            await done
        except RecordUnavailable:
            if self._gateway.record_required:
                raise

    async def _answer(self) -> AsyncGenerator[list[Piece], None]:
        """Decide how this request is answered; the generator returned does it."""
        search, messages = self._gateway.search, self.request.messages
        if self.plan.mode == "off" or search is None or not question_of(messages):
            return self._generate(messages)
        if self.plan.context == "sentences":
            self._rate = Ratings(self._gateway.engine)
        grounds = await self._retrieve(search)
        hits = grounds.hits
        if self.prediction.retrieval_outcome == "irrelevant":
            return self._abstain()
        if not hits:
            return self._generate(messages)
        composed = await fit_prompt(
            messages,
            grounds.shown,
            self.release.prompt,
            limit_tokens=await self._gateway.token_limit(),
            answer_tokens=self.sampling.max_tokens or 0,
            count_tokens=self._gateway.engine.count_tokens,
        )
        self.prediction.messages = composed
        check = self.plan.check
        if check == "off":
            return self._generate(composed)
        if check == "end":
            self._passages = [hit.passage for hit in hits]
        checker = AnswerChecker(
            # What was asked last: an answer to the turn before, which the search needs for its context, is a wrong one.
            question_of(messages),
            hits,
            self.plan.policy,
            check=check,
            fallback=self.plan.fallback,
            abstention=self.plan.abstention,
            similarity=search.similarity,
            rate=self._rate,
            marker=self.marker,
            shown=len(grounds.shown) if self.plan.context == "sentences" else None,
        )
        return self._checked(self._generate(composed), checker)

    async def _retrieve(self, search: Search) -> Grounds:
        """Find the passages to answer from, noting what was found."""
        prediction, plan = self.prediction, self.plan
        prediction.question = query = search_query(self.request.messages)
        span = genai.start_retrieval(self.trace, collection=plan.collection, mode=plan.search, top_k=plan.top_k)
        started = perf_counter()
        try:
            grounds = await find_grounds(
                search,
                self._scope,
                query,
                plan=plan,
                question=question_of(self.request.messages),
                rate=self._rate,
            )
        except BaseException as error:
            genai.end_retrieval(span, error=error)
            raise
        finally:
            prediction.retrieve_seconds = perf_counter() - started
        prediction.retrieval_outcome = grounds.outcome
        prediction.index_version = grounds.index_version
        prediction.passages = [hit_facts(hit) for hit in grounds.found]
        self.embed_seconds = grounds.embed_seconds
        genai.end_retrieval(
            span,
            hits=len(grounds.found),
            index_version=grounds.index_version,
            embed_seconds=grounds.embed_seconds or 0.0,
        )
        return grounds

    async def _generate(self, messages: list[Message]) -> AsyncGenerator[list[Piece], None]:
        """Let the engine answer, noting how it ended and how long it was waited for."""
        request, release, prediction = self.request, self.release, self.prediction
        sampling = self.sampling
        span = genai.start_generation(
            self.trace,
            model=release.base_model or release.name,
            provider=release.engine,
            release=release.label,
            prediction_id=prediction.id,
            adapter=release.adapter,
            stream=prediction.stream,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=sampling.stop,
        )
        generation = Generation(
            messages=messages,
            adapter=release.adapter,
            sampling=sampling,
            tools=request.tools,
            tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls,
            response_format=request.response_format,
            stream=prediction.stream,
            traceparent=self.trace.traceparent_under(span),
        )
        asked = perf_counter()
        waited = 0.0
        error: BaseException | None = None
        try:
            async with aclosing(self._gateway.engine.generate(generation)) as batches:
                async for batch in batches:
                    waited += perf_counter() - asked
                    if prediction.queue_seconds is None:
                        prediction.queue_seconds = waited
                        genai.first_token(span)
                    asked = 0.0
                    for piece in batch:
                        self._finish_reason = piece.finish_reason or self._finish_reason
                        self._usage = piece.usage or self._usage
                    yield batch
                    asked = perf_counter()
        except BaseException as failure:
            error = failure
            raise
        finally:
            # What the consumer took between two batches is not the engine's time.
            prediction.engine_seconds = waited + (perf_counter() - asked if asked else 0.0)
            usage = self._usage
            genai.end_generation(
                span,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                finish_reason=self._finish_reason,
                error=error,
            )

    async def _checked(
        self, batches: AsyncGenerator[list[Piece], None], checker: AnswerChecker
    ) -> AsyncGenerator[list[Piece], None]:
        """Send on what the checker lets through, and what it puts in place of the rest."""
        async with aclosing(batches):
            async for batch in batches:
                text = await checker.feed("".join([piece.text for piece in batch]))
                kept = [Piece(text=text)] if text else []
                kept += [
                    Piece(tool_calls=piece.tool_calls, logprobs=piece.logprobs)
                    for piece in batch
                    if piece.tool_calls or piece.logprobs
                ]
                if kept:
                    yield kept
        if text := await checker.finish():
            yield [Piece(text=text)]
        self._checker = checker
        self.verdict = checker.verdict

    async def _abstain(self) -> AsyncGenerator[list[Piece], None]:
        """Answer that nothing relevant was found, without asking the engine."""
        self._finish_reason = "stop"
        self.verdict = Verdict(status="abstained", reason="nothing_relevant")
        yield [Piece(text=self.plan.abstention)]

    def _conclude(self) -> Conclusion:
        """Complete the record as finished."""
        if self._finish_reason is None:
            raise EngineInterrupted("The engine's answer broke off.")
        prediction, verdict = self.prediction, self.verdict
        citations = self._checker.citations if self._checker else ()
        prediction.outcome = "finished"
        prediction.finish_reason = self._finish_reason
        prediction.citations = [citation_facts(citation) for citation in citations] if self._checker else None
        if verdict is not None:
            prediction.verdict = verdict.label
        self._note_answer()
        return Conclusion(self._finish_reason, self._usage, citations, verdict, self._passages)

    def _break_off(self, outcome: Outcome, code: str) -> None:
        """Complete the record as one that did not finish; a record already handed over stays as it is."""
        prediction = self.prediction
        if prediction.handed_over and prediction.outcome == "finished":
            return
        prediction.outcome = outcome
        prediction.error_code = code
        self._note_answer()
        self._gateway.predictions.close_nowait(prediction)

    def _note_answer(self) -> None:
        prediction, usage = self.prediction, self._usage
        prediction.answer = "".join(self._texts)
        prediction.tool_calls = whole_tool_calls(self._tool_calls) or None
        prediction.prompt_tokens = usage.prompt_tokens
        prediction.completion_tokens = usage.completion_tokens
        prediction.total_seconds = perf_counter() - self._started
