"""Feedback over HTTP: give it, change it, take it back, read it."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Response

from app.access import Caller
from app.errors import InvalidRequest, NotFound
from app.feedback import FeedbackSource, Label, Speaker
from app.feedback.calls import KEY_PREFIX
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.feedback_schemas import (
    Author,
    Category,
    Conversation,
    FeedbackChange,
    FeedbackCounts,
    FeedbackDetail,
    FeedbackList,
    FeedbackObject,
    FeedbackRequest,
    IdempotencyKey,
    LabelObject,
    PredictionFeedback,
    SaidAt,
    milliseconds,
)
from app.routes.predictions import Time

routes = APIRouter(tags=["feedback"])

MAX_SHOWN = 100
"""Feedback and labels that are shown with a prediction."""

Limit = Annotated[int, Query(ge=1, le=200)]
Before = Annotated[UUID | None, Query(description="List those before this one.")]
Since = Annotated[Time | None, Query(description="Only what has changed since then; without a time zone it is UTC.")]
Withdrawn = Annotated[bool, Query(description="Include what was withdrawn.")]
KeyHeader = Annotated[IdempotencyKey | None, Header(alias="Idempotency-Key")]
FeedbackId = Annotated[UUID, Path()]
_REFUSALS = errors(404, 409, 429, 503)


@routes.post(
    "/v1/feedback",
    operation_id="give_feedback",
    status_code=201,
    responses=errors(409, 429, 503)
    | {200: {"model": FeedbackObject, "description": "It was there: this call repeats it, or replaces what it said."}},
)
async def give_feedback(
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    body: FeedbackRequest,
    idempotency_key: KeyHeader = None,
) -> FeedbackObject:
    """Say what somebody thinks of an answer or a conversation.

    It counts once: the same author's feedback about the same thing, from the same source and of the same category,
    replaces what was said before. The prediction need not be on record yet.
    """
    caller.require("feedback:write")
    key = chosen_key(body.idempotency_key, idempotency_key)
    written = await services.feedback.give(speaker(caller, body.author), body.given(key))
    if written.is_new:
        services.metrics.said(body.source, _kind(body))
        services.evaluations.feedback(written.row)
    if not written.is_new or written.row["revision"] > 1:
        response.status_code = 200
    return FeedbackObject.written(written)


@routes.get("/v1/feedback", operation_id="list_feedback", responses=errors(503))
async def list_feedback(
    services: ServicesDep,
    caller: CallerDep,
    prediction_id: Annotated[UUID | None, Query(description="Only what is about this prediction.")] = None,
    conversation: Annotated[Conversation | None, Query(description="Only what is about this conversation.")] = None,
    source: Annotated[FeedbackSource | None, Query(description="Only what such an author says.")] = None,
    category: Annotated[Category | None, Query(description="Only what is of this category.")] = None,
    since: Since = None,
    withdrawn: Withdrawn = False,
    limit: Limit = 50,
    before: Before = None,
) -> FeedbackList:
    """List feedback as it holds now, newest first."""
    caller.require("feedback:read")
    found = await services.feedback.find(
        caller.tenant,
        prediction_id=str(prediction_id) if prediction_id else None,
        conversation=conversation,
        source=source,
        category=category,
        since=milliseconds(since),
        withdrawn=withdrawn,
        limit=limit,
        before=str(before) if before else None,
    )
    following = found[-1].id if len(found) == limit else None
    return FeedbackList(data=[FeedbackObject.of(each) for each in found], next=following)


@routes.get("/v1/feedback/{feedback_id}", operation_id="get_feedback", responses=errors(404, 503))
async def get_feedback(services: ServicesDep, caller: CallerDep, feedback_id: FeedbackId) -> FeedbackDetail:
    """Show feedback as it holds now, and every call about it."""
    caller.require("feedback:read")
    found = await services.feedback.get(caller.tenant, str(feedback_id))
    return FeedbackDetail.told(found, await services.feedback.history(caller.tenant, found.id))


@routes.patch("/v1/feedback/{feedback_id}", operation_id="change_feedback", responses=_REFUSALS)
async def change_feedback(
    services: ServicesDep, caller: CallerDep, feedback_id: FeedbackId, body: FeedbackChange
) -> FeedbackObject:
    """Change the fields that are sent, and leave the others.

    What was withdrawn stays withdrawn; give it again to have it back.
    """
    caller.require("feedback:write")
    changes = body.model_dump(exclude_unset=True, exclude={"author", "said_at"})
    if not changes:
        raise InvalidRequest("`rating`: send a rating, a comment, a correction or metadata.", param="rating")
    written = await services.feedback.change(
        speaker(caller, body.author), str(feedback_id), changes, said_at=milliseconds(body.said_at)
    )
    if written.is_new:
        services.metrics.said(written.row["source"], "change")
        services.evaluations.feedback(written.row)
    return FeedbackObject.written(written)


@routes.delete("/v1/feedback/{feedback_id}", operation_id="withdraw_feedback", responses=_REFUSALS)
async def withdraw_feedback(
    services: ServicesDep,
    caller: CallerDep,
    feedback_id: FeedbackId,
    author: Annotated[Author | None, Query()] = None,
    said_at: Annotated[SaidAt | None, Query()] = None,
) -> FeedbackObject:
    """Take feedback back: it counts no more, and stays on record."""
    caller.require("feedback:write")
    written = await services.feedback.withdraw(speaker(caller, author), str(feedback_id), said_at=milliseconds(said_at))
    if written.is_new:
        services.metrics.said(written.row["source"], "withdrawal")
        services.evaluations.feedback(written.row)
    return FeedbackObject.written(written)


@routes.get(
    "/v1/predictions/{prediction_id}/feedback", operation_id="get_prediction_feedback", responses=errors(404, 503)
)
async def get_prediction_feedback(services: ServicesDep, caller: CallerDep, prediction_id: UUID) -> PredictionFeedback:
    """Show what is said of a prediction and what is true of it, counted and in full."""
    caller.require("feedback:read")
    tenant, about = caller.tenant, str(prediction_id)
    is_stored = await services.feedback.is_stored(tenant, about)
    said = await services.feedback.find(tenant, prediction_id=about, limit=MAX_SHOWN)
    stated: list[Label] | None = None
    if caller.may("labels:read"):
        stated = await services.labels.find(tenant, prediction_id=about, limit=MAX_SHOWN)
    if not (is_stored or said or stated):
        raise NotFound(f"There is neither a prediction {about!r} nor feedback about it.")
    counts = await services.feedback.counts(tenant, [about])
    return PredictionFeedback(
        prediction_id=about,
        prediction="stored" if is_stored else "not_yet",
        counts=[FeedbackCounts.of(each) for each in counts],
        feedback=[FeedbackObject.of(each) for each in said],
        labels=None if stated is None else [LabelObject.of(each) for each in stated],
    )


def speaker(caller: Caller, author: str | None, *, field: str = "author") -> Speaker:
    """On whose behalf a caller speaks: of the user it acts for, else as the field of that name says."""
    if caller.user is not None:
        return Speaker(tenant=caller.tenant, key_id=caller.key_id, user=caller.user)
    own = f"{KEY_PREFIX}{caller.key_id}"
    if author is not None and author.startswith(KEY_PREFIX) and author != own:
        raise InvalidRequest(f"`{field}`: a name that begins with {KEY_PREFIX!r} stands for that key.", param=field)
    return Speaker(tenant=caller.tenant, key_id=caller.key_id, user=author, is_admin=caller.may("admin"))


def chosen_key(in_body: str | None, in_header: str | None) -> str | None:
    """The idempotency key of a call, which may name it twice but not in two ways."""
    if in_body is not None and in_header is not None and in_body != in_header:
        raise InvalidRequest(
            "`idempotency_key`: the header `Idempotency-Key` names another one: send it once.", param="idempotency_key"
        )
    return in_body if in_body is not None else in_header


def _kind(body: FeedbackRequest) -> str:
    if body.withdrawn:
        return "withdrawal"
    if isinstance(body.rating, bool):
        return "positive" if body.rating else "negative"
    return "text" if body.rating is None else "number"
