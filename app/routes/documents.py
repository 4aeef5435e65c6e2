"""Documents in, passages out: `/v1/documents` and `/v1/search`."""

import binascii
from collections.abc import Awaitable
from time import perf_counter
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from app.access import Caller
from app.errors import InvalidRequest, PayloadTooLarge, UnsupportedMedia, from_retrieval
from app.links import VERSION_DIGITS
from app.routes.dependencies import CallerDep, Services, ServicesDep, errors, own_address
from app.routes.errors import invalid_fields
from app.routes.schemas import (
    Deleted,
    DocumentFile,
    DocumentList,
    DocumentObject,
    DocumentUpload,
    HitObject,
    IngestedObject,
    PassageList,
    PassageObject,
    SearchRequest,
    SearchResponse,
    SourceObject,
)
from observability import genai
from observability.metrics import Metrics
from retrieval.documents import Ingested, Passage, Scope
from retrieval.errors import RetrievalError

_SMALL_BYTES = 65_536
"""A body that is read quicker than a thread is asked to."""
_STEP = 4 * 65_536
_FORM_FIELD_BYTES = 1_000_000
"""Largest field of a form that is not the file."""

DocumentId = Annotated[str, Path(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")]
PassageNumber = Annotated[int, Path(ge=1, le=2**31)]


_UPLOAD_BODY = {
    # openapi-python-client 0.29 forgets an import where an operation has two kinds of body and no optional parameter.
    "parameters": [
        {
            "name": "traceparent",
            "in": "header",
            "required": False,
            "description": "The trace this upload belongs to (W3C Trace Context).",
            "schema": {"type": "string"},
        }
    ],
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
    status_code=201,
    responses=errors(413, 415, 422, 429, 503) | {200: {"model": IngestedObject, "description": "Already there."}},
    openapi_extra=_UPLOAD_BODY,
)
async def add_document(
    request: Request, response: Response, services: ServicesDep, caller: CallerDep
) -> IngestedObject:
    """Add a document, as JSON or as a form with a file.

    The same bytes under the same name change nothing (200); other bytes replace the document, all at once.
    """
    caller.require("documents:write")
    upload = await _read_upload(request, services.max_document_bytes)
    started = perf_counter()
    ingested = await _refusing(
        services.retriever.add(
            Scope(caller.tenant),
            name=upload.name,
            content=upload.content,
            media_type=upload.media_type,
            metadata=upload.metadata,
        ),
        services.metrics,
        started,
    )
    services.metrics.ingested(ingested.outcome, perf_counter() - started)
    if ingested.outcome == "unchanged":
        response.status_code = 200
    return IngestedObject(
        document=DocumentObject.of(ingested.document),
        outcome=ingested.outcome,
        embedded_passages=ingested.embedded_passages,
    )


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
    """List the tenant's documents by id, a page at a time."""
    caller.require("documents:read")
    found = await services.retriever.documents(Scope(caller.tenant), limit=limit, after=after)
    following = found[-1].id if len(found) == limit else None
    return DocumentList(data=[DocumentObject.of(document) for document in found], next=following)


@routes.get("/v1/documents/{document_id}", operation_id="get_document", responses=errors(404, 503))
async def get_document(services: ServicesDep, caller: CallerDep, document_id: DocumentId) -> DocumentObject:
    """Describe one document."""
    caller.require("documents:read")
    return DocumentObject.of(await services.retriever.document(Scope(caller.tenant), document_id))


@routes.delete("/v1/documents/{document_id}", operation_id="delete_document", responses=errors(404, 503))
async def delete_document(services: ServicesDep, caller: CallerDep, document_id: DocumentId) -> Deleted:
    """Delete a document: from now on no search finds it and no link opens it."""
    caller.require("documents:write")
    started = perf_counter()
    await services.retriever.delete(Scope(caller.tenant), document_id)
    services.metrics.ingested("deleted", perf_counter() - started)
    return Deleted(id=document_id)


@routes.get("/v1/documents/{document_id}/source", operation_id="get_source", responses=errors(404, 503))
async def get_source(services: ServicesDep, caller: CallerDep, document_id: DocumentId) -> SourceObject:
    """Give the text that the document's offsets count in."""
    caller.require("documents:read")
    return SourceObject(
        document_id=document_id, text=await services.retriever.source(Scope(caller.tenant), document_id)
    )


@routes.get("/v1/documents/{document_id}/passages", operation_id="list_passages", responses=errors(404, 503))
async def list_passages(services: ServicesDep, caller: CallerDep, document_id: DocumentId) -> PassageList:
    """List a document's passages in order."""
    caller.require("documents:read")
    found = await services.retriever.passages(Scope(caller.tenant), document_id)
    return PassageList(data=[PassageObject.of(passage) for passage in found])


@routes.get(
    "/v1/documents/{document_id}/passages/{n}",
    operation_id="get_passage",
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
    passage = await services.retriever.passage(Scope(caller.tenant), document_id, n, version=version)
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
            Scope(caller.tenant, body.filter or {}), body.query, top_k=body.top_k, mode=body.mode
        )
    except BaseException as error:
        genai.end_retrieval(trace, span, seconds=perf_counter() - started, error=error)
        if isinstance(error, RetrievalError):
            raise from_retrieval(error, param="filter") from error
        raise
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
    )


def _url(services: Services, request: Request, caller: Caller, passage: Passage) -> str:
    path = services.links.path(caller.tenant, passage.document_id, passage.n, passage.document_version)
    return (services.public_url or own_address(request)) + path


class Upload(msgspec.Struct, frozen=True):
    """An uploaded document, whatever form it came in."""

    name: str
    content: bytes
    media_type: str | None
    metadata: dict[str, Any]


async def _refusing(adding: Awaitable[Ingested], metrics: Metrics, started: float) -> Ingested:
    """Await an ingestion, counting a refusal."""
    try:
        return await adding
    except RetrievalError:
        metrics.ingested("refused", perf_counter() - started)
        raise


async def _read_upload(request: Request, max_bytes: int) -> Upload:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        upload = await _read_form(request)
    elif kind in ("application/json", ""):
        body = await request.body()
        upload = _read_json(body) if len(body) < _SMALL_BYTES else await run_in_threadpool(_read_json, body)
    else:
        raise UnsupportedMedia(f"`content-type` is {kind!r}; send application/json or multipart/form-data.")
    if len(upload.content) > max_bytes:
        raise PayloadTooLarge(f"A document may have {max_bytes} bytes (setting `limits.max_document_bytes`).")
    return upload


async def _read_form(request: Request) -> Upload:
    async with request.form(max_files=1, max_fields=8, max_part_size=_FORM_FIELD_BYTES) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("`file`: the form needs a file under this name.", param="file")
        media_type = file.content_type if file.content_type != "application/octet-stream" else None
        facts = {
            "name": form.get("name") or file.filename or "",
            "media_type": media_type,
            "metadata": _read_metadata(form.get("metadata") or "{}"),
        }
        content = await file.read()
    try:
        asked = DocumentUpload.model_validate(facts)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False, include_input=False)) from None
    return Upload(asked.name, content, asked.media_type, dict(asked.metadata))


def _read_metadata(field: str | UploadFile) -> Any:
    try:
        return msgspec.json.decode(field if isinstance(field, str) else b"")
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise InvalidRequest("`metadata`: this form field must hold a JSON object.", param="metadata") from error


def _read_json(body: bytes) -> Upload:
    try:
        asked = DocumentUpload.model_validate_json(body)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False, include_input=False)) from None
    if (asked.text is None) == (asked.content_base64 is None):
        raise InvalidRequest("Send the document as `text` or as `content_base64`, one of the two.", param="text")
    if asked.text is not None:
        try:
            content = asked.text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("`text` has half of a surrogate pair.", param="text") from error
        media_type = asked.media_type or (None if "." in asked.name else "text/plain")
        return Upload(asked.name, content, media_type, dict(asked.metadata))
    try:
        content = _from_base64(asked.content_base64 or "")
    except ValueError as error:
        raise InvalidRequest("`content_base64` is not base64.", param="content_base64") from error
    return Upload(asked.name, content, asked.media_type, dict(asked.metadata))


def _from_base64(text: str) -> bytes:
    """Decode step by step: one call for the whole would keep the interpreter's lock, and every other request waiting.

    Raises:
        ValueError: it is not base64.
    """
    pieces = [binascii.a2b_base64(text[at : at + _STEP], strict_mode=True) for at in range(0, len(text), _STEP)]
    if any(len(piece) != _STEP // 4 * 3 for piece in pieces[:-1]):
        raise ValueError("padding in the middle")
    return b"".join(pieces)


def _readable(passage: Passage) -> str:
    """A passage for a person's eyes, as text: nothing in a document is ever run in their browser."""
    where = [passage.document_title or passage.document_name, *passage.heading_path]
    page = f"\npage {passage.page}" if passage.page else ""
    return f"{' > '.join(dict.fromkeys(where))}{page}\n{passage.document_name}, passage {passage.n}\n\n{passage.text}\n"
