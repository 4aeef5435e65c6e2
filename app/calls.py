"""The call of an engine for one answer: what it is sent, the span around it, and what is let through of what it says.

The main rule: what the consumer takes between two batches is not the engine's time, and waiting for an engine that is
away is.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import perf_counter

from app.admission import Place
from app.chat import ChatRequest
from app.engines import Engine
from app.messages import FinishReason, Generation, Message, Piece, Sampling, Usage
from app.predictions import Prediction
from app.releases import Release
from observability import genai
from observability.traces import RequestTrace
from retrieval.citations import AnswerChecker


class EngineCall:
    """One answer's use of an engine; of a second attempt the times are added to those of the first."""

    def __init__(self, request: ChatRequest, prediction: Prediction, trace: RequestTrace, place: Place) -> None:
        self._place = place
        self._request = request
        self._prediction = prediction
        self._trace = trace
        self.finish_reason: FinishReason | None = None
        self.usage = Usage()

    async def generate(
        self, engine: Engine, release: Release, sampling: Sampling, messages: list[Message]
    ) -> AsyncGenerator[list[Piece], None]:
        """Let the engine answer, noting how it ended and how long it was waited for."""
        request, prediction = self._request, self._prediction
        span = genai.start_generation(
            self._trace,
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
            traceparent=self._trace.traceparent_under(span),
        )
        asked = perf_counter()
        waited = prediction.engine_seconds or 0.0
        error: BaseException | None = None
        try:
            async with aclosing(engine.generate(generation)) as batches:
                async for batch in batches:
                    waited += perf_counter() - asked
                    if prediction.queue_seconds is None:
                        prediction.queue_seconds = waited + (self._place.waited_seconds or 0.0)
                        genai.first_token(span)
                    asked = 0.0
                    for piece in batch:
                        self.finish_reason = piece.finish_reason or self.finish_reason
                        self.usage = piece.usage or self.usage
                    yield batch
                    asked = perf_counter()
        except BaseException as failure:
            error = failure
            raise
        finally:
            prediction.engine_seconds = waited + (perf_counter() - asked if asked else 0.0)
            usage = self.usage
            genai.end_generation(
                span,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                finish_reason=self.finish_reason,
                error=error,
            )


async def checked(
    batches: AsyncGenerator[list[Piece], None], checker: AnswerChecker
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
