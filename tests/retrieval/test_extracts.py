"""What is quoted when an engine's answer does not stand: the sentences that answer best, readable on their own."""

from typing import Any

import pytest

from retrieval.citations import AnswerChecker, best_sentences
from retrieval.documents import Hit, Passage
from retrieval.judging import CheckPolicy


def hits(*texts: str) -> list[Hit]:
    return [
        Hit(Passage(f"doc-{n}", "v1", n, text, 0, len(text)), 1.0 / n, dense_score=0.6)
        for n, text in enumerate(texts, 1)
    ]


async def quoted(question: str, *texts: str, answer: str = "", **options: Any) -> tuple[str, AnswerChecker]:
    checker = AnswerChecker(question, hits(*texts), **options)
    return await checker.feed(answer) + await checker.finish(), checker


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        (
            "How long is the copy of a prediction kept?",
            "The copy of a prediction is kept on the disk. A copy stays for 30 days.",
            "A copy stays for 30 days",
        ),
        (
            "How many clerks check a claim?",
            "Clerks check a claim with care, and every claim is checked. Two clerks look at a claim.",
            "Two clerks look at a claim",
        ),
        (
            "Which variable sets the port?",
            "The port is set by a variable of the environment. The variable `APP_PORT` sets it.",
            "`APP_PORT`",
        ),
    ],
)
async def test_the_sentence_that_holds_what_is_asked_for_is_quoted(question: str, text: str, expected: str) -> None:
    out, checker = await quoted(question, text)
    assert expected in out
    assert checker.verdict.status == "replaced"


async def test_an_amount_that_nobody_tells_is_not_replaced_by_a_sentence_without_one() -> None:
    out, checker = await quoted(
        "How many keys does a tenant have?", "A tenant has keys. The keys of a tenant are secret."
    )
    assert checker.verdict.status == "abstained", out


async def test_two_places_that_answer_about_equally_are_both_quoted_and_cited() -> None:
    texts = ("The port of the gateway is 8080.", "The port of the gateway is 9090 in the cluster.")
    out, checker = await quoted("Which port has the gateway?", *texts)
    assert out == "The port of the gateway is 8080 [1]. The port of the gateway is 9090 in the cluster [2]."
    assert [each.quote for each in checker.citations] == list(texts)


async def test_neighbouring_sentences_are_one_quote() -> None:
    text = "A clerk checks 12 claims an hour. A senior clerk checks 20 claims an hour. Tea is free."
    out, checker = await quoted("How many claims does a clerk check?", text)
    assert out == "A clerk checks 12 claims an hour. A senior clerk checks 20 claims an hour [1]."
    assert checker.citations[0].quote == text.removesuffix(" Tea is free.")


async def test_a_question_for_yes_or_no_gets_one_quote() -> None:
    texts = ("A release is immutable.", "A release of the gateway is immutable as well.")
    _, checker = await quoted("Is a release immutable?", *texts, answer="No.")
    assert len(checker.citations) == 1


async def test_a_sentence_that_points_back_brings_the_one_it_points_to() -> None:
    text = "`GET /alive` returns 200. Use it as the liveness probe of the gateway."
    out, _ = await quoted("Which route is the liveness probe of the gateway?", text)
    assert "`GET /alive`" in out


async def test_a_heading_is_never_brought() -> None:
    out, _ = await quoted("What is the liveness probe?", "# Probes\n\nThis route is the liveness probe: `GET /alive`.")
    assert out.startswith("This route")


@pytest.mark.parametrize(
    "block",
    ["```sh\nexport COLLECTOR_URL=http://collector\n```", "- open the settings;\n- enter the collector's address."],
)
async def test_a_sentence_with_a_colon_brings_what_follows_it(block: str) -> None:
    text = f"Set the address of the collector in this way:\n\n{block}\n\nRestart afterwards."
    out, checker = await quoted("Where do I set the address of the collector?", text)
    assert block.rstrip("`.\n ") in out
    assert "Restart" not in out
    assert checker.citations[0].quote in text


async def test_a_row_of_a_table_is_told_with_the_names_of_its_cells() -> None:
    text = "| priority | reaction | solved |\n|---|---|---|\n| 1 | 15 minutes | 4 hours |\n| 2 | 2 hours | 3 days |"
    out, checker = await quoted("What is the reaction to priority 2?", text)
    assert "priority: 2, reaction: 2 hours, solved: 3 days" in out
    assert "| 2 | 2 hours | 3 days |" in checker.citations[0].quote


async def test_a_table_that_goes_on_from_the_passage_before_has_its_head_among_the_headings() -> None:
    text = "| 415 | the file is of a type that is not read |\n| 503 | the engine is down |"
    passage = Passage("doc", "v1", 2, text, 0, len(text), heading_path=("Errors", "status | meaning"))
    checker = AnswerChecker("Which status says that the engine is down?", [Hit(passage, 1.0, dense_score=0.6)])
    assert "status: 503, meaning: the engine is down" in await checker.finish()


async def test_a_claim_in_the_words_of_a_table_s_head_is_supported_by_its_row() -> None:
    text = "| priority | reaction |\n|---|---|\n| 1 | 15 minutes |\n| 2 | 2 hours |"
    out, checker = await quoted("How fast is the reaction to priority 2?", text, answer="The reaction takes 2 hours.")
    assert checker.verdict.label == "answered", out


async def test_an_answer_from_far_worse_a_place_than_the_best_gives_way_to_the_best() -> None:
    texts = (
        "The first byte of an answer may take 120 seconds.",
        "The gateway waits up to 600 seconds for the engine to become ready.",
    )
    question = "How long may the first byte of an answer take?"
    out, _ = await quoted(question, *texts, answer="It waits up to 600 seconds for the engine to become ready.")
    assert out == "The first byte of an answer may take 120 seconds [1]."


async def test_an_engine_that_was_given_sentences_has_to_restate_them() -> None:
    text = "Predictions are kept for 30 days on the disk of the gateway."
    loose = "Predictions are kept on a large disk for 30 days, as usual everywhere."
    _, checker = await quoted("How long are predictions kept?", text, answer=loose)
    assert checker.verdict.status == "answered"
    _, checker = await quoted("How long are predictions kept?", text, answer=loose, shown=1)
    assert checker.verdict.status == "replaced"


async def test_an_engine_that_was_given_sentences_cannot_answer_from_others() -> None:
    texts = ("Predictions are kept for 30 days.", "Backups are kept for 90 days.")
    answer = "Backups are kept for 90 days."
    assert (await quoted("How long are backups kept?", *texts, answer=answer))[1].verdict.status == "answered"
    _, checker = await quoted("How long are backups kept?", *texts, answer=answer, shown=1)
    assert checker.verdict.status == "replaced"


async def test_the_best_sentences_come_with_their_hits_and_none_for_another_subject() -> None:
    found = hits("Nothing of the kind is here.", "Predictions are kept for 30 days. The disk is large.")
    best = await best_sentences("How long are predictions kept?", found, CheckPolicy())
    assert best == [(found[1], "Predictions are kept for 30 days.")]
    assert await best_sentences("Who won the cup?", found, CheckPolicy()) == []


async def test_a_heading_inside_a_passage_is_no_answer_and_tells_what_follows_it() -> None:
    text = "## How long are predictions kept?\n\nFor 30 days.\n\n## How long do backups take?\n\nFor 5 minutes."
    out, _ = await quoted("How long do backups take?", text)
    assert out.startswith("For 5 minutes"), out
    assert "#" not in out
