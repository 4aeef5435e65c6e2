"""What answers while a release's engine cannot: the release it falls back on, or its passages by themselves.

The main rule: only an engine that is away or broken is stood in for, and only before it said anything. One that is full
says so to the caller, and one that refuses a request has answered it.
"""

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

from app.chat import ChatRequest
from app.engines import Engine
from app.engines.groups import EngineGroups
from app.errors import (
    EngineError,
    EngineInterrupted,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    ModelNotFound,
    ServiceError,
)
from app.grounding import Grounds, Search, is_for_a_program
from app.predictions import Prediction
from app.releases import Choice, Release, Releases, RetrievalPlan
from retrieval.citations import AnswerChecker
from retrieval.documents import Passage
from retrieval.links import LinkFilter

EXTRACTIVE = "extractive"


def is_stood_in_for(error: ServiceError) -> bool:
    """Whether an error that came before the engine's first word may be made good by a fallback."""
    if isinstance(error, EngineRejected | EngineInterrupted):
        return False
    return isinstance(error, EngineUnavailable | EngineTimeout | EngineError)


def next_choice(choice: Choice, request: ChatRequest, releases: Releases, engines: EngineGroups) -> Choice | None:
    """What answers this request in place of `choice`; None when nothing can."""
    if choice.role in ("shadow", "extractive", "chore"):  # Nobody waits for a title.
        return None
    found = stand_in(choice.release, releases, engines)
    return None if found is not None and found.role == "extractive" and is_for_a_program(request) else found


def stand_in(release: Release, releases: Releases, engines: EngineGroups) -> Choice | None:
    """What a release falls back on that could answer now, following fallbacks of fallbacks.

    A release can only fall back on one that was there before it, so the chain ends.
    """
    while release.fallback is not None:
        if release.fallback == EXTRACTIVE:
            return Choice(release, "extractive")
        try:
            release = releases.resolve(release.fallback).release
        except ModelNotFound:
            return None
        if engines.of(release.engine).is_up:
            return Choice(release, "fallback")
    return None


async def wait_for(engine: Engine, prediction: Prediction) -> bool:
    """Wait as `Engine.wait_until_up`, and count it as time that the engine took."""
    started = perf_counter()
    try:
        return await engine.wait_until_up()
    finally:
        prediction.engine_seconds = (prediction.engine_seconds or 0.0) + perf_counter() - started


async def extract(
    question: str,
    grounds: Grounds,
    plan: RetrievalPlan,
    search: Search,
    marker: Callable[[int, Passage], str],
    links: LinkFilter | None,
) -> tuple[str, AnswerChecker] | None:
    """Answer by the sentences of the passages that answer best, cited; None where none does."""
    checker = AnswerChecker(
        question,
        grounds.hits,
        plan.policy,
        fallback="extract",
        similarity=search.similarity,
        marker=marker,
        shown=len(grounds.shown) if plan.context == "sentences" else None,
        links=links,
    )
    text = await checker.finish()
    if checker.verdict.status != "replaced":
        return None
    checker.verdict = replace(checker.verdict, reason="engine_unavailable")
    return text, checker
