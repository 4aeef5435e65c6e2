"""Features over HTTP: what there are, what they are from when on, and what they were known to be."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Path, Request, Response

from app.errors import InvalidRequest
from app.features import BadRow, FeatureRow, FeatureView, rows_of
from app.features.asking import Asked, ask
from app.features.views import CREATED_TIME, EVENT_TIME
from app.releases import FEATURE_NAME_PATTERN
from app.routes.bodies import decode_as
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.feature_schemas import (
    FeatureRowRequest,
    FeatureRowsRequest,
    FeatureRowsWritten,
    FeatureValueObject,
    FeatureValuesRequest,
    FeatureValuesResponse,
    FeatureValuesRow,
    FeatureViewDeleted,
    FeatureViewList,
    FeatureViewObject,
    FeatureViewRequest,
)
from app.routes.releases import author

routes = APIRouter(tags=["features"])

View = Annotated[str, Path(pattern=FEATURE_NAME_PATTERN, description="The view's name.")]


@routes.get("/v1/features", operation_id="list_feature_views", responses=errors(503))
async def list_feature_views(services: ServicesDep, caller: CallerDep) -> FeatureViewList:
    """List the feature views; they are the same for all tenants, and each tenant has its own values in them."""
    caller.require("features:read")
    return FeatureViewList(data=[FeatureViewObject.of(view) for view in await services.features.store.describe()])


@routes.get("/v1/features/{view}", operation_id="get_feature_view", responses=errors(404, 503))
async def get_feature_view(services: ServicesDep, caller: CallerDep, view: View) -> FeatureViewObject:
    """Describe a feature view."""
    caller.require("features:read")
    return FeatureViewObject.of(await services.features.view(view))


@routes.put("/v1/features/{view}", operation_id="define_feature_view", responses=errors(409, 503))
async def define_feature_view(
    services: ServicesDep, caller: CallerDep, view: View, body: FeatureViewRequest
) -> FeatureViewObject:
    """Make a feature view, or add features to one.

    What releases and rows rely on stays: the entity, the subject, and the type of a feature there is.
    """
    caller.require("releases:write")
    try:
        defined = FeatureView(name=view, **body.model_dump())
    except ValueError as error:
        raise InvalidRequest(f"{error}.", param="features") from None
    await services.features.own.define(defined, who=author(caller))
    return FeatureViewObject.of(defined)


@routes.delete("/v1/features/{view}", operation_id="delete_feature_view", responses=errors(404, 409, 503))
async def delete_feature_view(services: ServicesDep, caller: CallerDep, view: View) -> FeatureViewDeleted:
    """Take a feature view away, with all that every tenant has in it; releases that name it then miss its features."""
    caller.require("releases:write")
    await services.features.own.delete(view)
    return FeatureViewDeleted(id=view)


@routes.post(
    "/v1/features/{view}/rows",
    operation_id="put_feature_rows",
    responses=errors(404, 409, 413, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/FeatureRowsRequest"}}},
        }
    },
)
async def put_feature_rows(
    services: ServicesDep, caller: CallerDep, view: View, request: Request
) -> FeatureRowsWritten:
    """Say what features are from a moment on; all rows are taken or none, and the same again adds nothing.

    Rows are never changed: a correction has the same `event_time`, and counts from when it was known.
    """
    caller.require("features:write")
    own = services.features.own
    there = await own.view(view)
    rows = await to_thread.run_sync(_read_rows, there, await request.body(), services.features.clock())
    put = await own.put(caller.tenant, there, rows)
    return FeatureRowsWritten(added=put.added, unchanged=put.unchanged)


@routes.post(
    "/v1/feature-values",
    operation_id="get_feature_values",
    response_model=FeatureValuesResponse,
    responses=errors(404, 413, 503),
)
async def get_feature_values(services: ServicesDep, caller: CallerDep, body: FeatureValuesRequest) -> Response:
    """Read features of entities as they are now, or as they were known to be at a moment of each row's own.

    By this training rows get what the model would have been given then, and nothing that was learnt later.
    """
    caller.require("features:read")
    rows = [Asked(row.entity, None if row.at is None else round(row.at.timestamp() * 1000)) for row in body.rows]
    found = await ask(services.features.store, caller.tenant, body.features, rows)

    def shown() -> bytes:
        data = [
            FeatureValuesRow(values=[FeatureValueObject.of(*each) for each in zip(body.features, values, strict=True)])
            for values in found
        ]
        return FeatureValuesResponse(data=data).model_dump_json().encode()

    return Response(await to_thread.run_sync(shown), media_type="application/json")


def _read_rows(view: FeatureView, content: bytes, now: int) -> list[FeatureRow]:
    """Read the body; raises InvalidRequest naming the rows that cannot be taken."""
    given = decode_as(FeatureRowsRequest, content)
    return rows_of(view, [(f"rows[{n}]", _flat(view, row)) for n, row in enumerate(given.rows)], now=now)


def _flat(view: FeatureView, row: FeatureRowRequest) -> dict[str, Any] | BadRow:
    """A row as files have it."""
    beside = {view.entity: row.entity, EVENT_TIME: row.event_time, CREATED_TIME: row.created_time}
    strange = sorted(set(row.values) - set(view.features))
    if strange:
        return BadRow(f"`values.{strange[0][:100]}`: there is no such feature; there are {', '.join(view.features)}")
    return {**row.values, **beside}
