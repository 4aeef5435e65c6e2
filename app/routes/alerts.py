"""Alerts over HTTP: what fires, the rules that say so, silences, and what was told."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query

from app.alerts import State
from app.routes.alert_schemas import (
    TARGET_PATTERN,
    Acknowledgement,
    AlertDetail,
    AlertList,
    AlertObject,
    NotificationList,
    NotificationObject,
    RulesChange,
    RuleSetList,
    RuleSetObject,
    RulesObject,
    SilenceEnded,
    SilenceList,
    SilenceObject,
    SilenceRequest,
    rules_of,
)
from app.routes.dependencies import CallerDep, Services, ServicesDep, errors
from app.routes.releases import author

routes = APIRouter(tags=["alerts"])

AlertId = Annotated[UUID, Path()]
Target = Annotated[
    str, Path(max_length=80, pattern=TARGET_PATTERN, description="A name, or one of its releases as `name@3`.")
]
Before = Annotated[UUID | None, Query(description="List those before this one.")]
Limit = Annotated[int, Query(ge=1, le=200)]


@routes.get("/v1/alerts", operation_id="list_alerts", responses=errors(503))
async def list_alerts(
    services: ServicesDep,
    caller: CallerDep,
    state: Annotated[
        Literal["active", "pending", "firing", "resolved", "any"], Query(description="`active`: pending or firing.")
    ] = "active",
    release: Annotated[str | None, Query(max_length=80, pattern=TARGET_PATTERN, description="As `name@3`.")] = None,
    limit: Limit = 50,
    before: Before = None,
) -> AlertList:
    """List the alerts of the tenant and of the deployment, the newest first."""
    caller.require("alerts:read")
    found = await services.alerts.find(
        caller.tenant,
        states=_STATES[state],
        release=release,
        limit=limit,
        before=str(before) if before else None,
    )
    following = found[-1].id if len(found) == limit else None
    return AlertList(data=[AlertObject.of(each) for each in found], next=following)


@routes.get("/v1/alerts/{alert_id}", operation_id="get_alert", responses=errors(404, 503))
async def get_alert(services: ServicesDep, caller: CallerDep, alert_id: AlertId) -> AlertDetail:
    """Show an alert with its history."""
    caller.require("alerts:read")
    return AlertDetail.with_events(*await services.alerts.get(caller.tenant, str(alert_id)))


@routes.post("/v1/alerts/{alert_id}/acknowledge", operation_id="acknowledge_alert", responses=errors(404, 409, 503))
async def acknowledge(
    services: ServicesDep, caller: CallerDep, alert_id: AlertId, body: Acknowledgement
) -> AlertObject:
    """Say that somebody looks after an alert; it goes on firing until it is good again."""
    caller.require("alerts:write")
    found = await services.alerts.acknowledge(caller.tenant, str(alert_id), who=author(caller), why=body.why)
    return AlertObject.of(found)


@routes.get("/v1/alert-rules", operation_id="list_alert_rules", responses=errors(503))
async def list_rules(services: ServicesDep, caller: CallerDep) -> RuleSetList:
    """List the sets of rules that people made; for everything else the usual ones hold."""
    caller.require("alerts:read")
    return RuleSetList(data=[RuleSetObject.of(each) for each in await services.alert_rules.all()])


@routes.get("/v1/alert-rules/{target}", operation_id="get_alert_rules", responses=errors(503))
async def get_rules(services: ServicesDep, caller: CallerDep, target: Target) -> RulesObject:
    """Show the rules that hold for a name or a release: its own, its name's, or the usual ones."""
    caller.require("alerts:read")
    return RulesObject.of(target, *await services.alert_rules.holding(target))


@routes.get("/v1/alert-rules/{target}/revisions", operation_id="list_alert_rule_revisions", responses=errors(503))
async def list_revisions(services: ServicesDep, caller: CallerDep, target: Target, limit: Limit = 50) -> RuleSetList:
    """List what the rules of a name or a release were, the newest first: who set them, and why."""
    caller.require("alerts:read")
    return RuleSetList(
        data=[RuleSetObject.of(each) for each in await services.alert_rules.history(target, limit=limit)]
    )


@routes.put("/v1/alert-rules/{target}", operation_id="set_alert_rules", responses=errors(404, 409, 503))
async def set_rules(services: ServicesDep, caller: CallerDep, target: Target, body: RulesChange) -> RuleSetObject:
    """Set the rules of all releases of a name, or of one release, for every tenant; also before it serves."""
    caller.require("alerts:write")
    rules = rules_of(body.rules)
    await _check_target(services, target)
    made = await services.alert_rules.set(target, rules, who=author(caller), why=body.why, revision=body.revision)
    return RuleSetObject.of(made)


@routes.delete("/v1/alert-rules/{target}", operation_id="remove_alert_rules", responses=errors(503))
async def remove_rules(services: ServicesDep, caller: CallerDep, target: Target) -> RulesObject:
    """Take a set of rules away: then those of its name hold, or the usual ones."""
    caller.require("alerts:write")
    if await services.alert_rules.history(target, limit=1):
        await services.alert_rules.set(target, None, who=author(caller), why="")
    return RulesObject.of(target, *await services.alert_rules.holding(target))


@routes.get("/v1/alert-silences", operation_id="list_alert_silences", responses=errors(503))
async def list_silences(services: ServicesDep, caller: CallerDep) -> SilenceList:
    """List the tenant's silences that hold, and the deployment's."""
    caller.require("alerts:read")
    return SilenceList(data=[SilenceObject.of(each) for each in await services.alerts.silences(caller.tenant)])


@routes.post("/v1/alert-silences", operation_id="silence_alerts", status_code=201, responses=errors(503))
async def silence(services: ServicesDep, caller: CallerDep, body: SilenceRequest) -> SilenceObject:
    """Tell nobody of the tenant's alerts of a rule or a release for a time.

    What still fires when the silence ends is told then. `trial`, `rollback` and `outbox` are the deployment's: a
    silence of one of them holds for everybody, and `*` is none of them.
    """
    caller.require("alerts:write")
    made = await services.alerts.silence(
        caller.tenant, rule=body.rule, release=body.release, seconds=body.seconds, who=author(caller), why=body.why
    )
    return SilenceObject.of(made)


@routes.delete("/v1/alert-silences/{silence_id}", operation_id="end_alert_silence", responses=errors(404, 503))
async def end_silence(services: ServicesDep, caller: CallerDep, silence_id: AlertId) -> SilenceEnded:
    """End a silence before its time."""
    caller.require("alerts:write")
    await services.alerts.end_silence(caller.tenant, str(silence_id))
    return SilenceEnded(id=str(silence_id))


@routes.get("/v1/alert-notifications", operation_id="list_alert_notifications", responses=errors(503))
async def list_notifications(
    services: ServicesDep,
    caller: CallerDep,
    state: Annotated[Literal["waiting", "delivered", "dead"] | None, Query()] = None,
    limit: Limit = 50,
    before: Before = None,
) -> NotificationList:
    """List what was or is to be told by the webhook, the newest first; it is kept for 30 days."""
    caller.require("alerts:read")
    found = await services.alerts.notifications(
        caller.tenant, state=state, limit=limit, before=str(before) if before else None
    )
    following = found[-1].id if len(found) == limit else None
    return NotificationList(data=[NotificationObject.of(each) for each in found], next=following)


@routes.post(
    "/v1/alert-notifications/test", operation_id="test_alert_notification", status_code=202, responses=errors(503)
)
async def test_notification(services: ServicesDep, caller: CallerDep) -> NotificationObject:
    """Have a worker send a test to the webhook; what becomes of it is in the list of notifications."""
    caller.require("alerts:write")
    return NotificationObject.of(await services.alerts.test(caller.tenant))


async def _check_target(services: Services, target: str) -> None:
    """Refuse rules for a release that there is none of; a name may be given its rules before its first release."""
    if "@" in target:
        await services.registry.get(target, param="target")


_STATES: dict[str, tuple[State, ...] | None] = {
    "active": ("pending", "firing"),
    "pending": ("pending",),
    "firing": ("firing",),
    "resolved": ("resolved",),
    "any": None,
}
