"""What an evaluation asks whom, and the form of its results.

The main rule: an arm is one way to answer, named, with all that is asked of it; what it cost stands beside what it was
worth. Results are written once, and every later table is made of them. Each file is written beside and renamed.
"""

import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune.dataset import Kind
from finetune.errors import BadConfig, BadDataset
from finetune.scoring import Score
from finetune.statistics import Difference, Estimate

RESULTS, SCORES, ANSWERS, PICTURE = "evaluation.json", "scores.jsonl", "answers.jsonl", "arms.png"


def address(url: str) -> str:
    """A URL that requests can be sent to, as it was given.

    Raises:
        ValueError: it is none.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url} is no URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url} is no address of a server; write it as http://127.0.0.1:8080/v1")
    return url


Address = Annotated[str, AfterValidator(address)]


class Arm(BaseModel):
    """One way to answer: a model or release on a server, with or without retrieval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=80)
    model: str
    """What the server calls it: a release for the gateway, an adapter's name for an engine."""
    url: Address = "http://127.0.0.1:8080/v1"
    """OpenAI's API: the gateway's, or an engine's."""
    retrieval: Literal["off", "auto", "required"] | None = None
    """What to ask the gateway for; not sent by default, so that the release decides."""
    prompt: str | None = None
    """Wraps the question as a release would, where there is no release: for an engine asked directly."""
    bare: bool = True
    """Ask the question as it was asked, since the gateway's release has the template; false asks a row's messages."""
    choices: bool = False
    """Hold an engine that is asked directly to the labels, as a release that classifies does."""
    max_tokens: int = Field(64, ge=1)
    timeout_seconds: float = Field(120.0, gt=0)
    cost: float | None = Field(None, ge=0)
    """Of 1,000 answers, in whatever unit the others have too; by default the seconds they took."""


class FourArms(BaseModel):
    """Base and adapter, each without and with retrieval; with other names for that where a release takes no choice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    adapter: str
    base_with_retrieval: str | None = None
    adapter_with_retrieval: str | None = None

    def arms(self, common: dict[str, Any]) -> list[Arm]:
        """The four, in the order of the table."""
        pairs = (("base", self.base, self.base_with_retrieval), ("adapter", self.adapter, self.adapter_with_retrieval))
        found = []
        for name, model, other in pairs:
            chosen = other is None
            found.append(Arm(name=name, model=model, retrieval="off" if chosen else None, **common))
            with_retrieval = "auto" if chosen else None
            found.append(Arm(name=f"{name} + retrieval", model=other or model, retrieval=with_retrieval, **common))
        return found


class EvaluateConfig(BaseModel):
    """One evaluation: a split of a dataset, and the arms that answer it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: Path
    split: str = "heldout"
    output: Path
    limit: int | None = Field(None, ge=1)
    """Ask the first so many rows by their digests, which is as good as a draw."""
    concurrency: int = Field(4, ge=1, le=256)
    arms: tuple[Arm, ...] = ()
    four: FourArms | None = None
    url: Address = "http://127.0.0.1:8080/v1"
    """For the four arms."""

    @model_validator(mode="after")
    def _named_once(self) -> "EvaluateConfig":
        names = [arm.name for arm in self.all_arms]
        if not names:
            raise ValueError(
                "arms: there are none; write `[[arms]]` with name and model, or `[four]` with base and adapter"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"arms: each name once, not {', '.join(names)}")
        return self

    @property
    def all_arms(self) -> tuple[Arm, ...]:
        """The arms in the order of the tables."""
        return (*(self.four.arms({"url": self.url}) if self.four else ()), *self.arms)


MEASURED, GIVEN = "seconds for 1,000 answers", "cost of 1,000 answers"
"""The units of costs."""


class ArmResult(msgspec.Struct, frozen=True, kw_only=True):
    """What an arm was worth and took."""

    name: str
    model: str
    url: str
    retrieval: str | None = None
    releases: tuple[str, ...] = ()
    """Digests of what answered, where the server says so."""
    figures: dict[str, Estimate]
    slices: dict[str, Estimate]
    """The mean score of each named part of the rows."""
    failures: dict[str, int]
    seconds: dict[str, float]
    tokens: dict[str, float]
    cost: float
    cost_unit: str


class Comparison(msgspec.Struct, frozen=True):
    """How much more an arm scored than another on the same rows."""

    arm: str
    against: str
    difference: Difference


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What an evaluation found."""

    format: Literal["hallmark-evaluation/1"] = "hallmark-evaluation/1"
    dataset: str
    dataset_digest: str
    split: str
    task: Kind
    rows: int
    sessions: int
    concurrency: int
    started_at: int
    arms: tuple[ArmResult, ...]
    comparisons: tuple[Comparison, ...]
    scores_sha256: str | None = None
    """Of the file with the rows' scores."""


class RowFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What later tables need to know of a row."""

    row: str
    session: str | None = None
    slice: str | None = None
    weight: float = 1.0
    label: str | None = None
    scores: dict[str, Score]


def load_evaluation(file: Path | None, given: dict[str, Any]) -> EvaluateConfig:
    """Read a TOML file, with what the command line gives on top; paths in the file are relative to it.

    Raises:
        BadConfig: names the field and what it should be.
    """
    try:
        written = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{file}: {error}") from error
    for name in ("dataset", "output"):
        if file and isinstance(written.get(name), str):
            written[name] = str(file.parent / Path(written[name]).expanduser())
    try:
        return EvaluateConfig(**(written | {name: value for name, value in given.items() if value is not None}))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc'])) or 'evaluation'}: {str(each['msg']).removeprefix('Value error, ')}"
            for each in error.errors(include_url=False)
        ]
        raise BadConfig("\n".join(problems)) from error


def write_json(file: Path, value: Any) -> None:
    """Write something as JSON that a person can read."""
    _write(file, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_lines(file: Path, values: list[Any]) -> str:
    """Write things as JSON, a line each, and give the file's SHA-256."""
    content = b"".join(msgspec.json.encode(value) + b"\n" for value in values)
    _write(file, content)
    return sha256(content).hexdigest()


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def read_results(folder: Path) -> tuple[Evaluation, list[RowFacts]]:
    """Read what an evaluation wrote.

    Raises:
        BadDataset: the folder holds no evaluation, or not all of one.
    """
    try:
        evaluation = msgspec.json.decode((folder / RESULTS).read_bytes(), type=Evaluation)
        scores = (folder / SCORES).read_bytes()
        facts = [msgspec.json.decode(line, type=RowFacts) for line in scores.splitlines()]
    except OSError as error:
        raise BadDataset(f"{error.filename}: {error.strerror}; name a folder that `evaluate` wrote") from error
    except msgspec.DecodeError as error:
        raise BadDataset(f"{folder}: {error}; it is not what this version of `evaluate` writes") from error
    if evaluation.scores_sha256 not in (None, sha256(scores).hexdigest()):
        raise BadDataset(f"{folder}: {SCORES} is not that of {RESULTS}; evaluate anew")
    return evaluation, facts
