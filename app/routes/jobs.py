"""Ingestion jobs over HTTP: list, follow, cancel; and synchronising a source with a manifest."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from app.errors import InvalidRequest
from app.routes.bodies import read_as
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.job_schemas import (
    FailedDocument,
    FailedDocumentList,
    ItemState,
    JobDocument,
    JobDocumentList,
    JobList,
    JobObject,
    SyncObject,
    SyncRequest,
)
from app.routes.releases import author

routes = APIRouter(tags=["documents"])

SYNC_SCHEMAS = (SyncRequest,)
"""What `_SYNC_BODY` refers to and FastAPI cannot see."""
_SYNC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/SyncRequest"}}},
    }
}

JobId = Annotated[str, Path(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9-]+$")]
Limit = Annotated[int, Query(ge=1, le=500)]


@routes.post(
    "/v1/documents/sync",
    operation_id="sync_documents",
    status_code=202,
    responses=errors(409, 413, 503) | {200: {"model": SyncObject, "description": "A dry run: nothing was done."}},
    openapi_extra=_SYNC_BODY,
)
async def sync_documents(request: Request, response: Response, services: ServicesDep, caller: CallerDep) -> SyncObject:
    """Make the documents of a source equal to a manifest: names, and the SHA-256 of each file.

    The reply says what was added, modified and deleted. Upload the first two with `POST /v1/documents?job=`; when they
    are ingested the deletions are made. An earlier synchronisation of the source that is not done is cancelled.
    """
    caller.require("documents:write")
    asked = await run_in_threadpool(_read, await request.body())
    caller.require_may_give_to(asked.groups)
    scope, ingestion = caller.sees(), services.ingestion
    plan = await ingestion.plan(
        scope,
        asked.source,
        asked.manifest(),
        delete=asked.delete,
        retry_failed=asked.retry_failed,
        groups=asked.groups,
    )
    if asked.dry_run:
        response.status_code = 200
        return SyncObject.of(asked.source, plan, None)
    job = await ingestion.begin(scope, asked.source, plan, who=author(caller), max_deletes=asked.max_deletes)
    return SyncObject.of(asked.source, plan, job)


@routes.get("/v1/failed-documents", operation_id="list_failed_documents", responses=errors(503))
async def list_failed_documents(
    services: ServicesDep,
    caller: CallerDep,
    limit: Limit = 50,
    after: Annotated[str, Query(max_length=128)] = "",
) -> FailedDocumentList:
    """List the documents that were not taken when they came last, a page at a time."""
    caller.require("documents:read")
    found = await services.ingestion.failures(caller.sees(), after=after, limit=limit)
    following = found[-1].document_id if len(found) == limit else None
    return FailedDocumentList(data=[FailedDocument.of(failure) for failure in found], next=following)


@routes.get("/v1/jobs", operation_id="list_jobs", responses=errors(404, 503))
async def list_jobs(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[str | None, Query(max_length=64)] = None,
    ended: Annotated[bool | None, Query(description="Those that have ended, or those that have not.")] = None,
) -> JobList:
    """List the jobs all of whose documents the caller sees, newest first, a page at a time."""
    caller.require("documents:read")
    is_open = None if ended is None else not ended
    found = await services.ingestion.jobs(caller.sees(), limit=limit, before=before, is_open=is_open)
    following = found[-1].id if len(found) == limit else None
    return JobList(data=[JobObject.of(job) for job in found], next=following)


@routes.get("/v1/jobs/{job_id}", operation_id="get_job", responses=errors(404, 503))
async def get_job(services: ServicesDep, caller: CallerDep, job_id: JobId) -> JobObject:
    """Tell how far a job is."""
    caller.require("documents:read")
    return JobObject.of(await services.ingestion.job(caller.sees(), job_id))


@routes.get("/v1/jobs/{job_id}/documents", operation_id="list_job_documents", responses=errors(404, 503))
async def list_job_documents(
    services: ServicesDep,
    caller: CallerDep,
    job_id: JobId,
    state: ItemState | None = None,
    limit: Limit = 50,
    after: Annotated[int, Query(ge=0, lt=2**31)] = 0,
) -> JobDocumentList:
    """List the documents of a job in order, all or those of one state."""
    caller.require("documents:read")
    found = await services.ingestion.items(caller.sees(), job_id, state=state, after=after, limit=limit)
    following = found[-1].n if len(found) == limit else None
    return JobDocumentList(data=[JobDocument.of(item) for item in found], next=following)


@routes.post("/v1/jobs/{job_id}/cancel", operation_id="cancel_job", responses=errors(404, 503))
async def cancel_job(services: ServicesDep, caller: CallerDep, job_id: JobId) -> JobObject:
    """Cancel a job: what it has done stays, and what it was at is as it was before."""
    caller.require("documents:write")
    return JobObject.of(await services.ingestion.cancel(caller.sees(), job_id))


@routes.post("/v1/jobs/{job_id}/complete", operation_id="complete_job", responses=errors(404, 503))
async def complete_job(services: ServicesDep, caller: CallerDep, job_id: JobId) -> JobObject:
    """Say that no more files of a synchronisation will come: those that did not are failures."""
    caller.require("documents:write")
    return JobObject.of(await services.ingestion.complete(caller.sees(), job_id))


def _read(body: bytes) -> SyncRequest:
    asked = read_as(SyncRequest, body)
    seen: set[str] = set()
    for each in asked.documents:
        if each.name in seen:
            raise InvalidRequest(f"`documents`: {each.name!r} is named twice.", param="documents")
        seen.add(each.name)
    return asked
