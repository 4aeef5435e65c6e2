"""The engine groups over HTTP: what whoever publishes an adapter needs to know."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.adapters import EngineGroup
from app.routes.dependencies import CallerDep, ServicesDep, errors

routes = APIRouter()


class EngineGroupObject(BaseModel):
    """One or several engines that serve the same model."""

    name: str = Field(description="What releases call it.")
    object: Literal["engine_group"] = "engine_group"
    dialects: list[str] = Field(description="Which servers they are.")
    loads_adapters: bool = Field(description="Whether adapters are loaded while they run; else at their start only.")
    base_models: list[str] = Field(description="What the base model is called; empty while no engine answers.")
    base_revision: str | None = Field(description="Null where the engine does not say.")
    adapters: list[str] = Field(description="The adapters that all of them are known to serve.")
    adapter_folder: str | None = Field(description="Where adapters lie on the service's machine.")
    adapter_folder_on_engine: str | None = Field(description="What the engine calls that folder, if not the same.")
    problem: str | None = Field(description="Why the engines cannot be asked at present.")

    @classmethod
    def of(cls, group: EngineGroup) -> "EngineGroupObject":
        """The group as it is shown."""
        return cls(
            name=group.name,
            dialects=list(group.dialects),
            loads_adapters=group.loads_adapters,
            base_models=list(group.base_models),
            base_revision=group.base_revision,
            adapters=list(group.adapters),
            adapter_folder=group.adapter_folder,
            adapter_folder_on_engine=group.adapter_folder_on_engine,
            problem=group.problem,
        )


class EngineGroupList(BaseModel):
    """The groups of this service, the main one first."""

    object: Literal["list"] = "list"
    data: list[EngineGroupObject]


@routes.get("/v1/engines", operation_id="list_engines", tags=["releases"], responses=errors(503))
async def list_engines(services: ServicesDep, caller: CallerDep) -> EngineGroupList:
    """List the engine groups: their base models, their adapters, and where adapters lie."""
    caller.require("releases:write")
    return EngineGroupList(data=[EngineGroupObject.of(group) for group in await services.adapters.groups()])
