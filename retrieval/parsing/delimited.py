"""Reads tables as text (CSV and the like): the delimiter is the one that cuts the first lines most evenly."""

import csv
import io
from collections import Counter

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import UnreadableDocument
from retrieval.parsing.draft import Draft
from retrieval.parsing.plain import decode
from retrieval.parsing.tables import write_table

_DELIMITERS = ",;\t|"
_SAMPLE_LINES = 50
_LONGEST_CELL = 1_000_000


def read(content: bytes, limits: ParseLimits, charset: str | None = None) -> ParsedDocument:
    """Return the rows as text."""
    text = decode(content, limits, charset)
    csv.field_size_limit(_LONGEST_CELL)
    lines = io.StringIO(text, newline="")
    draft = Draft(limits.max_characters)
    try:
        rows = enumerate(csv.reader(lines, delimiter=_delimiter(text)), 1)
        write_table(draft, ((number, {n: cell for n, cell in enumerate(row) if cell}) for number, row in rows))
    except csv.Error as error:
        raise UnreadableDocument(f"the table is damaged: {error}") from error
    if not draft.length:
        raise UnreadableDocument("the table has no text")
    return draft.finish(None)


def _delimiter(text: str) -> str:
    """Return the delimiter that gives the most rows of the same number of cells, more than one."""
    sample = text[:100_000].splitlines()[:_SAMPLE_LINES]
    best, most = ",", 0
    for delimiter in _DELIMITERS:
        try:
            widths = Counter(len(row) for row in csv.reader(sample, delimiter=delimiter))
        except csv.Error:
            continue
        rows = max((count for width, count in widths.items() if width > 1), default=0)
        if rows > most:
            best, most = delimiter, rows
    return best
