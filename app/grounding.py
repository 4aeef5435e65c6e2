"""The passages an answer may rest on: searched for the question, judged, and fitted into the engine's context."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, Protocol

import msgspec

from app.chat import ChatRequest
from app.engines import Engine
from app.errors import ContextTooLong, RetrievalUnavailable, ServiceError, from_retrieval
from app.messages import Message
from app.predictions import Prediction
from app.predictions.embeddings import pack
from app.prompts import ANSWER, compose, prompt_bytes, question_of, search_query
from app.releases import Prompt, RetrievalPlan
from app.rewriting import rewritten
from app.tasks import Task
from observability import genai
from observability.traces import RequestTrace
from retrieval.citations import Citation, Rate, best_sentences, relevance
from retrieval.documents import Hit, Scope, SearchMode, SearchResult
from retrieval.errors import IndexMismatch, IndexUnavailable, RetrievalError
from retrieval.variety import Variety

GroundsOutcome = Literal["used", "empty", "irrelevant", "unavailable"]

TEMPLATE_TOKENS = 24
"""What a chat template may add to a conversation: SmolLM2's and Qwen's have a system turn of their own."""

TURN_TOKENS = 8
"""What it may add around one message, generously."""


class Search(Protocol):
    """What an answer needs of retrieval."""

    async def search(
        self,
        scope: Scope,
        query: str,
        *,
        top_k: int = 5,
        mode: SearchMode = "hybrid",
        variety: Variety | None = None,
    ) -> SearchResult:
        """Find passages."""
        ...

    async def similarity(self, text: str, texts: list[str]) -> list[float]:
        """Cosine of `text` to each of `texts`."""
        ...


class Ratings:
    """What an engine thinks of how well texts answer a question: each is rated once in a request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[tuple[str, str], float] = {}

    async def __call__(self, question: str, texts: list[str]) -> list[float] | None:
        """Rate texts from 0 to 1; None where the engine cannot or does not answer: words and cosines then decide."""
        new = [text for text in dict.fromkeys(texts) if (question, text) not in self._known]
        try:
            rated = await self._engine.rate(question, new) if new else []
        except ServiceError:
            return None  # If it is down, the call that generates will say so.
        if rated is None:
            return None
        self._known.update(((question, text), rating) for text, rating in zip(new, rated, strict=True))
        return [self._known[question, text] for text in texts]


@dataclass(frozen=True, slots=True)
class Grounds:
    """What the search gave: `used` has hits to answer from, `irrelevant` calls for an abstention, the rest for neither.

    `found` is everything the search returned, `hits` what may be answered from, and `shown` what the engine is given of
    the first of them: whole passages, or their sentences that answer best.
    """

    outcome: GroundsOutcome
    hits: tuple[Hit, ...] = ()
    shown: tuple[Hit, ...] = ()
    found: tuple[Hit, ...] = ()
    index_version: str | None = None
    embed_seconds: float | None = None
    search_seconds: float = 0.0
    embedding_model: str | None = None
    rerank_seconds: float | None = None
    embedding: bytes | None = None
    """What was searched for, packed to be kept."""
    question: str = ""
    """What an answer has to answer: what was asked last. An answer to the turn before, which a search needs for its
    context, is a wrong one."""
    rewritten: str | None = None
    """That question as the engine has put it, where it did: then it is what was searched for."""


_CHOICES_OF_TASKS = frozenset(("top_k", "search", "per_document", "mmr", "rewrite"))
_CHOICES = _CHOICES_OF_TASKS | {"mode", "check", "fallback"}
"""What a request may choose in place of its release."""


def plan_for(request: ChatRequest, plan: RetrievalPlan, task: Task = ANSWER) -> RetrievalPlan:
    """The release's plan with what the request chose instead, fitted to the kind of answer asked for.

    An answer for a program (a task's, a tool call, JSON) must not be replaced by a sentence for a person, and what
    follows a tool's result rests on that result. Log-probabilities are of the tokens as they came.
    """
    chosen: dict[str, Any] = {}
    is_answer = task.is_answer
    if (options := request.retrieval) is not None:
        if options.mode == "off" and is_answer:  # Nothing else of a plan is asked then.
            return msgspec.structs.replace(plan, mode="off")
        names = _CHOICES if is_answer else _CHOICES_OF_TASKS
        chosen = {name: value for name, value in msgspec.to_builtins(options).items() if name in names}
    if request.messages[-1].role == "tool" or not is_answer:
        chosen |= {"check": "off", "fallback": "keep"}
    elif is_for_a_program(request):
        if chosen.get("check", plan.check) == "sentence":
            chosen["check"] = "end"
        if not request.logprobs:
            chosen["fallback"] = "keep"
    return msgspec.structs.replace(plan, **chosen) if chosen else plan


def is_for_a_program(request: ChatRequest) -> bool:
    """Whether a sentence for a person is no answer to this: a tool call, JSON or probabilities are asked for."""
    structured = request.response_format is not None and request.response_format.get("type") != "text"
    return bool(request.tools or structured or request.logprobs) or request.messages[-1].role == "tool"


async def retrieve(
    search: Search,
    scope: Scope,
    messages: Sequence[Message],
    prediction: Prediction,
    trace: RequestTrace,
    *,
    plan: RetrievalPlan,
    rate: Rate | None,
    engine: Engine | None = None,
) -> Grounds:
    """Find the passages to answer the last question from, noting on the record and in the trace what was found.

    An `engine` puts the question into words that can be searched by themselves, if the plan says so.

    Raises:
        ServiceError: as `find_grounds`.
    """
    prediction.question = query = search_query(messages)
    question, own = question_of(messages), None
    span = genai.start_retrieval(trace, collection=plan.collection, mode=plan.search, top_k=plan.top_k)
    started = perf_counter()
    try:
        if plan.rewrite and engine is not None and (own := await rewritten(engine, messages)) is not None:
            prediction.question = query = question = own
        grounds = await find_grounds(search, scope, query, plan=plan, question=question, rate=rate)
    except BaseException as error:
        genai.end_retrieval(trace, span, seconds=perf_counter() - started, error=error)
        raise
    finally:
        prediction.retrieve_seconds = perf_counter() - started
    prediction.retrieval_outcome = grounds.outcome
    prediction.index_version = grounds.index_version
    prediction.question_embedding = grounds.embedding
    prediction.passages = [hit_facts(hit) for hit in grounds.found]
    genai.end_retrieval(
        trace,
        span,
        seconds=prediction.retrieve_seconds,
        collection=plan.collection,
        hits=len(grounds.found),
        index_version=grounds.index_version,
        outcome=grounds.outcome,
        embedding_model=grounds.embedding_model,
        embed_seconds=grounds.embed_seconds or 0.0,
        search_seconds=grounds.search_seconds,
        error="index_unavailable" if grounds.outcome == "unavailable" else None,
    )
    return replace(grounds, question=question, rewritten=own)


async def find_grounds(
    search: Search,
    scope: Scope,
    query: str,
    *,
    plan: RetrievalPlan,
    question: str | None = None,
    rate: Rate | None = None,
) -> Grounds:
    """Search for `query` and judge what is found by `question`, which is the query where no conversation precedes it.

    Nothing found at all means that the tenant has no documents (`empty`: a plain chat), unless the caller named a
    filter or requires retrieval. `rate` says how well texts answer, where sentences are to be shown.

    Raises:
        RetrievalUnavailable: the index does not answer and the plan requires it.
        InvalidRequest: the filter is not of the supported form.
    """
    try:
        result = await search.search(scope, query, top_k=plan.top_k, mode=plan.search, variety=plan.variety)
    except (IndexUnavailable, IndexMismatch) as error:
        if plan.mode != "required":
            return Grounds("unavailable")
        raise RetrievalUnavailable(
            "The passages cannot be searched now and this release requires them.", retry_after_seconds=2
        ) from error
    except RetrievalError as error:
        raise from_retrieval(error, param="retrieval.filter") from error
    judged = relevance(query, result.hits, plan.policy)
    hits = judged.hits
    if rate is not None and judged.score >= plan.policy.relevance_rated:
        hits = result.hits  # The engine reads them before any of it is shown.
    outcome: GroundsOutcome = "used"
    if not hits:
        insist = plan.fallback != "keep" and (result.hits or scope.filter or plan.mode == "required")
        outcome = "irrelevant" if insist else "empty"
    shown = hits
    if hits and plan.context == "sentences":
        shown = await _narrowed(search, question or query, hits, plan, rate)
        if shown:
            ids = [hit.passage.id for hit in shown]
            hits = tuple(sorted(hits, key=lambda hit: ids.index(hit.passage.id) if hit.passage.id in ids else len(ids)))
        elif plan.fallback == "keep":
            shown = hits
        else:
            outcome, hits = "irrelevant", ()
    vector, model = result.query_vector, result.embedding_model
    packed = pack(vector, model) if vector is not None and model else None
    took = result.embed_seconds, result.search_seconds, result.embedding_model, result.rerank_seconds
    return Grounds(outcome, hits, shown, result.hits, result.index_version, *took, packed)


async def _narrowed(
    search: Search, question: str, hits: Sequence[Hit], plan: RetrievalPlan, rate: Rate | None
) -> tuple[Hit, ...]:
    """Replace the text of passages, for showing only, by their sentences that answer best; empty when none does."""
    return tuple(
        replace(hit, passage=replace(hit.passage, text=text))
        for hit, text in await best_sentences(question, hits, plan.policy, search.similarity, rate)
    )


async def fit_prompt(
    messages: list[Message],
    hits: Sequence[Hit],
    prompt: Prompt,
    task: Task = ANSWER,
    *,
    features: Sequence[tuple[str, Any]] | None = None,
    limit_tokens: int | None,
    answer_tokens: int,
    count_tokens: Callable[[str], Awaitable[int]],
    fence_key: bytes = b"",
) -> list[Message]:
    """Compose the prompt with as many passages as the engine's context has room for, the best first.

    Only a prompt that might not fit is counted by the engine: its size in bytes bounds its tokens from above.

    Raises:
        ContextTooLong: not even one passage fits beside the conversation.
    """
    passages = [hit.passage for hit in hits]
    composed = compose(messages, passages, prompt, task, features, fence_key=fence_key)
    if limit_tokens is None:
        return composed
    room = limit_tokens - answer_tokens - TEMPLATE_TOKENS - TURN_TOKENS * len(composed)
    while prompt_bytes(composed) > room:
        tokens = await count_tokens("\n".join(message.text for message in composed))
        if tokens <= room:
            break
        if len(passages) == 1:
            raise ContextTooLong(
                f"`messages`: the conversation and one passage have {tokens} tokens, and beside an answer of "
                f"{answer_tokens} the model has room for {max(room, 0)}. Shorten `messages` or lower `max_tokens`.",
                param="messages",
            )
        passages.pop()
        composed = compose(messages, passages, prompt, task, features, fence_key=fence_key)
    return composed


def hit_facts(hit: Hit) -> dict[str, Any]:
    """What goes on record about a passage that was found."""
    passage = hit.passage
    reranked = {} if hit.rerank_score is None else {"rerank_score": round(hit.rerank_score, 6)}
    return {
        "id": passage.id,
        "document_id": passage.document_id,
        "document_version": passage.document_version,
        "n": passage.n,
        "start": passage.start,
        "end": passage.end,
        "score": round(hit.score, 6),
        "dense_rank": hit.dense_rank,
        "dense_score": hit.dense_score,
        "sparse_rank": hit.sparse_rank,
        "sparse_score": hit.sparse_score,
        **reranked,
    }


def citation_facts(citation: Citation) -> dict[str, Any]:
    """What goes on record about a citation: enough to check the quote again, with the quote itself."""
    passage = citation.passage
    return {
        "n": citation.n,
        "status": citation.status,
        "support": round(citation.support, 4),
        "passage_id": passage.id,
        "document_id": passage.document_id,
        "document_version": passage.document_version,
        "answer_start": citation.answer_start,
        "answer_end": citation.answer_end,
        "source_start": citation.source_start,
        "source_end": citation.source_end,
        "quote": citation.quote,
    }
