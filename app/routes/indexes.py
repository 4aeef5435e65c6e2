"""Index versions over HTTP: build one beside the live one, compare, switch, roll back, drop.

The main rule: an index holds the documents of every tenant, so these routes ask for a scope of their own, and show
counts of all; questions are compared on the documents that the key sees.
"""

from typing import Annotated

from fastapi import APIRouter, Path

from app.routes.dependencies import CallerDep, Services, ServicesDep, errors
from app.routes.index_schemas import (
    BuildObject,
    CompareRequest,
    DroppedIndex,
    IndexList,
    IndexObject,
    SwitchRequest,
)
from app.routes.releases import author
from retrieval.evaluation.comparing import compare
from retrieval.versions import IndexVersion

routes = APIRouter(tags=["indexes"])

SCOPE = "indexes:manage"
IndexId = Annotated[str, Path(min_length=1, max_length=200, pattern=r"^[a-z0-9.-]+$")]


@routes.get("/v1/indexes", operation_id="list_indexes", responses=errors(503))
async def list_indexes(services: ServicesDep, caller: CallerDep) -> IndexList:
    """List the index versions, with what each is made of and what it lacks."""
    caller.require(SCOPE)
    return IndexList(data=[_shown(services, each) for each in await services.retriever.indexes.versions()])


@routes.post("/v1/indexes", operation_id="build_index", status_code=202, responses=errors(409, 503))
async def build_index(services: ServicesDep, caller: CallerDep) -> BuildObject:
    """Begin the index version that the settings name (`retrieval.next_*`), beside the live one, which still answers.

    Documents that are added, changed or deleted meanwhile reach both.
    """
    caller.require(SCOPE)
    version, job = await services.ingestion.build(caller.sees(), who=author(caller))
    return BuildObject.of(version, job)


@routes.post("/v1/indexes/rollback", operation_id="roll_back_index", responses=errors(409, 503))
async def roll_back_index(services: ServicesDep, caller: CallerDep) -> IndexObject:
    """Answer from the version that was live before this one; it has every document too."""
    caller.require(SCOPE)
    return _shown(services, await services.retriever.indexes.rollback())


@routes.get("/v1/indexes/{index_version}", operation_id="get_index", responses=errors(404, 503))
async def get_index(services: ServicesDep, caller: CallerDep, index_version: IndexId) -> IndexObject:
    """Describe one index version."""
    caller.require(SCOPE)
    return _shown(services, await services.retriever.indexes.version(index_version))


@routes.post("/v1/indexes/{index_version}/compare", operation_id="compare_index", responses=errors(404, 409, 413, 503))
async def compare_index(
    services: ServicesDep, caller: CallerDep, index_version: IndexId, body: CompareRequest
) -> IndexObject:
    """Rank the tenant's documents for questions, by this version and by the live one, and keep the figures."""
    caller.require(SCOPE)
    await compare(services.retriever, caller.sees(), body.judged(), index_version, k=body.k)
    return _shown(services, await services.retriever.indexes.version(index_version))


@routes.post("/v1/indexes/{index_version}/switch", operation_id="switch_index", responses=errors(404, 409, 503))
async def switch_index(
    services: ServicesDep, caller: CallerDep, index_version: IndexId, body: SwitchRequest
) -> IndexObject:
    """Answer from this version from now on; the one before follows it, so that it can be gone back to."""
    caller.require(SCOPE)
    return _shown(services, await services.retriever.indexes.switch(index_version, uncompared=body.uncompared))


@routes.delete("/v1/indexes/{index_version}", operation_id="drop_index", responses=errors(404, 409, 503))
async def drop_index(services: ServicesDep, caller: CallerDep, index_version: IndexId) -> DroppedIndex:
    """Remove a version that does not answer; one that is being built is given up."""
    caller.require(SCOPE)
    await services.retriever.indexes.drop(index_version)
    return DroppedIndex(id=index_version)


def _shown(services: Services, version: IndexVersion) -> IndexObject:
    return IndexObject.of(version, services.retriever.indexes.trouble(version))
