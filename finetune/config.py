"""Everything that can be chosen about a training run, on one screen.

The main rule: what is not written here cannot influence the adapter, but the base model, the dataset and the libraries,
and these stand in the manifest by their digests and versions.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune.errors import BadConfig

SEVEN_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What every engine can serve: TGI drops an adapter's other weights with nothing but a warning."""

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class TrainConfig(BaseModel):
    """One training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    # --- what from, what into ---
    dataset: Path
    """The folder of an exported dataset: `manifest.json`, `train.jsonl`, `heldout.jsonl`."""
    base: str
    """The base model: a folder in Hugging Face's layout, or an id on a model hub."""
    base_model: str | None = None
    """What the engine calls the base model; by default what the folder or the hub calls it."""
    base_revision: str | None = None
    """A revision on the hub, or what the engine calls the revision of a folder."""
    output: Path
    """Where the adapter goes. A run that was cut off goes on from the checkpoints it left here."""
    prompt: str | None = None
    """Wraps the last question as the release does; its slots are those of a release's template."""
    licence: str | None = None
    """Under what licence the adapter may be used; goes into the manifest."""

    # --- the adapter ---
    rank: Count = 16
    alpha: Count = 32
    dropout: Share = 0.0
    targets: tuple[str, ...] = Field(SEVEN_LINEAR_LAYERS, min_length=1)

    # --- how long, how fast ---
    epochs: float = Field(1.0, gt=0, le=1000)
    max_steps: int | None = Field(None, ge=1)
    """Ends before the epochs do."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    beta: float = Field(0.1, gt=0)
    """Of preference pairs: how closely the tuned model keeps to the base."""

    # --- batches ---
    batch_size: Count = 8
    """Rows a process takes at once; a step has `batch_size * accumulate * processes` rows."""
    accumulate: Count = 1
    max_tokens: int = Field(512, ge=8)
    """Of prompt and answer together."""
    long_rows: Literal["refuse", "drop"] = "refuse"
    """What becomes of a row with more tokens: cut off, it would lack its answer."""
    packing: bool = False
    """Several short rows in one sequence of `max_tokens`, none of which sees another."""

    # --- watching ---
    check_every_steps: Count = 20
    """So often held-out rows are scored and a checkpoint is written."""
    check_rows: Count = 200
    """So many held-out rows are scored, the first by their digests; scoring all would take longer than training."""
    patience: int = Field(3, ge=0)
    """Stop after so many scores without a better one, and keep the best; 0 trains to the end and keeps the last."""
    report_to: Literal["none", "tensorboard", "mlflow"] = "none"

    # --- the machine ---
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto` is bf16 where the processor multiplies in it; one that does not takes forty times as long."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4` keeps the base model in four bits (QLoRA); needs a GPU and bitsandbytes."""
    activation_checkpointing: bool | None = None
    """Saves memory for time; by default on a GPU only, since it costs a third more on a CPU."""
    threads: int | None = Field(None, ge=1)
    """Of torch; by default one a core."""
    seed: int = Field(0, ge=0, lt=2**32)
    deterministic: bool = True
    """Deterministic algorithms only, so that the same inputs give the same bytes."""

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainConfig":
        if self.quantize != "none" and self.device == "cpu":
            raise ValueError("quantize: bitsandbytes needs a GPU; set device to `cuda` or quantize to `none`")
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError("prompt: the template has no `{question}`; write it where the last question belongs")
        return self

    @property
    def recipe(self) -> dict[str, Any]:
        """What of it may influence the adapter: all but where things lie, what they are called and who watches."""
        elsewhere = {"dataset", "base", "base_model", "base_revision", "output", "licence", "report_to"}
        return self.model_dump(mode="json", exclude=elsewhere)


def load_config(file: Path | None, given: dict[str, Any]) -> TrainConfig:
    """Read a TOML file, with what the command line gives on top; paths in the file are relative to it.

    Raises:
        BadConfig: names the field and what it should be.
    """
    try:
        written = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{file}: {error}") from error
    for name in ("dataset", "output", "base"):
        value = written.get(name)
        if file and isinstance(value, str) and (name != "base" or (file.parent / value).is_dir()):
            written[name] = str(file.parent / Path(value).expanduser())
    try:
        return TrainConfig(**(written | {name: value for name, value in given.items() if value is not None}))
    except ValidationError as error:
        raise BadConfig("\n".join(_told(problem) for problem in error.errors(include_url=False))) from error


def _told(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{field}: is missing; give it in the file or as --{field.replace('_', '-')}"
    if problem["type"] == "extra_forbidden":
        return f"{field}: there is no such setting; known are {', '.join(sorted(TrainConfig.model_fields))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{field}: {message}, not {problem['input']!r}" if field else message
