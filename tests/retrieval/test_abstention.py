"""When not to answer: what is not relevant, what claims nothing, and what an engine's abstention looks like."""

import pytest

from retrieval.abstention import CheckPolicy, engine_abstains, is_polar, relevance, says_nothing, split_yes_no
from retrieval.documents import Hit, Passage
from retrieval.terms import terms

KEPT = "How long are predictions kept?"
TEXTS = ("Predictions are kept for 30 days.", "The log is a queue.", "A release is immutable; so are predictions.")


def found(*, dense: tuple[float | None, ...]) -> list[Hit]:
    return [
        Hit(Passage("handbook", "v1", n, text, 0, len(text)), 1.0 / n, dense_score=cosine)
        for n, (text, cosine) in enumerate(zip(TEXTS, dense, strict=True), 1)
    ]


def test_what_is_off_topic_is_not_worth_asking_an_engine() -> None:
    judged = relevance("What is the capital of France?", found(dense=(0.05, 0.0, None)), CheckPolicy())
    assert (judged.relevant, judged.hits) == (False, ())


def test_what_is_on_topic_is_kept_and_what_only_distracts_is_not() -> None:
    judged = relevance(KEPT, found(dense=(0.6, 0.1, 0.5)), CheckPolicy())
    assert judged.relevant
    assert [hit.passage.n for hit in judged.hits] == [1, 3]


def test_without_a_dense_leg_the_words_decide_what_is_relevant() -> None:
    assert relevance(KEPT, found(dense=(None, None, None)), CheckPolicy()).relevant
    assert not relevance("What is the capital of France?", found(dense=(None, None, None)), CheckPolicy()).relevant
    assert not relevance(KEPT, [], CheckPolicy()).relevant


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I cannot answer this from the passages.",
        "I’m not able to find it.",
        "The provided documents do not mention audit logs.",
        "This is not specified in the context.",
        "There is not enough information.",
        "It cannot be determined.",
        "N/A",
        "Not mentioned.",
    ],
)
def test_an_abstention_is_recognised(text: str) -> None:
    assert engine_abstains(text)


@pytest.mark.parametrize("text", ["The log is not a file.", "Users do not own releases.", "Nothing is deleted.", "No."])
def test_a_plain_denial_is_not_an_abstention(text: str) -> None:
    assert not engine_abstains(text)


def test_a_question_that_begins_with_a_verb_asks_for_yes_or_no() -> None:
    assert is_polar("Is it so?")
    assert is_polar("And does it work?")
    assert not is_polar("What is it?")
    assert not is_polar("Isolation: how?")


def test_a_leading_yes_or_no_is_an_answer_only_when_it_stands_apart() -> None:
    assert split_yes_no("Yes, it is.") == ("yes", "it is.")
    assert split_yes_no("**No**") == ("no", "")
    assert split_yes_no("No release is deleted.") == (None, "No release is deleted.")
    assert split_yes_no("Yesterday it was.") == (None, "Yesterday it was.")


@pytest.mark.parametrize(
    "text", ["Sure!", "Here is the answer:", "# Retention", "Is that what you mean?", "Predictions are kept."]
)
def test_a_sentence_may_claim_nothing(text: str) -> None:
    assert says_nothing(text, terms(text), KEPT, terms(KEPT))


@pytest.mark.parametrize("text", ["30 days", "Forever.", "There are 5 ways:"])
def test_a_value_is_a_claim(text: str) -> None:
    assert not says_nothing(text, terms(text), KEPT, terms(KEPT))


def test_the_words_of_the_question_may_be_its_answer_where_it_offers_a_choice() -> None:
    question = "Which is kept, the prediction or the feedback?"
    assert not says_nothing("The prediction.", terms("The prediction."), question, terms(question))
