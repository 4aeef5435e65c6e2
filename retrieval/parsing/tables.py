"""Writes tables so that a passage of a few rows can be understood, found and quoted by itself.

The main rule: under a head row each row becomes a line that names its columns ("- Product: Gateway; Price: 12 €"); a
table without one keeps its form (`| cell | cell |`). The rows of a block are the last part of its heading path.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from retrieval.parsing.draft import Draft, tidy

Row = tuple[int, Mapping[int, str]]
"""A row's number, from 1, and the cells that are not empty, by their column."""

# As much as makes a passage of the usual size.
_BLOCK_CHARACTERS = 600
_LONGEST_HEAD = 80
_FEWEST_NAMES = 3
_ROWS_LOOKED_AT = 20
_MOST_OUTSIDE = 0.25
_NUMBER = re.compile(r"[^\w\s]{0,3}\d[\d\s.,:/%()€$£+-]*\Z")


def write_table(draft: Draft, rows: Iterable[Row]) -> None:
    """Write a sheet's rows; empty rows separate tables, and a lone cell above one is its caption."""
    for region in _regions(rows):
        first = 0
        while first < len(region) - 1 and len(region[first][1]) == 1 and _width(region) > 1:
            draft.block(next(iter(region[first][1].values())), "paragraph")
            first += 1
        table = region[first:]
        head = _head(table)
        _write_rows(draft, table[1:] if head else table, head)


def _regions(rows: Iterable[Row]) -> Iterator[list[Row]]:
    region: list[Row] = []
    for number, cells in rows:
        shown = {column: text for column, cell in cells.items() if (text := " ".join(tidy(cell).split()))}
        if shown:
            region.append((number, shown))
        elif region:
            yield region
            region = []
    if region:
        yield region


def _head(table: Sequence[Row]) -> Mapping[int, str] | None:
    """Return the first row if it names the columns: short words, each once, above rows that are mostly no wider."""
    if len(table) < 2:
        return None
    head = table[0][1]
    names = list(head.values())
    if len(set(names)) < len(names) or any(_NUMBER.match(name) or len(name) > _LONGEST_HEAD for name in names):
        return None
    below = [row for _, row in table[1:_ROWS_LOOKED_AT]]
    if len(names) < 2 or len(names) < sorted(len(row) for row in below)[len(below) // 2]:
        return None
    # A second table beside this one, or further down, has other names.
    if sum(not row.keys() <= head.keys() for row in below) > len(below) * _MOST_OUTSIDE:
        return None
    # Two columns of words may as well be names and values.
    has_numbers = any(_NUMBER.match(cell) for row in below for cell in row.values())
    return head if len(names) >= _FEWEST_NAMES or has_numbers else None


def _write_rows(draft: Draft, rows: Sequence[Row], head: Mapping[int, str] | None) -> None:
    lines = [(number, _record(head, row) if head else f"| {' | '.join(row.values())} |") for number, row in rows]
    size = sum(len(line) for _, line in lines)
    share = size / max(1, round(size / _BLOCK_CHARACTERS))
    block: list[str] = []
    first = written = 0
    for index, (number, line) in enumerate(lines):
        first = first if block else number
        block.append(line)
        written += len(line)
        if written >= share or index == len(lines) - 1:
            place = f"row {number}" if first == number else f"rows {first} to {number}"
            draft.block("\n".join(block), "list" if head else "table", place)
            block, written = [], 0


def _record(head: Mapping[int, str], row: Mapping[int, str]) -> str:
    return "- " + "; ".join([f"{head[column]}: {cell}" if column in head else cell for column, cell in row.items()])


def _width(region: Sequence[Row]) -> int:
    return max(len(row) for _, row in region)
