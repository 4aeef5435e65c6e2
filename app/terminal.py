"""What the commands do for a person at a terminal: upload with a progress bar, show what an answer rests on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from app.client import Client, Refusal, ServiceFailure
from app.errors import InvalidRequest, ServiceError

# What a document or a model says is shown as it is: `:key:` is not a picture of one.
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

Url = Annotated[str, typer.Option("--url", envvar="HALLMARK_URL", help="Where the service runs.")]
Key = Annotated[str, typer.Option("--key", envvar="HALLMARK_API_KEY", help="An API key of the service.")]

SUFFIXES = frozenset({".md", ".markdown", ".txt", ".text", ".html", ".htm", ".pdf", ".docx"})
"""What `ingest` picks from a folder."""


@contextmanager
def explained() -> Iterator[None]:
    """Tell a failure in one line, and exit with 1, or with 2 where the command was wrong."""
    try:
        yield
    except InvalidRequest as error:
        err.print(f"[red]error:[/] {escape(error.message)}")
        raise typer.Exit(2) from None
    except (ServiceFailure, ServiceError, OSError) as error:
        err.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None


@contextmanager
def whole(target: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `target` that takes its place when the block ends well, and goes when it does not."""
    draft = target.with_name(f"{target.name}.partial")
    try:
        with draft.open("wb") as file:
            yield file
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def load(client: Client, paths: list[Path]) -> int:
    """Upload files with a progress bar; a refused one is told and does not stop the others. Gives their number."""
    files = list(find_documents(paths))
    if not files:
        raise ServiceFailure(f"There is no document to read; {', '.join(sorted(SUFFIXES))} are read.")
    counts: dict[str, int] = {}
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("loading documents", total=len(files))
        for path, name in files:
            progress.update(task, description=f"loading {escape(name)}")
            try:
                outcome = client.add(path, name)["outcome"]
            except Refusal as error:
                outcome = "refused"
                progress.console.print(f"[red]{escape(name)}:[/] {escape(str(error))}")
            counts[outcome] = counts.get(outcome, 0) + 1
            progress.advance(task)
        progress.update(task, description="documents loaded")
    out.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return counts.get("refused", 0)


def find_documents(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Each document under the paths, with the name it goes by: its path within the folder given."""
    for path in paths:
        if path.is_file():
            yield path, path.name
            continue
        for found in sorted(path.rglob("*")):
            if found.is_file() and found.suffix.lower() in SUFFIXES:
                yield found, found.relative_to(path).as_posix()


def show_sources(console: Console, answer: dict[str, Any]) -> None:
    """Print what an answer rests on."""
    verdict = answer.get("verdict")
    if verdict and verdict["status"] != "answered":
        console.print(f"[yellow]{verdict['status']}[/] ({verdict['reason'].replace('_', ' ')})")
    shown: set[int] = set()
    for citation in answer.get("citations", ()):
        if citation["n"] in shown:
            continue
        shown.add(citation["n"])
        heading = f" - {citation['heading']}" if citation["heading"] else ""
        console.print(f"[bold]\\[{citation['n']}][/] {escape(citation['title'] + heading)} ({citation['status']})")
        console.print(f'    "{escape(" ".join(citation["quote"].split()))}"', style="dim", soft_wrap=True)
        console.print(f"    {citation['url']}", soft_wrap=True)
