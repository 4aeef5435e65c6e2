"""When requests are due and how long they are: read from a trace, line by line, or drawn at a rate.

Two formats are read: Azure's LLM inference traces (CSV: TIMESTAMP,ContextTokens,GeneratedTokens) and Mooncake's (JSONL:
timestamp in milliseconds, input_length, output_length). A wrong line is refused with its number and field.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from app.errors import InvalidRequest

_CSV = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_JSONL = ("timestamp", "input_length", "output_length")
_LONGEST_FIELD_CHARACTERS = 131_072
MAX_TOKENS = 10_000_000


@dataclass(frozen=True)
class Arrival:
    """One request: when it is due, from the start of the run, and how long it and its answer are."""

    due_seconds: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path, *, speed: float = 1.0, limit: int | None = None) -> Iterator[Arrival]:
    """The requests of a trace, the first due at once, `speed` times as fast as they came; holds one line at a time.

    Raises:
        InvalidRequest: a line cannot be read; the message has its number and field.
    """
    if speed <= 0.0:
        raise InvalidRequest(f"`--speed`: {speed} is not above 0.", param="speed")
    return islice(_from_start(path, speed), limit)


def at_rate(rate: float, seconds: float, prompt_tokens: int, output_tokens: int, *, seed: int = 0) -> Iterator[Arrival]:
    """Requests as independent callers send them: a Poisson process of `rate` a second, the same for the same seed."""
    chance = random.Random(seed)  # noqa: S311 - a reproducible load, not secrecy.
    due = chance.expovariate(rate)
    while due < seconds:
        yield Arrival(due, prompt_tokens, output_tokens)
        due += chance.expovariate(rate)


def back_to_back(count: int, prompt_tokens: int, output_tokens: int) -> Iterator[Arrival]:
    """Requests that are all due at once, for a run whose concurrency is what paces it."""
    return (Arrival(0.0, prompt_tokens, output_tokens) for _ in range(count))


def _from_start(path: Path, speed: float) -> Iterator[Arrival]:
    """Times from the first line's; they may not go back."""
    start = last = None
    number = 1
    for number, clock, prompt, output in _lines(path):
        start = clock if start is None else start
        if last is not None and clock < last:
            raise _wrong(path, number, _CSV[0] if path.suffix == ".csv" else _JSONL[0], "is before the line above it")
        last = clock
        yield Arrival((clock - start) / speed, prompt, output)
    if start is None:
        raise _wrong(path, number, "file", "holds no requests")


def _lines(path: Path) -> Iterator[tuple[int, float, int, int]]:
    """Line number, seconds on the trace's clock, tokens of prompt and answer."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        if path.suffix == ".csv":
            csv.field_size_limit(_LONGEST_FIELD_CHARACTERS)  # It is the process's: whatever reads CSV says its own.
            yield from _csv_lines(path, csv.reader(file))
        else:
            yield from _json_lines(path, file)


def _csv_lines(path: Path, rows: Any) -> Iterator[tuple[int, float, int, int]]:
    try:
        header: list[str] = next(rows, [])
        missing = [name for name in _CSV if name not in header]
        if missing:
            raise _wrong(path, 1, missing[0], f"is not a column; the columns are {', '.join(header)[:200] or 'none'}")
        places = [header.index(name) for name in _CSV]
        for row in rows:
            if row:
                values = [row[place] if place < len(row) else None for place in places]
                yield _checked(path, rows.line_num, _CSV, values, _time_of_day)
    except csv.Error as error:
        raise _wrong(path, rows.line_num, "line", f"is not CSV: {error}") from None


def _json_lines(path: Path, lines: Any) -> Iterator[tuple[int, float, int, int]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _wrong(path, number, "line", f"is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise _wrong(path, number, "line", "is not a JSON object")
        yield _checked(path, number, _JSONL, [found.get(name) for name in _JSONL], _milliseconds)


def _checked(
    path: Path, number: int, names: tuple[str, ...], values: list[Any], clock: Callable[[Any], float]
) -> tuple[int, float, int, int]:
    if None in values:
        raise _wrong(path, number, names[values.index(None)], "is missing")
    try:
        seconds = clock(values[0])
    except (ValueError, TypeError):
        raise _wrong(path, number, names[0], f"{str(values[0])[:40]!r} is no time") from None
    counts = []
    for name, value in zip(names[1:], values[1:], strict=True):
        try:
            count = int(value)
        except (ValueError, TypeError):
            count = -1
        if not 0 <= count <= MAX_TOKENS or isinstance(value, float | bool):
            raise _wrong(path, number, name, f"{str(value)[:40]!r} is no number of tokens")
        counts.append(max(1, count))  # A request has a prompt, and asks for an answer.
    return number, seconds, counts[0], counts[1]


def _time_of_day(text: str) -> float:
    """Azure's traces of 2024 say their zone, those of 2023 do not; only differences count."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _milliseconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError(value)
    return value / 1000.0


def _wrong(path: Path, number: int, field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{path.name}, line {number}: `{field}` {what}.", param=field)
