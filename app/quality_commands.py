"""`hallmark quality`: how good each release's answers are, as tables, by the public API."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape

from app.client import Client
from app.terminal import Key, Url, explained, out, show_table

FIGURES = ("figure", "class", "value", "95 % interval", "n", "eff. n", "method")
URL = "http://127.0.0.1:8080"


def quality(
    key: Key,
    url: Url = URL,
    release: Annotated[str | None, typer.Option(help="Only this release, as `name@3`, or all of a name.")] = None,
    since: Annotated[str | None, typer.Option(help="Answers made then or later; by default the last 7 days.")] = None,
    until: Annotated[str | None, typer.Option(help="Answers made before then; by default now.")] = None,
    assignment: Annotated[str | None, typer.Option(help="stable, canary, pinned, shadow or chore.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False,
) -> None:
    """Show how good each release's answers are, with the interval of each figure and what it rests on."""
    given = {"release": release, "since": since, "until": until, "assignment": assignment}
    with explained(), Client(url, key) as client:
        report = client.call(
            "GET", "/v1/quality", params={name: value for name, value in given.items() if value is not None}
        )
    if as_json:
        out.print_json(data=report)
        return
    if not report["data"]:
        out.print(f"no answers from {report['since'][:19]} to {report['until'][:19]}")
    for each in report["data"]:
        title = f"{escape(each['release'])}: {each['answers']} answers"
        show_table(FIGURES, list(_rows(each)), folds=["class", "method"], title=title)
        out.print(_labels(each), soft_wrap=True)


def _rows(quality: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for each in quality["figures"]:
        if each["n"] or each["doubts"]:
            value, low, high = (_shown(each[name], each["unit"]) for name in ("value", "low", "high"))
            sizes = (str(each["n"]), f"{each['effective_n']:.0f}")
            facts = (each["figure"], escape(each["class"] or ""), value, f"{low} to {high}")
            doubts = f", in doubt: {', '.join(each['doubts'])}" if each["doubts"] else ""
            yield (*facts, *sizes, each["method"] + doubts)


def _labels(quality: dict[str, Any]) -> str:
    if not quality["labelled"]:
        return "no labels"
    labels = f"{quality['labelled']} labelled answers"
    if not quality["sampled"]:
        return f"{labels}, chosen nobody knows how: their figures speak for them alone"
    left_out = quality["labels_left_out"]
    return f"{labels}, weighed by how likely each was to be labelled" + (
        f"; {left_out} of unknown probability left out" if left_out else ""
    )


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "?"
    if unit == "share":
        return f"{value * 100:.1f} %"
    return f"{value:.0f}" if unit == "tokens" else f"{value:.2f} s" if value < 1_000 else f"{value:.0f} s"
