"""`hallmark releases ...` and `hallmark rollouts ...`: what is made, and what of it answers, by the public API."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from app import publishing
from app.client import Client
from app.terminal import Key, Url, err, explained, out, show_table

if TYPE_CHECKING:
    from app.guards import State

releases = typer.Typer(help="Releases: create, list, show, compare, delete.", no_args_is_help=True)
rollouts = typer.Typer(help="Rollouts: which release of a name answers whom.", no_args_is_help=True)

URL = "http://127.0.0.1:8080"
NEEDS_RESTART = 3
"""The exit code of what goes on once the engine was started with other arguments."""

Name = Annotated[str, typer.Argument(help="The public name, as clients send it in `model`.")]
Label = Annotated[str, typer.Argument(help="A release, as `name@3`.")]
Why = Annotated[str, typer.Option(help="The reason, for the audit.")]
Guards = Annotated[
    list[str] | None,
    typer.Option(
        "--guard", help="What it must not worsen, as `failed` or `failed=0.01` with a tolerance; repeat for several."
    ),
]
SlowSeconds = Annotated[float | None, typer.Option(min=0, help="An answer that took longer is slow.")]
Revision = Annotated[int | None, typer.Option(help="Do nothing if the rollout is not at this revision any more.")]


@releases.command("create")
def create(
    file: Annotated[Path, typer.Argument(help="The release, in TOML or JSON.", exists=True, dir_okay=False)],
    key: Key,
    url: Url = URL,
) -> None:
    """Create a release from a file and have it vetted; exits with 1 if it cannot serve yet."""
    kind = "application/json" if file.suffix.lower() == ".json" else "application/toml"
    with explained(), Client(url, key) as client:
        made = client.call("POST", "/v1/releases", content=file.read_bytes(), headers={"content-type": kind})
    out.print(f"{made['id']} digest {made['digest'][:12]}", soft_wrap=True)
    for problem in made["problems"]:
        err.print(f"[yellow]cannot serve yet:[/] {escape(problem)}")
    if made["problems"]:
        raise typer.Exit(1)


@releases.command("publish")
def publish(
    folder: Annotated[Path, typer.Argument(help="What `hallmark-train` wrote.", exists=True, file_okay=False)],
    name: Annotated[str, typer.Option(help="The public name whose stable release gets the adapter.")],
    key: Key,
    url: Url = URL,
    canary: Annotated[str | None, typer.Option(help="Try it on this share of the conversations: 10% or 0.1.")] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="The engine's folder of adapters, where this machine has it elsewhere.")
    ] = None,
    dataset: Annotated[Path | None, typer.Option(help="The dataset's export, if it is not registered yet.")] = None,
    guard: Guards = None,
    slow_seconds: SlowSeconds = None,
    why: Why = "",
) -> None:
    """Verify an adapter, put it in place, and make a release of it; exits with 3 if the engine must be started again.

    The adapter's folder is copied on this machine's file system; all the rest goes by the API.
    """
    share = part_of(canary) if canary else None
    with explained(), Client(url, key) as client:
        adapter = publishing.read_adapter(folder)
        stable = publishing.stable_release(client, name, for_canary=share is not None)
        try:
            made = publishing.publish(client, adapter, stable, adapters=adapters, dataset=dataset, tell=err.print)
        except publishing.NeedsRestart as error:
            err.print(escape(str(error)))
            raise typer.Exit(NEEDS_RESTART) from None
        out.print(f"{made['id']} digest {made['digest'][:12]}", soft_wrap=True)
        if share is not None:
            reason = why or f"adapter {adapter.manifest.adapter_digest}"
            plan = plan_of(guard, slow_seconds)
            _print(publishing.start_canary(client, made["id"], share, why=reason, plan=plan))


@releases.command("list")
def show_all(
    key: Key, url: Url = URL, name: Annotated[str | None, typer.Option(help="Only this name.")] = None
) -> None:
    """List the releases."""
    label = Column("release", no_wrap=True)  # What is cut off cannot be asked for.
    table = Table(label, "digest", "adapter", "prompt", "made", "serves", "notes")
    with explained(), Client(url, key) as client:
        after: str | None = None
        while True:
            given = {"limit": 200, "name": name, "after": after}
            page = client.call("GET", "/v1/releases", params={key: value for key, value in given.items() if value})
            for each in page["data"]:
                content = each["content"]
                facts = (content["adapter"] or "-", content["prompt"]["version"], each["created_at"][:10])
                may = "yes" if each["approved"] else "no"
                table.add_row(each["id"], each["digest"][:12], *map(escape, facts), may, escape(content["notes"][:60]))
            if (after := page["next"]) is None:
                break
    out.print(table)


@releases.command("show")
def show(release: Label, key: Key, url: Url = URL) -> None:
    """Show a release with all that it is made of, as JSON."""
    with explained(), Client(url, key) as client:
        out.print_json(data=client.call("GET", f"/v1/releases/{release}"))


@releases.command("diff")
def diff(a: Label, b: Label, key: Key, url: Url = URL) -> None:
    """Show the fields in which two releases differ."""
    with explained(), Client(url, key) as client:
        found = client.call("GET", "/v1/releases/diff", params={"a": a, "b": b})["differences"]
    if not found:
        out.print("They are the same.")
    for each in found:
        out.print(f"[bold]{escape(each['field'])}[/]")
        for sign, colour, value in (("-", "red", each["a"]), ("+", "green", each["b"])):
            for line in str(value).splitlines() or [""]:
                out.print(f"[{colour}]{sign} {escape(line)}[/]", soft_wrap=True)


@releases.command("delete")
def delete(release: Label, key: Key, url: Url = URL) -> None:
    """Take a release away; one that serves is refused."""
    with explained(), Client(url, key) as client:
        client.call("DELETE", f"/v1/releases/{release}")
    out.print(f"{release} is deleted")


@rollouts.command("show")
def show_rollouts(
    key: Key,
    url: Url = URL,
    name: Annotated[str | None, typer.Argument(help="With its changes; by default all names without them.")] = None,
) -> None:
    """Show who answers for each name, or for one with the changes that led there."""
    with explained(), Client(url, key) as client:
        if name is None:
            for each in client.call("GET", "/v1/rollouts")["data"]:
                _print(each)
            return
        _print(client.call("GET", f"/v1/rollouts/{name}"))
        table = Table("revision", "when", "what", "who", "why")
        for each in client.call("GET", f"/v1/rollouts/{name}/changes")["data"]:
            facts = (each["at"][:19], each["action"], each["who"], each["why"])
            table.add_row(str(each["revision"]), *map(escape, facts))
    out.print(table)


@rollouts.command("canary")
def canary(
    name: Name,
    share: Annotated[str, typer.Argument(help="Its part of the conversations: 10% or 0.1.")],
    key: Key,
    release: Annotated[str | None, typer.Option(help="`name@3`; by default the canary there is.")] = None,
    guard: Guards = None,
    slow_seconds: SlowSeconds = None,
    url: Url = URL,
    why: Why = "",
    revision: Revision = None,
) -> None:
    """Try a release on a share of the conversations, or change the share; guards take it back if it is worse."""
    plan = plan_of(guard, slow_seconds)
    step = {"release": release, "share": part_of(share), "plan": plan, "why": why, "revision": revision}
    _change(url, key, name, "canary", **step)


@rollouts.command("trial")
def trial(name: Name, key: Key, url: Url = URL) -> None:
    """Show what the guards of a canary know, or what they decided of the last one."""
    with explained(), Client(url, key) as client:
        found = client.call("GET", f"/v1/rollouts/{name}/trial")
    sides = f"{found['canary']} beside {found['stable']}"
    out.print(f"{sides}: {found['status']}, {found['observations']} observations", soft_wrap=True)
    figures = ("canary", "bad", "stable", "bad", "e-value", "rolls\nback\nat")
    rows = []
    for each in found["evidence"]:
        arms = [
            text
            for arm in ("canary", "stable")
            for text in (str(each[f"{arm}_sessions"]), _percent(each[f"{arm}_bad"]))
        ]
        judged = (f"{each['e_value']:.4g}", f"{each['threshold']:.4g}", each["verdict"])
        safe = (f"{each['safety_e_value']:.4g}", f"{each['safety_threshold']:.4g}")
        rows.append((each["guard"], *arms, *judged, *safe))
    show_table(("guard", *figures, "verdict", "safe", "promotes\nat"), rows, folds=["verdict"])
    if found["may_promote"]:
        out.print("All guards have shown that it is not worse by their margins: it may be promoted.")
    if found["alarm"]:
        err.print(f"[yellow]alarm:[/] {escape(found['alarm'])}")
    if found["decision"]:
        out.print(f"rolled back: {escape(found['decision']['why'])}", soft_wrap=True)


@rollouts.command("replay")
def replay_trial(name: Name, key: Key, url: Url = URL) -> None:
    """Judge a trial again from what its guards heard; exits with 1 if anything else follows than did then."""
    from app.guards import replay  # What it imports takes a while, and no other command needs it.
    from app.trial_plans import trial_plan

    with explained(), Client(url, key) as client:
        found = client.call("GET", f"/v1/rollouts/{name}/trial")
        heard = list(_heard(client, name, found["observations"]))
    state, decision, used = replay(trial_plan(**found["plan"]), ((each["arm"], each["badness"]) for each in heard))
    then = found["decision"] or {}
    if decision is not None:
        for n, e_value in decision.path:
            out.print(f"{n:>8} canary sessions  e-value {e_value:.6g}")
    said = then if then.get("observation") else {}
    again = (decision.guard, decision.observation, decision.e_value) if decision else (None, None, None)
    same = again == (said.get("guard"), said.get("observation"), said.get("e_value"))
    same &= used == found["observations"] and all(_is_known(state, each) for each in found["evidence"])
    out.print(f"{used} observations replayed: {escape(decision.why) if decision else 'no decision'}", soft_wrap=True)
    if then and not said:
        out.print(f"decided without observations: {escape(then['why'])}", soft_wrap=True)
    out.print("the same, to the last bit" if same else "[red]not the same as then[/]")
    if not same:
        raise typer.Exit(1)


@rollouts.command("shadow")
def shadow(
    name: Name,
    rate: Annotated[str, typer.Argument(help="The part of the requests: 10% or 0.1; 0 ends it.")],
    key: Key,
    release: Annotated[str | None, typer.Option(help="`name@3`; by default the shadow there is.")] = None,
    url: Url = URL,
    why: Why = "",
    revision: Revision = None,
) -> None:
    """Let a release answer a part of the requests unseen."""
    _change(url, key, name, "shadow", release=release, rate=part_of(rate), why=why, revision=revision)


@rollouts.command("promote")
def promote(
    name: Name,
    key: Key,
    release: Annotated[str | None, typer.Option(help="`name@3`; by default the canary.")] = None,
    url: Url = URL,
    why: Why = "",
    revision: Revision = None,
) -> None:
    """Make the canary stable, or another release."""
    _change(url, key, name, "promote", release=release, why=why, revision=revision)


@rollouts.command("rollback")
def rollback(name: Name, key: Key, url: Url = URL, why: Why = "", revision: Revision = None) -> None:
    """End the trial of the canary; without one, go back to what was stable before."""
    _change(url, key, name, "rollback", why=why, revision=revision)


@rollouts.command("pause")
def pause(name: Name, key: Key, url: Url = URL, why: Why = "", revision: Revision = None) -> None:
    """Send everything to the stable release, and remember canary and shadow."""
    _change(url, key, name, "pause", why=why, revision=revision)


@rollouts.command("resume")
def resume(name: Name, key: Key, url: Url = URL, why: Why = "", revision: Revision = None) -> None:
    """Go on where the rollout was paused."""
    _change(url, key, name, "resume", why=why, revision=revision)


def _change(url: str, key: str, name: str, step: str, **given: Any) -> None:
    body = {field: value for field, value in given.items() if value is not None}
    with explained(), Client(url, key) as client:
        _print(client.call("POST", f"/v1/rollouts/{name}/{step}", json=body))


def _heard(client: Client, name: str, count: int) -> Iterator[dict[str, Any]]:
    """The first so many observations of a trial, page by page: there may be more by now."""
    after: int | None = 0
    while after is not None and after < count:
        page = client.call("GET", f"/v1/rollouts/{name}/trial/observations", params={"after": after})
        yield from (each for each in page["data"] if each["number"] <= count)
        after = page["next"]


def _is_known(state: "State", shown: dict[str, Any]) -> bool:
    """Whether a replay knows of a guard exactly what is shown."""
    evidence = state.trial.evidence[shown["guard"]]
    arms = {"canary": evidence.canary, "stable": evidence.stable}
    counts = all(
        (tally.n, tally.mean if tally.n else None) == (shown[f"{arm}_sessions"], shown[f"{arm}_bad"])
        for arm, tally in arms.items()
    )
    e_values = (evidence.harm_e_value, evidence.safety_e_value)
    return counts and e_values == (shown["e_value"], shown["safety_e_value"])


def plan_of(guards: list[str] | None, slow_seconds: float | None) -> dict[str, Any] | None:
    """What a canary is watched for, as far as it was said."""
    plan = {"guards": [_guard(text) for text in guards] if guards else None, "slow_seconds": slow_seconds}
    return {field: value for field, value in plan.items() if value is not None} or None


def _guard(text: str) -> dict[str, Any]:
    """Read `failed` or `failed=0.01`."""
    name, equals, tolerance = text.partition("=")
    return {"name": name, **({"tolerance": part_of(tolerance)} if equals else {})}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _print(rollout: dict[str, Any]) -> None:
    parts = [f"stable {rollout['stable']}"]
    if rollout["canary"]:
        parts.append(f"canary {rollout['canary']} {rollout['share']:.4g}")
    if rollout["shadow"]:
        parts.append(f"shadow {rollout['shadow']} {rollout['shadow_rate']:.4g}")
    if rollout["paused"]:
        parts.append("paused")
    out.print(f"{rollout['name']}: {', '.join(parts)} (revision {rollout['revision']})", soft_wrap=True)


def part_of(text: str) -> float:
    """Read `10%` or `0.1`; a part of more than all is a mistake."""
    try:
        part = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise typer.BadParameter(f"{text!r} is no share: write it as 10% or 0.1.")
    return part
