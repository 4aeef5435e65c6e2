"""`hallmark review ...`: queues, reviewing in the terminal, and the way to Label Studio and back, by the public API."""

from pathlib import Path
from tomllib import TOMLDecodeError, loads
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.table import Column, Table

from app.client import Client
from app.errors import InvalidRequest
from app.terminal import Key, Url, err, explained, out, whole

review = typer.Typer(help="The review queue: define, review, export, import.", no_args_is_help=True)

URL = "http://127.0.0.1:8080"
SKIP = "skip"
STOP = "stop"

Queue = Annotated[str, typer.Argument(help="The queue's name.")]


@review.command("define")
def define(
    queue: Queue,
    file: Annotated[Path, typer.Argument(help="Its rules, in TOML or JSON.", exists=True, dir_okay=False)],
    key: Key,
    url: Url = URL,
) -> None:
    """Make a queue, or give one other rules from now on."""
    try:
        text = file.read_text(encoding="utf-8")
        rules = msgspec.json.decode(text) if file.suffix.lower() == ".json" else loads(text)
    except (UnicodeDecodeError, TOMLDecodeError, msgspec.DecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}") from None
    with explained(), Client(url, key) as client:
        made = client.call("PUT", f"/v1/review/queues/{queue}", content=msgspec.json.encode(rules), headers=_JSON)
    out.print(f"{made['name']} revision {made['revision']}")


_JSON = {"content-type": "application/json"}


@review.command("list")
def show_all(key: Key, url: Url = URL) -> None:
    """List the queues."""
    with explained(), Client(url, key) as client:
        found = client.call("GET", "/v1/review/queues")["data"]
    table = Table(Column("queue", no_wrap=True), "question", "classes", "uniform", "paused")
    for each in found:
        rules = each["rules"]
        facts = (rules["question"][:60], ", ".join(rules["classes"]), f"{rules['uniform']:.4g}")
        table.add_row(each["name"], *map(escape, facts), "yes" if rules["paused"] else "no")
    out.print(table)


@review.command("show")
def show(queue: Queue, key: Key, url: Url = URL) -> None:
    """Show how far a queue is, how well its reviewers agree, and what that says of all answers."""
    path = f"/v1/review/queues/{queue}"
    with explained(), Client(url, key) as client:
        detail = client.call("GET", path)
        agreement = client.call("GET", f"{path}/agreement")
        shares = client.call("GET", f"{path}/shares")["data"]
    items = Table("policy", "state", "items")
    for each in detail["items"]:
        items.add_row(each["policy"], each["state"], str(each["items"]))
    people = Table("reviewer", "done", "skipped", "leased", "seconds", "gold right")
    for each in detail["reviewers"]:
        seconds = "-" if each["mean_seconds"] is None else f"{each['mean_seconds']:.0f}"
        counts = (str(each[name]) for name in ("done", "skipped", "leased"))
        people.add_row(escape(each["reviewer"]), *counts, seconds, f"{each['gold_right']} of {each['gold']}")
    weighted = Table("class", "release", "share", "95 % interval", "items", "unweighted")
    for each in shares:
        found = each["estimate"]
        interval = f"{found['low']:.3f} - {found['high']:.3f}"
        facts = (f"{found['share']:.3f}", interval, str(found["items"]), f"{found['unweighted']:.3f}")
        weighted.add_row(escape(each["class"]), escape(each["release"] or "all"), *facts)
    for table in (items, people, weighted):
        out.print(table)
    alpha = agreement["alpha"]
    value = "not known" if alpha["value"] is None else f"{alpha['value']:.3f}"
    out.print(f"Krippendorff's alpha {value} over {alpha['items']} items")


@review.command("work")
def work(
    queue: Queue,
    key: Key,
    url: Url = URL,
    reviewer: Annotated[str | None, typer.Option(help="Your name; by default the key's.")] = None,
) -> None:
    """Review one item after the other, until none is left or you stop."""
    who = {"reviewer": reviewer} if reviewer else {}
    with explained(), Client(url, key) as client:
        while leased := client.call("POST", f"/v1/review/queues/{queue}/leases", json=who)["data"]:
            item = leased[0]
            _show_item(item)
            options = [*item["classes"], SKIP, STOP]
            if item["classes"]:
                said = typer.prompt(f"{' | '.join(options)}")
            else:
                said = typer.prompt(f"The right answer, or {SKIP}, or {STOP}")
            path = f"/v1/review/reviews/{item['review_id']}"
            if said == STOP:
                client.call("DELETE", path, params=who)
                return
            if said == SKIP:
                client.call("POST", f"{path}/skip", json=who)
            elif item["classes"] and said not in item["classes"]:
                err.print("[red]That is none of them.[/]")
            else:
                found = {"class": said} if item["classes"] else {"answer": said}
                client.call("POST", f"{path}/complete", json={**who, **found})
    out.print("Nothing is left to review.")


def _show_item(item: dict[str, Any]) -> None:
    out.rule(item["prediction_id"])
    for message in item["messages"]:
        out.print(f"[bold]{escape(str(message.get('role')))}:[/] {escape(str(message.get('content')))}", soft_wrap=True)
    out.print(f"[bold]answer:[/] {escape(item['answer'] or '-')}", soft_wrap=True)
    for citation in item["citations"] or ():
        out.print(f'    "{escape(" ".join(str(citation.get("quote", "")).split()))}"', style="dim", soft_wrap=True)
    if item["question"]:
        out.print(f"[yellow]{escape(item['question'])}[/]", soft_wrap=True)


@review.command("gold")
def gold(
    queue: Queue,
    prediction_id: Annotated[str, typer.Argument(help="A prediction's id.")],
    class_name: Annotated[str, typer.Argument(metavar="CLASS", help="Its right class.")],
    key: Key,
    url: Url = URL,
) -> None:
    """Make a prediction one of known class, to see whether reviewers find it."""
    body = {"prediction_id": prediction_id, "class": class_name}
    with explained(), Client(url, key) as client:
        made = client.call("POST", f"/v1/review/queues/{queue}/gold", json=body)
    out.print(f"item {made['item_id']}")


@review.command("boost")
def boost(
    queue: Queue,
    rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="How likely each is taken.")],
    reason: Annotated[str, typer.Option(help="What was noticed.")],
    key: Key,
    url: Url = URL,
    release: Annotated[str | None, typer.Option(help="Only of this release, as `name@3`, or of all of a name.")] = None,
    since: Annotated[str | None, typer.Option(help="Only those made then or later: 2026-11-01T09:30:00Z.")] = None,
) -> None:
    """Take a larger share of a slice of what the queue considers."""
    where = {name: value for name, value in (("release", release), ("since", since)) if value is not None}
    body = {"rate": rate, "reason": reason, "where": where}
    with explained(), Client(url, key) as client:
        made = client.call("POST", f"/v1/review/queues/{queue}/boosts", json=body)
    out.print(f"boost {made['id']}")


@review.command("export")
def export(
    queue: Queue,
    target: Annotated[Path, typer.Option("--out", help="The file to write.", dir_okay=False)],
    key: Key,
    url: Url = URL,
    state: Annotated[str | None, typer.Option(help="waiting, done or set_aside.")] = None,
    annotations: Annotated[bool, typer.Option(help="With what was found so far.")] = True,
) -> None:
    """Write a queue's items as tasks for Label Studio; the file is there whole or not at all."""
    given: dict[str, Any] = {"annotations": annotations} | ({"state": state} if state else {})
    with explained(), Client(url, key) as client, whole(target) as file:
        file.writelines(client.lines(f"/v1/review/queues/{queue}/export", params=given))
    out.print(f"tasks in {escape(str(target))}", soft_wrap=True)


@review.command("import")
def bring(
    queue: Queue,
    file: Annotated[Path, typer.Argument(help="What Label Studio exported as JSON.", exists=True, dir_okay=False)],
    key: Key,
    url: Url = URL,
) -> None:
    """Take in the annotations of exported tasks: all of them, or none if one cannot be taken."""
    with explained(), Client(url, key) as client:
        content = file.read_bytes()
        try:
            msgspec.json.decode(content, type=list[dict[str, Any]])
        except (UnicodeDecodeError, msgspec.DecodeError) as error:
            raise InvalidRequest(f"{file} is not what Label Studio exports as JSON: {error}") from None
        path = f"/v1/review/queues/{queue}/import"
        done = client.call("POST", path, content=content, headers=_JSON)
    out.print(f"{done['done']} done, {done['skipped']} skipped, {done['unchanged']} unchanged")
