"""What the settings say index versions are made with: now, and next.

The main rule: a version is made of names and numbers, and an embedder makes it if it has its model and dimension. Which
of both that is does not matter, so that a start between a switch and the change of the settings is none that fails.
"""

from dataclasses import dataclass

from retrieval.embedder import Embedder
from retrieval.errors import IndexVersionState
from retrieval.index import IndexSchema

SPLITTING_VERSION = 1
"""Raised when `retrieval.splitting` cuts differently: what is built from then on is another index version."""


@dataclass(frozen=True, slots=True)
class Making:
    """What an index version is made with: an embedder that is open, and the length of passages in its tokens."""

    embedder: Embedder
    passage_tokens: int

    def makes(self, schema: IndexSchema) -> bool:
        """Whether its vectors are of a version's space."""
        return schema.is_embedded_by(self.embedder.model_id, self.embedder.dimension)


@dataclass(frozen=True, slots=True)
class Makings:
    """What the settings name for the live version, and for the next where that is another."""

    now: Making
    coming: Making | None
    sparse_model: str

    def schema(self, making: Making, owner: str) -> IndexSchema:
        """What a version is that is made with it."""
        return IndexSchema(
            embedding_model=making.embedder.model_id,
            dimension=making.embedder.dimension,
            splitting_version=SPLITTING_VERSION,
            passage_tokens=making.passage_tokens,
            sparse_model=self.sparse_model,
            owner=owner,
        )

    def embedder_of(self, schema: IndexSchema) -> Embedder | None:
        """The embedder that a version was made with, if the settings name it."""
        makings = (making for making in (self.now, self.coming) if making and making.makes(schema))
        return next((making.embedder for making in makings), None)

    def refusal(self, live: IndexSchema) -> str:
        """Why there is no start with this live version, and what helps."""
        own = self.now.embedder
        return (
            f"The live index version {live.index_version!r} was made with the embedding model {live.embedding_model!r} "
            f"({live.dimension} numbers a vector), and retrieval.embedding_model names {own.model_id!r} "
            f"({own.dimension}). Set retrieval.embedding_model to {live.embedding_model!r} again; to go over to "
            f"{own.model_id!r}, name it by retrieval.next_embedding_model, start, and run `hallmark index build`."
        )

    def require_fit_without(self, dropped: IndexSchema, live: IndexSchema) -> None:
        """Refuse to drop what the next start would be refused without.

        Raises:
            IndexVersionState: The settings name the dropped version's embedder for the live one.
        """
        if self.now.makes(dropped) and not self.now.makes(live):
            raise IndexVersionState(
                f"{dropped.index_version!r} is what retrieval.embedding_model names: set it to "
                f"{live.embedding_model!r}, the live version's, unset retrieval.next_embedding_model, and start again "
                "before you drop the old one."
            )
