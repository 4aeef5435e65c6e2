"""Sparse vectors for the lexical leg: BM25 term weights, computed here for every kind of index.

Document weights hold BM25's term-frequency part; the index multiplies by the inverse document frequency it keeps itself
(the IDF modifier), so weights never have to be recomputed as a collection grows. For the same reason the average
passage length is a constant of the schema and not the collection's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from retrieval.index import SparseVector


@dataclass(frozen=True, slots=True)
class Bm25Settings:
    """BM25's parameters (Robertson and Zaragoza, 2009); `average_length` counts words without stop words."""

    k1: float = 1.2
    b: float = 0.75
    average_length: float = 100.0
    language: str = "english"

    @property
    def name(self) -> str:
        """What the index schema records."""
        return f"bm25-{self.language}-k{self.k1:g}-b{self.b:g}-l{self.average_length:g}"


class SparseEncoder:
    """BM25 by qdrant's own tokenizer, stemmer and stop words: the same term ids as a Qdrant server makes."""

    def __init__(self, settings: Bm25Settings | None = None) -> None:
        """Prepare the encoder; encoding takes microseconds and is safe on any thread."""
        from qdrant_edge import Bm25, Bm25Config

        self.settings = settings or Bm25Settings()
        self._model = Bm25(
            Bm25Config(
                k=self.settings.k1,
                b=self.settings.b,
                avg_len=self.settings.average_length,
                language=self.settings.language,
            )
        )

    def documents(self, texts: Iterable[str]) -> list[SparseVector]:
        """Weigh the terms of passages."""
        return [_vector(self._model.embed_document(text)) for text in texts]

    def query(self, text: str) -> SparseVector:
        """Weigh each different term of a question as one; a question of stop words only has no terms."""
        return _vector(self._model.embed_query(text))


def _vector(native: Any) -> SparseVector:
    return SparseVector(list(native.indices), list(native.values))
