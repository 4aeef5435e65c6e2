"""A retriever and the jobs above it, on stand-ins for parser, splitter and embedder, to be filled and asked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval.documents import Scope
from retrieval.edge import EdgeIndex
from retrieval.embedder import HashingEmbedder
from retrieval.ingesting import version_of
from retrieval.jobs import Accepted, Entry, Ingestion, Job
from retrieval.retriever import Retriever
from tests.lines import LineParser, WatchedIndex, split_lines

ACME, OTHER = Scope("acme"), Scope("other")
TOWER = b"The tower is 330 metres tall.\nIt stands in Paris.\nIt opened in 1889."


@dataclass
class World:
    """A retriever, the jobs above it, and what they rest on."""

    retriever: Retriever
    ingestion: Ingestion
    index: WatchedIndex
    embedder: HashingEmbedder
    spool: Path

    async def add(self, name: str, content: bytes = TOWER, scope: Scope = ACME, **facts: Any) -> Accepted:
        return await self.ingestion.accept(scope, name=name, content=content, **facts)

    async def done(self, name: str, content: bytes = TOWER, scope: Scope = ACME, **facts: Any) -> Job:
        """Add a document, and give its job when it has ended."""
        accepted = await self.add(name, content, scope, **facts)
        await asyncio.wait([accepted.ended], timeout=20)
        return await self.ingestion.job(scope, accepted.job_id)

    async def found(self, query: str, scope: Scope = ACME) -> list[str]:
        result = await self.retriever.search(scope, query, top_k=100)
        return sorted(hit.passage.text for hit in result.hits)

    def spooled(self) -> list[str]:
        return [path.name for path in self.spool.iterdir()]


@asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[World]:
    index = WatchedIndex(EdgeIndex(directory / "index"))
    embedder = options.pop("embedder", None) or HashingEmbedder()
    index.failing |= options.pop("failing", set())
    spool = directory / "spool"
    options = {"retry_seconds": 0.001, **options}
    async with (
        Retriever(directory, embedder=embedder, index=index, parser=LineParser(), split=split_lines) as retriever,
        Ingestion(retriever, spool, **options) as ingestion,
    ):
        yield World(retriever, ingestion, index, embedder, spool)


async def ended(world: World, job_id: str, scope: Scope = ACME) -> Job:
    """A job of which nobody holds the future any more, when it has ended."""
    async with asyncio.timeout(20):
        while not (job := await world.ingestion.job(scope, job_id)).finished_at:
            await asyncio.sleep(0.002)
    return job


def entry(name: str, content: bytes, **metadata: Any) -> Entry:
    return Entry(name, version_of(content), metadata or None)
