"""When to look, and when to raise an alarm: windows of distinct sessions, and a budget of false alarms over time.

The main rule: what is promised is alarms in 90 days, not errors in a test. An alarm takes two disjoint windows in a
row, so that its chance is about the square of a test's level, and the level follows from how often is looked.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

BUDGET_DAYS = 90
MAX_LEVEL = 0.01
CONSECUTIVE = 2
REFERENCE_INFLATION = 3.0
"""Windows that share a reference share its luck: two in a row are more likely than the square of the level says, by
this factor at most in what was measured (docs/quality.md)."""


def disjoint_windows(sessions: Sequence[Hashable], size: int) -> list[NDArray[np.intp]]:
    """Cut rows, in the order in which they came, into windows of `size` distinct sessions; gives each window's rows.

    A session belongs to the window in which it began; what it says after that window has ended counts nowhere. The last
    window is given once the next has begun, so that looking again later changes nothing.
    """
    if size < 1:
        raise ValueError("size must be at least 1.")
    first_seen: dict[Hashable, int] = {}
    windows: list[list[int]] = [[]]
    for row, session in enumerate(sessions):
        number = first_seen.setdefault(session, len(first_seen)) // size
        if number == len(windows):
            windows.append([])
        if number == len(windows) - 1:
            windows[-1].append(row)
    return [np.array(rows, np.intp) for rows in windows[:-1]]


def level_for(windows_per_90_days: float, false_alarms: float = 1.0) -> float:
    """The level for each window's p-value that keeps to `false_alarms` expected in 90 days, at most 0.01.

    `windows_per_90_days` counts all windows of all releases and outputs that may raise an alarm.
    """
    if windows_per_90_days <= 0 or false_alarms <= 0:
        raise ValueError("windows_per_90_days and false_alarms must be above 0.")
    chance = false_alarms / (REFERENCE_INFLATION * windows_per_90_days)
    return min(MAX_LEVEL, float(chance ** (1 / CONSECUTIVE)))


def alarmed(p_values: Sequence[float], level: float) -> bool:
    """Whether the last two windows, of p-values in order, both are at the level or below."""
    return len(p_values) >= CONSECUTIVE and all(p_value <= level for p_value in p_values[-CONSECUTIVE:])
