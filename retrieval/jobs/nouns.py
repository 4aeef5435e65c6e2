"""The nouns of ingestion: jobs, what is in them, what failed, and what a synchronisation would do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from retrieval.documents import Scope

Kind = Literal["upload", "sync", "build"]
JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
Action = Literal["put", "delete", "build"]
ItemState = Literal["expected", "waiting", "running", "done", "failed", "cancelled"]
Outcome = Literal["created", "replaced", "unchanged", "deleted", "built"]

STALE_SECONDS = 3600.0
"""How long a synchronisation waits for the next of its files before it is cancelled."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait, and how often an item is begun."""

    max_documents: int = 1_000
    max_bytes: int = 2_000_000_000
    max_attempts: int = 5
    """A document that was under way so often when the process died, or the index went away, is given up."""
    keep_jobs: int = 1_000
    """Jobs that have ended are forgotten beyond these, the tenant's newest; failures stay."""


@dataclass(frozen=True, slots=True)
class Item:
    """One document of a job: to be put, or to be deleted; or an index version to be built, with its id as `name`."""

    job: int
    n: int
    job_id: str
    source: str
    tenant: str
    action: Action
    name: str
    document_id: str
    version: str
    """SHA-256 of the bytes that came, or that are expected; empty where that is not known yet."""
    media_type: str | None
    metadata: dict[str, Any]
    size_bytes: int
    spool: str | None
    """The file that holds the bytes until they are ingested."""
    state: ItemState
    outcome: Outcome | None
    embedded: int
    reused: int
    error: str | None
    """The kind of error: a class of `retrieval.errors`, and for LimitExceeded a dot and the limit."""
    message: str | None
    attempts: int
    finished_at: datetime | None
    groups: tuple[str, ...] = ()
    """Whom the document is for, or was."""
    groups_of_writer: frozenset[str] | None = None
    """Of whom it is done for; None is who sees everything."""
    stage: str | None = None
    """What is being done with it now."""
    passages_done: int = 0
    passages: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Which item it is."""
        return self.job, self.n

    @property
    def scope(self) -> Scope:
        """Of whom it is done for."""
        return Scope(self.tenant, groups=self.groups_of_writer)


@dataclass(frozen=True, slots=True)
class Job:
    """What was accepted together, and how far it is."""

    number: int
    id: str
    tenant: str
    kind: Kind
    source: str
    created_by: str
    state: JobState
    unchanged: int
    """Documents of the manifest that needed nothing."""
    created_at: datetime
    finished_at: datetime | None
    counts: Mapping[ItemState, int] = field(default_factory=dict)
    outcomes: Mapping[Outcome, int] = field(default_factory=dict)
    embedded: int = 0
    reused: int = 0
    failures: tuple[Item, ...] = ()
    """The first few items that failed."""
    running: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that could not be taken in the version that came last."""

    document_id: str
    name: str
    source: str
    version: str
    error: str
    message: str
    job_id: str
    failed_at: datetime


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a manifest: a name, and the SHA-256 of its bytes in hex, or what the source calls them.

    Without metadata a document keeps what it has.
    """

    name: str
    version: str = ""
    metadata: dict[str, Any] | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What makes a source equal to a manifest."""

    added: tuple[Entry, ...]
    modified: tuple[Entry, ...]
    deleted: tuple[tuple[str, str], ...]
    """Name and id of each document that the manifest no longer has."""
    failed: tuple[Failure, ...]
    """Files that could not be taken before, in these very bytes: they are not asked for again."""
    owned: tuple[tuple[Entry, str], ...]
    """Files whose name belongs to another source, with its name, or to a document that is for others: then without."""
    adopted: tuple[str, ...]
    """Ids of documents that are as the manifest has them and came without a source."""
    unchanged: int
    """Documents that are as the manifest has them, the adopted ones too."""
    present: int
    """Documents that the source has now."""
    groups: tuple[str, ...] | None = None
    """Whom the documents are to be for; None leaves those that are there to whom they are for."""


class Tally(Protocol):
    """Who counts what ingestion does."""

    def ingested(self, outcome: str, seconds: float) -> None:
        """A document was created, replaced, unchanged, deleted or refused."""
        ...

    def embedded(self, embedded: int, reused: int) -> None:
        """So many passages of a document were embedded, and so many had a vector already."""
        ...
