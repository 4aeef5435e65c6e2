"""The frontier as a picture."""

from typing import IO

from app.errors import InvalidRequest
from app.loadtest.measures import Objective
from app.loadtest.sweeping import Point, written


def check_drawing() -> None:
    """See that a picture can be drawn, before there is anything to lose.

    Raises:
        InvalidRequest: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InvalidRequest("`--png`: needs matplotlib: pip install 'hallmark[plot]'.", param="png") from None


def draw_frontier(file: IO[bytes], points: list[Point], setting: str, objective: Objective, best: Point | None) -> None:
    """Draw 95 % latency over throughput as PNG, each point with its value, and mark the recommended one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    first, each = figure.subplots(1, 2)
    for axes, name, limit in (
        (first, "ttft_seconds", objective.ttft_seconds),
        (each, "tpot_seconds", objective.tpot_seconds),
    ):
        known = [point for point in points if point.figures[name]["p95"] is not None]
        across = [point.figures["requests_per_second"] for point in known]
        up = [point.figures[name]["p95"] for point in known]
        axes.plot(across, up, marker="o")
        for point, x, y in zip(known, across, up, strict=True):
            axes.annotate(written(point.value), (x, y), textcoords="offset points", xytext=(4, 4))
            if point is best:
                axes.plot(
                    [x], [y], marker="*", markersize=16, linestyle="none", label=f"recommended: {written(point.value)}"
                )
        axes.axhline(limit, linestyle=":", color="grey", label="objective")
        axes.set(xlabel="answers per second", ylabel=f"{name.split('_')[0]}, 95 %, seconds", ylim=(0, None))
        axes.legend()
    figure.suptitle(f"Throughput and latency by {setting}")
    figure.savefig(file, dpi=120, format="png")
