"""Labels over HTTP: state what is true of an answer, take it back, read it."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response

from app.feedback import LabelSource
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.feedback import Before, KeyHeader, Limit, Since, Withdrawn, chosen_key, speaker
from app.routes.feedback_schemas import (
    Author,
    LabelDetail,
    LabelList,
    LabelObject,
    LabelRequest,
    SaidAt,
    milliseconds,
)

routes = APIRouter(tags=["labels"])

LabelId = Annotated[UUID, Path()]


@routes.post(
    "/v1/labels",
    operation_id="state_label",
    status_code=201,
    responses=errors(409, 429, 503)
    | {200: {"model": LabelObject, "description": "It was there: this call repeats it, or replaces what it stated."}},
)
async def state_label(
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    body: LabelRequest,
    idempotency_key: KeyHeader = None,
) -> LabelObject:
    """State what is true of an answer: its class, the right answer, the relevant passages.

    It replaces, whole, what the same author stated of the prediction before.
    """
    caller.require("labels:write")
    key = chosen_key(body.idempotency_key, idempotency_key)
    written = await services.labels.state(speaker(caller, body.author), body.stated(key))
    if written.is_new:
        services.metrics.said(body.source, "label_withdrawal" if body.withdrawn else "label")
        services.evaluations.label(written.row)
    if not written.is_new or written.row["revision"] > 1:
        response.status_code = 200
    return LabelObject.written(written)


@routes.get("/v1/labels", operation_id="list_labels", responses=errors(503))
async def list_labels(
    services: ServicesDep,
    caller: CallerDep,
    prediction_id: Annotated[UUID | None, Query(description="Only those of this prediction.")] = None,
    source: Annotated[LabelSource | None, Query(description="Only what such an author states.")] = None,
    since: Since = None,
    withdrawn: Withdrawn = False,
    limit: Limit = 50,
    before: Before = None,
) -> LabelList:
    """List labels as they hold now, newest first."""
    caller.require("labels:read")
    found = await services.labels.find(
        caller.tenant,
        prediction_id=str(prediction_id) if prediction_id else None,
        source=source,
        since=milliseconds(since),
        withdrawn=withdrawn,
        limit=limit,
        before=str(before) if before else None,
    )
    following = found[-1].id if len(found) == limit else None
    return LabelList(data=[LabelObject.of(each) for each in found], next=following)


@routes.get("/v1/labels/{label_id}", operation_id="get_label", responses=errors(404, 503))
async def get_label(services: ServicesDep, caller: CallerDep, label_id: LabelId) -> LabelDetail:
    """Show a label as it holds now, and every call about it."""
    caller.require("labels:read")
    found = await services.labels.get(caller.tenant, str(label_id))
    return LabelDetail.told(found, await services.labels.history(caller.tenant, found.id))


@routes.delete("/v1/labels/{label_id}", operation_id="withdraw_label", responses=errors(404, 409, 429, 503))
async def withdraw_label(
    services: ServicesDep,
    caller: CallerDep,
    label_id: LabelId,
    author: Annotated[Author | None, Query()] = None,
    said_at: Annotated[SaidAt | None, Query()] = None,
) -> LabelObject:
    """Take a label back: it is nobody's truth any more, and stays on record."""
    caller.require("labels:write")
    written = await services.labels.withdraw(speaker(caller, author), str(label_id), said_at=milliseconds(said_at))
    if written.is_new:
        services.metrics.said(written.row["source"], "label_withdrawal")
        services.evaluations.label(written.row)
    return LabelObject.written(written)
