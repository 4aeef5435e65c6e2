"""Intervals that hold: beside the statistics of the quality figures, and on traffic whose truth is known."""

import numpy as np
import pytest

from finetune.statistics import Floats, Sample, bootstrap, difference, mean, rows_needed
from observability.estimates import mean_score

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("values", [[1.0] * 12 + [0.0] * 8, [0.0] * 20, [1.0] * 20, [0.3, 0.9, 0.4, 1.0, 0.0] * 6])
def test_a_mean_is_that_of_the_quality_figures(values: list[float]) -> None:
    found = mean(np.array(values), Sample.of([1.0] * len(values), [None] * len(values)))
    expected = mean_score(values)
    assert found.value == pytest.approx(expected.value)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


GRADES = RNG.random(60)
THIRDS = np.arange(60) // 3


@pytest.mark.parametrize(
    ("values", "sessions"),
    [
        (GRADES, None),
        (GRADES, THIRDS),
        (GRADES.round(), THIRDS),
        (np.tile([0.3, 0.7, 0.15], 20), THIRDS),
        (np.tile([1.0, 0.0, 1.0], 2), THIRDS[:6]),
        (np.array([0.3, 0.7, 0.15]), np.zeros(3)),
        (np.full(6, 0.4), None),
        (np.ones(9), THIRDS[:9]),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_sessions_weights_and_grades_have_the_intervals_of_the_quality_figures(
    values: Floats, sessions: Floats | None, weighted: bool
) -> None:
    probabilities = np.where(np.arange(len(values)) % 4, 1.0, 0.25) if weighted else np.ones(len(values))
    named = [None] * len(values) if sessions is None else sessions.tolist()
    found = mean(values, Sample.of((1 / probabilities).tolist(), named))
    expected = mean_score(values, probabilities, sessions=None if sessions is None else named)
    assert (found.value, found.low, found.high, found.effective_n) == pytest.approx(
        (expected.value, expected.low, expected.high, expected.effective_n), abs=1e-6
    )
    assert found.high - found.low > 0.05


def test_rows_of_one_session_count_once() -> None:
    values = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 4, 10)
    alone = mean(values, Sample.of(np.ones(240).tolist(), [None] * 240))
    together = mean(values, Sample.of(np.ones(240).tolist(), np.repeat(np.arange(24), 10).tolist()))
    assert together.value == alone.value
    assert together.high - together.low > 2.5 * (alone.high - alone.low)


def test_weights_move_the_mean_to_the_population() -> None:
    found = mean(np.array([0.0, 1.0, 1.0, 1.0]), Sample.of([3, 1, 1, 1], [None] * 4))
    assert found.value == pytest.approx(0.5)


def test_intervals_of_a_difference_hold_what_they_promise() -> None:
    held = 0
    for _ in range(400):
        hard = RNG.random(60)
        first, second = (
            (RNG.random(60) < 0.9 - 0.4 * hard).astype(float),
            (RNG.random(60) < 0.8 - 0.4 * hard).astype(float),
        )
        found = difference(first, second, Sample.of([1.0] * 60, [None] * 60))
        held += found.low <= 0.1 <= found.high
    assert held / 400 == pytest.approx(0.95, abs=0.035)


def test_a_few_rows_that_agree_are_not_certainty() -> None:
    found = difference(np.ones(8), np.ones(8), Sample.of([1.0] * 8, [None] * 8))
    assert found.value == 0
    assert found.upper > 0.1


def test_rows_needed_are_enough_and_fewer_are_not() -> None:
    def accepted(n: int) -> float:
        passed = 0
        for _ in range(200):
            drop = RNG.choice([1.0, -1.0, 0.0], n, p=[0.06, 0.04, 0.9])
            passed += difference(drop, np.zeros(n), Sample.of([1.0] * n, [None] * n)).upper < 0.05
        return passed / 200

    seen = difference(
        np.array([1.0] * 12 + [0.0] * 188),
        np.array([0.0] * 12 + [1.0] * 8 + [0.0] * 180),
        Sample.of([1.0] * 200, [None] * 200),
    )
    needed = rows_needed(seen, 0.05)
    assert needed is not None
    assert accepted(needed) == pytest.approx(0.8, abs=0.1)
    assert accepted(needed // 3) < 0.6


def test_no_number_of_rows_shows_what_is_not_so() -> None:
    seen = difference(np.ones(50), np.zeros(50), Sample.of([1.0] * 50, [None] * 50))
    assert rows_needed(seen, 0.05) is None


def test_what_draws_cannot_tell_has_no_narrow_interval() -> None:
    def share(sums: np.ndarray) -> np.ndarray:
        return sums[:, 0] / sums[:, 1]

    parts = np.tile([[1.0, 1.0], [0.0, 1.0]], (20, 1))
    one = bootstrap(share, parts, Sample.of([1.0] * 40, ["only"] * 40))
    assert (one.value, one.low, one.high) == (0.5, 0, 1)
    few = bootstrap(share, parts, Sample.of([1000.0] * 2 + [1.0] * 38, [None] * 40))
    assert (few.low, few.high) == (0, 1)
    alike = bootstrap(share, parts, Sample.of([1.0] * 40, np.repeat(np.arange(20), 2).tolist()))
    assert alike.low < 0.3
    assert alike.high > 0.7
    right = bootstrap(share, np.ones((40, 2)), Sample.of([1.0] * 40, [None] * 40))
    assert (right.low < 0.95, right.high) == (True, 1)


def test_a_ratio_of_sums_has_an_interval_and_none_without_a_denominator() -> None:
    sample = Sample.of([1.0] * 40, [None] * 40)
    parts = np.tile([[1.0, 1.0], [0.0, 1.0]], (20, 1))
    found = bootstrap(lambda sums: sums[:, 0] / sums[:, 1], parts, sample)
    assert found.value == 0.5
    assert 0.3 < found.low < 0.5 < found.high < 0.7
    empty = bootstrap(lambda sums: np.full(len(sums), np.nan), np.zeros((40, 2)), sample)
    assert empty.value is None
