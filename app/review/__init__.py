"""The review queue: people look at some of the answers, and what they find stands for all of them.

The main rule: chance decides what is reviewed, with a probability that is known and kept with every item. A queue may
prefer doubtful answers as much as it likes; weighted by those probabilities, its figures are those of all answers. What
a reviewer finds is a label, kept where all labels are (`app.feedback`).
"""

from app.review.agreement import Agreement, PairAgreement
from app.review.estimates import Estimate
from app.review.exchange import Exchange, Imported
from app.review.filling import Filler
from app.review.findings import Findings, Item, ItemCount, ItemState, Progress, QueueAgreement, Reviewer, Share
from app.review.labelstudio import messages_of
from app.review.queues import Boost, Clock, Queue, Queues
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
    "Review",
    "Reviewer",
    "Reviews",
    "Rules",
    "Share",
    "SkipReason",
    "Threshold",
    "messages_of",
]
