"""The nouns of retrieval: documents, their parsed text, the passages they are split into, and what a search returns.

The main rule: a passage is a span of its document's source text, `passage.text == source[passage.start:passage.end]`.
The source text of Markdown and plain text is the file itself; of every other format it is the text the parser
extracted, stored once beside the document, so that every quote can be checked against it for ever.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:  # The parser's child imports this module, and must start at once.
    import numpy as np
    from numpy.typing import NDArray

BlockKind = Literal["heading", "paragraph", "list", "code", "table", "quote"]
SearchMode = Literal["hybrid", "dense", "sparse"]


@dataclass(frozen=True, slots=True)
class Block:
    """A structural piece of a source text: `source[start:end]`, under the headings of `heading_path` (outermost first).

    A heading block's own text is the last item of its `heading_path`.
    """

    start: int
    end: int
    kind: BlockKind
    heading_path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a document, a slide or a sheet: `source[start:end]`; `number` counts from 1."""

    number: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """A document's source text and its structure; blocks and pages are in source order and do not overlap."""

    text: str
    title: str | None = None
    blocks: tuple[Block, ...] = ()
    pages: tuple[Page, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it stands in one tenant's collection.

    `version` is the SHA-256 of the uploaded bytes in hex: the same bytes are the same version.
    """

    id: str
    tenant: str
    name: str
    version: str
    media_type: str
    title: str
    length: int
    """Characters of the source text."""
    size_bytes: int
    passages: int
    pages: int
    index_version: str
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    source: str = ""
    """What is synchronised with a folder or manifest, by the name of that; empty for what was added by itself."""
    groups: tuple[str, ...] = ()
    """Whom of the tenant it is for; none is all of it."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrievable piece of a document: `text == source[start:end]`; `n` counts from 1 within its document version."""

    document_id: str
    document_version: str
    n: int
    text: str
    start: int
    end: int
    page: int | None = None
    heading_path: tuple[str, ...] = ()
    document_name: str = ""
    document_title: str = ""

    @property
    def id(self) -> str:
        """`<document id>/<n>`: unique within a tenant for the document's current version."""
        return f"{self.document_id}/{self.n}"

    @property
    def heading(self) -> str:
        """The heading path on one line, outermost first."""
        return " > ".join(self.heading_path)

    @property
    def embedded_text(self) -> str:
        """What both legs index: title and headings, then the text, so that a short passage keeps its subject."""
        head = " > ".join(part for part in dict.fromkeys((self.document_title, *self.heading_path)) if part)
        return f"{head}\n{self.text}" if head else self.text


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage found, with what each leg thought of it; a rank counts from 1 and is None where the leg missed it.

    `dense_score` is a cosine (-1 to 1), `sparse_score` a BM25 sum (0 and up), `score` what the fusion made of them:
    comparable within one search only.
    """

    passage: Passage
    score: float
    dense_rank: int | None = None
    dense_score: float | None = None
    sparse_rank: int | None = None
    sparse_score: float | None = None
    rerank_score: float | None = None
    """What the reranker thought, 0 to 1, where there is one: then hits are in its order, and this is the `score`."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Hits, best first, the index version that answered, where the time went, and the question as a vector."""

    hits: tuple[Hit, ...]
    index_version: str
    embed_seconds: float = 0.0
    search_seconds: float = 0.0
    embedding_model: str | None = None
    """What embedded the query; None where it was searched by its words alone."""
    query_vector: "NDArray[np.float32] | None" = field(default=None, compare=False)
    """The query as it was embedded."""
    rerank_seconds: float | None = None
    """What the second look took; None where there was none."""
    reranking_model: str | None = None
    """What ordered the hits after the fusion; None where nothing did, or failed to."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """What adding a document did; `unchanged` means no embedding was computed and no point written."""

    document: Document
    outcome: Literal["created", "unchanged", "replaced"]
    embedded_passages: int = 0
    """Those that had to be embedded; the others' vectors were taken from the version before."""


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """What a hostile file may cost before its parser's process is ended."""

    max_bytes: int = 50_000_000
    max_uncompressed_bytes: int = 200_000_000
    max_pages: int = 2_000
    max_characters: int = 10_000_000
    max_seconds: float = 8.0
    """Processor time for a small file; a large one has more, by `seconds_for`."""
    max_memory_bytes: int = 512_000_000

    def seconds_for(self, size_bytes: int) -> float:
        """Processor time for a file of this size: half of `max_seconds` more for each further megabyte."""
        return self.max_seconds * (1 + max(0, size_bytes - 500_000) / 2_000_000)


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose documents are seen; made of a verified caller, never of a request's body. `scoping` has the rule."""

    tenant: str
    filter: dict[str, Any] = field(default_factory=dict)
    """Metadata equality filter: `{"product": "x", "year": 2024}`; a list of values means any of them."""
    groups: frozenset[str] | None = frozenset()
    """Those of whom it is done for; None sees what is for any group."""

    @classmethod
    def whole(cls, tenant: str) -> Self:
        """All of a tenant: for what the service does by itself."""
        return cls(tenant, groups=None)
