"""Which predictions a queue takes: decided by one number for each, and with exactly the probability that is noted."""

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.predictions import uuid7
from app.review.estimates import hajek
from app.review.rules import (
    Candidate,
    Negative,
    Rules,
    Threshold,
    chosen,
    draw,
    margin_of,
    rates,
    reviews_wanted,
    support_of,
)

QUEUE = "019a4e5c-7d1b-7c3e-9f00-2b8a6f1d4c55"


def candidate(id_: str = QUEUE, **facts: Any) -> Candidate:
    written = {name: json.dumps(facts.pop(name)) for name in ("citations", "passages") if name in facts}
    blank = {"release_name": "r@1", "verdict": None, "citations": None, "passages": None}
    return Candidate(**{"id": id_, **blank, **facts, **written})


def cited(*citations: tuple[int, float | None], verdict: str = "answered") -> Candidate:
    return candidate(
        verdict=verdict, citations=[{"answer_start": start, "support": support, "n": 1} for start, support in citations]
    )


def found(*scores: float | None) -> Candidate:
    return candidate(passages=[{"id": "p", "dense_score": score, "score": 0.5} for score in scores])


def test_the_number_of_a_prediction_is_the_same_for_ever_and_another_in_each_queue():
    assert draw(QUEUE, "p", "sample") == draw(QUEUE, "p", "sample") == 0.8501847681299958
    others = {draw(QUEUE, "p", "overlap"), draw(QUEUE, "q", "sample"), draw(uuid7(), "p", "sample")}
    assert len({draw(QUEUE, "p", "sample"), *others}) == 4


def test_numbers_are_spread_evenly_over_0_to_1():
    tenths = [0] * 10
    for n in range(20_000):
        number = draw(QUEUE, str(n), "sample")
        assert 0.0 <= number < 1.0
        tenths[int(number * 10)] += 1
    chi_square = sum((each - 2_000) ** 2 / 2_000 for each in tenths)
    assert chi_square < 27.9  # The 99.9 % point of 9 degrees of freedom; the numbers never change.


def test_support_is_the_mean_over_sentences_of_the_best_that_bears_each_out():
    assert support_of(cited((0, 0.4), (0, 0.8), (30, 0.2))) == pytest.approx(0.5)
    assert support_of(cited((0, None))) == 0.0
    assert support_of(cited()) == support_of(candidate(verdict="answered")) == 0.0
    assert support_of(cited((0, 1.0), verdict="replaced:unsupported_answer")) == 0.0
    assert support_of(cited(verdict="abstained:unsupported_answer")) == 0.0
    for verdict in (None, "abstained:nothing_relevant", "abstained:engine_abstained", "replaced:engine_unavailable"):
        assert support_of(candidate(verdict=verdict)) is None


def test_margin_is_what_the_nearest_passage_is_ahead_of_the_next():
    assert margin_of(found(0.5, 0.7, 0.61)) == pytest.approx(0.09)
    assert margin_of(found(0.5, None)) is margin_of(found(0.5)) is margin_of(found()) is margin_of(candidate()) is None


def test_the_highest_rate_counts_and_says_why():
    rules = Rules(
        uniform=0.1,
        low_support=Threshold(rate=0.3, below=0.5),
        low_margin=Threshold(rate=0.2, below=0.05),
        negative_feedback=Negative(rate=0.9),
    )
    poor = cited((0, 0.2))
    assert list(rates(rules, poor, is_negative=False)) == [(0.1, "uniform"), (0.3, "low_support")]
    assert max(rates(rules, poor, is_negative=True)) == (0.9, "negative_feedback")
    assert list(rates(rules, cited((0, 0.5)), is_negative=False)) == [(0.1, "uniform")]
    assert list(rates(rules, found(0.5, 0.48), is_negative=False)) == [(0.1, "uniform"), (0.2, "low_margin")]
    (offer,) = chosen(QUEUE, [(candidate("p"), [(0.9, "uniform"), (0.9, "drift"), (0.1, "low_margin")])])
    assert (offer.policy, offer.probability) == ("uniform", 0.9)


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=4), st.uuids())
def test_who_is_taken_by_one_rate_is_taken_by_every_higher_one(given_rates, id_):
    def is_taken(*some: float) -> bool:
        return bool(chosen(QUEUE, [(candidate(str(id_)), [(rate, "uniform") for rate in some])]))

    assert is_taken(*given_rates) == any(is_taken(rate) for rate in given_rates) == is_taken(max(given_rates))
    assert is_taken(1.0)


def test_overlap_is_a_share_of_the_items():
    rules = Rules(overlap=3, overlap_share=0.25)
    wanted = [reviews_wanted(QUEUE, rules, str(n)) for n in range(4_000)]
    assert set(wanted) == {1, 3}
    assert 0.22 < wanted.count(3) / 4_000 < 0.28
    assert {reviews_wanted(QUEUE, Rules(overlap=2), str(n)) for n in range(100)} == {2}


def test_weighted_by_their_probabilities_the_items_stand_for_all_predictions():
    """1,000 answers at a time: the poorly supported are wrong far more often, and are reviewed ten times as often."""
    rules = Rules(uniform=0.06, low_support=Threshold(rate=0.6, below=0.5))
    answers = {}
    for is_poor in (True, False):
        template = cited((0, 0.1 if is_poor else 0.9))
        said = list(rates(rules, template, is_negative=False))
        answers[is_poor] = [(msgspec.structs.replace(template, id=str(n)), said) for n in range(1_000)]
    chance = random.Random(7)
    trials, true_share = 300, 0.75
    covered = covered_unweighted = 0
    errors = []
    for trial in range(trials):
        poor = [chance.random() < 0.25 for _ in range(1_000)]
        right = {str(n): float(chance.random() < (0.30 if is_poor else 0.90)) for n, is_poor in enumerate(poor)}
        queue_id = f"019a4e5c-7d1b-7c3e-9f00-{trial:012x}"
        taken = chosen(queue_id, [answers[is_poor][n] for n, is_poor in enumerate(poor)])
        values = [right[each.prediction_id] for each in taken]
        estimate = hajek(values, [each.probability for each in taken])
        plain = hajek(values, [1.0 for _ in taken])
        errors.append(estimate.share - true_share)
        covered += estimate.low <= true_share <= estimate.high
        covered_unweighted += plain.low <= true_share <= plain.high
    bias = sum(errors) / trials
    print(f"covered {covered / trials:.3f}, bias {bias:+.4f}, unweighted {covered_unweighted / trials:.3f}")
    assert covered / trials >= 0.93
    assert abs(bias) < 0.01
    assert covered_unweighted / trials < 0.05
