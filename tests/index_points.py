"""Points for an index, and what it has to fit; imported alone by processes that tests start."""

import numpy as np

from retrieval.index import IndexPoint, IndexSchema, SparseVector, point_id
from retrieval.scoping import labels

SCHEMA = IndexSchema(
    embedding_model="acme/Tiny Model",
    dimension=4,
    splitting_version=1,
    passage_tokens=200,
    sparse_model="bm25",
    owner="store-1",
)
AXES = np.eye(4, dtype=np.float32)


def point(
    generation: int, n: int, dense: int = 0, words: tuple[int, ...] = (7,), tenant: str = "acme", **metadata: object
) -> IndexPoint:
    return IndexPoint(
        point_id(generation, n),
        AXES[dense],
        SparseVector(list(words), [1.0] * len(words)),
        tenant,
        labels(metadata),
    )
