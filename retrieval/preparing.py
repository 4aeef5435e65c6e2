"""Documents that were read, cut and embedded somewhere else, on their way to an index.

The main rule: what was made elsewhere is what would have been made here. The functions are the same; a passage is a
span of the text that comes along, so that no quote can be made up; and a sentence that both sides embed tells whether
their models are one. Of a document that was made for another index version than the live one, only the text is used.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Final, Self

import msgspec
import numpy as np

from retrieval.documents import Block, Page, ParsedDocument, Passage
from retrieval.embedder import Embedder
from retrieval.embedding_process import LEAST_COSINE, PROBE
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.index import MOST_PASSAGES, Vector

PREPARED: Final = "application/vnd.hallmark.prepared+msgpack"
"""The media type of an upload that is a prepared document."""

_UNIT_ERROR: Final = 0.01
_BATCH_TEXTS: Final = 512
"""Texts that are handed to an embedder at once: it lets no more than some thousand wait."""
_ENCODER: Final = msgspec.msgpack.Encoder()


class Span(msgspec.Struct, frozen=True, array_like=True):
    """A passage as a part of its document's text."""

    start: int
    end: int
    page: int | None
    heading_path: tuple[str, ...]


class Prepared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document with its passages and their vectors, made for one index version."""

    version: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    """The SHA-256 of the file's bytes in hex."""
    media_type: Annotated[str, msgspec.Meta(max_length=128)]
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    index_version: Annotated[str, msgspec.Meta(max_length=200)]
    parsed: ParsedDocument
    spans: tuple[Span, ...]
    vectors: bytes = b""
    """One of each passage, float32, one row after the other; none before it is embedded."""
    probe: bytes = b""
    """The vector of `PROBE`."""

    @classmethod
    def of(
        cls, content: bytes, media_type: str, index_version: str, parsed: ParsedDocument, passages: Iterable[Passage]
    ) -> Self:
        """Put together what was made of a file, its vectors left out."""
        spans = tuple(Span(each.start, each.end, each.page, each.heading_path) for each in passages)
        version = hashlib.sha256(content).hexdigest()
        return cls(version, media_type, len(content), index_version, parsed, spans)

    @classmethod
    def from_bytes(cls, content: bytes, *, is_embedded: bool = True) -> Self:
        """Read what `to_bytes` wrote; raises UnreadableDocument for anything else."""
        try:
            prepared = msgspec.msgpack.decode(content, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _bad(str(error)) from None
        prepared.check_spans()
        if is_embedded:
            prepared.check_vectors()
        return prepared

    def to_bytes(self) -> bytes:
        """Write it down, for an upload."""
        return _ENCODER.encode(self)

    def passages(self, document_id: str, document_name: str) -> list[Passage]:
        """The passages of the document that this becomes, in order."""
        text, title = self.parsed.text, self.parsed.title or ""
        return [
            Passage(
                document_id=document_id,
                document_version=self.version,
                n=n,
                text=text[span.start : span.end],
                start=span.start,
                end=span.end,
                page=span.page,
                heading_path=span.heading_path,
                document_name=document_name,
                document_title=title,
            )
            for n, span in enumerate(self.spans, 1)
        ]

    async def embedded(self, embedder: Embedder) -> Self:
        """The same with its vectors.

        Raises:
            IndexUnavailable: The embedder does not answer.
        """
        texts = [passage.embedded_text for passage in self.passages("", "")]
        parts = [
            await embedder.embed(texts[start : start + _BATCH_TEXTS], "document", bulk=True)
            for start in range(0, len(texts), _BATCH_TEXTS)
        ]
        probe = await embedder.embed([PROBE], "document")
        return msgspec.structs.replace(self, vectors=b"".join(map(_bytes_of, parts)), probe=_bytes_of(probe))

    def vectors_of(self, passages: Sequence[Passage]) -> dict[str, Vector]:
        """The vectors by what was embedded of each passage."""
        rows = _rows(self.vectors, len(self.spans))
        return {passage.embedded_text: row for passage, row in zip(passages, rows, strict=True)}

    async def check(self, embedder: Embedder) -> None:
        """Compare what made the vectors with an embedder of this process.

        Raises:
            UnreadableDocument: They are of another model.
            IndexUnavailable: The embedder does not answer.
        """
        (ours,) = await embedder.embed([PROBE], "document")
        (theirs,) = _rows(self.probe, 1)
        is_same = len(theirs) == len(ours) and float(theirs @ ours) >= LEAST_COSINE
        if not is_same or len(self.vectors) != len(self.spans) * ours.nbytes:
            raise _bad(f"its vectors are not of {embedder.model_id!r} as this service has it")

    def check_spans(self) -> None:
        """Raise UnreadableDocument where something is outside the text, or not in order, or there are too many."""
        if len(self.spans) > MOST_PASSAGES:
            raise LimitExceeded(f"the document has more than {MOST_PASSAGES:,} passages: split it", "passages")
        length = len(self.parsed.text)
        kinds: tuple[tuple[str, Sequence[Span | Block | Page]], ...] = (
            ("spans", self.spans),
            ("parsed.blocks", self.parsed.blocks),
            ("parsed.pages", self.parsed.pages),
        )
        for name, pieces in kinds:
            if any(not 0 <= each.start <= each.end <= length for each in pieces):
                raise _bad(f"`{name}` has one that is outside the text")
            if any(before.end > after.start for before, after in pairwise(pieces)):
                raise _bad(f"`{name}` are not in order, or overlap")
        if not self.spans or any(not self.parsed.text[each.start : each.end].strip() for each in self.spans):
            raise _bad("`spans` are to be of passages that have text, at least one")

    def check_vectors(self) -> None:
        """Raise UnreadableDocument where they are no vectors of length 1, one of each passage."""
        width = len(self.probe)
        if not width or width % 4 or len(self.vectors) != width * len(self.spans):
            raise _bad("`vectors` has to have one of each of `spans`, as long as `probe`")
        lengths = np.linalg.norm(_rows(self.probe + self.vectors, len(self.spans) + 1), axis=1)
        if not bool(np.all(np.abs(lengths - 1) < _UNIT_ERROR)):  # Of what is no number too.
            raise _bad("`vectors` are not of length 1")


def _bytes_of(vectors: Vector) -> bytes:
    return np.ascontiguousarray(vectors, "<f4").tobytes()


def _rows(numbers: bytes, rows: int) -> Vector:
    return np.frombuffer(numbers, "<f4").reshape(rows, -1)


def _bad(why: str) -> UnreadableDocument:
    return UnreadableDocument(f"This is no prepared document: {why}.")
