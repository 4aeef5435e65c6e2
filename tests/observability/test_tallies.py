"""Sums of rows that stream by give what all rows at once give, and stay right when sessions share numbers."""

import random
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from observability.estimates import mean, mean_score, quantile, unknown
from observability.tallies import MAX_SAMPLE, MAX_SESSIONS, Sample, Sessions, Tally

ROWS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=40)


def pages(rows, size=7):
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def tally_of(rows) -> Tally:
    tally = Tally()
    for page in pages(rows):
        tally.add(np.array([each[0] for each in page], np.intp), np.array([each[1] for each in page]))
    return tally


@given(ROWS)
@example([(session, value) for session in (0, 1) for value in (0.0, 0.0, 0.25)])  # Means that differ by rounding alone.
def test_a_tally_gives_the_share_and_the_mean_of_all_rows_at_once(rows):
    sessions, values = [each[0] for each in rows], [each[1] for each in rows]
    tally = tally_of(rows)
    for found, expected in (
        (tally.share(), mean_score(values, sessions=sessions)),
        (tally.mean(), mean(values, sessions=sessions)),
    ):
        assert astuple(found) == pytest.approx(astuple(expected), abs=1e-9)


def test_a_ratio_weighs_rows_by_their_denominators_and_leaves_out_those_without():
    tally = Tally()
    tally.add(np.array([0, 1, 2]), np.array([1.0, 3.0, 0.0]), np.array([2.0, 3.0, 0.0]))
    found = tally.share()
    assert (found.value, found.n) == (0.8, 2)
    assert found.low < 0.8 < found.high
    assert Tally().share() == unknown("wilson")
    assert Tally().mean().value is None


def test_sessions_keep_their_numbers_and_are_bounded():
    sessions = Sessions()
    first = [sessions.number(f"s{n}") for n in range(MAX_SESSIONS)]
    assert first == list(range(MAX_SESSIONS))
    later = [sessions.number(f"t{n}") for n in range(1_000)]
    assert max(later) < MAX_SESSIONS
    assert later == [sessions.number(f"t{n}") for n in range(1_000)]
    assert first == [sessions.number(f"s{n}") for n in range(MAX_SESSIONS)]


def test_an_interval_is_that_of_all_sessions_also_when_they_are_more_than_the_numbers():
    chance = random.Random(3)
    names, values = [], []
    for session in range(5 * MAX_SESSIONS):
        is_bad = chance.random() < 0.3
        for _ in range(chance.randint(1, 4)):  # Nearly the same again: rows tell far less than they are.
            names.append(f"s{session}")
            values.append(float(is_bad if chance.random() < 0.9 else not is_bad))
    numbers = Sessions()
    tally = Tally()
    tally.add(np.array([numbers.number(name) for name in names]), np.array(values))
    found, exact = tally.share(), mean_score(values, sessions=names)
    assert found.value == pytest.approx(exact.value, abs=1e-12)
    assert found.effective_n == pytest.approx(exact.effective_n, rel=0.06)
    assert found.high - found.low == pytest.approx(exact.high - exact.low, rel=0.03)


def test_a_quantile_of_few_rows_is_that_of_all_and_of_many_one_of_a_sample():
    chance = np.random.default_rng(5)
    keys = chance.integers(0, 2**63, 60_000, dtype=np.uint64)
    values = chance.lognormal(size=60_000)
    few, many = Sample(), Sample()
    few.add(keys[:50], np.arange(50), values[:50])
    assert few.quantile(0.5) == quantile(values[:50], 0.5)
    for page in np.split(np.arange(60_000), 60):
        many.add(keys[page], page % MAX_SESSIONS, values[page])
    found = many.quantile(0.95)
    assert (found.n, many.rows) == (MAX_SAMPLE, 60_000)
    assert found.low < np.quantile(values, 0.95) < found.high
    kept = np.argsort(keys)[:MAX_SAMPLE]
    assert found.value == quantile(values[kept], 0.95).value
    assert Sample().quantile(0.5).value is None
