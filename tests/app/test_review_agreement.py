"""Agreement and its intervals, against scikit-learn and against worked examples that were published."""

import itertools
import math
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from app.review.agreement import MIN_ITEMS, cohen_kappa, krippendorff_alpha, pairwise
from app.review.estimates import hajek
from observability.estimates import wilson


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("agree", [0.0, 0.6, 0.95])
def test_kappa_is_that_of_scikit_learn(classes, agree):
    chance = random.Random(classes * 100 + round(agree * 10))
    a = [str(chance.randrange(classes)) for _ in range(200)]
    b = [each if chance.random() < agree else str(chance.randrange(classes)) for each in a]
    found = cohen_kappa(zip(a, b, strict=True))
    assert found.value == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    assert found.items == 200
    assert found.low < found.value < found.high


def test_alpha_is_that_of_krippendorffs_example_with_gaps():
    """Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, twelve units, nominal 0.743."""
    observers = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    units = [[row[at] for row in observers if row[at] != "."] for at in range(12)]
    found = krippendorff_alpha(units)
    assert found.value == pytest.approx(0.743, abs=5e-4)
    assert (found.items, found.low, found.high) == (11, None, None)


def test_alpha_is_that_of_krippendorffs_example_of_two_observers():
    """The same, section A: two observers, ten units, binary 0.095."""
    assert krippendorff_alpha(zip("0100000010", "1110010000", strict=True)).value == pytest.approx(0.095, abs=5e-4)


def test_where_nothing_can_be_said_nothing_is():
    for nothing in ([], [["a"], ["b"]]):
        assert krippendorff_alpha(nothing).value is None
    assert cohen_kappa([]).items == 0
    same = [("a", "a")] * 50
    assert cohen_kappa(same).value is krippendorff_alpha(same).value is None
    assert cohen_kappa([("a", "a"), ("b", "b")]).value == krippendorff_alpha([("a", "a"), ("b", "b")]).value == 1.0


def test_pairs_are_compared_on_the_items_that_both_have():
    items = [
        {"anna": "a", "ben": "a", "cleo": "b"},
        {"anna": "b", "ben": "a"},
        {"ben": "b", "cleo": "b"},
        {"anna": "a"},
    ]
    found = pairwise(items)
    assert [(each.reviewers, each.kappa.items, each.share) for each in found] == [
        (("anna", "ben"), 2, 0.5),
        (("anna", "cleo"), 1, 0.0),
        (("ben", "cleo"), 2, 0.5),
    ]
    a_b = [("a", "a"), ("b", "a")]
    assert found[0].kappa.value == pytest.approx(cohen_kappa_score(*zip(*a_b, strict=True)))


def test_intervals_are_the_same_whoever_asks_and_need_enough_items():
    pairs = [("a", "a")] * 15 + [("a", "b")] * 5 + [("b", "b")] * 10
    assert cohen_kappa(pairs) == cohen_kappa(list(reversed(pairs)))
    assert cohen_kappa(pairs[-MIN_ITEMS + 1 :]).low is None
    assert cohen_kappa(pairs[-MIN_ITEMS:]).low is not None


def test_as_many_classes_as_items_take_no_memory_by_their_square():
    items = [(f"class {n}", f"class {n}" if n % 2 else f"other {n}") for n in range(2_000)]
    tracemalloc.start()
    try:
        alpha, kappa = krippendorff_alpha(items), cohen_kappa(items)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (alpha.value, kappa.value) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0.5, abs=1e-3))
    assert alpha.low < 0.5 < alpha.high
    assert kappa.low < 0.5 < kappa.high
    assert peak_bytes < 100_000_000


def _alpha_by_table(items, chosen):
    """Nominal alpha by the definition, of those items, from the whole table of coincidences."""
    codes = {name: at for at, name in enumerate(sorted({name for each in items for name in each}))}
    table = np.zeros((len(codes), len(codes)))
    for at in chosen:
        given = [codes[name] for name in items[at]]
        for a, b in itertools.permutations(given, 2):
            table[a, b] += 1 / (len(given) - 1)
    of_class, total = table.sum(axis=0), table.sum()
    expected = (total**2 - (of_class**2).sum()) / (total * (total - 1))
    return 1 - (1 - np.trace(table) / total) / expected


def test_alpha_and_its_interval_are_those_of_the_table_of_coincidences():
    chance = random.Random(7)
    items = [[chance.choice("aabcd") for _ in range(chance.choice([2, 3, 5]))] for _ in range(150)]
    found = krippendorff_alpha(items)
    assert found.value == pytest.approx(_alpha_by_table(items, range(150)), abs=1e-12)
    drawn = [_alpha_by_table(items, chance.choices(range(150), k=150)) for _ in range(300)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.03)


@pytest.mark.parametrize("n", [40, pytest.param(150, marks=pytest.mark.slow)])
def test_intervals_of_agreement_hold_what_they_promise(n):
    """Two reviewers who know 70 % of the items and guess the others: both coefficients are 0.7 in the long run."""
    chance = np.random.default_rng(3)
    covered = Counter()
    trials = 200
    for _ in range(trials):
        truth = chance.integers(0, 3, n)
        guesses = chance.integers(0, 3, (2, n))
        knows = chance.random(n) < 0.7
        pairs = [tuple(str(truth[at] if knows[at] else guesses[who][at]) for who in (0, 1)) for at in range(n)]
        for name, found in (("kappa", cohen_kappa(pairs)), ("alpha", krippendorff_alpha(pairs))):
            covered[name] += found.low <= 0.7 <= found.high
    assert min(covered.values()) / trials >= 0.90, covered


# --- shares ---


def test_equal_probabilities_give_the_plain_share_and_wilsons_interval():
    values = [1.0] * 45 + [0.0] * 15
    found = hajek(values, [0.2] * 60)
    assert found.share == found.unweighted == 0.75
    assert found.effective_items == 60.0
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 60))
    # Newcombe (1998), table I: 81 of 263.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_an_item_counts_for_as_many_as_it_stands_for():
    found = hajek([1.0, 0.0], [0.5, 0.1])
    assert found.share == pytest.approx(2 / 12)
    assert found.unweighted == 0.5
    assert found.low < found.share < found.high


def test_no_items_give_no_estimate_and_unanimous_ones_an_interval_all_the_same():
    assert hajek([], []) is None
    for values in ([1.0] * 20, [0.0] * 20, [1.0]):
        found = hajek(values, [0.1] * len(values))
        assert found.share == values[0]
        assert found.effective_items == pytest.approx(len(values))
        assert 0.0 <= found.low < found.high <= 1.0
        assert math.isclose(found.high - found.low, 1 - wilson(1.0, len(values))[0])
