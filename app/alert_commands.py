"""`hallmark alerts ...`: what fires, the rules that say so, silences, and a test of the webhook, by the public API."""

import time
from base64 import b64encode
from pathlib import Path
from secrets import token_bytes
from tomllib import TOMLDecodeError, loads
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from app.client import Client
from app.errors import InvalidRequest
from app.terminal import Key, Url, err, explained, out

alerts = typer.Typer(help="Alerts: what got worse, the rules that say so, and who is told.", no_args_is_help=True)

URL = "http://127.0.0.1:8080"
TEST_SECONDS = 30.0

Target = Annotated[str, typer.Argument(help="A name, or one of its releases as `name@3`.")]
Why = Annotated[str, typer.Option(help="The reason, for the audit.")]


@alerts.command("list")
def show_all(
    key: Key,
    url: Url = URL,
    state: Annotated[str, typer.Option(help="active, pending, firing, resolved or any.")] = "active",
    release: Annotated[str | None, typer.Option(help="Only of this release, `name@3`.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
) -> None:
    """List alerts, the newest first."""
    given = {"state": state, "release": release, "limit": limit}
    with explained(), Client(url, key) as client:
        found = client.call("GET", "/v1/alerts", params={name: value for name, value in given.items() if value})["data"]
    table = Table(Column("id", no_wrap=True), "state", "severity", "rule", "release", "since", "what was found")
    for each in found:
        seen = " (seen)" if each["acknowledged_at"] else ""
        facts = (each["severity"], each["rule"], each["release"] or "-", each["since"][:19], each["why"])
        table.add_row(each["id"], each["state"] + seen, *map(escape, facts))
    out.print(table if found else "none")


@alerts.command("show")
def show(alert_id: Annotated[str, typer.Argument(help="As `alerts list` shows it.")], key: Key, url: Url = URL) -> None:
    """Show an alert with its figures and its history, as JSON."""
    with explained(), Client(url, key) as client:
        out.print_json(data=client.call("GET", f"/v1/alerts/{alert_id}"))


@alerts.command("acknowledge")
def acknowledge(alert_id: Annotated[str, typer.Argument()], key: Key, url: Url = URL, why: Why = "") -> None:
    """Say that you look after an alert."""
    with explained(), Client(url, key) as client:
        found = client.call("POST", f"/v1/alerts/{alert_id}/acknowledge", json={"why": why})
    out.print(f"{found['rule']} is acknowledged by {escape(found['acknowledged_by'])}", soft_wrap=True)


@alerts.command("rules")
def rules(
    target: Target,
    key: Key,
    url: Url = URL,
    file: Annotated[
        Path | None, typer.Option("--set", help="Set those of this TOML file, as tables [[alerts]].", exists=True)
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Take its own rules away.")] = False,
    why: Why = "",
) -> None:
    """Show the rules that hold for a name or a release, or set them."""
    with explained(), Client(url, key) as client:
        if file is not None:
            body = {"rules": _read(file), "why": why}
            client.call("PUT", f"/v1/alert-rules/{target}", json=body)
        elif reset:
            client.call("DELETE", f"/v1/alert-rules/{target}")
        found = client.call("GET", f"/v1/alert-rules/{target}")
    out.print(f"{target} has the rules of {found['holds_from'] or 'every release without its own'}:", soft_wrap=True)
    table = Table("rule", "kind", "severity", "fires when")
    for each in found["rules"]:
        table.add_row(each["name"], each["kind"], each["severity"], escape(_condition(each)))
    out.print(table)


@alerts.command("silence")
def silence(
    rule: Annotated[str, typer.Argument(help="Its name; `*` is any.")],
    hours: Annotated[float, typer.Argument(min=0.01, max=720)],
    key: Key,
    url: Url = URL,
    release: Annotated[str, typer.Option(help="`name@3`; `*` is any.")] = "*",
    why: Why = "",
) -> None:
    """Tell nobody of a rule's alerts for some hours; they are found and kept as ever."""
    body = {"rule": rule, "release": release, "seconds": hours * 3600, "why": why}
    with explained(), Client(url, key) as client:
        made = client.call("POST", "/v1/alert-silences", json=body)
    out.print(f"{made['id']} until {made['until'][:19]}", soft_wrap=True)


@alerts.command("test")
def send_test(key: Key, url: Url = URL) -> None:
    """Have a worker send a test to the webhook, and say whether it was taken."""
    with explained(), Client(url, key) as client:
        sent = client.call("POST", "/v1/alert-notifications/test")
        deadline = time.monotonic() + TEST_SECONDS
        while time.monotonic() < deadline:
            found = client.call("GET", "/v1/alert-notifications", params={"limit": 200})["data"]
            (sent,) = [each for each in found if each["id"] == sent["id"]] or [sent]
            if sent["state"] != "waiting" or sent["problem"]:
                break
            time.sleep(0.5)
    if sent["state"] == "delivered":
        out.print(f"{sent['id']} was taken")
        return
    why = sent["problem"] or "no worker with a webhook has tried: is HALLMARK_ALERTS_WEBHOOK_URL set for it?"
    err.print(f"[red]not taken:[/] {escape(why)}")
    raise typer.Exit(1)


@alerts.command("secret")
def secret() -> None:
    """Make a secret to sign with, for HALLMARK_ALERTS_WEBHOOK_SECRET and for the receiver."""
    out.print("whsec_" + b64encode(token_bytes(32)).decode(), soft_wrap=True)


@alerts.command("prometheus")
def prometheus(
    file: Annotated[
        Path | None, typer.Argument(help="A file with [[alerts]]; by default the usual rules.", exists=True)
    ] = None,
) -> None:
    """Print the rules as a file for Prometheus' `rule_files`."""
    from app.alerts import BadRules, read_rules, rule_file

    with explained():
        try:
            text = rule_file(read_rules(_read(file))) if file else rule_file()
        except BadRules as error:
            raise InvalidRequest(str(error)) from None
    out.out(text, end="")


@alerts.command("alertmanager")
def alertmanager() -> None:
    """Print an example for an Alertmanager that gets Prometheus' alerts."""
    from app.alerts import alertmanager_example

    out.out(alertmanager_example(), end="")


def _read(file: Path) -> list[dict[str, Any]]:
    """The tables [[alerts]] of a TOML file: one of rules alone, or a release's; raises InvalidRequest."""
    from app.releases import Release

    try:
        given = loads(file.read_text(encoding="utf-8"))
    except (TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file}: {error}") from None
    rules = given.pop("alerts", None)
    # A misspelled name must not set no rules at all: nobody would be told of anything.
    if unknown := given.keys() - set(Release.__struct_fields__):
        raise InvalidRequest(f"{file}: {min(unknown)!r} is unknown; write each rule as a table [[alerts]].")
    if not isinstance(rules, list) or not all(isinstance(each, dict) for each in rules):
        raise InvalidRequest(f"{file}: write each rule as a table [[alerts]]; `alerts = []` is no rules.")
    return rules


def _condition(rule: dict[str, Any]) -> str:
    """In a few words when a rule fires."""
    window = f"of {rule['window_seconds']:g} s"
    if rule["kind"] == "threshold":
        what = f"{rule['figure']} {rule['class'] or ''}".strip()
        side = f"above {rule['above']:g}" if rule["above"] is not None else f"below {rule['below']:g}"
        return f"{what} {window} is {side}, its whole interval, n >= {rule['min_n']}"
    if rule["kind"] == "absence":
        return f"no {rule['figure'] or rule['missing']} in {rule['window_seconds']:g} s"
    if rule["kind"] == "burn_rate":
        pairs = ", ".join(f"{each['factor']:g} in {each['long_seconds']:g} s" for each in rule["windows"])
        return f"{rule['share']} burns {1 - rule['objective']:.3g} faster than {pairs}"
    return f"{' or '.join(rule['shifts'])} changed"
