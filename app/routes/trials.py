"""A canary's trial over HTTP: what its guards know, and the observations that it follows from."""

from typing import Annotated

from fastapi import APIRouter, Query

from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.rollouts import Name
from app.routes.trial_schemas import ObservationList, ObservationObject, TrialObject

routes = APIRouter()


@routes.get("/v1/rollouts/{name}/trial", operation_id="get_trial", tags=["rollouts"], responses=errors(404, 503))
async def get_trial(services: ServicesDep, caller: CallerDep, name: Name) -> TrialObject:
    """Show the trial of a name's canary, or the last there was: the evidence of each guard, and what was decided."""
    caller.require("releases:read")
    return TrialObject.of(await services.trials.of(name))


@routes.get(
    "/v1/rollouts/{name}/trial/observations",
    operation_id="list_trial_observations",
    tags=["rollouts"],
    responses=errors(404, 503),
)
async def list_trial_observations(
    services: ServicesDep,
    caller: CallerDep,
    name: Name,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="List those with a higher number.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 1_000,
) -> ObservationList:
    """List what the guards heard, in the order in which they did: the decision follows from it again."""
    caller.require("releases:read")
    trial = await services.trials.of(name)
    found = await services.trials.heard(trial.id, after=after, limit=limit)
    following = found[-1].number if len(found) == limit else None
    return ObservationList(trial=trial.id, data=[ObservationObject.of(each) for each in found], next=following)
