"""Brings an index version what it lacks, document after document, for as long as another one answers.

The main rule: what is lacking is asked of the store each time, so it does not matter when this began, where it was
killed, or what changed meanwhile. An embedder or index that is away delays the version, and nothing else.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress

from retrieval import versions
from retrieval.cutting import Cutter
from retrieval.documents import Block, Page, ParsedDocument, Passage
from retrieval.errors import RetrievalError, UnreadableDocument
from retrieval.ingesting import Parser
from retrieval.library import Library, Shelf, points_of
from retrieval.store import DocumentStore, StoredDocument

_log = logging.getLogger(__name__)
_AT_ONCE = 4
"""Documents under way: short ones fill the embedder's batches only together."""
_LOOKED_UP = 256
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 30.0
_ITS_OWN_SOURCE = ("text/markdown", "text/plain")
"""Formats whose source text is the file itself."""


class Follower:
    """Follows with one index version, between `start` and `stop`."""

    def __init__(self, shelf: Shelf, store: DocumentStore, library: Library, *, cutter: Cutter, parser: Parser) -> None:
        self.shelf = shelf
        self.caught_up = asyncio.Event()
        """Set while nothing is known that the version lacks."""
        self.settled = asyncio.Event()
        """Set once the version has had every document, or is given up."""
        self.trouble: str | None = None
        """Why it does not go on at present."""
        self._store = store
        self._library = library
        self._cutter = cutter
        self._parser = parser
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._library.watchers.add(self.wake)
        self._task = asyncio.create_task(self._follow(), name=f"following {self.shelf.id}")

    async def stop(self) -> None:
        """Leave the version as it is; stopping twice is fine."""
        self._library.watchers.discard(self.wake)
        task, self._task = self._task, None
        if task:
            task.cancel()
            await asyncio.wait([task])

    def wake(self) -> None:
        """There may be something that the version lacks."""
        self.caught_up.clear()
        self._wake.set()

    async def _follow(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            self._wake.clear()
            try:
                if not await self._step():
                    await self._wake.wait()
                pause = _FIRST_PAUSE_SECONDS
            except RetrievalError as error:
                pause = await self._rest(str(error), pause)
            except Exception as fault:  # noqa: BLE001 - the task's outermost edge; what it says may quote content.
                pause = await self._rest(f"a fault of ours: {type(fault).__name__}", pause)

    async def _step(self) -> bool:
        """Bring documents; gives whether any was lacking."""
        number = self.shelf.number
        lacking = await self._store.file.read(versions.missing, number, _LOOKED_UP)
        turn = iter(lacking)
        ends = await asyncio.gather(*(self._bring_each(turn) for _ in range(_AT_ONCE)), return_exceptions=True)
        for failure in (end for end in ends if isinstance(end, BaseException)):
            raise failure
        self.trouble = None
        if not lacking and await self._store.file.write(versions.finish, number):
            self.settled.set()
            self.caught_up.set()
        return bool(lacking)

    async def _bring_each(self, turn: Iterator[StoredDocument]) -> None:
        for stored in turn:
            await self._bring(stored)

    async def _rest(self, trouble: str, pause: float) -> float:
        if self.trouble is None:
            _log.warning("The index version %s waits: %s", self.shelf.id, trouble)
        self.trouble = trouble
        await asyncio.sleep(pause)
        return min(_LONGEST_PAUSE_SECONDS, pause * 2)

    async def _bring(self, stored: StoredDocument) -> None:
        """Cut, embed and write one document; what is gone by then leaves nothing."""
        parsed = await parsed_again(stored, self._store, self._parser)
        if parsed is None:
            return
        passages = await self._cutter.cut(parsed, stored.document, self.shelf)
        live = self._library.live
        known = {}
        if live and live.embedder is self.shelf.embedder:
            known = await self._library.known_vectors(live, stored.generation, passages)
        await self._library.write_points(self.shelf, stored, passages, known)
        await self._library.finish(self._note(stored, passages))

    async def _note(self, stored: StoredDocument, passages: list[Passage]) -> None:
        """Have the points count, or take them back where the document is gone by now."""
        if not await self._store.file.write(versions.add, self.shelf.number, stored.generation, passages):
            await self.shelf.index.delete(points_of(stored.generation, len(passages)))


async def parsed_again(stored: StoredDocument, store: DocumentStore, parser: Parser) -> ParsedDocument | None:
    """A stored document as it was parsed; None when it is gone.

    What was ingested before its structure was kept is parsed anew where its source text is the file; else its
    passages stand for its blocks.
    """
    parsed = await store.parsed(stored.generation)
    source = None if parsed else await store.source(stored.generation)
    if parsed or source is None:
        return parsed
    document = stored.document
    if document.media_type in _ITS_OWN_SOURCE:
        with suppress(UnreadableDocument):
            parsed = await parser.parse(source.encode(), name=document.name, media_type=document.media_type)
            if parsed.text == source:
                return parsed
    return _of_passages(source, document.title, await store.passages(stored.generation))


def _of_passages(source: str, title: str, passages: list[Passage]) -> ParsedDocument:
    blocks = tuple(Block(each.start, each.end, "paragraph", each.heading_path) for each in passages)
    starts = {each.page: each.start for each in reversed(passages) if each.page is not None}
    first = sorted(starts.items())
    ends = [start for _, start in first[1:]] + [len(source)]
    pages = tuple(Page(number, start, end) for (number, start), end in zip(first, ends, strict=True))
    return ParsedDocument(source, title or None, blocks, pages)
