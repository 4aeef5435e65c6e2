"""Pure: what a queue asks of its reviewers, which predictions it takes, and how likely it takes each.

The main rule: one number for each queue and prediction, a hash, decides. A prediction is taken if its number is smaller
than the highest rate that any policy gives it, so that rate is exactly how likely chance was to take it: on every
replica, however often and in whatever order the policies are asked, and also where one comes to speak later.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Literal
from uuid import UUID

import msgspec

from app.predictions import Where
from app.predictions.signals import dense_scores, support

Policy = Literal["uniform", "low_support", "low_margin", "negative_feedback", "drift", "gold"]


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """A rate for the predictions whose signal lies below a value."""

    rate: float
    below: float


class Negative(msgspec.Struct, frozen=True, kw_only=True):
    """A rate for the predictions that somebody rated false, or with a number below a value."""

    rate: float
    below: float | None = None


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How a queue is filled and reviewed."""

    question: str = ""
    """What a reviewer is asked about each answer."""
    classes: tuple[str, ...] = ()
    """What a reviewer chooses from; empty where an answer or passages may be stated instead."""
    where: Where = Where()
    """Which predictions are considered, from `since` on."""
    uniform: float = 0.05
    """How likely any prediction is taken, whatever else is known of it: above 0."""
    low_support: Threshold | None = None
    low_margin: Threshold | None = None
    negative_feedback: Negative | None = None
    overlap: int = 1
    """How many reviewers an item gets that is in the share for overlap; any other gets one."""
    overlap_share: float = 1.0
    gold_share: float = 0.0
    """How often a reviewer is given an item whose right class is known."""
    lease_seconds: int = 1_800
    capacity: int = 10_000
    """Items that may wait: filling goes on when there is room again, and leaves nothing out."""
    paused: bool = False
    """Whether filling waits; reviewing does not."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction that a queue considers, with the JSON of its citations and passages."""

    id: str
    release_name: str | None
    verdict: str | None
    citations: str | None
    passages: str | None


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction for a queue, and how likely chance was to take it."""

    prediction_id: str
    release_name: str | None
    policy: Policy
    probability: float


def draw(queue_id: str, what: str, purpose: Literal["sample", "overlap", "gold"]) -> float:
    """A number in [0, 1) for one thing in one queue: the same for ever, and unlike any other."""
    digest = blake2b(what.encode(), key=UUID(queue_id).bytes, person=purpose.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)  # As many bits as a float below 1 can hold.


def support_of(candidate: Candidate) -> float | None:
    """How far the passages bear out an answer, 0 to 1: the mean over its sentences; None where nothing was checked."""
    return support(candidate.verdict, candidate.citations)


def margin_of(candidate: Candidate) -> float | None:
    """How far the passage that is nearest to the question is ahead of the next, in cosine; None without two."""
    scores = dense_scores(candidate.passages)
    return scores[0] - scores[1] if len(scores) > 1 else None


def rates(rules: Rules, candidate: Candidate, *, is_negative: bool) -> Iterator[tuple[float, Policy]]:
    """Give what each policy of a queue says to a prediction."""
    yield rules.uniform, "uniform"
    if rules.low_support is not None:
        support = support_of(candidate)
        if support is not None and support < rules.low_support.below:
            yield rules.low_support.rate, "low_support"
    if rules.low_margin is not None:
        margin = margin_of(candidate)
        if margin is not None and margin < rules.low_margin.below:
            yield rules.low_margin.rate, "low_margin"
    if rules.negative_feedback is not None and is_negative:
        yield rules.negative_feedback.rate, "negative_feedback"


def chosen(queue_id: str, candidates: Sequence[tuple[Candidate, Sequence[tuple[float, Policy]]]]) -> list[Offer]:
    """The predictions that chance takes, each with the highest of its rates; of two equal ones the first."""
    offers = []
    for candidate, said in candidates:
        probability, policy = max(said, key=lambda each: each[0])
        if draw(queue_id, candidate.id, "sample") < probability:
            offers.append(
                Offer(
                    prediction_id=candidate.id,
                    release_name=candidate.release_name,
                    policy=policy,
                    probability=probability,
                )
            )
    return offers


def reviews_wanted(queue_id: str, rules: Rules, prediction_id: str) -> int:
    """How many reviewers an item gets."""
    return rules.overlap if draw(queue_id, prediction_id, "overlap") < rules.overlap_share else 1
