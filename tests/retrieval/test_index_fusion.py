"""Two rankings into one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval import fusion
from retrieval.fusion import Fused
from retrieval.index import Legs


def fuse(legs, method):
    return list(fusion.fuse(legs, method))


LEGS = Legs(dense=[(1, 0.9), (2, 0.5), (3, 0.1)], sparse=[(3, 12.0), (1, 6.0), (4, 3.0)])


def test_reciprocal_ranks_are_summed_with_k_two() -> None:
    fused = fuse(LEGS, "rrf")
    assert [one.point for one in fused] == [1, 3, 2, 4]
    assert fused[0] == Fused(1, pytest.approx(1 / 2 + 1 / 3), 1, 0.9, 2, 6.0)
    assert fused[3] == Fused(4, pytest.approx(1 / 4), None, None, 3, 3.0)


def test_score_distributions_are_scaled_by_three_deviations() -> None:
    scores = {one.point: one.score for one in fuse(LEGS, "dbsf")}
    # The dense leg: mean .5, sample deviation .4. The sparse leg: mean 7, sample deviation 4.5826.
    assert scores[2] == pytest.approx(0.5)
    assert scores[1] == pytest.approx((0.9 - 0.5) / 2.4 + 0.5 + (6 - 7) / 27.495454 + 0.5)


def test_equal_scores_of_a_leg_say_nothing() -> None:
    fused = fuse(Legs(dense=[(1, 0.7), (2, 0.7)], sparse=[(2, 3.0)]), "dbsf")
    assert [(one.point, one.score) for one in fused] == [(2, 1.0), (1, 0.5)]


@pytest.mark.parametrize("method", ["dbsf", "rrf"])
def test_a_single_leg_keeps_its_order_and_scores(method) -> None:
    assert fuse(Legs(dense=LEGS.dense), method) == [
        Fused(1, 0.9, 1, 0.9),
        Fused(2, 0.5, 2, 0.5),
        Fused(3, 0.1, 3, 0.1),
    ]
    assert [one.score for one in fuse(Legs(sparse=LEGS.sparse), method)] == [12.0, 6.0, 3.0]
    assert fuse(Legs(), method) == []


def leg():
    points = st.dictionaries(st.integers(1, 30), st.floats(0, 50, width=32), max_size=12)
    return points.map(lambda found: sorted(found.items(), key=lambda pair: -pair[1]))


@given(leg(), leg(), st.sampled_from(["dbsf", "rrf"]))
def test_every_point_of_either_leg_is_fused_once_with_its_ranks(dense, sparse, method) -> None:
    fused = fuse(Legs(dense, sparse), method)
    assert sorted(one.point for one in fused) == sorted({point for point, _ in (*dense, *sparse)})
    assert [one.score for one in fused] == sorted((one.score for one in fused), reverse=True)
    for one in fused:
        for found, rank, score in (
            (dense, one.dense_rank, one.dense_score),
            (sparse, one.sparse_rank, one.sparse_score),
        ):
            assert (rank is None and one.point not in dict(found)) or found[rank - 1] == (one.point, score)
