"""What is on disk of retraining: the folder of each run, what is done of it, and what training says of its results.

The main rule: a run's state is replaced as a whole, after each step, so that it says what is done and no more.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from app.client import ServiceFailure
from app.terminal import whole

STATE = "state.json"
T = TypeVar("T")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is begun with, and goes on with."""

    name: str
    """The public name."""
    dataset: str
    recipe: dict[str, Any] | None = None
    """How the dataset's next version is built; None takes the newest there is."""
    config: str | None = None
    """The digest of the training configuration."""
    base: str | None = None
    evaluation: str | None = None
    """The evaluation set; None is what the dataset holds out."""
    margin: float = 0.05
    limit: int | None = None


class State(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is done of a run."""

    plan: Plan
    began_at: int
    build: str | None = None
    version: int | None = None
    dataset_digest: str | None = None
    adapter_digest: str | None = None
    stable: str | None = None
    """What the release was made from, and evaluated against."""
    release: str | None = None
    evaluation: str | None = None
    """The digest of `evaluation.json`."""
    outcome: Literal["canary", "refused", "promoted", "given up"] | None = None
    """`promoted` by hand, before there was a canary."""
    reason: str = ""


class Estimate(msgspec.Struct, frozen=True):
    """A figure with its 95 % interval."""

    value: float | None
    low: float
    high: float


class ArmRead(msgspec.Struct, frozen=True):
    """What an evaluation says of one arm."""

    name: str
    figures: dict[str, Estimate]
    releases: tuple[str, ...] = ()
    failures: dict[str, int] = {}
    seconds: dict[str, float] = {}


class EvaluationRead(msgspec.Struct, frozen=True):
    """What of `evaluation.json` is needed here."""

    dataset_digest: str
    rows: int
    arms: tuple[ArmRead, ...]


class Drop(msgspec.Struct, frozen=True):
    """How much less the candidate scored; `upper` is above it with 95 % certainty."""

    value: float
    low: float
    high: float
    upper: float


class TestedRead(msgspec.Struct, frozen=True):
    """What of `recommendation.json` is needed here, of one arm."""

    arm: str
    outcome: str
    drop: Drop
    rows_needed: int | None = None


class RecommendationRead(msgspec.Struct, frozen=True):
    """The test of the candidate."""

    tested: tuple[TestedRead, ...]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs of the same folder out.

    Raises:
        ServiceFailure: one is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceFailure(f"Another run is at work in {folder}.") from None
        yield


def runs(folder: Path) -> list[Path]:
    """The runs so far, the newest last."""
    return sorted(path for path in folder.glob("run-*") if (path / STATE).is_file())


def load(run: Path) -> State:
    """Read what is done of a run.

    Raises:
        ServiceFailure: its file cannot be read.
    """
    return read_json(run / STATE, State)


def begin(folder: Path, plan: Plan, *, give_up: bool = False) -> Path:
    """Give the run to go on with, or a new one.

    Raises:
        ServiceFailure: one that was cut off began with something else.
    """
    found = runs(folder)
    if found and (state := load(found[-1])).outcome is None:
        if state.plan == plan and not give_up:
            return found[-1]
        if not give_up:
            then, now = msgspec.to_builtins(state.plan), msgspec.to_builtins(plan)
            other = ", ".join(field for field in then if then[field] != now[field])
            raise ServiceFailure(
                f"{found[-1]} is not finished, and began with another {other}. Finish it as it began, or give it up "
                "with --anew."
            )
        state.outcome = "given up"
        save(found[-1], state)
    run = folder / f"run-{int(found[-1].name[4:]) + 1 if found else 1:04}"
    run.mkdir(parents=True, exist_ok=True)  # Whoever was killed before the first save left the folder alone.
    save(run, State(plan=plan, began_at=int(time.time())))
    return run


def save(run: Path, state: State) -> None:
    """Note what is done of a run."""
    with whole(run / STATE) as file:
        file.write(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(file: Path, kind: type[T]) -> T:
    """Read a file of JSON; raises ServiceFailure."""
    return decoded(read_file(file), file, kind)


def read_file(file: Path) -> bytes:
    """Read a file; raises ServiceFailure."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ServiceFailure(f"{file}: {error.strerror}.") from error


def decoded(content: bytes, file: Path, kind: type[T]) -> T:
    """Decode the content of a file of JSON; raises ServiceFailure."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise ServiceFailure(f"{file}: {error}. Another version may have written it; run this with --anew.") from error
