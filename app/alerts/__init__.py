"""Tells people when a release gets worse: rules set before it serves, alerts with a history, and who is told.

The main rule: an alert fires on what is known, not on what may be chance. A figure counts when its whole interval is
on the bad side; an alert exists once for a tenant, a rule and a release; and what is to be told is written in the
transaction that changes the alert, so that a killed worker neither loses nor doubles it. `hallmark worker` does the
work.
"""

from app.alerts.conditions import DriftSource, Finding
from app.alerts.evaluating import Evaluator
from app.alerts.facts import Facts
from app.alerts.gauges import AlertGauges
from app.alerts.notifying import Notifier
from app.alerts.outboxes import OutboxReports
from app.alerts.prometheus import alertmanager_example, rule_file
from app.alerts.rules import (
    BURN_SHARES,
    DEFAULT_RULES,
    MAX_RULES,
    BadRules,
    BurnWindow,
    Kind,
    Rule,
    Severity,
    read_rules,
    rules_in,
)
from app.alerts.rulesets import RuleSet, RuleSets
from app.alerts.states import Alert, State
from app.alerts.store import Alerts, Event, Notification, Silence
from app.alerts.webhook import Webhook, read_secret

__all__ = [
    "BURN_SHARES",
    "DEFAULT_RULES",
    "MAX_RULES",
    "Alert",
    "AlertGauges",
    "Alerts",
    "BadRules",
    "BurnWindow",
    "DriftSource",
    "Evaluator",
    "Event",
    "Facts",
    "Finding",
    "Kind",
    "Notification",
    "Notifier",
    "OutboxReports",
    "Rule",
    "RuleSet",
    "RuleSets",
    "Severity",
    "Silence",
    "State",
    "Webhook",
    "alertmanager_example",
    "read_rules",
    "read_secret",
    "rule_file",
    "rules_in",
]
