"""Reads Word documents (DOCX): paragraphs, lists and tables in their order, headings by style.

The main rule: what Word would not print is not text, nor what nobody could read on paper: deleted revisions, hidden
runs, field codes and comments; text in white, or of a size of one point.
"""

import io
import re
from collections.abc import Iterator
from typing import Any

import docx
from docx.oxml.ns import qn

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import UnreadableDocument
from retrieval.parsing.archive import open_archive
from retrieval.parsing.draft import Draft, tidy

_HEADING = re.compile(r"heading (\d)\Z", re.IGNORECASE)
_PARAGRAPH, _TABLE, _CONTROL, _CONTROL_CONTENT = qn("w:p"), qn("w:tbl"), qn("w:sdt"), qn("w:sdtContent")
_CELL, _ROW, _RUN, _TEXT = qn("w:tc"), qn("w:tr"), qn("w:r"), qn("w:t")
_MATH_TEXT = "{http://schemas.openxmlformats.org/officeDocument/2006/math}t"
# What was deleted or moved away, and the second form of what is there in a first.
_NOT_PRINTED = frozenset(
    (qn("w:del"), qn("w:moveFrom"), "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback")
)
_TEXT_BOX = qn("w:txbxContent")
_WHITE = ("FFFFFF", "white")
_LARGEST_UNREADABLE_HALF_POINTS = 2
_BREAKS = {qn("w:tab"): "\t", qn("w:br"): "\n", qn("w:cr"): "\n", qn("w:noBreakHyphen"): "-"}
_CONTAINERS = frozenset((qn("w:ins"), qn("w:moveTo"), qn("w:smartTag"), qn("w:customXml")))


def read(content: bytes, limits: ParseLimits) -> ParsedDocument:
    """Return the document's body; its title is that of its properties, its Title paragraph, or its first heading."""
    open_archive(content, limits).close()
    document = docx.Document(io.BytesIO(content))
    draft = Draft(limits.max_characters)
    _Writer(draft, _heading_levels(document)).write(document.element.body)
    if not draft.length:
        raise UnreadableDocument("the document has no text")
    return draft.finish(tidy(document.core_properties.title or ""))


def _heading_levels(document: Any) -> dict[str, int]:
    """Return the level of each style that is a heading, or is based on one; a Title is above them all."""
    levels: dict[str, int] = {}
    for style in document.styles:
        base, steps = style, 0
        while base is not None and steps < 10:
            name = base.name or ""
            found = _HEADING.match(name)
            if found or name == "Title":
                levels[style.style_id] = int(found[1]) if found else 0
                break
            base, steps = getattr(base, "base_style", None), steps + 1
    return levels


class _Writer:
    def __init__(self, draft: Draft, heading_levels: dict[str, int]) -> None:
        self._draft = draft
        self._heading_levels = heading_levels
        self._items: list[str] = []

    def write(self, body: Any) -> None:
        for element in _parts(body, (_PARAGRAPH, _TABLE)):
            if element.tag == _TABLE:
                self._end_list()
                self._table(element)
            else:
                self._paragraph(element)
        self._end_list()

    def _paragraph(self, paragraph: Any) -> None:
        text, boxes = _text(paragraph)
        properties = paragraph.find(qn("w:pPr"))
        style = _value(properties, "w:pStyle") or ""
        level = self._heading_levels.get(style)
        outline = _value(properties, "w:outlineLvl")
        if level is None and outline and outline.isdigit() and int(outline) < 9:
            level = int(outline) + 1
        if text and level is None and (_is_numbered(properties) or style.startswith("List")):
            self._items.append(f"{'  ' * _list_depth(properties)}- {' '.join(text.split())}")
        elif text:
            self._end_list()
            if level is None:
                self._draft.block(text, "paragraph")
            else:
                self._draft.heading(text, level)
        for box in boxes:
            self._end_list()
            self.write(box)

    def _table(self, table: Any) -> None:
        rows = [list(_parts(row, (_CELL,))) for row in _parts(table, (_ROW,))]
        if all(len(row) == 1 for row in rows):
            # A table of one column is a frame around text.
            for (cell,) in rows:
                self.write(cell)
        else:
            self._draft.rows([[_cell_text(cell) for cell in row] for row in rows])

    def _end_list(self) -> None:
        self._draft.block("\n".join(self._items), "list")
        self._items.clear()


def _parts(container: Any, tags: tuple[str, ...]) -> Iterator[Any]:
    """Yield a container's own elements of these kinds in order, looking into content controls and revisions."""
    for element in container:
        if element.tag in tags:
            yield element
        elif element.tag == _CONTROL:
            content = element.find(_CONTROL_CONTENT)
            if content is not None:
                yield from _parts(content, tags)
        elif element.tag in _CONTAINERS:
            yield from _parts(element, tags)


def _cell_text(cell: Any) -> str:
    return " ".join(text for paragraph in cell.iter(_PARAGRAPH) if (text := _text(paragraph)[0]))


def _text(paragraph: Any) -> tuple[str, list[Any]]:
    """Return a paragraph's printed text, and the text boxes that are anchored in it."""
    parts: list[str] = []
    boxes: list[Any] = []
    stack = [iter(paragraph)]
    while stack:
        element = next(stack[-1], None)
        if element is None:
            stack.pop()
        elif element.tag == _TEXT_BOX:
            boxes.append(element)
        elif element.tag in (_TEXT, _MATH_TEXT):
            parts.append(element.text or "")
        elif element.tag in _BREAKS:
            parts.append(_BREAKS[element.tag])
        elif element.tag not in _NOT_PRINTED and not (element.tag == _RUN and _is_hidden(element)):
            stack.append(iter(element))
    return tidy("".join(parts)), boxes


def _is_hidden(run: Any) -> bool:
    properties = run.find(qn("w:rPr"))
    if properties is None:
        return False
    vanish = properties.find(qn("w:vanish"))
    if vanish is not None and vanish.get(qn("w:val")) not in ("0", "false", "off"):
        return True
    size = _value(properties, "w:sz") or ""
    if size.isdigit() and int(size) <= _LARGEST_UNREADABLE_HALF_POINTS:
        return True
    return _value(properties, "w:color") in _WHITE and not _has_background(run, properties)


def _has_background(run: Any, properties: Any) -> bool:
    """Tell whether white text may stand on a colour: its own, its paragraph's, a cell's or a text box's."""
    if any(properties.find(qn(name)) is not None for name in ("w:shd", "w:highlight")):
        return True
    for outer in run.iterancestors():
        if outer.tag in (_CELL, _TEXT_BOX):
            return True
        if outer.tag == _PARAGRAPH and outer.find(f"{qn('w:pPr')}/{qn('w:shd')}") is not None:
            return True
        if outer.tag == qn("w:document"):
            return outer.find(qn("w:background")) is not None
    return False


def _is_numbered(properties: Any) -> bool:
    number = None if properties is None else properties.find(f"{qn('w:numPr')}/{qn('w:numId')}")
    return number is not None and number.get(qn("w:val")) != "0"


def _list_depth(properties: Any) -> int:
    depth = None if properties is None else properties.find(f"{qn('w:numPr')}/{qn('w:ilvl')}")
    value = "0" if depth is None else depth.get(qn("w:val"), "0")
    return min(int(value), 8) if value.isdigit() else 0


def _value(properties: Any, name: str) -> str | None:
    element = None if properties is None else properties.find(qn(name))
    return None if element is None else element.get(qn("w:val"))
