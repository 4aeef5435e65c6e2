"""The `[n]` markers an engine writes into its answer: found, taken out, and put where they belong.

The main rule: code is left alone, in fences and in `inline` spans, and a marker that remains stands after the words it
supports and before the sentence's final punctuation: "kept for 30 days [1]."
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NUMBERS = r"\s?\^?[1-9]\d{0,2}(?:\s?[,;–-]\s?\^?[1-9]\d{0,2}){0,9}\s?"
# A link behind a marker is part of it: engines invent those too.
_MARKER = re.compile(rf"\[{_NUMBERS}\](?!:)(?:\([^()\s]*\))?|【{_NUMBERS}(?:†[^】\n]{{0,80}})?】")
_RANGE = re.compile(r"(\d+)\s?[–-]\s?\^?(\d+)")
_INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\1(?!`)).)+?(?<!`)\1(?!`)", re.DOTALL)
_FENCE = re.compile(r"\s*(?:`{3}|~{3})")
# Of a text written backwards, since what ends a text is found in one go from there.
_FINAL_PUNCTUATION = re.compile(r"\s*+(?:[\"'”’»)\]*_]*+[.!?…‽。！？｡]++|[*_]{1,3}|\|\s*+)?(?:\|\s*+)?")
# After its last word a sentence has only these; NUL stands for what a marker covered.
_CLOSING = " \t\r\n.!?…‽。！？｡\"'”’»)]}*_|\x00"
# "According to passage 3 and [4]," says where the claim is from and is none of it. A bare number is one of ours only
# after such a word: "In 1999," is part of the claim. Numbers in a row can be read in one way only, or "1 2 3" and so on
# would be read in 2**n.
_REFERENCE = r"(?:passage|source|document|context|text|excerpt|reference)s?"
_LEAD_IN = re.compile(
    r"(?P<bullet>\s*(?:(?:[-*+•]|\d{1,3}[.)])\s+)?)"
    r"(?:according to|as (?:stated|described|mentioned|explained|noted|shown) (?:in|by)|based on|from|in|per)\s+"
    rf"(?:(?:the\s+)?(?:provided\s+|given\s+|above\s+)?{_REFERENCE}(?P<numbers>(?:\s*+(?:,|and|&|\#)?\s*+(?:\d{{1,2}}\b|\x00++))*)"
    r"|(?P<marks>\x00++(?:\s*+(?:,|and|&)?\s*+\x00++)*))\s*,\s*(?=\S)",
    re.IGNORECASE,
)
# Of a text written backwards as well.
_BEFORE_BRACKET = re.compile(r"\s?\w++")
_LONGEST_WORD = 64
_GOES_ON = r"(?:\.\w|\s?(?=\w)[^A-Z])"
_BULLET = re.compile(r"\s*(?:>\s*)*(?:(?:[-*+•‣◦▪–]|\(?\d{1,3}[.)])\s+)?")


@dataclass(frozen=True, slots=True)
class Marker:
    """A marker at `text[start:end]` and the passage numbers it names, as the engine counted them."""

    start: int
    end: int
    numbers: tuple[int, ...]


def is_code(text: str) -> bool:
    """Tell whether a sentence is a fenced code block."""
    return _FENCE.match(text) is not None


def is_item(text: str) -> bool:
    """Tell whether a sentence is an item of a list or a row of a table."""
    found = _BULLET.match(text)
    return text.startswith("|") or (found is not None and bool(found[0]))


def cells(row: str) -> list[str]:
    """Return the cells of a table's row."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def read_markers(text: str) -> list[Marker]:
    """Find the markers of a sentence, in order; code has none."""
    if ("[" not in text and "【" not in text) or is_code(text):
        return []
    prose = _INLINE_CODE.sub(lambda code: "`" * len(code[0]), text)
    return [Marker(found.start(), found.end(), _numbers(found[0])) for found in _MARKER.finditer(prose)]


def is_text(text: str, marker: Marker, sources: Sequence[str]) -> bool:
    """Tell whether a bracket is text of a source: an index, `items[7]`, or a range that a sentence goes on after.

    A single number after a space, or one that ends what it stands in, marks a source's own source.
    """
    written = _BEFORE_BRACKET.match(text[max(0, marker.start - _LONGEST_WORD) : marker.start][::-1])
    if written is None or (written[0][0].isspace() and len(marker.numbers) == 1):
        return False
    bracket = text[marker.start - len(written[0]) : marker.end]
    pattern = re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, bracket.split())) + _GOES_ON)
    return any(pattern.search(source) for source in sources)


def claim_text(text: str, markers: Sequence[Marker]) -> str:
    """Return what a sentence claims: without its markers, its bullet and a lead-in that names its source."""
    bare = _mask(text, markers)
    lead = _LEAD_IN.match(bare)
    bare = bare[lead.end() :] if lead else bare
    bullet = _BULLET.match(bare)
    return bare[bullet.end() if bullet else 0 :].replace("\x00", " ")


def split_lead_in(text: str) -> tuple[str, tuple[int, ...]]:
    """Take a lead-in that names passages by number off a sentence; return the rest and the numbers.

    A lead-in without a number ("According to the context,") stays: it reads well and cites nothing.
    """
    markers = read_markers(text)
    lead = _LEAD_IN.match(_mask(text, markers))
    named = (lead["numbers"] or "") + (lead["marks"] or "") if lead else ""
    if lead is None or not named:
        return text, ()
    written = tuple(int(number) for number in re.findall(r"\d+", named))
    marked = tuple(number for marker in markers if marker.end <= lead.end() for number in marker.numbers)
    rest = text[lead.end() :]
    return lead["bullet"] + rest[0].upper() + rest[1:], written + marked


def place(
    text: str, markers: Sequence[Marker], shown: Mapping[int, Sequence[int]], added: Sequence[int]
) -> list[str | int]:
    """Return the sentence as text and numbers in turn: what to write, and where which marker goes.

    `shown` names by a marker's index what remains of it at its place; markers that end the sentence are always moved
    before its final punctuation, with those `added`.
    """
    parts: list[str | int] = []
    at = 0
    last: list[int] = []
    closing = len(_mask(text, markers).rstrip(_CLOSING))
    for index, marker in enumerate(markers):
        numbers = [number for number in shown.get(index, ()) if number not in last]
        ends = marker.start >= closing
        before = text[at : marker.start]
        follows = text[marker.end : marker.end + 1]
        if ends:
            last += numbers
        if ends or not numbers:
            glued = not follows or follows.isspace() or follows in ".,;:!?)]}…。！？"
            parts.append(before.rstrip(" \t") if glued else before)
        else:
            parts += [before, *numbers]
        at = marker.end
    parts.append(text[at:])
    last += [number for number in added if number not in last]
    return _before_final_punctuation(parts, last) if last else parts


def _before_final_punctuation(parts: list[str | int], numbers: list[int]) -> list[str | int]:
    tail = ""
    while parts and isinstance(parts[-1], str):
        tail = str(parts.pop()) + tail
    found = _FINAL_PUNCTUATION.match(tail[::-1])
    assert found
    final = len(tail) - found.end()
    # A dot that belongs to the last word, as in "etc.", ends the sentence just as well.
    body = tail[:final].rstrip(" \t")
    gap = " " if body or parts else ""
    return [*parts, body + gap, *numbers, tail[final:]]


def _mask(text: str, markers: Sequence[Marker]) -> str:
    """Return `text` with every character of a marker replaced by NUL, so that offsets stay."""
    pieces = []
    at = 0
    for marker in markers:
        pieces += [text[at : marker.start], "\x00" * (marker.end - marker.start)]
        at = marker.end
    return "".join([*pieces, text[at:]])


def _numbers(written: str) -> tuple[int, ...]:
    inside = re.split(r"[\]†】]", written[1:])[0]
    numbers: list[int] = []
    for piece in re.split(r"[,;]", inside):
        ends = _RANGE.search(piece)
        if ends and int(ends[1]) <= int(ends[2]) <= int(ends[1]) + 9:
            numbers += range(int(ends[1]), int(ends[2]) + 1)
        else:
            numbers += [int(number) for number in re.findall(r"\d+", piece)]
    return tuple(dict.fromkeys(numbers))
