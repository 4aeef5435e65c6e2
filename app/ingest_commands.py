"""`hallmark ingest` and `hallmark jobs`: documents into a service, and how far it is with them."""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.markup import escape

from app.client import Client
from app.errors import InvalidRequest
from app.loading import Sync, compare, load, show, synchronise
from app.sources import Source, SourceFailure, open_source
from app.terminal import Key, Url, err, explained, out, show_table

jobs = typer.Typer(help="Ingestion jobs: list, show, cancel.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="The job's id, as `jobs list` shows it.")]

FREE_DELETIONS = 5
"""So many documents may always go; more of them, and more than half of the source, are asked about."""


def ingest(
    places: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders to search for them, s3://bucket/prefix, git+https://host/repository.git@ref#folder, "
            "and URLs, which the service fetches."
        ),
    ],
    key: Key,
    url: Url = "http://127.0.0.1:8080",
    sync: Annotated[bool, typer.Option("--sync", help="Keep the service's documents equal to one place.")] = False,
    source: Annotated[str | None, typer.Option(help="What the place goes by; by default its own name.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --sync: say what would be done.")] = False,
    delete: Annotated[bool, typer.Option(help="With --sync: delete documents whose file is gone.")] = True,
    max_deletes: Annotated[int | None, typer.Option(min=0, help="With --sync: refuse if more would go.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Send what failed before again.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Read, cut and embed on the Ray cluster at host:6379, or auto for this machine's; the service writes.",
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Who sees the documents; repeat for several. By default as before, and new ones all see."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before most documents go.")] = False,
) -> None:
    """Add documents: the same bytes again change nothing, other bytes replace. Exits with 1 if any failed."""
    urls = [place for place in places if place.startswith(("http://", "https://"))]
    with explained(), Client(url, key) as client, ExitStack() as opened:
        if sync and (urls or len(places) != 1):
            raise InvalidRequest("--sync takes one folder, bucket or repository.")
        if not sync and (source or dry_run or retry_failed or max_deletes is not None or not delete):
            raise InvalidRequest("--source, --dry-run, --no-delete, --max-deletes and --retry-failed go with --sync.")
        if ray and (urls or any(place.startswith("git+") for place in places)):
            raise InvalidRequest("--ray takes folders that every node of the cluster has, and buckets.")
        places = [place for place in dict.fromkeys(places) if place not in urls]
        sources = [opened.enter_context(open_source(place)) for place in places]
        if ray:
            known = {} if sync else {each["name"]: each["version"] for each in client.documents()}
            sources = opened.enter_context(_on_cluster(ray, client.live_index(), known, places, sources))
        if sync:
            (place,) = sources
            wanted = Sync(source or _source_of(place.name), delete, max_deletes, retry_failed, group)
            failed = _sync(client, place, wanted, dry_run=dry_run, yes=yes)
        else:
            failed = load(client, dict(zip(places, sources, strict=True)), urls, group)
        if failed:
            raise typer.Exit(1)


@jobs.command("list")
def list_jobs(
    key: Key,
    url: Url = "http://127.0.0.1:8080",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
) -> None:
    """List the newest jobs."""
    rows = []
    with explained(), Client(url, key) as client:
        for job in client.call("GET", "/v1/jobs", params={"limit": limit})["data"]:
            counts = job["counts"]
            left = counts["expected"] + counts["waiting"] + counts["running"]
            figures = (str(counts["done"]), str(counts["failed"]), str(left))
            rows.append((job["id"], job["kind"], escape(job["source"]), job["state"], *figures))
    show_table(("id", "kind", "source", "state", "done", "failed", "left"), rows, folds=["source"])


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


@contextmanager
def _on_cluster(
    address: str, index: dict[str, Any], known: dict[str, str], places: list[str], sources: list[Source]
) -> Iterator[list[Source]]:
    """Have the documents of these places made ready on a Ray cluster, for the index that answers."""
    try:
        from app.sources.cluster import ClusterSource, Plan, connected  # An extra, which most do without.
    except ImportError as error:
        raise SourceFailure("--ray needs the extra `ray`: pip install 'hallmark[ray]'.") from error
    made_of = index["made_of"]
    plan = Plan(index["id"], made_of["embedding_model"], made_of["passage_tokens"], known)
    with connected(address):
        prepared = [ClusterSource(place, source, plan) for place, source in zip(places, sources, strict=True)]
        try:
            yield list(prepared)
        finally:
            for each in prepared:
                each.close()
            if nodes := set().union(*(each.nodes for each in prepared)):
                err.print(f"Made ready on {len(nodes)} of the cluster's nodes.")


def _source_of(name: str) -> str:
    """What a place goes by where nobody says: its name, in the letters that a source may have."""
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", name).strip("-./")[:128] or "folder"


def _sync(client: Client, place: Source, wanted: Sync, *, dry_run: bool, yes: bool) -> int:
    manifest, plan = compare(client, place, wanted)
    show(plan)
    if dry_run:
        return 0
    going = len(plan["deleted"])
    if wanted.max_deletes is None and going:
        _confirm(going, plan["unchanged"] + len(plan["modified"]), yes=yes)
        wanted = replace(wanted, max_deletes=going)
    elif wanted.max_deletes is not None and going > wanted.max_deletes:
        raise InvalidRequest(
            f"{going} documents would be deleted, and --max-deletes allows {wanted.max_deletes}: "
            f"say --max-deletes {going} if that is meant, or look at --dry-run."
        )
    return synchronise(client, place, manifest, wanted)


def _confirm(going: int, staying: int, *, yes: bool) -> None:
    if yes or going <= max(FREE_DELETIONS, staying):
        return
    question = f"{going} documents would be deleted and {staying} would stay. Go on?"
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} Say so by --yes or by --max-deletes {going}, or look at --dry-run.")
    if not typer.confirm(question, err=True):
        err.print("Nothing was changed.")
        raise typer.Exit(1)
