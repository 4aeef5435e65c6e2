"""The links of a lineage, as they are told."""

from typing import Any

import msgspec

from app.feedback import LabelSource
from app.predictions import Mention


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A step of the way. `verified` is null where it cannot be checked here; `problems` say what differs, and why."""

    verified: bool | None
    problems: tuple[str, ...] = ()


class ReleaseLink(Link, frozen=True, kw_only=True):
    """The release that answered; `content` is its canonical JSON."""

    id: str | None
    digest: str
    content: Any = None
    deleted: bool = False


class AdapterLink(Link, frozen=True, kw_only=True):
    """The adapter of the release."""

    name: str
    digest: str | None


class TrainingRunLink(Link, frozen=True, kw_only=True):
    """What made the adapter; `manifest` is shown to the tenant whose run it is."""

    id: str
    digest: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    adapter_digest: str | None = None
    dataset_digest: str | None = None
    manifest: Any = None


class DatasetLink(Link, frozen=True, kw_only=True):
    """What the run was trained on; `name`, `version` and `manifest` are shown to the tenant whose dataset it is."""

    digest: str
    rows: int | None = None
    name: str | None = None
    version: str | None = None
    manifest: Any = None


class LabelMention(msgspec.Struct, frozen=True, kw_only=True):
    """A label in brief, as it holds now. One that was withdrawn since is nobody's truth any more."""

    prediction_id: str
    source: LabelSource
    withdrawn: bool


class RowLink(Link, frozen=True, kw_only=True):
    """One example of the dataset, and where it came from; null where that is not on record any more."""

    digest: str
    content_digest: str
    prediction_id: str | None
    prediction: Mention | None = None
    label_id: str | None
    label: LabelMention | None = None
    erased: bool = False
    """Whether its content was erased; its digests and its origin are kept."""


class DocumentLink(Link, frozen=True, kw_only=True):
    """A version of a document that the prediction was given. Quotes are looked up where the version is still there."""

    document_id: str
    document_version: str
    cited: bool
    quotes: int


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """The lineage of a prediction. `verified` is true if every link is, false if one is not."""

    prediction_id: str
    verified: bool | None
    release: ReleaseLink | None
    adapter: AdapterLink | None
    training_run: TrainingRunLink | None
    dataset: DatasetLink | None
    rows: tuple[RowLink, ...]
    next_row: str | None
    """The `after` of the dataset's next rows."""
    index_version: str | None
    documents: tuple[DocumentLink, ...]
    object: str = "lineage"


class DatasetPage(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset, verified with all its rows, and a page of these by their digests."""

    dataset: DatasetLink
    data: tuple[RowLink, ...] = ()
    next: str | None = None
    """The `after` of the next page."""
    object: str = "lineage.dataset"
