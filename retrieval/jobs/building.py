"""The jobs that build index versions: each follows its version until that is ready, and ends with it.

The main rule: the job does no work, it tells of it. What a version lacks is known by the documents themselves, so a
build needs no note of how far it is, and a kill costs the documents that were under way.
"""

import asyncio
from contextlib import suppress
from dataclasses import replace

from retrieval.errors import IndexUnavailable, IndexVersionNotFound, IndexVersionState
from retrieval.jobs import ledger
from retrieval.jobs.nouns import Item, Limits
from retrieval.jobs.working import Workers
from retrieval.retriever import Retriever
from retrieval.versions import IndexVersion

_LOOK_SECONDS = 1.0


class Builds:
    """Follows the builds there are, between `start` and `stop`."""

    def __init__(self, retriever: Retriever, workers: Workers, limits: Limits) -> None:
        self._retriever = retriever
        self._indexes = retriever.indexes
        self._file = retriever.store.file
        self._live = workers.live
        self._limits = limits
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._task = asyncio.create_task(self._follow(), name="builds")

    async def stop(self) -> None:
        """Leave everything as it is: it goes on at the next start."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    def wake(self) -> None:
        """There is another build."""
        self._wake.set()

    async def give_up(self, item: Item) -> None:
        """Drop what a cancelled job was building."""
        self._live.pop(item.key, None)
        with suppress(IndexVersionNotFound, IndexVersionState):
            if (await self._indexes.version(item.name)).state == "building":
                await self._indexes.drop(item.name)

    async def _follow(self) -> None:
        while True:
            try:
                self._wake.clear()
                await self._retriever.ready()
                before = await self._indexes.versions()
                items = await self._file.write(ledger.claim_builds)
                await self._drop_cancelled(before, {item.name for item in items})
                for item in items:
                    await self._look(item)
                if not items:
                    await self._wake.wait()
            except (IndexUnavailable, IndexVersionState):  # The workers, which wait for the same, say so.
                await asyncio.sleep(_LOOK_SECONDS)

    async def _drop_cancelled(self, before: list[IndexVersion], wanted: set[str]) -> None:
        """Drop what was there before the jobs were looked at, and none of them builds: its job was cancelled."""
        for version in before:
            if version.state == "building" and version.id not in wanted:
                with suppress(IndexVersionNotFound):  # Whoever cancelled the job is dropping it as well.
                    await self._indexes.drop(version.id)

    async def _look(self, item: Item) -> None:
        """Tell how far a build is, and end its job with it; waits a moment where it goes on."""
        version = next((each for each in await self._indexes.versions() if each.id == item.name), None)
        if version is None or version.state == "dropped":
            self._live.pop(item.key, None)
            await self._file.write(ledger.give_up, item, self._limits)
            return
        if version.state != "building":
            self._live.pop(item.key, None)
            await self._file.write(ledger.finish, item, self._limits, "built")
            return
        follower = self._indexes.follower(version.number)
        stage = "waiting" if follower is None or follower.trouble else "embedding"
        there, missing = version.passages, version.missing_passages
        self._live[item.key] = replace(item, stage=stage, passages_done=there, passages=there + missing)
        if follower:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await follower.settled.wait()
        else:
            await asyncio.sleep(_LOOK_SECONDS)
