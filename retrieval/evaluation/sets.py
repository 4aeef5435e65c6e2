"""Reads what is measured on: a team's own questions, or public sets in BEIR's and SQuAD's form.

The main rule: a bad line is told by its number and field, and nothing is measured without it.

A team's questions are a file of lines, each a JSON object:

    {"question": "How long are audit logs kept?", "documents": ["handbook/audit.md"], "answers": ["90 days"]}
    {"question": "Who founded the company?", "answerable": false}

`documents` names what answers it, as a list or with relevance (`{"handbook/audit.md": 2, "faq.md": 1}`); `answers` are
texts of which a right answer holds one, in whatever case. `kind` says of a question without an answer whether it is a
`near_miss` (of the documents' field; the default) or `off_topic`. `id` is the line's number unless given.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retrieval.errors import RetrievalError
from retrieval.evaluation.measures import Relevance

Kind = Literal["answerable", "near_miss", "off_topic"]
_FIELDS = frozenset(("id", "question", "documents", "answers", "answerable", "kind"))


class BadSet(RetrievalError):
    """What is to be measured on cannot be read; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the documents that answer it, and texts of which a right answer holds one."""

    id: str
    text: str
    documents: Relevance
    answers: tuple[str, ...] = ()
    kind: Kind = "answerable"


@dataclass(frozen=True, slots=True)
class TextDocument:
    """A document as a set in BEIR's form has it."""

    name: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Questions, and the documents of a set that brings its own: texts, or files of a folder by name."""

    name: str
    questions: tuple[Question, ...]
    texts: tuple[TextDocument, ...] = ()
    files: Mapping[str, Path] | None = None

    @property
    def judged(self) -> list[Question]:
        """The questions of which it is known what answers them."""
        return [each for each in self.questions if each.documents]


def load(path: Path, documents: Path | None = None) -> EvaluationSet:
    """Read a set: a folder in BEIR's form (itself or under `beir/`), with SQuAD's answers if it has them, or a file.

    Raises:
        BadSet: it is none of these, or a line of it is wrong.
    """
    if path.is_file():
        files = _files(documents) if documents else None
        return EvaluationSet(path.stem, tuple(_questions(path, files)), files=files)
    folder = path / "beir" if (path / "beir").is_dir() else path
    if not (folder / "corpus.jsonl").is_file():
        raise BadSet(f"{path}: name a file of questions, or a folder with corpus.jsonl, queries.jsonl and qrels.tsv.")
    texts = tuple(
        TextDocument(row["_id"], row.get("title", ""), row["text"])
        for _, row in _rows(folder / "corpus.jsonl", "_id", "text")
    )
    squad = sorted(path.glob("dev-v2*.json"))
    questions = _squad(squad[0], texts) if squad else tuple(_beir(folder))
    return EvaluationSet(path.name, questions, texts)


def off_topic(path: Path, most: int | None = None) -> list[Question]:
    """Read questions that no document of a set answers, evenly through a file of questions or a BEIR folder.

    Raises:
        BadSet: there are none.
    """
    folder = path / "beir" if (path / "beir").is_dir() else path
    file = folder / "queries.jsonl" if folder.is_dir() else path
    field = "text" if file.name == "queries.jsonl" else "question"
    texts = list(dict.fromkeys(row[field] for _, row in _rows(file, field)))
    step = max(1, len(texts) // most) if most else 1
    name = path.name if folder.is_dir() else path.stem
    return [Question(f"{name}-{n}", text, {}, kind="off_topic") for n, text in enumerate(texts[::step][:most], 1)]


def _questions(file: Path, files: Mapping[str, Path] | None) -> Iterator[Question]:
    """The questions of a file; where the documents are known, those that answer must be among them."""
    known: dict[str, int] = {}
    for number, row in _rows(file, "question"):
        where = f"{file}, line {number}"
        if unknown := row.keys() - _FIELDS:
            raise BadSet(f"{where}: {min(unknown)!r} is no field; there are {', '.join(sorted(_FIELDS))}.")
        name = row.get("id", str(number))
        if not isinstance(name, str) or name in known:
            first = f": line {known[name]} has it too" if isinstance(name, str) else ""
            raise BadSet(f"{where}: 'id' must be a text of its own{first}.")
        known[name] = number
        question = _question(name, row, where)
        if files is not None and (absent := question.documents.keys() - files.keys()):
            raise BadSet(f"{where}: there is no {min(absent)!r} in the folder of documents.")
        yield question
    if not known:
        raise BadSet(f"{file}: there is no question in it.")


def _question(name: str, row: Mapping[str, Any], where: str) -> Question:
    answers, answerable = row.get("answers", []), row.get("answerable", True)
    if not isinstance(answerable, bool):
        raise BadSet(f"{where}: 'answerable' must be true or false.")
    if not isinstance(answers, list) or not all(isinstance(each, str) and each.strip() for each in answers):
        raise BadSet(f"{where}: 'answers' must be a list of texts.")
    relevant = _relevance(row.get("documents", []), where)
    kind = row.get("kind", "answerable" if answerable else "near_miss")
    if kind not in (("answerable",) if answerable else ("near_miss", "off_topic")):
        raise BadSet(f"{where}: 'kind' of a question without an answer is near_miss or off_topic, not {kind!r}.")
    if answerable and not relevant and not answers:
        raise BadSet(f"{where}: say by 'documents' or 'answers' what answers it, or set 'answerable' to false.")
    if not answerable and (relevant or answers):
        raise BadSet(f"{where}: 'answerable' is false, so 'documents' and 'answers' must be empty.")
    return Question(name, row["question"].strip(), relevant, tuple(answers), kind)


def _relevance(given: Any, where: str) -> Relevance:
    found = dict.fromkeys(given, 1) if isinstance(given, list) and all(isinstance(n, str) for n in given) else given
    if not isinstance(found, dict) or not all(type(value) is int and value > 0 for value in found.values()):
        raise BadSet(f"{where}: 'documents' must be a list of names, or say for each name a relevance of 1 or more.")
    return found


def _beir(folder: Path) -> Iterator[Question]:
    judgements: dict[str, dict[str, int]] = {}
    qrels = folder / "qrels.tsv"
    for number, line in enumerate(_text(qrels).splitlines()[1:], 2):
        try:
            question, document, relevance = line.split("\t")
            degree = int(relevance)
        except ValueError:
            raise BadSet(f"{qrels}, line {number}: it must be question, document and relevance, with tabs.") from None
        if degree > 0:
            judgements.setdefault(question, {})[document] = degree
    for _, row in _rows(folder / "queries.jsonl", "_id", "text"):
        if row["_id"] in judgements:
            yield Question(row["_id"], row["text"], judgements[row["_id"]])


def _squad(file: Path, texts: tuple[TextDocument, ...]) -> tuple[Question, ...]:
    """Questions of SQuAD 2 (Rajpurkar, Jia, Liang 2018): those without an answer are near misses, written to be."""
    names = {text.text: text.name for text in texts}
    found = []
    try:
        for article in json.loads(_text(file))["data"]:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in row["answers"]))
                    name = names.get(paragraph["context"])
                    if answers and name:
                        found.append(Question(row["id"], row["question"].strip(), {name: 1}, answers))
                    elif not answers:
                        found.append(Question(row["id"], row["question"].strip(), {}, kind="near_miss"))
    except (KeyError, TypeError, ValueError) as error:
        raise BadSet(f"{file}: it is not in SQuAD's form: {type(error).__name__} {error}.") from error
    return tuple(found)


def _files(folder: Path) -> dict[str, Path]:
    """The files under a folder by the names that `hallmark ingest` gives them."""
    if not folder.is_dir():
        raise BadSet(f"{folder}: there is no such folder of documents.")
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not found:
        raise BadSet(f"{folder}: there is no document in it.")
    return found


def _rows(file: Path, *texts: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give each line with its number; the fields `texts` must be there and hold a text."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadSet(f"{file}, line {number}: it is no JSON: {error}.") from None
        if not isinstance(row, dict):
            raise BadSet(f"{file}, line {number}: it must be a JSON object.")
        for field in texts:
            if not isinstance(row.get(field), str) or not (row[field].strip() or field == "text"):
                raise BadSet(f"{file}, line {number}: it needs {field!r}, a text.")
        yield number, row


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSet(f"{file}: it cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.") from error
