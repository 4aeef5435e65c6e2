"""Reads plain text, and decodes every text format.

The main rule: the decoded file is the source text, character for character, so that offsets hold in the file too.
"""

import codecs
import re

from retrieval.documents import Block, BlockKind, ParsedDocument, ParseLimits
from retrieval.errors import UnreadableDocument
from retrieval.parsing.draft import Draft, too_long, visible

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Old labels stand for more than they say, as every browser reads them (https://encoding.spec.whatwg.org/#names-and-labels).
_READ_AS = {"iso8859-1": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}
# What says ASCII has none of it but by mistake; the others are Python's own, and make text of what is none.
_SAYS_NOTHING = frozenset(("ascii", "idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape", "utf-7"))
# Bytes that no text in a Windows or ISO 8859 code page has.
_BINARY = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_PARAGRAPH = re.compile(r"\S(?:[^\n\r]|\r\n?+(?![ \t]*+[\n\r])|\n(?![ \t]*+[\n\r]))*+")
_LIST_ITEM = re.compile(r"(?:[-*+•]|\d{1,3}[.)])[ \t]")


def read(content: bytes, limits: ParseLimits, charset: str | None = None) -> ParsedDocument:
    """Return the text with its paragraphs, which blank lines separate, as blocks."""
    text = decode(content, limits, charset)
    blocks = []
    for found in _PARAGRAPH.finditer(text):
        kind: BlockKind = "list" if _LIST_ITEM.match(text, found.start()) else "paragraph"
        blocks.append(Block(found.start(), found.start() + len(found[0].rstrip()), kind))
    return ParsedDocument(text, None, tuple(blocks))


def write_text(text: str, draft: Draft) -> None:
    """Write text that stands inside another format, paragraph by paragraph."""
    text = visible(text)
    for found in _PARAGRAPH.finditer(text):
        draft.block(found[0].rstrip(), "list" if _LIST_ITEM.match(found[0]) else "paragraph")


def decode(content: bytes, limits: ParseLimits, charset: str | None = None) -> str:
    """Return the text of a file: by its byte order mark, the declared charset, UTF-8, or Windows-1252, in that order.

    Raises:
        UnreadableDocument: It is not text in any of these.
        LimitExceeded: It has too many characters.
    """
    text = to_text(content, charset)
    if "\x00" in text:
        raise UnreadableDocument("the file has NUL characters: it is not text, or in an encoding without its mark")
    if not text.strip():
        raise UnreadableDocument("the file has no text")
    if len(text) > limits.max_characters:
        raise too_long(limits.max_characters)
    return text


def encodings_of(label: str | None) -> tuple[str, ...]:
    """Return the encodings that a declared charset may mean, the likeliest first; none for one that says nothing."""
    try:
        name = codecs.lookup(label or "ascii").name
    except (LookupError, ValueError):
        return ()
    if name in _SAYS_NOTHING:
        return ()
    # The old one has the few bytes that its successor leaves undefined.
    return (_READ_AS[name], name) if name in _READ_AS else (name,)


def to_text(content: bytes, charset: str | None) -> str:
    """Return the characters of bytes by their mark, charset or likeness; raises UnreadableDocument if none fits."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            try:
                return content[len(mark) :].decode(encoding)
            except UnicodeDecodeError as error:
                raise UnreadableDocument(f"the file is marked as {encoding} but is not: save it as UTF-8") from error
    for encoding in (*encodings_of(charset), "utf-8"):
        try:
            return content.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    high = sum(map(content.count, (bytes([byte]) for byte in range(0x80, 0x100))))
    # A European text in an old code page is mostly ASCII; without that likeness a guess would store nonsense.
    if not _BINARY.search(content) and high < len(content) * 0.3:
        try:
            return content.decode("cp1252")
        except UnicodeDecodeError:
            pass
    raise UnreadableDocument("the file is not text in UTF-8, UTF-16 or Windows-1252: save it as UTF-8")
