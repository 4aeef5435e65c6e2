"""Splits a parsed document into passages along its structure.

The main rule: every visible character of the source is in exactly one passage, and a passage is one span of it.
Sections are kept whole where they fit; one that does not is cut into pieces of about equal size at the least
harmful places (a dynamic program over sentences, list items and rows weighs size against harm). Tiny neighbours
under the same heading are put together.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from retrieval.documents import Block, BlockKind, Page, ParsedDocument, Passage
from retrieval.sentences import sentences

CountTokens = Callable[[list[str]], list[int]]

# What a cut between two atoms costs, in units of (share by which a passage misses its ideal size) squared.
_CUT_AFTER_HEADING = 8.0
_CUT_IN_WORDS = 1.0
_CUT_IN_CODE = 0.4
_CUT_AFTER_LEAD_IN = 0.3
_CUT_IN_TABLE = 0.2
_CUT_IN_PARAGRAPH = 0.15
_CUT_IN_LIST = 0.08
_CUT_AT_PAGE = -0.05
# A section below this share of the target is looked after by its neighbours.
_TINY = 0.4
# MiniLM reads 256 tokens: a title and headings longer than this shorten the passage itself.
_FREE_HEAD_TOKENS = 14
_LONGEST_TABLE_HEAD = 120
# Atoms are put together up to this part of the target, so that the work per atom is bounded.
_FINEST = 16

_PARAGRAPH = re.compile(r"\S(?:[^\n\r]|\r\n?+(?![ \t]*+[\n\r])|\n(?![ \t]*+[\n\r]))*+")
_LINE = re.compile(r"[^\n\r]++")
# What WordPiece takes for one word and, from 101 characters on, for one unknown token however long it is: encoded data,
# and writing without spaces.
_UNBROKEN = re.compile(r"[^\s!-/:-@\[-`{-~]{101,}+")
_UNBROKEN_CHARACTERS_A_TOKEN = 4
_RULE_ROW = re.compile(r"[\s|:+=-]+\Z")
_SPACE = re.compile(r"\s")


@dataclass(slots=True)
class _Atom:
    """A span that is not cut further, and what it costs to cut before it."""

    start: int
    end: int
    kind: BlockKind
    path: tuple[str, ...]
    cut: float
    tokens: int = 0
    room: int = 0
    table_head: str = ""


@dataclass(slots=True)
class _Piece:
    """Consecutive atoms that become one passage; `whole` if they are complete sections."""

    atoms: list[_Atom]
    tokens: int
    path: tuple[str, ...]
    whole: bool


def split(
    parsed: ParsedDocument,
    *,
    document_id: str,
    document_version: str,
    document_name: str,
    count_tokens: CountTokens,
    target_tokens: int = 200,
    max_tokens: int = 240,
) -> list[Passage]:
    """Return the document's passages in order: at most `max_tokens` each, about `target_tokens` where it can be.

    A section, or a whole short document, of at most `max_tokens` stays one passage. `count_tokens` is called a few
    times with many texts. Where a long table is cut, the later passages carry its head row as their last heading.
    """
    if not 0 < target_tokens <= max_tokens:
        raise ValueError("target_tokens must be positive and at most max_tokens")
    ruler = _Ruler(count_tokens, max_tokens)
    atoms = ruler.measured(_atoms(parsed))
    limits = ruler.limits(parsed.title or "", {atom.path for atom in atoms})
    atoms = ruler.cut_to_fit(parsed.text, _with_room(atoms, limits))
    pieces = [
        piece
        for section in _sections(_coalesced(atoms, target_tokens // _FINEST))
        for piece in _cut(section, target_tokens, limits[section[-1].path])
    ]
    passages = []
    for n, piece in enumerate(_merged(pieces, target_tokens, max_tokens), 1):
        start, end = piece.atoms[0].start, piece.atoms[-1].end
        head = piece.atoms[0].table_head
        passages.append(
            Passage(
                document_id=document_id,
                document_version=document_version,
                n=n,
                text=parsed.text[start:end],
                start=start,
                end=end,
                page=_page_at(parsed.pages, start),
                heading_path=(*piece.path, head) if head else piece.path,
                document_name=document_name,
                document_title=parsed.title or "",
            )
        )
    return passages


def _atoms(parsed: ParsedDocument) -> list[tuple[str, _Atom]]:
    """Return the whole source as atoms with their text, those between blocks included."""
    page_starts = {page.start for page in parsed.pages[1:]}
    found: list[tuple[str, _Atom]] = []
    for block in _blocks_and_gaps(parsed):
        for index, atom in enumerate(_block_atoms(parsed.text, block)):
            previous = found[-1][1] if found else None
            if index == 0 and previous:
                atom.cut = _cut_between(previous.kind, found[-1][0], block.kind)
                if atom.cut < _CUT_AFTER_HEADING and block.start in page_starts:
                    atom.cut += _CUT_AT_PAGE
            found.append((parsed.text[atom.start : atom.end], atom))
    return found


def _cut_between(kind: BlockKind, text: str, next_kind: BlockKind) -> float:
    """Return what a cut between two blocks costs."""
    if kind == "heading":
        return _CUT_AFTER_HEADING
    return _CUT_AFTER_LEAD_IN if text.endswith(":") and next_kind in ("list", "code", "table", "quote") else 0.0


def _blocks_and_gaps(parsed: ParsedDocument) -> Iterator[Block]:
    """Yield the blocks, and as paragraphs what visible text lies between them."""
    position = 0
    path: tuple[str, ...] = ()
    for block in (*parsed.blocks, Block(len(parsed.text), len(parsed.text), "paragraph")):
        for gap in _PARAGRAPH.finditer(parsed.text, position, block.start):
            yield Block(gap.start(), gap.start() + len(gap[0].rstrip()), "paragraph", path)
        if parsed.text[block.start : block.end].strip():
            yield block
        position, path = block.end, block.heading_path


def _block_atoms(text: str, block: Block) -> Iterator[_Atom]:
    """Yield a block's atoms: rows, sentences, list lines, or all of it; code is cut later, if it must be."""
    content = text[block.start : block.end]
    table_head = ""
    if block.kind in ("heading", "code"):
        spans = [(0, len(content))]
    elif block.kind == "table":
        spans = _rows(content)
        head_row = content[slice(*spans[0])].splitlines()[0]
        table_head = " ".join(head_row.strip("| \t").split())[:_LONGEST_TABLE_HEAD]
    else:
        spans = sentences(content)
    previous_end = 0
    for index, (start, end) in enumerate(spans):
        between = content[previous_end:start]
        cut = _CUT_IN_TABLE if block.kind == "table" else _CUT_IN_LIST if "\n" in between else _CUT_IN_PARAGRAPH
        if block.kind == "table" and index == 1:
            cut = _CUT_AFTER_HEADING
        head = table_head if index > 0 else ""
        yield _Atom(block.start + start, block.start + end, block.kind, block.heading_path, cut, table_head=head)
        previous_end = end


def _rows(table: str) -> list[tuple[int, int]]:
    """Return the spans of a table's lines; a rule of dashes goes with the line before it."""
    rows: list[tuple[int, int]] = []
    for line in _lines(table, 0, len(table)):
        if rows and _RULE_ROW.match(line[0]):
            rows[-1] = (rows[-1][0], line.end())
        else:
            rows.append(line.span())
    return rows


def _lines(text: str, start: int, end: int) -> Iterator[re.Match[str]]:
    """Yield the lines of a span that have something to see."""
    return (line for line in _LINE.finditer(text, start, end) if not line[0].isspace())


def _sections(atoms: list[_Atom]) -> Iterator[list[_Atom]]:
    """Yield runs of atoms under the same headings; headings without text of their own open the section after them."""
    section: list[_Atom] = []
    for atom in atoms:
        if section and atom.path != section[-1].path and any(other.kind != "heading" for other in section):
            yield section
            section = []
        section.append(atom)
    if section:
        yield section


class _Ruler:
    """Measures in the embedding model's tokens, many texts at a time."""

    def __init__(self, count_tokens: CountTokens, max_tokens: int) -> None:
        self._count_tokens = count_tokens
        self._max_tokens = max_tokens
        # A tokenizer may add marks around every text; a passage gets them once, its atoms not at all.
        self._marks = count_tokens([""])[0]

    def count(self, texts: list[str]) -> list[int]:
        """Return the tokens of each text, at least one, and at least about as many as what is unbroken in it has."""
        if not texts:
            return []
        return [
            max(1, tokens - self._marks, sum(map(len, _UNBROKEN.findall(text))) // _UNBROKEN_CHARACTERS_A_TOKEN)
            for text, tokens in zip(texts, self._count_tokens(texts), strict=True)
        ]

    def measured(self, atoms: list[tuple[str, _Atom]]) -> list[_Atom]:
        """Return the atoms with their tokens filled in."""
        for (_, atom), tokens in zip(atoms, self.count([text for text, _ in atoms]), strict=True):
            atom.tokens = tokens
        return [atom for _, atom in atoms]

    def limits(self, title: str, paths: set[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
        """Return how many tokens a passage under each heading path may have; long headings take from its share."""
        ordered = list(paths)
        heads = [" > ".join(part for part in dict.fromkeys((title, *path)) if part) for path in ordered]
        room = self._max_tokens - self._marks
        return {
            path: max(room // 2, room - max(0, tokens - _FREE_HEAD_TOKENS)) if head else room
            for path, head, tokens in zip(ordered, heads, self.count(heads), strict=True)
        }

    def cut_to_fit(self, text: str, atoms: list[_Atom]) -> list[_Atom]:
        """Return the atoms with those that exceed their room cut: code at its lines, anything else between words."""
        while any(_too_long(atom) for atom in atoms):
            fresh: list[tuple[str, _Atom]] = []
            fitting: list[_Atom] = []
            for atom in atoms:
                parts = _shorter(text, atom) if _too_long(atom) else [atom]
                fitting.extend(parts)
                fresh.extend((text[part.start : part.end], part) for part in parts if part is not atom)
            self.measured(fresh)
            atoms = fitting
        return atoms


def _with_room(atoms: list[_Atom], limits: dict[tuple[str, ...], int]) -> list[_Atom]:
    """Fill in how many tokens each atom may have: those of a passage, less the headings that it must stay with."""
    headings = 0
    for atom in atoms:
        limit = limits[atom.path]
        atom.room = limit if atom.kind == "heading" else max(limit // 2, limit - headings)
        headings = headings + atom.tokens if atom.kind == "heading" else 0
    return atoms


def _too_long(atom: _Atom) -> bool:
    return atom.tokens > atom.room and atom.end - atom.start > 1


def _shorter(text: str, atom: _Atom) -> list[_Atom]:
    """Return the lines of an atom that is code, or else parts of about equal length, cut at spaces if it has any."""
    if atom.kind == "code" and len(lines := [line.span() for line in _lines(text, atom.start, atom.end)]) > 1:
        spans, cut = lines, _CUT_IN_CODE
    else:
        count = min(atom.end - atom.start, -(-atom.tokens * 5 // (atom.room * 4)))
        length = (atom.end - atom.start) / max(2, count)
        spans, cut = [], _CUT_IN_WORDS
        start = atom.start
        for index in range(1, max(2, count)):
            wanted = max(start + 1, atom.start + int(index * length))
            space = _SPACE.search(text, wanted, min(atom.end - 1, wanted + int(length) // 2 + 1))
            at = space.start() if space else wanted
            spans.append((start, at))
            start = at
        spans.append((start, atom.end))
    parts = []
    for start, end in spans:
        piece = text[start:end]
        if visible := piece.strip():
            first = start + piece.index(visible)
            head = atom.table_head
            parts.append(_Atom(first, first + len(visible), atom.kind, atom.path, cut, room=atom.room, table_head=head))
    parts[0].cut = atom.cut
    return parts


def _coalesced(atoms: list[_Atom], most: int) -> list[_Atom]:
    """Return the atoms with runs of very small ones joined; headings stay as they are."""
    joined: list[_Atom] = []
    for atom in atoms:
        last = joined[-1] if joined else None
        if (
            last
            and last.path == atom.path
            and last.kind == atom.kind != "heading"
            and last.tokens + atom.tokens <= most
        ):
            last.end = atom.end
            last.tokens += atom.tokens
        else:
            joined.append(atom)
    return joined


def _cut(section: list[_Atom], target: int, limit: int) -> list[_Piece]:
    """Return a section in one piece if it fits, or else in pieces of about equal size that are cheapest to cut."""
    total = sum(atom.tokens for atom in section)
    path = section[-1].path
    if total <= limit:
        return [_Piece(section, total, path, whole=True)]
    ideal = total / max(-(-total // limit), round(total / target))
    cheapest = [0.0]
    begins = [0]
    for end in range(1, len(section) + 1):
        best, begin, tokens = float("inf"), end - 1, 0
        for start in range(end - 1, -1, -1):
            tokens += section[start].tokens
            if tokens > limit and start < end - 1:
                break
            cost = cheapest[start] + ((tokens - ideal) / ideal) ** 2 + (section[start].cut if start else 0.0)
            if cost < best:
                best, begin = cost, start
        cheapest.append(best)
        begins.append(begin)
    pieces = []
    end = len(section)
    while end:
        atoms = section[begins[end] : end]
        pieces.append(_Piece(atoms, sum(atom.tokens for atom in atoms), path, whole=False))
        end = begins[end]
    return pieces[::-1]


def _merged(pieces: list[_Piece], target: int, limit: int) -> list[_Piece]:
    """Put tiny whole sections together with their neighbours under a common heading, up to the target size."""
    if len(pieces) > 1 and (total := sum(piece.tokens for piece in pieces)) <= min(target, limit):
        top = {piece.path[:1] for piece in pieces if piece.path}
        if len(top) <= 1:
            return [_Piece([atom for piece in pieces for atom in piece.atoms], total, _common(pieces), whole=True)]
    merged: list[_Piece] = []
    for piece in pieces:
        if merged and _belong_together(merged[-1], piece, target):
            last = merged.pop()
            path = _common([last, piece])
            piece = _Piece(last.atoms + piece.atoms, last.tokens + piece.tokens, path, whole=True)  # noqa: PLW2901
        merged.append(piece)
    return merged


def _belong_together(left: _Piece, right: _Piece, target: int) -> bool:
    tiny = target * _TINY
    if not (left.whole and right.whole) or left.tokens + right.tokens > target or min(left.tokens, right.tokens) > tiny:
        return False
    # Sections of one parent may share a passage, and a section's own text one with its first subsection, but never
    # two top-level sections; text before the first heading has no other place than with what follows.
    shared = len(_shared(left.path, right.path))
    return not left.path or (0 < shared >= max(len(left.path) - 1, 0) and shared >= len(right.path) - 1)


def _shared(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return left[:count]


def _common(pieces: list[_Piece]) -> tuple[str, ...]:
    """Return the headings that hold for all pieces; text before the first heading does not count."""
    paths = [piece.path for piece in pieces if piece.path]
    common = paths[0] if paths else ()
    for _, path in pairwise([(), *paths]):
        common = _shared(common, path)
    return common


def _page_at(pages: tuple[Page, ...], start: int) -> int | None:
    """Return the number of the page on which a passage begins."""
    if not pages:
        return None
    index = bisect_right(pages, start, key=lambda page: page.start) - 1
    return pages[max(index, 0)].number
