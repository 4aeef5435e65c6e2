"""Ingestion jobs and synchronisations as JSON."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from app.errors import ServiceError, from_retrieval
from app.routes.schemas import Fact, Groups, Key, Name, Wire
from app.routes.upload_schemas import METADATA
from retrieval import errors as retrieval_errors
from retrieval.errors import RetrievalError
from retrieval.jobs import Entry, Failure, Item, Job, Plan

MAX_MANIFEST = 100_000
SOURCE = r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$"
SHA256 = r"^[0-9a-f]{64}$"

Source = Annotated[str, Field(pattern=SOURCE)]
State = Literal["waiting", "running", "done", "failed", "cancelled"]
ItemState = Literal["expected", "waiting", "running", "done", "failed", "cancelled"]
Outcome = Literal["created", "replaced", "unchanged", "deleted", "built"]


class JobError(BaseModel):
    """Why a document was not taken; `code` is one of the API's."""

    code: str
    message: str

    @classmethod
    def of(cls, kind: str | None, message: str | None) -> "JobError | None":
        """What an upload that waited would have been told."""
        if kind is None:
            return None
        if kind == "NotUploaded":
            return cls(code="not_found", message=message or "")
        name, _, limit = kind.partition(".")
        found: Any = getattr(retrieval_errors, name, RetrievalError)
        error = from_retrieval(found(message or "", limit) if limit else found(message or ""))
        return cls(code=error.code, message=message or "" if type(error) is ServiceError else error.message)


class JobDocument(BaseModel):
    """One document of a job; of a `build` the index version, by its id in `name`."""

    n: int = Field(description="Its place in the job.")
    object: Literal["job.document"] = "job.document"
    action: Literal["put", "delete", "build"]
    name: str
    document_id: str
    version: str = Field(description="SHA-256 of its bytes; empty where it is deleted, or not known yet.")
    size_bytes: int
    state: ItemState
    stage: str | None = Field(description="What is being done with it: parsing, splitting, embedding or writing.")
    passages_done: int = Field(description="Passages that are embedded, while it runs.")
    passages: int = Field(description="Of how many, once that is known.")
    outcome: Outcome | None
    embedded_passages: int
    reused_passages: int = Field(description="Passages whose vector was there already.")
    error: JobError | None
    attempts: int
    finished_at: datetime | None

    @classmethod
    def of(cls, item: Item) -> "JobDocument":
        """The document as it is shown."""
        return cls(
            n=item.n,
            action=item.action,
            name=item.name,
            document_id=item.document_id,
            version=item.version,
            size_bytes=item.size_bytes,
            state=item.state,
            stage=item.stage,
            passages_done=item.passages_done,
            passages=item.passages,
            outcome=item.outcome,
            embedded_passages=item.embedded,
            reused_passages=item.reused,
            error=JobError.of(item.error, item.message),
            attempts=item.attempts,
            finished_at=item.finished_at,
        )


class JobCounts(BaseModel):
    """How many documents of a job are in which state."""

    expected: int = Field(description="Files of a synchronisation that were not uploaded yet.")
    waiting: int
    running: int
    done: int
    failed: int
    cancelled: int


class JobOutcomes(BaseModel):
    """What became of the documents that are done."""

    created: int
    replaced: int
    unchanged: int = Field(description="Those of a manifest that needed nothing are among them.")
    deleted: int
    built: int = Field(description="Index versions.")


class JobObject(BaseModel):
    """A job: what was accepted together, and how far it is."""

    id: str
    object: Literal["job"] = "job"
    kind: Literal["upload", "sync", "build"]
    state: State = Field(description="`failed`: it has ended, and at least one document was not taken.")
    source: str
    created_by: str
    created_at: datetime
    finished_at: datetime | None
    counts: JobCounts
    outcomes: JobOutcomes
    embedded_passages: int
    reused_passages: int
    running: list[JobDocument] = Field(description="What is being worked on.")
    failed: list[JobDocument] = Field(description="The first ten documents that were not taken.")

    @classmethod
    def of(cls, job: Job) -> "JobObject":
        """The job as it is shown."""
        counts = {state: job.counts.get(state, 0) for state in JobCounts.model_fields}  # type: ignore[call-overload]
        outcomes = {outcome: job.outcomes.get(outcome, 0) for outcome in JobOutcomes.model_fields}  # type: ignore[call-overload]
        outcomes["unchanged"] += job.unchanged
        return cls(
            id=job.id,
            kind=job.kind,
            state=job.state,
            source=job.source,
            created_by=job.created_by,
            created_at=job.created_at,
            finished_at=job.finished_at,
            counts=JobCounts(**counts),
            outcomes=JobOutcomes(**outcomes),
            embedded_passages=job.embedded,
            reused_passages=job.reused,
            running=[JobDocument.of(item) for item in job.running],
            failed=[JobDocument.of(item) for item in job.failures],
        )


class JobList(BaseModel):
    """One page of jobs, newest first; `next` is the `before` of the next one."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    next: str | None = None


class JobDocumentList(BaseModel):
    """One page of a job's documents, in order; `next` is the `after` of the next one."""

    object: Literal["list"] = "list"
    data: list[JobDocument]
    next: int | None = None


class FailedDocument(BaseModel):
    """A document that was not taken when it came last; an older version of it may be there still."""

    document_id: str
    object: Literal["document.failed"] = "document.failed"
    name: str
    source: str
    version: str
    error: JobError
    job: str
    failed_at: datetime

    @classmethod
    def of(cls, failure: Failure) -> "FailedDocument":
        """The failure as it is shown."""
        error = JobError.of(failure.error, failure.message)
        assert error
        return cls(
            document_id=failure.document_id,
            name=failure.name,
            source=failure.source,
            version=failure.version,
            error=error,
            job=failure.job_id,
            failed_at=failure.failed_at,
        )


class FailedDocumentList(BaseModel):
    """One page of documents that were not taken, by id; `next` is the `after` of the next one."""

    object: Literal["list"] = "list"
    data: list[FailedDocument]
    next: str | None = None


class ManifestEntry(Wire):
    """One file of a manifest; it is asked for unless its version or its ETag tells that it is there already."""

    name: Name
    version: str | None = Field(None, pattern=SHA256, description="SHA-256 of its bytes, in hex.")
    etag: str | None = Field(None, max_length=256, description="What the source calls its bytes, in place of that.")
    metadata: dict[Key, Fact] | None = Field(None, max_length=32, description=METADATA)


class SyncRequest(Wire):
    """A folder as it is: what a source's documents are to be."""

    source: Source = Field(description="What the folder goes by: documents of other sources are left alone.")
    documents: list[ManifestEntry] = Field(max_length=MAX_MANIFEST)
    delete: bool = Field(True, description="Delete the source's documents that are not named.")
    max_deletes: int | None = Field(
        None, ge=0, description="Refuse if more would go; by default half of the source, or 5 if that is more."
    )
    retry_failed: bool = Field(False, description="Ask for files again that failed in these very bytes.")
    dry_run: bool = Field(False, description="Say what would be done, and do nothing.")
    groups: Groups | None = None

    def manifest(self) -> list[Entry]:
        """The files that are named."""
        return [Entry(each.name, each.version or "", each.metadata, each.etag or "") for each in self.documents]


class DeletedDocument(BaseModel):
    """A document that the manifest no longer has."""

    id: str
    name: str


class SyncObject(BaseModel):
    """What makes the source equal to the manifest: upload what was added and modified, with this job."""

    object: Literal["sync"] = "sync"
    source: str
    dry_run: bool
    added: list[str]
    modified: list[str]
    deleted: list[DeletedDocument]
    failed: list[FailedDocument] = Field(description="Not asked for again: they failed in these very bytes.")
    conflicts: list[str] = Field(description="Names that belong to another source, or to a document for others.")
    unchanged: int
    job: JobObject | None = Field(description="Null for a dry run.")

    @classmethod
    def of(cls, source: str, plan: Plan, job: Job | None) -> "SyncObject":
        """The plan as it is shown."""
        return cls(
            source=source,
            dry_run=job is None,
            added=_names(plan.added),
            modified=_names(plan.modified),
            deleted=[DeletedDocument(id=identity, name=name) for name, identity in plan.deleted],
            failed=[FailedDocument.of(failure) for failure in plan.failed],
            conflicts=[entry.name for entry, _ in plan.owned],
            unchanged=plan.unchanged,
            job=JobObject.of(job) if job else None,
        )


def _names(entries: Sequence[Entry]) -> list[str]:
    return [entry.name for entry in entries]
