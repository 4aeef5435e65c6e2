"""Rows of a team's own files as rows of a dataset.

The main rule: nothing is taken if one row cannot be. Up to `MAX_TOLD` bad rows are told, each with its file, its line,
its field and how to mend it.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import IO, Any, cast

import msgspec

from app.datasets.candidates import Candidates
from app.datasets.examples import Example, Unusable, content_of, example, fitting, turns_of
from app.datasets.files import KINDS, BadLine, kind_of, rows_of, split_of_name
from app.datasets.recipes import ImportedFile, Purpose, Recipe, Split
from app.datasets.sessions import conversation_of, session_of
from app.errors import InvalidRequest
from app.lineage import canonical
from app.messages import Message
from app.prompts import compose
from app.releases import Prompt

MAX_TOLD = 20
MAX_BAD = 1_000
"""After so many bad rows the rest is not read."""
MAX_FILES = 100

FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "question": ("question", "text", "prompt", "instruction", "input", "query"),
    "system": ("system",),
    "label": ("label", "category", "intent", "class"),
    "answer": ("answer", "response", "completion", "output", "target"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "passages": ("passages",),
    "citations": ("citations",),
    "answerable": ("answerable",),
    "session": ("session", "conversation", "conversation_id"),
    "subject": ("subject", "user", "user_id"),
    "slice": ("slice",),
    "weight": ("weight",),
    "split": ("split",),
}
"""Our fields, and what they may be called in a file where `columns` does not say it."""

_PASSAGE = ("id", "document_id", "document_version", "text")
_HELDOUT = frozenset({"heldout", "validation", "valid", "val", "dev", "test", "eval"})
_REASONS = {
    "unknown_class": "`label`: it is none of the recipe's `classes`",
    "unfit": "`answer`: it does not fit the recipe's `schema`",
    "not_plain_text": "`messages`: turns are plain text of a system (first), user or assistant",
    "no_question": "`messages`: the last turn before the answer must be the user's",
    "too_long": "the row is too long; shorten it to 1,000,000 characters",
}


class Upload(msgspec.Struct, frozen=True):
    """A file and its name within the folder it comes from."""

    name: str
    file: IO[bytes]


def take_files(tenant: str, purpose: Purpose, recipe: Recipe, uploads: Sequence[Upload], found: Candidates) -> Recipe:
    """Read files into rows; gives the recipe with the files' digests.

    Raises:
        InvalidRequest: a row cannot be taken, a column is none of ours, or a file is of no kind that is read.
    """
    unknown = sorted(set(recipe.columns) - set(FIELDS))
    if unknown:
        raise InvalidRequest(
            f"`columns`: there is no field {unknown[0]!r}; there are {', '.join(FIELDS)}.", param="columns"
        )
    files, problems = [], list[str]()
    for upload in sorted(uploads, key=lambda each: each.name):
        if kind_of(upload.name) is None:
            raise InvalidRequest(
                f"`files`: {upload.name!r} is of no kind that is read; {', '.join(KINDS)} are.", param="files"
            )
        rows = _take_file(tenant, purpose, recipe, upload, found, problems)
        upload.file.seek(0)
        digest = sha256()
        while piece := upload.file.read(1 << 20):
            digest.update(piece)
        files.append(ImportedFile(name=upload.name, sha256=digest.hexdigest(), rows=rows))
        if len(problems) >= MAX_BAD:
            break
    if problems:
        raise _refused(problems)
    return msgspec.structs.replace(recipe, files=tuple(files))


def _refused(problems: Sequence[str]) -> InvalidRequest:
    """The error that tells what is wrong with a file."""
    told = "\n".join(problems[:MAX_TOLD])
    count = f"{MAX_BAD:,} rows or more" if len(problems) >= MAX_BAD else f"{len(problems):,} rows"
    more = f"\nand {len(problems) - MAX_TOLD:,} more" if len(problems) > MAX_TOLD else ""
    return InvalidRequest(f"{count} cannot be taken, so none was:\n{told}{more}", param="files")


def _take_file(
    tenant: str, purpose: Purpose, recipe: Recipe, upload: Upload, found: Candidates, problems: list[str]
) -> int:
    side = split_of_name(upload.name)
    rows = 0
    for number, row in rows_of(upload.name, upload.file):
        try:
            if isinstance(row, BadLine):
                raise row
            found.add([_taken(tenant, purpose, recipe, row, side)])
            rows += 1
        except BadLine as error:
            problems.append(f"{upload.name} line {number}: {error}.")
        except Unusable as error:
            problems.append(f"{upload.name} line {number}: {_REASONS[error.reason]}.")
        if len(problems) >= MAX_BAD:
            break
    return rows


class _Row:
    """The fields of a row, by our names."""

    def __init__(self, recipe: Recipe, row: Mapping[str, Any]) -> None:
        self._columns = recipe.columns
        self._row = {name: value for name, value in row.items() if value is not None}

    def get(self, field: str) -> Any:
        """What a field holds; None where it is not there."""
        named = self._columns.get(field)
        if named is not None:
            return self._row.get(named)
        taken = set(self._columns.values())
        return next((self._row[name] for name in FIELDS[field] if name in self._row and name not in taken), None)

    def called(self, field: str) -> str:
        """What a field is called in the file."""
        return self._columns.get(field) or next((name for name in FIELDS[field] if name in self._row), field)

    def text(self, field: str, *, limit: int = 1_000_000) -> str | None:
        """The text of a field."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip() or len(value) > limit or "\0" in value:
            raise BadLine(f"`{self.called(field)}`: must be a text of 1 to {limit:,} characters")
        return value

    def need(self, field: str) -> str:
        """The text of a field that must be there."""
        value = self.text(field)
        if value is None:
            names = ", ".join(f"`{name}`" for name in FIELDS[field])
            raise BadLine(
                f"`{self.called(field)}` is missing: name the column in `columns.{field}`, or call it {names}"
            )
        return value

    def items(self, field: str) -> list[Any] | None:
        """The list of a field, also where it is written as JSON."""
        value = self.get(field)
        if isinstance(value, str):
            try:
                value = msgspec.json.decode(value)
            except (msgspec.DecodeError, RecursionError):
                value = False
        if value is not None and not isinstance(value, list):
            raise BadLine(f"`{self.called(field)}`: must be a list")
        return value


def _taken(tenant: str, purpose: Purpose, recipe: Recipe, given: Mapping[str, Any], side: Split | None) -> Example:
    """The row of a dataset that a row of a file makes; raises BadLine or Unusable."""
    try:
        return _example(tenant, purpose, recipe, given, side)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        # Files hold what JSON has not, such as dates and numbers without end: that is a row's fault, and no failure.
        raise BadLine("a value in it is of a kind that no row has; write it as text") from error


def _example(tenant: str, purpose: Purpose, recipe: Recipe, given: Mapping[str, Any], side: Split | None) -> Example:
    row = _Row(recipe, given)
    turns, target = _turns(row)
    facts: dict[str, Any] = {"slice": row.text("slice", limit=256), "weight": _number(row, "weight")}
    if recipe.task == "classify":
        target = facts["label"] = fitting(recipe.shape, _label(recipe, row, target))
    elif recipe.task == "preference":
        target, facts["rejected"] = _said(row, "chosen"), _said(row, "rejected")
        if target == facts["rejected"]:
            raise BadLine("`rejected`: is the same as `chosen`")
    else:
        target = fitting(recipe.shape, _answer(row, target))
    if recipe.task == "answer":
        facts |= _grounds(row)
    question = turns[-1]["content"]
    if recipe.template is not None:
        turns = _composed(recipe, turns)
    content = content_of(recipe.task, turns, target, **facts)
    own = sha256(canonical(content).encode()).hexdigest()
    subject, conversation = row.text("subject", limit=512), row.text("session", limit=512)
    return example(
        recipe,
        content,
        session=session_of(tenant, own, conversation, subject, by=recipe.split.by),
        conversation=conversation_of(tenant, conversation),
        question=question,
        subject=subject,
        split="heldout" if purpose == "evaluation" else _side(row, side),
    )


def _turns(row: _Row) -> tuple[list[dict[str, str]], str | None]:
    """The turns that a row asks by, and what was said then, where that stands among them."""
    given = row.items("messages")
    if given is None and isinstance(row.get("question"), list):
        given = row.items("question")
    if given is None:
        question, system = row.need("question"), row.text("system")
        start = [{"role": "system", "content": system}] if system else []
        return [*start, {"role": "user", "content": question}], None
    if not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in given):
        raise BadLine(f"`{row.called('messages')}`: each turn is an object with `role` and `content`")
    if given and given[-1]["role"] == "assistant":
        target = given[-1].get("content")
        if not isinstance(target, str):
            raise Unusable("not_plain_text")
        return turns_of(given[:-1]), target
    return turns_of(given), None


def _label(recipe: Recipe, row: _Row, target: str | None) -> str:
    value = row.get("label")
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(recipe.classes):
            return recipe.classes[value]
        raise BadLine(f"`{row.called('label')}`: is the number {value}; name the class, or list all in `classes`")
    label = (row.text("label", limit=256) if value is not None else target) or row.need("label")
    if label != label.strip() or not label.isprintable():
        raise BadLine(f"`{row.called('label')}`: must be one line without spaces at its ends")
    return label


def _answer(row: _Row, target: str | None) -> str:
    if target is not None:
        if not target.strip():
            raise BadLine(f"`{row.called('messages')}`: the assistant's last turn is empty; write the answer there")
        return target
    value = row.get("answer")
    if not isinstance(value, dict):
        return row.need("answer")
    try:
        return canonical(value)
    except TypeError as error:
        raise BadLine(f"`{row.called('answer')}`: {error}; write it as text") from None


def _said(row: _Row, field: str) -> str:
    """An answer, given as text or as the turns that end with it."""
    value = row.get(field)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
        if not isinstance(value, str) or not value.strip():
            raise BadLine(f"`{row.called(field)}`: its last turn must have a text as `content`")
        return value
    return row.need(field)


def _grounds(row: _Row) -> dict[str, Any]:
    answerable = row.get("answerable")
    if isinstance(answerable, str):
        answerable = {"true": True, "false": False}.get(answerable.lower(), answerable)
    if answerable is not None and not isinstance(answerable, bool):
        raise BadLine(f"`{row.called('answerable')}`: must be true or false")
    passages, citations = row.items("passages") or [], row.items("citations") or []
    if not all(isinstance(each, dict) and _is_passage(each) for each in passages):
        raise BadLine(
            f"`{row.called('passages')}`: each is an object with `id` and `text`, and perhaps `document_id` and "
            "`document_version`, all of them texts, and the `id` not empty"
        )
    if not all(isinstance(each, str) for each in citations):
        raise BadLine(f"`{row.called('citations')}`: must be a list of the ids of passages")
    known = [{name: each.get(name) for name in _PASSAGE} for each in passages]
    return {"passages": known, "citations": citations, "answerable": answerable is not False}


def _is_passage(given: Mapping[str, Any]) -> bool:
    texts = [given.get(name) for name in _PASSAGE]
    return (
        bool(given.get("id")) and all(isinstance(each, str | None) for each in texts) and given.get("text") is not None
    )


def _number(row: _Row, field: str) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool) or not 0 < number < 1e9:
        raise BadLine(f"`{row.called(field)}`: must be a number above 0")
    return number


def _side(row: _Row, side: Split | None) -> Split | None:
    """The side that a row says, else the one that its file's name says."""
    value = row.get("split")
    if value is None:
        return side
    if isinstance(value, str) and value in ("train", "training"):
        return "train"
    if isinstance(value, str) and value in _HELDOUT:
        return "heldout"
    raise BadLine(f"`{row.called('split')}`: must be `train` or `heldout` (or `validation`, `test`)")


def _composed(recipe: Recipe, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns as a release with this template asks them."""
    assert recipe.template is not None
    assert recipe.shape is not None
    messages = [Message(role=cast(Any, turn["role"]), content=turn["content"]) for turn in turns]
    asked = compose(messages, (), Prompt(version="import", template=recipe.template), recipe.shape)
    return [{"role": message.role, "content": message.text} for message in asked]
