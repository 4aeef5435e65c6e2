"""Exact match and token F1, by cases worked with SQuAD's own rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability.matching import exact_match, token_f1

texts = st.text(st.sampled_from("ab the,.AN 1"), max_size=20)


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("a  cat", ["an cat"], 1.0, 1.0),
        ("30 seconds", ["30"], 0.0, 2 / 3),
        ("the the", ["a"], 1.0, 1.0),
        ("cat cat dog", ["cat dog"], 0.0, 0.8),
        ("it's", ["its"], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("", ["something"], 0.0, 0.0),
        ("theory", ["ory"], 0.0, 0.0),
    ],
)
def test_words_are_compared_without_case_punctuation_and_articles(answer, right, exact, f1):
    assert (exact_match(answer, right), token_f1(answer, right)) == (exact, pytest.approx(f1))


def test_the_nearest_of_several_right_answers_counts():
    assert token_f1("thirty seconds", ["an hour", "thirty seconds or so"]) == pytest.approx(2 / 3)
    assert exact_match("thirty seconds", ["an hour", "Thirty seconds."]) == 1.0


@given(texts, texts)
def test_f1_is_symmetric_between_0_and_1_and_1_for_an_exact_match(one, other):
    f1 = token_f1(one, [other])
    assert f1 == token_f1(other, [one])
    assert exact_match(one, [other]) <= f1 <= 1.0
