"""How a version of a dataset is made: which predictions, whose word counts, what is left out, and how it is split.

The main rule: a recipe says all of it and is kept with the version. Whatever a recipe leaves to chance is decided by a
hash of its seed, so that the same recipe on the same predictions gives the same rows, and new predictions move none.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

import msgspec

from app.errors import InvalidRequest, invalid_field
from app.feedback import FeedbackSource, LabelSource
from app.lineage import canonical
from app.predictions import FeedbackState, LabelState, Outcome, Where
from app.tasks import BadTask, ClassLabel, Task

FORMAT = "hallmark-dataset/1"

MAX_ROWS = 100_000
"""As many as lineage takes of a dataset."""

Kind = Literal["classify", "answer", "extract", "preference"]
Purpose = Literal["training", "evaluation"]
OTHER: Mapping[Purpose, Purpose] = {"training": "evaluation", "evaluation": "training"}
"""What a dataset is kept apart from."""
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

Fact = Annotated[str, msgspec.Meta(max_length=512, pattern=r"^[^\x00]*$")]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class PredictionFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which predictions are meant, by the filters that list them; what is left out makes no difference."""

    release: Fact | None = None
    release_digest: Fact | None = None
    since: datetime | None = None
    until: datetime | None = None
    outcome: Outcome | None = "finished"
    user: Fact | None = None
    conversation: Fact | None = None
    model: Fact | None = None
    adapter: Fact | None = None
    verdict: Fact | None = None
    assignment: Literal["stable", "canary", "pinned", "shadow", "fallback", "extractive", "chore"] | None = None
    """Answers nobody was shown count only if `shadow` is named, and what a chat page asked for itself if `chore` is."""
    label_state: LabelState | None = None
    feedback_state: FeedbackState | None = None
    review_queue: Fact | None = None
    """The name of a queue that has taken them."""

    def where(self) -> Where:
        """The filters as the history takes them."""
        return Where(**{name: getattr(self, name) for name in Where.__struct_fields__})


class LabelPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whose word counts, and what is right where several speak of one prediction."""

    sources: tuple[LabelSource, ...] = get_args(LabelSource)
    corrections: bool = True
    """Whether the correction in somebody's feedback says what is right."""
    correction_sources: tuple[FeedbackSource, ...] = ("end_user", "reviewer", "application")
    resolve: Literal["newest", "majority"] = "newest"
    min_opinions: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    min_agreement: Share = 0.0
    """The part of the opinions that must say the same."""
    confirming: Annotated[tuple[ClassLabel, ...], msgspec.Meta(max_length=100)] = ()
    """Classes by which a label says that the answer is right as it stands; not for `classify`."""
    weights: Literal["none", "inverse_probability"] = "none"
    """Whether a row weighs as many predictions as it stands for: one over its label's sampling probability."""


class Splitting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which rows are held out: whole conversations, by a hash."""

    seed: Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[^\x00]*$")] = "0"
    heldout: Share = 0.1
    by: Literal["conversation", "user"] = "conversation"
    """What stays together; without one, what there is of the other, else the prediction stands alone."""


class Dedup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """When two sessions are the same: by the overlap (Jaccard) of what they ask, in pieces of five characters."""

    near: bool = True
    threshold: Annotated[float, msgspec.Meta(ge=0.5, le=1)] = 0.8


class Leakage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is done with a question that is in an evaluation set, word for word or nearly."""

    action: Literal["drop", "refuse", "report"] = "drop"
    threshold: Annotated[float, msgspec.Meta(ge=0.5, le=1)] = 0.8


class Balance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How many rows of one class are trained on at most; what is held out stays as it came."""

    max_per_class: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_of: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a version is made. `columns` is for files alone, and `query` and `labels` for predictions."""

    task: Kind
    classes: Annotated[tuple[ClassLabel, ...], msgspec.Meta(max_length=1_000)] = ()
    """What `classify` chooses from; by default whatever is found."""
    schema: dict[str, Any] | None = None
    """What `extract` writes: a JSON schema."""
    query: PredictionFilter = PredictionFilter()
    labels: LabelPolicy = LabelPolicy()
    prompt: Literal["engine", "caller"] = "engine"
    """The messages of a row: as the engine got them, passages and all, or as the caller sent them."""
    split: Splitting = Splitting()
    dedup: Dedup = Dedup()
    leakage: Leakage = Leakage()
    balance: Balance = Balance()
    max_rows: Annotated[int, msgspec.Meta(ge=1, le=MAX_ROWS)] = MAX_ROWS
    licence: Fact | None = None
    columns: dict[str, Fact] = {}
    """What a field is called in the files: ours to theirs."""
    template: Annotated[str, msgspec.Meta(max_length=20_000)] | None = None
    """What imported texts are asked by, as a release's prompt template; without one a row asks the bare text."""
    files: tuple["ImportedFile", ...] = ()
    """What was imported; noted here, not given."""

    def check(self) -> None:
        """Raise InvalidRequest for what no row could be made by."""
        if (self.task == "extract") != (self.schema is not None):
            raise InvalidRequest("`schema` belongs to the task `extract`, which needs it.", param="schema")
        if self.classes and self.task != "classify":
            raise InvalidRequest("`classes` belong to the task `classify`.", param="classes")
        if self.labels.confirming and self.task in ("classify", "preference"):
            raise InvalidRequest(
                f"`labels.confirming`: for {self.task!r} an answer is not right as it stands.",
                param="labels.confirming",
            )
        self._check_task()
        if self.template is not None and (self.shape is None or "{question}" not in self.template):
            raise InvalidRequest(
                "`template`: has the slot {question}, and is for `extract`, or for `classify` with `classes`.",
                param="template",
            )

    def _check_task(self) -> None:
        try:
            _ = self.shape
        except BadTask as error:
            field = "schema" if self.task == "extract" else "classes"
            raise InvalidRequest(str(error).replace("`labels`", "`classes`"), param=field) from None

    @property
    def shape(self) -> Task | None:
        """What an answer is held against; None where anything is right."""
        if self.task == "extract":
            return Task(kind="extract", schema=self.schema)
        return Task(kind="classify", labels=self.classes) if self.classes else None

    def as_json(self) -> Any:
        """The recipe as manifests have it."""
        return msgspec.to_builtins(self)


class ImportedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was imported."""

    name: str
    sha256: str
    rows: int


def read_recipe(given: Mapping[str, Any]) -> Recipe:
    """Read a recipe and check it; raises InvalidRequest naming the field."""
    try:
        recipe = msgspec.convert(given, Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None
    recipe.check()
    return recipe


def fixed(recipe: Recipe, now: datetime) -> Recipe:
    """The recipe with the end of its window: what is made later is not meant."""
    until = recipe.query.until or now
    aware = until if until.tzinfo is not None else until.replace(tzinfo=UTC)
    return msgspec.structs.replace(recipe, query=msgspec.structs.replace(recipe.query, until=min(aware, now)))


def written(recipe: Recipe) -> str:
    """A recipe as its canonical JSON."""
    return canonical(recipe.as_json())
