"""What an answer is worth: by the same rules as the service and the quality figures use."""

from typing import Any

import pytest

from app.tasks import Misfit, Task
from finetune.dataset import Manifest, Message, Passage, Row
from finetune.scoring import Answer, Citation, exact_match, read_label, score, token_f1
from observability import matching

LABELS = ("card arrival", "card", "top up", "Top-Up", "lost")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "n": {"type": "integer"}},
    "required": ["name"],
}


def manifest(task: str, **more: Any) -> Manifest:
    return Manifest(format="hallmark-dataset/1", name="n", version="1", digest="d", task=task, splits={}, **more)  # type: ignore[arg-type]


def row(task: str, target: str, **more: Any) -> Row:
    turns = (Message("user", "?"), Message("assistant", target))
    return Row(row="r", content_digest="c", task=task, messages=turns, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["card", " card arrival\n", "Card arrival.", "**lost**", "card or lost", "the card", "top up", "TOP UP", "cards",
     "", "Top-Up!", "card arrival, not card"],
)  # fmt: skip
def test_labels_are_read_as_the_service_reads_them(text: str) -> None:
    try:
        expected = Task(kind="classify", labels=LABELS).read(text)
    except Misfit:
        expected = None
    assert read_label(text, LABELS) == expected


@pytest.mark.parametrize(
    ("answer", "right"), [("The cat.", "a cat"), ("cat dog", "dog cat cat"), ("", "cat"), ("", ""), ("x", "y")]
)
def test_words_are_matched_as_the_quality_figures_match_them(answer: str, right: str) -> None:
    assert exact_match(answer, right) == matching.exact_match(answer, [right])
    assert token_f1(answer, right) == pytest.approx(matching.token_f1(answer, [right]))


def test_a_class_is_right_or_wrong_and_an_answer_that_failed_is_wrong() -> None:
    classes, given = manifest("classify", labels=LABELS), row("classify", "card", label="card")
    assert score(given, Answer(row="r", text="Card."), classes).score == 1
    assert score(given, Answer(row="r", text="lost"), classes).said == "lost"
    failed = score(given, Answer(row="r", text="card", failure="timeout"), classes)
    assert (failed.score, failed.failed) == (0, True)


def test_citations_are_right_by_passage_number_or_by_the_words_they_quote() -> None:
    passages = (
        Passage(id="d/1", document_id="d", text="Up to 50 MB."),
        Passage(id="d/2", document_id="d", text="By mail only."),
    )
    given = row("answer", "50 MB [1]", passages=passages, citations=("d/1", "d/2"))
    by_number, by_quote = Citation(document_id="d", passage=1), Citation(document_id="d", passage=9, quote="mail  only")
    elsewhere = Citation(document_id="e", passage=1, quote="Up to 50 MB.")
    found = score(given, Answer(row="r", text="50 MB [1].", citations=(by_number, elsewhere)), manifest("answer"))
    assert (found.score, found.cited, found.cited_right, found.to_cite, found.to_cite_found) == (1, 2, 1, 2, 1)
    found = score(given, Answer(row="r", text="x", citations=(by_quote,)), manifest("answer"))
    assert (found.cited_right, found.to_cite_found) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "answerable", "worth", "abstained"),
    [
        (Answer(row="r", text="anything", abstained=True), False, 1, True),
        (Answer(row="r", text="anything", abstained=False), False, 0, False),
        (Answer(row="r", text="I don't know."), False, 1, True),
        (Answer(row="r", text="red", abstained=True), True, 0, True),
        (Answer(row="r", text="red"), True, 1, False),
        (Answer(row="r", failure="timeout"), False, 0, False),
    ],
)
def test_abstaining_is_right_where_there_is_no_answer_and_wrong_elsewhere(
    answer: Answer, answerable: bool, worth: float, abstained: bool
) -> None:
    found = score(row("answer", "red", answerable=answerable), answer, manifest("answer"))
    assert (found.score, found.abstained, found.answerable) == (worth, abstained, answerable)
    assert (found.token_f1 is None) != answerable


@pytest.mark.parametrize(
    ("text", "valid", "exact", "f1"),
    [
        ('{"n": 3, "name": "Ana"}', 1, 1, 1),
        ('```json\n{"name": "Ana", "n": 3}\n```', 1, 1, 1),
        ('{"name": "Ana", "n": 4}', 1, 0, 0.5),
        ('{"n": 3}', 0, 0, 2 / 3),
        ("Ana, 3", 0, 0, 0),
        ("[1]", 0, 0, 0),
        ('{"name": "Ana", "n": 3, "m": ' + "[" * 900 + "1" + "]" * 900 + "}", 1, 0, 0.8),
        ('{"n": 3, "name": "\\ud83d"}', 0, 0, 0.5),
        ('{"n": 3, "name": "Ana", "\\ud83d": 1}', 1, 0, 0.8),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, 0, 0, 0),
    ],
)
def test_data_is_valid_by_its_schema_and_right_field_by_field(text: str, valid: float, exact: float, f1: float) -> None:
    given = row("extract", '{"name": "Ana", "n": 3}')
    found = score(given, Answer(row="r", text=text), manifest("extract", schema=SCHEMA))
    assert (found.valid, found.exact, found.score) == (valid, exact, exact)
    assert found.token_f1 == pytest.approx(f1)
