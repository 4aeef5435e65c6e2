"""One look for passages, into one index version, by that version's own embedder.

The main rule: what a look gives is what the document store holds for the scope at that moment; where documents changed
while it looked it says so, and the retriever looks again.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from retrieval.documents import Hit, Passage, Scope, SearchMode, SearchResult
from retrieval.embedder import Embedder
from retrieval.errors import IndexUnavailable
from retrieval.fusion import Fused, Fusion, fuse
from retrieval.index import SparseVector, Vector, point_key
from retrieval.library import Library, Shelf
from retrieval.scoping import tenant_filter
from retrieval.store import DocumentStore
from retrieval.variety import few_of_each, marginal

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a search is for, whichever index version answers."""

    scope: Scope
    text: str
    mode: SearchMode
    sparse: SparseVector | None
    wanted: int
    fusion: Fusion
    per_document: int | None


@dataclass(frozen=True, slots=True)
class Found:
    """What a look found, with the points of the hits; it is not steady where documents changed meanwhile."""

    shelf: Shelf
    result: SearchResult
    points: Mapping[str, int]
    is_steady: bool


class Looking:
    """Looks into index versions; each leg gives at least `depth` candidates.

    `words_alone` has hybrid searches go on by BM25 while the embedder does not answer.
    """

    def __init__(self, store: DocumentStore, library: Library, *, depth: int, words_alone: bool) -> None:
        self._store = store
        self._library = library
        self._depth = depth
        self._words_alone = words_alone
        self.by_words_alone = 0
        """How many searches went on so."""

    async def look(self, shelf: Shelf, asked: Asked) -> Found:
        """Search once; also say whether the tenant's documents were the same from beginning to end.

        The query is embedded by the embedder of the version that is searched: a vector never meets another's.
        """
        started = time.perf_counter()
        tenant, depth = asked.scope.tenant, max(self._depth, asked.wanted)
        dense = await self._query_vector(shelf.embedder, asked.text, asked.mode) if asked.mode != "sparse" else None
        embedded = time.perf_counter()
        revision = self._library.revision(tenant)
        where = tenant_filter(asked.scope, self._library.hidden(tenant))
        legs = await shelf.index.search(where, dense=dense, sparse=asked.sparse, depth=depth)
        steady = revision == self._library.revision(tenant)
        visible = (one for one in fuse(legs, asked.fusion) if self._library.is_visible(one.point, asked.scope))
        found = list(islice(few_of_each(visible, _generation, asked.per_document), asked.wanted))
        passages = await self._store.passages_of([point_key(one.point) for one in found], shelf.number)
        hits = {one.point: _hit(one, passages[key]) for one in found if (key := point_key(one.point)) in passages}
        model = None if dense is None else shelf.embedder.model_id
        took = embedded - started, time.perf_counter() - embedded
        result = SearchResult(tuple(hits.values()), shelf.id, *took, model, dense)
        points = {hit.passage.id: point for point, hit in hits.items()}
        return Found(shelf, result, points, steady and len(hits) == len(found))

    async def spread(self, result: SearchResult, found: Found, top_k: int, balance: float) -> SearchResult:
        """Choose hits that are unlike each other, by the vectors that the index has of them."""
        own = [found.points[hit.passage.id] for hit in result.hits]
        known = await found.shelf.index.vectors(own)
        none = np.zeros(found.shelf.schema.dimension, dtype=np.float32)
        vectors = np.array([known.get(point, none) for point in own])
        chosen = marginal([hit.score for hit in result.hits], vectors, top_k, balance)
        return replace(result, hits=tuple(result.hits[at] for at in chosen))

    async def _query_vector(self, embedder: Embedder, text: str, mode: SearchMode) -> Vector | None:
        """Embed a query; None where the embedder does not answer and the words may do."""
        try:
            vectors = await embedder.embed([text], "query")
        except IndexUnavailable as error:
            if not self._words_alone or mode != "hybrid":
                raise
            if not self.by_words_alone:
                _log.warning("Searches go on by their words alone: %s", error)
            self.by_words_alone += 1
            return None
        vector: Vector = vectors[0]
        return vector


def _generation(fused: Fused) -> int:
    """The document, in its version, that a point is of."""
    return point_key(fused.point)[0]


def _hit(fused: Fused, passage: Passage) -> Hit:
    return Hit(passage, fused.score, fused.dense_rank, fused.dense_score, fused.sparse_rank, fused.sparse_score)
