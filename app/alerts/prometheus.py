"""Pure: the same rules for a team's own Prometheus, and an example for its Alertmanager, as YAML.

The main rule: what fires here fires there, on the same numbers, as far as `/metrics` has them: figures of the last day,
with their intervals. A rule about anything else follows from `hallmark_alerts`, which says what Hallmark itself found.
"""

import json
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from app.alerts.rules import DEFAULT_RULES, Rule

_HEAD = """\
# Made by `hallmark alerts prometheus`; a test keeps it so. Change rules in Hallmark and make it again.
#
# Figures on /metrics are those of the last day and of all tenants together, computed every five minutes, so a threshold
# here may be a little later than the alert of the same name in Hallmark, whose window is the rule's own.
"""

_REQUESTS = 'hallmark_requests_total{release!="",outcome!="cancelled"}'


class PrometheusRule(msgspec.Struct, frozen=True):
    """One alerting rule of Prometheus."""

    alert: str
    expression: str
    severity: str
    summary: str
    for_minutes: float = 0.0


SERVICE_RULES = (
    PrometheusRule("HallmarkAbsent", "absent(hallmark_build_info)", "page", "No Hallmark service is scraped.", 5),
    PrometheusRule(
        "HallmarkEngineAbsent", "absent(hallmark_engine_up)", "page", "No engine is known to any Hallmark service.", 5
    ),
    PrometheusRule(
        "HallmarkEngineDown",
        "max by (engine) (hallmark_engine_up) == 0",
        "page",
        "No engine of the group {{ $labels.engine }} takes requests.",
        2,
    ),
    PrometheusRule(
        "HallmarkUnrecorded",
        'increase(hallmark_records_total{result=~"failed|dropped"}[10m]) > 0',
        "page",
        "Predictions are not recorded.",
    ),
    PrometheusRule(
        "HallmarkOverloaded",
        'sum(rate(hallmark_refusals_total{reason="overloaded"}[5m])) > 0.01 * sum(rate(hallmark_requests_total[5m]))',
        "ticket",
        "Over one request in a hundred finds no place.",
        10,
    ),
    PrometheusRule(
        "HallmarkOutboxStuck",
        "hallmark_outbox_lag_seconds > 300",
        "page",
        "Records of {{ $labels.instance }} do not reach the shared database.",
    ),
    PrometheusRule(
        "HallmarkQualityStale",
        "time() - max(hallmark_quality_timestamp_seconds) > 7200",
        "ticket",
        "Quality has not been computed for two hours.",
    ),
    PrometheusRule(
        "HallmarkAlertingAbsent",
        "absent(hallmark_alerts_timestamp_seconds)",
        "page",
        "No worker has ever looked at the rules: start `hallmark worker`.",
        10,
    ),
    PrometheusRule(
        "HallmarkAlertingStopped",
        "time() - max(hallmark_alerts_timestamp_seconds) > 900",
        "page",
        "No worker has looked at the rules for a quarter of an hour.",
    ),
    PrometheusRule(
        "HallmarkNotificationsDead",
        'max(hallmark_alert_notifications{state="dead"}) > 0',
        "page",
        "Alerts could not be told: the webhook takes nothing.",
    ),
    PrometheusRule(
        "HallmarkAlertFiring",
        'max by (kind, severity, release) (hallmark_alerts{state="firing"}) > 0',
        "ticket",
        "{{ $value }} alerts of the kind {{ $labels.kind }} fire for {{ $labels.release }}: `hallmark alerts list`.",
    ),
)
"""What holds whatever the rules are."""


def rule_file(rules: Sequence[Rule] = DEFAULT_RULES) -> str:
    """A file for Prometheus' `rule_files`."""
    told, untold = [], []
    for rule in rules:
        made = list(_prometheus_rules(rule))
        told += made
        if not made:
            untold.append(rule.name)
    lines = [_HEAD.rstrip("\n")]
    if untold:
        lines.append(f"# Only Hallmark itself can tell: {', '.join(untold)}. HallmarkAlertFiring says when it does.")
    lines.append("groups:")
    for name, group in (("hallmark-service", SERVICE_RULES), ("hallmark-rules", told)):
        if group:
            lines += [f"  - name: {name}", "    rules:", *_yaml(group)]
    return "\n".join(lines) + "\n"


def alertmanager_example() -> str:
    """An example for an Alertmanager that gets these alerts."""
    return """\
# An example, made by `hallmark alerts alertmanager`: pages at once and again every hour, tickets once a day.
# Put your own receivers in the place of the two URLs.
route:
  receiver: tickets
  group_by: [alertname, release]
  group_wait: 30s
  group_interval: 5m
  repeat_interval: 24h
  routes:
    - matchers: ['severity="page"']
      receiver: pages
      group_wait: 10s
      repeat_interval: 1h
inhibit_rules:
  # Where nothing is scraped, nothing else is news.
  - source_matchers: ['alertname="HallmarkAbsent"']
    target_matchers: ['alertname=~"Hallmark.+"', 'alertname!="HallmarkAbsent"']
  # What a rule says by itself, HallmarkAlertFiring need not say again.
  - source_matchers: ['alertname=~"HallmarkRule.+"']
    target_matchers: ['alertname="HallmarkAlertFiring"']
    equal: [release]
receivers:
  - name: pages
    webhook_configs:
      - url: https://pager.example.com/hallmark
        send_resolved: true
  - name: tickets
    webhook_configs:
      - url: https://tickets.example.com/hallmark
        send_resolved: true
"""


def _prometheus_rules(rule: Rule) -> Iterator[PrometheusRule]:
    if rule.kind == "threshold" and rule.class_name is None and not _has_unit(str(rule.figure)):
        yield _made(rule, "", _threshold(rule), f"{rule.figure} is worse than the rule {rule.name} allows.")
    elif rule.kind == "burn_rate" and rule.share in ("failed", "abstained"):
        for at, window in enumerate(rule.windows):
            budget = 1.0 - (rule.objective or 0.0)
            bound = f"{window.factor * budget:.6g}"
            sides = [f"{_bad_share(rule, each)} > {bound}" for each in (window.long_seconds, window.short_seconds)]
            summary = f"The budget for {rule.share} answers burns over {window.factor:g} times as fast as it may."
            yield _made(rule, str(at + 1) if len(rule.windows) > 1 else "", " and ".join(sides), summary)
    elif rule.kind == "absence" and rule.missing == "answers":
        rate = f'sum by (release) (increase(hallmark_requests_total{{release!=""}}[{_span(rule.window_seconds)}]))'
        yield _made(rule, "", f"{rate} == 0", "A release has answered nothing for a while.")
        yield _made(rule, "Absent", 'absent(hallmark_requests_total{release!=""})', "No release has answered.", 60)
    elif rule.kind == "absence" and rule.missing == "labels":
        count = f'sum(increase(hallmark_feedback_total{{kind="label"}}[{_span(rule.window_seconds)}]))'
        yield _made(rule, "", f"{count} == 0", "Nobody has labelled anything for a while.")
        yield _made(rule, "Absent", 'absent(hallmark_feedback_total{kind="label"})', "No label has ever come.", 60)
    elif rule.kind == "drift":
        firing = 'max by (release) (hallmark_alerts{kind="drift",state="firing"}) > 0'
        yield _made(rule, "", firing, "What comes in or goes out has changed.")


def _made(rule: Rule, suffix: str, expression: str, summary: str, for_minutes: float = 0.0) -> PrometheusRule:
    name = "HallmarkRule" + "".join(part.capitalize() for part in rule.name.split("_")) + suffix
    return PrometheusRule(name, expression, rule.severity, summary, for_minutes or rule.for_seconds / 60)


def _threshold(rule: Rule) -> str:
    which = f'{{figure="{rule.figure}"}}'
    enough = f"max by (release) (hallmark_quality_answers{which}) >= {rule.min_n}"
    if rule.above is not None:
        return f"max by (release) (hallmark_quality_low{which}) > {rule.above:g} and {enough}"
    return f"min by (release) (hallmark_quality_high{which}) < {rule.below:g} and {enough}"


def _bad_share(rule: Rule, seconds: float) -> str:
    span = _span(seconds)
    bad = 'hallmark_requests_total{release!="",outcome="failed"}'
    if rule.share == "abstained":
        bad = "hallmark_abstentions_total"
    return f"sum by (release) (rate({bad}[{span}])) / sum by (release) (rate({_REQUESTS}[{span}]))"


def _has_unit(figure: str) -> bool:
    """Whether a figure is no share, and so not on `/metrics`."""
    return "_tokens" in figure or "_seconds" in figure


def _span(seconds: float) -> str:
    return f"{round(seconds)}s"


def _yaml(rules: Iterable[PrometheusRule]) -> Iterator[str]:
    for rule in rules:
        yield f"      - alert: {rule.alert}"
        yield f"        expr: {json.dumps(rule.expression)}"
        if rule.for_minutes:
            yield f"        for: {_span(rule.for_minutes * 60)}"
        yield f"        labels: {{severity: {rule.severity}}}"
        yield f"        annotations: {{summary: {json.dumps(rule.summary)}}}"
