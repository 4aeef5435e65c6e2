"""Lineage over HTTP: what a prediction was made of, and the predictions that something was used for."""

from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

import msgspec
from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request, Response

from app.errors import NotFound, PayloadTooLarge
from app.lineage import Dataset, TrainingRun
from app.routes.bodies import decode_as
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.predictions import prediction_of
from app.routes.registry_schemas import moment
from app.routes.releases import author

routes = APIRouter()

MAX_DATASET_BYTES = 64_000_000

T = TypeVar("T")

DigestPath = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 in hex.")]
Label = Annotated[str, Path(max_length=80, description="`name@number`.")]
Limit = Annotated[int, Query(ge=1, le=200)]
Before = Annotated[UUID | None, Query(description="List those made before this one.")]


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """What was registered; `digest` is a dataset's own, or that of a training run's manifest."""

    object: Literal["dataset", "training_run"]
    id: str
    """A dataset's digest, a training run's id."""
    digest: str
    created_at: datetime
    created_by: str | None


def _described(answer: str, *, body: str | None = None, status: int = 200) -> dict[str, Any]:
    """Name the schemas of a route that reads and writes JSON itself."""

    def content(name: str) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}

    described: dict[str, Any] = {"responses": {str(status): content(answer)}}
    if body is not None:
        described["responses"]["200"] = {**content(answer), "description": "It was there already."}
        described["requestBody"] = {"required": True, **content(body)}
    return described


@routes.get(
    "/v1/predictions/{prediction_id}/lineage",
    operation_id="trace_prediction",
    tags=["lineage"],
    responses=errors(404, 503),
    openapi_extra=_described("Trace"),
)
async def trace_prediction(services: ServicesDep, caller: CallerDep, prediction_id: UUID) -> Response:
    """Show what a prediction was made of: its release, adapter, training run, dataset and documents.

    Every digest on the way is computed again. `verified` is false where one differs, and null where what it stands for
    is not at hand; `problems` say which and why.
    """
    prediction = await prediction_of(services, caller, prediction_id)
    return _json(await services.tracer.trace(prediction))


@routes.get(
    "/v1/lineage/documents/{document_id}",
    operation_id="find_uses_of_document",
    tags=["lineage"],
    responses=errors(503),
    openapi_extra=_described("UsedBy"),
)
async def find_uses_of_document(
    services: ServicesDep,
    caller: CallerDep,
    document_id: Annotated[str, Path(max_length=512, pattern=r"^[^\x00]*$")],
    version: Annotated[str | None, Query(max_length=128, pattern=r"^[^\x00]*$")] = None,
    cited: Annotated[bool | None, Query(description="Only those that cited it, or that did not.")] = None,
    limit: Limit = 50,
    before: Before = None,
) -> Response:
    """List the predictions that were given a document, newest first; of one version, or of all."""
    caller.require("predictions:read")
    found = await services.uses.of_document(
        caller.tenant, document_id, version=version, cited=cited, limit=limit, before=_text(before)
    )
    return _json(found)


@routes.get(
    "/v1/lineage/releases/{release}",
    operation_id="find_uses_of_release",
    tags=["lineage"],
    responses=errors(404, 503),
    openapi_extra=_described("UsedBy"),
)
async def find_uses_of_release(
    services: ServicesDep, caller: CallerDep, release: Label, limit: Limit = 50, before: Before = None
) -> Response:
    """List the predictions that a release made, newest first; also one that is deleted."""
    caller.require("predictions:read")
    return _json(await services.uses.of_release(caller.tenant, release, limit=limit, before=_text(before)))


@routes.get(
    "/v1/lineage/adapters/{digest}",
    operation_id="find_uses_of_adapter",
    tags=["lineage"],
    responses=errors(404, 503),
    openapi_extra=_described("UsedBy"),
)
async def find_uses_of_adapter(
    services: ServicesDep, caller: CallerDep, digest: DigestPath, limit: Limit = 50, before: Before = None
) -> Response:
    """List the predictions made with an adapter, newest first, and the releases that have it."""
    caller.require("predictions:read")
    return _json(await services.uses.of_adapter(caller.tenant, digest, limit=limit, before=_text(before)))


@routes.get(
    "/v1/lineage/dataset-rows/{digest}",
    operation_id="find_uses_of_dataset_row",
    tags=["lineage"],
    responses=errors(404, 503),
    openapi_extra=_described("UsedBy"),
)
async def find_uses_of_dataset_row(
    services: ServicesDep, caller: CallerDep, digest: DigestPath, limit: Limit = 50, before: Before = None
) -> Response:
    """List the predictions of what was trained on an example, newest first, and all that lies between."""
    caller.require("predictions:read")
    return _json(await services.uses.of_dataset_row(caller.tenant, digest, limit=limit, before=_text(before)))


@routes.get(
    "/v1/lineage/datasets/{digest}",
    operation_id="trace_dataset",
    tags=["lineage"],
    responses=errors(404, 503),
    openapi_extra=_described("DatasetPage"),
)
async def trace_dataset(
    services: ServicesDep,
    caller: CallerDep,
    digest: DigestPath,
    limit: Limit = 50,
    after: Annotated[str | None, Query(pattern=r"^[0-9a-f]{64}$", description="List the rows after this one.")] = None,
) -> Response:
    """Verify a dataset, and list its rows with the predictions and labels that they came from."""
    caller.require("predictions:read")
    page = await services.tracer.dataset(caller.tenant, digest, limit=limit, after=after)
    if page.dataset.name is None:
        raise NotFound(f"There is no dataset with the digest {digest!r}.")
    return _json(page)


@routes.post(
    "/v1/lineage/datasets",
    operation_id="register_dataset",
    tags=["lineage"],
    status_code=201,
    responses=errors(409, 413, 503),
    openapi_extra=_described("Registered", body="Dataset", status=201),
)
async def register_dataset(services: ServicesDep, caller: CallerDep, request: Request) -> Response:
    """Register a dataset by its manifest and the digests of its rows; the same again changes nothing."""
    caller.require("releases:write")
    given = await _body(request, Dataset)
    row, is_new = await services.provenance.add_dataset(caller.tenant, given, who=author(caller))
    told = Registered(
        object="dataset",
        id=row.digest,
        digest=row.digest,
        created_at=moment(row.created_at),
        created_by=row.created_by,
    )
    return _json(told, status=201 if is_new else 200)


@routes.post(
    "/v1/lineage/training-runs",
    operation_id="register_training_run",
    tags=["lineage"],
    status_code=201,
    responses=errors(409, 413, 503),
    openapi_extra=_described("Registered", body="TrainingRun", status=201),
)
async def register_training_run(services: ServicesDep, caller: CallerDep, request: Request) -> Response:
    """Register a training run by its manifest; the same again changes nothing."""
    caller.require("releases:write")
    given = await _body(request, TrainingRun)
    row, is_new = await services.provenance.add_training_run(caller.tenant, given, who=author(caller))
    told = Registered(
        object="training_run",
        id=row.id,
        digest=row.digest,
        created_at=moment(row.created_at),
        created_by=row.created_by,
    )
    return _json(told, status=201 if is_new else 200)


async def _body(request: Request, kind: type[T]) -> T:
    content = await request.body()
    if len(content) > MAX_DATASET_BYTES:
        raise PayloadTooLarge(f"What is registered may have {MAX_DATASET_BYTES} bytes.")
    return await to_thread.run_sync(decode_as, kind, content)


def _json(answer: msgspec.Struct, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status_code=status, media_type="application/json")


def _text(before: UUID | None) -> str | None:
    return str(before) if before else None
