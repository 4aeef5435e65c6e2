"""Files into a service from the command line: one by one, or a folder kept in step with what the service has.

The main rule: what one file is refused for is told, and does not stop the others; what stops all is told once.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from app.client import Client, Refusal, ServiceFailure
from app.terminal import err, out

SUFFIXES = frozenset({".md", ".markdown", ".txt", ".text", ".html", ".htm", ".pdf", ".docx"})
"""What `ingest` picks from a folder."""

UPLOADS_AT_ONCE = 4
_LOOK_SECONDS = 1.0
_READ_BYTES = 1_000_000


def load(client: Client, paths: list[Path]) -> int:
    """Upload files with a progress bar and wait until they are ingested; gives how many were refused."""
    files = list(find_documents(paths))
    if not files:
        raise ServiceFailure(f"There is no document to read; {', '.join(sorted(SUFFIXES))} are read.")
    counts: dict[str, int] = {}
    with _bar("loading documents", len(files)) as (progress, task):
        for name, outcome in _each(lambda file: client.add(*file), files, progress):
            counts[outcome or "refused"] = counts.get(outcome or "refused", 0) + 1
            progress.update(task, advance=1, description=f"loaded {escape(name)}")
        progress.update(task, description="documents loaded")
    out.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return counts.get("refused", 0)


@dataclass(frozen=True)
class Sync:
    """How a folder is to be kept in step."""

    source: str
    delete: bool = True
    max_deletes: int | None = None
    retry_failed: bool = False


def compare(client: Client, files: dict[str, Path], wanted: Sync) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Say what a synchronisation would do: the manifest, and the service's answer to it."""
    manifest = [{"name": name, "version": _digest(path)} for name, path in files.items()]
    return manifest, _sync(client, manifest, wanted, dry_run=True)


def show(plan: dict[str, Any]) -> None:
    """Print what a synchronisation would do, a line a document."""
    for sign, colour, names in (
        ("+", "green", plan["added"]),
        ("~", "yellow", plan["modified"]),
        ("-", "red", [document["name"] for document in plan["deleted"]]),
    ):
        for name in names:
            out.print(f"[{colour}]{sign}[/] {escape(name)}", soft_wrap=True)
    for failed in plan["failed"]:
        reason = f"failed before: {failed['error']['message']} ({failed['error']['code']})"
        out.print(f"[red]![/] {escape(failed['name'])}: {escape(reason)}", soft_wrap=True)
    for name in plan["conflicts"]:
        out.print(f"[red]![/] {escape(name)}: belongs to another source", soft_wrap=True)
    out.print(
        f"{plan['source']}: {len(plan['added'])} added, {len(plan['modified'])} modified, "
        f"{len(plan['deleted'])} deleted, {plan['unchanged']} unchanged, "
        f"{len(plan['failed']) + len(plan['conflicts'])} failed"
    )


def synchronise(client: Client, files: dict[str, Path], manifest: list[dict[str, str]], wanted: Sync) -> int:
    """Make the source equal to the files, with a progress bar; gives how many documents failed."""
    plan = _sync(client, manifest, wanted, dry_run=False)
    job_id = plan["job"]["id"]
    uploads = [(files[name], name) for name in (*plan["added"], *plan["modified"])]
    total = len(uploads) + len(plan["deleted"])
    try:
        with _bar(f"synchronising {escape(wanted.source)}", total) as (progress, task):

            def tell(job: dict[str, Any]) -> None:
                counts = job["counts"]
                at = f": {escape(job['running'][0]['name'])}" if job["running"] else ""
                ended = counts["done"] + counts["failed"] - len(plan["failed"]) - len(plan["conflicts"])
                progress.update(task, completed=ended, description=f"{escape(wanted.source)}{at}")

            for _ in _each(lambda file: client.upload(file[0], file[1], {"job": job_id})["state"], uploads, progress):
                tell(client.call("GET", f"/v1/jobs/{job_id}"))
            client.call("POST", f"/v1/jobs/{job_id}/complete")
            job = client.follow(job_id, tell=tell)
    except (KeyboardInterrupt, ServiceFailure):
        err.print(f"The job {job_id} is cancelled; what it has done stays.")
        client.call("POST", f"/v1/jobs/{job_id}/cancel")
        raise
    if job["state"] == "cancelled":
        raise ServiceFailure(f"The job {job_id} was cancelled, perhaps by another synchronisation of the source.")
    for failed in job["failed"]:
        err.print(f"[red]{escape(failed['name'])}:[/] {escape(failed['error']['message'])} ({failed['error']['code']})")
    outcomes = {outcome: count for outcome, count in job["outcomes"].items() if count}
    outcomes |= {"failed": job["counts"]["failed"]} if job["counts"]["failed"] else {}
    out.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "nothing to do")
    return int(job["counts"]["failed"])


def find_documents(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Each document under the paths, with the name it goes by: its path within the folder given."""
    for path in paths:
        if path.is_file():
            yield path, path.name
            continue
        for found in sorted(path.rglob("*")):
            if found.is_file() and found.suffix.lower() in SUFFIXES:
                yield found, found.relative_to(path).as_posix()


def _sync(client: Client, manifest: list[dict[str, str]], wanted: Sync, *, dry_run: bool) -> dict[str, Any]:
    body = {
        "source": wanted.source,
        "documents": manifest,
        "delete": wanted.delete,
        "max_deletes": wanted.max_deletes,
        "retry_failed": wanted.retry_failed,
        "dry_run": dry_run,
    }
    return client.call("POST", "/v1/documents/sync", json=body)


def _each(send: Any, files: list[tuple[Path, str]], progress: Progress) -> Iterator[tuple[str, str | None]]:
    """Send files, a few at once; gives each one's name and what `send` gave, or None after a refusal was told."""
    with ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="upload") as threads:
        waiting = iter(files)
        sent: dict[Future[str], str] = {}
        try:
            while True:
                for file in waiting:
                    sent[threads.submit(send, file)] = file[1]
                    if len(sent) == UPLOADS_AT_ONCE:
                        break
                if not sent:
                    return
                done, _ = wait(sent, return_when=FIRST_COMPLETED)
                for future in done:
                    name = sent.pop(future)
                    try:
                        yield name, future.result()
                    except Refusal as error:
                        progress.console.print(f"[red]{escape(name)}:[/] {escape(str(error))}")
                        yield name, None
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _bar(what: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield progress, progress.add_task(what, total=total)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
