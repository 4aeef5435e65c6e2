"""Classification scores equal scikit-learn's, and their intervals behave."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from observability.classification import classification

names = st.sampled_from("abcd")
answers = st.lists(st.tuples(names, names, st.floats(0.01, 1)), min_size=1, max_size=50)


def known(truths, said, weights, **options):
    """Scikit-learn's precision, recall and F1; None where it divides by nothing."""
    scores = precision_recall_fscore_support(truths, said, sample_weight=weights, zero_division=np.nan, **options)[:3]
    return [[None if np.isnan(each) else pytest.approx(each) for each in np.atleast_1d(score)] for score in scores]


def values(scores):
    return [scores.precision.value, scores.recall.value, scores.f1.value]


@given(answers, st.booleans())
def test_scores_equal_scikit_learns(rows, weighted):
    truths, said, probabilities = map(list, zip(*rows, strict=True))
    weights = 1 / np.array(probabilities) if weighted else None
    scored = classification(truths, said, probabilities if weighted else None)
    assert scored.accuracy.value == pytest.approx(accuracy_score(truths, said, sample_weight=weights))
    classes = sorted({*truths, *said})
    assert list(scored.per_class) == classes
    per_class = known(truths, said, weights, labels=classes, average=None)
    assert [values(each) for each in scored.per_class.values()] == [list(each) for each in zip(*per_class, strict=True)]
    assert values(scored.micro) == [score[0] for score in known(truths, said, weights, average="micro")]
    assert values(scored.macro) == [score[0] for score in known(truths, said, weights, average="macro")]


@given(answers)
def test_every_interval_holds_its_value(rows):
    truths, said, probabilities = map(list, zip(*rows, strict=True))
    scored = classification(truths, said, probabilities)
    for scores in (scored.micro, scored.macro, *scored.per_class.values()):
        for estimate in (scores.precision, scores.recall, scores.f1):
            if estimate.value is not None and estimate.low is not None:
                assert 0 <= estimate.low <= estimate.value + 1e-9
                assert estimate.value - 1e-9 <= estimate.high <= 1


def test_an_answer_that_is_no_class_is_wrong_and_counts_against_recall_alone():
    scored = classification(["a", "a", "b", "b"], ["a", None, "b", "nonsense"], classes=["a", "b"])
    assert scored.accuracy.value == 0.5
    assert (scored.micro.precision.value, scored.micro.recall.value) == (1.0, 0.5)
    assert (scored.micro.precision.n, scored.micro.recall.n) == (2, 4)
    assert values(scored.per_class["a"]) == [1.0, 0.5, pytest.approx(2 / 3)]


def test_classes_restrict_what_is_averaged_as_labels_do_in_scikit_learn():
    truths, said = list("aabbcc"), list("abbcca")
    scored = classification(truths, said, classes=["a", "b"])
    for average, scores in (("micro", scored.micro), ("macro", scored.macro)):
        assert values(scores) == [score[0] for score in known(truths, said, None, labels=["a", "b"], average=average)]
    assert scored.accuracy.value == pytest.approx(accuracy_score(truths, said))


def test_a_class_that_never_occurs_is_unknown_and_left_out_of_the_average():
    scored = classification(["a", "b"], ["a", "b"], classes=["a", "b", "never"])
    assert values(scored.per_class["never"]) == [None, None, None]
    assert scored.macro.f1.value == 1.0


def test_precision_counts_the_rows_called_so_and_recall_those_that_are():
    scores = classification(["a"] * 30 + ["b"] * 70, ["a"] * 10 + ["b"] * 90).per_class["a"]
    assert (scores.precision.n, scores.recall.n, scores.f1.n) == (10, 30, 30)
    assert scores.precision.low < 0.75


def test_a_macro_average_of_rare_classes_has_no_interval():
    rare = classification([str(n) for n in range(20)] * 4, [str(n) for n in range(20)] * 4)
    assert rare.macro.f1.value == 1.0
    assert (rare.macro.f1.low, rare.macro.f1.high) == (None, None)
    frequent = classification(["a", "b"] * 100, ["a", "b"] * 100)
    assert frequent.macro.f1.low < frequent.macro.f1.high == 1.0


def test_sessions_widen_every_interval():
    truths, said = list("aabb") * 30, list("abba") * 30
    alone = classification(truths, said)
    together = classification(
        [each for each in truths for _ in range(5)],
        [each for each in said for _ in range(5)],
        sessions=[n // 5 for n in range(600)],
    )
    assert together.accuracy.value == alone.accuracy.value
    assert together.macro.f1.high - together.macro.f1.low >= alone.macro.f1.high - alone.macro.f1.low


def test_no_rows_are_no_scores():
    scored = classification([], [], classes=["a"])
    assert scored.accuracy.value is scored.macro.f1.value is scored.per_class["a"].recall.value is None


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="answers must be as many as truths: 1 for 2"):
        classification(["a", "b"], ["a"])
