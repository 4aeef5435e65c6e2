"""Keeps the index versions in step with the document store, and knows which points count.

The main rule: points are written first, then the store's transaction makes them count, then the old ones are removed.
A generation on its way in or out is hidden, so a crash or failure at any step leaves orphans that nobody sees and that
the next start removes. A document is written to the live version, and follows into the others; it goes from all.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from retrieval.documents import Document, ParsedDocument, Passage, Scope
from retrieval.embedder import Embedder
from retrieval.errors import RetrievalError
from retrieval.index import Index, IndexPoint, IndexSchema, Vector, point_id, point_key
from retrieval.scoping import labels, may_see
from retrieval.sparse import SparseEncoder
from retrieval.store import Cuts, DocumentStore, Generation, Note, StoredDocument

_T = TypeVar("_T")
_BATCH_PASSAGES = 64
_log = logging.getLogger(__name__)


class LiveVersionChanged(Exception):
    """Another index version became the live one while a document was made ready for this one: make it ready again."""


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """An index version as this process has it open: its index, and the embedder that its vectors are of."""

    number: int
    schema: IndexSchema
    index: Index
    embedder: Embedder

    @property
    def id(self) -> str:
        """What predictions call the version."""
        return self.schema.index_version


class Library:
    """The store and the open index versions as one; `reconcile` each before its first use."""

    def __init__(self, store: DocumentStore, sparse: SparseEncoder) -> None:
        self.live: Shelf | None = None
        self.shelves: list[Shelf] = []
        """What is open, the live one among them."""
        self.commits = asyncio.Lock()
        """Held while documents change: whoever else holds it sees them stand still."""
        self.watchers: set[Callable[[], None]] = set()
        """Told when documents have changed."""
        self._store = store
        self._sparse = sparse
        self._turns = 0
        self._owners: dict[int, tuple[str, tuple[str, ...]]] = {}
        self._hidden: dict[str, set[int]] = {}
        self._revisions: defaultdict[str, int] = defaultdict(int)
        self._last_generation = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    def is_visible(self, point: int, scope: Scope) -> bool:
        """Whether a point belongs to a current document that the scope sees."""
        owner = self._owners.get(point_key(point)[0])
        return owner is not None and may_see(scope, *owner)

    def hidden(self, tenant: str) -> Collection[int]:
        """The tenant's generations that are on their way in or out."""
        return self._hidden.get(tenant, ())

    def revision(self, tenant: str) -> tuple[int, int]:
        """What changes whenever what the tenant can find does."""
        return self._turns, self._revisions.get(tenant, 0)

    def turn_to(self, shelf: Shelf) -> None:
        """Answer from this version from now on."""
        self.live = shelf
        self._turns += 1

    async def close(self) -> None:
        """Let the writes under way finish."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def reconcile(self, shelf: Shelf) -> None:
        """Remove points that no document owns, and embed passages again whose points are missing."""
        documents = await self._store.generations(shelf.number)
        ids = await shelf.index.ids()
        orphans, missing = await asyncio.to_thread(_compare, documents, ids)
        if orphans:
            _log.info("Removing %d points that no document owns.", len(orphans))
            await shelf.index.delete(orphans)
        for generation, numbers in missing.items():
            its = documents[generation]
            stored = await self._store.find(Scope.whole(its.tenant), its.id)
            if stored and stored.generation == generation:
                _log.info("Embedding %d passages again whose points are missing.", len(numbers))
                passages = await self._store.passages(generation, shelf.number)
                await self.write_points(shelf, stored, [each for each in passages if each.n in numbers], {})
        if shelf is self.live:
            self._owners = {generation: (its.tenant, its.groups) for generation, its in documents.items()}
        generations = (point_key(point)[0] for point in ids)
        self._last_generation = max([self._last_generation, *documents, *generations])

    async def put(
        self,
        shelf: Shelf,
        document: Document,
        parsed: ParsedDocument,
        passages: Sequence[Passage],
        old: StoredDocument | None,
        *,
        given: Mapping[str, Vector] | None = None,
        note: Callable[[int], Note | None] | None = None,
        tell: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Store and index a document in place of `old`; return how many passages had to be embedded.

        The passages are cut for `shelf`, which is the live one; vectors of their texts may be `given`. Cancelled while
        it embeds, it leaves everything as it was; later it finishes first. `note` is made of that number and written in
        the same transaction; `tell` hears how many passages have their points.

        Raises:
            LiveVersionChanged: Another version is live by now; nothing was changed.
        """
        self._last_generation += 1
        stored = StoredDocument(document, self._last_generation)
        self._hide(stored)
        try:
            lacking = [passage for passage in passages if passage.embedded_text not in given] if given else passages
            known = await self.known_vectors(shelf, old.generation, lacking) if old and lacking else {}
            known |= given or {}
            embedded = await self.write_points(shelf, stored, passages, known, tell)
        except BaseException:
            self._start(self._discard(stored, {shelf.number: len(passages)}))
            raise
        await self.finish(self._commit(shelf, stored, parsed, passages, old, note(embedded) if note else None))
        return embedded

    async def remove(self, scope: Scope, document_id: str, *, note: Note | None = None) -> None:
        """Delete a document, then its points.

        Raises:
            DocumentNotFound: The scope sees no such document.
        """
        await self.finish(self._remove(scope, document_id, note))

    async def _commit(
        self,
        shelf: Shelf,
        stored: StoredDocument,
        parsed: ParsedDocument,
        passages: Sequence[Passage],
        old: StoredDocument | None,
        note: Note | None,
    ) -> None:
        try:
            async with self.commits:
                self._require_live(shelf)
                cuts = await self._store.put(stored, parsed, passages, index_number=shelf.number, note=note)
                # No await between these lines: a search sees the old version or the new one.
                self._owners[stored.generation] = stored.document.tenant, stored.document.groups
                self._revisions[stored.document.tenant] += 1
                self._show(stored)
                if old:
                    del self._owners[old.generation]
                    self._hide(old)
        except BaseException:
            await self._discard(stored, {shelf.number: len(passages)})
            raise
        self._tell_watchers()
        if old:
            await self._discard(old, cuts)

    async def _remove(self, scope: Scope, document_id: str, note: Note | None) -> None:
        async with self.commits:
            removed, cuts = await self._store.remove(scope, document_id, note=note)
            del self._owners[removed.generation]
            self._revisions[scope.tenant] += 1
            self._hide(removed)
        self._tell_watchers()
        await self._discard(removed, cuts)

    async def _discard(self, stored: StoredDocument, cuts: Cuts) -> None:
        """Remove a generation's points; if that fails they stay hidden, and the next start removes them."""
        is_gone = True
        for shelf in [each for each in self.shelves if each.number in cuts]:
            try:
                await shelf.index.delete(points_of(stored.generation, cuts[shelf.number]))
            except RetrievalError as error:
                _log.warning("%d points stay hidden until the next start: %s", cuts[shelf.number], error)
                is_gone = False
        if is_gone:
            self._show(stored)

    async def write_points(
        self,
        shelf: Shelf,
        stored: StoredDocument,
        passages: Sequence[Passage],
        known: dict[str, Vector],
        tell: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Embed what is not known and write the points, batch after batch; return how many were embedded."""
        embedded = done = 0
        filterable = labels(stored.document.metadata, stored.document.groups)
        tell(done)
        async with aclosing(self._embedded(shelf.embedder, passages, known)) as batches:
            async for batch, texts, vectors in batches:
                embedded += len(vectors)
                sparse = await asyncio.to_thread(self._sparse.documents, texts)
                await shelf.index.upsert(
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
        self, embedder: Embedder, passages: Sequence[Passage], known: dict[str, Vector]
    ) -> AsyncGenerator[tuple[Sequence[Passage], list[str], dict[str, Vector]]]:
        """Each batch of passages, with its texts and the vectors of those that are not known.

        One batch ahead is embedded while the caller writes, so that the embedder does not wait for the index.
        """

        async def embed(batch: Sequence[Passage]) -> tuple[Sequence[Passage], list[str], dict[str, Vector]]:
            texts = [passage.embedded_text for passage in batch]
            new = [text for text in dict.fromkeys(texts) if text not in known]
            return batch, texts, dict(zip(new, await embedder.embed(new, "document", bulk=True), strict=True))

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

    async def known_vectors(self, shelf: Shelf, generation: int, passages: Sequence[Passage]) -> dict[str, Vector]:
        """The vectors that a version has of a generation, for those of its texts that these passages have too."""
        wanted = {passage.embedded_text for passage in passages}
        texts = {
            point_id(generation, passage.n): text
            for passage in await self._store.passages(generation, shelf.number)
            if (text := passage.embedded_text) in wanted
        }
        vectors = await shelf.index.vectors(list(texts))
        return {texts[point]: vector for point, vector in vectors.items()}

    def _require_live(self, shelf: Shelf) -> None:
        if shelf is not self.live:
            raise LiveVersionChanged

    def _tell_watchers(self) -> None:
        for wake in self.watchers:
            wake()

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

    async def finish(self, work: Coroutine[Any, Any, None]) -> None:
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


def points_of(generation: int, passages: int) -> list[int]:
    """The points of a generation with so many passages."""
    return [point_id(generation, n) for n in range(1, passages + 1)]


def _compare(documents: dict[int, Generation], ids: Sequence[int]) -> tuple[list[int], dict[int, set[int]]]:
    """The points that no document owns, and per generation the passages without a point."""
    present: defaultdict[int, set[int]] = defaultdict(set)
    for point in ids:
        generation, n = point_key(point)
        present[generation].add(n)
    orphans = [
        point_id(generation, n)
        for generation, numbers in present.items()
        for n in numbers
        if generation not in documents or not 1 <= n <= documents[generation].passages
    ]
    wanted = {generation: set(range(1, its.passages + 1)) for generation, its in documents.items()}
    missing = {generation: lacking for generation, all_ in wanted.items() if (lacking := all_ - present[generation])}
    return orphans, missing
