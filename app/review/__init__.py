"""The review queue: people look at some of the answers, and what they find stands for all of them.

The main rule: chance decides what is reviewed, with a probability that is known and kept with every item. A queue may
prefer doubtful answers as much as it likes; weighted by those probabilities, its figures are those of all answers. What
a reviewer finds is a label, kept where all labels are (`app.feedback`).
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app.database import Database
from app.feedback import LabelLog
from app.predictions import History
from app.review.agreement import Agreement, PairAgreement
from app.review.estimates import Estimate
from app.review.exchange import Exchange, Imported
from app.review.filling import Filler
from app.review.findings import Findings, Item, ItemCount, ItemState, Progress, QueueAgreement, Reviewer, Share
from app.review.labelstudio import messages_of
from app.review.queues import Boost, Clock, Queue, Queues
from app.review.raising import Raising
from app.review.reviews import Finding, Leased, Review, Reviews, SkipReason
from app.review.rules import Negative, Policy, Rules, Threshold

__all__ = [
    "Agreement",
    "Boost",
    "Clock",
    "Estimate",
    "Exchange",
    "Filler",
    "Finding",
    "Findings",
    "Imported",
    "Item",
    "ItemCount",
    "ItemState",
    "Leased",
    "Negative",
    "PairAgreement",
    "Policy",
    "Progress",
    "Queue",
    "QueueAgreement",
    "Queues",
    "Raising",
    "Review",
    "ReviewQueue",
    "Reviewer",
    "Reviews",
    "Rules",
    "Share",
    "SkipReason",
    "Threshold",
    "messages_of",
    "open_review",
]


@dataclass(frozen=True, slots=True)
class ReviewQueue:
    """The parts of the review queue."""

    queues: Queues
    reviews: Reviews
    findings: Findings
    exchange: Exchange


def _now() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def open_review(
    database: Database, history: History, labels: LabelLog, *, clock: Clock = _now
) -> AsyncIterator[ReviewQueue]:
    """Open the review queue over the database that replicas share, and fill it until the end of the block."""
    queues = Queues(database, clock)
    findings = Findings(database, queues, clock)
    async with Filler(database, queues, history, labels):
        yield ReviewQueue(
            queues=queues,
            reviews=Reviews(database, queues, history, labels, clock),
            findings=findings,
            exchange=Exchange(database, queues, findings, history, labels, clock),
        )
