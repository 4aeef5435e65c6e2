"""The command line: `hallmark-train train | evaluate | probe | compare | example | register`.

Exit codes: 0 done, 1 the work failed, 2 the command, a setting or a file it names is wrong.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.config import load_config
from finetune.errors import TrainingError, Unreachable
from finetune.evaluations import Arm, address, load_evaluation

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

app = typer.Typer(
    name="hallmark-train",
    help="LoRA training, and the evidence to ship what comes of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

File = Annotated[Path | None, typer.Argument(help="A TOML file with the settings; options go on top.", exists=True)]
Key = Annotated[str | None, typer.Option(envvar="HALLMARK_API_KEY", help="The API key of the server that is asked.")]


def main() -> None:
    """Run the command line."""
    app()


@contextmanager
def _explained() -> Iterator[None]:
    """Tell a person what was wrong, without a trace."""
    try:
        yield
    except TrainingError as error:
        err.print(f"[red]{escape(str(error))}[/]")
        raise typer.Exit(1 if isinstance(error, Unreachable) else 2) from None


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        yield progress


@app.command()
def train(
    file: File = None,
    dataset: Annotated[Path | None, typer.Option(help="Folder of an exported dataset.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a folder, or an id on a hub.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the adapter.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting as NAME=VALUE; repeat.")] = None,
) -> None:
    """Train an adapter, or go on with a run that was cut off, and write its manifest beside it."""
    from finetune.train import train as run

    with _explained():
        given = _pairs(settings)
        options = {"dataset": dataset, "base": base, "output": output}
        for name, value in options.items():
            if value is not None and name in given:
                raise typer.BadParameter(f"--set {name}: --{name} is given, too; give one of them")
        config = load_config(file, options | given)
        with _progress() as progress:
            task = progress.add_task("loading", total=None)

            def watch(told: dict[str, float]) -> None:
                said = [
                    f"{label} {told[name]:.3f}"
                    for name, label in (("loss", "loss"), ("heldout_loss", "held out"))
                    if name in told
                ]
                progress.update(
                    task, completed=told["step"], total=told["last_step"], description=", ".join(said) or "training"
                )
                if "heldout_loss" in told:
                    progress.console.print(f"step {told['step']:.0f} of {told['last_step']:.0f}: {', '.join(said)}")

            manifest = run(config, watch)
    if not manifest:
        return  # One of several processes: the first one tells.
    metrics = manifest["metrics"]
    out.print(f"adapter {manifest['adapter_digest']} in {escape(str(config.output))}, run {manifest['run']}")
    out.print(f"{metrics['steps']} steps, kept step {metrics['kept_step']}, held-out loss {metrics['heldout_loss']}")
    for reason in manifest["why_bytes_may_differ"]:
        out.print(f"the same run may give other bytes: {escape(reason)}")


@app.command()
def evaluate(
    file: File = None,
    dataset: Annotated[Path | None, typer.Option(help="Folder of an exported dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Which of its splits to ask.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL[,SETTING=VALUE...], e.g. tuned=tickets,retrieval=off; repeat.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="OpenAI's API, of the gateway or an engine, for these arms.")] = None,
    limit: Annotated[int | None, typer.Option(help="Ask so many rows only.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="So many at a time.")] = None,
    key: Key = None,
) -> None:
    """Ask arms the rows of a split and say what each was worth, with intervals, and what it took."""
    from finetune.evaluate import evaluate as run
    from finetune.report import evaluation_markdown

    with _explained():
        arms = tuple(_arm(each, url) for each in arm or ()) or None
        given = {"dataset": dataset, "split": split, "output": output, "arms": arms, "limit": limit,
                 "concurrency": concurrency, "url": url}  # fmt: skip
        config = load_evaluation(file, given)
        with _progress() as progress:
            found = run(config, key=key, tell=_teller(progress))
    out.print(evaluation_markdown(found), markup=False, highlight=False)


@app.command()
def probe(
    dataset: Annotated[Path, typer.Option(help="Folder of an exported dataset of classes.")],
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    split: Annotated[str, typer.Option(help="Which of its splits to ask.")] = "heldout",
    model: Annotated[str, typer.Option(help="What the server calls its embedding model.")] = "hallmark-embedding",
    url: Annotated[str, typer.Option(help="OpenAI's API, with /embeddings.")] = "http://127.0.0.1:8080/v1",
    name: Annotated[str, typer.Option(help="What to call this arm.")] = "linear probe",
    cost: Annotated[float | None, typer.Option(help="Of 1,000 answers, as the other arms have it.")] = None,
    limit: Annotated[int | None, typer.Option(help="Ask so many rows only.")] = None,
    key: Key = None,
) -> None:
    """Measure a linear model on sentence vectors as an arm: what a tuned classifier has to beat."""
    from finetune.probe import probe as run
    from finetune.report import evaluation_markdown

    with _explained():
        arm = {"name": name, "model": model, "url": url, "cost": cost}
        config = load_evaluation(
            None, {"dataset": dataset, "split": split, "output": output, "limit": limit, "arms": (arm,)}
        )
        with _progress() as progress:
            found = run(config, key=key, tell=_teller(progress))
    out.print(evaluation_markdown(found), markup=False, highlight=False)


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` or `probe` wrote, of the same rows.")],
    output: Annotated[Path, typer.Option(help="Folder for the recommendation.")],
    margin: Annotated[float, typer.Option(help="How much worse is still good enough: 0.05 is five points.")] = 0.05,
    reference: Annotated[
        str | None, typer.Option(help="The arm to hold others against; the dearest by default.")
    ] = None,
) -> None:
    """Recommend the cheapest arm that is surely not worse than the reference by the margin."""
    from finetune.compare import compare as run

    with _explained():
        run(results, output, margin=margin, reference=reference)
    out.print((output / "recommendation.md").read_text(encoding="utf-8"), markup=False, highlight=False)


@app.command()
def example(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    train: Annotated[int, typer.Option(min=6, help="Rows to train on.")] = 480,
    heldout: Annotated[int, typer.Option(min=6, help="Rows to hold out.")] = 240,
    seed: Annotated[int, typer.Option(help="Another seed, other rows.")] = 0,
) -> None:
    """Write a dataset to try training on: tickets to be routed to one of six teams."""
    from finetune.tickets import write_tickets

    out.print(write_tickets(folder, train=train, heldout=heldout, seed=seed))


@app.command()
def register(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished adapter.", exists=True)],
    key: Key = None,
    url: Annotated[str, typer.Option(help="The gateway's API.")] = "http://127.0.0.1:8080/v1",
) -> None:
    """Register a finished run with the service, so that lineage knows it."""
    import httpx

    from finetune.manifest import registration

    with _explained():
        try:
            address(url)
        except ValueError as error:
            raise typer.BadParameter(f"--url {error}") from error
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            answer = httpx.post(f"{url}/lineage/training-runs", json=registration(folder), headers=headers, timeout=30)
        except httpx.TransportError as error:
            raise Unreachable(f"{url} does not answer ({error}); is it running?") from error
        if answer.is_error:
            raise Unreachable(f"{url} refuses with {answer.status_code}: {answer.text[:400]}")
    out.print(f"registered: {answer.json().get('id')}")


def _pairs(written: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE; a value is JSON where it can be, else text."""
    found: dict[str, Any] = {}
    for pair in written or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {pair}: write NAME=VALUE")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def _arm(written: str, url: str | None) -> Arm:
    """Read NAME=MODEL[,SETTING=VALUE...]."""
    first, *rest = written.split(",")
    name, equals, model = first.partition("=")
    if not equals:
        raise typer.BadParameter(f"--arm {written}: write NAME=MODEL")
    given = ({"url": url} if url else {}) | _pairs(rest)
    try:
        return Arm(name=name, model=model, **given)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(f"--arm {written}: {error}") from error


def _teller(progress: Progress) -> Any:
    tasks: dict[str, Any] = {}

    def tell(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = progress.add_task(name, total=total)
        progress.update(tasks[name], completed=done)

    return tell
