"""Figures by hand: rankings, values, thresholds, tables."""

import math

import pytest

from retrieval.evaluation.measures import Figure, auc, figure, ndcg, ranking_figures, recall, reciprocal_rank
from retrieval.evaluation.reports import Report, Row, comparison, failures, threshold


def row(name: str = "set", mode: str | None = None, **values: float) -> Row:
    return Row(name, tuple(Figure(f"{each}@10", value, 0.1, 0.9, 7) for each, value in values.items()), mode)


def test_a_perfect_ranking_scores_one() -> None:
    found = ranking_figures({"q": ["a", "b", "c"]}, {"q": {"a": 2, "b": 1}}, 10)
    assert [(each.name, each.value, each.n) for each in found] == [
        ("ndcg@10", 1, 1),
        ("recall@10", 1, 1),
        ("mrr@10", 1, 1),
    ]


def test_gains_are_linear_and_discounted_by_log_two() -> None:
    relevant = {"a": 2, "b": 1}
    best = 2 / math.log2(2) + 1 / math.log2(3)
    assert ndcg(["x", "b", "a"], relevant, 10) == pytest.approx((1 / math.log2(3) + 2 / math.log2(4)) / best)
    assert recall(["x", "b", "a"], relevant) == 1.0
    assert recall(["x", "b"], relevant) == 0.5
    assert reciprocal_rank(["x", "b", "a"], relevant) == 0.5


def test_only_the_first_k_count_and_an_unanswered_question_scores_zero() -> None:
    ranking = [str(n) for n in range(10)] + ["a"]
    judged = {"q": {"a": 1}, "r": {"b": 1}}
    assert [each.value for each in ranking_figures({"q": ranking}, judged, 10)] == [0.0, 0.0, 0.0]
    assert [each.value for each in ranking_figures({"q": ["a"]}, judged, 10)] == [0.5, 0.5, 0.5]
    assert [each.value for each in ranking_figures({"q": ["x", "a"], "r": ["b"]}, judged, 1)] == [0.5, 0.5, 0.5]


def test_a_figure_has_its_interval_and_none_without_questions() -> None:
    some = figure("share", [True, True, False, True])
    assert some.value == 0.75
    assert some.low is not None
    assert some.high is not None
    assert 0.2 < some.low < 0.75 < some.high < 1
    assert figure("share", []) == Figure("share", None, 0.0, 1.0, 0)


def test_auc_counts_ties_half() -> None:
    assert auc("auc", [0.9, 0.5], [0.5, 0.1]).value == pytest.approx((1 + 0.75) / 2)
    assert auc("auc", [0.9], []).value is None


def test_a_threshold_is_of_all_sets_or_of_one() -> None:
    assert failures([row(ndcg=0.79)], [threshold("ndcg=0.8")]) == ("set: ndcg is 0.790, under 0.8",)
    assert failures([row(ndcg=0.79)], [threshold("set:ndcg@10=.8")]) == ("set: ndcg@10 is 0.790, under 0.8",)
    assert failures([row(ndcg=0.8)], [threshold("ndcg=0.8"), threshold("ndcg=.9", is_most=True)]) == ()
    assert failures([row(ndcg=0.8)], [threshold("ndcg=.7", is_most=True)]) == ("set: ndcg is 0.800, over 0.7",)


def test_a_threshold_that_guards_nothing_is_told() -> None:
    assert failures([row(ndcg=1)], [threshold("ncdg=0.8")]) == ("ncdg was not measured",)
    assert failures([row(ndcg=1)], [threshold("other:ndcg=0.8")]) == ("other: ndcg was not measured",)


@pytest.mark.parametrize("text", ["ndcg", "ndcg=x", "ndcg=1.5", "=0.8", "a:b:ndcg=1"])
def test_what_is_no_threshold_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="FIGURE=VALUE"):
        threshold(text)


def test_a_fusion_further_below_its_better_leg_than_a_hundredth_fails() -> None:
    legs = [row(mode="dense", ndcg=0.5), row(mode="sparse", ndcg=0.4)]
    assert failures([*legs, row(mode="hybrid", ndcg=0.485)], []) == (
        "set: hybrid has nDCG 0.485, its better leg 0.500",
    )
    assert failures([*legs, row(mode="hybrid", ndcg=0.495)], []) == ()
    # Thresholds are about what is served.
    assert failures([*legs, row(mode="hybrid", ndcg=0.6)], [threshold("ndcg=0.55")]) == ()


def test_a_report_is_the_same_as_json_and_as_a_table() -> None:
    report = Report("retrieval", {"index_version": "m-1", "release": None}, (row(ndcg=0.5),), ("set: bad",))
    assert report.json()["passed"] is False
    assert report.json()["rows"][0]["figures"][0] == {"name": "ndcg@10", "value": 0.5, "low": 0.1, "high": 0.9, "n": 7}
    assert report.markdown() == (
        "index version `m-1`\n\n| set | figure | value | 95 % interval | n |\n| --- | --- | --- | --- | --- |\n"
        "| set | ndcg@10 | 0.500 | 0.100 to 0.900 | 7 |\n\n- **not good enough**: set: bad\n"
    )


def test_sets_are_compared_with_what_others_reach() -> None:
    rows = [row(mode="dense", ndcg=0.5), row(mode="hybrid", ndcg=0.6), row("new", "dense", ndcg=0.1)]
    assert comparison(rows, {"set": [0.4, 0.55]}, ["BM25", "MiniLM"]) == (
        "| set | questions | dense | fused | reference: BM25 / MiniLM |\n| --- | --- | --- | --- | --- |\n"
        "| set | 7 | .500 | **.600** | .400 / .550 |\n| new | 7 | **.100** |  |  |\n"
    )
