"""Predictions over HTTP: list, count, show, export."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol
from uuid import UUID

import msgspec
from anyio import to_thread
from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.access import Caller
from app.errors import NotFound
from app.parquet import ParquetWriter
from app.predictions import FACTS, FeedbackState, LabelState, Outcome, Prediction, Where
from app.releases import LABEL_PATTERN, NAME_PATTERN
from app.routes.dependencies import CallerDep, Services, ServicesDep, errors
from app.routes.schemas import PredictionCount, PredictionList, PredictionObject

routes = APIRouter()


def _read_time(value: Any) -> Any:
    """Read a date or a time as ISO 8601 writes it; pydantic itself would also take a number for a time."""
    if isinstance(value, str) and value[4:5] == "-":
        return datetime.fromisoformat(value)
    raise ValueError("give a date or a time, as in 2026-11-24 or 2026-11-24T12:00:00Z")


Time = Annotated[datetime, BeforeValidator(_read_time)]
Fact = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]


class Filters(BaseModel):
    """Which predictions are meant; a name that is none is refused, since without it there would be too many."""

    model_config = ConfigDict(extra="forbid")

    release: Annotated[str, Field(max_length=80, pattern=f"{NAME_PATTERN}|{LABEL_PATTERN}")] | None = Field(
        None, description="A release as `name@3`, or all of a name."
    )
    release_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    since: Time | None = Field(None, description="Made then or later; without a time zone it is UTC.")
    until: Time | None = Field(None, description="Made before then.")
    outcome: Outcome | None = None
    user: Fact | None = None
    conversation: Fact | None = None
    model: Fact | None = Field(None, description="The name the caller asked for.")
    adapter: Fact | None = None
    verdict: Fact | None = Field(None, description="`abstained:nothing_relevant`, or `abstained` whatever the reason.")
    assignment: Literal["stable", "canary", "pinned", "shadow", "fallback", "extractive", "chore"] | None = None
    label_state: LabelState | None = Field(
        None, description="Whether a label says what is true of it. Needs the scope `labels:read` too."
    )
    feedback_state: FeedbackState | None = Field(
        None,
        description="Whether there is feedback about it, a rating that is `true` or `false`, or a correction; by one "
        "author at least. Needs the scope `feedback:read` too.",
    )
    review_queue: Fact | None = Field(
        None, description="The name of a review queue that has taken it. Needs the scope `review:read` too."
    )

    def where(self, caller: Caller) -> Where:
        """The filters as the history takes them, if the caller may read what they tell.

        Raises:
            Forbidden: the key lacks a scope.
        """
        caller.require("predictions:read")
        if self.label_state is not None:
            caller.require("labels:read")
        if self.feedback_state is not None:
            caller.require("feedback:read")
        if self.review_queue is not None:
            caller.require("review:read")
        return Where(**{name: getattr(self, name) for name in Where.__struct_fields__})


class PageQuery(Filters):
    """A page of what is meant."""

    limit: Annotated[int, Field(ge=1, le=200)] = 50
    before: UUID | None = Field(None, description="List those made before this one.")


class ExportQuery(Filters):
    """All of what is meant, as a file."""

    format: Literal["jsonl", "parquet"] = "jsonl"


@routes.get(
    "/v1/predictions",
    operation_id="list_predictions",
    tags=["predictions"],
    response_model=PredictionList,
    responses=errors(503),
)
async def list_predictions(services: ServicesDep, caller: CallerDep, query: Annotated[PageQuery, Query()]) -> Response:
    """List the tenant's predictions, newest first."""
    where = query.where(caller)
    before = str(query.before) if query.before else None
    found = await services.history.find(caller.tenant, where, limit=query.limit, before=before)
    following = found[-1].id if len(found) == query.limit else None
    page = {"object": "list", "data": [row.as_dict() for row in found], "next": following}
    return Response(await to_thread.run_sync(msgspec.json.encode, page), media_type="application/json")


@routes.get("/v1/predictions/count", operation_id="count_predictions", tags=["predictions"], responses=errors(503))
async def count_predictions(
    services: ServicesDep, caller: CallerDep, query: Annotated[Filters, Query()]
) -> PredictionCount:
    """Count the tenant's predictions."""
    return PredictionCount(count=await services.history.count(caller.tenant, query.where(caller)))


@routes.get(
    "/v1/predictions/export",
    operation_id="export_predictions",
    tags=["predictions"],
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "One prediction a line, or a Parquet file in row groups.",
            "content": {
                "application/x-ndjson": {"schema": {"type": "string"}},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        **errors(503),
    },
)
async def export_predictions(
    services: ServicesDep, caller: CallerDep, query: Annotated[ExportQuery, Query()]
) -> StreamingResponse:
    """Export the tenant's predictions up to now as a file, oldest first.

    A file whose transfer breaks off is not whole: it has no end that a client would take for one.
    """
    pages = services.history.pages(caller.tenant, query.where(caller))
    writer: ExportWriter = ParquetWriter(FACTS) if query.format == "parquet" else Lines()
    first: list[Prediction] = await anext(pages, [])  # What fails before the first byte keeps its status.
    return StreamingResponse(
        _exported(writer, first, pages),
        media_type="application/octet-stream" if query.format == "parquet" else "application/x-ndjson",
        headers={"content-disposition": f'attachment; filename="predictions.{query.format}"'},
    )


@routes.get(
    "/v1/predictions/{prediction_id}",
    operation_id="get_prediction",
    tags=["predictions"],
    response_model=PredictionObject,
    responses=errors(404, 503),
)
async def get_prediction(services: ServicesDep, caller: CallerDep, prediction_id: UUID) -> Response:
    """Show one prediction: the release, the passages, the answer, the timings."""
    found = await prediction_of(services, caller, prediction_id)
    return Response(msgspec.json.encode(found.as_dict()), media_type="application/json")


async def prediction_of(services: Services, caller: Caller, prediction_id: UUID) -> Prediction:
    """Find the caller's prediction: what was just answered is in this process's log, what others answered is shared."""
    caller.require("predictions:read")
    text = str(prediction_id)
    found = await services.predictions.get(caller.tenant, text) or await services.history.get(caller.tenant, text)
    if found is None:
        raise NotFound(f"There is no prediction {text!r}.")
    return found


class ExportWriter(Protocol):
    """Makes a file of predictions, a piece at a time; its methods take as long as they need."""

    def add(self, rows: Sequence[dict[str, Any]], /) -> bytes:
        """Give the bytes that the file grows by."""
        ...

    def finish(self) -> bytes:
        """Give the file's end."""
        ...


class Lines:
    """One JSON object a line."""

    def add(self, rows: Sequence[dict[str, Any]]) -> bytes:
        """Give the rows' lines."""
        return msgspec.json.Encoder().encode_lines(rows)

    def finish(self) -> bytes:
        """Give nothing: lines have no end but the last one's."""
        return b""


async def _exported(
    writer: ExportWriter, first: list[Prediction], following: AsyncIterator[list[Prediction]]
) -> AsyncGenerator[bytes, None]:
    def written(page: list[Prediction]) -> bytes:
        return writer.add([prediction.as_dict() for prediction in page])

    if first:
        yield await to_thread.run_sync(written, first)
    async for page in following:
        yield await to_thread.run_sync(written, page)
    yield await to_thread.run_sync(writer.finish)
