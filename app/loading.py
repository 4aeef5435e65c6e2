"""Documents into a service from the command line: one by one, or a source kept in step with what the service has.

The main rule: what one file is refused for is told, and does not stop the others; what stops all is told once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from app.errors import InvalidRequest
from app.sources import SUFFIXES, FileFailure, Source, SourceFailure
from app.terminal import err, out

UPLOADS_AT_ONCE = 4
_LOOK_SECONDS = 1.0


def load(
    client: Client, sources: Mapping[str, Source], urls: Sequence[str] = (), groups: list[str] | None = None
) -> int:
    """Add the documents of places, by what the user calls them, with a progress bar; gives how many were refused.

    Raises:
        InvalidRequest: two places have a document of the same name, of which one would replace the other.
    """
    tasks = [(url, partial(client.add_url, url, groups=groups)) for url in urls]
    place_of: dict[str, str] = {}
    for place, source in sources.items():
        names = source.names()
        if twice := place_of.keys() & names:
            name = min(twice)
            raise InvalidRequest(
                f"{place_of[name]} and {place} both have a document called {name!r}, and one would replace the other: "
                "give the folder above both, or rename one."
            )
        place_of |= dict.fromkeys(names, place)
        source.expect(names)
        tasks += [(name, partial(_add, client, source, name, groups)) for name in names]
    if not tasks:
        raise ServiceFailure(f"There is no document to read; {', '.join(sorted(SUFFIXES))} are read.")
    counts: dict[str, int] = {}
    with _bar("loading documents", len(tasks)) as (progress, task):
        for name, outcome in _each(tasks, progress):
            counts[outcome or "refused"] = counts.get(outcome or "refused", 0) + 1
            progress.update(task, advance=1, description=f"loaded {escape(name)}")
        progress.update(task, description="documents loaded")
    out.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return counts.get("refused", 0)


def _add(client: Client, source: Source, name: str, groups: list[str] | None) -> str:
    content = source.read(name)
    return client.add(content.data, name, media_type=content.media_type, groups=groups)


@dataclass(frozen=True)
class Sync:
    """How a source is to be kept in step."""

    source: str
    delete: bool = True
    max_deletes: int | None = None
    retry_failed: bool = False
    groups: list[str] | None = None


def compare(client: Client, source: Source, wanted: Sync) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Say what a synchronisation would do: the manifest, and the service's answer to it."""
    manifest = source.manifest()
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


def synchronise(client: Client, source: Source, manifest: list[dict[str, str]], wanted: Sync) -> int:
    """Make the service's documents equal to a source's, with a progress bar; gives how many failed."""
    plan = _sync(client, manifest, wanted, dry_run=False)
    job_id = plan["job"]["id"]
    names = [*plan["added"], *plan["modified"]]
    uploads = [(name, partial(_upload, client, source, name, job_id)) for name in names]
    total = len(uploads) + len(plan["deleted"])
    try:
        source.expect(names)
        with _bar(f"synchronising {escape(wanted.source)}", total) as (progress, task):

            def tell(job: dict[str, Any]) -> None:
                counts = job["counts"]
                at = f": {escape(job['running'][0]['name'])}" if job["running"] else ""
                ended = counts["done"] + counts["failed"] - len(plan["failed"]) - len(plan["conflicts"])
                progress.update(task, completed=ended, description=f"{escape(wanted.source)}{at}")

            for _ in _each(uploads, progress):
                tell(client.call("GET", f"/v1/jobs/{job_id}"))
            client.call("POST", f"/v1/jobs/{job_id}/complete")
            job = client.follow(job_id, tell=tell)
    except (KeyboardInterrupt, ServiceFailure, SourceFailure):
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


def _upload(client: Client, source: Source, name: str, job_id: str) -> str:
    content = source.read(name)
    sent = client.upload(content.data, name, {"job": job_id}, media_type=content.media_type, etag=content.etag)
    return str(sent["state"])


def _sync(client: Client, manifest: list[dict[str, str]], wanted: Sync, *, dry_run: bool) -> dict[str, Any]:
    body = {
        "source": wanted.source,
        "documents": manifest,
        "delete": wanted.delete,
        "max_deletes": wanted.max_deletes,
        "retry_failed": wanted.retry_failed,
        "dry_run": dry_run,
        "groups": wanted.groups,
    }
    return client.call("POST", "/v1/documents/sync", json=body)


def _each(tasks: Sequence[tuple[str, Callable[[], str]]], progress: Progress) -> Iterator[tuple[str, str | None]]:
    """Send documents, a few at once; gives each one's name and what came of it, or None after a refusal was told."""
    with ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="upload") as threads:
        waiting = iter(tasks)
        sent: dict[Future[str], str] = {}
        try:
            while True:
                for name, send in waiting:
                    sent[threads.submit(send)] = name
                    if len(sent) == UPLOADS_AT_ONCE:
                        break
                if not sent:
                    return
                done, _ = wait(sent, return_when=FIRST_COMPLETED)
                for future in done:
                    name = sent.pop(future)
                    try:
                        yield name, future.result()
                    except (Refusal, FileFailure) as error:
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
