"""Drift over HTTP: what the worker has found, and other references."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool

from app.releases import LABEL_PATTERN
from app.routes.bodies import read_as
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.drift_schemas import DriftReport, ReferenceObject, ReferenceRequest, ReleaseDrift
from app.routes.releases import author

REFERENCE_SCHEMAS = (ReferenceRequest,)
"""What `_REFERENCE_BODY` refers to and FastAPI cannot see."""
_REFERENCE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ReferenceRequest"}}},
    }
}

routes = APIRouter()


@routes.get("/v1/drift", operation_id="get_drift", tags=["quality"], responses=errors(503))
async def get_drift(
    services: ServicesDep,
    caller: CallerDep,
    release: Annotated[
        str | None, Query(max_length=80, pattern=LABEL_PATTERN, description="Only this one, as `name@3`.")
    ] = None,
    windows: Annotated[int, Query(ge=1, le=200, description="How many of the last windows of each are shown.")] = 20,
) -> DriftReport:
    """Report whether what is asked of each release, or what it answers, has changed; for the key's own tenant."""
    caller.require("quality:read")
    found = await services.drift.followed(caller.tenant, release, windows=windows)
    return DriftReport(data=[ReleaseDrift.of(each) for each in found])


@routes.post(
    "/v1/drift/references",
    operation_id="create_drift_reference",
    tags=["quality"],
    status_code=201,
    responses=errors(404, 409, 413, 503),
    openapi_extra=_REFERENCE_BODY,
)
async def create_drift_reference(services: ServicesDep, caller: CallerDep, request: Request) -> ReferenceObject:
    """Have a release's next windows compared with something else: traffic of a time, a dataset, or questions.

    The reference gets the next version; an alarm that was raised with the last one ends with the next window.
    """
    caller.require("releases:write")
    asked = await run_in_threadpool(read_as, ReferenceRequest, await request.body())
    kind, who = asked.kind(), author(caller)
    await services.registry.get(asked.release)
    references, tenant = services.drift_references, caller.tenant
    if kind == "traffic" and asked.since and asked.until:
        made = await references.from_traffic(tenant, asked.release, since=asked.since, until=asked.until, who=who)
    elif asked.questions:
        packed = await run_in_threadpool(asked.questions.packed)
        made = await references.from_questions(tenant, asked.release, packed, name=asked.questions.name, who=who)
    else:
        made = await references.from_dataset(tenant, asked.release, asked.dataset or "", who=who)
    return ReferenceObject.of(made)
