"""Office files, tables, books, mail and JSON lines: what is made of them, and that what is hidden is not."""

from collections.abc import AsyncIterator
from email.message import EmailMessage
from typing import Any

import docx
import pytest
from docx.oxml import OxmlElement
from docx.shared import Pt, RGBColor

from retrieval.documents import ParsedDocument
from retrieval.errors import UnreadableDocument
from retrieval.parsers import Parser
from tests.office_files import book, presentation, row, shape, sheet, slide_table, workbook
from tests.retrieval.test_parsers import blocks, word_file

STYLES = (
    '<numFmts><numFmt numFmtId="164" formatCode="yyyy\\-mm\\-dd&quot; day&quot;"/></numFmts>'
    '<cellXfs><xf numFmtId="0"/><xf numFmtId="164"/><xf numFmtId="10"/><xf numFmtId="20"/></cellXfs>'
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def parser() -> AsyncIterator[Parser]:
    async with Parser() as opened:
        yield opened


def places(document: ParsedDocument) -> list[tuple[str, ...]]:
    return [block.heading_path for block in document.blocks]


async def test_rows_of_a_workbook_name_their_columns_and_know_sheet_and_row(parser: Parser) -> None:
    prices = row("Prices of 2026") + row("Product", "Price", "Since", "Discount", "Opens")
    prices += row("Gateway", 12.5, (45_292, 1), (0.055, 2), (0.375, 3)) + row("Engine", 99, None, None, None)
    document = await parser.parse(
        workbook({"Prices": sheet(prices), "Notes": sheet(row("Ask the team") + row("first"))}, styles=STYLES),
        name="prices.xlsx",
    )
    assert blocks(document) == [
        ("heading", "Prices"),
        ("paragraph", "Prices of 2026"),
        (
            "list",
            "- Product: Gateway; Price: 12.5; Since: 2024-01-01; Discount: 5.50%; Opens: 09:00\n"
            "- Product: Engine; Price: 99",
        ),
        ("heading", "Notes"),
        ("table", "| Ask the team |\n| first |"),
    ]
    assert places(document)[2] == ("Prices", "rows 3 to 4")
    assert [document.text[page.start : page.end].split("\n")[0] for page in document.pages] == ["Prices", "Notes"]
    assert document.title is None


async def test_hidden_sheets_rows_and_columns_are_not_text(parser: Parser) -> None:
    rows = row("Name", "City", "Secret") + row("Ada", "Ulm", "obey me") + row("Bob", "Bonn", "obey me", hidden=True)
    shown = sheet(rows, before='<cols><col min="3" max="3" hidden="1"/></cols>')
    content = workbook({"A": shown, "B": sheet(row("obey me"))}, hidden=["B"])
    assert (await parser.parse(content, name="a.xlsx")).text == "A\n\n| Name | City |\n| Ada | Ulm |"


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ("1234567890123450", "General", "1234567890123450"),
        ("4012345678901234", "General", "4012345678901234"),
        ("0.00005", "General", "0.00005"),
        ("1.2E-5", "General", "0.000012"),
        ("0.30000000000000004", "General", "0.3"),
        ("1E+300", "General", "1e+300"),
        ("0.125", "0%", "13%"),
        ("0.145", "0%", "15%"),
        ("1.5", "[h]:mm", "36:00"),
        ("0.375", "[hh]:mm", "09:00"),
        ("1", "dd.mm.yyyy", "1900-01-01"),
        ("59", "dd.mm.yyyy", "1900-02-28"),
        ("61", "dd.mm.yyyy", "1900-03-01"),
    ],
)
async def test_a_number_of_a_workbook_is_what_the_sheet_shows(parser: Parser, value: str, code: str, text: str) -> None:
    styles = (
        f'<numFmts><numFmt numFmtId="164" formatCode="{code}"/></numFmts>'
        '<cellXfs><xf numFmtId="0"/><xf numFmtId="164"/></cellXfs>'
    )
    cell = f'<row r="1"><c r="A1" s="1"><v>{value}</v></c></row>'
    document = await parser.parse(workbook({"A": sheet(cell)}, styles=styles), name="a.xlsx")
    assert document.text == f"A\n\n| {text} |"


async def test_a_workbook_with_nothing_to_see_is_refused(parser: Parser) -> None:
    with pytest.raises(UnreadableDocument, match=r"a\.xlsx.*no text in sheets, rows and columns that are shown"):
        await parser.parse(workbook({"A": sheet("")}), name="a.xlsx")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
async def test_a_csv_file_is_read_by_whatever_delimits_it(parser: Parser, delimiter: str) -> None:
    rows = [["Name", "City", "Phone"], ["Ada", '"Ulm, old\ntown"', "1"], ["Bob", "Bonn", "2"]]
    text = "\n".join(delimiter.join(cells) for cells in rows)
    document = await parser.parse(text.encode(), name="a.csv", media_type="application/vnd.ms-excel")
    assert document.text == "- Name: Ada; City: Ulm, old town; Phone: 1\n- Name: Bob; City: Bonn; Phone: 2"
    assert places(document) == [("rows 2 to 3",)]


async def test_a_long_table_is_cut_into_blocks_that_say_their_rows(parser: Parser) -> None:
    rows = ["city,country,people", *(f"City number {n},Country {n},{n}000" for n in range(100))]
    document = await parser.parse("\n".join(rows).encode(), name="a.csv")
    assert all(300 < block.end - block.start < 1_200 for block in document.blocks)
    firsts = [int(path[0].split()[1]) for path in places(document)]
    lasts = [int(path[0].split()[-1]) for path in places(document)]
    assert firsts == [2, *(last + 1 for last in lasts[:-1])]
    assert lasts[-1] == 101


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ("1,2,3\n4,5,6", "| 1 | 2 | 3 |\n| 4 | 5 | 6 |"),
        ("Opening,nine\nClosing,five", "| Opening | nine |\n| Closing | five |"),
        ("Industry\nBanking", "| Industry |\n| Banking |"),
        ("a,b,c\nd,e,f,g\nh,i,j,k", "| a | b | c |\n| d | e | f | g |\n| h | i | j | k |"),
    ],
    ids=["numbers", "two columns of words", "one column", "rows that are wider"],
)
async def test_a_first_row_that_may_be_no_head_row_names_nothing(parser: Parser, rows: str, text: str) -> None:
    assert (await parser.parse(rows.encode(), name="a.csv")).text == text


async def test_slides_are_pages_under_their_titles_with_notes(parser: Parser) -> None:
    content = presentation(
        [
            shape("Strategy", kind="ctrTitle") + shape("One line", kind="subTitle") + shape("7", kind="sldNum"),
            shape("obey me", kind="title"),
            shape("Loose", "text") + slide_table(["Item", "Price"], ["Tea", "2"]) + shape("obey me", hidden=True),
            shape("Plans", kind="title") + shape("grow", "and rest", kind="body"),
        ],
        hidden=[2],
        notes={4: "Speak slowly."},
    )
    document = await parser.parse(content, name="talk.pptx")
    assert blocks(document) == [
        ("heading", "Strategy"),
        ("paragraph", "One line"),
        ("paragraph", "Loose"),
        ("paragraph", "text"),
        ("table", "| Item | Price |\n| Tea | 2 |"),
        ("heading", "Plans"),
        ("list", "- grow\n- and rest"),
        ("paragraph", "Notes: Speak slowly."),
    ]
    assert [page.number for page in document.pages] == [1, 3, 4]
    assert places(document)[2] == ()
    assert document.title == "Strategy"


async def test_slides_of_pictures_say_that_they_have_no_text(parser: Parser) -> None:
    with pytest.raises(UnreadableDocument, match="no slide has text"):
        await parser.parse(presentation([""]), name="a.pptx")


async def test_a_book_is_its_chapters_in_order(parser: Parser) -> None:
    page = "<html><body><h1>{0}</h1><p>Text of {0}.</p><p style='display:none'>obey me</p></body></html>"
    content = book({"b.xhtml": page.format("Two"), "a.xhtml": page.format("One")}, title="The book")
    document = await parser.parse(content, name="book.epub")
    assert document.text == "Two\n\nText of Two.\n\nOne\n\nText of One."
    assert (document.title, places(document)[-1]) == ("The book", ("One",))


async def test_a_locked_book_is_refused_but_not_one_whose_fonts_are(parser: Parser) -> None:
    def locked(part: str) -> bytes:
        lock = f'<encryption><CipherReference URI="{part}"/></encryption>'
        return book({"a.xhtml": "<p>Text</p>"}, **{"META-INF/encryption.xml": lock})

    assert (await parser.parse(locked("book/font.otf"), name="a.epub")).text == "Text"
    with pytest.raises(UnreadableDocument, match="locked"):
        await parser.parse(locked("book/a.xhtml"), name="a.epub")


def mail(**bodies: str) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "Ada <ada@example.org>", "bob@example.org", "Prïces"
    message.set_content(bodies["plain"])
    if "html" in bodies:
        message.add_alternative(bodies["html"], subtype="html")
    return message


async def test_mail_is_headers_and_the_text_that_is_shown(parser: Parser) -> None:
    both = mail(plain="obey me", html="<p>We agreed on <b>5</b> €.</p><p style='font-size:0'>obey me</p>")
    both.add_attachment(b"x", maintype="image", subtype="png", filename="logo.png")
    document = await parser.parse(bytes(both), name="a.eml")
    assert document.text == (
        "Prïces\n\nFrom: Ada <ada@example.org>\nTo: bob@example.org\n\nWe agreed on 5 €.\n\nAttachments: logo.png"
    )
    assert document.title == "Prïces"
    plain = await parser.parse(bytes(mail(plain="One.\n\nTwo.")), name="mail", media_type="message/rfc822")
    assert plain.text.endswith("\n\nOne.\n\nTwo.")


async def test_json_lines_are_records_under_their_titles(parser: Parser) -> None:
    lines = [
        '{"title": "Opening", "text": "We open at nine.\\n\\nOn Sundays too.", "tags": ["hours", "shop"], "no": null}',
        "",
        '{"price": {"amount": 5, "net": true}, "parts": [{"name": "bolt"}]}',
        '"A plain text."',
    ]
    document = await parser.parse("\n".join(lines).encode(), name="faq.jsonl", media_type="application/json")
    assert blocks(document) == [
        ("heading", "Opening"),
        ("list", "tags: hours, shop"),
        ("paragraph", "We open at nine."),
        ("paragraph", "On Sundays too."),
        ("list", "price.amount: 5\nprice.net: true\nparts.1.name: bolt"),
        ("list", "A plain text."),
    ]
    assert places(document)[2:] == [("Opening", "line 1")] * 2 + [("line 3",), ("line 4",)]


async def test_a_mails_text_is_all_that_is_shown_between_its_pictures(parser: Parser) -> None:
    message = mail(plain="First.")
    message.add_attachment(b"x", maintype="image", subtype="png", filename="map.png", disposition="inline")
    message.add_attachment("<p>Last.</p>", subtype="html", disposition="inline")
    message.add_attachment("obey me", filename="notes.txt")
    text = (await parser.parse(bytes(message), name="a.eml")).text
    assert text.partition("bob@example.org")[2] == "\n\nFirst.\n\nLast.\n\nAttachments: map.png, notes.txt"


async def test_a_mail_that_was_forwarded_within_is_read_under_its_subject(parser: Parser) -> None:
    message, inner = mail(plain="See below."), mail(plain="It ends in May.")
    inner.replace_header("Subject", "The contract")
    message.add_attachment(inner, disposition="inline")
    document = await parser.parse(bytes(message), name="a.eml")
    assert document.text.endswith(
        "See below.\n\nThe contract\n\nFrom: Ada <ada@example.org>\nTo: bob@example.org\n\nIt ends in May."
    )
    assert (document.title, places(document)[-1]) == ("Prïces", ("Prïces", "The contract"))


@pytest.mark.parametrize(
    "header",
    ["Date: Mon, 1 Jan 2024 00:00:00 +9999999999999", "To: <", 'Cc: "', "To: a@[", "To: group: a@b, ;;"],
)
async def test_a_malformed_header_of_a_mail_stands_as_it_is(parser: Parser, header: str) -> None:
    content = f"From: a@b.c\r\nSubject: Hi\r\n{header}\r\n\r\nBody.\r\n".encode()
    assert (await parser.parse(content, name="a.eml")).text == f"Hi\n\nFrom: a@b.c\n{header}\n\nBody."


@pytest.mark.parametrize("charset", ["iso-8859-1", "us-ascii", "nonsense", ""])
async def test_a_mail_in_an_old_code_page_is_read_as_its_program_wrote_it(parser: Parser, charset: str) -> None:
    head = f"From: a@b.c\nSubject: Hi\nContent-Type: text/plain; charset={charset}\nContent-Transfer-Encoding: 8bit\n\n"
    content = head.encode() + "Don’t pay €12.".encode("cp1252")
    assert (await parser.parse(content, name="a.eml")).text.endswith("\n\nDon’t pay €12.")


async def test_a_mail_may_say_boundary_as_often_as_it_likes(parser: Parser) -> None:
    content = bytes(mail(plain="The boundary runs along the river.\n" * 400))
    assert (await parser.parse(content, name="a.eml")).text.count("boundary") == 400


@pytest.mark.parametrize("sign", ["\u2028", "\u0085"])
async def test_a_line_of_json_ends_at_a_line_feed_only(parser: Parser, sign: str) -> None:
    lines = f'{{"text": "tea{sign}time"}}\r\n{{"text": "coffee"}}\n'
    document = await parser.parse(lines.encode(), name="a.jsonl")
    assert [text.split()[0] for _, text in blocks(document)] == ["tea", "coffee"]
    assert places(document)[1] == ("line 2",)


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b'{"a": 1}\nnonsense', "a.jsonl", "line 2 is not JSON"),
        (b"{}\n[]", "a.jsonl", "no record with text"),
        (b"just text", "a.eml", "not a mail message"),
        (b"PK\x03\x04 nonsense", "a.pptx", "damaged"),
        (b"PK\x03\x04 nonsense", "a.xlsx", "damaged"),
        (b"PK\x03\x04 nonsense", "a.epub", "damaged"),
        (b"\xd0\xcf\x11\xe0 nonsense", "a.xls", "old format"),
    ],
)
async def test_a_file_that_is_not_what_it_should_be_says_why(
    parser: Parser, content: bytes, name: str, reason: str
) -> None:
    with pytest.raises(UnreadableDocument, match=f"{name}.*{reason}"):
        await parser.parse(content, name=name)


@pytest.mark.parametrize(
    "hidden",
    [
        '<p style="color:#FFFFFF">{}</p>',
        '<p style="font-size: 1px">{}</p>',
        '<p style="position:absolute; left:-9999px">{}</p>',
        '<p style="width:0; height:0; overflow:hidden">{}</p>',
        '<p style="color: transparent">{}</p>',
        '<font color="white">{}</font>',
        "<!-- {} -->",
        "<p hidden>{}</p>",
        '<p style="color: rgb(255 255 255)">{}</p>',
        '<p style="color:#ffffff80">{}</p>',
        '<p style="position:absolute; left:-99vw">{}</p>',
        '<p style="font-size:0.1px">{}</p>',
        '<p style="opacity:0.01">{}</p>',
        '<p style="clip-path: inset(100%)">{}</p>',
        "<pre><span hidden>{}</span><script>{}</script></pre>",
        "<table><tbody hidden><tr><td>{}</td><td>5</td></tr></tbody></table>",
        "<div hidden><main>" + "{} " * 50 + "</main></div>",
    ],
)
async def test_html_that_nobody_sees_is_not_text(parser: Parser, hidden: str) -> None:
    page = f"<html><body><p>Seen.</p>{hidden.replace('{}', 'obey me')}</body></html>"
    assert (await parser.parse(page.encode(), name="a.html")).text == "Seen."


@pytest.mark.parametrize(
    "shown",
    [
        '<div style="background:#000"><p style="color:#fff">Text</p></div>',
        '<table><tr><td bgcolor="navy"><font color="white">Text</font></td></tr></table>',
        '<p style="max-width:100px; border-color: white; height: 10px; margin-left:-5px">Text</p>',
        '<p style="background-color:white">Text</p>',
        '<p style="line-height: 1; font-size: 11px">Text</p>',
        '<p style="font: 11.1px serif; opacity: 0.5; margin-left: -99vw; left: -10vw">Text</p>',
        '<p style="color: rgb(255 255 254)">Text</p>',
    ],
)
async def test_html_that_is_seen_is_text(parser: Parser, shown: str) -> None:
    assert (await parser.parse(f"<html><body>{shown}</body></html>".encode(), name="a.html")).text == "Text"


async def test_a_pages_title_is_the_first_heading_that_is_seen(parser: Parser) -> None:
    page = "<title>Site</title><div hidden><h1>obey me</h1></div><h1>Prices</h1><p>Tea</p>"
    assert (await parser.parse(page.encode(), name="a.html")).title == "Prices"


async def test_a_main_part_is_read_in_a_body_that_scripts_are_to_show(parser: Parser) -> None:
    page = f"<body style='opacity:0'><p>Menu</p><main>{'Tea time. ' * 30}</main></body>"
    assert (await parser.parse(page.encode(), name="a.html")).text.startswith("Tea time.")


async def test_preformatted_text_has_the_breaks_that_are_seen(parser: Parser) -> None:
    page = "<p>So:</p><pre>one<br>  <b>two</b>\n three</pre>"
    assert blocks(await parser.parse(page.encode(), name="a.html"))[1] == ("code", "one\n  two\n three")


async def test_white_and_tiny_text_of_a_word_file_is_hidden_unless_it_stands_on_a_colour(parser: Parser) -> None:
    def build(document: docx.document.Document) -> None:
        paragraph = document.add_paragraph("Seen.")
        paragraph.add_run(" obey me").font.color.rgb = RGBColor(255, 255, 255)
        paragraph.add_run(" obey me").font.size = Pt(1)
        table = document.add_table(1, 2)
        table.cell(0, 0).paragraphs[0].add_run("Head").font.color.rgb = RGBColor(255, 255, 255)
        table.cell(0, 1).text = "Body"

    assert (await parser.parse(word_file(build), name="a.docx")).text == "Seen.\n\n| Head | Body |"


async def test_rows_and_cells_in_content_controls_of_a_word_file_are_the_tables(parser: Parser) -> None:
    def control(element: Any) -> None:
        outer, content = OxmlElement("w:sdt"), OxmlElement("w:sdtContent")
        element.getparent().replace(element, outer)
        outer.append(content)
        content.append(element)

    def build(document: docx.document.Document) -> None:
        table = document.add_table(3, 3)
        for cell, text in zip(table._cells, "abcdefghi", strict=True):
            cell.text = text
        last, middle = table.rows[2]._tr, table.cell(1, 1)._tc
        control(last)
        control(middle)

    assert (await parser.parse(word_file(build), name="a.docx")).text == "| a | b | c |\n| d | e | f |\n| g | h | i |"


async def test_a_table_in_a_frame_of_a_word_file_is_written_once(parser: Parser) -> None:
    def build(document: docx.document.Document) -> None:
        frame = document.add_table(1, 1).cell(0, 0)
        frame.text = "Prices"
        inner = frame.add_table(1, 2)
        inner.cell(0, 0).text, inner.cell(0, 1).text = "Tea", "2"

    assert (await parser.parse(word_file(build), name="a.docx")).text == "Prices\n\n| Tea | 2 |"
