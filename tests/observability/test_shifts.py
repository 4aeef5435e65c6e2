"""Output shifts: permutations agree with scipy where rows are independent, and hold their level where they are not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, ks_2samp

from observability.permutations import holm, permutation_p, session_means
from observability.shifts import category_shift, number_shift


def test_independent_categories_get_the_chi_square_tests_p_value():
    random = np.random.default_rng(4)
    reference, window = (
        random.choice(list("abc"), 600, p=[0.5, 0.3, 0.2]),
        random.choice(list("abc"), 300, p=[0.45, 0.3, 0.25]),
    )
    known = chi2_contingency([[(side == name).sum() for name in "abc"] for side in (reference, window)]).pvalue
    assert 0.02 < known < 0.9
    assert category_shift(reference.tolist(), window.tolist()).p_value == pytest.approx(known, abs=0.05)


def test_independent_numbers_get_the_kolmogorov_smirnov_tests_p_value():
    random = np.random.default_rng(2)
    reference, window = random.normal(size=600), random.normal(0.08, 1, size=300)
    known = ks_2samp(reference, window)
    shift = number_shift(reference, window)
    assert 0.02 < known.pvalue < 0.9
    assert shift.p_value == pytest.approx(known.pvalue, abs=0.08)
    assert shift.effect == pytest.approx(known.statistic, abs=0.01)


def test_the_largest_change_is_named():
    shift = category_shift(["answered"] * 95 + ["refused"] * 5, ["answered"] * 70 + ["refused"] * 25 + ["failed"] * 5)
    assert shift.p_value <= 0.01
    assert (shift.at, shift.reference, shift.window) == ("answered", pytest.approx(0.95), pytest.approx(0.7))
    assert shift.effect == pytest.approx(0.25)
    longer = number_shift(range(100), range(50, 150))
    assert (longer.effect, longer.at, longer.reference, longer.window) == (pytest.approx(0.5), 49.0, 0.5, 0.0)


def test_sessions_that_repeat_themselves_are_no_shift():
    random = np.random.default_rng(3)
    found = []
    for trial in range(40):
        own, later = (random.random(sessions) < 0.1 for sessions in (300, 150))
        names = [np.repeat(np.where(side, "refused", "answered"), 6).tolist() for side in (own, later)]
        numbers = [np.repeat(random.normal(size=len(side)), 6) for side in (own, later)]
        sessions = [[row // 6 for row in range(len(side))] for side in names]
        options = {"permutations": 99, "seed": trial}
        found.append(
            (
                category_shift(*names, *sessions, **options).p_value <= 0.05,
                number_shift(*numbers, *sessions, **options).p_value <= 0.05,
                category_shift(*names, **options).p_value <= 0.05,
            )
        )
    of_sessions_categories, of_sessions_numbers, of_rows = np.mean(found, axis=0)
    assert max(of_sessions_categories, of_sessions_numbers) <= 0.12
    assert of_rows >= 0.3


def test_one_category_or_one_number_on_both_sides_is_no_shift():
    assert category_shift(["a"] * 10, ["a"] * 5).p_value == 1.0
    assert number_shift([3.0] * 10, [3.0] * 5).p_value == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: category_shift([], ["a"]), "reference and window must each have at least one row"),
        (lambda: number_shift([1.0], []), "window must each have at least one row"),
        (lambda: number_shift([float("inf")], [1.0]), "reference must be finite"),
        (lambda: category_shift(["a"], ["a"], ["s", "t"]), "sessions must name one for each of the 1 rows"),
    ],
)
def test_bad_columns_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(p_values)
def test_holm_adjusts_upwards_keeps_the_order_and_is_at_most_bonferroni(values):
    adjusted = holm(values)
    for value, after in zip(values, adjusted, strict=True):
        assert value <= after <= min(1.0, len(values) * value)
    ranked = sorted(range(len(values)), key=values.__getitem__)
    assert [adjusted[place] for place in ranked] == sorted(adjusted)


@given(p_values, st.integers(0, 7), st.floats(0, 1))
def test_a_smaller_p_value_never_raises_another_ones_adjustment(values, place, factor):
    place %= len(values)
    smaller = [value * factor if n == place else value for n, value in enumerate(values)]
    assert all(after <= before for after, before in zip(holm(smaller), holm(values), strict=True))


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx((0.06, 0.03, 0.06))
    assert holm([]) == ()


def test_session_means_come_in_the_order_of_first_appearance():
    means = session_means(np.array([[1.0], [10.0], [3.0]]), ["b", "a", "b"])
    assert means.tolist() == [[2.0], [10.0]]


def test_every_division_has_a_window_of_the_same_size_and_p_counts_the_real_one():
    sizes = []

    def size(masks):
        sizes.extend(masks.sum(axis=0))
        return masks[:4].sum(axis=0)

    assert permutation_p(size, 4, 3, permutations=200, seed=1) == (0.0, 1.0)
    assert len(sizes) == 201
    assert set(sizes) == {3.0}
    assert permutation_p(lambda masks: masks[4:].prod(axis=0), 4, 3, permutations=99, seed=1)[1] == pytest.approx(
        4 / 100, abs=0.04
    )
