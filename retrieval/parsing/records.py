"""Reads JSON lines: each line is a record, written as its fields, or as text if it holds little else.

The main rule: a record is a block under its title if it has one, and its line is the last part of the heading path.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import UnreadableDocument
from retrieval.parsing.draft import Draft, tidy
from retrieval.parsing.plain import decode

_TITLES = ("title", "heading", "subject", "question", "name")
_TEXTS = ("text", "content", "body", "answer", "contents", "description")
# Neither can stand in a JSON string; the other characters at which Python cuts lines can.
_LINE_END = re.compile(r"\r\n?|\n")
_DEEPEST = 8
_LONGEST_TITLE = 200


def read(content: bytes, limits: ParseLimits, charset: str | None = None) -> ParsedDocument:
    """Return the records.

    Raises:
        UnreadableDocument: A line is not JSON, or no record has text.
    """
    draft = Draft(limits.max_characters)
    for number, line in enumerate(_LINE_END.split(decode(content, limits, charset)), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UnreadableDocument(f"line {number} is not JSON ({error}): each line must hold one record") from error
        _write(draft, record, number)
    if not draft.length:
        raise UnreadableDocument("the file has no record with text")
    return draft.finish(None, heading_is_title=False)


def _write(draft: Draft, record: Any, number: int) -> None:
    fields = dict(_fields(record))
    title = next((fields.pop(name) for name in _TITLES if 0 < len(fields.get(name, "")) <= _LONGEST_TITLE), "")
    draft.section()
    draft.heading(title, 1)
    text = next((fields.pop(name) for name in _TEXTS if name in fields), "")
    lines = [f"{name}: {value}" if name else value for name, value in fields.items()]
    place = f"line {number}"
    draft.block("\n".join(lines), "list", place)
    for paragraph in text.split("\n\n"):
        draft.block(paragraph, "paragraph", place)


def _fields(record: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the names and the texts of what a record holds, the names of inner fields after those of outer ones."""
    if isinstance(record, dict) and depth < _DEEPEST:
        for key, value in record.items():
            yield from _fields(value, f"{name}.{tidy(key)}" if name else tidy(key), depth + 1)
    elif isinstance(record, list) and any(isinstance(each, dict | list) for each in record) and depth < _DEEPEST:
        for index, value in enumerate(record, 1):
            yield from _fields(value, f"{name}.{index}" if name else str(index), depth + 1)
    elif (text := _shown(record)).strip():
        yield name, text


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return "\n\n".join(filter(None, (tidy(part) for part in value.split("\n\n"))))
    if isinstance(value, list):
        return ", ".join(filter(None, (_shown(each) for each in value)))
    return "" if value is None else json.dumps(value, ensure_ascii=False)
