"""Load tests of any endpoint that speaks OpenAI's chat API: replay a trace or sweep a setting, open loop.

`drive` sends and measures; what is measured is held in bounded memory. Nothing here knows the service's own parts.
"""

from app.loadtest.arrivals import Arrival, at_rate, back_to_back, read_trace
from app.loadtest.driver import Target, check_host, drive
from app.loadtest.loads import Load, check_positive
from app.loadtest.measures import Measures, Objective, Sample, Times
from app.loadtest.plotting import check_drawing, draw_frontier
from app.loadtest.sweeping import Failure, Point, knee, recommended, started, written

__all__ = [
    "Arrival",
    "Failure",
    "Load",
    "Measures",
    "Objective",
    "Point",
    "Sample",
    "Target",
    "Times",
    "at_rate",
    "back_to_back",
    "check_drawing",
    "check_host",
    "check_positive",
    "draw_frontier",
    "drive",
    "knee",
    "read_trace",
    "recommended",
    "started",
    "written",
]
