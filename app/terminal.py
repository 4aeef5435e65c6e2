"""What the commands do for a person at a terminal: explain a failure, print a table, show what an answer rests on."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from app.client import ServiceFailure
from app.errors import InvalidRequest, ServiceError
from app.sources import SourceFailure

FOLDED = 7
"""Columns of a terminal that are left to what is folded in a table."""

# What a document or a model says is shown as it is: `:key:` is not a picture of one.
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

Url = Annotated[str, typer.Option("--url", envvar="HALLMARK_URL", help="Where the service runs.")]
Key = Annotated[str, typer.Option("--key", envvar="HALLMARK_API_KEY", help="An API key of the service.")]


@contextmanager
def explained() -> Iterator[None]:
    """Tell a failure in one line, and exit with 1, or with 2 where the command was wrong."""
    try:
        yield
    except InvalidRequest as error:
        err.print(f"[red]error:[/] {escape(error.message)}")
        raise typer.Exit(2) from None
    except (ServiceFailure, ServiceError, SourceFailure, OSError) as error:
        err.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None


@contextmanager
def whole(target: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `target` that takes its place when the block ends well, and goes when it does not.

    Raises:
        FileNotFoundError: there is no folder for it.
    """
    if not target.parent.is_dir():  # What is opened has a name that nobody gave.
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r} to write {target.name} into.")
    draft = target.with_name(f"{target.name}.partial")
    try:
        with draft.open("wb") as file:
            yield file
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def show_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, folds: Collection[str] = (), title: str | None = None
) -> None:
    """Print a table of which nothing is cut off: an id that is cannot be asked for, a figure that is says another.

    Where there is no room the columns `folds` are folded; where that is not enough, lines are longer than the terminal.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for name, *cells in zip(names, *rows, strict=True):
        room = max(Measurement.get(out, out.options, cell).maximum for cell in (name, *cells))
        least = min(room, FOLDED) if name in folds else room
        table.add_column(name, no_wrap=name not in folds, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*row)
    out.print(table, crop=False)


def show_sources(console: Console, answer: dict[str, Any]) -> None:
    """Print what an answer rests on."""
    verdict = answer.get("verdict")
    if verdict and verdict["status"] != "answered":
        console.print(f"[yellow]{verdict['status']}[/] ({verdict['reason'].replace('_', ' ')})")
    by_number: dict[int, list[dict[str, Any]]] = {}
    for citation in answer.get("citations", ()):
        by_number.setdefault(citation["n"], []).append(citation)
    for n, citations in by_number.items():
        first = citations[0]
        heading = f" - {first['heading']}" if first["heading"] else ""
        status = ", ".join(dict.fromkeys(each["status"] for each in citations))
        console.print(f"[bold]\\[{n}][/] {escape(first['title'] + heading)} ({status})")
        for quote in dict.fromkeys(" ".join(each["quote"].split()) for each in citations):
            console.print(f'    "{escape(quote)}"', style="dim", soft_wrap=True)
        console.print(f"    {first['url']}", soft_wrap=True)
