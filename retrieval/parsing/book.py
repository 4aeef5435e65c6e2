"""Reads books (EPUB): the chapters in reading order, each as the web page that it is.

The main rule: the table of contents of a book is not its text, and a book that is locked is refused.
"""

import posixpath
import zipfile
from typing import Any
from urllib.parse import unquote

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import UnreadableDocument
from retrieval.parsing.archive import local, open_archive, part_beside, read_xml
from retrieval.parsing.draft import Draft, tidy
from retrieval.parsing.plain import decode
from retrieval.parsing.webpage import declared_charset, write_page

_PAGES = ("application/xhtml+xml", "text/html", "text/x-oeb1-document")


def read(content: bytes, limits: ParseLimits) -> ParsedDocument:
    """Return the chapters; the title is the book's own.

    Raises:
        UnreadableDocument: Its chapters are locked or have no text.
    """
    with open_archive(content, limits) as archive:
        package = _package(archive)
        root = read_xml(archive, package)
        locked = _locked(archive)
        draft = Draft(limits.max_characters)
        for part in _chapters(root, package):
            if part in locked:
                raise UnreadableDocument("the book is locked (DRM): only a copy without it can be read")
            if part in archive.NameToInfo:
                draft.section()
                _write_chapter(archive.read(part), draft, limits)
        if not draft.length:
            raise UnreadableDocument("the book has no text (pictures only?): run text recognition (OCR) on it first")
        title = next((element.text for element in root.iter() if local(element) == "title"), None)
        return draft.finish(tidy(title or ""))


def _package(archive: zipfile.ZipFile) -> str:
    """Return the part that lists the book's parts."""
    roots = [each for each in read_xml(archive, "META-INF/container.xml").iter() if local(each) == "rootfile"]
    if not roots:
        raise UnreadableDocument("the archive is not a book: its container names no package")
    return part_beside("", roots[0].get("full-path", ""))


def _chapters(package: Any, name: str) -> list[str]:
    items = {each.get("id"): each for each in package.iter() if local(each) == "item"}
    found = []
    for reference in package.iter():
        item = items.get(reference.get("idref")) if local(reference) == "itemref" else None
        if item is None or item.get("media-type") not in _PAGES or "nav" in item.get("properties", "").split():
            continue
        found.append(part_beside(name, unquote(item.get("href", ""))))
    return list(dict.fromkeys(found))


def _locked(archive: zipfile.ZipFile) -> set[str]:
    """Return the parts that are encrypted; fonts often are, and do not matter."""
    try:
        root = read_xml(archive, "META-INF/encryption.xml")
    except KeyError:
        return set()
    references = (each.get("URI", "") for each in root.iter() if local(each) == "CipherReference")
    return {posixpath.normpath(unquote(reference)) for reference in references}


def _write_chapter(content: bytes, draft: Draft, limits: ParseLimits) -> None:
    if content.strip():
        write_page(decode(content, limits, declared_charset(content)), draft)
