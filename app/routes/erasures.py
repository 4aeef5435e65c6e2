"""Erasures over HTTP: have a person or a conversation erased, and see how far that is."""

from datetime import UTC, datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.erasure import Erasure
from app.erasure.records import Trained
from app.errors import InvalidRequest
from app.routes.dependencies import CallerDep, ServicesDep, errors

routes = APIRouter(tags=["privacy"])

Name = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00]*$")]


class ErasureRequest(BaseModel):
    """Whom to erase: exactly one of the two."""

    model_config = ConfigDict(extra="forbid")

    user: Name | None = Field(None, description="As requests name the user, or by the pseudonym on record.")
    conversation: Name | None = None

    def subject(self) -> tuple[Literal["user", "conversation"], str]:
        """The kind and name of the subject; raises InvalidRequest unless there is one."""
        if self.user is not None and self.conversation is None:
            return "user", self.user
        if self.conversation is not None and self.user is None:
            return "conversation", self.conversation
        raise InvalidRequest("`user`: name a user or a conversation: one of the two.", param="user")


class TrainedObject(BaseModel):
    """What was trained on rows that are erased. It keeps what it learnt until it is retrained and replaced."""

    datasets: list[str] = Field(description="By their digests.")
    training_runs: list[str]
    adapters: list[str] = Field(description="By their digests.")
    releases: list[str] = Field(description="`name@number`.")

    @classmethod
    def of(cls, trained: Trained) -> Self:
        """What is told."""
        return cls(
            datasets=list(trained.datasets),
            training_runs=list(trained.training_runs),
            adapters=list(trained.adapters),
            releases=list(trained.releases),
        )


class ErasureObject(BaseModel):
    """An erasure on record. It does not name its subject."""

    id: str
    object: Literal["erasure"] = "erasure"
    kind: Literal["user", "conversation"]
    state: Literal["running", "done"]
    requested_at: datetime
    requested_by: str = Field(description="The key that asked for it.")
    finished_at: datetime | None
    counts: dict[str, int] = Field(description="How much was reached, by kind.")
    datasets: list[str] = Field(description="Digests of the datasets that have rows made of what is erased.")

    @classmethod
    def of(cls, erasure: Erasure) -> Self:
        """What is told."""
        return cls(**_facts(erasure))


class ErasureDetail(ErasureObject):
    """An erasure, and what was trained on what it erased."""

    trained: TrainedObject

    @classmethod
    def told(cls, erasure: Erasure, trained: Trained) -> Self:
        """What is told."""
        return cls(**_facts(erasure), trained=TrainedObject.of(trained))


class ErasureList(BaseModel):
    """A page of erasures, the newest first."""

    object: Literal["list"] = "list"
    data: list[ErasureObject]
    next: str | None = Field(description="The `before` of the next page.")


@routes.post("/v1/erasures", operation_id="create_erasure", status_code=202, responses=errors(503))
async def create_erasure(services: ServicesDep, caller: CallerDep, body: ErasureRequest) -> ErasureObject:
    """Erase what was said by or to a user, or in a conversation; figures stay.

    It is on record when this returns, and is done soon after: look at its `state`.
    """
    caller.require("privacy:manage")
    kind, name = body.subject()
    return ErasureObject.of(await services.erasures.request(caller.tenant, kind, name, who=caller.key_id))


@routes.get("/v1/erasures", operation_id="list_erasures", responses=errors(503))
async def list_erasures(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[UUID | None, Query(description="`next` of the page before.")] = None,
) -> ErasureList:
    """List the erasures of the key's own tenant, the newest first."""
    caller.require("privacy:manage")
    found = await services.erasures.find(caller.tenant, limit=limit, before=str(before) if before else None)
    following = found[-1].id if len(found) == limit else None
    return ErasureList(data=[ErasureObject.of(each) for each in found], next=following)


@routes.get("/v1/erasures/{erasure_id}", operation_id="get_erasure", responses=errors(404, 503))
async def get_erasure(services: ServicesDep, caller: CallerDep, erasure_id: UUID) -> ErasureDetail:
    """Show how far an erasure is, and which adapters and releases were trained on what it erased."""
    caller.require("privacy:manage")
    erasure = await services.erasures.get(caller.tenant, str(erasure_id))
    return ErasureDetail.told(erasure, await services.erasures.trained(erasure))


def _facts(erasure: Erasure) -> dict[str, object]:
    return {
        "id": erasure.id,
        "kind": erasure.kind,
        "state": erasure.state,
        "requested_at": _moment(erasure.requested_at),
        "requested_by": erasure.requested_by,
        "finished_at": None if erasure.finished_at is None else _moment(erasure.finished_at),
        "counts": erasure.counts,
        "datasets": list(erasure.dataset_digests),
    }


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
