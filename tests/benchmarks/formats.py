"""What the parsers make of real files that other projects test theirs with, some of them malformed.

Word recall is the share of the words of the expected text (each as often as it occurs there) that are in ours. Every
file is read as the service reads it: in a child process, with the default limits.

    python -m tests.benchmarks.formats [--data ../shared/data] [--each] [--write]

`--write` puts the table into docs/formats.md. The files that were refused follow with the reasons.
"""

import argparse
import asyncio
import html
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retrieval.errors import UnreadableDocument
from retrieval.parsers import Parser
from tests.benchmarks.tables import Table, write_into

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
KINDS = ("pdf", "docx", "pptx", "xlsx", "csv", "html", "md", "epub", "eml")
_WORD = re.compile(r"\w+")
_NOT_TEXT = re.compile(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)|(?<=\])\([^)]*\)|</?[a-z]+[^>]*>", re.DOTALL)


@dataclass(frozen=True)
class Reading:
    """What became of one file."""

    path: Path
    refused: str | None
    seconds: float
    recall: float | None
    """Share of the expected words that were read, where an expected text is known."""

    @property
    def kind(self) -> str:
        """The format by the file's name."""
        return self.path.suffix[1:].lower()


def files(data: Path) -> Iterator[tuple[Path, Path | None]]:
    """Give each real file with the text that is expected of it, where there is one."""
    for path in sorted((data / "docs_docling").glob("*/sources/*")):
        names = (f"{path.name}.md", f"{path.stem}.md")
        expected = (path.parents[1] / "groundtruth" / name for name in names)
        yield path, next((file for file in expected if file.exists()), None)
    for path in sorted((data / "docs_docling" / "pdf").glob("*.pdf")):
        yield path, None
    for path in sorted((data / "docs_markitdown").glob("*.*")):
        if path.name == "README.txt":
            continue
        text = path.parent / "expected_outputs" / f"{path.stem}.md"
        yield path, text if path.suffix == ".pdf" and text.exists() else None
    for path in sorted((data / "docs_pypdf_samples").glob("*/*.pdf")):
        yield path, None


async def read_all(data: Path) -> list[Reading]:
    """Read every file, one after another; a crash of the parser is an error here."""
    found = []
    async with Parser() as parser:
        for path, expected in files(data):
            began = time.perf_counter()
            recall = refused = None
            try:
                document = await parser.parse(path.read_bytes(), name=path.name)
            except UnreadableDocument as error:
                refused = str(error)
            else:
                recall = word_recall(expected.read_text(encoding="utf-8"), document.text) if expected else None
            found.append(Reading(path, refused, time.perf_counter() - began, recall))
    return found


def word_recall(expected: str, text: str) -> float:
    """Return the share of the expected words that `text` has, each counted as often as it is expected."""
    wanted = Counter(_WORD.findall(html.unescape(_NOT_TEXT.sub(" ", expected)).lower()))
    given = Counter(_WORD.findall(text.lower()))
    return sum((wanted & given).values()) / max(1, wanted.total())


def tabled(readings: list[Reading]) -> Table:
    """Return a row for each format, the usual ones first."""
    kinds = defaultdict(list)
    for reading in readings:
        kinds[reading.kind].append(reading)
    table = Table(
        "formats",
        f"{len(readings)} files of the test sets of docling, markitdown and pypdf; recall is the mean over files.",
        ["format", "files", "read", "refused", "with expected text", "word recall"],
    )
    for kind in (*KINDS, *sorted(kinds.keys() - set(KINDS))):
        of_kind = kinds[kind]
        recalls = [reading.recall for reading in of_kind if reading.recall is not None]
        refused = sum(reading.refused is not None for reading in of_kind)
        mean = f"{sum(recalls) / len(recalls):.3f}" if recalls else ""
        counts = (len(of_kind), len(of_kind) - refused, refused, len(recalls))
        table.rows.append([kind, *map(str, counts), mean])
    return table


def main() -> None:
    """Print the table and what was refused."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments.add_argument("--each", action="store_true", help="print the recall of each file too")
    arguments.add_argument("--write", action="store_true", help="write the table into docs/formats.md")
    options = arguments.parse_args()
    readings = asyncio.run(read_all(options.data))
    table = tabled(readings)
    print(table.markdown(), end="\n\n")
    if options.write:
        write_into(PAGE, [table])
    slowest = max(readings, key=lambda reading: reading.seconds)
    print(f"The slowest was {slowest.path.name}, {slowest.seconds:.1f} s.")
    for reading in readings:
        if reading.refused:
            print(f"- {reading.path.parent.name}/{reading.refused}")
        elif options.each and reading.recall is not None:
            print(f"- {reading.path.name}: {reading.recall:.3f}")


if __name__ == "__main__":
    main()
