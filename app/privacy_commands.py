"""`hallmark privacy ...`: keys that content is sealed by, and erasing a person or a conversation."""

import time
from typing import Annotated

import typer
from rich.table import Column, Table

from app.client import Client
from app.terminal import Key, Url, err, explained, out

URL = "http://127.0.0.1:8080"

privacy = typer.Typer(help="What is kept of what people said: keys, erasures.", no_args_is_help=True)


@privacy.command("new-key")
def make_key() -> None:
    """Make a master key and print it: for HALLMARK_PRIVACY_MASTER_KEY_FILE, above the keys that are there."""
    from app.privacy.sealing import new_key  # A cryptographic library that no other command needs.

    typer.echo(new_key())


@privacy.command("erase")
def erase(
    key: Key,
    url: Url = URL,
    user: Annotated[str | None, typer.Option(help="As requests name the user.")] = None,
    conversation: Annotated[str | None, typer.Option(help="As requests name it.")] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for its end.")] = 60.0,
) -> None:
    """Erase what was said by or to a user, or in a conversation; tells what was trained on it.

    Exits with 1 where the erasure is not done within the wait: it goes on.
    """
    subject = {name: value for name, value in (("user", user), ("conversation", conversation)) if value is not None}
    if len(subject) != 1:
        raise typer.BadParameter("name one: --user or --conversation")
    until = time.monotonic() + wait
    with explained(), Client(url, key) as client:
        erasure = client.call("POST", "/v1/erasures", json=subject)
        while erasure["state"] != "done" and time.monotonic() < until:
            time.sleep(0.5)
            erasure = client.call("GET", f"/v1/erasures/{erasure['id']}")
    counts = ", ".join(f"{count} {name}" for name, count in sorted(erasure["counts"].items()) if count)
    out.print(f"{erasure['id']} {erasure['state']}: {counts or 'nothing was found'}")
    for name, found in erasure.get("trained", {}).items():
        for each in found:
            err.print(f"[yellow]trained on it:[/] {name} {each}")
    if erasure["state"] != "done":
        err.print("it goes on: `hallmark privacy erasures` shows how far it is")
        raise typer.Exit(1)


@privacy.command("erasures")
def show(key: Key, url: Url = URL) -> None:
    """List erasures, the newest first."""
    with explained(), Client(url, key) as client:
        found = client.call("GET", "/v1/erasures")["data"]
    table = Table(Column("erasure", no_wrap=True), "of a", "state", "requested", "predictions", "datasets")
    for each in found:
        counts = each["counts"]
        facts = (each["requested_at"], str(counts.get("predictions", 0)), str(len(each["datasets"])))
        table.add_row(each["id"], each["kind"], each["state"], *facts)
    out.print(table)
