"""`hallmark retrain`: from labels to a canary in one command, for a person, a cron table or a Kubernetes CronJob."""

import shlex
import sys
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from app import publishing
from app.client import Client
from app.dataset_commands import recipe_of
from app.publishing import NeedsRestart
from app.release_commands import NEEDS_RESTART, Guards, SlowSeconds, part_of, plan_of
from app.retrain_files import Plan, alone, begin, load, runs
from app.retraining import Retraining, Trainer, Verdict, default_recipe, reasons_to_start
from app.terminal import Key, Url, err, explained, out

URL = "http://127.0.0.1:8080"
REFUSED = 4
"""The exit code of a run whose evaluation did not show that its adapter is good enough."""

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="`hallmark-train`'s settings, in TOML.", exists=True, dir_okay=False)
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="How the dataset is built; by default what was asked by this name.", exists=True)
]
Margin = Annotated[str, typer.Option(help="How much worse is still good enough: 5% or 0.05 of the score.")]


def retrain(
    name: Annotated[str, typer.Option("--release", help="The public name whose stable release is retrained.")],
    canary: Annotated[str, typer.Option(help="Its share of the conversations, once it has passed: 10% or 0.1.")],
    key: Key,
    url: Url = URL,
    config: ConfigFile = None,
    recipe: RecipeFile = None,
    dataset: Annotated[str | None, typer.Option(help="What the dataset is called; by default as the release.")] = None,
    build: Annotated[bool, typer.Option(help="Build the dataset's next version, or take its newest.")] = True,
    base: Annotated[str | None, typer.Option(help="The base model to train on: a folder, or an id on a hub.")] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="The evaluation set, NAME[@VERSION]; by default what the dataset holds out.")
    ] = None,
    margin: Margin = "5%",
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate by so many rows at most.")] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="The engine's folder of adapters, where this machine has it elsewhere.")
    ] = None,
    guard: Guards = None,
    slow_seconds: SlowSeconds = None,
    if_drifted: Annotated[bool, typer.Option("--if-drifted", help="Only if the stable release has drifted.")] = False,
    min_new_labels: Annotated[
        int | None, typer.Option(min=1, help="Only if so many labels came since the dataset's newest version.")
    ] = None,
    state: Annotated[Path, typer.Option(help="Where runs are kept, a folder for each name.")] = Path("retrain"),
    trainer: Annotated[str | None, typer.Option(help="The training program, with its first arguments.")] = None,
    anew: Annotated[
        bool, typer.Option(help="Give up a run that was cut off, and repeat one that changes nothing.")
    ] = False,
) -> None:
    """Build a dataset, train, publish, evaluate, and try on a share of the conversations what is not worse.

    Run it again after whatever stopped it: it goes on where it was. With `--if-drifted` or `--min-new-labels` it begins
    only if one of these holds. Exits with 0 when the canary has begun or there is nothing to do, 1 after a failure, 2
    for a wrong command, 3 when the engine must be started again with the adapter, 4 when the evaluation did not show
    that the adapter is good enough.
    """
    share, worse = part_of(canary), part_of(margin)
    if not 0 < worse < 1:
        raise typer.BadParameter(f"--margin {margin}: it is a part of the score, such as 5%.")
    guards = plan_of(guard, slow_seconds)
    given = msgspec.to_builtins(recipe_of(recipe)) if recipe else None
    folder = state / name
    with explained(), alone(folder), Client(url, key) as client:
        under_way = [run for run in runs(folder) if load(run).outcome is None][-1:]
        rollout = client.call("GET", f"/v1/rollouts/{name}")
        stable = rollout["stable"]
        if not under_way and (if_drifted or min_new_labels):
            reasons = reasons_to_start(
                client, stable, dataset or name, if_drifted=if_drifted, min_new_labels=min_new_labels
            )
            if rollout["canary"]:
                out.print(f"Nothing to do: {rollout['canary']} is being tried already.")
                return
            if not reasons:
                out.print("Nothing to do: no drift alarm, and not enough new labels, as far as was asked.")
                return
            err.print(escape("; ".join(reasons)))
        if not under_way:
            publishing.stable_release(client, name, for_canary=True)
        if build and given is None:
            given = default_recipe(client.call("GET", f"/v1/releases/{stable}"))
        plan = Plan(
            name=name,
            dataset=dataset or name,
            recipe=given if build else None,
            config=sha256(config.read_bytes()).hexdigest() if config else None,
            base=base,
            evaluation=evaluation,
            margin=worse,
            limit=limit,
        )
        run = begin(folder, plan, give_up=anew)
        err.print(f"{'going on with' if [run] == under_way else 'beginning'} {escape(str(run))}")
        program = shlex.split(trainer) if trainer else [_trainer()]
        work = Retraining(client, Trainer(program, key), run, config, adapters, lambda told: err.print(escape(told)))
        _run(work, share, guards, earlier=[] if anew else runs(folder)[:-1])


def _run(work: Retraining, share: float, guards: dict[str, Any] | None, *, earlier: list[Path]) -> None:
    """Take all steps that are left, and tell what came of them."""
    same = work.bring_dataset(earlier=[load(run) for run in earlier])
    if same is not None:
        work.give_up(f"nothing is new since a run with the same rows: {same.outcome}")
        out.print(
            f"Nothing to do: the rows are those of an earlier run, which ended with {same.outcome}: {same.reason}"
        )
        return
    work.train()
    while True:
        try:
            drafted = work.draft()
        except NeedsRestart as error:
            err.print(escape(str(error)))
            if not (sys.stdin.isatty() and typer.confirm("Is it started with them?", err=True)):
                err.print("Run this again when it is: it goes on here.")
                raise typer.Exit(NEEDS_RESTART) from None
        else:
            break
    if not drafted:
        out.print("Nothing is left to do: this run's release was promoted by hand, and is the stable one.")
        return
    verdict = work.evaluate()
    _show(verdict)
    rollout = work.finish(verdict, share, guards)
    if rollout is None:
        err.print(f"[yellow]no canary:[/] {escape(verdict.reason)}")
        raise typer.Exit(REFUSED)
    out.print(escape(verdict.reason))
    out.print(f"{rollout['name']}: canary {rollout['canary']} {rollout['share']:.4g} (revision {rollout['revision']})")


def _show(verdict: Verdict) -> None:
    """The figures of both arms, side by side."""
    arms = verdict.evaluation.arms
    table = Table("", *(escape(f"{arm.name} {' '.join(arm.releases)}") for arm in arms))
    for figure in arms[0].figures:
        cells = [arm.figures.get(figure) for arm in arms]
        told = [
            "-" if each is None or each.value is None else f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"
            for each in cells
        ]
        table.add_row(figure, *map(escape, told))
    table.add_row("failures", *(str(sum(arm.failures.values())) for arm in arms))
    table.add_row("seconds, median", *(f"{arm.seconds.get('p50', 0):.3f}" for arm in arms))
    out.print(table)


def _trainer() -> str:
    """The program beside this one, else whichever the path has."""
    beside = Path(sys.executable).with_name("hallmark-train")
    return str(beside) if beside.exists() else "hallmark-train"
