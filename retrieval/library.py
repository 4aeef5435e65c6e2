"""Keeps the index in step with the document store, and knows which points count.

The main rule: points are written first, then the store's transaction makes them count, then the old ones are removed.
A generation on its way in or out is hidden, so a crash or failure at any step leaves orphans that nobody sees and that
the next start removes.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from retrieval.documents import Document, Passage
from retrieval.embedder import Embedder
from retrieval.errors import RetrievalError
from retrieval.index import Index, IndexPoint, Vector, labels, point_id, point_key
from retrieval.sparse import SparseEncoder
from retrieval.store import DocumentStore, Note, StoredDocument

_T = TypeVar("_T")
_BATCH_PASSAGES = 64
_log = logging.getLogger(__name__)


class Library:
    """The store and the index as one; `reconcile` before the first use."""

    def __init__(self, store: DocumentStore, index: Index, embedder: Embedder, sparse: SparseEncoder) -> None:
        self._store = store
        self._index = index
        self._embedder = embedder
        self._sparse = sparse
        self._tenants: dict[int, str] = {}
        self._hidden: dict[str, set[int]] = {}
        self._revisions: defaultdict[str, int] = defaultdict(int)
        self._last_generation = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    def is_visible(self, point: int, tenant: str) -> bool:
        """Whether a point belongs to a current document of the tenant."""
        return self._tenants.get(point_key(point)[0]) == tenant

    def hidden(self, tenant: str) -> Collection[int]:
        """The tenant's generations that are on their way in or out."""
        return self._hidden.get(tenant, ())

    def revision(self, tenant: str) -> int:
        """A number that changes whenever what the tenant can find does."""
        return self._revisions.get(tenant, 0)

    async def close(self) -> None:
        """Let the writes under way finish."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def reconcile(self) -> None:
        """Remove points that no document owns, and embed passages again whose points are missing."""
        documents = await self._store.generations()
        ids = await self._index.ids()
        orphans, missing = await asyncio.to_thread(_compare, documents, ids)
        if orphans:
            _log.info("Removing %d points that no document owns.", len(orphans))
            await self._index.delete(orphans)
        for generation, numbers in missing.items():
            tenant, document_id, _ = documents[generation]
            stored = await self._store.find(tenant, document_id)
            if stored and stored.generation == generation:
                _log.info("Embedding %d passages again whose points are missing.", len(numbers))
                passages = [passage for passage in await self._store.passages(generation) if passage.n in numbers]
                await self._write_points(stored, passages, {})
        self._tenants = {generation: tenant for generation, (tenant, _, _) in documents.items()}
        self._last_generation = max([0, *documents, *(point_key(point)[0] for point in ids)])

    async def put(
        self,
        document: Document,
        source: str,
        passages: Sequence[Passage],
        old: StoredDocument | None,
        *,
        note: Callable[[int], Note | None] | None = None,
        tell: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Store and index a document in place of `old`; return how many passages had to be embedded.

        Cancelled while it embeds, it leaves everything as it was; later it finishes first. `note` is made of that
        number and written in the same transaction; `tell` hears how many passages have their points.
        """
        self._last_generation += 1
        stored = StoredDocument(document, self._last_generation)
        self._hide(stored)
        try:
            known = await self._known_vectors(old, passages)
            embedded = await self._write_points(stored, passages, known, tell)
        except BaseException:
            self._start(self._discard(stored))
            raise
        await self._finish(self._commit(stored, source, passages, old, note(embedded) if note else None))
        return embedded

    async def remove(self, tenant: str, document_id: str, *, note: Note | None = None) -> None:
        """Delete a document, then its points.

        Raises:
            DocumentNotFound: The tenant has no such document.
        """
        await self._finish(self._remove(tenant, document_id, note))

    async def _commit(
        self,
        stored: StoredDocument,
        source: str,
        passages: Sequence[Passage],
        old: StoredDocument | None,
        note: Note | None,
    ) -> None:
        try:
            await self._store.put(stored, source, passages, note=note)
        except BaseException:
            await self._discard(stored)
            raise
        # No await between these lines: a search sees the old version or the new one.
        self._tenants[stored.generation] = stored.document.tenant
        self._revisions[stored.document.tenant] += 1
        self._show(stored)
        if old:
            del self._tenants[old.generation]
            self._hide(old)
            await self._discard(old)

    async def _remove(self, tenant: str, document_id: str, note: Note | None) -> None:
        removed = await self._store.remove(tenant, document_id, note=note)
        del self._tenants[removed.generation]
        self._revisions[tenant] += 1
        self._hide(removed)
        await self._discard(removed)

    async def _discard(self, stored: StoredDocument) -> None:
        """Remove a generation's points; if that fails they stay hidden, and the next start removes them."""
        numbers = range(1, stored.document.passages + 1)
        try:
            await self._index.delete([point_id(stored.generation, n) for n in numbers])
        except RetrievalError as error:
            _log.warning("%d points stay hidden until the next start: %s", len(numbers), error)
        else:
            self._show(stored)

    async def _write_points(
        self,
        stored: StoredDocument,
        passages: Sequence[Passage],
        known: dict[str, Vector],
        tell: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Embed what is not known and write the points, batch after batch; return how many were embedded."""
        embedded = done = 0
        filterable = labels(stored.document.metadata)
        tell(done)
        async with aclosing(self._embedded(passages, known)) as batches:
            async for batch, texts, vectors in batches:
                embedded += len(vectors)
                sparse = await asyncio.to_thread(self._sparse.documents, texts)
                await self._index.upsert(
                    [
                        IndexPoint(
                            id=point_id(stored.generation, passage.n),
                            dense=vectors[text] if text in vectors else known[text],
                            sparse=terms,
                            tenant=stored.document.tenant,
                            labels=filterable,
                        )
                        for passage, text, terms in zip(batch, texts, sparse, strict=True)
                    ]
                )
                done += len(batch)
                tell(done)
        return embedded

    async def _embedded(
        self, passages: Sequence[Passage], known: dict[str, Vector]
    ) -> AsyncGenerator[tuple[Sequence[Passage], list[str], dict[str, Vector]]]:
        """Each batch of passages, with its texts and the vectors of those that are not known.

        One batch ahead is embedded while the caller writes, so that the embedder does not wait for the index.
        """

        async def embed(batch: Sequence[Passage]) -> tuple[Sequence[Passage], list[str], dict[str, Vector]]:
            texts = [passage.embedded_text for passage in batch]
            new = [text for text in dict.fromkeys(texts) if text not in known]
            return batch, texts, dict(zip(new, await self._embedder.embed(new, "document", bulk=True), strict=True))

        ahead: list[asyncio.Task[Any]] = []
        try:
            for start in range(0, len(passages), _BATCH_PASSAGES):
                ahead.append(asyncio.create_task(embed(passages[start : start + _BATCH_PASSAGES])))
                if len(ahead) > 1:
                    yield await ahead.pop(0)
            for task in ahead:
                yield await task
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _known_vectors(self, old: StoredDocument | None, passages: Sequence[Passage]) -> dict[str, Vector]:
        """The vectors that the old version has for texts of the new one."""
        if old is None:
            return {}
        wanted = {passage.embedded_text for passage in passages}
        texts = {
            point_id(old.generation, passage.n): text
            for passage in await self._store.passages(old.generation)
            if (text := passage.embedded_text) in wanted
        }
        vectors = await self._index.vectors(list(texts))
        return {texts[point]: vector for point, vector in vectors.items()}

    def _hide(self, stored: StoredDocument) -> None:
        self._hidden.setdefault(stored.document.tenant, set()).add(stored.generation)

    def _show(self, stored: StoredDocument) -> None:
        hidden = self._hidden.get(stored.document.tenant, set())
        hidden.discard(stored.generation)
        if not hidden:
            self._hidden.pop(stored.document.tenant, None)

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Do work that a cancelled caller must not cut in two: the cancellation takes effect after it."""
        task = self._start(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            while not task.done():
                try:
                    await asyncio.wait({task})
                except asyncio.CancelledError:
                    continue
            raise


def _compare(documents: dict[int, tuple[str, str, int]], ids: Sequence[int]) -> tuple[list[int], dict[int, set[int]]]:
    """The points that no document owns, and per generation the passages without a point."""
    present: defaultdict[int, set[int]] = defaultdict(set)
    for point in ids:
        generation, n = point_key(point)
        present[generation].add(n)
    orphans = [
        point_id(generation, n)
        for generation, numbers in present.items()
        for n in numbers
        if generation not in documents or not 1 <= n <= documents[generation][2]
    ]
    wanted = {generation: set(range(1, passages + 1)) for generation, (_, _, passages) in documents.items()}
    missing = {generation: lacking for generation, all_ in wanted.items() if (lacking := all_ - present[generation])}
    return orphans, missing
