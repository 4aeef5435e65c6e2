"""Windows of distinct sessions, and alarms within a budget over time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability.windows import CONSECUTIVE, MAX_LEVEL, alarmed, disjoint_windows, level_for

sessions = st.lists(st.integers(0, 12), max_size=60)


@given(sessions, st.integers(1, 4))
def test_windows_are_disjoint_in_order_and_full(names, size):
    windows = disjoint_windows(names, size)
    rows = [row for window in windows for row in window]
    assert rows == sorted(set(rows))
    members = [{names[row] for row in window} for window in windows]
    assert all(len(each) == size for each in members)
    assert sum(map(len, members)) == len(set().union(*members))


@given(sessions, sessions, st.integers(1, 4))
def test_rows_that_come_later_change_no_window_that_was_given(names, later, size):
    before, after = disjoint_windows(names, size), disjoint_windows(names + later, size)
    assert [window.tolist() for window in before] == [window.tolist() for window in after[: len(before)]]


def test_a_session_belongs_to_the_window_in_which_it_began():
    assert [window.tolist() for window in disjoint_windows("aabaccabdee", 2)] == [[0, 1, 2, 3], [4, 5, 8]]


def test_a_window_must_hold_a_session():
    with pytest.raises(ValueError, match="size must be at least 1"):
        disjoint_windows(["a"], 0)


@given(st.floats(1, 1e6), st.floats(0.01, 100), st.floats(1.1, 10))
def test_the_level_keeps_to_the_budget_and_falls_with_the_number_of_windows(windows, budget, more):
    level = level_for(windows, budget)
    assert 0 < level <= MAX_LEVEL
    assert windows * level**CONSECUTIVE <= budget
    assert level_for(windows * more, budget) <= level


def test_hourly_windows_of_three_releases_at_one_false_alarm_in_90_days():
    assert level_for(24 * 90 * 3) == pytest.approx((1 / (3 * 6480)) ** 0.5)
    assert level_for(90) == MAX_LEVEL


@pytest.mark.parametrize("figures", [(0, 1), (90, 0)])
def test_a_budget_of_nothing_is_refused(figures):
    with pytest.raises(ValueError, match="must be above 0"):
        level_for(*figures)


def test_an_alarm_takes_the_last_two_windows():
    assert alarmed([0.5, 0.01, 0.002], 0.01)
    assert not alarmed([0.001, 0.5, 0.001], 0.01)
    assert not alarmed([0.001, 0.001, 0.5], 0.01)
    assert not alarmed([0.001], 0.01)
    assert not alarmed([], 0.01)


def test_two_in_a_row_are_as_rare_as_the_square_of_the_level():
    p_values = np.random.default_rng(1).random(200_000)
    found = sum(alarmed(p_values[: n + 1][-2:].tolist(), 0.05) for n in range(len(p_values)))
    assert found / len(p_values) == pytest.approx(0.05**2, rel=0.2)
