"""Pure: shares estimated from items that were not equally likely to be reviewed, with intervals.

The statistics are those of every other figure (`observability.estimates`). A plain mean over a queue that prefers
doubtful answers says how bad the doubtful ones are, not how bad the answers are: it is shown beside the estimate.
"""

from collections.abc import Sequence

import msgspec

from observability.estimates import mean_score


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A share of what a queue considers, with a 95 % interval."""

    share: float
    low: float
    high: float
    items: int
    effective_items: float
    """How many items taken with equal probability would tell as much."""
    unweighted: float
    """The plain mean over the items: what the queue is like, not what it stands for."""


def hajek(values: Sequence[float], probabilities: Sequence[float]) -> Estimate | None:
    """Estimate the mean of values in 0 to 1 over all that was considered; None without any.

    The interval is for what a release would answer to further questions of this kind, and not only to those asked.
    """
    found = mean_score(values, probabilities)
    if found.value is None or found.low is None or found.high is None:
        return None
    return Estimate(
        share=found.value,
        low=found.low,
        high=found.high,
        items=found.n,
        effective_items=found.effective_n,
        unweighted=sum(values) / len(values),
    )
