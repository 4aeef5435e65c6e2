"""Hostile files and dying processes: each file is refused in time, and the parser reads the next one."""

import asyncio
import contextlib
import io
import os
import signal
import zipfile
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import docx
import pytest

from retrieval.documents import ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.parsers import Parser
from tests.stopwatch import Stopwatch


@pytest.fixture(scope="module")
async def parser() -> AsyncIterator[Parser]:
    async with Parser(ParseLimits(max_memory_bytes=512_000_000)) as opened:
        yield opened


@pytest.fixture
async def fresh_parser() -> AsyncIterator[Parser]:
    """One that has no process yet."""
    async with Parser() as opened:
        yield opened


def children() -> set[int]:
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


async def assert_alive(parser: Parser) -> None:
    assert (await parser.parse(b"# Fine", name="fine.md")).title == "Fine"


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
    bomb = b"".join(packer.compress(b" " * 1_000_000) for _ in range(300)) + packer.flush()
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


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        pytest.param(flate_bomb, "bomb.pdf", LimitExceeded, id="flate bomb"),
        pytest.param(lambda: many_pages(10_000), "pages.pdf", LimitExceeded, id="10,000 pages"),
        pytest.param(cyclic_pages, "cycle.pdf", UnreadableDocument, id="cyclic page tree"),
        pytest.param(lambda: pdf_of([b"<< >>"], broken_xref=True), "xref.pdf", UnreadableDocument, id="broken xref"),
        pytest.param(lambda: docx_with(b" " * 1_000_000, 300), "bomb.docx", LimitExceeded, id="zip bomb"),
        pytest.param(entity_bomb, "lol.docx", UnreadableDocument, id="entity bomb"),
        pytest.param(entity_file, "xxe.docx", UnreadableDocument, id="entity file"),
        pytest.param(deep_docx, "deep.docx", UnreadableDocument, id="deep XML"),
        pytest.param(lambda: b"<div>" * 200_000 + b"x", "deep.html", LimitExceeded, id="deep HTML"),
        pytest.param(lambda: b"<b><i>" * 100_000 + b"x", "format.html", LimitExceeded, id="deep formatting"),
    ],
)
async def test_a_hostile_file_is_refused_in_time(parser: Parser, make, name: str, expected: type[Exception]) -> None:
    content = make()
    assert len(content) < 2_000_000
    watch = Stopwatch()
    with pytest.raises(expected):
        await parser.parse(content, name=name)
    assert watch.seconds < 10
    await assert_alive(parser)


@pytest.mark.parametrize(
    "content",
    [
        ">" * 50_000 + "x",
        "- " * 20_000 + "x",
        "\n".join(" " * n + "- x" for n in range(1_000)),
        "[" * 50_000 + "x",
        "`" * 50_000,
        "|a" * 5_000 + "\n" + "|-" * 5_000 + "\n" + "|b\n" * 2_000,
        "> a\n" * 20_000,
        "# " + "*" * 20_000 + "x",
        "# " + "[" * 20_000,
    ],
    ids=range(9),
)
async def test_pathological_markdown_is_read_in_time(parser: Parser, content: str) -> None:
    watch = Stopwatch()
    assert (await parser.parse(content.encode(), name="a.md")).text == content
    assert watch.seconds < 5


async def test_memory_beyond_the_limit_is_refused() -> None:
    async with Parser(ParseLimits(max_memory_bytes=150_000_000)) as parser:
        with pytest.raises(UnreadableDocument):
            await parser.parse(b"<p>x</p>" * 2_000_000, name="a.html")
        await assert_alive(parser)


async def test_time_beyond_the_limit_is_refused_and_the_process_ended() -> None:
    before = children()
    async with Parser(ParseLimits(max_seconds=0.001)) as parser:
        with pytest.raises(LimitExceeded, match=r"slow\.txt.*0\.001 s"):
            await parser.parse(b"x", name="slow.txt")
    assert children() == before


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGKILL, "more memory"), (signal.SIGABRT, "crash"), (signal.SIGXCPU, "took more than")],
)
async def test_a_process_that_dies_costs_only_its_file(
    fresh_parser: Parser, number: signal.Signals, expected: str
) -> None:
    before = children()
    await assert_alive(fresh_parser)
    (child,) = children() - before
    os.kill(child, signal.SIGSTOP)
    reading = asyncio.create_task(fresh_parser.parse(b"x", name="a.txt"))
    await asyncio.sleep(0)
    os.kill(child, number)
    with contextlib.suppress(ProcessLookupError):  # A killed one may be gone by now.
        os.kill(child, signal.SIGCONT)
    with pytest.raises(UnreadableDocument, match=expected):
        await reading
    await assert_alive(fresh_parser)


async def test_a_cancelled_caller_leaves_no_process_behind(fresh_parser: Parser) -> None:
    before = children()
    await assert_alive(fresh_parser)
    (child,) = children() - before
    os.kill(child, signal.SIGSTOP)
    reading = asyncio.create_task(fresh_parser.parse(b"x", name="a.txt"))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await assert_alive(fresh_parser)
    assert child not in children()
