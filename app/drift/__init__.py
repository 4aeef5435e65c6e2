"""Whether questions or answers have changed: windows of traffic against a reference, for each tenant and release.

The main rule: an alarm takes two disjoint windows in a row, at a level that keeps to a budget of false alarms in 90
days. It names examples by their ids, doubts what was learned before, and has more answers labelled; it rolls nothing
back. The comparing is `hallmark worker`'s (`app.drift.watching`): nothing that is imported here needs scipy.
"""

from app.drift.following import DriftPlan, Noticed
from app.drift.gauges import DriftGauges
from app.drift.references import References
from app.drift.states import (
    UNKNOWN,
    Alarm,
    Cluster,
    Drift,
    DriftState,
    Followed,
    Inputs,
    Kind,
    Output,
    Reference,
    Window,
)

__all__ = [
    "UNKNOWN",
    "Alarm",
    "Cluster",
    "Drift",
    "DriftGauges",
    "DriftPlan",
    "DriftState",
    "Followed",
    "Inputs",
    "Kind",
    "Noticed",
    "Output",
    "Reference",
    "References",
    "Window",
]
