"""Pure: how an alert goes from pending to firing to resolved, by one finding after another."""

from typing import Any, Literal

import msgspec

from app.alerts.conditions import Finding
from app.alerts.rules import Kind, Severity

State = Literal["pending", "firing", "resolved"]
Action = Literal["pending", "firing", "resolved", "dropped"]
"""What happened to an alert; one that was never more than pending is dropped without a word."""


class Subject(msgspec.Struct, frozen=True):
    """What an alert is about: there is one at most that has not been resolved."""

    tenant: str
    """Empty where it is about the deployment and not one tenant's answers."""
    rule: str
    release: str


class Timing(msgspec.Struct, frozen=True):
    """How patient a rule is."""

    kind: Kind
    severity: Severity
    for_seconds: float = 0.0
    keep_seconds: float = 0.0


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """An alert as it is on record; times are milliseconds since 1970."""

    id: str
    subject: Subject
    kind: Kind
    severity: Severity
    state: State
    version: int = 0
    """Rises with every change that is written: whoever makes one says which version was seen."""
    since: int
    """When it began to be bad."""
    fired_at: int | None = None
    resolved_at: int | None = None
    good_since: int | None = None
    """Since when it has been good again while it still fires."""
    why: str = ""
    facts: dict[str, Any] = {}
    """The figures that say so: no content, only numbers, names and ids."""
    told: bool = False
    """Whether people were told that it fires: not while it is silenced."""
    acknowledged_at: int | None = None
    acknowledged_by: str | None = None


def advance(
    alert: Alert | None, subject: Subject, timing: Timing, finding: Finding, now: int, new_id: str
) -> tuple[Alert | None, Action | None]:
    """What becomes of an alert (None: there is none) by a finding, and what happened, where something did.

    A finding that tells nothing leaves it as it is: silence is not health.
    """
    if alert is None:
        if not finding.bad:
            return None, None
        state: State = "pending" if timing.for_seconds else "firing"
        made = Alert(
            id=new_id,
            subject=subject,
            kind=timing.kind,
            severity=timing.severity,
            state=state,
            since=now,
            fired_at=None if state == "pending" else now,
            why=finding.why,
            facts=finding.facts,
        )
        return made, state
    if finding.bad is None:
        return alert, None
    if alert.state == "pending":
        return _pending(alert, timing, finding, now)
    return _firing(alert, timing, finding, now)


def resolve(alert: Alert, now: int, why: str) -> Alert:
    """End an alert, whatever its condition says."""
    return msgspec.structs.replace(alert, state="resolved", resolved_at=now, why=why)


def _pending(alert: Alert, timing: Timing, finding: Finding, now: int) -> tuple[Alert | None, Action | None]:
    if not finding.bad:
        return None, "dropped"
    if now - alert.since < timing.for_seconds * 1000:
        return alert, None
    return _changed(alert, finding, state="firing", fired_at=now), "firing"


def _firing(alert: Alert, timing: Timing, finding: Finding, now: int) -> tuple[Alert, Action | None]:
    if finding.bad:
        still = alert.good_since is None and (alert.why, alert.facts) == (finding.why, finding.facts)
        return (alert if still else _changed(alert, finding, good_since=None)), None
    since = now if alert.good_since is None else alert.good_since
    if now - since >= timing.keep_seconds * 1000:
        return resolve(alert, now, finding.why), "resolved"
    if alert.good_since is not None:
        return alert, None
    return msgspec.structs.replace(alert, good_since=since), None


def _changed(alert: Alert, finding: Finding, **facts: Any) -> Alert:
    return msgspec.structs.replace(alert, why=finding.why, facts=finding.facts, **facts)
