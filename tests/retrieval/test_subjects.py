"""A value belongs to the subject beside which it stands, and the question said again holds none."""

import pytest

from retrieval.citations import AnswerChecker
from retrieval.documents import Hit, Passage

TABLE = "| Plan | Price | Term |\n|---|---|---|\n| Basic | 12 EUR | 30 days |\n| Pro | 40 EUR | 60 days |"
ITEMS = "- Plan: Basic; Price: 12 EUR; Term: 30 days\n- Plan: Pro; Price: 40 EUR; Term: 60 days"
SENTENCES = "The Basic plan costs 12 EUR. The Pro plan costs 40 EUR."
SECTIONS = "## The Basic plan\n\nIt costs 12 EUR.\n\n## The Pro plan\n\nIt costs 40 EUR."


async def answered(question: str, answer: str, text: str) -> bool:
    """Tell whether the engine's own sentence left."""
    checker = AnswerChecker(question, [Hit(Passage("doc", "v", 1, text, 0, len(text)), 1.0, dense_score=0.8)])
    await checker.feed(answer)
    await checker.finish()
    return checker.verdict.label == "answered"


@pytest.mark.parametrize("text", [TABLE, ITEMS, SENTENCES])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does the Pro plan cost?", "The Pro plan costs 12 EUR."),
        ("What does the Pro plan cost?", "It costs 12 EUR."),
        ("What is the price of the Pro plan?", "The price of the Pro plan is 12 EUR."),
        ("What is the term of the Pro plan?", "The term of the Pro plan is 30 days."),
    ],
)
async def test_a_value_of_another_subject_is_withheld(text: str, question: str, answer: str) -> None:
    assert not await answered(question, answer, text)


async def test_headings_over_sentences_are_their_subjects() -> None:
    assert not await answered("What does the Pro plan cost?", "The Pro plan costs 12 EUR.", SECTIONS)
    assert await answered("What does the Pro plan cost?", "The Pro plan costs 40 EUR.", SECTIONS)


@pytest.mark.parametrize("text", [TABLE, ITEMS, SENTENCES])
@pytest.mark.parametrize("answer", ["The Pro plan costs 40 EUR.", "It costs 40 EUR."])
async def test_the_subjects_own_value_leaves(text: str, answer: str) -> None:
    assert await answered("What does the Pro plan cost?", answer, text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The Pro plan is for teams of 10. It costs 40 EUR a month.", "The Pro plan costs 40 EUR a month."),
        ("The Pro plan came in 2019. The price was 40 EUR at first.", "The Pro plan costs 40 EUR."),
        ("Pro costs 40 EUR. Pro costs 400 EUR a year.", "The Pro plan costs 40 EUR."),
    ],
)
async def test_a_sentence_that_goes_on_about_the_subject_gives_its_value(text: str, answer: str) -> None:
    assert await answered("What does the Pro plan cost?", answer, text)


async def test_other_words_for_the_same_are_no_other_subject() -> None:
    text = "Access logs are stored for 30 days. Error logs are kept for 90 days."
    assert await answered("How long are access logs kept?", "Access logs are kept for 30 days.", text)
    assert not await answered("How long are error logs kept?", "Error logs are kept for 30 days.", text)


@pytest.mark.parametrize(
    ("question", "again", "answer"),
    [
        (
            "Which setting should I lower when the embedded engine is slow?",
            "When the embedded engine is slow, you should lower the setting to a lower number.",
            "Lower `HALLMARK_EMBEDDED_THREADS` when the embedded engine is slow.",
        ),
        (
            "Why is the embedded engine slow on a machine with other programs?",
            "The embedded engine is slow on a machine with other programs beside it.",
            "The embedded engine is slow because other programs use the same cores.",
        ),
    ],
)
async def test_the_question_said_again_is_no_answer(question: str, again: str, answer: str) -> None:
    text = (
        "The embedded engine is slow on a machine with other programs, because they use the same cores. "
        "When the embedded engine is slow, set `HALLMARK_EMBEDDED_THREADS` to a lower number."
    )
    assert not await answered(question, again, text)
    assert await answered(question, answer, text)


async def test_what_a_document_says_word_for_word_is_an_answer_however_little_it_adds() -> None:
    text = "The Borealis toaster has four slots. The crumb tray slides out at the back."
    asked = "Where does the crumb tray of the Borealis toaster slide out?"
    assert await answered(asked, "The crumb tray slides out at the back.", text)
