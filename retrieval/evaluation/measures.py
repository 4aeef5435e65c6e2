"""What a ranking and a list of outcomes are worth, each with its interval. Pure.

The main rule: every figure is a mean over questions, so that its interval says how far other questions like these would
move it. nDCG is trec_eval's `ndcg_cut` (linear gain, log2 discount; Järvelin, Kekäläinen 2002).
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from observability.estimates import mean_score

Relevance = Mapping[str, int]
"""Documents that answer a question, and how relevant each is, 1 and up."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over `n` questions, 0 to 1, with its 95 % interval; None where no question tells."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    n: int


def figure(name: str, scores: Iterable[float | bool]) -> Figure:
    """Average the questions' own scores."""
    estimate = mean_score([float(score) for score in scores])
    return Figure(name, estimate.value, estimate.low, estimate.high, estimate.n)


def ranking_figures(
    rankings: Mapping[str, Sequence[str]], judgements: Mapping[str, Relevance], k: int
) -> tuple[Figure, ...]:
    """nDCG, recall and MRR of rankings of documents, best first; a question without a ranking scores 0."""
    cut = {question: rankings.get(question, ())[:k] for question in judgements}
    return (
        figure(f"ndcg@{k}", [ndcg(cut[question], relevant, k) for question, relevant in judgements.items()]),
        figure(f"recall@{k}", [recall(cut[question], relevant) for question, relevant in judgements.items()]),
        figure(f"mrr@{k}", [reciprocal_rank(cut[question], relevant) for question, relevant in judgements.items()]),
    )


def ndcg(ranking: Sequence[str], relevant: Relevance, k: int) -> float:
    """How much of the best possible discounted gain a ranking has."""
    best = _discounted(sorted(relevant.values(), reverse=True)[:k])
    return _discounted([relevant.get(document, 0) for document in ranking]) / best


def recall(ranking: Sequence[str], relevant: Relevance) -> float:
    """The share of the relevant documents that were found."""
    return len(relevant.keys() & set(ranking)) / len(relevant)


def reciprocal_rank(ranking: Sequence[str], relevant: Relevance) -> float:
    """One over the rank of the first relevant document, 0 without one."""
    return next((1 / rank for rank, document in enumerate(ranking, 1) if document in relevant), 0.0)


def auc(name: str, right: Sequence[float], wrong: Sequence[float]) -> Figure:
    """The chance that a right one scores above a wrong one, ties counted half (Mann, Whitney 1947).

    It is the mean over the right ones of the share of wrong ones below, so the interval is for other right ones.
    """
    ordered = sorted(wrong)
    below = [(bisect_left(ordered, score) + bisect_right(ordered, score)) / 2 for score in right] if wrong else []
    return figure(name, [count / len(ordered) for count in below])


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))
