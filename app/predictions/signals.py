"""What a record says of how far its answer can be trusted: numbers out of the JSON of citations and passages."""

from collections.abc import Sequence

import msgspec


class CitedSpan(msgspec.Struct):
    """A citation as far as its numbers go."""

    status: str = ""
    support: float | None = None
    answer_start: int = 0
    answer_end: int = 0


class _Passage(msgspec.Struct):
    dense_score: float | None = None


read_citations = msgspec.json.Decoder(list[CitedSpan]).decode
_read_passages = msgspec.json.Decoder(list[_Passage]).decode


def support(verdict: str | None, citations: str | None) -> float | None:
    """How far the passages bear out an answer, 0 to 1: the mean over its sentences; None where nothing was checked."""
    verdict = verdict or ""
    if verdict.endswith(":unsupported_answer"):
        return 0.0
    if verdict != "answered":
        return None
    best: dict[int, float] = {}
    for citation in read_citations(citations) if citations else ():
        best[citation.answer_start] = max(best.get(citation.answer_start, 0.0), citation.support or 0.0)
    return sum(best.values()) / len(best) if best else 0.0


def dense_scores(passages: str | None) -> list[float]:
    """How near the passages that were found are to the question, in cosine, the nearest first."""
    found = _read_passages(passages) if passages else ()
    return sorted((each.dense_score for each in found if each.dense_score is not None), reverse=True)


def covered(citations: Sequence[CitedSpan]) -> int:
    """How many characters of the answer lie in the span of at least one citation."""
    total = end = 0
    for start, stop in sorted([(each.answer_start, each.answer_end) for each in citations]):
        if stop > end:
            total += stop - max(start, end)
            end = stop
    return total
