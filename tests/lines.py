"""Stand-ins for what retrieval rests on: a passage is a line, and an index can be made to wait or fail."""

import asyncio
from collections.abc import Sequence
from typing import Any

from retrieval.documents import ParsedDocument, Passage
from retrieval.errors import IndexUnavailable, UnreadableDocument
from retrieval.index import Index, IndexPoint


class LineParser:
    """The first line is the title if it starts with "# "; "unreadable" is refused."""

    async def parse(self, content: bytes, *, name: str, media_type: str | None = None) -> ParsedDocument:
        if content == b"unreadable":
            raise UnreadableDocument("no text")
        text = content.decode()
        return ParsedDocument(text, text.partition("\n")[0][2:] if text.startswith("# ") else None)


def split_lines(parsed: ParsedDocument, /, *, document_id: str, document_version: str, document_name: str, **_: Any):
    passages: list[Passage] = []
    start = 0
    for line in parsed.text.split("\n"):
        if line and not line.startswith("# "):
            passages.append(
                Passage(
                    document_id,
                    document_version,
                    len(passages) + 1,
                    line,
                    start,
                    start + len(line),
                    document_name=document_name,
                )
            )
        start += len(line) + 1
    return passages


class WatchedIndex:
    """An index that can be made to wait or fail, in front of a real one."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.written = 0
        self.failing: set[str] = set()
        self.gates: dict[str, asyncio.Event] = {}
        self.reached: dict[str, asyncio.Event] = {}

    def hold(self, method: str) -> None:
        self.gates[method], self.reached[method] = asyncio.Event(), asyncio.Event()

    async def pass_through(self, method: str) -> None:
        if method in self.gates:
            self.reached[method].set()
            await self.gates[method].wait()
        if method in self.failing:
            raise IndexUnavailable("made to fail")

    async def upsert(self, points: Sequence[IndexPoint]) -> None:
        await self.index.upsert(points[:1])
        await self.pass_through("upsert")
        await self.index.upsert(points)
        self.written += len(points)

    async def delete(self, ids: Sequence[int]) -> None:
        await self.pass_through("delete")
        await self.index.delete(ids)

    async def check(self) -> None:
        await self.pass_through("check")
        await self.index.check()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)
