"""Which passages an answer may rest on, and how many of them the engine's context has room for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.chat import ChatRequest, RetrievalOptions
from app.errors import ContextTooLong, EngineUnavailable, InvalidRequest, RetrievalUnavailable
from app.grounding import TEMPLATE_TOKENS, TURN_TOKENS, Ratings, find_grounds, fit_prompt, plan_for
from app.messages import Message
from app.prompts import prompt_bytes
from app.releases import Prompt, RetrievalPlan
from retrieval.documents import Hit, Passage, Scope, SearchMode, SearchResult
from retrieval.errors import IndexMismatch, IndexUnavailable, InvalidFilter, RetrievalError

QUESTION = "How fast does the kettle boil?"
PROMPT = Prompt("t", "{sources}\n{question}")


def hit(text: str, n: int = 1, cosine: float = 0.9) -> Hit:
    passage = Passage("doc", "0" * 64, n, text, 0, len(text))
    return Hit(passage, 1.0, dense_rank=n, dense_score=cosine)


class Search:
    """Finds what it was given, or fails with it."""

    def __init__(self, *found: Hit | RetrievalError) -> None:
        self.found = found
        self.asked: list[tuple[Scope, str, int, str]] = []

    async def search(
        self, scope: Scope, query: str, *, top_k: int = 5, mode: SearchMode = "hybrid", **_: Any
    ) -> SearchResult:
        self.asked.append((scope, query, top_k, mode))
        hits = []
        for each in self.found:
            if isinstance(each, RetrievalError):
                raise each
            hits.append(each)
        return SearchResult(tuple(hits), "v1", embed_seconds=0.25)

    async def similarity(self, text: str, texts: list[str]) -> list[float]:
        raise AssertionError


GOOD = hit("The kettle boils fast: one litre in 90 seconds.")
OTHER = hit("Nothing of the kind.", 2, cosine=0.0)


@pytest.mark.parametrize(
    ("found", "plan", "filtered", "outcome", "shown"),
    [
        ((GOOD, OTHER), {}, {}, "used", (GOOD,)),
        ((OTHER,), {}, {}, "irrelevant", ()),
        ((OTHER,), {"fallback": "keep"}, {}, "empty", ()),
        ((), {}, {}, "empty", ()),
        ((), {}, {"a": 1}, "irrelevant", ()),
        ((), {"mode": "required"}, {}, "irrelevant", ()),
        ((), {"fallback": "keep"}, {"a": 1}, "empty", ()),
        ((IndexUnavailable("down"),), {}, {}, "unavailable", ()),
        ((IndexMismatch("other embedder"),), {}, {}, "unavailable", ()),
    ],
)
async def test_what_was_found_decides_how_the_request_is_answered(found, plan, filtered, outcome, shown):
    search = Search(*found)
    scope = Scope("acme", filtered)
    grounds = await find_grounds(search, scope, QUESTION, plan=RetrievalPlan(top_k=3, **plan))
    assert (grounds.outcome, grounds.hits) == (outcome, shown)
    assert search.asked == [(scope, QUESTION, 3, "hybrid")]
    if outcome != "unavailable":
        assert grounds.found == found  # What was found is on record, shown to the engine or not.
        assert (grounds.index_version, grounds.embed_seconds) == ("v1", 0.25)


class Alike(Search):
    """Finds every text as near as the next."""

    async def similarity(self, text: str, texts: list[str]) -> list[float]:
        return [0.5] * len(texts)


SENTENCES = RetrievalPlan(context="sentences")


async def test_a_small_engine_is_shown_the_sentences_that_answer_best_and_their_passages_come_first():
    kettles = hit("Kettles are made of steel.", 2, cosine=0.8)
    search = Alike(kettles, hit("The kettle boils fast: one litre in 90 seconds. It is red.", 1))
    grounds = await find_grounds(search, Scope("acme"), QUESTION, plan=SENTENCES)
    assert grounds.outcome == "used"
    assert [each.passage.text for each in grounds.shown] == ["The kettle boils fast: one litre in 90 seconds."]
    assert [each.passage.n for each in grounds.hits] == [1, 2]
    assert grounds.hits[0].passage.text.endswith("It is red.")


@pytest.mark.parametrize(("fallback", "outcome", "shown"), [("extract", "irrelevant", 0), ("keep", "used", 1)])
async def test_no_sentence_about_the_question_is_nothing_relevant_unless_the_engine_may_go_on(fallback, outcome, shown):
    plan = RetrievalPlan(context="sentences", fallback=fallback)
    search = Alike(hit("The kettle is red, and kettles are fast to clean.", cosine=0.5))
    grounds = await find_grounds(search, Scope("acme"), "How many litres does the Zürich kettle boil?", plan=plan)
    assert (grounds.outcome, len(grounds.shown)) == (outcome, shown)


async def test_in_a_conversation_the_last_question_chooses_the_sentences():
    search = Alike(hit("The kettle boils one litre in 90 seconds. The kettle costs 30 euros."))
    query = f"{QUESTION}\nHow much does it cost?"
    grounds = await find_grounds(search, Scope("acme"), query, plan=SENTENCES, question="How much does it cost?")
    assert [each.passage.text for each in grounds.shown] == ["The kettle costs 30 euros."]


class Rater:
    """An engine that rates texts by a table, or fails."""

    def __init__(self, ratings: dict[str, float] | None = None, error: Exception | None = None) -> None:
        self.ratings, self.error = ratings, error
        self.asked: list[list[str]] = []

    async def rate(self, question: str, texts: list[str]) -> list[float] | None:
        self.asked.append(texts)
        if self.error:
            raise self.error
        return None if self.ratings is None else [self.ratings.get(text, 0.5) for text in texts]


FIRST = "The kettle boils one litre in 90 seconds."
TWO = "The kettle boils one litre in 90 seconds. The kettle boils for 3 minutes at most."


async def test_an_engine_that_rates_chooses_the_sentence():
    # A sentence is rated with the one before it, which it may lean on.
    rate = Ratings(Rater({TWO: 0.999, FIRST: 0.01}))
    grounds = await find_grounds(Alike(hit(TWO)), Scope("acme"), QUESTION, plan=SENTENCES, rate=rate)
    assert [each.passage.text for each in grounds.shown] == ["The kettle boils for 3 minutes at most."]


async def test_what_an_engine_takes_for_no_answer_is_not_relevant_however_near_its_words():
    rate = Ratings(Rater({TWO: 0.001, FIRST: 0.001}))
    grounds = await find_grounds(Alike(hit(TWO)), Scope("acme"), QUESTION, plan=SENTENCES, rate=rate)
    assert (grounds.outcome, grounds.shown) == ("irrelevant", ())


@pytest.mark.parametrize("rater", [Rater(), Rater(error=EngineUnavailable("down"))])
async def test_without_ratings_words_choose(rater):
    with_one, without = [
        await find_grounds(Alike(hit(TWO)), Scope("acme"), QUESTION, plan=SENTENCES, rate=rate)
        for rate in (Ratings(rater), None)
    ]
    assert with_one == without
    assert rater.asked


async def test_a_text_is_rated_once_in_a_request():
    rater = Rater({"a": 0.1, "b": 0.2, "c": 0.3})
    rate = Ratings(rater)
    assert await rate("?", ["a", "b", "a"]) == [0.1, 0.2, 0.1]
    assert await rate("?", ["c", "a"]) == [0.3, 0.1]
    assert await rate("?", ["b"]) == [0.2]
    assert rater.asked == [["a", "b"], ["c"]]


@pytest.mark.parametrize("error", [IndexUnavailable("down"), IndexMismatch("other embedder")])
async def test_an_index_that_is_required_and_down_is_a_503_to_retry(error):
    with pytest.raises(RetrievalUnavailable) as raised:
        await find_grounds(Search(error), Scope("acme"), QUESTION, plan=RetrievalPlan(mode="required"))
    assert raised.value.retry_after_seconds


async def test_a_bad_filter_is_the_caller_s_mistake_and_names_the_field():
    with pytest.raises(InvalidRequest, match="bad") as raised:
        await find_grounds(Search(InvalidFilter("bad")), Scope("acme"), QUESTION, plan=RetrievalPlan())
    assert raised.value.param == "retrieval.filter"


@pytest.mark.parametrize(
    ("field", "value"),
    [("mode", "off"), ("top_k", 9), ("search", "dense"), ("check", "end"), ("fallback", "keep")],
)
def test_a_request_may_choose_what_the_release_leaves_open(field, value):
    plan = plan_for(asking(retrieval=RetrievalOptions(**{field: value})), RetrievalPlan())
    assert getattr(plan, field) == value
    assert plan == RetrievalPlan(**{field: value})


def test_a_request_that_chooses_nothing_gets_the_release_s_plan():
    plan = RetrievalPlan(top_k=7)
    assert plan_for(asking(retrieval=RetrievalOptions()), plan) is plan


def asking(*messages: Message, **chosen: object) -> ChatRequest:
    return ChatRequest(model="m", messages=list(messages) or [Message(role="user", content=QUESTION)], **chosen)


TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("request_", "check", "fallback"),
    [
        (asking(), "sentence", "extract"),
        (asking(response_format={"type": "text"}), "sentence", "extract"),
        (asking(response_format={"type": "json_object"}), "end", "keep"),
        (asking(tools=[TOOL]), "end", "keep"),
        (asking(tools=[TOOL], retrieval=RetrievalOptions(check="off")), "off", "keep"),
        (asking(logprobs=True), "end", "extract"),
        (asking(Message(role="user", content=QUESTION), Message(role="tool", content="9 degrees")), "off", "keep"),
    ],
)
def test_an_answer_for_a_program_is_never_rewritten_for_a_person(request_, check, fallback):
    plan = plan_for(request_, RetrievalPlan())
    assert (plan.check, plan.fallback) == (check, fallback)


async def test_nothing_relevant_for_a_program_is_no_reason_to_abstain():
    plan = plan_for(asking(tools=[TOOL]), RetrievalPlan())
    search = Search(hit("The moon is made of rock.", cosine=0.0))
    assert (await find_grounds(search, Scope("acme"), QUESTION, plan=plan)).outcome == "empty"


class Counter:
    """Counts words, and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, text: str) -> int:
        self.calls += 1
        return len(text.split())


async def fitted(hits: list[Hit], *, limit: int | None, answer: int = 10) -> tuple[list[Message], int]:
    counter = Counter()
    messages = [Message(role="system", content="Be brief."), Message(role="user", content=QUESTION)]
    composed = await fit_prompt(messages, hits, PROMPT, limit_tokens=limit, answer_tokens=answer, count_tokens=counter)
    return composed, counter.calls


WORDS = st.integers(1, 40).map(lambda count: " ".join(["word"] * count))


@given(texts=st.lists(WORDS, min_size=1, max_size=6), limit=st.integers(1, 400), answer=st.integers(0, 40))
async def test_as_many_passages_as_fit_are_shown_the_best_first(texts, limit, answer):
    hits = [hit(text, n) for n, text in enumerate(texts, start=1)]
    every, _ = await fitted(hits, limit=None)
    room = limit - answer - TEMPLATE_TOKENS - TURN_TOKENS * len(every)
    prompts = {k: (await fitted(hits[:k], limit=None))[0] for k in range(1, len(hits) + 1)}

    async def fits(k: int) -> bool:
        text = "\n".join(message.text for message in prompts[k])
        return prompt_bytes(prompts[k]) <= room or len(text.split()) <= room

    most = max([k for k in prompts if await fits(k)], default=0)
    if most:
        assert (await fitted(hits, limit=limit, answer=answer))[0] == prompts[most]
    else:
        with pytest.raises(ContextTooLong) as raised:
            await fitted(hits, limit=limit, answer=answer)
        assert raised.value.param == "messages"


@given(texts=st.lists(WORDS, min_size=1, max_size=6), limit=st.integers(1, 400))
async def test_what_is_shown_fits_with_a_system_turn_that_the_template_brings(texts, limit):
    """SmolLM2's template turns one message of n tokens into n + 30."""
    hits = [hit(text, n) for n, text in enumerate(texts, start=1)]
    asked = [Message(role="user", content=QUESTION)]
    try:
        (message,) = await fit_prompt(asked, hits, PROMPT, limit_tokens=limit, answer_tokens=10, count_tokens=Counter())
    except ContextTooLong:
        return
    assert len(message.text.split()) + 30 + 10 <= limit


async def test_the_fence_is_made_of_the_passages_that_there_was_room_for():
    prompt, hits = Prompt("t", "{fence} {sources} {question}"), [hit("word " * 20, 1), hit("word " * 20, 2)]
    asked = [Message(role="user", content=QUESTION)]

    async def given(hits: list[Hit], limit: int | None, key: bytes = b"k") -> str:
        (message,) = await fit_prompt(
            asked, hits, prompt, limit_tokens=limit, answer_tokens=0, count_tokens=Counter(), fence_key=key
        )
        return message.text

    limit = 37 + TEMPLATE_TOKENS + TURN_TOKENS
    assert await given(hits, limit) == await given(hits[:1], None)
    assert await given(hits, limit) != await given(hits[:1], None, key=b"l")


async def test_a_prompt_that_fits_by_its_bytes_is_not_counted():
    _, calls = await fitted([GOOD], limit=2_000)
    assert calls == 0
    _, calls = await fitted([GOOD], limit=100)
    assert calls == 1


async def test_an_engine_that_names_no_limit_is_given_everything():
    composed, calls = await fitted([hit("word " * 5_000, n) for n in range(1, 4)], limit=None)
    assert composed[-1].text.count("word") == 15_000
    assert calls == 0
