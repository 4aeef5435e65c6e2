"""Reads PDF: the text layer page by page, put back into paragraphs, with the headings that the outline names.

The main rule: a line break is kept where the line ended early, and becomes a space where the paragraph was only
wrapped, so that sentences are whole and table rows stay rows.
"""

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pypdf
from pypdf.errors import DependencyError, FileNotDecryptedError, LimitReachedError

from retrieval.documents import Page, ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.parsing.draft import Draft, too_long, visible

_SPACES = re.compile(r"[^\S\n]+")
_HYPHENATED = re.compile(r"(?<![^\W\d_])([^\W\d_]++)[-\u2010]\n([^\W\d_]+\S*)( ?)")
_WORD = re.compile(r"[^\W\d_]+(?:[-\u2010][^\W\d_]+)?")
_DIGITS = re.compile(r"\d+")
_BULLET = re.compile(r"(?:[-*•‣◦▪●–·]|\(?\d{1,3}[.)]|\(?[a-z]\))\s")
_SENTENCE_END = re.compile(r"[.!?:。！？][\"'”’)\]]*\Z")
_LEFTOVER_TITLE = re.compile(
    r"Microsoft (?:Word|PowerPoint) - |untitled|\(anonymous\)|\(unspecified\)|PowerPoint Presentation\Z|.*\.\w{2,4}\Z",
    re.IGNORECASE,
)
# A line this much of the page's usual width was wrapped by the margin, not ended by the author.
_FULL_LINE = 0.8
# Running heads: at the edge of this share of at least so many pages that have more to say.
_REPEATED, _FEWEST_PAGES, _FEWEST_LINES = 0.6, 4, 4


def read(content: bytes, limits: ParseLimits) -> ParsedDocument:
    """Return the text of all pages; the title is that of the document information, if it has one.

    Raises:
        UnreadableDocument: The file is encrypted or has no text layer.
        LimitExceeded: It has too many pages or unpacks to too much.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(content, limits)
    except (FileNotDecryptedError, DependencyError) as error:
        raise UnreadableDocument("the PDF is encrypted: save it without a password") from error
    except LimitReachedError as error:
        message = f"the PDF is larger inside than a document may be ({error}): print it to a new file, or split it"
        raise LimitExceeded(message, "unpacked") from error


def _read(content: bytes, limits: ParseLimits) -> ParsedDocument:
    reader = pypdf.PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise UnreadableDocument("the PDF is encrypted: save it without a password")
    count = len(reader.pages)
    if count > limits.max_pages:
        message = f"the PDF has {count:,} pages; at most {limits.max_pages:,} are read: split it"
        raise LimitExceeded(message, "pages")
    texts, length = [], 0
    for page in reader.pages:
        texts.append(visible(page.extract_text()).replace("\r\n", "\n").replace("\r", "\n"))
        length += len(texts[-1])
        if length > limits.max_characters:
            raise too_long(limits.max_characters)
    if not any(text.strip() for text in texts):
        raise UnreadableDocument("the PDF has no text layer (a scan?): run text recognition (OCR) on it first")
    draft = Draft(limits.max_characters)
    headings = _outline(reader)
    pages = []
    for number, lines in enumerate(_clean(texts)):
        before = draft.length
        _write_page(draft, lines, headings.get(number, {}))
        start = before + 2 if before and draft.length > before else before
        pages.append(Page(number + 1, start, draft.length))
    return draft.finish(_title(reader), pages)


def _title(reader: pypdf.PdfReader) -> str | None:
    """Return the title of the document information, unless a program left it there."""
    try:
        title = visible(str((reader.metadata and reader.metadata.title) or "")).strip()
    except Exception:  # noqa: BLE001 - A damaged information dictionary must not cost the document.
        return None
    return None if _LEFTOVER_TITLE.match(title) else title or None


def _outline(reader: pypdf.PdfReader) -> dict[int, dict[str, int]]:
    """Return, for each page index, the outline's entries that point there, as normalised text and level."""
    found: dict[int, dict[str, int]] = {}
    stack: list[tuple[Any, int]] = []
    try:
        stack.append((iter(reader.outline), 1))
        while stack:
            entry = next(stack[-1][0], None)
            if entry is None:
                stack.pop()
            elif isinstance(entry, list):
                stack.append((iter(entry), min(stack[-1][1] + 1, 6)))
            else:
                page = reader.get_destination_page_number(entry)
                if page is not None and entry.title:
                    found.setdefault(page, {})[_normal(str(entry.title))] = stack[-1][1]
    except LimitReachedError:
        raise
    except Exception:  # noqa: BLE001 - Broken outlines are common, and the text is worth having without headings.
        return found
    return found


def _normal(line: str) -> str:
    return "".join(letter for letter in visible(line).casefold() if letter.isalpha()) or line.strip()


def _clean(texts: list[str]) -> Iterator[list[str]]:
    """Yield the lines of each page, without running heads, with single spaces and hyphenated words joined."""
    pages = [[_SPACES.sub(" ", line).strip() for line in text.split("\n")] for text in texts]
    edges = Counter(edge for lines in pages for edge in {_DIGITS.sub("#", line) for line in _edges(lines)} if edge)
    needed = max(len(pages) * _REPEATED, _FEWEST_PAGES)
    running = {edge for edge, times in edges.items() if times >= needed}
    words = Counter(word.casefold() for lines in pages for line in lines for word in _WORD.findall(line))
    for lines in pages:
        shown = [index for index, line in enumerate(lines) if line]
        for index in {*shown[:1], *shown[-1:]} if len(shown) >= _FEWEST_LINES else ():
            if _DIGITS.sub("#", lines[index]) in running:
                lines[index] = ""
        yield _HYPHENATED.sub(lambda cut: _join(cut, words), "\n".join(lines)).strip("\n").split("\n")


def _edges(lines: list[str]) -> list[str]:
    shown = [line for line in lines if line]
    return [*shown[:1], *shown[-1:]]


def _join(cut: re.Match[str], words: "Counter[str]") -> str:
    """Join a word cut at a line's end; the hyphen stays where the document elsewhere writes it, or before a capital."""
    left, right = cut[1], _WORD.match(cut[2])
    assert right
    hyphenated = words[f"{left}-{right[0]}".casefold()] > words[(left + right[0]).casefold()]
    hyphen = "-" if hyphenated or not right[0].islower() else ""
    # The line break moves behind the word, so that the next line still begins where it did.
    return left + hyphen + cut[2] + ("\n" if cut[3] else "")


def _headings_on_page(lines: list[str], headings: dict[str, int]) -> dict[int, int]:
    """Return the level of each line that is a heading; of equal lines it is the one inside the page, not its head."""
    best: dict[str, tuple[bool, int]] = {}
    if headings:
        shown = [index for index, line in enumerate(lines) if line]
        for index in shown:
            key = _normal(lines[index])
            if key in headings:
                best[key] = min(best.get(key, (True, len(lines))), (index in (shown[0], shown[-1]), index))
    return {index: headings[key] for key, (_, index) in best.items()}


def _write_page(draft: Draft, lines: list[str], headings: dict[str, int]) -> None:
    widths = sorted(len(line) for line in lines if line)
    full = widths[int(len(widths) * 0.8)] * _FULL_LINE if widths else 0
    paragraph: list[str] = []

    def flush() -> None:
        text = "".join(paragraph)
        draft.block(text, "list" if _BULLET.match(text) else "paragraph")
        paragraph.clear()

    previous = ""
    levels = _headings_on_page(lines, headings)
    for index, line in enumerate(lines):
        level = levels.get(index)
        if not line or level is not None:
            flush()
            if level is not None:
                draft.heading(line, level)
            previous = ""
            continue
        if previous:
            ended = len(previous) < full
            if ended and _SENTENCE_END.search(previous) and not _BULLET.match(line):
                flush()
            else:
                paragraph.append("\n" if ended or _BULLET.match(line) else " ")
        paragraph.append(line)
        previous = line
    flush()
