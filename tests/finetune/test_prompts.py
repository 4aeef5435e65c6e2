"""What is trained is what is served: templates are filled as the gateway fills a release's."""

import pytest

from app.messages import Message as Served
from app.prompts import ANSWER_PROMPT, CLASSIFY_PROMPT, EXTRACT_PROMPT, Prompt, compose
from app.tasks import Task
from finetune.dataset import Feature, Manifest, Message, Passage, Row
from finetune.errors import BadDataset
from finetune.prompts import asked
from retrieval.documents import Passage as Found

SCHEMA = {"type": "object", "properties": {"städte": {"type": "array"}}}
CASES = {
    "classify": (CLASSIFY_PROMPT, Task(kind="classify", labels=("red", "blue"))),
    "extract": (EXTRACT_PROMPT, Task(kind="extract", schema=SCHEMA)),
    "answer": (ANSWER_PROMPT, Task()),
}


def row(**more: object) -> Row:
    turns = (
        Message("system", "Be kind."),
        Message("user", " What of {labels} and </sources>? "),
        Message("assistant", "x"),
    )
    return Row(row="r", content_digest="c", task="answer", messages=turns, **more)  # type: ignore[arg-type]


def manifest(task: Task) -> Manifest:
    return Manifest(
        format="hallmark-dataset/1", name="n", version="1", digest="d", task=task.kind, splits={}, labels=task.labels,
        schema=task.schema,
    )  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_row_is_put_as_the_gateway_puts_it(kind: str) -> None:
    prompt, task = CASES[kind]
    passages = (
        Passage(
            id="d/0", text=" Red. <sources> <|im_end|>[INST]</s> ", title="Colours", heading_path=("Colours", "Warm")
        ),
        Passage(id="d/1", text="Blue."),
    )
    served = [
        Found(document_id="d", document_version="v", document_name="", document_title=each.title or "", n=n,
              heading_path=each.heading_path, text=each.text or "", start=0, end=9, page=None)
        for n, each in enumerate(passages)
    ]  # fmt: skip
    given = row(passages=passages)
    messages = [Served(role=each.role, content=each.content) for each in given.asked]
    expected = compose(
        messages, served if kind == "answer" else (), Prompt(version="p", template=prompt.template), task
    )
    mine = asked(given, prompt.template, manifest(task))
    assert [(each.role, each.content) for each in mine] == [(each.role, each.text) for each in expected]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("is_grounded", [True, False])
def test_features_stand_in_a_row_as_the_gateway_puts_them(kind: str, is_grounded: bool) -> None:
    task = CASES[kind][1]
    template = "{features}|{sources}|{question}" if is_grounded else "{features}|{question}"
    features = (
        Feature("c:plan", "<features> é {question} <|im_end|>"),
        Feature("c:n", 2),
        Feature("c:x", 0.5),
        Feature("c:b", True),
    )
    turns = (Message("system", "<Features>"), Message("user", " </ features > "), Message("assistant", "x"))
    given = Row(row="r", content_digest="c", task="answer", messages=turns, features=features)
    messages = [Served(role=each.role, content=each.content) for each in given.asked]
    known = [(each.feature, each.value) for each in features]
    expected = compose(messages, (), Prompt(version="p", template=template), task, known)
    mine = asked(given, template, manifest(task))
    assert [(each.role, each.content) for each in mine] == [(each.role, each.text) for each in expected]


def test_without_a_template_the_messages_are_as_they_are() -> None:
    assert asked(row(), None, manifest(Task())) == row().messages[:-1]


def test_a_question_that_stands_in_a_template_is_asked_bare_or_put_into_another() -> None:
    given = Row(row="r", content_digest="c", task="answer", question="Why?",
                messages=(Message("user", "Q: Why?"), Message("assistant", "x")))  # fmt: skip
    assert [asked(given, None, manifest(Task()), bare=bare)[-1].content for bare in (True, False)] == [
        "Why?",
        "Q: Why?",
    ]
    assert asked(given, "Now: {question}", manifest(Task()))[-1].content == "Now: Why?"


def test_a_passage_whose_text_is_gone_is_told() -> None:
    with pytest.raises(BadDataset, match="a passage has no text any more"):
        asked(row(passages=(Passage(id="d/0"),)), ANSWER_PROMPT.template, manifest(Task()))
