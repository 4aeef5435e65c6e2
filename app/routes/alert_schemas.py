"""Alerts, their rules, silences and notifications as JSON."""

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from app.alerts import (
    MAX_RULES,
    Alert,
    BadRules,
    BurnWindow,
    Event,
    Kind,
    Notification,
    Rule,
    RuleSet,
    Severity,
    Silence,
    State,
    read_rules,
)
from app.errors import InvalidRequest
from app.releases import LABEL_PATTERN, NAME_PATTERN
from app.routes.registry_schemas import Revision, Why, moment
from app.routes.schemas import Wire

TARGET_PATTERN = f"{NAME_PATTERN}|{LABEL_PATTERN}"
_RULE_PATTERN = r"^[a-z][a-z0-9_]{0,47}$"
_USUAL = {field.name: field.default for field in msgspec.structs.fields(Rule)}

Pause = Annotated[float, Field(ge=0, le=86_400)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86_400)]


class BurnWindowObject(Wire):
    """A long window that shows harm, and a short one that shows that it goes on."""

    long_seconds: Seconds
    short_seconds: Seconds
    factor: float = Field(gt=0, le=10_000, description="How many times as fast as it may the budget burns in both.")


class RuleObject(Wire):
    """What to be told of; which fields matter follows from `kind`."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(pattern=_RULE_PATTERN)
    kind: Literal["threshold", "absence", "drift", "burn_rate"]
    severity: Severity = "ticket"
    for_seconds: Pause = Field(0.0, description="How long it must be bad before it fires; until then it is pending.")
    keep_seconds: Pause = Field(_USUAL["keep_seconds"], description="How long it must be good before it is resolved.")
    window_seconds: Seconds = Field(_USUAL["window_seconds"], description="The answers of the last so many seconds.")
    min_n: int = Field(_USUAL["min_n"], ge=1, le=1_000_000, description="With fewer answers nothing is known.")
    figure: str | None = Field(
        None, pattern=r"^[a-z][a-z0-9_]{0,63}$", description="Of the quality report; for `threshold` and `absence`."
    )
    class_name: str | None = Field(None, alias="class", min_length=1, max_length=256, description="Of that figure.")
    above: float | None = Field(None, description="Bad where the figure's whole interval is above.")
    below: float | None = Field(None, description="Bad where the figure's whole interval is below.")
    missing: Literal["answers", "labels", "figure"] | None = Field(
        None, description="For `absence`: what must be there within the window."
    )
    shifts: list[Literal["inputs", "outputs"]] = Field(["inputs", "outputs"], max_length=2, description="For `drift`.")
    share: Literal["failed", "refused", "abstained", "unsupported", "truncated", "slow"] | None = Field(
        None, description="For `burn_rate`: the bad answers."
    )
    objective: float | None = Field(None, gt=0, lt=1, description="For `burn_rate`: the share that must be good.")
    slow_seconds: float = Field(_USUAL["slow_seconds"], gt=0, le=86_400, description="For the share `slow`.")
    windows: list[BurnWindowObject] = Field(
        [BurnWindowObject(**msgspec.to_builtins(window)) for window in _USUAL["windows"]],
        min_length=1,
        max_length=4,
        description="For `burn_rate`: it fires where both windows of any pair burn too fast.",
    )

    @classmethod
    def of(cls, rule: Rule) -> "RuleObject":
        """The rule as it is shown, with every field."""
        facts = {name: getattr(rule, name) for name in rule.__struct_fields__}
        windows = [_window(each) for each in rule.windows]
        return cls.model_validate({**facts, "shifts": list(rule.shifts), "windows": windows})


def _window(window: BurnWindow) -> dict[str, Any]:
    return dict(msgspec.structs.asdict(window))


def rules_of(given: Iterable[RuleObject]) -> tuple[Rule, ...]:
    """Make the rules that are meant; raises InvalidRequest where fields of one contradict each other."""
    try:
        return read_rules([each.model_dump(by_alias=True, exclude_none=True) for each in given], field="rules")
    except BadRules as error:
        raise bad_rules(error) from error


def bad_rules(error: BadRules) -> InvalidRequest:
    """The error that a caller sees."""
    text = str(error)
    return InvalidRequest(text if text.endswith(".") else f"{text}.", param=error.field)


class RulesChange(Wire):
    """The rules that hold from now on, in place of those before."""

    rules: list[RuleObject] = Field(max_length=MAX_RULES, description="An empty list: nothing is looked at.")
    why: Why
    revision: Revision


class RulesObject(BaseModel):
    """The rules that hold for a name or one of its releases."""

    object: Literal["alert_rules"] = "alert_rules"
    target: str = Field(description="A name, or a release as `name@3`.")
    holds_from: str | None = Field(description="Whose rules these are; null where they are the usual ones.")
    rules: list[RuleObject]

    @classmethod
    def of(cls, target: str, holds_from: str | None, rules: Iterable[Rule]) -> "RulesObject":
        """The rules as they are shown."""
        return cls(target=target, holds_from=holds_from, rules=[RuleObject.of(each) for each in rules])


class RuleSetObject(BaseModel):
    """One revision of a set of rules."""

    object: Literal["alert_rule_set"] = "alert_rule_set"
    target: str
    revision: int
    rules: list[RuleObject] | None = Field(description="Null where it was taken away: the more general ones hold then.")
    at: datetime
    who: str
    why: str

    @classmethod
    def of(cls, found: RuleSet) -> "RuleSetObject":
        """The revision as it is shown."""
        return cls(
            target=found.target,
            revision=found.revision,
            rules=None if found.rules is None else [RuleObject.of(each) for each in found.rules],
            at=moment(found.at),
            who=found.who,
            why=found.why,
        )


class RuleSetList(BaseModel):
    """Sets of rules, or the revisions of one."""

    object: Literal["list"] = "list"
    data: list[RuleSetObject]


class AlertObject(BaseModel):
    """An alert: there is one for a tenant, a rule and a release until it is resolved."""

    id: str
    object: Literal["alert"] = "alert"
    rule: str
    release: str | None = Field(description="Null where it is about the deployment.")
    kind: Kind
    severity: Severity
    state: State
    is_deployments: bool = Field(description="Whether it is about all tenants together.")
    why: str = Field(description="What was found, in figures.")
    facts: dict[str, Any] = Field(description="The figures: value, interval, n, ids of examples.")
    since: datetime = Field(description="When it began to be bad.")
    fired_at: datetime | None = None
    resolved_at: datetime | None = None
    acknowledged_at: datetime | None = None
    acknowledged_by: str | None = None

    @classmethod
    def of(cls, alert: Alert) -> "AlertObject":
        """The alert as it is shown."""
        return cls(**_facts_of(alert))


class EventObject(BaseModel):
    """Something that happened to an alert."""

    at: datetime
    action: str = Field(description="`pending`, `firing`, `resolved`, or `acknowledged`.")
    who: str | None = None
    why: str
    facts: dict[str, Any]


class AlertDetail(AlertObject):
    """An alert with its history."""

    events: list[EventObject]

    @classmethod
    def with_events(cls, alert: Alert, events: Iterable[Event]) -> "AlertDetail":
        """The alert as it is shown by itself."""
        shown = [
            EventObject(at=moment(each.at), action=each.action, who=each.who, why=each.why, facts=each.facts)
            for each in events
        ]
        return cls(**_facts_of(alert), events=shown)


def _facts_of(alert: Alert) -> dict[str, Any]:
    subject = alert.subject
    times = ("since", "fired_at", "resolved_at", "acknowledged_at")
    return {
        **{name: getattr(alert, name) for name in ("id", "kind", "severity", "state", "why", "facts")},
        **{name: _moment(getattr(alert, name)) for name in times},
        "rule": subject.rule,
        "release": subject.release or None,
        "is_deployments": not subject.tenant,
        "acknowledged_by": alert.acknowledged_by,
    }


class AlertList(BaseModel):
    """One page of alerts, the newest first; `next` is the `before` of the next one."""

    object: Literal["list"] = "list"
    data: list[AlertObject]
    next: str | None = None


class Acknowledgement(Wire):
    """Say that somebody looks after an alert."""

    why: Why


class SilenceRequest(Wire):
    """Tell nobody of these alerts for a time; they are found and kept as ever."""

    rule: str = Field(pattern=rf"{_RULE_PATTERN}|^\*$", description="`*` is any.")
    release: str = Field(
        "*", max_length=80, pattern=rf"{TARGET_PATTERN}|^\*$", description="As `name@3`, or `name`; `*` is any."
    )
    seconds: float = Field(gt=0, le=30 * 86_400)
    why: Why


class SilenceObject(BaseModel):
    """A silence."""

    id: str
    object: Literal["alert_silence"] = "alert_silence"
    rule: str
    release: str
    until: datetime
    at: datetime
    who: str
    why: str

    @classmethod
    def of(cls, silence: Silence) -> "SilenceObject":
        """The silence as it is shown."""
        facts = {name: getattr(silence, name) for name in ("id", "rule", "release", "who", "why")}
        return cls(**facts, until=moment(silence.until), at=moment(silence.at))


class SilenceList(BaseModel):
    """The silences that hold."""

    object: Literal["list"] = "list"
    data: list[SilenceObject]


class SilenceEnded(BaseModel):
    """A silence that was ended before its time."""

    id: str
    object: Literal["alert_silence.ended"] = "alert_silence.ended"
    ended: Literal[True] = True


class NotificationObject(BaseModel):
    """Something that was or is to be told by the webhook."""

    id: str = Field(description="The `webhook-id` of every attempt.")
    object: Literal["alert_notification"] = "alert_notification"
    alert: str
    action: str
    state: Literal["waiting", "delivered", "dead"] = Field(description="`dead`: nobody took it for a day.")
    attempts: int
    next_at: datetime | None = None
    created_at: datetime
    ended_at: datetime | None = None
    problem: str | None = Field(None, description="Why the last attempt failed.")
    body: dict[str, Any] = Field(description="What is sent.")

    @classmethod
    def of(cls, found: Notification) -> "NotificationObject":
        """The notification as it is shown."""
        facts = {name: getattr(found, name) for name in ("id", "alert", "action", "state", "attempts", "problem")}
        return cls(
            **facts,
            next_at=moment(found.next_at) if found.state == "waiting" else None,
            created_at=moment(found.created_at),
            ended_at=_moment(found.ended_at),
            body=msgspec.json.decode(found.body),
        )


class NotificationList(BaseModel):
    """One page of notifications, the newest first; `next` is the `before` of the next one."""

    object: Literal["list"] = "list"
    data: list[NotificationObject]
    next: str | None = None


def _moment(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else moment(milliseconds)
