"""The review queue over HTTP: define queues, review their items, read what that comes to."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from app.errors import InvalidRequest
from app.predictions import Where
from app.releases import NAME_PATTERN
from app.review import ItemState, Policy
from app.review.labelstudio import MAX_TASKS
from app.routes.bodies import decode_as
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.feedback import Limit, speaker
from app.routes.releases import author
from app.routes.review_queue_schemas import (
    BoostList,
    BoostObject,
    BoostRequest,
    GoldObject,
    GoldRequest,
    QueueDetail,
    QueueList,
    QueueObject,
    QueueRules,
)
from app.routes.review_schemas import (
    FindingRequest,
    ImportResult,
    ItemDetail,
    ItemList,
    ItemObject,
    LeasedObject,
    LeaseList,
    LeaseRequest,
    QueueAgreementObject,
    RenewRequest,
    Reviewer,
    ReviewObject,
    ShareList,
    ShareObject,
    SkipRequest,
)

routes = APIRouter(tags=["review"])

QueueName = Annotated[str, Path(pattern=NAME_PATTERN, description="A name of your choice.")]
ReviewId = Annotated[UUID, Path()]
Before = Annotated[UUID | None, Query(description="List those before this one.")]
_REFUSALS = errors(404, 409, 429, 503)
_TASKS = {
    "description": "Tasks as Label Studio exports them.",
    "items": {"additionalProperties": True, "type": "object"},
    "maxItems": MAX_TASKS,
    "title": "Body",
    "type": "array",
}
_TASKS_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": _TASKS}}}}


@routes.put(
    "/v1/review/queues/{queue}",
    operation_id="define_review_queue",
    status_code=201,
    responses=errors(409, 503) | {200: {"model": QueueObject, "description": "It was there, and has these rules now."}},
)
async def define_review_queue(
    services: ServicesDep, caller: CallerDep, response: Response, queue: QueueName, body: QueueRules
) -> QueueObject:
    """Make a queue, or give one other rules for what is predicted from now on."""
    caller.require("review:manage")
    defined, is_new = await services.review.queues.define(caller.tenant, queue, body.rules(), who=author(caller))
    if not is_new:
        response.status_code = 200
    return QueueObject.model_validate(defined)


@routes.get("/v1/review/queues", operation_id="list_review_queues", responses=errors(503))
async def list_review_queues(services: ServicesDep, caller: CallerDep) -> QueueList:
    """List the tenant's queues."""
    caller.require("review:read")
    found = await services.review.queues.find(caller.tenant)
    return QueueList(data=[QueueObject.model_validate(each) for each in found])


@routes.get("/v1/review/queues/{queue}", operation_id="get_review_queue", responses=errors(404, 503))
async def get_review_queue(services: ServicesDep, caller: CallerDep, queue: QueueName) -> QueueDetail:
    """Show a queue, how many items it has, and what each reviewer did."""
    caller.require("review:read")
    return QueueDetail.told(await services.review.findings.progress(caller.tenant, queue))


@routes.get("/v1/review/queues/{queue}/items", operation_id="list_review_items", responses=errors(404, 503))
async def list_review_items(
    services: ServicesDep,
    caller: CallerDep,
    queue: QueueName,
    state: Annotated[ItemState | None, Query(description="Only these.")] = None,
    policy: Annotated[Policy | None, Query(description="Only what this policy took.")] = None,
    prediction_id: Annotated[UUID | None, Query(description="Only this prediction.")] = None,
    limit: Limit = 50,
    before: Before = None,
) -> ItemList:
    """List the items of a queue, newest first, each with its policy and probability."""
    caller.require("review:read")
    found = await services.review.findings.items(
        caller.tenant,
        queue,
        state=state,
        policy=policy,
        prediction_id=str(prediction_id) if prediction_id else None,
        limit=limit,
        before=str(before) if before else None,
    )
    following = found[-1].id if len(found) == limit else None
    return ItemList(data=[ItemObject.model_validate(each) for each in found], next=following)


@routes.get("/v1/review/items/{item_id}", operation_id="get_review_item", responses=errors(404, 503))
async def get_review_item(services: ServicesDep, caller: CallerDep, item_id: UUID) -> ItemDetail:
    """Show an item and every review of it."""
    caller.require("review:read")
    return ItemDetail.told(*await services.review.findings.item(caller.tenant, str(item_id)))


@routes.get("/v1/review/queues/{queue}/agreement", operation_id="get_review_agreement", responses=errors(404, 503))
async def get_review_agreement(services: ServicesDep, caller: CallerDep, queue: QueueName) -> QueueAgreementObject:
    """Tell how far reviewers of the same items agree beyond chance."""
    caller.require("review:read")
    return QueueAgreementObject.model_validate(await services.review.findings.agreement(caller.tenant, queue))


@routes.get("/v1/review/queues/{queue}/shares", operation_id="get_review_shares", responses=errors(404, 503))
async def get_review_shares(services: ServicesDep, caller: CallerDep, queue: QueueName) -> ShareList:
    """Estimate how often each class is right, over all that the queue considers and by release.

    Weighted by the items' probabilities, so that a queue may prefer doubtful answers.
    """
    caller.require("review:read")
    found = await services.review.findings.shares(caller.tenant, queue)
    return ShareList(data=[ShareObject.model_validate(each) for each in found])


# --- reviewing ---


@routes.post("/v1/review/queues/{queue}/leases", operation_id="lease_review_items", responses=errors(404, 503))
async def lease_review_items(
    services: ServicesDep, caller: CallerDep, queue: QueueName, body: LeaseRequest
) -> LeaseList:
    """Get items to review, those that are held already first; nobody else gets them until the leases expire."""
    caller.require("review:write")
    reviewer = speaker(caller, body.reviewer, field="reviewer")
    leased = await services.review.reviews.lease(reviewer, queue, count=body.count)
    return LeaseList(data=[LeasedObject.of(each) for each in leased])


@routes.post("/v1/review/reviews/{review_id}/complete", operation_id="complete_review", responses=_REFUSALS)
async def complete_review(
    services: ServicesDep, caller: CallerDep, review_id: ReviewId, body: FindingRequest
) -> ReviewObject:
    """State what was found, which becomes the reviewer's label; again it replaces what was stated before."""
    caller.require("review:write")
    reviewer = speaker(caller, body.reviewer, field="reviewer")
    done = await services.review.reviews.complete(reviewer, str(review_id), body.finding())
    services.metrics.said("review_queue", "label")
    services.evaluations.reviewed(caller.tenant, done.label_id)
    return ReviewObject.model_validate(done)


@routes.post("/v1/review/reviews/{review_id}/skip", operation_id="skip_review", responses=_REFUSALS)
async def skip_review(services: ServicesDep, caller: CallerDep, review_id: ReviewId, body: SkipRequest) -> ReviewObject:
    """Leave an item to others; one that three reviewers have skipped is set aside."""
    caller.require("review:write")
    reviewer = speaker(caller, body.reviewer, field="reviewer")
    return ReviewObject.model_validate(await services.review.reviews.skip(reviewer, str(review_id), body.reason))


@routes.post("/v1/review/reviews/{review_id}/renew", operation_id="renew_review", responses=_REFUSALS)
async def renew_review(
    services: ServicesDep, caller: CallerDep, review_id: ReviewId, body: RenewRequest
) -> ReviewObject:
    """Begin the time of a lease anew."""
    caller.require("review:write")
    reviewer = speaker(caller, body.reviewer, field="reviewer")
    return ReviewObject.model_validate(await services.review.reviews.renew(reviewer, str(review_id)))


@routes.get("/v1/review/reviews/{review_id}", operation_id="get_review", responses=errors(404, 503))
async def get_review(services: ServicesDep, caller: CallerDep, review_id: ReviewId) -> ReviewObject:
    """Show a review."""
    caller.require("review:read")
    return ReviewObject.model_validate(await services.review.reviews.get(caller.tenant, str(review_id)))


@routes.delete("/v1/review/reviews/{review_id}", operation_id="give_review_back", responses=_REFUSALS)
async def give_review_back(
    services: ServicesDep,
    caller: CallerDep,
    review_id: ReviewId,
    reviewer: Annotated[Reviewer | None, Query()] = None,
) -> ReviewObject:
    """End a lease, so that the item can be had at once."""
    caller.require("review:write")
    given = await services.review.reviews.give_back(speaker(caller, reviewer, field="reviewer"), str(review_id))
    return ReviewObject.model_validate(given)


# --- what is added on purpose ---


@routes.post(
    "/v1/review/queues/{queue}/gold", operation_id="add_review_gold", status_code=201, responses=errors(404, 503)
)
async def add_review_gold(services: ServicesDep, caller: CallerDep, queue: QueueName, body: GoldRequest) -> GoldObject:
    """Make a prediction one of known class, to see whether reviewers find it."""
    caller.require("review:manage")
    about = str(body.prediction_id)
    item_id = await services.review.queues.add_gold(caller.tenant, queue, about, body.class_name)
    return GoldObject(item_id=item_id, prediction_id=about, class_name=body.class_name)


@routes.post(
    "/v1/review/queues/{queue}/boosts", operation_id="boost_review", status_code=201, responses=errors(404, 409, 503)
)
async def boost_review(services: ServicesDep, caller: CallerDep, queue: QueueName, body: BoostRequest) -> BoostObject:
    """Take a larger share of a slice, or of the members of a cluster; it only ever raises how likely one is taken.

    The reason must not look at what is in the queue: what chance took must not change what is likely.
    """
    caller.require("review:manage")
    if (body.where is None) == (body.prediction_ids is None):
        raise InvalidRequest("`where`: name a slice or predictions: one of the two.", param="where")
    given: dict[str, Any] = {"rate": body.rate, "reason": body.reason, "who": author(caller)}
    if body.prediction_ids is not None:
        ids = [str(each) for each in body.prediction_ids]
        made, considered = await services.review.queues.boost_named(caller.tenant, queue, prediction_ids=ids, **given)
        return BoostObject.of(made, considered)
    where = body.where.where() if body.where else Where()
    return BoostObject.of(await services.review.queues.boost(caller.tenant, queue, where=where, **given))


@routes.get("/v1/review/queues/{queue}/boosts", operation_id="list_review_boosts", responses=errors(404, 503))
async def list_review_boosts(services: ServicesDep, caller: CallerDep, queue: QueueName) -> BoostList:
    """List the boosts of a queue, newest first, with those that have ended."""
    caller.require("review:read")
    found = await services.review.queues.boosts(caller.tenant, queue)
    return BoostList(data=[BoostObject.of(each) for each in found])


@routes.get("/v1/review/queues/{queue}/boosts/{boost_id}", operation_id="get_review_boost", responses=errors(404, 503))
async def get_review_boost(services: ServicesDep, caller: CallerDep, queue: QueueName, boost_id: UUID) -> BoostObject:
    """Show a boost."""
    caller.require("review:read")
    return BoostObject.of(await services.review.queues.one_boost(caller.tenant, queue, str(boost_id)))


@routes.delete(
    "/v1/review/queues/{queue}/boosts/{boost_id}", operation_id="end_review_boost", responses=errors(404, 503)
)
async def end_review_boost(services: ServicesDep, caller: CallerDep, queue: QueueName, boost_id: UUID) -> BoostObject:
    """Follow a slice no more; what was taken from it stays."""
    caller.require("review:manage")
    return BoostObject.of(await services.review.queues.end_boost(caller.tenant, queue, str(boost_id)))


# --- Label Studio ---


@routes.get(
    "/v1/review/queues/{queue}/export",
    operation_id="export_review_tasks",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A list of Label Studio's tasks.",
            "content": {"application/json": {"schema": {"type": "array", "items": {"type": "object"}}}},
        },
        **errors(404, 503),
    },
)
async def export_review_tasks(
    services: ServicesDep,
    caller: CallerDep,
    queue: QueueName,
    state: Annotated[ItemState | None, Query(description="Only these.")] = None,
    annotations: Annotated[bool, Query(description="With what was found so far.")] = True,
) -> StreamingResponse:
    """Export the items of a queue as tasks for Label Studio, with what reviewers said as annotations.

    A file whose transfer breaks off is no valid JSON.
    """
    caller.require("review:read")
    pages = services.review.exchange.tasks(caller.tenant, queue, state=state, annotations=annotations)
    first = await anext(pages)  # What fails before the first byte keeps its status.
    return StreamingResponse(
        _array(first, pages),
        media_type="application/json",
        headers={"content-disposition": f'attachment; filename="{queue}.json"'},
    )


@routes.post(
    "/v1/review/queues/{queue}/import",
    operation_id="import_review_tasks",
    responses=errors(404, 413, 503),
    openapi_extra=_TASKS_BODY,
)
async def import_review_tasks(
    services: ServicesDep, caller: CallerDep, queue: QueueName, request: Request
) -> ImportResult:
    """Take in the annotations of tasks that were exported: all of them, or none if one cannot be taken.

    An annotation counts if it is newer than what its author said of the item before, so the same file again changes
    nothing.
    """
    caller.require("review:manage")
    tasks = await run_in_threadpool(decode_as, list[dict[str, Any]], await request.body())
    done = await services.review.exchange.bring(caller.tenant, queue, tasks, key_id=caller.key_id)
    for _ in range(done.done):
        services.metrics.said("review_queue", "label")
    return ImportResult.model_validate(done)


async def _array(first: list[Any], following: AsyncIterator[list[Any]]) -> AsyncGenerator[bytes, None]:
    separator = b"["
    for task in first:
        yield separator + msgspec.json.encode(task)
        separator = b",\n"
    async for page in following:
        for task in page:
            yield separator + msgspec.json.encode(task)
            separator = b",\n"
    yield b"[]\n" if separator == b"[" else b"]\n"
