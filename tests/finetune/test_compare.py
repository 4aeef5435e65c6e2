"""The smallest model that will do: tested in one order, with floors for slices, or told how many labels are missing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from finetune.compare import compare, recommend
from finetune.errors import BadConfig, BadDataset
from finetune.evaluations import SCORES, ArmResult, Evaluation, RowFacts, write_json, write_lines
from finetune.scoring import Score
from finetune.statistics import Estimate


def arm(name: str, cost: float, unit: str = "euros") -> ArmResult:
    figure = Estimate(0.9, 0.8, 1.0, 100, 100.0)
    return ArmResult(name=name, model=name, url="", figures={"score": figure}, slices={}, failures={},
                     seconds={"mean": 1.0}, tokens={}, cost=cost, cost_unit=unit)  # fmt: skip


def facts(n: int, *, slices: Sequence[str] = ("all",), **right: float) -> list[RowFacts]:
    """Rows of which each arm has a share right, spread evenly and in step."""
    return [
        RowFacts(
            row=str(i),
            slice=slices[i % len(slices)],
            scores={name: Score(row=str(i), score=float((i * 37) % n < share * n)) for name, share in right.items()},
        )
        for i in range(n)
    ]


ARMS = [arm("large", 10), arm("middle", 4), arm("small", 1)]


def test_the_cheapest_that_is_surely_not_worse_is_recommended_with_what_it_saves() -> None:
    found = recommend(ARMS, facts(800, large=0.92, middle=0.91, small=0.9), margin=0.05)
    assert found.recommended == "small"
    assert [each.outcome for each in found.tested] == ["passes", "passes"]
    assert found.tested[1].saved == pytest.approx(0.9)
    assert found.tested[1].drop.upper < 0.05
    assert "It saves 90% of the cost." in found.reason


def test_the_first_that_fails_ends_it() -> None:
    found = recommend(ARMS, facts(800, large=0.92, middle=0.7, small=0.92), margin=0.05)
    assert found.recommended == "large"
    assert [each.outcome for each in found.tested] == ["worse", "not tested"]
    assert "more labels will not help it" in found.reason


def test_too_few_rows_say_how_many_more() -> None:
    found = recommend(ARMS[:2], facts(60, large=0.92, middle=0.9), margin=0.05)
    (middle,) = found.tested
    assert (found.recommended, middle.outcome) == ("large", "too few rows")
    assert middle.rows_needed is not None
    enough = recommend(ARMS[:2], facts(60 + 2 * middle.rows_needed, large=0.92, middle=0.9), margin=0.05)
    assert enough.recommended == "middle"


def test_a_slice_that_is_much_worse_keeps_an_arm_out() -> None:
    rows = facts(1000, slices=("a", "b", "c", "d", "e", "f", "g", "h"), large=1.0, middle=1.0)
    spoiled = []
    for n, row in enumerate(rows):
        wrong = Score(row=row.row, score=float(np.sin(n) > -0.6))
        scores = row.scores | {"middle": wrong} if row.slice == "a" else row.scores
        spoiled.append(RowFacts(row=row.row, slice=row.slice, scores=scores))
    found = recommend(ARMS[:2], spoiled, margin=0.06)
    assert found.tested[0].drop.upper < 0.06
    assert (found.recommended, found.tested[0].outcome) == ("large", "a slice is worse")
    assert "middle is worse on a by" in found.reason


def test_slices_with_few_rows_are_shown_and_not_judged() -> None:
    rows = facts(800, large=1.0, middle=1.0)
    few = [
        RowFacts(row=f"x{n}", slice="rare", scores={"large": Score(row="", score=1), "middle": Score(row="", score=0)})
        for n in range(3)
    ]
    found = recommend(ARMS[:2], rows + few, margin=0.05)
    assert found.recommended == "middle"
    assert [(floor.slice, floor.judged) for floor in found.tested[0].slices] == [("all", True), ("rare", False)]


def test_costs_in_different_units_are_told() -> None:
    with pytest.raises(BadConfig, match="cost: some arms have one"):
        recommend([arm("a", 1), arm("b", 2, "seconds")], facts(10, a=1, b=1), margin=0.05)


def test_a_reference_that_is_not_there_is_told() -> None:
    with pytest.raises(BadConfig, match="reference: there is no arm 'huge'; there are large, middle, small"):
        recommend(ARMS, facts(10, large=1), margin=0.05, reference="huge")


def wrote(folder: Path, one: ArmResult, rows: list[RowFacts], digest: str = "d") -> Path:
    """A folder as `evaluate` writes it, of one arm."""
    folder.mkdir()
    evaluation = Evaluation(dataset="x 1", dataset_digest=digest, split="heldout", task="classify", rows=len(rows),
                            sessions=len(rows), concurrency=1, started_at=0, arms=(one,), comparisons=())  # fmt: skip
    write_json(folder / "evaluation.json", evaluation)
    write_lines(folder / SCORES, [RowFacts(row=row.row, scores={one.name: row.scores[one.name]}) for row in rows])
    return folder


def test_scores_and_costs_are_those_of_the_rows_that_all_arms_were_asked(tmp_path: Path) -> None:
    rows = facts(400, large=0.5, small=1.0)
    right = [row for row in rows if row.scores["large"].score][:60]
    folders = [wrote(tmp_path / "large", ARMS[0], rows), wrote(tmp_path / "small", ARMS[2], right)]
    compare(folders, tmp_path / "out", margin=0.05)
    assert "| large | 100.0% (" in (tmp_path / "out" / "recommendation.md").read_text()
    measured = "seconds for 1,000 answers"
    timed = [
        wrote(tmp_path / "a", arm("large", 9, measured), rows),
        wrote(tmp_path / "b", arm("small", 1, measured), right),
    ]
    with pytest.raises(BadConfig, match="cost: the seconds were measured on different rows"):
        compare(timed, tmp_path / "out", margin=0.05)


def test_evaluations_of_the_same_rows_are_joined_and_others_refused(tmp_path: Path) -> None:
    rows = facts(400, large=0.92, small=0.91)
    for name, digest in (("large", "d"), ("small", "d"), ("other", "e")):
        (one,) = [each for each in ARMS if each.name == ("small" if name == "other" else name)]
        wrote(tmp_path / name, one, rows, digest)
    found = compare([tmp_path / "large", tmp_path / "small"], tmp_path / "out", margin=0.05)
    assert found.recommended == "small"
    assert "# Recommended: small" in (tmp_path / "out" / "recommendation.md").read_text()
    assert (tmp_path / "out" / "recommendation.png").is_file()
    with pytest.raises(BadDataset, match="the evaluations are of different rows"):
        compare([tmp_path / "large", tmp_path / "other"], tmp_path / "out", margin=0.05)
    with pytest.raises(BadDataset, match="name a folder that `evaluate` wrote"):
        compare([tmp_path / "nowhere"], tmp_path / "out", margin=0.05)
    with pytest.raises(BadConfig, match="margin: 5 is not a share"):
        compare([tmp_path / "large"], tmp_path / "out", margin=5)
