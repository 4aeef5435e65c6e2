"""The durable record of every prediction: one row for each id, whatever happened to the request.

The main rule: what a client saw complete is on the disk. A row is opened before the engine answers and closed before
the last byte is sent; what a crash cut is found at the next start and marked interrupted.

The event loop hands rows over without waiting; one thread writes all that gathered while its last commit ran, in one
transaction, and never lingers for more. Only an opening row that nobody waits for stays behind for a few
milliseconds: if the answer is there by then, its closing row is the only one written.

The log's file is the shared database's own, or the outbox from which the shipper moves rows there. It is asked by
`History`; the log itself only knows the rows that it still has.
"""

from app.predictions.documents import DocumentUses, Use
from app.predictions.history import (
    FeedbackState,
    History,
    LabelState,
    Mention,
    Settled,
    Traced,
    Where,
    conditions,
    first_id,
)
from app.predictions.keeping import Keeper, Pseudonym
from app.predictions.log import PredictionLog
from app.predictions.prediction import FACTS, Outcome, Prediction, created_at, uuid7
from app.predictions.sealed import Keys
from app.predictions.shipper import Shipper

__all__ = [
    "FACTS",
    "DocumentUses",
    "FeedbackState",
    "History",
    "Keeper",
    "Keys",
    "LabelState",
    "Mention",
    "Outcome",
    "Prediction",
    "PredictionLog",
    "Pseudonym",
    "Settled",
    "Shipper",
    "Traced",
    "Use",
    "Where",
    "conditions",
    "created_at",
    "first_id",
    "uuid7",
]
