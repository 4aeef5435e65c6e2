"""Small office files, books and PDFs, made by hand so that nothing but what a test says is in them."""

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar
from xml.sax.saxutils import escape, quoteattr

_RELATED = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
Value = TypeVar("Value")
_HIDDEN = ' hidden="1"'
_SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_SLIDE = (
    'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" '
    'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
    f'xmlns:r="{_RELATED}"'
)


def archive(parts: Mapping[str, str | bytes]) -> bytes:
    """A ZIP archive of these parts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content, zipfile.ZIP_STORED if name == "mimetype" else None)
    return buffer.getvalue()


def relations(targets: Sequence[tuple[str, str]]) -> str:
    """A part that relates another to these targets, by kind: `rId1`, `rId2` and so on."""
    rows = [f'<Relationship Id="rId{n}" Type="{_RELATED}/{kind}" Target="{to}"/>' for n, (kind, to) in _from_1(targets)]
    return f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{"".join(rows)}</Relationships>'


def sheet(rows: str, before: str = "") -> str:
    """A worksheet of these `<row>` elements."""
    return f'<worksheet xmlns="{_SHEET}">{before}<sheetData>{rows}</sheetData></worksheet>'


def row(*cells: str | float | tuple[float, int] | None, hidden: bool = False) -> str:
    """A row of texts, numbers, numbers with a style, and gaps."""
    written = []
    for column, cell in enumerate(cells):
        at = f' r="{chr(65 + column)}1"' if column else ""
        if isinstance(cell, str):
            written.append(f'<c{at} t="inlineStr"><is><t>{escape(cell)}</t></is></c>')
        elif isinstance(cell, tuple):
            written.append(f'<c{at} s="{cell[1]}"><v>{cell[0]}</v></c>')
        elif cell is not None:
            written.append(f"<c{at}><v>{cell}</v></c>")
    return f"<row{_HIDDEN if hidden else ''}>{''.join(written)}</row>"


def workbook(sheets: Mapping[str, str], *, hidden: Sequence[str] = (), styles: str = "", **parts: str) -> bytes:
    """An XLSX file of these worksheets by name."""
    names = [
        f'<sheet name={quoteattr(name)} sheetId="{n}" r:id="rId{n}"{_state(name in hidden)}/>'
        for n, name in _from_1(list(sheets))
    ]
    targets = [("worksheet", f"worksheets/sheet{n}.xml") for n, _ in _from_1(list(sheets))]
    files: dict[str, str | bytes] = {
        "_rels/.rels": relations([("officeDocument", "xl/workbook.xml")]),
        "xl/workbook.xml": f'<workbook xmlns="{_SHEET}" xmlns:r="{_RELATED}">'
        f"<sheets>{''.join(names)}</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": relations([*targets, ("styles", "styles.xml")]),
        "xl/styles.xml": f'<styleSheet xmlns="{_SHEET}">{styles}</styleSheet>',
    }
    files |= {f"xl/worksheets/sheet{n}.xml": content for n, content in _from_1(list(sheets.values()))}
    return archive(files | parts)


def shape(*paragraphs: str, kind: str = "", hidden: bool = False) -> str:
    """A shape of a slide with these paragraphs; `kind` is what it stands for on the layout."""
    place = f'<p:ph type="{kind}"/>' if kind else ""
    texts = "".join(f"<a:p><a:r><a:t>{escape(text)}</a:t></a:r></a:p>" for text in paragraphs)
    about = f'<p:cNvPr id="2" name="s"{_HIDDEN if hidden else ""}/>'
    return f"<p:sp><p:nvSpPr>{about}<p:cNvSpPr/><p:nvPr>{place}</p:nvPr></p:nvSpPr><p:txBody>{texts}</p:txBody></p:sp>"


def slide_table(*rows: Sequence[str]) -> str:
    """A table on a slide."""
    written = ""
    for cells in rows:
        texts = [f"<a:tc><a:txBody><a:p><a:r><a:t>{escape(cell)}</a:t></a:r></a:p></a:txBody></a:tc>" for cell in cells]
        written += f"<a:tr>{''.join(texts)}</a:tr>"
    table = f"<a:graphic><a:graphicData><a:tbl>{written}</a:tbl></a:graphicData></a:graphic>"
    return f"<p:graphicFrame>{table}</p:graphicFrame>"


def presentation(slides: Sequence[str], *, hidden: Sequence[int] = (), notes: Mapping[int, str] | None = None) -> bytes:
    """A PPTX file of these slides, of which some (from 1) are hidden and some have notes."""
    listed = "".join(f'<p:sldId id="{255 + n}" r:id="rId{n}"/>' for n, _ in _from_1(slides))
    files: dict[str, str | bytes] = {
        "_rels/.rels": relations([("officeDocument", "ppt/presentation.xml")]),
        "ppt/presentation.xml": f"<p:presentation {_SLIDE}><p:sldIdLst>{listed}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": relations([("slide", f"slides/slide{n}.xml") for n, _ in _from_1(slides)]),
    }
    for n, shapes in _from_1(slides):
        shown = ' show="0"' if n in hidden else ""
        tree = f"<p:cSld><p:spTree>{shapes}</p:spTree></p:cSld>"
        files[f"ppt/slides/slide{n}.xml"] = f"<p:sld {_SLIDE}{shown}>{tree}</p:sld>"
    for n, text in (notes or {}).items():
        tree = f"<p:cSld><p:spTree>{shape(text, kind='body')}</p:spTree></p:cSld>"
        files[f"ppt/notesSlides/notesSlide{n}.xml"] = f"<p:notes {_SLIDE}>{tree}</p:notes>"
        files[f"ppt/slides/_rels/slide{n}.xml.rels"] = relations([("notesSlide", f"../notesSlides/notesSlide{n}.xml")])
    return archive(files)


def book(chapters: Mapping[str, str], title: str = "A book", **parts: str) -> bytes:
    """An EPUB file of these pages by name, in this order."""
    items = "".join(
        f'<item id="c{n}" href="{name}" media-type="application/xhtml+xml"/>' for n, name in _from_1(list(chapters))
    )
    spine = "".join(f'<itemref idref="c{n}"/>' for n, _ in _from_1(list(chapters)))
    files: dict[str, str | bytes] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container><rootfile full-path="book/content.opf"/></container>',
        "book/content.opf": f"<package><metadata><title>{title}</title></metadata><manifest>{items}</manifest>"
        f"<spine>{spine}</spine></package>",
    }
    return archive(files | {f"book/{name}": page for name, page in chapters.items()} | parts)


def _state(is_hidden: bool) -> str:
    return ' state="hidden"' if is_hidden else ""


def _from_1(values: Sequence[Value]) -> Iterator[tuple[int, Value]]:
    return enumerate(values, 1)
