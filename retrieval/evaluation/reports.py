"""What was measured, as JSON and as Markdown, and whether it is good enough. Pure.

The main rule: the same run gives the same bytes, so a report holds no time and no path.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from retrieval.evaluation.measures import Figure

MAX_LOSS_TO_BETTER_LEG = 0.01
"""Most nDCG that a fused ranking may lose to the better of the rankings it is made of."""

_THRESHOLD = re.compile(r"(?:(?P<set>[^=:]+):)?(?P<figure>[A-Za-z_]+(?:@\d+)?)=(?P<value>\d*\.?\d+)")
_TITLES = {"dense": "dense", "sparse": "BM25", "hybrid": "fused"}


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one set, of one way of searching where there are several."""

    set: str
    figures: tuple[Figure, ...]
    mode: str | None = None

    def value(self, name: str) -> float | None:
        """A figure by its name, with or without its cut-off; None where it was not measured."""
        return next((each.value for each in self.figures if name in (each.name, each.name.partition("@")[0])), None)


@dataclass(frozen=True, slots=True)
class Report:
    """Figures and what they are of; `failures` say what is not good enough."""

    measured: str
    of: Mapping[str, Any]
    """What was asked: index version, embedding model, fusion, release and so on."""
    rows: tuple[Row, ...]
    failures: tuple[str, ...] = field(default=())

    def json(self) -> dict[str, Any]:
        """The report as a document."""
        return {**asdict(self), "of": dict(self.of), "passed": not self.failures}

    def markdown(self) -> str:
        """One table: a line for each figure of each set."""
        modes = any(row.mode for row in self.rows)
        head = ["set", *(["search"] if modes else []), "figure", "value", "95 % interval", "n"]
        lines = [head, ["---"] * len(head)]
        for row in self.rows:
            for each in row.figures:
                value = "?" if each.value is None else f"{each.value:.3f}"
                interval = "?" if each.low is None or each.high is None else f"{each.low:.3f} to {each.high:.3f}"
                mode = [_TITLES.get(row.mode or "", row.mode or "")] if modes else []
                lines.append([row.set, *mode, each.name, value, interval, f"{each.n:,}"])
        said = ", ".join(f"{name.replace('_', ' ')} `{value}`" for name, value in self.of.items() if value is not None)
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        failed = "".join(f"\n- **not good enough**: {failure}" for failure in self.failures)
        return f"{said}\n\n{table}\n{failed}".rstrip() + "\n"


@dataclass(frozen=True, slots=True)
class Threshold:
    """The least or the most that a figure may be, of one set or of all."""

    figure: str
    value: float
    set: str | None = None
    is_most: bool = False

    def failure(self, row: Row) -> str | None:
        """Say what is wrong with a row; None where it is good enough, or not what this is about."""
        if (self.set is not None and self.set != row.set) or row.mode not in (None, "hybrid"):
            return None
        value = row.value(self.figure)
        if value is None or (value <= self.value if self.is_most else value >= self.value):
            return None
        return f"{row.set}: {self.figure} is {value:.3f}, {'over' if self.is_most else 'under'} {self.value:g}"


def threshold(text: str, *, is_most: bool = False) -> Threshold:
    """Read `ndcg=0.8`, `ndcg@10=.8` or `SET:ndcg=0.8`.

    Raises:
        ValueError: it is none of these.
    """
    found = _THRESHOLD.fullmatch(text)
    if found is None or not 0 <= float(found["value"]) <= 1:
        raise ValueError(f"{text!r}: write FIGURE=VALUE or SET:FIGURE=VALUE with a value from 0 to 1, such as ndcg=0.8")
    return Threshold(found["figure"], float(found["value"]), found["set"], is_most)


def failures(rows: Sequence[Row], thresholds: Sequence[Threshold]) -> tuple[str, ...]:
    """Say what is not good enough; a threshold that no row has a figure for is told too, since it guards nothing."""
    found = [failure for each in thresholds for row in rows if (failure := each.failure(row))]
    unmeasured = [
        f"{f'{each.set}: ' if each.set else ''}{each.figure} was not measured"
        for each in thresholds
        if not any(row.value(each.figure) is not None for row in rows if each.set in (None, row.set))
    ]
    return (*found, *unmeasured, *_losses(rows))


def _losses(rows: Sequence[Row]) -> list[str]:
    """Say where a fused ranking is further below its better leg than it may be."""
    found = []
    for row in rows:
        legs = [each.value("ndcg") or 0.0 for each in rows if each.set == row.set and each.mode in ("dense", "sparse")]
        fused = row.value("ndcg")
        if row.mode not in (None, "dense", "sparse") and len(legs) == 2 and fused is not None:
            better = max(legs)
            if fused < better - MAX_LOSS_TO_BETTER_LEG:
                found.append(f"{row.set}: {row.mode} has nDCG {fused:.3f}, its better leg {better:.3f}")
    return found


def comparison(rows: Sequence[Row], references: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """One line for each set: nDCG of each way of searching, and what others reached."""
    modes = list(dict.fromkeys(row.mode or "" for row in rows))
    head = ["set", "questions", *(_TITLES.get(mode, mode) for mode in modes), *(["reference"] if references else [])]
    lines = [head, ["---"] * len(head)]
    for name in dict.fromkeys(row.set for row in rows):
        of_set = {row.mode or "": row for row in rows if row.set == name}
        values = {mode: of_set[mode].value("ndcg") or 0.0 for mode in modes if mode in of_set}
        best = max(values.values())
        cells = [_shown(values.get(mode), best) for mode in modes]
        reference = [" / ".join(_shown(value) for value in references.get(name, ()))] if references else []
        lines.append([name, f"{next(iter(of_set.values())).figures[0].n:,}", *cells, *reference])
    if references:
        lines[0][-1] = f"reference: {' / '.join(names)}"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _shown(value: float | None, best: float | None = None) -> str:
    text = "" if value is None else f"{value:.3f}".lstrip("0")
    return f"**{text}**" if value is not None and value == best else text
