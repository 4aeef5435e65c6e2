"""How good each release's answers are, over windows of production traffic, each figure with its interval.

The main rule: figures come from the rows that are on record and from nothing else, so that anybody can compute them
again. Rows are read page by page and become sums at once: memory does not grow with traffic.
"""

from app.quality.figures import Figure, ReleaseQuality, Report, Unit
from app.quality.gauges import REST, Gauges
from app.quality.quality import DEFAULT_DAYS, Quality

__all__ = ["DEFAULT_DAYS", "REST", "Figure", "Gauges", "Quality", "ReleaseQuality", "Report", "Unit"]
