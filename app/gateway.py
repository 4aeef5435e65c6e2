"""One request, top to bottom: resolve the release, retrieve, build the prompt, generate, check and cite, record.

`Gateway.begin` chooses who answers a request; iterating `Answering.events`, once there is a place, answers it. Whatever
way the iteration ends - finished, failed, cancelled by a client that left - exactly one record is closed and the
request's telemetry ends once. The record's rows bracket what a client can see: the opening row is on disk before the
first streamed byte, the closing one before the last.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import msgspec

from app.access import Caller
from app.admission import Admission
from app.calls import CANCELLED, Conclusion, EngineCall, StopReason, checked, filter_of, filtered
from app.chat import ChatRequest
from app.engines.groups import EngineGroups
from app.errors import EngineInterrupted, EngineUnavailable, FeaturesUnavailable, RecordUnavailable, ServiceError
from app.fallback import extract, is_stood_in_for, next_choice, wait_for
from app.features import Asker, FeatureReader, shown
from app.grounding import Grounds, Ratings, Search, citation_facts, fit_prompt, plan_for, retrieve
from app.messages import Message, Piece, whole_tool_calls
from app.predictions import Outcome, Prediction, PredictionLog, uuid7
from app.prompts import compose, question_of
from app.releases import Choice, Releases
from app.rollouts import identity_of
from observability import genai
from observability.traces import RequestTrace
from retrieval.citations import AnswerChecker, Verdict, plain_marker
from retrieval.documents import Hit, Passage


class Gateway:
    """Answers requests with the releases, the engines and the passages it was given."""

    def __init__(
        self,
        *,
        releases: Releases,
        engines: EngineGroups,
        search: Search | None,
        predictions: PredictionLog,
        admission: Admission,
        features: FeatureReader | None = None,
        record_required: bool = True,
        link_hosts: Sequence[str] = (),
        fence_key: bytes = b"",
    ) -> None:
        self.releases = releases
        self.engines = engines
        self.search = search
        self.predictions = predictions
        self.admission = admission
        self.features = features
        self.record_required = record_required
        self.link_hosts = link_hosts
        self.fence_key = fence_key

    def begin(
        self,
        request: ChatRequest,
        body: bytes,
        caller: Caller,
        trace: RequestTrace,
        *,
        conversation: str | None = None,
        is_chore: bool = False,
    ) -> "Answering":
        """Choose the release for a request; `body` is what goes on record.

        Raises:
            ModelNotFound: no such release.
            InvalidRequest: the release has a task, and this asks for something else.
        """
        choice = self.releases.resolve(
            request.model, identity_of(caller.tenant, conversation, user_of(request, caller))
        )
        request.check_for(choice.release.task)
        if is_chore:
            choice = Choice(choice.release, "chore")
        if choice.role == "canary":
            trace.keep()
        return Answering(self, request, body, caller, choice, trace)


def user_of(request: ChatRequest, caller: Caller) -> str | None:
    """Whose a request is: the user that the key was shown to act for, else as the request itself says."""
    return caller.user if caller.user is not None else request.user


class Answering:
    """One request being answered: its record, its release, and its events.

    What most requests neither have nor look at is an attribute of the class.
    """

    headers: Mapping[bytes, bytes] = {}
    """Of the request, by lower-case name: a release may have it say there whom it is about."""
    found: Sequence[Hit] = ()
    """What the search gave for the answer."""
    marker: Callable[[int, Passage], str] = staticmethod(plain_marker)
    """How a citation is written into the answer; by default `[n]`."""
    _rate: Ratings | None = None
    _away: ServiceError | None = None
    _has_waited = False
    _stopped: StopReason | None = None

    def __init__(
        self, gateway: Gateway, request: ChatRequest, body: bytes, caller: Caller, choice: Choice, trace: RequestTrace
    ) -> None:
        self.request = request
        self.trace = trace
        self.prediction = prediction = Prediction(
            id=uuid7(),
            tenant=caller.tenant,
            key_id=caller.key_id,
            user=user_of(request, caller),
            model=request.model,
            stream=bool(request.stream),
            store=request.store is not False,
            trace_id=trace.trace_id,
            metadata=request.metadata,
            request=body,
        )
        self.caller = caller
        self._gateway = gateway
        self._started = perf_counter()
        self.grounds: Grounds | None = None
        self.verdict: Verdict | None = None
        self._checker: AnswerChecker | None = None
        self._passages: Sequence[Passage] = ()
        self._pieces: list[Piece] = []
        self.place = gateway.admission.place(caller.priority)
        """Its place among the answers in flight, to be entered before the events; a shadow, that nobody waits for,
        takes none."""
        self._call = EngineCall(request, prediction, trace, self.place)
        self._chosen = choice
        self._take(choice)

    def _take(self, choice: Choice) -> None:
        """Have this release answer from here on, and say so on the record."""
        request, prediction, release = self.request, self.prediction, choice.release
        self.choice = choice
        self.release = release
        self._engine = self._gateway.engines.of(release.engine)
        plan = plan_for(request, release.retrieval, release.task)
        self.plan = plan = msgspec.structs.replace(plan, mode="off") if choice.role == "chore" else plan
        self.sampling = request.sampling(max_tokens=release.max_tokens, temperature=release.temperature)
        prediction.release_name = release.label
        prediction.release_digest = release.digest
        prediction.assignment = choice.role
        prediction.base_model = release.base_model
        prediction.adapter = release.adapter
        prediction.prompt_version = release.prompt.version
        prediction.retrieval_mode = plan.mode
        prediction.retrieval_outcome = "off"

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
        gateway, prediction = self._gateway, self.prediction
        try:
            self._open()
            if not self._engine.is_up:
                await self._stand_in(None)
            is_said = False
            while not is_said:
                try:
                    batches = await self._answer()
                    try:
                        async for batch in batches:
                            if prediction.first_token_seconds is None:
                                await self._begin_telling()
                            self._pieces += batch
                            yield batch
                    finally:
                        await batches.aclose()
                    is_said = True
                except ServiceError as error:
                    if prediction.queue_seconds is not None or not is_stood_in_for(error):
                        raise
                    await self._stand_in(error)
            conclusion = self._conclude()
            await self._recorded(gateway.predictions.close(prediction), "closing")
            yield conclusion
        except (asyncio.CancelledError, GeneratorExit):
            self._break_off(*CANCELLED[self._stopped])
            raise
        except ServiceError as error:
            self._break_off("failed", error.code)
            raise
        except BaseException:
            self._break_off("failed", ServiceError.code)
            raise

    async def _begin_telling(self) -> None:
        """Note the first token; that of a stream waits for the opening row."""
        prediction = self.prediction
        prediction.first_token_seconds = perf_counter() - self._started
        if prediction.stream:
            await self._recorded(self._gateway.predictions.opened(prediction), "opening")

    def _open(self) -> None:
        try:
            self._gateway.predictions.open(self.prediction)
        except RecordUnavailable:
            # It stays without a record: rows that nobody promised would pile up behind a disk that takes none.
            self.prediction.handed_over = True
            if self._gateway.record_required:
                raise

    async def _recorded(self, done: Awaitable[None], step: str) -> None:
        """Wait for a step of the record, which may be skipped only if the settings say that answers go first."""
        span = genai.start_record(self.trace, step=step)
        try:
            await done
        except BaseException as error:
            span.end(error=error)
            if self._gateway.record_required or not isinstance(error, RecordUnavailable):
                raise
        span.end()

    async def _stand_in(self, error: ServiceError | None) -> None:
        """Go on although the engine is away, or failed with `error`: by a fallback, or once it has come up."""
        gateway = self._gateway
        self._away = error
        found = next_choice(self.choice, self.request, gateway.releases, gateway.engines)
        if found is not None and not self._has_waited:
            self._begin_again(found)
        else:
            await self._wait()

    def _begin_again(self, choice: Choice) -> None:
        """Have another release answer; what was found and written for the one before is not of its answer."""
        prediction = self.prediction
        prediction.passages = prediction.messages = prediction.question = prediction.index_version = None
        prediction.question_embedding = prediction.features = None
        self._passages = self.found = ()
        self._take(choice)

    async def _wait(self) -> None:
        """Wait once for an engine that is starting; raises why the request cannot be answered."""
        error = self._away
        if self._has_waited or self.choice.role == "shadow" or not isinstance(error, EngineUnavailable | None):
            raise error or EngineUnavailable("the engine is not available")
        self._has_waited = True
        if not await wait_for(self._engine, self.prediction) and error is not None:
            raise error

    async def _answer_later(self) -> AsyncGenerator[list[Piece], None]:
        """Wait for the engine after all, where the passages have nothing that could be quoted in its place."""
        self._begin_again(self._chosen)
        await self._wait()
        return await self._answer()

    async def _answer(self) -> AsyncGenerator[list[Piece], None]:
        """Decide how this request is answered; the generator returned does it."""
        search, messages, release = self._gateway.search, self.request.messages, self.release
        is_extractive = self.choice.role == "extractive"
        has_features = release.features and self.choice.role not in ("extractive", "chore")
        features = await self._read_features() if has_features else None
        bare = compose(messages, (), release.prompt, release.task, features)
        self._checker = None
        if self.plan.mode == "off" or search is None or not question_of(messages):
            return await self._answer_later() if is_extractive else self._generate(bare)
        self._rate = Ratings(self._engine) if self.plan.context == "sentences" and not is_extractive else None
        engine = self._engine if not is_extractive else None
        scope = self.caller.sees(self.request.retrieval.filter if self.request.retrieval else None)
        grounds = await retrieve(
            search, scope, messages, self.prediction, self.trace, plan=self.plan, rate=self._rate, engine=engine
        )
        self.grounds, self.found, hits = grounds, grounds.found, grounds.hits
        if self.prediction.retrieval_outcome == "irrelevant":
            return self._abstain()
        links = filter_of(self.request, release.task, hits, self._gateway.link_hosts)
        if is_extractive:
            given = grounds.question, grounds, self.plan, search, self.marker, links
            found = await extract(*given) if hits else None
            return self._quote(*found) if found else await self._answer_later()
        if not hits:
            return self._generate(bare)
        composed = await fit_prompt(
            messages,
            grounds.shown,
            release.prompt,
            release.task,
            features=features,
            limit_tokens=await self._gateway.engines.token_limit(release.engine),
            answer_tokens=self.sampling.max_tokens or 0,
            count_tokens=self._engine.count_tokens,
            fence_key=self._gateway.fence_key,
        )
        check = self.plan.check
        if check == "off":
            return filtered(self._generate(composed), links) if links else self._generate(composed)
        if check == "end":
            self._passages = [hit.passage for hit in hits]
        self._checker = AnswerChecker(
            grounds.question,
            hits,
            self.plan.policy,
            check=check,
            fallback=self.plan.fallback,
            abstention=self.plan.abstention,
            similarity=search.similarity,
            rate=self._rate,
            marker=self.marker,
            shown=len(grounds.shown) if self.plan.context == "sentences" else None,
            links=links,
        )
        return checked(self._generate(composed), self._checker, self.trace, check)

    async def _read_features(self) -> list[tuple[str, Any]] | None:
        """Read what the release wants to know of whom the request is about, and put it on record; None if not asked."""
        request, prediction, reader = self.request, self.prediction, self._gateway.features
        if not question_of(request.messages):
            return None
        if reader is None:
            raise FeaturesUnavailable("This service has no feature store.")
        named = request.features.entity if request.features else {}
        asker = Asker(named, prediction.user, prediction.conversation, self.headers)
        prediction.features = await reader.read(prediction.tenant, self.release.features, asker)
        return shown(prediction.features)

    def _generate(self, messages: list[Message]) -> AsyncGenerator[list[Piece], None]:
        if messages is not self.request.messages:
            self.prediction.messages = messages
        return self._call.generate(self._engine, self.release, self.sampling, messages)

    async def _abstain(self) -> AsyncGenerator[list[Piece], None]:
        """Answer that nothing relevant was found, without asking the engine."""
        self._call.finish_reason = "stop"
        self.verdict = Verdict(status="abstained", reason="nothing_relevant")
        yield [Piece(text=self.plan.abstention)]

    async def _quote(self, text: str, checker: AnswerChecker) -> AsyncGenerator[list[Piece], None]:
        """Answer by the passages alone."""
        self._call.finish_reason = "stop"
        self._checker = checker
        yield [Piece(text=text)]

    def _conclude(self) -> Conclusion:
        """Complete the record as finished."""
        finish_reason = self._call.finish_reason
        if finish_reason is None:
            raise EngineInterrupted("The engine's answer broke off.")
        prediction, checker = self.prediction, self._checker
        self.verdict = verdict = checker.verdict if checker else self.verdict
        citations = checker.citations if checker else ()
        prediction.outcome = "finished"
        prediction.finish_reason = finish_reason
        prediction.citations = [citation_facts(citation) for citation in citations] if checker else None
        if verdict is not None:
            prediction.verdict = verdict.label
        self._note_answer()
        rewritten = self.grounds.rewritten if self.grounds else None
        return Conclusion(finish_reason, self._call.usage, citations, verdict, self._passages, rewritten)

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
        prediction, usage = self.prediction, self._call.usage
        pieces = self._pieces
        prediction.answer = "".join([piece.text for piece in pieces]) or self._call.unfit_text
        called = [call for piece in pieces if piece.tool_calls for call in piece.tool_calls]
        prediction.tool_calls = whole_tool_calls(called) if called else None
        prediction.prompt_tokens = usage.prompt_tokens
        prediction.completion_tokens = usage.completion_tokens
        prediction.total_seconds = perf_counter() - self._started
