"""The command line: `hallmark serve | worker | engine | demo | ingest | ask | openapi`, and groups for the rest.

Exit codes: 0 done, 1 the work failed (some of it, or the service refused), 2 the command or a setting is wrong.
"""

import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tomllib import TOMLDecodeError
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from app.alert_commands import alerts
from app.capacity_commands import capacity
from app.client import Client
from app.dataset_commands import datasets
from app.drift_commands import drift
from app.feature_commands import features
from app.index_commands import index
from app.ingest_commands import ingest, jobs
from app.loadtest_commands import loadtest
from app.prediction_commands import predictions
from app.privacy_commands import privacy
from app.quality_commands import quality
from app.release_commands import releases, rollouts
from app.retrain_commands import retrain
from app.review_commands import review
from app.settings import EmbeddedSettings, Settings, misread_variables, unknown_variables
from app.terminal import Key, Url, err, explained, out, show_sources

if TYPE_CHECKING:
    from app.access import ApiKey
    from app.alerts import Webhook
    from app.privacy_wiring import Privacy

app = typer.Typer(
    name="hallmark",
    help="One async API in front of your own text-generation engine: cited answers, stamped with their release.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="API keys: make, list, change, revoke.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(predictions, name="predictions")
app.add_typer(releases, name="releases")
app.add_typer(rollouts, name="rollouts")
app.add_typer(review, name="review")
app.add_typer(alerts, name="alerts")
app.add_typer(datasets, name="datasets")
app.add_typer(drift, name="drift")
app.add_typer(features, name="features")
app.add_typer(index, name="index")
app.add_typer(jobs, name="jobs")
app.add_typer(privacy, name="privacy")
app.command("ingest")(ingest)
app.command("quality")(quality)
app.command("capacity")(capacity)
app.command("loadtest")(loadtest)
app.command("retrain")(retrain)

KeyId = Annotated[str, typer.Argument(help="The key's id, as `keys list` shows it.")]
DataDir = Annotated[Path | None, typer.Option(help="The service's data directory.")]
PriorityOption = Annotated[
    str | None, typer.Option(help="Who goes first when not all can be answered: low, normal or high.")
]
RequestLimit = Annotated[int | None, typer.Option("--requests-per-minute", min=0, help="0 is no limit.")]
TokenLimit = Annotated[
    int | None, typer.Option("--tokens-per-minute", min=0, help="Of prompts and answers together; 0 is no limit.")
]
Model = Annotated[str, typer.Option(help="The release to ask, by name or as `name@3`.")]

_DAY_MILLISECONDS = 24 * 3600 * 1000


def main() -> None:
    """Run the command line."""
    app()


def load_settings(**given: Any) -> Settings:
    """Read the settings, with what the command line gives on top; a wrong one is told by name and exits with 2."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            said = problem["msg"].removeprefix("Value error, ")  # What is about several settings names them itself.
            name = ".".join(str(part) for part in problem["loc"]) + ": " if problem["loc"] else ""
            err.print(f"[red]setting[/] {escape(name + said)}")
    except (TOMLDecodeError, UnicodeDecodeError) as error:
        err.print(f"[red]hallmark.toml:[/] {escape(str(error))}")
    except ValueError as error:  # A variable that holds a list is no JSON.
        told = [
            f"setting[/] {escape(f'{name}: it is read as JSON, such as {of}')}" for name, of in misread_variables(error)
        ]
        for each in told or [f"settings:[/] {escape(str(error))}"]:
            err.print(f"[red]{each}")
    raise typer.Exit(2)


@app.command()
def serve(
    local_engine: Annotated[
        bool | None, typer.Option("--local-engine/--no-local-engine", help="Start and supervise the embedded engine.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
) -> None:
    """Serve the API."""
    settings = load_settings(host=host, port=port, data_dir=data_dir)
    if local_engine is not None:
        embedded = settings.embedded.model_copy(update={"enabled": local_engine})
        settings = settings.model_copy(update={"embedded": embedded})
    if not settings.engine.members and not settings.embedded.enabled:
        err.print("[red]no engine:[/] set HALLMARK_ENGINE_URL to a running one, or start with --local-engine.")
        raise typer.Exit(2)
    for name, meant in unknown_variables():
        hint = f"; did you mean {meant}?" if meant else ", and is ignored."
        err.print(f"[yellow]warning:[/] {escape(name)} is no setting{hint}")
    from app.serving import StartFailure, run

    try:
        run(settings)
    except StartFailure as error:
        err.print(f"[red]cannot start:[/] {escape(str(error))}")
        raise typer.Exit(1) from None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def engine(context: typer.Context) -> None:
    """Run the embedded engine by itself; `hallmark engine --help` lists its options, which go before the settings."""
    command = [sys.executable, "-m", "app.engines.local", *engine_options(load_settings().embedded), *context.args]
    os.execv(sys.executable, command)  # noqa: S606 - our own module.


def engine_options(embedded: EmbeddedSettings) -> list[str]:
    """Write the embedded engine's settings, as far as they are set, as options of its command."""
    given = embedded.model_dump(exclude={"enabled"}, exclude_unset=True, exclude_none=True)
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


@app.command()
def worker(data_dir: DataDir = None) -> None:
    """Do the periodic work beside the service: watch canaries, take back a worse one, look for drift, raise alerts."""
    settings = load_settings(data_dir=data_dir)
    from app.database import DataDirectoryUnusable, MigrationFailed, make_directory
    from app.drift import DriftPlan
    from app.worker import run

    groups = {name: group.adapter_folder for name, group in settings.engines.items()}
    groups[settings.main_engine] = settings.main_adapter_folder
    folders = {name: folder for name, folder in groups.items() if folder}
    wanted = settings.drift.model_dump()
    embeds = wanted.pop("embed_questions")
    try:
        make_directory(settings.data_dir)
        run(
            _database(data_dir),
            adapter_folders=folders,
            drift=DriftPlan(**wanted),
            embedding_model=settings.retrieval.embedding_model if embeds else None,
            embedding_threads=settings.retrieval.embedding_threads,
            privacy=_privacy(settings),
            longest_wait_seconds=settings.limits.longest_wait_seconds,
            webhook=_webhook(settings),
            alerts_every_seconds=settings.alerts.every_seconds,
            log_level=settings.log_level,
            log_format=settings.log_format,
        )
    except (DataDirectoryUnusable, MigrationFailed) as error:
        err.print(f"[red]cannot work:[/] {escape(str(error))}")
        raise typer.Exit(1) from None


@app.command()
def demo(
    url: Url = "http://127.0.0.1:8080",
    examples: Annotated[Path, typer.Option(help="Documents to load.")] = Path("examples"),
    data_dir: Annotated[Path | None, typer.Option(help="The service's data directory.")] = None,
    start: Annotated[bool, typer.Option("--start", help="Start the service first if it does not run.")] = False,
) -> None:
    """Load the example documents into a running service and ask it two questions."""
    from app.demo import run_demo

    settings = load_settings(data_dir=data_dir)
    with explained():
        run_demo(
            out,
            url=url,
            examples=examples,
            data_dir=settings.data_dir.resolve(),
            database=_database(settings.data_dir.resolve()),
            start=start,
            local_engine=not settings.engine.members,
        )


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    key: Key,
    url: Url = "http://127.0.0.1:8080",
    model: Model = "hallmark",
) -> None:
    """Ask a question and show the answer as it comes, with its sources."""
    with explained(), Client(url, key) as client:
        ending: dict[str, Any] = {}
        try:
            for chunk in client.stream(question, model=model):
                for choice in chunk.get("choices", ()):
                    out.out(choice["delta"].get("content") or "", end="", highlight=False)
                ending = chunk if "citations" in chunk else ending
        finally:
            out.print()
        show_sources(out, ending)


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    tenant: Annotated[str, typer.Option(help="Whose documents and predictions it reaches.")] = "default",
    scope: Annotated[list[str] | None, typer.Option(help="What it may do; repeat for several.")] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="Whose documents it sees beside those for all; repeat for several.")
    ] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, max=36_500, help="By default it never expires.")] = None,
    priority: PriorityOption = None,
    requests_per_minute: RequestLimit = None,
    tokens_per_minute: TokenLimit = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from app.access import create_key

    with explained():
        key, secret = create_key(
            _database(data_dir),
            name=name,
            tenant=tenant,
            scopes=scope or ["chat", "documents:read"],
            groups=group or [],
            expires_at=_now() + expires_in_days * _DAY_MILLISECONDS if expires_in_days else None,
            priority=priority or "normal",
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
    groups = f", in {escape(', '.join(key.groups))}" if key.groups else ""
    err.print(f"key {key.id} for tenant {escape(tenant)}{groups}: {', '.join(key.scopes)}. It is shown this once:")
    out.print(secret, soft_wrap=True)


@keys.command("list")
def list_all(data_dir: DataDir = None) -> None:
    """List the keys, without their secrets."""
    from app.access import list_keys

    table = Table("id", "name", "tenant", "groups", "scopes", "limits", "state")
    with explained():
        found = list_keys(_database(data_dir))
    for key in found:
        state = "revoked" if key.revoked_at else "active"
        if state == "active" and key.expires_at is not None:
            day = datetime.fromtimestamp(key.expires_at / 1000, UTC).date()
            state = f"expired {day}" if key.expires_at <= _now() else f"active until {day}"
        whose = escape(key.tenant), escape(", ".join(key.groups))
        table.add_row(key.id, escape(key.name), *whose, ", ".join(key.scopes), ", ".join(_limits(key)), state)
    out.print(table)


@keys.command("update")
def update(
    key_id: KeyId,
    priority: PriorityOption = None,
    requests_per_minute: RequestLimit = None,
    tokens_per_minute: TokenLimit = None,
    data_dir: DataDir = None,
) -> None:
    """Change a key's priority or limits; running services follow within a second."""
    from app.access import update_key

    with explained():
        key = update_key(
            _database(data_dir),
            key_id,
            priority=priority,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
    out.print(f"{key.id}: {', '.join(_limits(key)) or 'no limits'}")


@keys.command("revoke")
def revoke(key_id: KeyId, data_dir: DataDir = None) -> None:
    """Revoke a key; running services refuse it within a second."""
    from app.access import revoke_key

    with explained():
        revoke_key(_database(data_dir), key_id)
    out.print(f"{key_id} is revoked")


@app.command()
def openapi() -> None:
    """Print the description of the API, from which clients are generated."""
    import msgspec

    from app.main import VERSION
    from app.routes.api import create_api

    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(create_api(VERSION).openapi()), indent=2) + b"\n")


def _webhook(settings: Settings) -> "Webhook | None":
    """The webhook of the settings; a setting that makes none is told by name and exits with 2."""
    from app.alerts import Webhook, read_secret
    from app.alerts.addresses import Policy

    given = settings.alerts
    if given.webhook_url is None:
        return None
    name = "webhook_allow"
    try:
        policy = Policy(given.webhook_allow)
        name = "webhook_secret"
        key = read_secret(given.webhook_secret.get_secret_value().strip() if given.webhook_secret else "")
    except ValueError as error:
        err.print(f"[red]setting alerts.{name}:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    url = given.webhook_url.get_secret_value().strip()
    return Webhook(url, key, policy, timeout_seconds=given.webhook_timeout_seconds)


def _now() -> int:
    """Milliseconds since 1970, as keys count."""
    return time.time_ns() // 1_000_000


def _limits(key: "ApiKey") -> list[str]:
    """What is not as with other keys."""
    limits = ((key.requests_per_minute, "requests/min"), (key.tokens_per_minute, "tokens/min"))
    priority = [f"{key.priority} priority"] if key.priority != "normal" else []
    return priority + [f"{limit} {kind}" for limit, kind in limits if limit is not None]


def _privacy(settings: Settings) -> "Privacy":
    """What a process needs to read what is sealed; a wrong key exits with 2."""
    from app.privacy_wiring import BadPrivacy, open_privacy

    try:
        return open_privacy(settings.privacy, settings.data_dir)
    except BadPrivacy as error:
        err.print(f"[red]setting:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


def _database(data_dir: Path | None) -> Path | str:
    """Where the service with these settings keeps its keys."""
    settings = load_settings(data_dir=data_dir)
    if settings.database_url is not None:
        return settings.database_url.get_secret_value().strip()
    return settings.data_dir / "hallmark.db"
