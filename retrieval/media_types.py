"""Says what a file is read as: by its first bytes where they are telling, else by what is stated, else by its name.

The main rule: what cannot be read is refused here, before a process is asked, with what would help.
"""

import re
from pathlib import PurePosixPath
from typing import Final

from retrieval.errors import UnsupportedType
from retrieval.parsing.child import DOCX, EPUB, PPTX, READERS, XLSX

EXTENSIONS: Final = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".mdown": "text/markdown",
    ".mkd": "text/markdown",
    ".txt": "text/plain",
    ".text": "text/plain",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
    ".docx": DOCX,
    ".docm": DOCX,
    ".pptx": PPTX,
    ".pptm": PPTX,
    ".ppsx": PPTX,
    ".xlsx": XLSX,
    ".xlsm": XLSX,
    ".csv": "text/csv",
    ".tsv": "text/csv",
    ".epub": EPUB,
    ".eml": "message/rfc822",
    ".jsonl": "application/jsonl",
    ".ndjson": "application/jsonl",
}
"""What a file is taken for by the end of its name."""

_ALIASES: Final = {
    "text/x-markdown": "text/markdown",
    "application/xhtml+xml": "text/html",
    "application/x-pdf": "application/pdf",
    "application/csv": "text/csv",
    "text/tab-separated-values": "text/csv",
    "application/x-ndjson": "application/jsonl",
    "application/ndjson": "application/jsonl",
    "application/x-jsonlines": "application/jsonl",
    "application/jsonlines": "application/jsonl",
    "application/vnd.ms-word.document.macroenabled.12": DOCX,
    "application/vnd.ms-excel.sheet.macroenabled.12": XLSX,
    "application/vnd.ms-powerpoint.presentation.macroenabled.12": PPTX,
    "application/vnd.openxmlformats-officedocument.presentationml.slideshow": PPTX,
}
# What upload tools say when they do not know; Windows takes every table for one of Excel's.
_UNKNOWN_TYPES: Final = frozenset(
    ("", "application/octet-stream", "binary/octet-stream", "application/zip", "application/x-zip-compressed")
)
_TAKEN_BY_NAME: Final = {
    "application/vnd.ms-excel": (".csv", ".tsv", ".xlsx", ".xlsm"),
    "application/json": (".jsonl", ".ndjson"),
}
ARCHIVE: Final = b"PK\x03\x04"
"""What a file that is an archive of parts begins with."""
_OLD_OFFICE: Final = b"\xd0\xcf\x11\xe0"
_KNOWN_BINARIES: Final = (ARCHIVE, b"{\\rtf", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"\x1f\x8b", b"%!PS")
# An archive names its parts before each of them, and all of them again at its end.
_PART: Final = re.compile(
    rb"(?:PK\x03\x04.{26}|PK\x01\x02.{42})(word/document|ppt/presentation|xl/workbook|META-INF/container\.xml|mimetype"
    rb"application/epub\+zip)",
    re.DOTALL,
)
_PARTS: Final = {b"word/document": DOCX, b"ppt/presentation": PPTX, b"xl/workbook": XLSX}
# Nothing is given back: comments without a page behind them could be taken apart in 2**n ways.
_HTML: Final = re.compile(
    rb"\s*+(?:<!--(?:(?!-->).){0,2000}+-->\s*+)*+<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
_BYTE_ORDER_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_READS: Final = (
    "Markdown (.md), plain text (.txt), HTML (.html), PDF (.pdf), Word (.docx), PowerPoint (.pptx), Excel (.xlsx), CSV "
    "(.csv), EPUB (.epub), mail (.eml) and JSON lines (.jsonl) are read"
)


def media_type_of(content: bytes, *, name: str, media_type: str | None = None) -> str:
    """Return the media type a file is read as.

    Raises:
        UnsupportedType: Nothing reads files of this type.
    """
    if content.startswith(_OLD_OFFICE):
        raise UnsupportedType(
            f"{name!r} is in Office's old format, or has a password: save it as .docx, .xlsx, .pptx or .eml without one"
        )
    if seen := _seen(content):
        return seen
    stated = (media_type or "").partition(";")[0].strip().lower()
    stated = _ALIASES.get(stated, stated)
    if stated in READERS:
        return stated
    extension = PurePosixPath(name).suffix.lower()
    by_name = stated in _UNKNOWN_TYPES or stated.startswith("text/") or extension in _TAKEN_BY_NAME.get(stated, ())
    if not by_name:
        raise UnsupportedType(f"{name!r} is {stated}: {_READS}")
    return EXTENSIONS.get(extension) or _like(content, name)


def _seen(content: bytes) -> str | None:
    """Return the type that a file's own bytes leave no doubt of."""
    if content.startswith(b"%PDF-"):
        return "application/pdf"
    if content.startswith(ARCHIVE):
        found = _PART.search(content[:4096]) or _PART.search(content[-65_536:])
        return _PARTS.get(found[1], EPUB) if found else None
    return None


def _like(content: bytes, name: str) -> str:
    """Return what a file without a telling name looks like."""
    if b"%PDF-" in content[:1024]:
        return "application/pdf"
    if _HTML.match(content[:4096]):
        return "text/html"
    is_binary = content.startswith(_KNOWN_BINARIES)
    if is_binary or (b"\x00" in content[:65536] and not content.startswith(_BYTE_ORDER_MARKS)):
        raise UnsupportedType(f"{name!r} is of no type that is read: {_READS}")
    return "text/plain"
