"""`hallmark loadtest`: replay a trace, or sweep a setting, and show the frontier as table, JSON and picture."""

import asyncio
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from app.errors import InvalidRequest, ServiceError
from app.loadtest import (
    Failure,
    Load,
    Objective,
    Point,
    Target,
    check_drawing,
    check_host,
    check_positive,
    draw_frontier,
    drive,
    knee,
    recommended,
    started,
    written,
)
from app.terminal import err, explained, out, whole

_BUSY = 0.7
"""The share of one processor above which the driver is taken to be part of what it measures."""

Tokens = Annotated[int, typer.Option(min=1, help="For --rate and --concurrency; a trace brings its own.")]
Count = Annotated[int | None, typer.Option(min=1, help="Stop after so many; 50 for each caller of --concurrency.")]


def loadtest(
    url: Annotated[str, typer.Option(help="The endpoint, with its /v1.")] = "http://127.0.0.1:8080/v1",
    model: Annotated[str, typer.Option(help="What the requests ask for.")] = "hallmark",
    key: Annotated[str | None, typer.Option(envvar="HALLMARK_API_KEY", help="Sent as a bearer token.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Replay this: Azure's CSV or Mooncake's JSONL.", exists=True, dir_okay=False)
    ] = None,
    speed: Annotated[float, typer.Option(help="How many times as fast the trace is replayed.")] = 1.0,
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second; repeat to sweep.")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Callers that wait for their answer; repeat to sweep.")
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="Start this for each --value, put where it says {value}; the load stays.")
    ] = None,
    value: Annotated[list[float] | None, typer.Option(help="A value of the setting in --command; repeat.")] = None,
    setting: Annotated[str, typer.Option(help="What --command sets, for the table.")] = "setting",
    ready_url: Annotated[str | None, typer.Option(help="Answers 200 when the command is ready; URL/models.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each --rate is kept up.")] = 30.0,
    requests: Count = None,
    prompt_tokens: Tokens = 256,
    output_tokens: Tokens = 64,
    ttft_seconds: Annotated[float, typer.Option(help="A good answer starts within this.")] = 1.0,
    tpot_seconds: Annotated[float, typer.Option(help="And takes no longer for each further token.")] = 0.1,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="How many must be good.")] = 0.95,
    in_flight: Annotated[int, typer.Option(min=1, help="No more requests are out at once.")] = 1000,
    timeout_seconds: Annotated[float, typer.Option(min=0.1, help="An answer that takes longer has failed.")] = 120.0,
    extra: Annotated[str, typer.Option(help="Further fields of the body, as a JSON object.")] = "{}",
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Draw the frontier here.", dir_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="The target is another machine's.")] = False,
) -> None:
    """Send requests when they are due, time them from then, and say which value of a setting to take.

    Exits with 1 where no value meets the objective.
    """
    with explained():
        for address in (url, ready_url or url):
            check_host(address, allow_remote=allow_remote)
        target = Target(url, model, key, timeout_seconds, _object(extra))
        limits = {"ttft-seconds": ttft_seconds, "tpot-seconds": tpot_seconds, "timeout-seconds": timeout_seconds}
        for name, given in limits.items():
            check_positive(name, given)
        objective = Objective(ttft_seconds, tpot_seconds, share)
        rates, callers = tuple(rate or ()), tuple(concurrency or ())
        load = Load(trace, speed, rates, callers, seconds, requests, prompt_tokens, output_tokens, in_flight, seed)
        load.check()
        server = _server(load, command, value, setting, ready_url or f"{url.rstrip('/')}/models")
        if png is not None:
            check_drawing()
        with whole(png) if png is not None else nullcontext() as file:
            points, failures = asyncio.run(_sweep(target, load, objective, server))
            name, best = server.setting if server else load.swept[0], recommended(points)
            _show(points, failures, name, objective, best, as_json=as_json)  # First of all: it was dear.
            if file is not None:
                draw_frontier(file, points, name, objective, best)
    if best is None:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Server:
    """The server that is started anew for each value of a setting of its own."""

    command: str
    setting: str
    values: list[float]
    ready_url: str


def _server(
    load: Load, command: str | None, values: list[float] | None, setting: str, ready_url: str
) -> _Server | None:
    if (command is None) != (not values):
        missing = "value" if command is not None else "command"
        raise InvalidRequest(f"`--{missing}`: --command and --value go together.", param=missing)
    if command is None or not values:
        return None
    way, given = load.swept
    if len(given) > 1:
        raise InvalidRequest(
            f"`--{way}`: with --command give one: the load stays while the setting changes.", param=way
        )
    return _Server(command, setting, values, ready_url)


async def _sweep(
    target: Target, load: Load, objective: Objective, server: _Server | None
) -> tuple[list[Point], list[Failure]]:
    """Run the load once for each value; one that its server does not take leaves the others measured.

    Raises:
        ServiceError: no value could be measured; the first one's.
    """
    name, values = (server.setting, server.values) if server else load.swept
    points, failures, first = [], [], None
    for value in values:
        err.print(f"{name} {written(value)} ...")
        sent = value if server is None else load.swept[1][0]
        start = started(server.command, written(value), server.ready_url) if server else nullcontext()
        try:
            async with start:
                measures = await drive(
                    target,
                    load.arrivals(sent),
                    objective,
                    in_flight=load.places(sent),
                    paced=load.is_paced,
                    seed=load.seed,
                )
        except ServiceError as error:
            first = first or error
            failures.append(Failure(value, error.message))
        else:
            points.append(Point(value, measures.described()))
    if first is not None and not points:
        raise first
    return points, failures


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"`--extra`: is not JSON: {error}.", param="extra") from None
    if not isinstance(found, dict):
        raise InvalidRequest("`--extra`: is not a JSON object.", param="extra")
    return found


def _show(
    points: list[Point], failures: list[Failure], name: str, objective: Objective, best: Point | None, *, as_json: bool
) -> None:
    bend = knee(points)
    if as_json:
        out.print_json(
            data={
                "setting": name,
                "objective": vars(objective),
                "points": [{"value": point.value, **point.figures} for point in points],
                "failed": [vars(failure) for failure in failures],
                "recommended": best and best.value,
                "knee": bend and bend.value,
            }
        )
        return
    _show_points(points, name, best)
    for failure in failures:
        said = escape(failure.error)
        out.print(f"[red]not measured[/] at {name} {written(failure.value)}: {said}", soft_wrap=True)
    wanted = f"ttft <= {objective.ttft_seconds:g} s and tpot <= {objective.tpot_seconds:g} s"
    out.print(f"good: {wanted}; wanted of {objective.share * 100:g} % of all requests", soft_wrap=True)
    if bend is not None:
        out.print(f"knee: {name} {written(bend.value)}")
    out.print(f"recommended: {name} {written(best.value)}" if best else "[red]no value meets the objective[/]")


def _show_points(points: list[Point], name: str, best: Point | None) -> None:
    """A line of the table for each, and what makes its figures doubtful."""
    headers = (name, "ok/s", "good/s", "good", "ttft p50", "p95", "tpot p50", "p95", "late")
    table = Table(
        *(Column(header, justify="right", no_wrap=True) for header in headers), box=None, padding=(0, 1), pad_edge=False
    )
    for point in points:
        figures = point.figures
        times = [figures[kind][at] for kind in ("ttft_seconds", "tpot_seconds") for at in ("p50", "p95")]
        table.add_row(
            written(point.value),
            f"{figures['requests_per_second']:.2f}",
            f"{figures['goodput_per_second']:.2f}",
            f"{figures['good_share'] * 100:.1f} %",
            *(_time(each) for each in (*times, figures["late_seconds"]["p99"])),
            style="bold" if point is best else None,
        )
    out.print(table)
    for point in points:
        failed = {outcome: count for outcome, count in point.figures["outcomes"].items() if outcome != "ok"}
        if point.figures["driver_busy_share"] > _BUSY:
            busy = f"{point.figures['driver_busy_share'] * 100:.0f} %"
            out.print(
                f"[yellow]warning:[/] at {name} {written(point.value)} this driver was busy for {busy} of the time: "
                "times are partly its own. Send less, or from several machines.",
                soft_wrap=True,
            )
        if failed:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in failed.items())
            out.print(f"[red]not answered[/] at {name} {written(point.value)}: {counts}", soft_wrap=True)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1.0 else f"{seconds:.2f} s"
