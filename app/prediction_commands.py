"""`hallmark predictions ...`: look at what is on record, and take it away as a file, by the public API."""

from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.client import Client
from app.terminal import Key, Url, err, explained, out, whole

predictions = typer.Typer(help="Predictions: list, export, trace.", no_args_is_help=True)

URL = "http://127.0.0.1:8080"
ROWS_AT_ONCE = 500
WIDE = 120
"""Columns of a terminal from which on there is room for more than what names a prediction."""

Release = Annotated[str | None, typer.Option(help="Only of this release, as `name@3`, or of all of a name.")]
Since = Annotated[str | None, typer.Option(help="Only those made then or later: 2026-11-01 or 2026-11-01T09:30:00Z.")]
Until = Annotated[str | None, typer.Option(help="Only those made before then.")]
Outcome = Annotated[str | None, typer.Option(help="finished, failed, cancelled, interrupted or open.")]
User = Annotated[str | None, typer.Option(help="Only of this user.")]
Conversation = Annotated[str | None, typer.Option(help="Only of this conversation.")]
Model = Annotated[str | None, typer.Option(help="Only what was asked by this name.")]
Adapter = Annotated[str | None, typer.Option(help="Only those of this adapter.")]
Verdict = Annotated[str | None, typer.Option(help="`abstained`, or with its reason `abstained:nothing_relevant`.")]
Assignment = Annotated[str | None, typer.Option(help="stable, canary, pinned, shadow, fallback, extractive or chore.")]
LabelState = Annotated[str | None, typer.Option(help="labelled or unlabelled.")]
FeedbackState = Annotated[str | None, typer.Option(help="given, none, positive, negative or corrected.")]


@predictions.command("list")
def show_some(
    key: Key,
    url: Url = URL,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many at most.")] = 20,
    release: Release = None,
    since: Since = None,
    until: Until = None,
    outcome: Outcome = None,
    user: User = None,
    conversation: Conversation = None,
    model: Model = None,
    adapter: Adapter = None,
    verdict: Verdict = None,
    assignment: Assignment = None,
    label_state: LabelState = None,
    feedback_state: FeedbackState = None,
) -> None:
    """List the newest predictions."""
    given = _given(
        release=release,
        since=since,
        until=until,
        outcome=outcome,
        user=user,
        conversation=conversation,
        model=model,
        adapter=adapter,
        verdict=verdict,
        assignment=assignment,
        label_state=label_state,
        feedback_state=feedback_state,
    )
    with explained(), Client(url, key) as client:
        found = client.call("GET", "/v1/predictions", params={**given, "limit": limit})["data"]
    table, is_wide = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0)), out.width >= WIDE
    for name in ("id", "made", "release", "outcome", *(("verdict", "seconds", "question") if is_wide else ())):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for each in found:
        facts = [each["id"], each["created_at"][:19], each["release_name"] or "-", each["outcome"]]
        if is_wide:
            seconds = each["total_seconds"]
            facts += [each["verdict"] or "-", "-" if seconds is None else f"{seconds:.2f}", _question(each)]
        table.add_row(*map(escape, facts))
    out.print(table)


@predictions.command("export")
def export(
    key: Key,
    target: Annotated[Path, typer.Option("--out", help="The file to write.", dir_okay=False)],
    kind: Annotated[Literal["jsonl", "parquet"], typer.Option("--format", help="`parquet` needs hallmark[export].")] = (
        "jsonl"
    ),
    url: Url = URL,
    release: Release = None,
    since: Since = None,
    until: Until = None,
    outcome: Outcome = None,
    user: User = None,
    conversation: Conversation = None,
    model: Model = None,
    adapter: Adapter = None,
    verdict: Verdict = None,
    assignment: Assignment = None,
    label_state: LabelState = None,
    feedback_state: FeedbackState = None,
) -> None:
    """Write predictions into a file, oldest first; it is there whole or not at all."""
    given = _given(
        release=release,
        since=since,
        until=until,
        outcome=outcome,
        user=user,
        conversation=conversation,
        model=model,
        adapter=adapter,
        verdict=verdict,
        assignment=assignment,
        label_state=label_state,
        feedback_state=feedback_state,
    )
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rows = 0
    with explained(), Client(url, key) as client, whole(target) as file, Progress(*columns, console=err) as progress:
        write = _parquet(file) if kind == "parquet" else file.writelines
        total = client.call("GET", "/v1/predictions/count", params=given)["count"]
        task = progress.add_task("exporting predictions", total=total)
        lines = client.lines("/v1/predictions/export", params={**given, "format": "jsonl"})
        while some := tuple(islice(lines, ROWS_AT_ONCE)):
            write(some)
            rows += len(some)
            progress.update(task, completed=rows, total=max(rows, total))
        if kind == "parquet":
            write(())
    out.print(f"{rows} predictions in {escape(str(target))}", soft_wrap=True)


@predictions.command("lineage")
def lineage(prediction_id: Annotated[str, typer.Argument(help="A prediction's id.")], key: Key, url: Url = URL) -> None:
    """Show what a prediction was made of, as JSON; exits with 1 if something is not what its digest says."""
    with explained(), Client(url, key) as client:
        trace = client.call("GET", f"/v1/predictions/{prediction_id}/lineage")
    out.print_json(data=trace)
    if trace["verified"] is False:
        err.print("[red]not verified:[/] see `problems`")
        raise typer.Exit(1)


def _question(prediction: dict[str, Any]) -> str:
    """What was asked, in one line; what was not searched for stands in the request alone."""
    asked = prediction["question"]
    if asked is None and prediction["request"]:
        said = prediction["request"]["messages"][-1].get("content")
        asked = said if isinstance(said, str) else None
    return " ".join((asked or "").split())[:60]


def _given(**filters: str | None) -> dict[str, str]:
    return {name: value for name, value in filters.items() if value is not None}


def _parquet(file: IO[bytes]) -> Any:
    """Give what writes lines of JSON as Parquet; no lines are the end."""
    from app.parquet import ParquetWriter
    from app.predictions import FACTS

    writer = ParquetWriter(FACTS)
    decode = msgspec.json.Decoder(dict[str, Any]).decode

    def write(lines: tuple[bytes, ...]) -> None:
        file.write(writer.add([decode(line) for line in lines]) if lines else writer.finish())

    return write
