"""Quality per release over HTTP."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.predictions import Where
from app.quality import DEFAULT_DAYS, Figure, Report, Unit
from app.releases import LABEL_PATTERN, NAME_PATTERN
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.predictions import Time
from observability.estimates import Method

routes = APIRouter()


class QualityQuery(BaseModel):
    """Which answers are meant; a name that is none is refused, since without it there would be too many."""

    model_config = ConfigDict(extra="forbid")

    release: Annotated[str, Field(max_length=80, pattern=f"{NAME_PATTERN}|{LABEL_PATTERN}")] | None = Field(
        None, description="A release as `name@3`, or all of a name; by default every release."
    )
    since: Time | None = Field(
        None,
        description=f"Made then or later, in UTC without a time zone; by default {DEFAULT_DAYS} days before the end.",
    )
    until: Time | None = Field(None, description="Made before then; by default now.")
    assignment: Literal["stable", "canary", "pinned", "shadow", "chore"] | None = Field(
        None, description="Only answers that the release gave in that role; chores count only if they are named."
    )


class FigureObject(BaseModel):
    """A figure with its 95 % interval; null is what the rows cannot tell."""

    figure: str = Field(description="Such as `abstained` or `accuracy`; docs/quality.md defines each.")
    class_name: str | None = Field(None, serialization_alias="class", description="The class it is about, if it is.")
    unit: Unit
    value: float | None
    low: float | None
    high: float | None
    n: int = Field(description="The answers it rests on.")
    effective_n: float = Field(description="How many independent answers that weigh the same would tell as much.")
    method: Method = Field(description="How the interval was made.")
    doubts: list[str] = Field(
        description="Why a guess without labels may be wrong, such as `drifted`; it is valid without any, and other "
        "figures have none."
    )

    @classmethod
    def of(cls, figure: Figure) -> "FigureObject":
        """Show a figure."""
        return cls(
            figure=figure.name,
            class_name=figure.class_name,
            unit=figure.unit,
            value=figure.value,
            low=figure.low,
            high=figure.high,
            n=figure.n,
            effective_n=figure.effective_n,
            method=figure.method,
            doubts=figure.doubts,
        )


class ReleaseQualityObject(BaseModel):
    """How good one release's answers are."""

    release: str
    answers: int = Field(description="Finished ones.")
    labelled: int = Field(description="Answers that the figures from labels rest on.")
    labels_left_out: int = Field(
        description="Answers whose labels have no sampling probability, beside others that have one."
    )
    sampled: bool = Field(
        description="Whether labels have a sampling probability; else figures from labels speak for the labelled alone."
    )
    figures: list[FigureObject]


class QualityReport(BaseModel):
    """How good the answers of a window are, release by release."""

    object: Literal["quality"] = "quality"
    since: datetime
    until: datetime
    computed_at: datetime
    labels_are_cut: bool = Field(description="Whether there are more labelled answers than were read: the newest.")
    data: list[ReleaseQualityObject]

    @classmethod
    def of(cls, report: Report) -> "QualityReport":
        """Show a report."""
        return cls(
            since=report.since,
            until=report.until,
            computed_at=report.computed_at,
            labels_are_cut=report.labels_are_cut,
            data=[
                ReleaseQualityObject(
                    release=each.release,
                    answers=each.answers,
                    labelled=each.labelled,
                    labels_left_out=each.labels_left_out,
                    sampled=each.sampled,
                    figures=[FigureObject.of(figure) for figure in each.figures],
                )
                for each in report.releases
            ],
        )


@routes.get("/v1/quality", operation_id="get_quality", tags=["quality"], responses=errors(503))
async def get_quality(
    services: ServicesDep, caller: CallerDep, query: Annotated[QualityQuery, Query()]
) -> QualityReport:
    """Report how good each release's answers are, every figure with its interval; kept for a minute.

    A report is made by a process that gives way to the service, one at a time: over many answers it takes minutes.
    """
    caller.require("quality:read")
    where = Where(release=query.release, since=query.since, until=query.until, assignment=query.assignment)
    return QualityReport.of(await services.quality.report(caller.tenant, where))
