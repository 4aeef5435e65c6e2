"""Numbers and dates in digits, written one way: their groups, decimal signs, zeros and scales.

The main rule: a value is the same however it is written, and what a numeral leaves open - "1.000" is 1 here and 1000
there - is told beside it, so that neither reading counts as invented.
"""

import re
from collections.abc import Iterator

_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "k": 1000}
# In lower case "m" is the metre.
_SHORT_SCALES = {"M": 10**6, "mn": 10**6, "bn": 10**9}
SCALE_WORDS = frozenset((*_SCALES, *map(str.lower, _SHORT_SCALES)))
# In groups of three, or as in India: 12,34,567.
_THOUSANDS = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?:\.\d+)?")
_DOTTED_THOUSANDS = re.compile(r"-?\d{1,3}(?:\.\d{3})+(?:,\d+)?")
# Spaces group digits where they cannot part numbers: no-break and thin ones, and the usual one where it does so twice
# or before "000". Apostrophes do in Switzerland.
_SPACED = re.compile(
    r"(?<![\w.,'’-])\d{1,3}(?:(?:[\u00a0\u2009\u202f]\d{3}){1,6}|(?:['’]\d{3}){1,6}|(?: \d{3}){2,6}| 000)"
    r"(?![\w'’]|[ .,]\d{3})"
)
_NOT_A_DIGIT = re.compile(r"\D")
# Numerals for the same date, the year first or as in "5.3.2024".
_DATE = re.compile(
    r"(?<![\d.])(?<!\d-)(?:(?P<y>\d{4})-(?P<m>0[1-9]|1[0-2])-(?P<d>[0-3]\d)|(?P<d2>[0-3]?\d)\.(?P<m2>0?[1-9]|1[0-2])\.(?P<y2>\d{4}))"
    r"(?!\d|[.-]\d)"
)
_SHORTEST_DATE = len("5.3.2024")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def groups_joined(text: str) -> str:
    """Take out what groups the digits of a number, where it is no comma and no dot: those stand inside of a word."""
    return _SPACED.sub(lambda number: _NOT_A_DIGIT.sub("", number[0]), text)


def dates_spelled(text: str) -> str:
    """Write the dates in numerals as "5 March 2024", the day without a leading zero."""
    return _DATE.sub(_date_spelled, text) if len(text) >= _SHORTEST_DATE else text


def _date_spelled(date: re.Match[str]) -> str:
    month = _MONTHS[int(date["m"] or date["m2"]) - 1]
    return f"{int(date['d'] or date['d2'])} {month} {date['y'] or date['y2']}"


def scale_of(word: str) -> int | None:
    """Return what a word after a number multiplies it by."""
    return _SHORT_SCALES.get(word) or _SCALES.get(word.lower())


def other_numbers(written: str, value: str) -> Iterator[str]:
    """Give what else a numeral may say: "05" is 5 and stands for itself, "2.0" is 2, and "1.000" may be 1000."""
    if len(written) == len("05") and written[0] == "0":
        yield written
    if _DOTTED_THOUSANDS.fullmatch(value):
        yield value.replace(".", "")
    if value.endswith(".0") and value.count(".") == 1:
        yield value[:-2]


def normal_number(written: str, *, trim: bool = False) -> str:
    """Write a number one way: no thousands separators, a plain minus sign, no zeros of a price; `trim` drops any.

    What "2.0" and "1.000" are depends on what they count: they stay.
    """
    plain = written.replace("−", "-").lstrip("vV")
    if _THOUSANDS.fullmatch(plain):
        plain = plain.replace(",", "")
    elif "," in plain and _DOTTED_THOUSANDS.fullmatch(plain):
        plain = plain.replace(".", "").replace(",", ".")
    elif plain.count(",") == 1 and "." not in plain:
        plain = plain.replace(",", ".")  # A decimal comma.
    if plain.endswith(".00") and plain.count(".") == 1:
        plain = plain[:-3]
    elif trim and "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return plain[1:] if len(plain) == len("05") and plain[0] == "0" else plain
