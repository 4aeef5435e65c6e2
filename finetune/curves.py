"""The loss curve of a run, as CSV for programs and as PNG for people."""

import csv
from pathlib import Path
from typing import Any

COLUMNS = ("step", "epoch", "loss", "heldout_loss", "learning_rate", "grad_norm")
_NAMES = {"eval_loss": "heldout_loss"}


def loss_rows(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """One row a step, from the trainer's log, in which a step's training and held-out losses stand apart."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        named = {_NAMES.get(name, name): value for name, value in entry.items()}
        rows.setdefault(entry["step"], {}).update({name: named[name] for name in COLUMNS if name in named})
    return [rows[step] for step in sorted(rows)]


def write_curve(file: Path, rows: list[dict[str, float]]) -> None:
    """Write the curve as CSV; what was not measured at a step is empty."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def draw_curve(file: Path, rows: list[dict[str, float]], kept_step: int | None) -> None:
    """Draw training and held-out loss over the steps, and mark the step whose adapter was kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("heldout_loss", "held out")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 40 else None, markersize=3)
    if kept_step:
        axes.axvline(kept_step, linestyle=":", color="grey", label=f"kept: step {kept_step}")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    if axes.has_data():
        axes.legend()
    figure.savefig(file, dpi=120)
