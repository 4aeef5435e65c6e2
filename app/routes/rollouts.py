"""Rollouts over HTTP: which release answers whom, and every change of that."""

from typing import Annotated

from fastapi import APIRouter, Path, Query

from app import rollouts
from app.access import Caller
from app.errors import InvalidRequest
from app.registry import Registry, Step
from app.releases import NAME_PATTERN, parse_label
from app.rollouts import Rollout
from app.routes.dependencies import CallerDep, ServicesDep, errors
from app.routes.registry_schemas import (
    CanaryStep,
    PromoteStep,
    RolloutChange,
    RolloutChangeList,
    RolloutList,
    RolloutObject,
    RolloutStep,
    ShadowStep,
)
from app.routes.releases import author

routes = APIRouter()

Name = Annotated[str, Path(pattern=NAME_PATTERN, description="The public name, as requests send it in `model`.")]
_REFUSALS = errors(404, 409, 503)


@routes.get("/v1/rollouts", operation_id="list_rollouts", tags=["rollouts"], responses=errors(503))
async def list_rollouts(services: ServicesDep, caller: CallerDep) -> RolloutList:
    """List the rollouts by name."""
    caller.require("releases:read")
    return RolloutList(data=[RolloutObject.of(rollout) for rollout in await services.registry.rollouts()])


@routes.get("/v1/rollouts/{name}", operation_id="get_rollout", tags=["rollouts"], responses=errors(404, 503))
async def get_rollout(services: ServicesDep, caller: CallerDep, name: Name) -> RolloutObject:
    """Show which releases answer for a name."""
    caller.require("releases:read")
    return RolloutObject.of(await services.registry.rollout(name))


@routes.get(
    "/v1/rollouts/{name}/changes", operation_id="list_rollout_changes", tags=["rollouts"], responses=errors(404, 503)
)
async def list_rollout_changes(
    services: ServicesDep,
    caller: CallerDep,
    name: Name,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="List those before this revision.")] = None,
) -> RolloutChangeList:
    """List the changes of a rollout, newest first: who, why, before, after."""
    caller.require("releases:read")
    found = await services.registry.changes(name, limit=limit, before=before)
    following = found[-1].revision if len(found) == limit else None
    return RolloutChangeList(data=[RolloutChange.of(change) for change in found], next=following)


@routes.post("/v1/rollouts/{name}/canary", operation_id="set_canary", tags=["rollouts"], responses=_REFUSALS)
async def set_canary(services: ServicesDep, caller: CallerDep, name: Name, body: CanaryStep) -> RolloutObject:
    """Try a release on a share of the conversations, or change the share.

    A conversation stays with its release; while the share grows, others join it and none goes back. `hallmark worker`
    watches the canary, and rolls it back when it is worse than the plan allows.
    """
    joins = _number(name, body.release)
    plan = body.plan.plan() if body.plan else None

    def step(rollout: Rollout, _: set[int]) -> Rollout:
        return rollouts.set_canary(rollout, _or_present(joins, rollout.canary, "canary"), body.share, plan)

    return await _change(services.registry, caller, name, "canary", step, body, joins=joins)


@routes.post("/v1/rollouts/{name}/shadow", operation_id="set_shadow", tags=["rollouts"], responses=_REFUSALS)
async def set_shadow(services: ServicesDep, caller: CallerDep, name: Name, body: ShadowStep) -> RolloutObject:
    """Let a release answer a part of the requests unseen, for comparison; a rate of 0 ends it."""
    joins = _number(name, body.release)

    def step(rollout: Rollout, _: set[int]) -> Rollout:
        number = None if body.rate == 0 else _or_present(joins, rollout.shadow, "shadow")
        return rollouts.set_shadow(rollout, number, body.rate)

    return await _change(services.registry, caller, name, "shadow", step, body, joins=joins)


@routes.post("/v1/rollouts/{name}/promote", operation_id="promote", tags=["rollouts"], responses=_REFUSALS)
async def promote(services: ServicesDep, caller: CallerDep, name: Name, body: PromoteStep) -> RolloutObject:
    """Make the canary stable, or another release; a name without a rollout begins one."""
    joins = _number(name, body.release)

    def step(rollout: Rollout, _: set[int]) -> Rollout:
        return rollouts.promote(rollout, joins)

    return await _change(services.registry, caller, name, "promote", step, body, joins=joins)


@routes.post("/v1/rollouts/{name}/rollback", operation_id="roll_back", tags=["rollouts"], responses=_REFUSALS)
async def roll_back(services: ServicesDep, caller: CallerDep, name: Name, body: RolloutStep) -> RolloutObject:
    """End the trial of the canary; without one, go back to what was stable before."""
    return await _change(services.registry, caller, name, "rollback", rollouts.roll_back, body)


@routes.post("/v1/rollouts/{name}/pause", operation_id="pause_rollout", tags=["rollouts"], responses=_REFUSALS)
async def pause(services: ServicesDep, caller: CallerDep, name: Name, body: RolloutStep) -> RolloutObject:
    """Send everything to the stable release, and remember canary and shadow."""
    return await _change(services.registry, caller, name, "pause", lambda rollout, _: rollouts.pause(rollout), body)


@routes.post("/v1/rollouts/{name}/resume", operation_id="resume_rollout", tags=["rollouts"], responses=_REFUSALS)
async def resume(services: ServicesDep, caller: CallerDep, name: Name, body: RolloutStep) -> RolloutObject:
    """Go on where the rollout was paused."""
    return await _change(services.registry, caller, name, "resume", lambda rollout, _: rollouts.resume(rollout), body)


async def _change(
    registry: Registry,
    caller: Caller,
    name: str,
    action: str,
    step: Step,
    body: RolloutStep,
    *,
    joins: int | None = None,
) -> RolloutObject:
    caller.require("releases:write")
    who = author(caller)
    after = await registry.change(
        name, action, step, who=who, why=body.why, joins=joins, revision=body.revision, first=action == "promote"
    )
    return RolloutObject.of(after)


def _number(name: str, label: str | None) -> int | None:
    """The number of a release that must be one of the rollout's name."""
    if label is None:
        return None
    found, number = parse_label(label)
    if found != name:
        raise InvalidRequest(f"`release`: {label} is no release of {name!r}.", param="release")
    return number


def _or_present(joins: int | None, present: int | None, what: str) -> int:
    number = present if joins is None else joins
    if number is None:
        raise InvalidRequest(f"`release`: there is no {what} yet: name the release.", param="release")
    return number
