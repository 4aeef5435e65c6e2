"""Builds the source text and the blocks of a document whose text has to be extracted.

The main rule: text is cleaned once, here, before it becomes the source that every quote is checked against.
"""

import re
from collections.abc import Iterable

from retrieval.documents import Block, BlockKind, Page, ParsedDocument
from retrieval.errors import LimitExceeded

# Characters that show nothing: soft hyphens, zero-width spaces, direction overrides, tag characters (which can
# smuggle instructions past a reader), and controls. Joiners stay: scripts and emoji need them.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060-\u2064\ufeff\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
_SPACES = re.compile(r"[^\S\n]+")
_AROUND_BREAKS = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{2,}")


def visible(text: str) -> str:
    """Return `text` without invisible characters and halves of surrogate pairs, with ligatures spelled out."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _INVISIBLE.sub("", text).translate(_LIGATURES)


def tidy(text: str) -> str:
    """Return `text` visible, with single spaces and single line breaks only."""
    text = _AROUND_BREAKS.sub("\n", _SPACES.sub(" ", visible(text)))
    return _BLANK_LINES.sub("\n", text).strip()


def too_long(max_characters: int) -> LimitExceeded:
    """Say that a document has too much text."""
    return LimitExceeded(f"the document has more than {max_characters:,} characters: split it", "characters")


class Headings:
    """The headings above the current place: `enter` one and get the path that holds below it."""

    def __init__(self) -> None:
        self._open: list[tuple[int, str]] = []
        self.path: tuple[str, ...] = ()

    def enter(self, level: int, text: str) -> tuple[str, ...]:
        """Close every heading of this level or deeper (1 is the highest), open this one, and return the path."""
        while self._open and self._open[-1][0] >= level:
            self._open.pop()
        self._open.append((level, text))
        self.path = tuple(heading for _, heading in self._open)
        return self.path


class Draft:
    """Appends blocks, a blank line between them, and refuses to grow beyond `max_characters`."""

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self._parts: list[str] = []
        self._blocks: list[Block] = []
        self._headings = Headings()
        self.length = 0
        self.first_heading: str | None = None

    def heading(self, text: str, level: int) -> None:
        """Append a heading of one line; the blocks that follow belong to it."""
        if line := " ".join(text.split()):
            self.first_heading = self.first_heading or line
            self._headings.enter(level, line)
            self.block(line, "heading")

    def section(self) -> None:
        """Leave every heading: what follows stands under none of them."""
        self._headings = Headings()

    def block(self, text: str, kind: BlockKind, place: str | None = None) -> None:
        """Append a block; one that is empty is left out. `place` says where it stands below its headings."""
        if not text.strip():
            return
        if self._parts:
            self._append("\n\n")
        start = self.length
        self._append(text)
        path = (*self._headings.path, place) if place else self._headings.path
        self._blocks.append(Block(start, self.length, kind, path))

    def rows(self, rows: Iterable[list[str]]) -> None:
        """Append a table, a line of `| cell | cell |` for each row that is not empty."""
        lines = [f"| {' | '.join(' '.join(cell.split()) for cell in row)} |" for row in rows if any(row)]
        self.block("\n".join(lines), "table")

    def finish(self, title: str | None, pages: Iterable[Page] = (), *, heading_is_title: bool = True) -> ParsedDocument:
        """Return the document; without a title its first heading is the title, unless that names only a part of it."""
        title = " ".join((title or "").split()) or (self.first_heading if heading_is_title else None)
        return ParsedDocument("".join(self._parts), title, tuple(self._blocks), tuple(pages))

    def _append(self, text: str) -> None:
        self.length += len(text)
        if self.length > self._max_characters:
            raise too_long(self._max_characters)
        self._parts.append(text)
