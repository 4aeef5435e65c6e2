"""A version as files: `manifest.json`, and a file of rows for each side of the split, as JSON lines or as Parquet.

The main rule: the same version gives the same bytes, whichever database it is in and however often it is asked. Files
are made as they are sent, a page of rows at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from hashlib import sha256
from typing import Any, Literal, get_args

import msgspec
from sqlalchemy import Row

from app.datasets.examples import line_of
from app.datasets.recipes import SPLITS, Split
from app.datasets.store import Store, Version
from app.errors import NotFound
from app.lineage import canonical
from app.parquet import Kind, ParquetWriter

Format = Literal["jsonl", "parquet"]

PAGE_ROWS = 500
"""Also the size of a Parquet file's row groups: it is part of its bytes."""

_SAME: dict[str, Kind] = {"row": "text", "content_digest": "text", "prediction_id": "text", "label_id": "text"}
_ALL: dict[str, Kind] = {"task": "text", "split": "text", "question": "text", "session": "text", "slice": "text"}
_CHAT: dict[str, Kind] = {"messages": "json"}
_COLUMNS: dict[str, dict[str, Kind]] = {
    "classify": {**_CHAT, "label": "text"},
    "answer": {**_CHAT, "passages": "json", "citations": "json", "answerable": "flag"},
    "extract": _CHAT,
    "preference": {"prompt": "json", "chosen": "json", "rejected": "json"},
}
_LAST: dict[str, Kind] = {"features": "json", "weight": "number", "meta": "json"}


class Exports:
    """Makes the files of versions."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def manifest(self, version: Version) -> bytes:
        """The manifest, as lineage has it; where rows were erased since, it says which and counts the others."""
        if not version.erased:
            return version.written.encode()
        gone: list[str] = []
        splits = {}
        for split in SPLITS:
            digest, rows = sha256(), 0
            async for page in self._store.pages(version.series, version.number, split=split, page_rows=PAGE_ROWS):
                lines = await asyncio.to_thread(_lines, page)
                digest.update(b"".join(lines))
                rows += len(lines)
                gone += [row.digest for row in page if row.content is None]
            splits[split] = {"rows": rows, "sha256": digest.hexdigest()}
        return canonical({**version.manifest, "splits": splits, "erased": sorted(gone)}).encode()

    def file(self, version: Version, name: str) -> AsyncIterator[bytes]:
        """Give a file in pieces; raises NotFound where there is none of that name.

        An evaluation set has nothing to train on.
        """
        if name == "manifest.json":
            return _one(self.manifest(version))
        split, _, kind = name.partition(".")
        if split not in SPLITS or kind not in get_args(Format):
            files = ["manifest.json", *(f"{split}.{kind}" for split in SPLITS for kind in get_args(Format))]
            raise NotFound(f"A version has no file {name!r}; it has {', '.join(files)}.", param="file")
        rows = self._rows(version, split)
        return _parquet(rows, version) if kind == "parquet" else _jsonl(rows)

    async def _rows(self, version: Version, split: Split) -> AsyncIterator[Sequence[Row[Any]]]:
        async for page in self._store.pages(version.series, version.number, split=split, page_rows=PAGE_ROWS):
            yield page


async def _one(content: Any) -> AsyncIterator[bytes]:
    yield await content


async def _jsonl(pages: AsyncIterator[Sequence[Row[Any]]]) -> AsyncIterator[bytes]:
    async for page in pages:
        yield b"".join(await asyncio.to_thread(_lines, page))


async def _parquet(pages: AsyncIterator[Sequence[Row[Any]]], version: Version) -> AsyncIterator[bytes]:
    kinds = {**_SAME, **_ALL, **_COLUMNS[version.series.task], **_LAST}
    if version.manifest["recipe"].get("split", {}).get("by") == "user":
        kinds["conversation"] = "text"
    writer = ParquetWriter(list(kinds), kinds=kinds)

    def written(page: Sequence[Row[Any]]) -> bytes:
        rows: list[dict[str, Any]] = [msgspec.json.decode(line) for line in _lines(page)]
        return writer.add(rows) if rows else b""

    async for page in pages:
        yield await asyncio.to_thread(written, page)
    yield await asyncio.to_thread(writer.finish)


def _lines(page: Sequence[Row[Any]]) -> list[bytes]:
    """The lines of the rows that still say something."""
    return [
        line_of(row.digest, row.content_digest, row.content, row.prediction_id, row.label_id).encode() + b"\n"
        for row in page
        if row.content is not None
    ]
