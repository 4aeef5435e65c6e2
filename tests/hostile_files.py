"""Files that are made to harm whoever reads them: bombs, cycles, entities, fonts, and depth."""

import io
import zipfile
import zlib

import docx

from tests.office_files import sheet, workbook


def pdf_of(objects: list[bytes], *, broken_xref: bool = False) -> bytes:
    body, offsets = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    if broken_xref:
        return body + b"xref\n0 999999999\ngarbage\ntrailer\n<< /Root 1 0 R /Size 9 /Prev 5 >>\nstartxref\n12\n%%EOF"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return body + b"xref\n0 %d\n0000000000 65535 f \n%btrailer\n<< /Root 1 0 R /Size %d >>\nstartxref\n%d\n%%%%EOF" % (
        size,
        table,
        size,
        len(body),
    )


def flate_bomb() -> bytes:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(b" " * 1_000_000) for _ in range(150)) + packer.flush()
    stream = b"<< /Length %d /Filter /FlateDecode >>\nstream\n%b\nendstream" % (len(bomb), bomb)
    fonts = b"<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    return pdf_of(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /Resources %b /Contents 4 0 R >>" % fonts,
            stream,
        ]
    )


def many_pages(count: int) -> bytes:
    kids = b" ".join(b"%d 0 R" % number for number in range(3, count + 3))
    page = b"<< /Type /Page /Parent 2 0 R >>"
    return pdf_of(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [%b] /Count %d >>" % (kids, count),
            *[page] * count,
        ]
    )


def cyclic_pages() -> bytes:
    return pdf_of([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 2 >>"])


def docx_with(part: bytes, repeat: int = 1) -> bytes:
    source = io.BytesIO()
    docx.Document().save(source)
    target = io.BytesIO()
    with zipfile.ZipFile(source) as good, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            if name != "word/document.xml":
                bad.writestr(name, good.read(name))
                continue
            with bad.open(name, "w") as out:
                for _ in range(repeat):
                    out.write(part)
    return target.getvalue()


def entity_bomb() -> bytes:
    levels = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    return docx_with(
        f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY l0 "lol">{levels}]>'
        f'<w:document xmlns:w="{space}"><w:body><w:p><w:r><w:t>&l9;</w:t></w:r></w:p></w:body></w:document>'.encode()
    )


def entity_file() -> bytes:
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    return docx_with(
        '<?xml version="1.0"?><!DOCTYPE d [<!ENTITY f SYSTEM "file:///etc/passwd">]>'
        f'<w:document xmlns:w="{space}"><w:body><w:p><w:r><w:t>&f;</w:t></w:r></w:p></w:body></w:document>'.encode()
    )


def deep_docx() -> bytes:
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    depth = 5_000
    return docx_with(
        f'<w:document xmlns:w="{space}"><w:body>{"<w:sdt><w:sdtContent>" * depth}<w:p/>'
        f"{'</w:sdtContent></w:sdt>' * depth}</w:body></w:document>".encode()
    )


def hostile_font() -> bytes:
    """A PDF whose font maps four thousand million codes to characters, one range after another."""
    ranges = b"<00000000> <FFFFFFFF> <0041>\n" * 100
    space = b"1 begincodespacerange\n<00000000> <FFFFFFFF>\nendcodespacerange\n"
    codes = b"begincmap\n%b100 beginbfrange\n%bendbfrange\nendcmap" % (space, ranges)
    font = b"<< /Subtype /Type0 /BaseFont /X /Encoding /Identity-H /ToUnicode 6 0 R /DescendantFonts [7 0 R] >>"
    text = b"BT /F1 12 Tf 10 10 Td <0041004200430044> Tj ET"
    return pdf_of(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /Resources << /Font << /F1 5 0 R >> >> /Contents 4 0 R >>",
            b"<< /Length %d >>\nstream\n%b\nendstream" % (len(text), text),
            font,
            b"<< /Length %d >>\nstream\n%b\nendstream" % (len(codes), codes),
            b"<< /Subtype /CIDFontType2 /W [0 99999999 500 5 [] null] /DW -1 /FontDescriptor 7 0 R >>",
        ]
    )


def many_fonts() -> bytes:
    """A PDF whose one page names fonts that are each other, or no fonts."""
    fonts = b" ".join(b"/F%d %d 0 R" % (n, 5 + n % 3) for n in range(2_000))
    text = b" ".join(b"BT /F%d 12 Tf (x) Tj ET" % n for n in range(2_000))
    return pdf_of(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /Resources << /Font << %b >> >> /Contents 4 0 R >>" % fonts,
            b"<< /Length %d >>\nstream\n%b\nendstream" % (len(text), text),
            b"<< /Subtype /Type0 /DescendantFonts [5 0 R] /Encoding 6 0 R /ToUnicode 5 0 R >>",
            b"<< /Subtype /Type1 /Encoding << /Differences [0 /a 1e99 /b (c) -5] >> /FirstChar 9 /Widths 7 0 R >>",
            b"[7 0 R]",
        ]
    )


def entities(levels: int = 9) -> str:
    nested = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, levels + 1))
    return f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY l0 "lol">{nested}<!ENTITY f SYSTEM "file:///etc/passwd">]>'


def deep_mail() -> bytes:
    levels = range(1_500)
    opened = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in levels)
    return b"Subject: deep\n" + opened + b"\nx"


def wide_sheet() -> bytes:
    """A sheet that says that it is as large as one can be, and has a cell in each of its corners."""
    cells = '<dimension ref="A1:XFD1048576"/>'
    rows = '<row r="1"><c r="XFD1"><v>1</v></c></row><row r="1048576"><c r="A1048576"><v>2</v></c></row>'
    return workbook({"A": sheet(rows * 50, before=cells + '<cols><col min="2" max="999999999" hidden="1"/></cols>')})
