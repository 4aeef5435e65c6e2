"""How good each release's answers are, over windows of production traffic, each figure with its interval.

The main rule: figures come from the rows that are on record and from nothing else, so that anybody can compute them
again. Rows are read page by page and become sums at once: memory does not grow with traffic. Reports are made in a
process of their own (`apart.py`); nothing that is imported here computes.
"""

from app.quality.apart import Apart
from app.quality.figures import DEFAULT_DAYS, Asked, Figure, ReleaseQuality, Report, Unit
from app.quality.gauges import Gauges
from app.quality.keeping import Keeper, Kept
from app.quality.quality import Quality

__all__ = [
    "DEFAULT_DAYS",
    "Apart",
    "Asked",
    "Figure",
    "Gauges",
    "Keeper",
    "Kept",
    "Quality",
    "ReleaseQuality",
    "Report",
    "Unit",
]
