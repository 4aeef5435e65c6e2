"""What can be measured on: sets that are read, and lines that are told to be wrong."""

import json
from pathlib import Path

import pytest

from retrieval.evaluation.sets import BadSet, load, off_topic

GOOD = {"question": "How long are audit logs kept?", "documents": ["audit.md"], "answers": ["90 days"]}


def write(folder: Path, *lines: object) -> Path:
    file = folder / "own.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


def write_beir(folder: Path) -> Path:
    files = folder / "tiny" / "beir"
    files.mkdir(parents=True)
    documents = [
        {"_id": "cats", "title": "Cats", "text": "They sleep most of the day and hunt at night."},
        {"_id": "dogs", "title": "Dogs", "text": "They bark and guard the house."},
        {"_id": "tower", "title": "", "text": "The tower is 330 metres tall. " * 60},
    ]
    questions = [{"_id": "q1", "text": "Do cats sleep?"}, {"_id": "q2", "text": "Unjudged"}]
    questions.append({"_id": "q3", "text": "How tall is the tower in metres?"})
    (files / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    (files / "queries.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    (files / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tcats\t1\nq1\tdogs\t0\nq3\ttower\t2\n")
    return folder / "tiny"


def test_a_teams_questions_are_read_with_what_their_lines_leave_out(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        GOOD,
        {"id": "graded", "question": " Which? ", "documents": {"a.md": 2, "b.md": 1}},
        "",
        {"question": "Who founded it?", "answerable": False},
        {"question": "What is rain?", "answerable": False, "kind": "off_topic"},
    )
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "sub" / "c.md").write_text("text")
    for name in ("audit.md", "a.md", "b.md"):
        (tmp_path / "docs" / name).write_text("text")
    found = load(file, tmp_path / "docs")
    assert [(each.id, each.text, each.kind) for each in found.questions] == [
        ("1", "How long are audit logs kept?", "answerable"),
        ("graded", "Which?", "answerable"),
        ("4", "Who founded it?", "near_miss"),
        ("5", "What is rain?", "off_topic"),
    ]
    assert found.questions[0].documents == {"audit.md": 1}
    assert found.questions[1].documents == {"a.md": 2, "b.md": 1}
    names = ("a.md", "audit.md", "b.md", "sub/c.md")
    assert found.files == {name: tmp_path / "docs" / name for name in names}
    assert found.name == "own"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ([1], "must be a JSON object"),
        ({"documents": ["a"]}, "needs 'question'"),
        ({"question": " "}, "needs 'question'"),
        ({**GOOD, "answer": "x"}, "'answer' is no field"),
        ({**GOOD, "id": "first"}, "'id' must be a text of its own"),
        ({**GOOD, "answers": "90"}, "'answers' must be a list of texts"),
        ({**GOOD, "answers": [""]}, "'answers' must be a list of texts"),
        ({**GOOD, "documents": [1]}, "'documents' must be a list of names"),
        ({**GOOD, "documents": {"a": 0}}, "'documents' must be a list of names"),
        ({"question": "Which?"}, "say by 'documents' or 'answers'"),
        ({**GOOD, "answerable": False}, "must be empty"),
        ({"question": "Which?", "answerable": "no"}, "'answerable' must be true or false"),
        ({"question": "Which?", "answerable": False, "kind": "odd"}, "'kind'"),
        ({**GOOD, "kind": "near_miss"}, "'kind'"),
    ],
)
def test_a_wrong_line_is_told_by_its_number_and_field(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(BadSet, match=f"own.jsonl, line 2: .*{message}"):
        load(write(tmp_path, {**GOOD, "id": "first"}, line))


def test_a_document_that_is_not_in_the_folder_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "audit.md").write_text("text")
    file = write(tmp_path, GOOD, {**GOOD, "documents": {"audit.md": 2, "nope.md": 1}})
    with pytest.raises(BadSet, match=r"own.jsonl, line 2: there is no 'nope.md' in the folder"):
        load(file, tmp_path / "docs")
    assert len(load(file).questions) == 2  # Which documents a service has is not known here.


def test_what_is_no_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadSet, match="there is no question in it"):
        load(write(tmp_path, ""))
    with pytest.raises(BadSet, match=r"corpus\.jsonl"):
        load(tmp_path)
    with pytest.raises(BadSet, match="no such folder"):
        load(write(tmp_path, GOOD), tmp_path / "absent")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BadSet, match="not UTF-8"):
        load(tmp_path / "binary.jsonl")
    folder = write_beir(tmp_path)
    (folder / "beir" / "qrels.tsv").write_text("a\tb\tc\nq1 cats 1\n")
    with pytest.raises(BadSet, match=r"qrels\.tsv, line 2: .*with tabs"):
        load(folder)


def test_a_set_in_beirs_form_is_read_without_its_unjudged_questions(tmp_path: Path) -> None:
    found = load(write_beir(tmp_path))
    assert {each.id: each.documents for each in found.questions} == {"q1": {"cats": 1}, "q3": {"tower": 2}}
    assert [each.name for each in found.texts] == ["cats", "dogs", "tower"]


def test_squads_questions_have_their_answers_and_its_near_misses(tmp_path: Path) -> None:
    folder = write_beir(tmp_path)
    asked = [
        {"id": "s1", "question": "Who barks?", "answers": [{"text": "They"}, {"text": "They"}]},
        {"id": "s2", "question": "Who meows?", "answers": []},
    ]
    paragraph = {"context": "They bark and guard the house.", "qas": asked}
    (folder / "dev-v2.0.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    first, second = load(folder).questions
    assert (first.documents, first.answers, first.kind) == ({"dogs": 1}, ("They",), "answerable")
    assert (second.documents, second.answers, second.kind) == ({}, (), "near_miss")
    (folder / "dev-v2.0.json").write_text('{"data": [{}]}')
    with pytest.raises(BadSet, match="not in SQuAD's form"):
        load(folder)


def test_questions_of_other_fields_are_taken_evenly(tmp_path: Path) -> None:
    assert [each.text for each in off_topic(write_beir(tmp_path), 2)] == ["Do cats sleep?", "Unjudged"]
    file = write(tmp_path, *({"question": f"What is {n}?"} for n in range(10)))
    assert [(each.id, each.text, each.kind) for each in off_topic(file, 2)] == [
        ("own-1", "What is 0?", "off_topic"),
        ("own-2", "What is 5?", "off_topic"),
    ]
