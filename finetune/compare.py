"""The smallest model that will do: which of several arms is cheapest and surely not worse than the best by a margin.

The main rule: arms are tested from the dearest to the cheapest, each against the reference, and the first that fails
ends it. In that fixed order no test costs another any of its certainty (Maurer and others 1995).
"More labels are needed" is an answer, and says how many.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from finetune.errors import BadConfig, BadDataset
from finetune.evaluate import column
from finetune.evaluations import MEASURED, ArmResult, Evaluation, RowFacts, read_results, write_json
from finetune.report import plain, points, shown, table
from finetune.statistics import Difference, Sample, difference, mean, rows_needed

FLOOR = 2.0
"""No slice may be worse by more than so many margins."""
MIN_SLICE_ROWS = 20
"""A slice with fewer rows is shown and not judged: its difference is mostly chance."""

Outcome = Literal["passes", "too few rows", "worse", "a slice is worse", "not tested"]


class SliceFloor(msgspec.Struct, frozen=True):
    """How much worse an arm is than the reference on one slice."""

    slice: str
    rows: int
    drop: float
    judged: bool
    holds: bool


class Tested(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one arm. `drop` is the reference's score less the arm's."""

    arm: str
    outcome: Outcome
    cost: float
    saved: float
    """The share of the reference's cost."""
    drop: Difference
    slices: tuple[SliceFloor, ...]
    rows_needed: int | None = None


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """Which arm to take."""

    format: Literal["hallmark-recommendation/1"] = "hallmark-recommendation/1"
    reference: str
    margin: float
    recommended: str
    reason: str
    cost_unit: str
    tested: tuple[Tested, ...]


def compare(folders: Sequence[Path], output: Path, *, margin: float, reference: str | None = None) -> Recommendation:
    """Read evaluations of the same rows, test, and write `recommendation.json`, `.md` and `.png`.

    Raises:
        TrainingError: the evaluations do not belong together, or an arm is not in them.
    """
    if not 0 < margin < 1:
        raise BadConfig(f"margin: {margin} is not a share between 0 and 1; 0.05 is five points")
    evaluations = [read_results(folder) for folder in folders]
    arms, facts = _joined(evaluations)
    found = recommend(arms, facts, margin=margin, reference=reference)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "recommendation.json", found)
    (output / "recommendation.md").write_text(recommendation_markdown(found, arms), encoding="utf-8")
    draw_costs(output / "recommendation.png", found, arms)
    return found


def recommend(
    arms: Sequence[ArmResult], facts: Sequence[RowFacts], *, margin: float, reference: str | None = None
) -> Recommendation:
    """Test the arms in the order of their costs. The reference is by default the dearest."""
    ordered = sorted(arms, key=lambda arm: (-arm.cost, arm.name))
    named = {arm.name: arm for arm in ordered}
    if reference is not None and reference not in named:
        raise BadConfig(f"reference: there is no arm {reference!r}; there are {', '.join(named)}")
    if len({arm.cost_unit for arm in arms}) > 1:
        raise BadConfig("cost: some arms have one and others are measured in seconds; give each arm its cost")
    best = named[reference] if reference else ordered[0]
    cheaper = [arm for arm in ordered if arm.cost < best.cost]
    tested: list[Tested] = []
    for arm in cheaper:
        stopped = any(each.outcome != "passes" for each in tested)
        tested.append(_test(arm, best, facts, margin, stopped=stopped))
    passed = [each for each in tested if each.outcome == "passes"]
    recommended = passed[-1].arm if passed else best.name
    return Recommendation(
        reference=best.name,
        margin=margin,
        recommended=recommended,
        reason=_reason(best, tested, margin),
        cost_unit=best.cost_unit,
        tested=tuple(tested),
    )


def _test(arm: ArmResult, best: ArmResult, facts: Sequence[RowFacts], margin: float, *, stopped: bool) -> Tested:
    sample = Sample.of([fact.weight for fact in facts], [fact.session for fact in facts])
    reference = column([fact.scores[best.name] for fact in facts])
    mine = column([fact.scores[arm.name] for fact in facts])
    drop = difference(reference, mine, sample)
    floors = _floors(reference - mine, facts, margin)
    needed: int | None = None
    outcome: Outcome = "passes"
    if stopped:
        outcome = "not tested"
    elif drop.upper >= margin:
        needed = rows_needed(drop, margin)
        outcome = "worse" if needed is None else "too few rows"
    elif not all(floor.holds for floor in floors):
        outcome = "a slice is worse"
    saved = 1 - arm.cost / best.cost if best.cost else 0.0
    more = max(1, needed - len(facts)) if needed is not None else None
    return Tested(arm=arm.name, outcome=outcome, cost=arm.cost, saved=saved, drop=drop, slices=floors, rows_needed=more)


def _floors(drops: np.ndarray, facts: Sequence[RowFacts], margin: float) -> tuple[SliceFloor, ...]:
    found = []
    for name in sorted({fact.slice for fact in facts if fact.slice is not None}):
        kept = np.array([fact.slice == name for fact in facts])
        drop = float(np.average(drops[kept], weights=np.array([fact.weight for fact in facts])[kept]))
        judged = int(kept.sum()) >= MIN_SLICE_ROWS
        found.append(SliceFloor(name, int(kept.sum()), drop, judged, not judged or drop <= FLOOR * margin))
    return tuple(found)


def _reason(best: ArmResult, tested: list[Tested], margin: float) -> str:
    """What was found, in words."""
    passed = [each for each in tested if each.outcome == "passes"]
    failed = next((each for each in tested if each.outcome not in ("passes", "not tested")), None)
    said = []
    if passed:
        last = passed[-1]
        said.append(
            f"{last.arm} is not worse than {best.name} by {margin:.1%} or more: its drop is {points(last.drop)}, with "
            f"95 % certainty below {100 * last.drop.upper:.1f} points. It saves {last.saved:.0%} of the cost."
        )
    else:
        said.append(f"Nothing cheaper than {best.name} has been shown to be good enough: keep {best.name}.")
    if failed is None:
        return " ".join(said)
    drop = points(failed.drop)
    if failed.outcome == "too few rows":
        said.append(
            f"For {failed.arm} there are too few rows (its drop is {drop}): about {failed.rows_needed} more labels are "
            "needed."
        )
    elif failed.outcome == "worse":
        said.append(f"{failed.arm} seems worse than allowed (its drop is {drop}): more labels will not help it.")
    else:
        slices = ", ".join(f"{each.slice} by {100 * each.drop:.1f} points" for each in failed.slices if not each.holds)
        said.append(f"{failed.arm} is worse on {slices}, of which {100 * FLOOR * margin:.1f} are allowed.")
    return " ".join(said)


def _joined(evaluations: Sequence[tuple[Evaluation, list[RowFacts]]]) -> tuple[list[ArmResult], list[RowFacts]]:
    """The arms of all evaluations, with their scores on the rows that all of them asked, and these rows."""
    first = evaluations[0][0]
    arms: list[ArmResult] = []
    by_row: dict[str, RowFacts] = {}
    for at, (evaluation, facts) in enumerate(evaluations):
        same = (evaluation.dataset_digest, evaluation.split) == (first.dataset_digest, first.split)
        if not same:
            raise BadDataset("the evaluations are of different rows; evaluate all arms on the same dataset and split")
        twice = {arm.name for arm in arms} & {arm.name for arm in evaluation.arms}
        if twice:
            raise BadDataset(
                f"the arm {', '.join(sorted(twice))} is in two evaluations; name it otherwise in one of them"
            )
        arms += evaluation.arms
        theirs = {fact.row: fact for fact in facts}
        if at == 0:
            by_row = theirs
        by_row = {
            row: msgspec.structs.replace(fact, scores=fact.scores | theirs[row].scores)
            for row, fact in by_row.items()
            if row in theirs
        }
    if not by_row:
        raise BadDataset("the evaluations have no row in common; evaluate all arms with the same `limit`")
    rows = list(by_row.values())
    fewer = any(len(facts) > len(rows) for _, facts in evaluations)
    if fewer and any(arm.cost_unit == MEASURED for arm in arms):
        raise BadConfig(
            "cost: the seconds were measured on different rows; evaluate all arms with the same `limit`, or give each "
            "arm its cost"
        )
    sample = Sample.of([fact.weight for fact in rows], [fact.session for fact in rows])
    scored = {arm.name: mean(column([fact.scores[arm.name] for fact in rows]), sample) for arm in arms}
    return [msgspec.structs.replace(arm, figures=arm.figures | {"score": scored[arm.name]}) for arm in arms], rows


def recommendation_markdown(found: Recommendation, arms: Sequence[ArmResult]) -> str:
    """The recommendation for a person."""
    named = {arm.name: arm for arm in arms}
    best = named[found.reference]
    rows = [[best.name, shown(best.figures["score"]), f"{best.cost:g}", "-", "-", "the reference"]]
    rows += [
        [
            each.arm,
            shown(named[each.arm].figures["score"]),
            f"{each.cost:g}",
            f"{each.saved:.0%}",
            points(each.drop),
            each.outcome,
        ]
        for each in found.tested
    ]
    floors = [
        [each.arm, floor.slice, str(floor.rows), f"{100 * floor.drop:+.1f} points",
         ("holds" if floor.holds else "fails") if floor.judged else f"not judged: under {MIN_SLICE_ROWS} rows"]
        for each in found.tested for floor in each.slices
    ]  # fmt: skip
    parts = [
        f"# Recommended: {found.recommended}\n",
        f"{found.reason}\n",
        table(["arm", "score", f"cost ({found.cost_unit})", "saved", "drop", "outcome"], rows),
        f"Tested from the dearest to the cheapest against {found.reference}, with a margin of {found.margin:.1%}; the "
        "first that fails ends it. Scores and drops are on the same rows, with 95 % intervals.\n",
    ]
    if floors:
        parts += ["## Slices\n", table(["arm", "slice", "rows", "drop", "floor"], floors)]
    return "\n".join(parts)


def draw_costs(file: Path, found: Recommendation, arms: Sequence[ArmResult]) -> None:
    """Draw score over cost, with the reference's margin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        estimate = arm.figures["score"]
        value = estimate.value or 0.0
        axes.errorbar(
            arm.cost,
            value,
            yerr=[[value - estimate.low], [estimate.high - value]],
            fmt="s" if arm.name == found.recommended else "o",
            capsize=3,
        )
        axes.annotate(plain(arm.name), (arm.cost, value), xytext=(5, 5), textcoords="offset points")
        if arm.name == found.reference:
            axes.axhline(
                value - found.margin, linestyle=":", color="grey", label=f"{plain(arm.name)} less {found.margin:.1%}"
            )
    axes.set(
        xlabel=found.cost_unit,
        ylabel="score (95 % interval)",
        ylim=(0, 1),
        title=f"recommended: {plain(found.recommended)}",
    )
    axes.legend()
    figure.savefig(file, dpi=120)
