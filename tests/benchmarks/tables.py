"""Tables for a terminal and for a page: Markdown, written between the markers that name them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Table:
    """Rows of text under a heading each, with what they were measured under, and what of them must hold."""

    name: str
    conditions: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def require(self, holds: bool, promise: str) -> None:
        """Note a promise that was not kept."""
        if not holds:
            self.failures.append(f"{self.name}: {promise}")

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", self.conditions])


def write_into(page: Path, tables: Sequence[Table]) -> None:
    """Replace what stands between each table's markers, `<!-- NAME -->` and `<!-- end NAME -->`."""
    text = page.read_text(encoding="utf-8")
    for table in tables:
        start, end = f"<!-- {table.name} -->", f"<!-- end {table.name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        assert pattern.search(text), f"{page} has no place for the table {table.name}: {start} ... {end}"
        before, after = pattern.split(text, maxsplit=1)
        text = f"{before}{start}\n{table.markdown()}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
