"""Documents in, passages out: `/v1/documents` and `/v1/search`."""

import asyncio
import contextlib
import re
from time import perf_counter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse

from app.access import Caller
from app.errors import InvalidRequest, from_retrieval
from app.links import VERSION_DIGITS
from app.routes.dependencies import CallerDep, Services, ServicesDep, errors, own_address
from app.routes.indexes import SCOPE as INDEX_SCOPE
from app.routes.job_schemas import JobObject
from app.routes.releases import author
from app.routes.schemas import (
    Deleted,
    DocumentList,
    DocumentObject,
    HitObject,
    IngestedObject,
    PassageList,
    PassageObject,
    SearchRequest,
    SearchResponse,
    SourceObject,
)
from app.routes.upload_schemas import DocumentFile, DocumentUpload
from app.routes.uploads import read_upload
from observability import genai
from retrieval.documents import Ingested, Passage, Scope
from retrieval.errors import RetrievalError
from retrieval.preparing import PREPARED
from retrieval.variety import Variety

MAX_WAIT_SECONDS = 300.0
_PREFER = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})", re.IGNORECASE)

DocumentId = Annotated[str, Path(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")]
PassageNumber = Annotated[int, Path(ge=1, le=2**31)]


_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/DocumentUpload"}},
            "multipart/form-data": {"schema": {"$ref": "#/components/schemas/DocumentFile"}},
        },
    },
}
UPLOAD_SCHEMAS = (DocumentUpload, DocumentFile)
"""What `_UPLOAD_BODY` refers to and FastAPI cannot see."""

routes = APIRouter(tags=["documents"])
search_routes = APIRouter(tags=["search"])


@routes.post(
    "/v1/documents",
    operation_id="add_document",
    status_code=202,
    response_model=JobObject,
    responses=errors(404, 409, 413, 415, 422, 429, 503)
    | {
        200: {"model": IngestedObject, "description": "With `wait`: it was there already, as it is."},
        201: {"model": IngestedObject, "description": "With `wait`: it is ingested."},
        202: {"model": JobObject, "description": "Accepted: it is on the disk, and its job is listed."},
    },
    openapi_extra=_UPLOAD_BODY,
)
async def add_document(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    wait: Annotated[
        float | None,
        Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for what becomes of it; `Prefer: wait=` too."),
    ] = None,
    job: Annotated[
        str | None, Query(max_length=64, description="The synchronisation that waits for this file.")
    ] = None,
) -> Any:
    """Add a document: as JSON, as a form with a file, or by the URL it is at, if the service's settings allow.

    It is accepted at once, with a job that ingests it. The same bytes under the same name change nothing; other bytes
    replace the document, all at once. With `wait` the answer is what became of it, if that is known in time. With
    `groups` only callers in one of them see it; without, those who saw what it replaces, and for a new one all.
    A file of the type `application/vnd.hallmark.prepared+msgpack` was parsed, cut and embedded by
    `hallmark ingest --ray`, and asks for the scope `indexes:manage` too.
    """
    caller.require("documents:write")
    upload = await read_upload(request, services.max_document_bytes)
    if upload.media_type == PREPARED:
        caller.require(INDEX_SCOPE)  # What is in an index is taken on trust.
    caller.require_may_give_to(upload.groups)
    scope, ingestion = caller.sees(), services.ingestion
    if job is not None:
        found = await ingestion.deliver(
            scope,
            job,
            name=upload.name,
            content=upload.content,
            media_type=upload.media_type,
            etag=upload.etag,
        )
        return JobObject.of(found)
    if upload.etag:
        raise InvalidRequest("`etag` goes with `job`: a document by itself is compared by its bytes.", param="etag")
    accepted = await ingestion.accept(
        scope,
        name=upload.name,
        content=upload.content,
        media_type=upload.media_type,
        metadata=upload.metadata,
        groups=upload.groups,
        who=author(caller),
    )
    seconds = wait if wait is not None else _preferred_wait(request)
    if seconds:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                ingested = await asyncio.shield(accepted.ended)
                return _ingested(ingested, accepted.job_id)
    return JobObject.of(await ingestion.job(scope, accepted.job_id))


def _ingested(ingested: Ingested, job_id: str) -> Response:
    shown = IngestedObject(
        document=DocumentObject.of(ingested.document),
        outcome=ingested.outcome,
        embedded_passages=ingested.embedded_passages,
        job=job_id,
    )
    status = 200 if ingested.outcome == "unchanged" else 201
    return Response(shown.model_dump_json(), status_code=status, media_type="application/json")


def _preferred_wait(request: Request) -> float:
    """What RFC 7240's header asks for; more than we wait is as much as we wait."""
    found = _PREFER.search(request.headers.get("prefer", ""))
    return min(MAX_WAIT_SECONDS, float(found[1])) if found else 0.0


@routes.get(
    "/v1/documents",
    operation_id="list_documents",
    responses=errors(503),
)
async def list_documents(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    after: Annotated[str | None, Query(max_length=128)] = None,
) -> DocumentList:
    """List the documents that the caller sees by id, a page at a time."""
    caller.require("documents:read")
    found = await services.retriever.documents(caller.sees(), limit=limit, after=after)
    following = found[-1].id if len(found) == limit else None
    return DocumentList(data=[DocumentObject.of(document) for document in found], next=following)


@routes.get("/v1/documents/{document_id}", operation_id="get_document", responses=errors(404, 503))
async def get_document(services: ServicesDep, caller: CallerDep, document_id: DocumentId) -> DocumentObject:
    """Describe one document."""
    caller.require("documents:read")
    return DocumentObject.of(await services.retriever.document(caller.sees(), document_id))


@routes.delete("/v1/documents/{document_id}", operation_id="delete_document", responses=errors(404, 503))
async def delete_document(services: ServicesDep, caller: CallerDep, document_id: DocumentId) -> Deleted:
    """Delete a document: from now on no search finds it and no link opens it.

    What was accepted for it before and is not ingested yet is cancelled.
    """
    caller.require("documents:write")
    started = perf_counter()
    await services.ingestion.delete(caller.sees(), document_id)
    services.metrics.ingested("deleted", perf_counter() - started)
    return Deleted(id=document_id)


@routes.get("/v1/documents/{document_id}/source", operation_id="get_source", responses=errors(404, 503))
async def get_source(services: ServicesDep, caller: CallerDep, document_id: DocumentId) -> SourceObject:
    """Give the text that the document's offsets count in."""
    caller.require("documents:read")
    return SourceObject(document_id=document_id, text=await services.retriever.source(caller.sees(), document_id))


@routes.get("/v1/documents/{document_id}/passages", operation_id="list_passages", responses=errors(404, 503))
async def list_passages(services: ServicesDep, caller: CallerDep, document_id: DocumentId) -> PassageList:
    """List a document's passages in order."""
    caller.require("documents:read")
    found = await services.retriever.passages(caller.sees(), document_id)
    return PassageList(data=[PassageObject.of(passage) for passage in found])


def _of_link(
    tenant: Annotated[str | None, Query(include_in_schema=False)] = None,
    signature: Annotated[str | None, Query(include_in_schema=False)] = None,
) -> None:
    """What a citation's own link carries besides: the door has read it."""


@routes.get(
    "/v1/documents/{document_id}/passages/{n}",
    operation_id="get_passage",
    dependencies=[Depends(_of_link)],
    response_model=PassageObject,
    responses=errors(404, 410, 503) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def get_passage(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    document_id: DocumentId,
    n: PassageNumber,
    version: Annotated[str | None, Query(min_length=VERSION_DIGITS, max_length=64, pattern="^[0-9a-f]+$")] = None,
) -> Any:
    """Show a cited passage: as JSON, or as plain text to a browser.

    With `version` it is the passage of that document version or 410. A citation's own link carries a signature
    and needs no key.
    """
    if "passage" not in caller.scopes:
        caller.require("documents:read")
        scope = caller.sees()
    else:
        scope = Scope.whole(caller.tenant)  # The link names this very passage, and was made for who saw it.
    passage = await services.retriever.passage(scope, document_id, n, version=version)
    if "text/html" in request.headers.get("accept", ""):
        return PlainTextResponse(_readable(passage), headers={"x-content-type-options": "nosniff"})
    return PassageObject.of(passage)


@search_routes.post("/v1/search", operation_id="search", responses=errors(413, 503))
async def search(request: Request, services: ServicesDep, caller: CallerDep, body: SearchRequest) -> SearchResponse:
    """Find passages by meaning and by words, showing what each leg thought of them."""
    caller.require("documents:read")
    trace, started = services.telemetry.current(), perf_counter()
    span = genai.start_retrieval(trace, collection=services.collection, mode=body.mode, top_k=body.top_k)
    try:
        result = await services.retriever.search(
            caller.sees(body.filter),
            body.query,
            top_k=body.top_k,
            mode=body.mode,
            variety=Variety(body.per_document, body.mmr),
        )
    except BaseException as error:
        genai.end_retrieval(trace, span, seconds=perf_counter() - started, error=error)
        if isinstance(error, RetrievalError):
            raise from_retrieval(error, param="filter") from error
        raise
    if result.rerank_seconds is not None:
        services.metrics.rerank_seconds.observe(result.rerank_seconds)
    genai.end_retrieval(
        trace,
        span,
        seconds=perf_counter() - started,
        collection=services.collection,
        hits=len(result.hits),
        index_version=result.index_version,
        embedding_model=result.embedding_model,
        embed_seconds=result.embed_seconds,
        search_seconds=result.search_seconds,
    )
    return SearchResponse(
        hits=[HitObject.of(hit, _url(services, request, caller, hit.passage)) for hit in result.hits],
        index_version=result.index_version,
        embed_seconds=result.embed_seconds,
        search_seconds=result.search_seconds,
        rerank_seconds=result.rerank_seconds,
        reranking_model=result.reranking_model,
    )


def _url(services: Services, request: Request, caller: Caller, passage: Passage) -> str:
    path = services.links.path(caller.tenant, passage.document_id, passage.n, passage.document_version)
    return (services.public_url or own_address(request)) + path


def _readable(passage: Passage) -> str:
    """A passage for a person's eyes, as text: nothing in a document is ever run in their browser."""
    where = [passage.document_title or passage.document_name, *passage.heading_path]
    page = f"\npage {passage.page}" if passage.page else ""
    return f"{' > '.join(dict.fromkeys(where))}{page}\n{passage.document_name}, passage {passage.n}\n\n{passage.text}\n"
