"""`hallmark index`: build an index version beside the live one, compare, switch, roll back, drop."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from app.client import Client
from app.errors import InvalidRequest
from app.terminal import Key, Url, err, explained, out, show_table

index = typer.Typer(help="Index versions: build, compare, switch, roll back, drop.", no_args_is_help=True)

IndexId = Annotated[str, typer.Argument(help="The version's id, as `index list` shows it.")]


@index.command("list")
def list_indexes(key: Key, url: Url = "http://127.0.0.1:8080") -> None:
    """List the index versions."""
    rows, troubles = [], []
    with explained(), Client(url, key) as client:
        for each in client.call("GET", "/v1/indexes")["data"]:
            made = each["made_of"]
            figures = (str(made["passage_tokens"]), str(each["documents"]), str(each["missing_documents"]))
            rows.append((each["id"], each["state"], made["embedding_model"], *figures))
            troubles += [f"[yellow]{each['id']}:[/] {escape(each['trouble'])}"] if each["trouble"] else []
    show_table(("id", "state", "model", "passage\ntokens", "documents", "missing"), rows, folds=["model"])
    for trouble in troubles:
        out.print(trouble, soft_wrap=True)


@index.command("build")
def build(
    key: Key,
    url: Url = "http://127.0.0.1:8080",
    wait: Annotated[bool, typer.Option(help="Wait until it is ready.")] = True,
) -> None:
    """Build what the settings name by `retrieval.next_*`, beside the live version."""
    with explained(), Client(url, key) as client:
        begun = client.call("POST", "/v1/indexes")
        out.print(f"{begun['index']['id']}: job {begun['job']['id']}", soft_wrap=True)
        if wait and _follow(client, begun["job"]["id"]) != "done":
            raise typer.Exit(1)


@index.command("compare")
def compare(
    questions: Annotated[Path, typer.Argument(help="A file of questions, as `hallmark-eval` takes.", exists=True)],
    version: IndexId,
    key: Key,
    url: Url = "http://127.0.0.1:8080",
    k: Annotated[int, typer.Option(min=1, max=50, help="Documents of a ranking that count.")] = 10,
) -> None:
    """Rank the documents for questions, by this version and by the live one."""
    with explained(), Client(url, key) as client:
        body = {"questions": _judged(questions), "k": k}
        comparison = client.call("POST", f"/v1/indexes/{version}/compare", json=body)["comparison"]
    table = Table("figure", "live", "this version", "95 % interval")
    for each in comparison["figures"]:
        interval = f"{each['low']:.3f} to {each['high']:.3f}" if each["low"] is not None else ""
        table.add_row(each["name"], f"{each['live']:.3f}", f"{each['value']:.3f}", interval)
    out.print(f"{comparison['questions']} questions; {comparison['live']} is live", soft_wrap=True)
    out.print(table)


@index.command("switch")
def switch(
    version: IndexId,
    key: Key,
    url: Url = "http://127.0.0.1:8080",
    uncompared: Annotated[bool, typer.Option("--uncompared", help="There is nothing to compare it by.")] = False,
) -> None:
    """Answer from this version from now on."""
    with explained(), Client(url, key) as client:
        _tell(client.call("POST", f"/v1/indexes/{version}/switch", json={"uncompared": uncompared}))


@index.command("rollback")
def rollback(key: Key, url: Url = "http://127.0.0.1:8080") -> None:
    """Answer from the version that was live before."""
    with explained(), Client(url, key) as client:
        _tell(client.call("POST", "/v1/indexes/rollback"))


@index.command("drop")
def drop(version: IndexId, key: Key, url: Url = "http://127.0.0.1:8080") -> None:
    """Remove a version that does not answer; one that is being built is given up."""
    with explained(), Client(url, key) as client:
        client.call("DELETE", f"/v1/indexes/{version}")
    out.print(f"{version} is dropped", soft_wrap=True)


def _tell(found: dict[str, Any]) -> None:
    out.print(f"{found['id']} is {found['state']} since {found['live_at']}", soft_wrap=True)


def _judged(file: Path) -> list[dict[str, Any]]:
    from retrieval.evaluation.sets import BadSet, load

    try:
        judged = load(file).judged
    except BadSet as error:
        raise InvalidRequest(str(error)) from None
    if not judged:
        raise InvalidRequest(f"{file}: no question says by 'documents' what answers it.")
    return [{"question": each.text, "documents": dict(each.documents)} for each in judged]


def _follow(client: Client, job_id: str) -> str:
    """Show how far a build is until it has ended; gives how."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("passages", total=None)

        def tell(job: dict[str, Any]) -> None:
            for each in job["running"]:
                progress.update(
                    task,
                    description=each["stage"] or "waiting",
                    completed=each["passages_done"],
                    total=each["passages"],
                )

        return str(client.follow(job_id, tell=tell)["state"])
