"""A team's own files, row by row: JSON lines, CSV, Parquet, and folders as Hugging Face lays them out.

The main rule: a row that cannot be read is told by its file and its line, with what is wrong and how to mend it; and
the others are read all the same, so that all that is wrong can be mended at once.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

import msgspec

from app.datasets.recipes import Split
from app.parquet import MAX_ROW_BYTES, BadParquet, read_parquet

MAX_LINE = MAX_ROW_BYTES
"""Bytes of a line."""

KINDS = ("jsonl", "csv", "parquet")

_TRAIN = frozenset({"train", "training"})
_HELDOUT = frozenset({"heldout", "validation", "valid", "val", "dev", "test", "eval", "evaluation"})
_WORD = re.compile(r"[a-z]+")


class BadLine(Exception):
    """A line that is no row; the message names the field and the fix."""


def kind_of(name: str) -> str | None:
    """What a file is by its name; None where it is not read."""
    suffix = name.rpartition(".")[2].lower()
    kind = {"ndjson": "jsonl", "json": "jsonl"}.get(suffix, suffix)
    return kind if kind in KINDS else None


def split_of_name(name: str) -> Split | None:
    """The side of the split that a file's name says, as in `data/train-00000-of-00001.parquet` or `test/a.jsonl`."""
    for part in reversed(name.lower().removesuffix(name.lower().rpartition(".")[2]).split("/")):
        words = _WORD.findall(part)
        for words_of, side in ((_TRAIN, "train"), (_HELDOUT, "heldout")):
            if words and words[0] in words_of:
                return "train" if side == "train" else "heldout"
    return None


def rows_of(name: str, file: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any] | BadLine]]:
    """Give the number of each line and its row, or what is wrong with it; empty lines are none.

    A field of CSV that is empty is None.
    """
    kind = kind_of(name)
    if kind == "csv":
        yield from _csv(file)
    elif kind == "parquet":
        yield from _parquet(file)
    else:
        yield from _jsonl(file)


def _jsonl(file: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any] | BadLine]]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            yield number, BadLine(f"the line is longer than {MAX_LINE:,} bytes; one row is one line")
            return
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        if number == 1 and text.strip() == b"[":
            yield 1, BadLine("the file is one JSON list; write one object a line, with no brackets around them")
            return
        try:
            row = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            yield number, BadLine(f"it is no JSON: {error}; write one object a line")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, BadLine('it is no JSON object, as in {"text": ..., "label": ...}')


class _Lines:
    """The lines of a file as text, with a count of what was wrong in them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE + 1):
            self.number += 1
            if len(line) > MAX_LINE:
                raise BadLine(f"the line is longer than {MAX_LINE:,} bytes")
            text = line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line
            try:
                yield text.decode()
            except UnicodeDecodeError:
                raise BadLine("it is not UTF-8; save the file as UTF-8") from None


def _csv(file: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any] | BadLine]]:
    lines = _Lines(file)
    # The limit is the process's: whatever reads CSV says its own. A field is no longer than its line is, or its lines.
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if not any(header) or len(set(header)) < len(header):
            yield 1, BadLine("the first line must name the columns, each once")
            return
        while True:
            started = lines.number + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            if not values:
                continue
            if len(values) == len(header):
                named = zip(header, values, strict=True)
                yield started, {name: value or None for name, value in named if name or value}
            else:
                yield (
                    started,
                    BadLine(
                        f"it has {len(values)} fields where the first line names {len(header)} columns; put fields "
                        'that have commas or line breaks into "quotes"'
                    ),
                )
    except (csv.Error, BadLine) as error:
        # Where the quotes are wrong no later line can be told apart.
        yield max(1, lines.number), BadLine(str(error) if isinstance(error, BadLine) else f"it is no CSV: {error}")


def _parquet(file: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any] | BadLine]]:
    number = 0
    try:
        for row in read_parquet(file):
            number += 1
            yield number, row
    except BadParquet as error:
        yield number + 1, BadLine(str(error))
