"""Canary trials: bets are fair, states survive storage, replays give the same bits, verdicts follow the plan."""

import itertools
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability.sequential import Evidence, Guard, Observation, Plan, Trial, replay
from tests.benchmarks import simulated_canaries as simulated
from tests.properties import examples

PLAN = Plan(guards=(Guard(name="refusal"), Guard(name="unsupported", tolerance=0.02, margin=0.1, weight=3)))
ONE = Plan(guards=(Guard(name="bad"),))

guards = st.builds(
    lambda tolerance, more: Guard(name="bad", tolerance=tolerance, margin=min(0.99, tolerance + more)),
    st.floats(0, 0.3),
    st.floats(0.01, 0.5),
)
shares = st.floats(0, 1)
sessions = st.tuples(st.sampled_from(["stable", "stable", "stable", "canary"]), shares)
observations = st.lists(
    st.builds(
        lambda guard, session: Observation(guard, *session), st.sampled_from(["refusal", "unsupported"]), sessions
    ),
    max_size=60,
)


def stream(seed, n, *, stable, canary, share=0.1, guard="bad"):
    """Sessions as they come, each with its arm and whether it was bad."""
    random = np.random.default_rng(seed)
    arms = random.random(n) < share
    bad = random.random(n) < np.where(arms, canary, stable)
    return [Observation(guard, "canary" if arm else "stable", float(each)) for arm, each in zip(arms, bad, strict=True)]


def through(guard, rows):
    evidence = Evidence()
    for arm, badness in rows:
        evidence = evidence.observe(guard, arm, badness)
    return evidence


@examples(20)
@given(guards, st.lists(st.sampled_from(["stable", "canary"]), min_size=3, max_size=5), shares, st.booleans())
def test_a_canary_that_is_no_worse_wins_nothing_on_average(guard, last_arms, rate, at_margin):
    # Every way in which these sessions could turn out, weighed by its chance, is the exact expectation of the capital.
    arms = ["stable"] * 4 + last_arms
    worse = guard.margin if at_margin else guard.tolerance
    rates = {"stable": rate * (1 - worse), "canary": rate * (1 - worse) + worse}
    harm = safety = 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=len(arms)):
        chance = math.prod(rates[arm] if bad else 1 - rates[arm] for arm, bad in zip(arms, outcome, strict=True))
        evidence = through(guard, zip(arms, outcome, strict=True))
        harm += chance * evidence.harm_e_value
        safety += chance * evidence.safety_e_value
    assert (safety if at_margin else harm) == pytest.approx(1)


@given(guards, st.lists(sessions, max_size=80))
def test_capital_is_never_negative_and_counts_add_up(guard, rows):
    evidence = through(guard, rows)
    assert min(*evidence.harm, *evidence.safety) >= 0
    assert evidence.canary.n == sum(arm == "canary" for arm, _ in rows)
    assert evidence.stable.badness == pytest.approx(sum(bad for arm, bad in rows if arm == "stable"))
    assert len(evidence.waiting_canary) <= 8


@given(guards, st.lists(sessions, min_size=1, max_size=60), st.data())
def test_a_worse_canary_session_never_looks_better(guard, rows, data):
    place = data.draw(st.integers(0, len(rows) - 1))
    arm, badness = rows[place]
    worse = [*rows[:place], (arm, data.draw(st.floats(badness, 1))), *rows[place + 1 :]]
    before, after = through(guard, rows), through(guard, worse)
    if arm == "stable":
        before, after = after, before
    assert after.harm_e_value >= before.harm_e_value * (1 - 1e-12)
    assert after.safety_e_value <= before.safety_e_value * (1 + 1e-12)


@given(observations, st.integers(0, 60))
def test_a_state_survives_json_bit_for_bit(rows, cut):
    trial = Trial.begin(PLAN)
    for row in rows[:cut]:
        trial = trial.observe(row)
    stored = msgspec.json.decode(msgspec.json.encode(trial), type=Trial)
    assert stored == trial
    for row in rows[cut:]:
        trial, stored = trial.observe(row), stored.observe(row)
    assert stored == trial
    assert stored.verdict == trial.verdict


def test_a_replay_retraces_the_path_and_ends_where_it_was_decided():
    rows = stream(5, 20_000, stable=0.1, canary=0.3)
    trial, path = Trial.begin(ONE), []
    for row in rows:
        trial = trial.observe(row)
        path.append((trial.evidence["bad"].harm_e_value, trial.verdict))
        if trial.verdict.action != "continue":
            break
    steps = list(replay(ONE, rows))
    assert [(step.harm_e_value, step.verdict) for step in steps] == path
    assert [step.observation for step in steps] == rows[: len(steps)]
    assert steps[-1].verdict.action == "roll_back"
    assert steps[-1].harm_e_value == steps[-1].verdict.e_value >= steps[-1].verdict.threshold == pytest.approx(100)
    assert list(replay(ONE, map(msgspec.structs.replace, rows))) == steps


def test_a_replay_without_a_decision_goes_to_the_end():
    rows = stream(6, 400, stable=0.1, canary=0.1)
    assert len(list(replay(ONE, rows))) == 400


def test_a_bad_canary_is_rolled_back_and_a_good_one_promoted():
    *_, bad = replay(ONE, stream(7, 50_000, stable=0.1, canary=0.25))
    assert (bad.verdict.action, bad.verdict.guard) == ("roll_back", "bad")
    *_, good = replay(ONE, stream(8, 50_000, stable=0.1, canary=0.1))
    assert good.verdict.action == "promote"
    assert good.verdict.e_value >= good.verdict.threshold == pytest.approx(20)


def test_nothing_is_decided_before_the_canary_was_seen_often_enough():
    rows = [Observation("bad", arm, float(arm == "canary")) for _ in range(40) for arm in (*["stable"] * 9, "canary")]
    steps = list(replay(ONE, rows))
    assert sum(step.observation.arm == "canary" for step in steps) == ONE.min_observations == 30
    assert steps[-1].verdict.action == "roll_back"
    assert steps[200].harm_e_value > steps[200].verdict.threshold


def test_the_error_budget_is_split_by_weight():
    small, large = PLAN.guards
    assert PLAN.rollback_threshold(small) == pytest.approx(400)
    assert PLAN.rollback_threshold(large) == pytest.approx(400 / 3)
    assert sum(1 / PLAN.rollback_threshold(guard) for guard in PLAN.guards) == pytest.approx(PLAN.rollback_error)


def test_one_guard_rolls_back_while_all_must_agree_to_promote():
    good = stream(9, 30_000, stable=0.1, canary=0.1, guard="refusal")
    unheard = Trial.begin(PLAN)
    for row in good[:9000]:
        unheard = unheard.observe(row)
    assert unheard.evidence["refusal"].safety_e_value > PLAN.promotion_threshold
    assert unheard.verdict.action == "continue"
    bad = stream(10, 30_000, stable=0.1, canary=0.5, guard="unsupported")
    *_, last = replay(PLAN, [row for pair in zip(good, bad, strict=True) for row in pair])
    assert (last.verdict.action, last.verdict.guard) == ("roll_back", "unsupported")


def test_worse_within_the_tolerance_is_not_harm():
    plan = Plan(guards=(Guard(name="bad", tolerance=0.1, margin=0.2),))
    steps = list(replay(plan, stream(11, 20_000, stable=0.1, canary=0.17)))
    assert steps[-1].verdict.action == "promote"


@pytest.mark.parametrize("arm", ["stable", "canary"])
def test_one_arm_alone_is_no_evidence(arm):
    evidence = through(ONE.guards[0], [(arm, 1.0)] * 100)
    assert (evidence.harm_e_value, evidence.safety_e_value) == (1.0, 1.0)


def test_capital_beyond_what_json_can_hold_is_given_away():
    evidence = through(
        ONE.guards[0], [("stable", 0.0), ("stable", 0.0), ("stable", 0.0), ("stable", 0.0), ("canary", 1.0)] * 2000
    )
    assert math.isfinite(evidence.harm_e_value)
    assert msgspec.json.decode(msgspec.json.encode(evidence), type=Evidence) == evidence


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_the_simulations_compute_what_a_trial_does(share):
    random = np.random.default_rng(12)
    arms, badness = random.random(3000) < share, np.round(random.random(3000), 2)
    pairs = simulated.pairing(arms)
    difference = simulated.differences(arms, badness, pairs)
    guard = Guard(name="bad", tolerance=0.03, margin=0.1)
    evidence = through(guard, zip(np.where(arms, "canary", "stable").tolist(), badness.tolist(), strict=True))
    assert simulated.harm(difference, 0.03)[-1] == pytest.approx(evidence.harm_e_value)
    assert simulated.safety(difference, 0.1)[-1] == pytest.approx(evidence.safety_e_value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guard(name="g", tolerance=-0.1), "g: tolerance must be from 0 to margin"),
        (lambda: Guard(name="h", tolerance=0.2, margin=0.1), "h: tolerance must be from 0 to margin"),
        (lambda: Guard(name="g", margin=1.0), "margin above 0 and below 1"),
        (lambda: Guard(name="h", margin=0.0), "h: tolerance must be from 0 to margin, and margin above 0 and below 1"),
        (lambda: Guard(name="g", weight=0.0), "g: weight must be above 0"),
        (lambda: Plan(guards=()), "guards must be one or more"),
        (lambda: Plan(guards=(Guard(name="g"), Guard(name="g"))), "each with a name of its own"),
        (lambda: Plan(guards=(Guard(name="g"),), rollback_error=0.0), "rollback_error and promotion_error"),
        (lambda: Trial.begin(ONE).observe(Observation("other", "canary", 0.0)), "no guard 'other'"),
        (
            lambda: Trial.begin(ONE).observe(Observation("bad", "canary", 1.5)),
            "bad: badness must be between 0 and 1, not 1.5",
        ),
        (lambda: Trial.begin(ONE).observe(Observation("bad", "canary", math.nan)), "badness must be between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
