"""How an index version ranks a team's own questions, beside the live one: what a switch is decided by."""

from datetime import UTC, datetime
from typing import Any

from retrieval.documents import Scope
from retrieval.evaluation.searching import Ranked, rank
from retrieval.evaluation.sets import EvaluationSet
from retrieval.retriever import Retriever


async def compare(
    retriever: Retriever, scope: Scope, judged: EvaluationSet, version_id: str, *, k: int = 10
) -> dict[str, Any]:
    """Rank the documents by both versions, fused and without a second look, and keep the figures with the version.

    Raises:
        IndexVersionNotFound, IndexVersionState: There is no such version, or it cannot be searched.
    """

    async def ranked(version: str) -> Ranked:
        return await rank(retriever, judged, "hybrid", k=k, scope=scope, index_version=version, rerank=False)

    live = retriever.index_version
    its, lives = await ranked(version_id), await ranked(live)
    comparison = {
        "live": live,
        "at": datetime.now(UTC).isoformat(),
        "questions": len(judged.judged),
        "figures": [
            {"name": new.name, "value": new.value, "low": new.low, "high": new.high, "live": old.value}
            for new, old in zip(its.figures, lives.figures, strict=True)
        ],
    }
    await retriever.indexes.compared(version_id, comparison)
    return comparison
