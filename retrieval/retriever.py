"""The front door of retrieval: documents in, passages out.

The main rule: what a search returns is what the document store holds at that moment, never both versions of a document
and never a deleted one. Points are written before the store's transaction and removed after it, and hidden meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retrieval.caching import VectorCache
from retrieval.documents import Document, Hit, Ingested, Passage, Scope, SearchMode, SearchResult
from retrieval.embedder import Embedder
from retrieval.errors import DocumentChanged, DocumentNotFound, IndexOutOfRoom, IndexUnavailable, RetrievalError
from retrieval.fusion import Fused, Fusion, fuse
from retrieval.index import Index, IndexSchema, SparseVector, Vector, point_key, tenant_filter
from retrieval.ingesting import Ingester, Parser, Split
from retrieval.library import Library
from retrieval.reranking import SecondLook
from retrieval.sparse import Bm25Settings, SparseEncoder
from retrieval.splitting import split as split_by_structure
from retrieval.store import DocumentStore, StoredDocument

SPLITTING_VERSION = 1
"""Raised when `retrieval.splitting` cuts differently: documents ingested again are then split and embedded anew."""

MAX_QUERY_CHARACTERS = 2_000
_log = logging.getLogger(__name__)
_SEARCH_ATTEMPTS = 5
_FULL_DISK_SECONDS = 5.0


class Retriever:
    """Ingests documents and finds their passages; open it with `async with`.

    It opens the embedder and the index it is given, and owns `directory` alone: a second process is refused. `rebuild`
    re-embeds every stored passage where the index was built with another embedder or schema, which otherwise raises
    IndexMismatch. `retry_seconds` is for an index on a server: when that is down at the start, retrieval opens without
    it, says so to whoever asks, and tries again at that interval; None has the start fail, but on a disk that is full.
    A `second_look` orders anew what was found. `words_alone` has hybrid searches go on by BM25 while the embedder does
    not answer.
    """

    def __init__(
        self,
        directory: Path,
        *,
        embedder: Embedder,
        index: Index,
        parser: Parser,
        split: Split = split_by_structure,
        passage_tokens: int = 200,
        fusion: Fusion = "dbsf",
        depth: int = 50,
        bm25: Bm25Settings | None = None,
        rebuild: bool = False,
        retry_seconds: float | None = None,
        second_look: SecondLook | None = None,
        words_alone: bool = False,
    ) -> None:
        self._store = DocumentStore(directory / "documents.db")
        self._embedder = embedder
        self._index = index
        self._passage_tokens = passage_tokens
        self._fusion = fusion
        self._depth = depth
        self._sparse = SparseEncoder(bm25)
        self._rebuild = rebuild
        self._retry_seconds = retry_seconds
        self._second_look = second_look
        self._words_alone = words_alone
        self.searches_by_words_alone = 0
        self._absence = IndexUnavailable("Retrieval is not open.")
        self._library = Library(self._store, index, embedder, self._sparse)
        self.ingester = Ingester(
            self._store,
            self._library,
            embedder=embedder,
            parser=parser,
            split=split,
            passage_tokens=passage_tokens,
            version=self._answering_version,
        )
        self._stack = AsyncExitStack()
        self._schema: IndexSchema | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._store.open()
            stack.push_async_callback(self._store.close)
            await stack.enter_async_context(self._embedder)
            if self._second_look is not None:
                await stack.enter_async_context(self._second_look)
            schema = IndexSchema(
                embedding_model=self._embedder.model_id,
                dimension=self._embedder.dimension,
                splitting_version=SPLITTING_VERSION,
                passage_tokens=self._passage_tokens,
                sparse_model=self._sparse.settings.name,
                owner=self._store.store_id,
            )
            stack.push_async_callback(self._index.close)
            stack.push_async_callback(self._library.close)
            try:
                await self._attach(schema)
            except IndexUnavailable as error:
                if self._retry_seconds is None and not isinstance(error, IndexOutOfRoom):
                    raise
                self._absence = error
                _log.warning("Retrieval starts without its index and tries again: %s", error)
                stack.push_async_callback(_cancel, asyncio.create_task(self._keep_attaching(schema)))
            self._stack = stack.pop_all()
        return self

    async def _attach(self, schema: IndexSchema) -> None:
        """Open the index and bring it in step with the store: from then on retrieval answers."""
        await self._index.open(schema, rebuild=self._rebuild)
        await self._library.reconcile()
        self._schema = schema

    async def _keep_attaching(self, schema: IndexSchema) -> None:
        while self._schema is None:
            await asyncio.sleep(self._retry_seconds or _FULL_DISK_SECONDS)
            await self._index.close()
            try:
                await self._attach(schema)
            except IndexUnavailable as error:
                self._absence = error
            except RetrievalError as error:
                self._absence = IndexUnavailable(str(error))
                _log.error("Retrieval stays without its index: %s", error)
                return
        _log.info("Retrieval has its index now.")

    def _require_index(self) -> None:
        if self._schema is None:
            raise IndexUnavailable(str(self._absence)) from self._absence

    def _answering_version(self) -> str:
        self._require_index()
        return self.index_version

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._schema = None
        await self._stack.aclose()

    @property
    def store(self) -> DocumentStore:
        """Where the documents are."""
        return self._store

    @property
    def embedding_model(self) -> str:
        """The embedder's model id."""
        return self._embedder.model_id

    @property
    def cache(self) -> VectorCache:
        """The vectors that need not be computed again."""
        return self._embedder.cache

    @property
    def rerankings_failed(self) -> int:
        """How often hits stayed in the order of the fusion because the reranker did not answer."""
        return self._second_look.failures if self._second_look else 0

    @property
    def index_version(self) -> str:
        """Which embedding model, splitting and schema answer; empty until open."""
        return self._schema.index_version if self._schema else ""

    async def ready(self) -> None:
        """Return if searches can be answered.

        Raises:
            IndexUnavailable: They cannot.
        """
        self._require_index()
        await self._index.check()

    async def add(
        self,
        scope: Scope,
        *,
        name: str,
        content: bytes,
        media_type: str | None = None,
        document_id: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Ingested:
        """Ingest a file now, as `Ingester.add` says; the service does so by `retrieval.jobs`."""
        return await self.ingester.add(
            scope, name=name, content=content, media_type=media_type, document_id=document_id, metadata=metadata
        )

    async def delete(self, scope: Scope, document_id: str) -> None:
        """Delete a document now, as `Ingester.delete` says."""
        await self.ingester.delete(scope, document_id)

    async def documents(self, scope: Scope, *, limit: int = 50, after: str | None = None) -> list[Document]:
        """List the tenant's documents by id, from the one after the id `after`."""
        return await self._store.documents(scope.tenant, limit=limit, after=after)

    async def document(self, scope: Scope, document_id: str) -> Document:
        """Get one document.

        Raises:
            DocumentNotFound: The tenant has no such document.
        """
        return (await self._find(scope, document_id)).document

    async def passage(self, scope: Scope, document_id: str, n: int, *, version: str | None = None) -> Passage:
        """Get passage `n` of a document, in the version asked for by its first digits or all of them.

        Raises:
            DocumentNotFound: The tenant has no such document or passage.
            DocumentChanged: The document has another version by now.
        """
        stored = await self._find(scope, document_id)
        if version is not None and not stored.document.version.startswith(version):
            raise DocumentChanged(
                f"Document {document_id!r} was replaced: it now is version {stored.document.version!r}."
            )
        key = (stored.generation, n)
        found = await self._store.passages_of([key])
        if key not in found:
            raise DocumentNotFound(f"Document {document_id!r} has no passage {n}.")
        return found[key]

    async def passages(self, scope: Scope, document_id: str) -> list[Passage]:
        """Get all passages of a document, in order.

        Raises:
            DocumentNotFound: The tenant has no such document.
        """
        return await self._store.passages((await self._find(scope, document_id)).generation)

    async def source(self, scope: Scope, document_id: str) -> str:
        """Get the text that passages and citations are spans of.

        Raises:
            DocumentNotFound: The tenant has no such document.
        """
        text = await self._store.source((await self._find(scope, document_id)).generation)
        if text is None:
            raise DocumentNotFound(f"Document {document_id!r} was just replaced or deleted.")
        return text

    async def search(
        self,
        scope: Scope,
        query: str,
        *,
        top_k: int = 5,
        mode: SearchMode = "hybrid",
        fusion: Fusion | None = None,
        rerank: bool = True,
    ) -> SearchResult:
        """Find the passages nearest to a question, best first; `fusion` and `rerank` can differ from the settings.

        A question over 2,000 characters is searched by its first and last 1,000: what is asked stands at an end.

        Raises:
            InvalidFilter: The scope's filter is not of the supported form.
            IndexUnavailable: The index or the embedder does not answer.
        """
        self._require_index()
        started = time.perf_counter()
        tenant_filter(scope)  # A bad filter is refused before anything is computed.
        text = _shorten(query)
        if not text:
            return SearchResult((), self.index_version)
        dense = await self._query_vector(text, mode) if mode != "sparse" else None
        sparse = self._sparse.query(text) if mode != "dense" else None
        embedded = time.perf_counter()
        # What a second look may bring to the front must be found.
        second_look = self._second_look if rerank else None
        wanted = max(top_k, second_look.depth) if second_look else top_k
        # A document replaced meanwhile would be missed in both versions: then look again.
        for _ in range(_SEARCH_ATTEMPTS):
            hits, steady = await self._look(scope, dense, sparse, wanted, fusion or self._fusion)
            if steady:
                break
        model = None if dense is None else self.embedding_model
        took = embedded - started, time.perf_counter() - embedded
        result = SearchResult(hits, self.index_version, *took, model, dense)
        return await second_look.order(text, result, top_k) if second_look else result

    async def _query_vector(self, text: str, mode: SearchMode) -> Vector | None:
        """Embed a query; None where the embedder does not answer and the words may do."""
        try:
            vectors = await self._embedder.embed([text], "query")
        except IndexUnavailable as error:
            if not self._words_alone or mode != "hybrid":
                raise
            if not self.searches_by_words_alone:
                _log.warning("Searches go on by their words alone: %s", error)
            self.searches_by_words_alone += 1
            return None
        vector: Vector = vectors[0]
        return vector

    async def _look(
        self, scope: Scope, dense: Vector | None, sparse: SparseVector | None, top_k: int, fusion: Fusion
    ) -> tuple[tuple[Hit, ...], bool]:
        """Search once; also say whether the tenant's documents were the same from beginning to end."""
        revision = self._library.revision(scope.tenant)
        where = tenant_filter(scope, self._library.hidden(scope.tenant))
        legs = await self._index.search(where, dense=dense, sparse=sparse, depth=max(self._depth, top_k))
        steady = revision == self._library.revision(scope.tenant)
        fused = fuse(legs, fusion)
        visible = (one for one in fused if self._library.is_visible(one.point, scope.tenant))
        found = list(islice(visible, top_k))
        passages = await self._store.passages_of([point_key(one.point) for one in found])
        hits = tuple(_hit(one, passages[key]) for one in found if (key := point_key(one.point)) in passages)
        return hits, steady and len(hits) == len(found)

    async def embed(self, texts: list[str]) -> Vector:
        """Embed texts as documents; (n, dimension) float32, L2-normalised. Questions being searched go first."""
        return await self._embedder.embed(texts, "document", bulk=True)

    async def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the embedder's tokens per text, special tokens left out."""
        return await asyncio.to_thread(self._embedder.count_tokens, texts)

    async def similarity(self, text: str, texts: Sequence[str]) -> list[float]:
        """Compare one text with others: a cosine each, -1 to 1."""
        if not texts:
            return []
        vectors = await self._embedder.embed([text, *texts], "document")
        return [float(cosine) for cosine in vectors[1:] @ vectors[0]]

    async def _find(self, scope: Scope, document_id: str) -> StoredDocument:
        stored = await self._store.find(scope.tenant, document_id)
        if stored is None:
            raise DocumentNotFound(f"There is no document {document_id!r}.")
        return stored


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _shorten(query: str) -> str:
    text = query.strip()
    if len(text) <= MAX_QUERY_CHARACTERS:
        return text
    half = MAX_QUERY_CHARACTERS // 2
    return f"{text[:half]} {text[-half:]}"


def _hit(fused: Fused, passage: Passage) -> Hit:
    return Hit(passage, fused.score, fused.dense_rank, fused.dense_score, fused.sparse_rank, fused.sparse_score)
