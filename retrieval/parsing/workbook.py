"""Reads workbooks (XLSX): a sheet is a page and a heading, and its rows are records.

The main rule: what is hidden is not text: hidden sheets, rows and columns. Values are as they were last computed;
dates, times and percentages are written as such, by their number format.
"""

import math
import re
import zipfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import Any

from retrieval.documents import Page, ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.parsing.archive import local, open_archive, read_xml, related, title_in_properties, walk_xml
from retrieval.parsing.draft import Draft, tidy
from retrieval.parsing.tables import Row, write_table

_REFERENCE = re.compile(r"([A-Z]{1,3})(\d{1,7})\Z")
_QUOTED = re.compile(r"\"[^\"]*\"|\\.|\[[^\]]*\]|_.|\*.")
_DATE_FORMATS = frozenset((*range(14, 18), 22, *range(27, 37), *range(50, 59)))
_TIME_FORMATS = frozenset((18, 19, 20, 21, 45, 47))
_ELAPSED_FORMAT = 46
_ELAPSED = re.compile(r"\[(?:h+|m+|s+)\]", re.IGNORECASE)
_PERCENT_FORMATS = {9: 0, 10: 2}

_HIDDEN = ("1", "true")
_WHOLE = re.compile(r"-?\d+\Z")
# Beyond, a number is easier to read with its exponent than with its zeros.
_MOST_ZEROS = 20
# Sheets have a day that 1900 did not, the 60th; those before it are counted from a day later.
_LEAP_DAY_OF_1900 = 60


def read(content: bytes, limits: ParseLimits) -> ParsedDocument:
    """Return the visible sheets; the title is that of the workbook's properties."""
    with open_archive(content, limits) as archive:
        book = next(part for kind, part in related(archive, "").values() if kind == "officeDocument")
        sheets = _sheets(archive, book)
        if len(sheets) > limits.max_pages:
            message = f"the workbook has {len(sheets):,} sheets; at most {limits.max_pages:,} are read: split it"
            raise LimitExceeded(message, "pages")
        values = _Values(archive, book)
        draft = Draft(limits.max_characters)
        pages = []
        has_rows = False
        for number, (name, part) in enumerate(sheets, 1):
            before = draft.length
            draft.heading(tidy(name), 1)
            named = draft.length
            write_table(draft, _rows(archive, part, values))
            has_rows = has_rows or draft.length > named
            pages.append(Page(number, before + 2 if before else 0, draft.length))
        if not has_rows:
            raise UnreadableDocument("the workbook has no text in sheets, rows and columns that are shown")
        return draft.finish(tidy(title_in_properties(archive) or ""), pages, heading_is_title=False)


def _sheets(archive: zipfile.ZipFile, book: str) -> list[tuple[str, str]]:
    """Return name and part of each sheet that is shown; a sheet that is a chart has no rows."""
    parts = related(archive, book)
    found = []
    for element in read_xml(archive, book).iter():
        if local(element) == "sheet" and element.get("state", "visible") == "visible":
            identity = next((value for name, value in element.attrib.items() if name.endswith("}id")), "")
            kind, part = parts.get(identity, ("", ""))
            if kind == "worksheet":
                found.append((element.get("name", ""), part))
    return found


def _rows(archive: zipfile.ZipFile, part: str, values: "_Values") -> Iterator[Row]:
    hidden: set[int] = set()
    number = 0
    for event, element in walk_xml(archive, part):
        tag = local(element)
        if event == "start":
            continue
        if tag == "col" and element.get("hidden") in _HIDDEN:
            hidden.update(range(_number(element, "min", 1), min(_number(element, "max", 1), 16_384) + 1))
        elif tag == "row":
            number = _number(element, "r", number + 1)
            if element.get("hidden") not in _HIDDEN:
                yield number, _cells(element, values, hidden)
            element.clear()
            while element.getprevious() is not None:
                del element.getparent()[0]


def _cells(row: Any, values: "_Values", hidden: set[int]) -> dict[int, str]:
    cells = {}
    column = 0
    for cell in row:
        reference = _REFERENCE.match(cell.get("r", ""))
        column = _column(reference[1]) if reference else column + 1
        if column not in hidden and (text := values.of(cell)):
            cells[column] = text
    return cells


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - 64
    return number


def _number(element: Any, name: str, default: int) -> int:
    value = element.get(name, "")
    return int(value) if value.isdecimal() and len(value) < 9 else default


class _Values:
    """What cells show: shared strings, and numbers by their formats."""

    def __init__(self, archive: zipfile.ZipFile, book: str) -> None:
        parts = {kind: part for kind, part in related(archive, book).values() if kind in ("sharedStrings", "styles")}
        self._strings = _shared_strings(archive, parts["sharedStrings"]) if "sharedStrings" in parts else []
        self._formats = _formats(archive, parts["styles"]) if "styles" in parts else []
        properties = next((each for each in read_xml(archive, book) if local(each) == "workbookPr"), None)
        is_1904 = properties is not None and properties.get("date1904") in _HIDDEN
        self._first_day = datetime(1904, 1, 1) if is_1904 else datetime(1899, 12, 30)  # noqa: DTZ001 - Sheets know no zones.

    def of(self, cell: Any) -> str:
        """Return what a cell shows; nothing for an error."""
        kind = cell.get("t", "n")
        if kind == "inlineStr":
            return _string(cell)
        value = next((each.text for each in cell if local(each) == "v"), None) or ""
        if kind == "s":
            return self._strings[int(value)] if value.isdecimal() and int(value) < len(self._strings) else ""
        if kind == "b":
            return "TRUE" if value == "1" else "FALSE"
        if kind == "n" and value:
            return self._numeral(value, _number(cell, "s", 0))
        return "" if kind == "e" else value

    def _numeral(self, value: str, style: int) -> str:
        shown = self._formats[style] if style < len(self._formats) else None
        try:
            number = float(value)
            if shown == "date":
                return self._date(number)
            if shown == "time" and 0 <= number < 1:
                return (self._first_day + timedelta(seconds=round(number * 86_400))).time().isoformat("minutes")
            if shown == "elapsed" and number >= 0:
                hours, minutes = divmod(round(number * 86_400) // 60, 60)
                return f"{hours:02}:{minutes:02}"
        except (ValueError, OverflowError):
            return value
        if not math.isfinite(number):
            return value
        return _percentage(number, shown) if isinstance(shown, int) else _plain(value, number)

    def _date(self, number: float) -> str:
        is_early = self._first_day.year < 1900 and 1 <= number < _LEAP_DAY_OF_1900
        moment = self._first_day + timedelta(days=int(is_early), seconds=round(number * 86_400))
        return moment.date().isoformat() if number == int(number) else moment.isoformat(" ", "minutes")


def _percentage(number: float, decimals: int) -> str:
    with localcontext(rounding=ROUND_HALF_UP):  # As sheets round.
        return f"{Decimal(f'{number:.15g}') * 100:.{decimals}f}%"


def _plain(value: str, number: float) -> str:
    """Return a number in the 15 digits that sheets have, without an exponent; a whole one as it is stored."""
    if _WHOLE.match(value):
        return value
    digits = Decimal(f"{number:.15g}")
    return f"{digits:f}" if abs(digits.adjusted()) <= _MOST_ZEROS else f"{number:.15g}"


def _shared_strings(archive: zipfile.ZipFile, part: str) -> list[str]:
    strings = []
    for event, element in walk_xml(archive, part):
        if event == "end" and local(element) == "si":
            strings.append(_string(element))
            element.clear()
    return strings


def _string(element: Any) -> str:
    """Return the text of a string, whatever runs it is in; how it is pronounced is left out."""
    texts = [inner for inner in element.iter() if local(inner) == "t" and local(inner.getparent()) != "rPh"]
    return "".join([inner.text or "" for inner in texts])


def _formats(archive: zipfile.ZipFile, part: str) -> list[str | int | None]:
    """Return for each style whether it shows a number as a `date`, a `time`, a span (`elapsed`), or a percentage."""
    root = read_xml(archive, part)
    own = {_number(each, "numFmtId", 0): each.get("formatCode", "") for each in root.iter() if local(each) == "numFmt"}
    cells = next((each for each in root if local(each) == "cellXfs"), ())
    return [_shows(_number(each, "numFmtId", 0), own) for each in cells]


def _shows(number: int, own: dict[int, str]) -> str | int | None:
    if number not in own:
        is_date, is_time = number in _DATE_FORMATS, number in _TIME_FORMATS
        if number == _ELAPSED_FORMAT:
            return "elapsed"
        return "date" if is_date else "time" if is_time else _PERCENT_FORMATS.get(number)
    if _ELAPSED.search(own[number]):
        return "elapsed"
    code = _QUOTED.sub("", own[number].partition(";")[0]).lower()
    if "%" in code:
        return len(re.search(r"\.(0*)", code)[1]) if "." in code else 0  # type: ignore[index]
    if "y" in code or "d" in code:
        return "date"
    return "time" if "h" in code or "ss" in code else None
