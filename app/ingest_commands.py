"""`hallmark ingest` and `hallmark jobs`: documents into a service, and how far it is with them."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from app.client import Client
from app.errors import InvalidRequest
from app.loading import Sync, compare, find_documents, load, show, synchronise
from app.terminal import Key, Url, err, explained, out

jobs = typer.Typer(help="Ingestion jobs: list, show, cancel.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="The job's id, as `jobs list` shows it.")]

FREE_DELETIONS = 5
"""So many documents may always go; more of them, and more than half of the source, are asked about."""


def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files, and folders to search for them.", exists=True)],
    key: Key,
    url: Url = "http://127.0.0.1:8080",
    sync: Annotated[bool, typer.Option("--sync", help="Keep the documents of a source equal to one folder.")] = False,
    source: Annotated[str | None, typer.Option(help="What the folder goes by; by default its own name.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --sync: say what would be done.")] = False,
    delete: Annotated[bool, typer.Option(help="With --sync: delete documents whose file is gone.")] = True,
    max_deletes: Annotated[int | None, typer.Option(min=0, help="With --sync: refuse if more would go.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Send what failed before again.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before most documents go.")] = False,
) -> None:
    """Add documents: the same bytes again change nothing, other bytes replace. Exits with 1 if any failed."""
    with explained(), Client(url, key) as client:
        if sync:
            folder = _folder(paths)
            wanted = Sync(source or _name_of(folder), delete, max_deletes, retry_failed)
            failed = _sync(client, folder, wanted, dry_run=dry_run, yes=yes)
        elif source or dry_run or retry_failed or max_deletes is not None or not delete:
            raise InvalidRequest("--source, --dry-run, --no-delete, --max-deletes and --retry-failed go with --sync.")
        else:
            failed = load(client, paths)
        if failed:
            raise typer.Exit(1)


@jobs.command("list")
def list_jobs(
    key: Key,
    url: Url = "http://127.0.0.1:8080",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
) -> None:
    """List the newest jobs."""
    table = Table("id", "kind", "source", "state", "done", "failed", "left")
    with explained(), Client(url, key) as client:
        for job in client.call("GET", "/v1/jobs", params={"limit": limit})["data"]:
            counts = job["counts"]
            left = counts["expected"] + counts["waiting"] + counts["running"]
            figures = (str(counts["done"]), str(counts["failed"]), str(left))
            table.add_row(job["id"], job["kind"], escape(job["source"]), job["state"], *figures)
    out.print(table)


@jobs.command("show")
def show_job(job_id: JobId, key: Key, url: Url = "http://127.0.0.1:8080") -> None:
    """Show a job, and what failed of it."""
    with explained(), Client(url, key) as client:
        job = client.call("GET", f"/v1/jobs/{job_id}")
    out.print(f"{job['id']}: {job['state']}, begun {job['created_at']} by {escape(job['created_by'])}")
    for facts in (job["counts"], job["outcomes"]):
        out.print(", ".join(f"{count} {name}" for name, count in facts.items() if count) or "nothing yet")
    out.print(f"{job['embedded_passages']} passages embedded, {job['reused_passages']} reused")
    for document in job["running"]:
        out.print(f"{document['stage'] or 'waiting'}: {escape(document['name'])}", soft_wrap=True)
    for document in job["failed"]:
        error = document["error"]
        out.print(f"[red]{escape(document['name'])}:[/] {escape(error['message'])} ({error['code']})", soft_wrap=True)


@jobs.command("cancel")
def cancel_job(job_id: JobId, key: Key, url: Url = "http://127.0.0.1:8080") -> None:
    """Cancel a job: what it has done stays."""
    with explained(), Client(url, key) as client:
        job = client.call("POST", f"/v1/jobs/{job_id}/cancel")
    out.print(f"{job['id']}: {job['state']}")


def _folder(paths: list[Path]) -> Path:
    if len(paths) != 1 or not paths[0].is_dir():
        raise InvalidRequest("--sync takes one folder.")
    return paths[0]


def _name_of(folder: Path) -> str:
    """What a folder goes by where nobody says: its name, in the letters that a source may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-.") or "folder"


def _sync(client: Client, folder: Path, wanted: Sync, *, dry_run: bool, yes: bool) -> int:
    files = {name: path for path, name in find_documents([folder])}
    manifest, plan = compare(client, files, wanted)
    show(plan)
    if dry_run:
        return 0
    going = len(plan["deleted"])
    if wanted.max_deletes is None and going:
        _confirm(going, plan["unchanged"] + len(plan["modified"]), yes=yes)
        wanted = Sync(wanted.source, wanted.delete, going, wanted.retry_failed)
    return synchronise(client, files, manifest, wanted)


def _confirm(going: int, staying: int, *, yes: bool) -> None:
    if yes or going <= max(FREE_DELETIONS, staying):
        return
    question = f"{going} documents would be deleted and {staying} would stay. Go on?"
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} Say so by --yes or by --max-deletes {going}, or look at --dry-run.")
    if not typer.confirm(question, err=True):
        err.print("Nothing was changed.")
        raise typer.Exit(1)
