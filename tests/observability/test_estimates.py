"""Estimates and their intervals: against scipy where it has the same, by properties where it has not."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from observability.estimates import Moments, mean, mean_score, prediction_powered, proportion, quantile, wilson

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
shares = st.floats(0, 1)
rows = st.lists(st.tuples(shares, st.floats(0.01, 1)), min_size=1, max_size=40)


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_a_proportion_has_wilsons_interval(count, confidence):
    successes, n = count
    estimate = proportion(successes, n, confidence=confidence)
    known = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (estimate.value, estimate.n, estimate.effective_n, estimate.method) == (successes / n, n, n, "wilson")
    assert (estimate.low, estimate.high) == pytest.approx((known.low, known.high), abs=1e-9)


@given(counts)
def test_rows_of_zeros_and_ones_are_a_proportion(count):
    successes, n = count
    assume(n <= 500)
    estimate, known = mean_score([1.0] * successes + [0.0] * (n - successes)), proportion(successes, n)
    assert (estimate.value, estimate.n, estimate.effective_n) == (known.value, known.n, known.effective_n)
    assert (estimate.low, estimate.high) == pytest.approx((known.low, known.high), abs=1e-9)


@given(shares, st.floats(1, 1e6), st.floats(1.01, 100))
def test_an_interval_holds_its_value_and_shrinks_with_n(value, n, more):
    low, high = wilson(value, n)
    closer_low, closer_high = wilson(value, n * more)
    assert 0 <= low <= value <= high <= 1
    assert closer_high - closer_low < high - low


@given(rows)
def test_a_weighted_mean_lies_in_its_interval_and_is_the_weighted_mean(data):
    scores, probabilities = map(np.array, zip(*data, strict=True))
    estimate = mean_score(scores, probabilities)
    assert estimate.value == pytest.approx(np.average(scores, weights=1 / probabilities))
    assert estimate.low - 1e-9 <= estimate.value <= estimate.high + 1e-9
    assert 0 < estimate.effective_n <= estimate.n == len(data)


@given(rows, st.floats(0.01, 1), st.randoms(use_true_random=False))
def test_only_the_ratio_of_weights_counts_and_no_order_does(data, factor, random):
    scores, probabilities = map(np.array, zip(*data, strict=True))
    shuffled = list(range(len(data)))
    random.shuffle(shuffled)
    one = mean_score(scores, probabilities)
    other = mean_score(scores[shuffled], factor * probabilities[shuffled])
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-6)


def test_equal_probabilities_are_no_weights():
    assert mean_score([1, 0, 1, 1], [0.1] * 4) == mean_score([1, 0, 1, 1])


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=30), st.integers(2, 6))
def test_repeating_every_row_within_its_session_tells_nothing_new(scores, times):
    once = mean_score(scores)
    repeated = mean_score(np.repeat(scores, times), sessions=[str(n // times) for n in range(len(scores) * times)])
    assert repeated.value == pytest.approx(once.value)
    assert repeated.effective_n <= len(scores)
    assert repeated.high - repeated.low >= once.high - once.low - 1e-9


def test_a_single_session_tells_next_to_nothing_however_long_it_is():
    alone = mean_score([1.0] * 50 + [0.0] * 10, sessions=["one"] * 60)
    assert alone.effective_n < 1
    assert alone.high - alone.low > 0.9


def test_few_sessions_are_covered_as_often_as_promised():
    random = np.random.default_rng(8)
    covered = []
    for _ in range(400):
        rates = random.beta(3, 1, 6)
        scores = (random.random((6, 20)) < rates[:, None]).astype(float).ravel()
        estimate = mean_score(scores, sessions=np.repeat(np.arange(6), 20).tolist())
        covered.append(estimate.low <= 0.75 <= estimate.high)
    assert np.mean(covered) >= 0.93


def test_seeing_only_heavy_rows_right_does_not_make_sure():
    # One wrong row of weight 1 among 100 of weight 20: the heavy ones still tell as much as 100 rows do, and no more.
    estimate = mean_score([0.0] + [1.0] * 100, [1.0] + [0.05] * 100)
    assert estimate.effective_n <= 101
    assert estimate.low < 0.97


def test_scores_that_spread_less_than_a_coin_have_narrower_intervals():
    random = np.random.default_rng(1)
    graded, coin = 0.4 + 0.2 * random.random(200), (random.random(200) < 0.5).astype(float)
    of_graded, of_coin = mean_score(graded), mean_score(coin)
    assert of_graded.effective_n == pytest.approx(of_coin.effective_n) == 200
    assert of_graded.high - of_graded.low < 0.2 * (of_coin.high - of_coin.low)


def test_a_proxy_that_says_more_than_all_of_what_it_speaks_for_is_not_used():
    random = np.random.default_rng(3)
    right = np.arange(1000) % 4 != 0
    doubtful = np.arange(1000) < 150  # Only of these there are labels, and a judge doubts them too.
    grades = np.where(doubtful, random.uniform(0.2, 0.6, 1000) + 0.2 * right, random.uniform(0.95, 1.0, 1000))
    found = prediction_powered(right[doubtful], grades[doubtful], Moments.of(grades))
    assert found == mean_score(right[doubtful])


def test_without_rows_a_share_is_unknown():
    for estimate in (proportion(0, 0), mean_score([]), prediction_powered([], [], Moments.of([]))):
        assert (estimate.value, estimate.low, estimate.high, estimate.n) == (None, 0.0, 1.0, 0)
    assert mean([]).value is quantile([], 0.5).value is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion(3, 2), "successes must be between 0 and n"),
        (lambda: mean_score([0.5, 1.5]), "scores must be between 0 and 1"),
        (lambda: mean_score([0.5, math.nan]), "scores must be finite"),
        (lambda: mean_score([0.5], [0.0]), "probabilities must be above 0"),
        (lambda: mean_score([0.5], [0.5, 0.5]), "probabilities must be one column of 1 numbers"),
        (lambda: mean_score([0.5], sessions=["a", "b"]), "sessions must name one for each of the 1 rows"),
        (lambda: prediction_powered([1.0], [1.0], Moments.of([])), "everything must be taken over all rows"),
        (lambda: prediction_powered([1.0], [1.0, 0.0], Moments.of([1.0])), "proxies must be one column of 1"),
        (lambda: mean([[1.0]]), "values must be one column"),
    ],
)
def test_bad_rows_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Judged:
    """Answers with labels for some, and a judge that passes too many."""

    def __init__(self, seed=3, answers=5000, labels=400):
        random = np.random.default_rng(seed)
        self.right = (random.random(answers) < 0.75).astype(float)
        self.judged = np.where(self.right == 1, random.random(answers) < 0.97, random.random(answers) < 0.4).astype(
            float
        )
        self.asked = random.permutation(answers)[:labels]

    def estimate(self, judged=None, **options):
        judged = self.judged if judged is None else judged
        return prediction_powered(self.right[self.asked], judged[self.asked], Moments.of(judged), **options)


def test_a_biased_judge_narrows_the_interval_and_is_corrected():
    world = Judged()
    plain, powered = mean_score(world.right[world.asked]), world.estimate()
    assert powered.method == "prediction-powered"
    assert abs(powered.value - world.right.mean()) < 0.03 < abs(world.judged.mean() - world.right.mean())
    assert powered.high - powered.low < 0.85 * (plain.high - plain.low)
    assert powered.effective_n > 1.3 * plain.effective_n


def test_a_judge_that_tosses_coins_changes_next_to_nothing():
    world = Judged()
    coin = np.random.default_rng(4).integers(0, 2, 5000).astype(float)
    plain, powered = mean_score(world.right[world.asked]), world.estimate(coin)
    assert powered.value == pytest.approx(plain.value, abs=0.01)
    assert powered.high - powered.low == pytest.approx(plain.high - plain.low, rel=0.02)


def test_a_judge_that_says_the_opposite_is_not_used():
    world = Judged()
    assert world.estimate(1 - world.judged) == mean_score(world.right[world.asked])


def test_a_judge_with_few_known_mistakes_is_not_used():
    world = Judged(labels=40)
    assert world.estimate() == mean_score(world.right[world.asked])


def test_sessions_widen_a_prediction_powered_interval():
    world = Judged()
    of_sessions = world.estimate(sessions=[str(n // 8) for n in range(400)])
    alone = world.estimate()
    assert of_sessions.value == pytest.approx(alone.value)
    assert of_sessions.method == "prediction-powered"
    repeated = Judged()
    repeated.asked = np.repeat(repeated.asked, 4)
    wide = repeated.estimate(sessions=[str(n // 4) for n in range(1600)])
    assert wide.high - wide.low > 0.95 * (alone.high - alone.low)


def test_moments_can_be_added_up_by_a_database():
    values = np.array([0.2, 0.9, 0.4])
    taken = Moments.of(values)
    assert (taken.n, taken.mean) == (3, pytest.approx(0.5))
    assert taken.variance == pytest.approx((values**2).mean() - values.mean() ** 2)


def test_a_mean_has_students_interval():
    values = np.random.default_rng(5).exponential(200, 30)
    estimate = mean(values)
    known = stats.t.interval(0.95, 29, loc=values.mean(), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx(known)
    assert mean([7.0]) == pytest.approx(mean([7.0]))
    assert (mean([7.0]).value, mean([7.0]).low, mean([7.0]).high) == (7.0, None, None)
    of_sessions = mean(np.repeat(values, 3), sessions=[n // 3 for n in range(90)])
    assert (of_sessions.low, of_sessions.high) == pytest.approx(known)


def test_a_quantile_is_covered_as_often_as_promised():
    random = np.random.default_rng(6)
    runs = [quantile(random.exponential(1, 300), 0.95) for _ in range(400)]
    assert 0.93 <= np.mean([run.low <= -math.log(0.05) <= run.high for run in runs]) <= 0.99


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_a_quantile_is_one_of_the_values_and_inside_its_interval(values, share):
    estimate = quantile(values, share)
    assert estimate.value in values
    assert np.mean(np.array(values) <= estimate.value) >= share - 1e-9
    assert estimate.low is None or estimate.low <= estimate.value
    assert estimate.high is None or estimate.high >= estimate.value


def test_a_high_quantile_of_few_values_has_no_upper_end():
    assert quantile(range(50), 0.99).high is None
    assert quantile(range(50), 0.99).low is not None
    assert quantile(range(1000), 0.99).high is not None
