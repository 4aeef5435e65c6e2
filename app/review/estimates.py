"""Pure: shares estimated from items that were not equally likely to be reviewed, with intervals.

Hajek's estimator weighs each item by one over the probability with which it was taken. A plain mean over a queue that
prefers doubtful answers says how bad the doubtful ones are, not how bad the answers are.
"""

from collections.abc import Sequence
from math import sqrt

import msgspec

Z95 = 1.959964


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

    The variance is the linearised one for items taken independently of each other, of what a release would answer to
    further questions of this kind and not only to those asked. The interval is Wilson's for as many items as would
    have that variance: one around the estimate would end below 0 or above 1, and miss more often near them.
    """
    n = len(values)
    if not n:
        return None
    weights = [1.0 / probability for probability in probabilities]
    total = sum(weights)
    share = sum(weight * value for weight, value in zip(weights, values, strict=True)) / total
    effective = total**2 / sum(weight**2 for weight in weights)
    if n > 1 and 0.0 < share < 1.0:
        spread = sum((weight * (value - share)) ** 2 for weight, value in zip(weights, values, strict=True))
        variance = n / (n - 1) * spread / total**2
        if variance > 0.0:
            effective = share * (1.0 - share) / variance
    low, high = wilson(share, effective)
    return Estimate(share=share, low=low, high=high, items=n, effective_items=effective, unweighted=sum(values) / n)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share among `n`."""
    z2 = Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
