"""The index versions of a document store: one answers, others are built beside it and follow it.

The main rule: a query is embedded by the embedder of the version that it searches. So each version is open only with an
embedder of the model that it was made with, and a start at which the live one has none is refused.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any

from retrieval import versions
from retrieval.cutting import Cutter
from retrieval.errors import IndexMismatch, IndexUnavailable, IndexVersionNotFound, IndexVersionState
from retrieval.following import Follower
from retrieval.index import SCHEMA_VERSION, Index, IndexSchema
from retrieval.ingesting import Parser
from retrieval.library import Library, Shelf
from retrieval.making import Making, Makings
from retrieval.store import DocumentStore, Note
from retrieval.versions import IndexVersion

_log = logging.getLogger(__name__)
_CATCH_UP_SECONDS = 60.0
"""The longest that a switch waits for what the version lacks, before it stops changes of documents."""
_LAST_DOCUMENTS_SECONDS = 20.0
"""The longest that it stops them."""


class Indexes:
    """Opens, builds, switches and drops the index versions of a store.

    `index` is where they are, `makings` what the settings make them with.
    """

    def __init__(
        self,
        store: DocumentStore,
        library: Library,
        index: Index,
        *,
        makings: Makings,
        cutter: Cutter,
        parser: Parser,
    ) -> None:
        self._store = store
        self._library = library
        self._index = index
        self._makings = makings
        self._cutter = cutter
        self._parser = parser
        self._followers: dict[int, Follower] = {}
        self._changing = asyncio.Lock()

    # --- opening ---

    async def attach(self) -> None:
        """Open the live version and those that follow it; a store that has none begins with one.

        Raises:
            IndexMismatch: No embedder of the settings made the live version, or the collection is another store's.
        """
        named = await self._index.named()
        if named and named.get("owner") != self._store.store_id:
            raise IndexMismatch(
                "The collection belongs to another document store: owner is "
                f"{named.get('owner')!r} there and {self._store.store_id!r} here. Give each its own collection."
            )
        kept = await self.versions()
        live = next((each for each in kept if each.state == "live"), None)
        if live is None:
            first = IndexSchema.of(named) if named else self._schema(self._makings.now)
            await self._store.file.write(versions.insert, first, "live")
            kept = await self.versions()
            live = next(each for each in kept if each.state == "live")
        if named is None and self._makings.embedder_of(live.schema) is None:
            live = await self._remade(live)
        shelf = await self._open_live(live)
        if (
            named is None or IndexSchema.of(named) != live.schema
        ):  # New, or the process ended in the middle of a switch.
            await shelf.index.promote()
        for each in kept:
            if each is not live:
                await self._open_again(each)
        await self._renew(live)

    async def _remade(self, live: IndexVersion) -> IndexVersion:
        """Where the index was taken away there is nothing to mix: passages are embedded by what the settings name."""
        own = self._makings.now.embedder
        schema = replace(live.schema, embedding_model=own.model_id, dimension=own.dimension)
        await self._store.file.write(versions.remake, live.number, schema)
        return replace(live, schema=schema)

    async def _open_live(self, live: IndexVersion) -> Shelf:
        embedder = self._makings.embedder_of(live.schema)
        if embedder is None:
            raise IndexMismatch(self._makings.refusal(live.schema))
        shelf = Shelf(live.number, live.schema, self._index, embedder)
        await self._index.open(live.schema)
        self._library.live, self._library.shelves = shelf, [shelf]
        await self._library.reconcile(shelf)
        if self._schema(self._makings.now).index_version != live.id and embedder is self._makings.now.embedder:
            _log.warning(
                "The settings or this release cut otherwise than the live index version %s: build one.", live.id
            )
        return shelf

    async def _open_again(self, version: IndexVersion) -> None:
        """Go on with a version that was not the live one when the process ended."""
        if version.state == "dropped":
            await self._remove(version, None)
        elif self._makings.embedder_of(version.schema) is None:
            _log.warning("The index version %s follows no more: no setting names its embedding model.", version.id)
        else:
            await self._follow(version.number, version.schema)

    async def _follow(self, number: int, schema: IndexSchema) -> None:
        embedder = self._makings.embedder_of(schema)
        assert embedder
        shelf = Shelf(number, schema, self._index.beside(), embedder)
        try:
            await shelf.index.open(schema)
            self._library.shelves.append(shelf)
            await self._library.reconcile(shelf)
        except BaseException:
            await self._let_go(shelf)
            raise
        self._start_following(shelf)

    async def _renew(self, live: IndexVersion) -> None:
        """Write a collection of an older form anew, from its own vectors, before anything is asked of it."""
        if live.schema.schema_version == SCHEMA_VERSION:
            return
        schema = replace(live.schema, schema_version=SCHEMA_VERSION)
        _log.info("Writing the index anew as %s: its points are of an older form.", schema.index_version)
        found = await self._find_or_none(schema.index_version)
        if found is None:
            number = await self._store.file.write(versions.insert, schema, "building")
            await self._follow(number, schema)
        else:
            number = found.number
        await self._followers[number].settled.wait()
        await self._turn(self._followers[number].shelf)
        await self.drop(live.id)

    async def close(self) -> None:
        """Stop following and close every index; closing twice is fine."""
        for follower in self._followers.values():
            await follower.stop()
        self._followers.clear()
        shelves, self._library.shelves, self._library.live = self._library.shelves, [], None
        for index in [self._index, *(shelf.index for shelf in shelves if shelf.index is not self._index)]:
            await index.close()

    # --- asking ---

    async def versions(self) -> list[IndexVersion]:
        """All versions there are, oldest first."""
        return await self._store.file.read(versions.every)

    async def version(self, version_id: str) -> IndexVersion:
        """One of them; raises IndexVersionNotFound."""
        found = await self._find_or_none(version_id)
        if found is None:
            raise IndexVersionNotFound(f"There is no index version {version_id!r}.")
        return found

    def trouble(self, version: IndexVersion) -> str | None:
        """Why a version does not go on at present."""
        follower = self._followers.get(version.number)
        if follower or version.state in ("live", "dropped"):
            return follower.trouble if follower else None
        return f"No setting names its embedding model, {version.schema.embedding_model!r}."

    def follower(self, number: int) -> Follower | None:
        """What follows with a version; None for the live one, and for one that is not open."""
        return self._followers.get(number)

    async def searchable(self, version_id: str) -> Shelf:
        """A version that has every document.

        Raises:
            IndexVersionNotFound: There is none of that id.
            IndexVersionState: It is not ready, or not open.
        """
        version = await self.version(version_id)
        shelf = next((each for each in self._library.shelves if each.number == version.number), None)
        if version.state == "building":
            raise IndexVersionState(f"{version_id!r} is not ready: {version.missing_documents} documents are missing.")
        if shelf is None or version.state == "dropped":
            raise IndexVersionState(
                f"{version_id!r} is not open: name its embedding model {version.schema.embedding_model!r} "
                "by retrieval.embedding_model or retrieval.next_embedding_model, and start again."
            )
        return shelf

    @property
    def is_coming_live(self) -> bool:
        """Whether what answers is embedded by what the settings name for the next version."""
        live = self._library.live
        return live is not None and live.embedder is not self._makings.now.embedder

    # --- changing ---

    async def build(self, note: Callable[[str], Note]) -> IndexVersion:
        """Begin a version with what the settings name; `note` is made of its id, and written with it.

        Raises:
            IndexVersionState: There is such a version, or another is being built.
        """
        async with self._changing:
            schema = self._schema(self._makings.coming or self._makings.now)
            for each in await self.versions():
                if each.id == schema.index_version:
                    raise IndexVersionState(self._why_not(each))
                if each.state == "building":
                    raise IndexVersionState(f"{each.id!r} is being built: wait for it, or drop it.")
            number = await self._store.file.write(versions.insert, schema, "building", note(schema.index_version))
            await self._follow(number, schema)
            return await self.version(schema.index_version)

    async def switch(self, version_id: str, *, uncompared: bool = False) -> IndexVersion:
        """Answer from another version from now on; it has every document before it does.

        Raises:
            IndexVersionNotFound: There is none of that id.
            IndexVersionState: It is live, not ready, not compared, or does not catch up.
        """
        async with self._changing:
            shelf = await self.searchable(version_id)
            version = await self.version(version_id)
            if version.state == "live":
                raise IndexVersionState(f"{version_id!r} is live already.")
            if version.state == "ready" and version.comparison is None and not uncompared:
                raise IndexVersionState(
                    f"{version_id!r} has not been compared with the live version: do so by `hallmark index compare`, "
                    "or say that there is nothing to compare it by (`--uncompared`)."
                )
            await self._library.finish(self._turn(shelf))
            return await self.version(version_id)

    async def rollback(self) -> IndexVersion:
        """Answer from the version that was live before; raises IndexVersionState."""
        retired = [each for each in await self.versions() if each.state == "retired" and each.retired_at]
        if not retired:
            raise IndexVersionState("No version was live before this one, or it was dropped.")
        return await self.switch(max(retired, key=lambda each: str(each.retired_at)).id)

    async def compared(self, version_id: str, comparison: dict[str, Any]) -> IndexVersion:
        """Keep what a comparison with the live version came to."""
        version = await self.version(version_id)
        await self._store.file.write(versions.compared, version.number, comparison)
        return await self.version(version_id)

    async def drop(self, version_id: str) -> None:
        """Remove a version that does not answer, with its points; a second time goes on where it was.

        Raises:
            IndexVersionNotFound: There is none of that id.
            IndexVersionState: It is live, or the settings rest on it.
        """
        async with self._changing:
            version = await self.version(version_id)
            if version.state == "live":
                raise IndexVersionState(f"{version_id!r} is live: switch to another one first.")
            live = self._library.live
            if live:
                self._makings.require_fit_without(version.schema, live.schema)
            follower = self._followers.pop(version.number, None)
            if follower:
                await follower.stop()
                follower.settled.set()
                self._library.shelves.remove(follower.shelf)
            await self._library.finish(self._remove(version, follower.shelf.index if follower else None))

    async def _remove(self, version: IndexVersion, index: Index | None) -> None:
        """Nothing is cut for it, then its points go, then it is forgotten: a start goes on in between."""
        await self._store.file.write(versions.empty, version.number)
        if index is None:
            index = self._index.beside()
            await index.open(version.schema)
        await index.drop()
        await self._store.file.write(versions.forget, version.number)

    async def _turn(self, shelf: Shelf) -> None:
        """Make a version the live one, with not a document less than the one before."""
        follower, before = self._followers[shelf.number], self._library.live
        assert before
        await _caught_up(follower, _CATCH_UP_SECONDS)
        async with self._library.commits:
            deadline = monotonic() + _LAST_DOCUMENTS_SECONDS
            while not await self._store.file.write(versions.make_live, shelf.number):
                follower.wake()
                await _caught_up(follower, deadline - monotonic())
            self._library.turn_to(shelf)
        self._followers.pop(shelf.number)
        await follower.stop()
        self._start_following(before)
        try:
            await shelf.index.promote()
        except IndexUnavailable as error:
            _log.warning("The index's own name for the live version follows at the next start: %s", error)

    def _start_following(self, shelf: Shelf) -> None:
        follower = Follower(shelf, self._store, self._library, cutter=self._cutter, parser=self._parser)
        self._followers[shelf.number] = follower
        follower.start()

    async def _let_go(self, shelf: Shelf) -> None:
        if shelf in self._library.shelves:
            self._library.shelves.remove(shelf)
        await shelf.index.close()

    def _schema(self, making: Making) -> IndexSchema:
        return self._makings.schema(making, self._store.store_id)

    def _why_not(self, found: IndexVersion) -> str:
        if found.state == "live":
            return (
                f"The live version {found.id!r} is what the settings would build: "
                "name another by retrieval.next_embedding_model or retrieval.next_passage_tokens, and start again."
            )
        return f"There is {found.id!r} already, {found.state}: use it, or drop it."

    async def _find_or_none(self, version_id: str) -> IndexVersion | None:
        return next((each for each in await self.versions() if each.id == version_id), None)


async def _caught_up(follower: Follower, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await follower.caught_up.wait()
    except TimeoutError:
        why = follower.trouble or "documents come faster than it takes them"
        raise IndexVersionState(f"{follower.shelf.id!r} does not catch up: {why}.") from None
