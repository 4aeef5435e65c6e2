"""The durable record of every prediction: one row for each id, whatever happened to the request.

The main rule: what a client saw complete is on the disk. A row is opened before the engine answers and closed before
the last byte is sent; what a crash cut is found at the next start and marked interrupted.

The event loop hands rows over without waiting; one thread writes all that gathered while its last commit ran, in one
transaction, and never lingers for more. Only an opening row that nobody waits for stays behind for a few
milliseconds: if the answer is there by then, its closing row is the only one written.
"""

from app.predictions.log import PredictionLog
from app.predictions.prediction import Outcome, Prediction, uuid7

__all__ = ["Outcome", "Prediction", "PredictionLog", "uuid7"]
