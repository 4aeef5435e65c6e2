"""Of what was found, few of each document are taken, and what is unlike the rest: the same each time."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.variety import Variety, few_of_each, marginal

GROUPS = st.lists(st.integers(0, 4), max_size=20)
BALANCE = st.floats(0, 1)


@st.composite
def found(draw: st.DrawFn) -> tuple[list[float], np.ndarray]:
    """Scores, best first, and a vector of length 1 for each; some are alike."""
    scores = sorted(draw(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.4]), min_size=1, max_size=8)), reverse=True)
    angles = draw(st.lists(st.sampled_from([0.0, 0.4, 1.0, 1.6, 3.0]), min_size=len(scores), max_size=len(scores)))
    return scores, np.array([[np.cos(angle), np.sin(angle)] for angle in angles], dtype=np.float32)


@given(groups=GROUPS, most=st.integers(1, 5))
def test_of_each_group_the_first_few_are_left_in_their_order(groups, most):
    items = list(enumerate(groups))
    left = list(few_of_each(items, lambda item: item[1], most))
    assert left == [item for n, item in enumerate(items) if Counter(groups[:n])[item[1]] < most]
    assert list(few_of_each(items, lambda item: item[1], None)) == items


@given(given=found(), count=st.integers(1, 10), balance=BALANCE)
def test_each_next_one_is_worth_most_beside_those_taken(given, count, balance):
    scores, vectors = given
    taken = marginal(scores, vectors, count, balance)
    assert len(taken) == len(set(taken)) == min(count, len(scores))
    assert taken[0] == 0, "What ranked first is taken first."
    spread = max(scores) - min(scores)
    relevance = [(score - min(scores)) / spread if spread else 1.0 for score in scores]

    def worth(at: int, before: list[int]) -> float:
        return balance * relevance[at] - (1 - balance) * max(float(vectors[at] @ vectors[each]) for each in before)

    for n in range(1, len(taken)):
        before = taken[:n]
        best = max(worth(at, before) for at in range(len(scores)) if at not in before)
        assert worth(taken[n], before) == pytest.approx(best, abs=1e-6)


@given(given=found(), count=st.integers(1, 10))
def test_by_relevance_alone_nothing_moves(given, count):
    scores, vectors = given
    assert marginal(scores, vectors, count, 1.0) == list(range(min(count, len(scores))))


def test_a_repetition_waits_until_something_else_was_said():
    vectors = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1]], dtype=np.float32)
    assert marginal([1.0, 0.9, 0.8, 0.0], vectors, 3, 0.5) == [0, 2, 1]
    assert marginal([], np.zeros((0, 2)), 2, 0.5) == []


def test_there_is_something_to_choose_from_only_where_something_is_chosen():
    assert (Variety().pool(5), Variety(per_document=1).pool(5)) == (5, 5)
    assert (Variety(mmr=0.5).pool(5), Variety(mmr=0.5).pool(50)) == (20, 200)
