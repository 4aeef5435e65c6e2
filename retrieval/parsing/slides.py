"""Reads presentations (PPTX): a slide is a page under its title, with its texts, lists, tables and notes.

The main rule: what is not shown is not text: hidden slides, hidden shapes, and comments. Notes are kept, and named so:
who speaks reads them.
"""

import zipfile
from collections.abc import Iterator
from typing import Any

from retrieval.documents import Page, ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.parsing.archive import local, open_archive, read_xml, related, title_in_properties
from retrieval.parsing.draft import Draft, tidy

_TITLES = ("title", "ctrTitle")
# What every slide of a master repeats: date, number, header and footer.
_REPEATED = frozenset(("dt", "sldNum", "hdr", "ftr"))
_HIDDEN = ("1", "true")
_LISTED = ("buChar", "buAutoNum", "buBlip")
_LEFTOVER_TITLES = ("PowerPoint Presentation", "PowerPoint-Präsentation")


def read(content: bytes, limits: ParseLimits) -> ParsedDocument:
    """Return the slides that are shown; the title is that of the properties, or of the first slide.

    Raises:
        LimitExceeded: It has more slides than a document may have pages.
        UnreadableDocument: No slide has text.
    """
    with open_archive(content, limits) as archive:
        slides = _slides(archive)
        if len(slides) > limits.max_pages:
            message = f"the presentation has {len(slides):,} slides; at most {limits.max_pages:,} are read: split it"
            raise LimitExceeded(message, "pages")
        draft = Draft(limits.max_characters)
        pages = []
        for number, part in enumerate(slides, 1):
            root = read_xml(archive, part)
            if root.get("show") in ("0", "false"):
                continue
            before = draft.length
            _write_slide(draft, root, archive, part)
            if draft.length > before:
                pages.append(Page(number, before + 2 if before else 0, draft.length))
        if not draft.length:
            raise UnreadableDocument("no slide has text (pictures only?): run text recognition (OCR) on it first")
        title = tidy(title_in_properties(archive) or "")
        return draft.finish(None if title in _LEFTOVER_TITLES else title, pages)


def _slides(archive: zipfile.ZipFile) -> list[str]:
    """Return the parts of the slides in the order in which they are shown."""
    main = next(part for kind, part in related(archive, "").values() if kind == "officeDocument")
    parts = related(archive, main)
    found = []
    for element in read_xml(archive, main).iter():
        if local(element) == "sldId":
            identity = next((value for name, value in element.attrib.items() if name.endswith("}id")), "")
            if identity in parts:
                found.append(parts[identity][1])
    return found


def _write_slide(draft: Draft, slide: Any, archive: zipfile.ZipFile, part: str) -> None:
    shapes = list(_shapes(slide))
    titles = [shape for shape in shapes if _placeholder(shape) in _TITLES]
    draft.section()
    for shape in titles[:1]:
        draft.heading(" ".join(_text(shape).split()), 1)
    for shape in shapes:
        if shape in titles[:1] or _placeholder(shape) in _REPEATED:
            continue
        if local(shape) == "tbl":
            _write_table(draft, shape)
        else:
            _write_paragraphs(draft, shape)
    notes = next((name for kind, name in related(archive, part).values() if kind == "notesSlide"), None)
    if notes in archive.NameToInfo:
        said = [_text(shape) for shape in _shapes(read_xml(archive, str(notes))) if _placeholder(shape) == "body"]
        if text := "\n".join(filter(None, said)):
            draft.block(f"Notes: {text}", "paragraph")


def _shapes(slide: Any) -> Iterator[Any]:
    """Yield the shapes with text and the tables that are shown, looking into groups, in the order of the file."""
    stack = [iter(slide)]
    while stack:
        element = next(stack[-1], None)
        if element is None:
            stack.pop()
            continue
        tag = local(element)
        if tag in ("sp", "cxnSp", "pic", "grpSp", "graphicFrame") and _is_hidden(element):
            continue
        if tag in ("sp", "tbl"):
            yield element
        elif tag != "Fallback":  # The second form of what is there in a first.
            stack.append(iter(element))


def _is_hidden(shape: Any) -> bool:
    about = next((inner for properties in shape for inner in properties if local(inner) == "cNvPr"), None)
    return about is not None and about.get("hidden") in _HIDDEN


def _placeholder(shape: Any) -> str | None:
    """Return what a shape stands for on the slide's layout, if for anything."""
    found = next((inner for inner in shape.iter() if local(inner) == "ph"), None) if local(shape) == "sp" else None
    return None if found is None else found.get("type", "body")


def _write_table(draft: Draft, table: Any) -> None:
    rows = [row for row in table if local(row) == "tr"]
    draft.rows([[" ".join(_text(cell).split()) for cell in row if local(cell) == "tc"] for row in rows])


def _write_paragraphs(draft: Draft, shape: Any) -> None:
    """Write a shape's paragraphs; those of a list, or that follow one another in a body, are its items."""
    items: list[str] = []
    is_body = _placeholder(shape) in ("body", "obj", "subTitle")
    paragraphs = [(text, paragraph) for paragraph in _paragraphs(shape) if (text := _paragraph(paragraph))]
    for text, paragraph in paragraphs:
        level, is_listed = _level(paragraph)
        if is_listed or (is_body and len(paragraphs) > 1):
            items.append(f"{'  ' * level}- {' '.join(text.split())}")
        else:
            draft.block("\n".join(items), "list")
            items.clear()
            draft.block(text, "paragraph")
    draft.block("\n".join(items), "list")


def _level(paragraph: Any) -> tuple[int, bool]:
    properties = next((inner for inner in paragraph if local(inner) == "pPr"), None)
    if properties is None:
        return 0, False
    level = properties.get("lvl", "0")
    is_listed = any(local(inner) in _LISTED for inner in properties)
    return min(int(level), 8) if level.isdecimal() else 0, is_listed


def _paragraphs(shape: Any) -> Iterator[Any]:
    return (inner for inner in shape.iter() if local(inner) == "p")


def _paragraph(paragraph: Any) -> str:
    parts = []
    for inner in paragraph.iter():
        tag = local(inner)
        if tag == "t":
            parts.append(inner.text or "")
        elif tag in ("br", "tab"):
            parts.append("\n" if tag == "br" else " ")
    return tidy("".join(parts))


def _text(shape: Any) -> str:
    return "\n".join(filter(None, (_paragraph(paragraph) for paragraph in _paragraphs(shape))))
