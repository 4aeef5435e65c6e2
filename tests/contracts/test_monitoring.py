"""Dashboards, Prometheus' rules and the Alertmanager example speak of metrics and labels that there are."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from app.alerts import DEFAULT_RULES, Rule, read_rules, rule_file
from app.alerts.prometheus import SERVICE_RULES
from app.cli import app
from app.quality.answers import SHARES
from app.routes.front import CHAT_PATH, RESPONSES_PATH
from observability.collectors import AlertSample, AlertTally, DriftSample, EngineSample, GroupSample, QualitySample
from observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "observability" / "dashboards").glob("*.json"))
FIGURES = {*SHARES, "accuracy", "exact_match", "token_f1"}
OTHERS = {"process_cpu_seconds_total": {"instance"}}
"""Metrics that are not ours, with the labels that a query may use."""
ADDED = {"instance", "job"}
"""Labels that the scraper adds."""


class Outbox:
    rows = 1
    lag_seconds = 2.0


def known() -> dict[str, dict[str, set[str]]]:
    """Every series there is, with its labels and their values, where those are a set of ours."""
    metrics = Metrics(version="test", process=False)
    ends = ((200, "finished"), (502, "failed"), (200, "cancelled"))
    for route, (status, outcome) in product((CHAT_PATH, RESPONSES_PATH), ends):
        metrics.answer(
            route=route, release="hallmark@1", status=status, outcome=outcome, seconds=1.0, engine_seconds=0.5,
            retrieval_seconds=0.1, embed_seconds=0.1, first_token_seconds=0.2, priority="normal", waited_seconds=0.1,
            prompt_tokens=1, completion_tokens=1,
        )  # fmt: skip
    metrics.cited("hallmark@1", ("supported",))
    metrics.abstained("hallmark@1", "nothing_relevant")
    metrics.fell_back("hallmark@1", "fallback")
    for reason in ("overloaded", "rate_limit_exceeded"):
        metrics.refused(reason)
    metrics.ingested("created", 1.0)
    for kind in ("positive", "label"):
        metrics.said("end_user", kind)
    metrics.judged([QualitySample("hallmark@1", figure, 0.5, 0.4, 0.6, 10) for figure in sorted(FIGURES)], 1.0)
    kinds = ("threshold", "absence", "drift", "burn_rate", "trial", "rollback", "outbox")
    alerts = [AlertSample(kind, "page", state, "hallmark@1", 1) for kind in kinds for state in ("pending", "firing")]
    metrics.alerted(AlertTally(alerts, 1, 1, 1.0))
    metrics.drifted([DriftSample("hallmark@1", 1, {"inputs": 1, "outputs": 1})])
    engine = EngineSample("tgi", "gpu:80", "closed", 1, 1.0, 0)
    metrics.watch(
        record_queue_depth=lambda: 1, requests_in_flight=lambda: 1, log_lines_dropped=lambda: 1, outbox=Outbox(),
        shadows_dropped=lambda: 1, waiting=lambda: {"normal": 1}, redis_failures=lambda: 1,
        engines=lambda: [GroupSample("tgi", 0, 1.0, 0, [engine])],
    )  # fmt: skip
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found | {name: {label: set() for label in labels} for name, labels in OTHERS.items()}


KNOWN = known()
OPEN_LABELS = {"release", "instance", "member", "engine", "source", "kind"}
"""Labels of which only some values are made above; the alerts' kinds are all there."""

_SELECTOR = re.compile(r"\b((?:hallmark|process)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


def check(expression: str) -> None:
    """Every metric and every label that a query names is there, and every value it asks for can be."""
    named = [match for match in _SELECTOR.finditer(expression) if match.group(1) not in _GROUPING.findall(expression)]
    assert named, expression
    labels: set[str] = set()
    for match in named:
        name, matchers = match.group(1), match.group(2) or ""
        assert name in KNOWN, f"{name} in {expression}"
        labels |= KNOWN[name].keys()
        assert not re.sub(r"[\s,]", "", _MATCHER.sub("", matchers)), f"{matchers} in {expression}"
        for label, operator, value in _MATCHER.findall(matchers):
            assert label in KNOWN[name] or label in ADDED, f"{name} has no label {label}: {expression}"
            if label not in OPEN_LABELS or (label == "kind" and name == "hallmark_alerts"):
                for each in value.split("|") if operator in ("=~", "!~") else [value]:
                    assert each in KNOWN[name][label], f"{name}'s {label} is never {each!r}: {expression}"
    for grouping in _GROUPING.findall(expression):
        for label in re.findall(r"\w+", grouping):
            assert label in labels | ADDED, f"nothing has a label {label}: {expression}"


def test_a_query_that_names_what_there_is_not_is_noticed() -> None:
    check('sum by (release) (rate(hallmark_requests_total{outcome="failed"}[5m]))')
    for wrong in (
        "rate(hallmark_request_total[5m])",
        'hallmark_requests_total{outcom="failed"}',
        'hallmark_requests_total{outcome="fail"}',
        "sum by (releas) (hallmark_requests_total)",
        'hallmark_quality{figure="refusals"}',
        "up",
    ):
        with pytest.raises(AssertionError):
            check(wrong)


# --- Prometheus ---


def rules(text: str) -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(text)["groups"]:
        yield from group["rules"]


def test_the_rule_file_is_what_the_command_prints() -> None:
    for file, command in (("hallmark.rules.yaml", "prometheus"), ("alertmanager.yaml", "alertmanager")):
        printed = CliRunner().invoke(app, ["alerts", command])
        assert printed.stdout == (ROOT / "deploy" / file).read_text(encoding="utf-8"), f"hallmark alerts {command}"


def test_every_rule_of_prometheus_asks_for_metrics_that_there_are() -> None:
    found = list(rules(rule_file()))
    assert len(found) > len(SERVICE_RULES)
    assert len({each["alert"] for each in found}) == len(found)
    assert any("absent(" in each["expr"] for each in found)
    for each in found:
        check(each["expr"])
        assert re.fullmatch(r"Hallmark\w+", each["alert"])
        assert each["labels"]["severity"] in ("page", "ticket")
        assert each["annotations"]["summary"].endswith((".", ".`"))


EVERY_KIND = read_rules(
    [
        {"name": "low", "kind": "threshold", "figure": "thumbs_up", "below": 0.5},
        {"name": "billing", "kind": "threshold", "figure": "accuracy", "class": "billing", "below": 0.5},
        {"name": "long", "kind": "threshold", "figure": "completion_tokens", "above": 300},
        {"name": "withheld", "kind": "burn_rate", "share": "abstained", "objective": 0.95},
        {"name": "slow", "kind": "burn_rate", "share": "slow", "objective": 0.95},
        {"name": "no_labels", "kind": "absence", "missing": "labels", "severity": "page", "for_seconds": 90},
        {"name": "no_figure", "kind": "absence", "missing": "figure", "figure": "accuracy"},
        {"name": "drift", "kind": "drift"},
    ]
)


def test_rules_of_every_kind_become_rules_of_prometheus_or_are_named_as_none() -> None:
    text = rule_file(EVERY_KIND)
    names = [each["alert"] for each in rules(text)][len(SERVICE_RULES) :]
    assert names == [
        "HallmarkRuleLow",
        "HallmarkRuleWithheld1",
        "HallmarkRuleWithheld2",
        "HallmarkRuleNoLabels",
        "HallmarkRuleNoLabelsAbsent",
        "HallmarkRuleDrift",
    ]
    assert "# Only Hallmark itself can tell: billing, long, slow, no_figure." in text
    for each in rules(text):
        check(each["expr"])
    assert "for: 90s" in text


@pytest.mark.parametrize("which", [DEFAULT_RULES, EVERY_KIND], ids=["usual", "every kind"])
def test_promtool_takes_the_rule_file(which: tuple[Rule, ...], tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: it comes with Prometheus, such as Debian's package `prometheus`")
    file = tmp_path / "rules.yaml"
    file.write_text(rule_file(which), encoding="utf-8")
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


PROMTOOL_TEST = """
rule_files: [rules.yaml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'hallmark_requests_total{status="200",outcome="finished",release="hallmark@1"}', values: '0+80x120'}
      - {series: 'hallmark_requests_total{status="502",outcome="failed",release="hallmark@1"}', values: '0+20x120'}
      - {series: 'hallmark_requests_total{status="200",outcome="finished",release="hallmark@2"}', values: '0+99x120'}
      - {series: 'hallmark_requests_total{status="502",outcome="failed",release="hallmark@2"}', values: '0+1x120'}
      - {series: 'hallmark_quality_low{release="hallmark@1",figure="refused"}', values: '0.3x120'}
      - {series: 'hallmark_quality_answers{release="hallmark@1",figure="refused"}', values: '400x120'}
      - {series: 'hallmark_quality_low{release="hallmark@2",figure="refused"}', values: '0.3x120'}
      - {series: 'hallmark_quality_answers{release="hallmark@2",figure="refused"}', values: '10x120'}
      - {series: 'hallmark_build_info{version="1",python="3"}', values: '1x120'}
    alert_rule_test:
      - eval_time: 90m
        alertname: HallmarkRuleErrors1
        exp_alerts:
          - exp_labels: {severity: page, release: hallmark@1}
            exp_annotations: {summary: "The budget for failed answers burns over 14.4 times as fast as it may."}
      - eval_time: 90m
        alertname: HallmarkRuleRefusals
        exp_alerts:
          - exp_labels: {severity: page, release: hallmark@1}
            exp_annotations: {summary: "refused is worse than the rule refusals allows."}
      - {eval_time: 90m, alertname: HallmarkAbsent, exp_alerts: []}
      - eval_time: 90m
        alertname: HallmarkAlertingAbsent
        exp_alerts:
          - exp_labels: {severity: page}
            exp_annotations: {summary: "No worker has ever looked at the rules: start `hallmark worker`."}
"""


def test_the_rules_fire_where_they_should_and_nowhere_else(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: it comes with Prometheus, such as Debian's package `prometheus`")
    (tmp_path / "rules.yaml").write_text(rule_file(), encoding="utf-8")
    (tmp_path / "test.yaml").write_text(PROMTOOL_TEST, encoding="utf-8")
    done = subprocess.run([promtool, "test", "rules", "test.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_loads_the_rules_and_knows_the_alertmanager() -> None:
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text(encoding="utf-8"))
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name, files in (
        ("prometheus", prometheus["rule_files"]),
        ("alertmanager", ["/etc/alertmanager/alertmanager.yml"]),
    ):
        mounted = [volume.split(":")[1] for volume in services[name]["volumes"]]
        assert set(files) <= set(mounted)
    (target,) = prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services


def test_the_alertmanager_example_leads_every_severity_to_a_receiver() -> None:
    example = yaml.safe_load((ROOT / "deploy" / "alertmanager.yaml").read_text(encoding="utf-8"))
    receivers = {each["name"] for each in example["receivers"]}
    routes = [example["route"], *example["route"]["routes"]]
    assert {route["receiver"] for route in routes} == receivers
    assert "HallmarkAbsent" in str(example["inhibit_rules"])
    assert {rule.alert for rule in SERVICE_RULES} >= set(re.findall(r"Hallmark(?!Rule)\w+\b(?!\.)", str(example)))


# --- dashboards ---


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_imported_and_every_query_asks_for_metrics_that_there_are(path: Path) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    assert dashboard["uid"] == f"hallmark-{path.stem}"
    assert (dashboard["schemaVersion"], dashboard["tags"]) == (39, ["hallmark"])
    assert "id" not in dashboard  # Grafana gives it.
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    ids, places = [], set()
    for panel in panels(dashboard):
        ids.append(panel["id"])
        assert panel["title"]
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, f"{panel['title']} lies on another panel"
        places |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            used = set(re.findall(r"\$\{?(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables.keys()
            check(re.sub(r"\$(release\|?)", ".*", target["expr"]))
    assert len(set(ids)) == len(ids)
    for variable in variables.values():
        if variable["type"] == "query":
            name, label = re.findall(r"label_values\((\w+), (\w+)\)", variable["definition"])[0]
            assert label in KNOWN[name]


def test_there_is_a_dashboard_for_each_subject_and_telemetry_describes_it() -> None:
    assert [path.stem for path in DASHBOARDS] == ["quality", "rollouts", "service"]
    described = (ROOT / "docs" / "telemetry.md").read_text(encoding="utf-8")
    for path in DASHBOARDS:
        assert f"observability/dashboards/{path.name}" in described
