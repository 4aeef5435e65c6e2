"""The tasks that work on jobs: they begin what waits, item by item, and end each.

The main rule: what an item is at is in memory, what it has done is on the disk. An index or embedder that is away stops
the work for all until it is back; a file that cannot be read ends its own item and nothing else.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic, perf_counter
from typing import Any

from retrieval.documents import Ingested
from retrieval.errors import (
    DocumentNotFound,
    DocumentOwned,
    IndexUnavailable,
    JobEnded,
    LimitExceeded,
    RetrievalError,
    UnreadableDocument,
)
from retrieval.jobs import ledger
from retrieval.jobs.links import LINK, Links
from retrieval.jobs.nouns import Item, Limits, Tally
from retrieval.jobs.spool import Spool
from retrieval.preparing import PREPARED, Prepared
from retrieval.retriever import Retriever

_log = logging.getLogger(__name__)
_REMEMBERED_ENDS = 50
_LONGEST_PAUSE_SECONDS = 2.0
Key = tuple[int, int]


class Workers:
    """Works on items, so many at a time, between `start` and `stop`."""

    def __init__(
        self,
        retriever: Retriever,
        spool: Spool,
        links: Links,
        *,
        limits: Limits,
        count: int,
        tally: Tally | None,
        retry_seconds: float,
    ) -> None:
        self.waiting: dict[str, int] = {}
        """Uploads that are not ingested yet, by their name in the spool: bytes."""
        self.ended: dict[str, asyncio.Future[Ingested]] = {}
        """What becomes of them, for those who wait for it."""
        self.live: dict[Key, Item] = {}
        """What is being worked on, with its stage."""
        self._retriever = retriever
        self._file = retriever.store.file
        self._spool = spool
        self._links = links
        self._limits = limits
        self._count = count
        self._tally = tally
        self._retry_seconds = retry_seconds
        self._claiming = asyncio.Lock()
        self._wake = asyncio.Event()
        self._is_away = False
        self._doing: dict[Key, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ends: deque[float] = deque(maxlen=_REMEMBERED_ENDS)

    def start(self) -> None:
        """Begin to work."""
        self._tasks = [asyncio.create_task(self._work(), name=f"ingestion {n}") for n in range(self._count)]

    async def stop(self) -> None:
        """Leave everything as it is: it goes on at the next start, and this does not count as a try."""
        tasks = [*self._tasks, *self._doing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._file.write(ledger.resume, -1)
        for future in self.ended.values():
            future.cancel()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def seconds_per_document(self) -> float:
        """How long a document took lately, several being worked on at once."""
        return (monotonic() - self._ends[0]) / len(self._ends) if len(self._ends) > 1 else 5.0

    @asynccontextmanager
    async def without(self, which: Callable[[Item], bool]) -> AsyncIterator[list[Item]]:
        """Stop work on these items, and begin no other before the block ends; gives them as they were."""
        async with self._claiming:
            items = [item for item in self.live.values() if which(item)]
            tasks = [task for item in items if (task := self._doing.get(item.key))]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            yield items

    async def let_go(self, item: Item, ending: Ingested | RetrievalError) -> None:
        """Forget an item's upload, and tell who waits for it what became of it; a second time does nothing."""
        if item.spool is None:
            return
        self.waiting.pop(item.spool, None)
        ended = self.ended.pop(item.spool, None)
        if ended and not ended.done():
            if isinstance(ending, RetrievalError):
                ended.set_exception(ending)
            else:
                ended.set_result(ending)
        await self._spool.remove([item.spool])

    async def _work(self) -> None:
        """Do item after item for as long as the service is open; an index that is away is waited for."""
        pause = self._retry_seconds
        while True:
            try:
                item = await self._next()
                if self._is_away:
                    self._is_away = False
                    _log.warning("Ingestion goes on.")
                await self._do(item)
                pause = self._retry_seconds
            except IndexUnavailable as error:
                if not self._is_away:
                    self._is_away = True
                    _log.warning("Ingestion waits for what it needs: %s", error)
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE_SECONDS, pause * 2)

    async def _next(self) -> Item:
        """Begin the next item, once there is one and the index answers."""
        while True:
            async with self._claiming:
                self._wake.clear()
                await self._retriever.ready()
                item = await self._file.write(ledger.claim, set(self.live))
                if item is not None:
                    self.live[item.key] = item
                    self._doing[item.key] = asyncio.create_task(self._try(item), name=f"ingesting {item.key}")
                    return item
            await self._wake.wait()

    async def _do(self, item: Item) -> None:
        """Follow an item's task, which may be stopped from outside; raises IndexUnavailable where it is put back."""
        task = self._doing[item.key]
        try:
            await asyncio.wait({task})
        finally:
            if self._doing.get(item.key) is task:  # Another worker may have begun it again, once it was put back.
                del self._doing[item.key], self.live[item.key]
        self._wake.set()  # What waits for this item's document can begin.
        if not task.cancelled():
            task.result()

    async def _try(self, item: Item) -> None:
        started = perf_counter()
        try:
            await (self._put(item, started) if item.action == "put" else self._delete(item, started))
        except IndexUnavailable as away:
            if item.attempts < self._limits.max_attempts:
                await self._file.write(ledger.put_back, item)
            else:
                await self._fail(self.live[item.key], away, started)
            raise
        except RetrievalError as refused:
            await self._fail(self.live[item.key], refused, started)
        except Exception as fault:  # noqa: BLE001 - the task's outermost edge; what it says may quote content.
            _log.error("Ingesting a document failed: %s", type(fault).__name__)
            await self._fail(item, RetrievalError("The document could not be ingested: a fault of ours."), started)

    async def _put(self, item: Item, started: float) -> None:
        if item.attempts > self._limits.max_attempts:
            # Whatever it is that ends the process, it is not to do so for ever.
            raise UnreadableDocument(
                f"{item.name!r} was begun {item.attempts - 1} times, and the service ended each time"
            )
        content = await self._spool.get(item.spool or "")
        prepared = None
        if item.media_type == LINK:
            found = await self._links.follow(item, content)
            if found is None:
                await self._leave(item, started)
                return
            item, content = found
            self.live[item.key] = item

        if item.media_type == PREPARED:
            prepared = await asyncio.to_thread(Prepared.from_bytes, content)
            item = replace(
                item, version=prepared.version, media_type=prepared.media_type, size_bytes=prepared.size_bytes
            )
            self.live[item.key] = item

        def note(connection: Any, ingested: Ingested) -> None:
            embedded = ingested.embedded_passages
            reused = _reused(ingested)
            ledger.end(
                connection, item, "done", self._limits, outcome=ingested.outcome, embedded=embedded, reused=reused
            )

        def tell(stage: str, done: int, passages: int) -> None:
            self.live[item.key] = replace(item, stage=stage, passages_done=done, passages=passages)

        ingested = await self._retriever.ingester.add(
            item.scope,
            name=item.name,
            content=prepared or content,
            media_type=item.media_type,
            metadata=item.metadata,
            groups=item.groups,
            source=item.source,
            note=note,
            tell=tell,
        )
        if self._tally:
            self._tally.embedded(ingested.embedded_passages, _reused(ingested))
        await self._after(item, ingested.outcome, started, ingested)

    async def _leave(self, item: Item, started: float) -> None:
        """End an item whose link leads to what its document is."""
        document = await self._retriever.document(item.scope, item.document_id)
        await self._file.write(ledger.finish, item, self._limits, "unchanged")
        await self._after(item, "unchanged", started, Ingested(document, "unchanged"))

    async def _delete(self, item: Item, started: float) -> None:
        scope = item.scope
        try:
            found = await self._retriever.document(scope, item.document_id)
            if found.source != item.source:
                raise DocumentOwned(f"{item.name!r} belongs to the source {found.source!r} by now")
            await self._retriever.ingester.delete(
                scope,
                item.document_id,
                note=lambda connection: ledger.end(connection, item, "done", self._limits, outcome="deleted"),
            )
        except DocumentNotFound:  # Somebody was quicker.
            await self._file.write(ledger.finish, item, self._limits, "deleted")
        await self._after(item, "deleted", started, JobEnded(""))

    async def _fail(self, item: Item, error: RetrievalError, started: float) -> None:
        await self._file.write(ledger.fail, item, self._limits, (_kind(error), str(error)))
        await self._after(item, "refused", started, error)

    async def _after(self, item: Item, outcome: str, started: float, ending: Ingested | RetrievalError) -> None:
        self._ends.append(monotonic())
        if self._tally:
            self._tally.ingested(outcome, perf_counter() - started)
        await self.let_go(item, ending)


def _kind(error: RetrievalError) -> str:
    """The class of an error, and of a limit which one: what it can be told by again."""
    name = type(error).__name__
    return f"{name}.{error.limit}" if isinstance(error, LimitExceeded) else name


def _reused(ingested: Ingested) -> int:
    """Passages whose vectors were there already."""
    return max(0, ingested.document.passages - ingested.embedded_passages) if ingested.outcome == "replaced" else 0
