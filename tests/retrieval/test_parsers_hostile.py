"""Hostile files and dying processes: each file is refused in time, and the parser reads the next one."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from retrieval.documents import ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.parsers import Parser
from tests.hostile_files import (
    cyclic_pages,
    deep_docx,
    deep_mail,
    docx_with,
    entities,
    entity_bomb,
    entity_file,
    flate_bomb,
    hostile_font,
    many_fonts,
    many_pages,
    pdf_of,
    wide_sheet,
)
from tests.office_files import archive, book, presentation, row, shape, sheet, workbook
from tests.stopwatch import Stopwatch


@pytest.fixture(scope="module")
async def parser() -> AsyncIterator[Parser]:
    async with Parser() as opened:
        yield opened


@pytest.fixture
async def fresh_parser() -> AsyncIterator[Parser]:
    """One that has no process yet."""
    async with Parser() as opened:
        yield opened


def children() -> set[int]:
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


async def assert_alive(parser: Parser) -> None:
    assert (await parser.parse(b"# Fine", name="fine.md")).title == "Fine"


HOSTILE = [
    pytest.param(hostile_font, "font.pdf", UnreadableDocument, id="endless font"),
    pytest.param(
        lambda: workbook({"A": entities() + sheet(row("&l9;").replace("&amp;", "&"))}),
        "lol.xlsx",
        UnreadableDocument,
        id="XLSX entities",
    ),
    pytest.param(lambda: presentation([shape("x")] * 2_001), "slides.pptx", LimitExceeded, id="too many slides"),
    pytest.param(
        lambda: book({"a.xhtml": "<p>x</p>", "../../../../etc/cron.d/x": "* * * * * root id"}),
        "path.epub",
        UnreadableDocument,
        id="path names",
    ),
    pytest.param(
        lambda: archive({"mimetype": "application/epub+zip", "META-INF/container.xml": entities() + "<c>&l9;&f;</c>"}),
        "xxe.epub",
        UnreadableDocument,
        id="EPUB entities",
    ),
    pytest.param(
        lambda: archive({"xl/workbook.xml": "", **{f"xl/{n}": "" for n in range(15_000)}}) + b"",
        "parts.xlsx",
        UnreadableDocument,
        id="many parts",
    ),
    pytest.param(lambda: b"[" * 500_000, "deep.jsonl", UnreadableDocument, id="deep JSON"),
    pytest.param(deep_mail, "deep.eml", LimitExceeded, id="deep mail"),
    pytest.param(flate_bomb, "bomb.pdf", LimitExceeded, id="flate bomb"),
    pytest.param(lambda: many_pages(10_000), "pages.pdf", LimitExceeded, id="10,000 pages"),
    pytest.param(cyclic_pages, "cycle.pdf", UnreadableDocument, id="cyclic page tree"),
    pytest.param(lambda: pdf_of([b"<< >>"], broken_xref=True), "xref.pdf", UnreadableDocument, id="broken xref"),
    pytest.param(lambda: docx_with(b" " * 1_000_000, 50), "bomb.docx", LimitExceeded, id="zip bomb"),
    pytest.param(entity_bomb, "lol.docx", UnreadableDocument, id="entity bomb"),
    pytest.param(entity_file, "xxe.docx", UnreadableDocument, id="entity file"),
    pytest.param(deep_docx, "deep.docx", UnreadableDocument, id="deep XML"),
    pytest.param(lambda: b"<div>" * 200_000 + b"x", "deep.html", LimitExceeded, id="deep HTML"),
    pytest.param(lambda: b"<b><i>" * 100_000 + b"x", "format.html", LimitExceeded, id="deep formatting"),
]


@pytest.mark.parametrize(("make", "name", "expected"), HOSTILE)
async def test_a_hostile_file_is_refused(parser: Parser, make, name: str, expected: type[Exception]) -> None:
    content = make()
    assert len(content) < 2_000_000
    with pytest.raises(expected):
        await parser.parse(content, name=name)
    await assert_alive(parser)


@pytest.mark.slow
@pytest.mark.alone
async def test_every_hostile_file_is_refused_within_ten_seconds(parser: Parser) -> None:
    files = [(make(), name, expected) for make, name, expected in (case.values for case in HOSTILE)]
    for content, name, expected in files:
        watch = Stopwatch()
        with pytest.raises(expected):
            await parser.parse(content, name=name)
        assert watch.seconds < 10, name


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
async def test_pathological_markdown_is_read_within_the_limits(parser: Parser, content: str) -> None:
    assert (await parser.parse(content.encode(), name="a.md")).text == content


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (wide_sheet, "wide.xlsx"),
        (many_fonts, "fonts.pdf"),
        (lambda: b"," * 1_000_000 + b"x\n", "wide.csv"),
        (lambda: b'"' * 1_999_999, "quotes.csv"),
    ],
    ids=["wide sheet", "fonts that are none", "million columns", "CSV of quotes"],
)
async def test_an_odd_file_is_read_or_refused(parser: Parser, make, name: str) -> None:
    with contextlib.suppress(UnreadableDocument):
        await parser.parse(make(), name=name)
    await assert_alive(parser)


async def test_memory_beyond_the_limit_is_refused() -> None:
    async with Parser(ParseLimits(max_memory_bytes=150_000_000)) as parser:
        with pytest.raises(LimitExceeded, match=r"a\.jsonl.*150,000,000 bytes of memory: split it") as refused:
            await parser.parse(b"[" + b"{}," * 2_000_000 + b"{}]", name="a.jsonl")
        assert refused.value.limit == "memory"
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


async def test_processor_time_beyond_the_limit_is_refused() -> None:
    table = "|a" * 5_000 + "\n" + "|-" * 5_000 + "\n" + "|b\n" * 6_000
    # The system counts processor time in whole seconds, of which a fast one needs few for one such table.
    tables = "\n\n".join([table] * 10)
    async with Parser(ParseLimits(max_seconds=0.5)) as parser:
        with pytest.raises(LimitExceeded, match=r"wide\.md.*0\.5 s.*split it") as refused:
            await parser.parse(tables.encode(), name="wide.md")
        assert refused.value.limit == "seconds"
        await assert_alive(parser)


async def test_a_parser_process_dies_with_the_one_that_started_it() -> None:
    """Although it is in the middle of a file, and nobody reads its answer."""
    code = (
        "import asyncio, os, signal, sys\n"
        "from retrieval.parsers import Parser\n"
        "from tests.retrieval.test_parsers_hostile import children\n"
        "async def main():\n"
        "    parser = Parser()\n"
        "    await parser.parse(b'x', name='a.txt')\n"
        "    (child,) = children()\n"
        "    os.kill(child, signal.SIGSTOP)\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    output, _ = await process.communicate()
    while is_running(int(output)):
        await asyncio.sleep(0.01)


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


async def test_a_caller_that_leaves_while_the_process_starts_leaves_none_behind() -> None:
    before = children()
    async with Parser() as parser:
        for turns in range(1, 30):
            reading = asyncio.create_task(parser.parse(b"x", name="a.txt"))
            for _ in range(turns):
                await asyncio.sleep(0)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
    assert children() == before
