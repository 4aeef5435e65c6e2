"""The results for people: Markdown tables and plots.

The main rule: no figure without its interval, and the conclusion in words that say no more than the intervals do.
"""

from pathlib import Path

from finetune.evaluations import ArmResult, Comparison, Evaluation
from finetune.statistics import Difference, Estimate

TITLES = {
    "score": "score",
    "macro_f1": "macro F1",
    "unfit": "no label",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "valid": "fits the schema",
    "citation_precision": "citation precision",
    "citation_recall": "citation recall",
    "abstained_right": "abstained, rightly",
    "abstained_wrong": "abstained, wrongly",
}
SCORES = {
    "classify": "accuracy",
    "answer": "score: token F1, and 1 for a question rightly not answered",
    "extract": "share of records that are right in full",
    "preference": "score",
}
FOUR = ("base", "base + retrieval", "adapter", "adapter + retrieval")


def shown(estimate: Estimate) -> str:
    """A figure with its interval, in percent."""
    if estimate.value is None:
        return "-"
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def points(found: Difference) -> str:
    """A difference with its interval, in percentage points."""
    return f"{100 * found.value:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def evaluation_markdown(found: Evaluation) -> str:
    """What an evaluation found, for a person."""
    names = [name for name in TITLES if any(name in arm.figures for arm in found.arms)]
    figures = [[arm.name, *(shown(arm.figures[name]) if name in arm.figures else "-" for name in names)]
               for arm in found.arms]  # fmt: skip
    parts = [
        f"# Evaluation on {found.dataset}, {found.split}\n",
        f"{found.rows} rows in {found.sessions} sessions. The score is the {SCORES[found.task]}; intervals at 95 %.\n",
        table(["arm", *(TITLES[name] for name in names)], figures),
        "## What it took\n",
        table(
            ["arm", "seconds, mean", "p50", "p95", "prompt tokens", "answer tokens", "cost", "failed"],
            [_effort(arm) for arm in found.arms],
        ),
        f"{found.concurrency} at a time. The cost is {' or '.join(sorted({arm.cost_unit for arm in found.arms}))}.\n",
    ]
    if found.comparisons:
        parts += [
            "## Differences, row by row\n",
            table(["arm", "against", "difference"], _differences(found.comparisons)),
        ]
    if {arm.name for arm in found.arms} >= set(FOUR):
        parts += ["## What belongs into the weights, and what into the index\n", four_arms_in_words(found)]
    slices = sorted({name for arm in found.arms for name in arm.slices})
    if slices:
        by_slice = [[name, *(shown(arm.slices[name]) for arm in found.arms)] for name in slices]
        parts += ["## By slice\n", table(["slice", *(arm.name for arm in found.arms)], by_slice)]
    return "\n".join(parts)


def four_arms_in_words(found: Evaluation) -> str:
    """What the adapter adds and what retrieval adds, each alone and on top of the other."""
    by_pair = {(each.arm, each.against): each.difference for each in found.comparisons}
    base, retrieval, adapter, both = FOUR
    lines = [
        ("The adapter alone", by_pair[adapter, base]),
        ("Retrieval alone", by_pair[retrieval, base]),
        ("The adapter on top of retrieval", by_pair[both, retrieval]),
        ("Retrieval on top of the adapter", by_pair[both, adapter]),
    ]
    said = [f"- {what} changes the score by {points(change)}: {_verdict(change)}." for what, change in lines]
    adapter_pays, retrieval_pays = lines[2][1].low > 0, lines[3][1].low > 0
    conclusion = {
        (True, True): "Both: the adapter and retrieval each add to the other.",
        (
            True,
            False,
        ): "The weights: retrieval adds nothing that can be seen to the adapter. Turn it off for this task.",
        (False, True): "The index: the adapter adds nothing that can be seen to retrieval. Do not train for this task.",
        (False, False): "Undecided: neither adds to the other what these rows can show.",
    }[adapter_pays, retrieval_pays]
    return "\n".join([*said, "", conclusion, ""])


def _verdict(change: Difference) -> str:
    if change.low > 0:
        return "it helps"
    return "it harms" if change.high < 0 else "these rows cannot tell"


def _effort(arm: ArmResult) -> list[str]:
    failed = ", ".join(f"{count} {code}" for code, count in sorted(arm.failures.items())) or "0"
    seconds = [f"{arm.seconds[name]:.3f}" for name in ("mean", "p50", "p95")]
    return [
        arm.name,
        *seconds,
        f"{arm.tokens['prompt']:.0f}",
        f"{arm.tokens['completion']:.1f}",
        f"{arm.cost:g}",
        failed,
    ]


def _differences(comparisons: tuple[Comparison, ...]) -> list[list[str]]:
    return [[each.arm, each.against, points(each.difference)] for each in comparisons]


def plain(name: str) -> str:
    """A name as a picture shows it letter for letter: what stands between dollar signs would be a formula."""
    return name.replace("$", r"\$")


def draw_arms(file: Path, found: Evaluation) -> None:
    """Draw the score of each arm with its interval, and what an answer took beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.45 * len(found.arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [plain(arm.name) for arm in found.arms]
    values = [arm.figures["score"] for arm in found.arms]
    middle = [each.value or 0.0 for each in values]
    spread = [
        [m - e.low for m, e in zip(middle, values, strict=True)],
        [e.high - m for m, e in zip(middle, values, strict=True)],
    ]
    left.errorbar(middle, names, xerr=spread, fmt="o", capsize=3)
    left.set(xlim=(0, 1), xlabel=f"{SCORES[found.task].partition(':')[0]} (95 % interval)")
    left.invert_yaxis()
    right.barh(names, [arm.seconds["mean"] for arm in found.arms])
    right.set(xlabel="seconds an answer, mean")
    figure.savefig(file, dpi=120)
