"""Rules say what is bad in a way that can be told true or false; alerts go from pending to firing to resolved."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.alerts import DEFAULT_RULES, MAX_RULES, BadRules, Finding, read_rules, rules_in
from app.alerts.rules import decode_rules, encode_rules
from app.alerts.states import Alert, Subject, Timing, advance

REFUSED = {"name": "refusals", "kind": "threshold", "figure": "refused", "above": 0.2}
BURN = {"name": "errors", "kind": "burn_rate", "share": "failed", "objective": 0.99}
SUBJECT = Subject("acme", "refusals", "hallmark@1")


def test_rules_are_read_with_their_defaults_and_kept_as_they_are() -> None:
    (rule,) = read_rules([{**REFUSED, "class": "billing"}])
    assert (rule.severity, rule.min_n, rule.window_seconds, rule.class_name) == ("ticket", 50, 3_600.0, "billing")
    assert decode_rules(encode_rules([rule, *DEFAULT_RULES])) == (rule, *DEFAULT_RULES)


@pytest.mark.parametrize(
    ("rule", "field", "words"),
    [
        ({**REFUSED, "above": None}, "alerts[1].above", "give one of them"),
        ({**REFUSED, "below": 0.1}, "alerts[1].above", "give one of them"),
        ({"name": "a", "kind": "threshold", "above": 0.1}, "alerts[1].figure", "needs `figure`"),
        ({**REFUSED, "share": "failed"}, "alerts[1].share", "leave it out"),
        ({"name": "a", "kind": "absence"}, "alerts[1].missing", "needs `missing`"),
        ({"name": "a", "kind": "absence", "missing": "figure"}, "alerts[1].figure", "names what is missing"),
        ({"name": "a", "kind": "absence", "missing": "answers", "figure": "refused"}, "alerts[1].figure", "goes with"),
        ({"name": "a", "kind": "drift", "shifts": []}, "alerts[1].shifts", "inputs, outputs"),
        ({**BURN, "objective": None}, "alerts[1].objective", "needs `objective`"),
        ({**BURN, "objective": 0.5}, "alerts[1].windows", "can never be reached"),
        (
            {**BURN, "windows": [{"long_seconds": 60, "short_seconds": 60, "factor": 2}]},
            "alerts[1].windows",
            "less than",
        ),
        ({**REFUSED, "name": "Refusals!"}, "alerts[1].name", "regex"),
        ({**REFUSED, "abov": 1}, "alerts[1].abov", "unknown"),
        ({**REFUSED, "name": "taken"}, "alerts[1].name", "already"),
    ],
)
def test_a_rule_that_could_never_be_told_is_refused_with_its_field(
    rule: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(BadRules) as caught:
        read_rules([{**BURN, "name": "taken"}, rule])
    assert caught.value.field == field
    assert words in str(caught.value)
    assert f"`{field}" in str(caught.value)


def test_there_are_only_so_many_rules_and_a_file_without_any_says_nothing() -> None:
    with pytest.raises(BadRules, match=str(MAX_RULES)):
        read_rules([{**REFUSED, "name": f"r{n}"} for n in range(MAX_RULES + 1)])
    assert rules_in({"name": "hallmark"}) is None
    assert rules_in({"alerts": []}) == ()
    for wrong in ({}, "refused", [1]):
        with pytest.raises(BadRules, match=r"\[\[alerts\]\]"):
            rules_in({"alerts": wrong})


# --- states ---

BAD, GOOD, UNKNOWN = Finding(True, "bad"), Finding(False, "good"), Finding(None, "who knows")


def run(
    findings: list[Finding], *, for_seconds: float = 0.0, keep_seconds: float = 0.0
) -> tuple[Alert | None, list[str]]:
    """One finding every ten seconds."""
    alert: Alert | None = None
    actions = []
    for at, finding in enumerate(findings):
        timing = Timing("threshold", "page", for_seconds, keep_seconds)
        alert, action = advance(alert, SUBJECT, timing, finding, at * 10_000, "id")
        actions += [action] if action else []
        if action == "resolved":
            alert = None
    return alert, actions


def test_without_patience_it_fires_and_resolves_at_once_and_once() -> None:
    assert run([GOOD, BAD, BAD, GOOD, GOOD, BAD])[1] == ["firing", "resolved", "firing"]


def test_it_is_pending_until_it_was_bad_for_long_enough_and_dropped_if_not() -> None:
    assert run([BAD, BAD, BAD], for_seconds=20)[1] == ["pending", "firing"]
    assert run([BAD, BAD, GOOD, BAD, BAD], for_seconds=20)[1] == ["pending", "dropped", "pending"]


def test_it_is_resolved_when_it_was_good_for_long_enough() -> None:
    assert run([BAD, GOOD, BAD, GOOD, GOOD], keep_seconds=20)[1] == ["firing"]
    assert run([BAD, GOOD, GOOD, GOOD], keep_seconds=20)[1] == ["firing", "resolved"]


@given(st.lists(st.sampled_from([BAD, GOOD, UNKNOWN]), max_size=30), st.sampled_from([0, 10, 30]))
def test_what_is_not_known_changes_nothing(findings: list[Finding], patience: float) -> None:
    options = {"for_seconds": patience, "keep_seconds": patience}
    alert, actions = run(findings, **options)
    assert run([*findings, UNKNOWN, UNKNOWN], **options) == (alert, actions)
    # Whatever comes, nothing is told twice and nothing is resolved that had not fired.
    told = [action for action in actions if action in ("firing", "resolved")]
    assert told == ["firing", "resolved"] * (len(told) // 2) + ["firing"] * (len(told) % 2)
