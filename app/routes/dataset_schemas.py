"""Datasets as JSON: versions, rows, differences, builds."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, Field

from app.datasets import Build, Change, Difference, Place, Purpose, Series, Version
from app.routes.registry_schemas import moment
from app.routes.schemas import Wire

DATASET_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
TAG = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class Step(BaseModel):
    """What a step of a build kept, and what it dropped."""

    name: str
    kept: int
    dropped: dict[str, int] = Field(default_factory=dict, description="How many rows, by reason.")
    noted: dict[str, int] = Field(default_factory=dict, description="What was counted besides.")


class BuildReport(BaseModel):
    """What became of the rows, step by step, and what the version has."""

    steps: list[Step]
    rows: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="Rows by side of the split and class; without classes under `rows`."
    )


class BuildError(BaseModel):
    """Why a build failed."""

    code: str
    message: str
    param: str | None = None


class BuildObject(BaseModel):
    """A build of a version, as far as it is."""

    id: str
    object: Literal["dataset.build"] = "dataset.build"
    dataset: str
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    step: str = Field(description="What it does, or did last; `unchanged` if the rows are those of the newest version.")
    recipe: dict[str, Any]
    version: int | None = Field(description="The version it came to.")
    report: BuildReport | None
    error: BuildError | None
    created_at: datetime
    created_by: str | None
    finished_at: datetime | None

    @classmethod
    def of(cls, build: Build) -> "BuildObject":
        """Show a build."""
        facts = msgspec.structs.asdict(build)
        for name in ("created_at", "finished_at"):
            facts[name] = None if facts[name] is None else moment(facts[name])
        return cls.model_validate(facts)


class BuildList(BaseModel):
    """The builds of a dataset, the newest first."""

    object: Literal["list"] = "list"
    data: list[BuildObject]


class DatasetVersion(BaseModel):
    """A version of a dataset: never changed."""

    object: Literal["dataset.version"] = "dataset.version"
    dataset: str
    version: int
    digest: str = Field(description="SHA-256 of the rows' digests, sorted, with a line feed after each.")
    parent: str | None = Field(description="The digest of the version before.")
    rows: int
    erased: int = Field(description="Rows whose content was erased since: they are in no file any more.")
    tags: list[str]
    manifest: dict[str, Any]
    report: BuildReport
    created_at: datetime
    created_by: str | None

    @classmethod
    def of(cls, version: Version) -> "DatasetVersion":
        """Show a version."""
        return cls(
            dataset=version.series.name,
            version=version.number,
            digest=version.digest,
            parent=version.manifest.get("parent"),
            rows=version.rows,
            erased=version.erased,
            tags=list(version.tags),
            manifest=version.manifest,
            report=BuildReport.model_validate(version.report),
            created_at=moment(version.created_at),
            created_by=version.created_by,
        )


class VersionList(BaseModel):
    """The versions of a dataset, the newest first."""

    object: Literal["list"] = "list"
    data: list[DatasetVersion]
    next: int | None = Field(description="The `before` of the next page.")


class DatasetObject(BaseModel):
    """A dataset by its name."""

    object: Literal["dataset"] = "dataset"
    name: str
    task: Literal["classify", "answer", "extract", "preference"]
    purpose: Purpose
    version: int = Field(description="Its newest.")
    created_at: datetime
    created_by: str | None

    @classmethod
    def of(cls, series: Series) -> "DatasetObject":
        """Show a dataset."""
        return cls(
            name=series.name,
            task=series.task,
            purpose=series.purpose,
            version=series.revision,
            created_at=moment(series.created_at),
            created_by=series.created_by,
        )


class DatasetList(BaseModel):
    """A tenant's datasets by name."""

    object: Literal["list"] = "list"
    data: list[DatasetObject]
    next: str | None = Field(description="The `after` of the next page.")


class DatasetRowObject(BaseModel):
    """A row of a version; `content` is null where it was erased."""

    digest: str
    content_digest: str
    prediction_id: str | None
    label_id: str | None
    split: Literal["train", "heldout"]
    content: dict[str, Any] | None

    @classmethod
    def of(cls, row: Any) -> "DatasetRowObject":
        """Show a row."""
        facts = {name: getattr(row, name) for name in cls.model_fields}
        return cls.model_validate(facts | {"content": _read(row.content)})


class DatasetRowList(BaseModel):
    """Rows of a version, by their digests."""

    object: Literal["list"] = "list"
    data: list[DatasetRowObject]
    next: str | None = Field(description="The `after` of the next page.")


class RowChange(BaseModel):
    """A row that one of two versions has and the other has not."""

    change: Literal["added", "removed"]
    digest: str
    prediction_id: str | None
    label_id: str | None
    split: Literal["train", "heldout"]
    content: dict[str, Any] | None

    @classmethod
    def of(cls, change: Change) -> "RowChange":
        """Show a change."""
        return cls.model_validate(msgspec.structs.asdict(change) | {"content": _read(change.content)})


class DatasetDiff(BaseModel):
    """How two versions differ."""

    object: Literal["dataset.diff"] = "dataset.diff"
    dataset: str
    old: int
    new: int
    added: int
    removed: int
    changed: int = Field(description="Predictions that have another row in one than in the other; both are counted.")
    data: list[RowChange]
    next: str | None = Field(description="The `after` of the next page.")

    @classmethod
    def of(cls, old: Version, new: Version, found: Difference) -> "DatasetDiff":
        """Show a difference."""
        return cls(
            dataset=new.series.name,
            old=old.number,
            new=new.number,
            added=found.added,
            removed=found.removed,
            changed=found.changed,
            data=[RowChange.of(each) for each in found.data],
            next=found.next,
        )


class RowPlace(BaseModel):
    """Where a row is: in the versions of a dataset from `first` on, up to the one before `end`."""

    dataset: str
    purpose: Purpose
    first: int
    end: int | None = Field(description="The first version without it; null if the newest has it.")
    digest: str
    prediction_id: str | None
    label_id: str | None
    erased: bool

    @classmethod
    def of(cls, place: Place) -> "RowPlace":
        """Show a place."""
        return cls.model_validate(msgspec.structs.asdict(place))


class RowPlaces(BaseModel):
    """The rows that were made of a prediction, or by a label."""

    object: Literal["list"] = "list"
    data: list[RowPlace]


class TagRequest(Wire):
    """Which version a tag names."""

    version: Annotated[int, Field(ge=1, le=2**31 - 1)]


def _read(content: str | None) -> Any:
    return None if content is None else msgspec.json.decode(content)
