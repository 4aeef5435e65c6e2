"""Brackets of a passage: those that are text stay, those that mark the passage's own sources leave."""

import pytest

from retrieval.citations import AnswerChecker
from retrieval.documents import Hit, Passage


async def sent(question: str, text: str, answer: str) -> tuple[str, AnswerChecker]:
    checker = AnswerChecker(question, [Hit(Passage("doc", "v", 1, text, 0, len(text)), 1.0, dense_score=0.8)])
    return await checker.feed(answer) + await checker.finish(), checker


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (
            "To read the eighth item of a list use items[7] in the template.",
            "Use items[7] in the template to read the eighth item of a list.",
            "Use items[7] in the template to read the eighth item of a list [1].",
        ),
        (
            "The retry factor lies in the range [1, 10] and is set by the operator.",
            "The retry factor lies in the range [1,\n10].",
            "The retry factor lies in the range [1,\n10] [1].",
        ),
    ],
)
async def test_a_bracket_that_is_text_of_a_passage_stays(text: str, answer: str, expected: str) -> None:
    out, checker = await sent("What is the item or the range?", text, answer)
    assert out.replace("[1, 10]", "[1,\n10]") == expected
    assert checker.verdict.invented_numbers == ()


@pytest.mark.parametrize("mark", ["[3]", " [3]", " [3, 4]"])
async def test_marks_of_a_passages_own_sources_are_taken_for_ours_nowhere(mark: str) -> None:
    question, text = "At what temperature does water boil?", f"Water boils at 100 degrees{mark}. It was shown in 1871."
    out, checker = await sent(question, text, f"Water boils at 100 degrees{mark}.")
    assert out == "Water boils at 100 degrees [1]."
    out, checker = await sent(question, text, "Bananas are yellow.")
    assert out == "Water boils at 100 degrees [1]."
    assert checker.citations[0].quote == f"Water boils at 100 degrees{mark}."


async def test_an_engines_marker_after_a_word_of_a_passage_is_a_marker() -> None:
    text = "Water boils at 100 degrees in the open air."
    out, _ = await sent("When does water boil?", text, "Water boils at 100 degrees[1] in the open air.")
    assert out == "Water boils at 100 degrees[1] in the open air."
