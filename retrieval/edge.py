"""The index inside this process: a qdrant-edge shard in a directory, searched exactly.

The main rule: never call the shard's `optimize()` here: it holds the interpreter lock for its whole run (measured 38 s
at 25,000 points), while exact search needs 2 ms of CPU at 20,000 and 8 at 100,000.

    <directory>/current.json      which shard is served, and its schema; replaced in one step
    <directory>/0001/             the shard: segments and a write-ahead log
"""

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import qdrant_edge as edge

from retrieval.errors import IndexMismatch, IndexOutOfRoom, IndexUnavailable
from retrieval.index import IndexFilter, IndexPoint, IndexSchema, Legs, SparseVector, Vector, point_key

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_BATCH_POINTS = 64
"""Handing points over holds the interpreter lock, about 50 us each: a larger batch would be felt on the event loop."""
_FLUSH_POINTS = 20_000
"""A flush holds the interpreter lock while it waits for the disk, 20 to 200 ms. The write-ahead log makes it needless
for surviving the end of the process, so it only happens on closing and often enough to keep the log short."""
_ROOM_BYTES = 40_000_000
"""Free bytes on the disk without which nothing is opened or written. The shard's files have holes, and memory is mapped
to them: where the disk cannot fill one, the kernel ends the whole process (SIGBUS). Opening one of 2,560 points took
under 32 million bytes."""
_POINTER = "current.json"


class EdgeIndex:
    """An `Index` in a directory that one process owns.

    Writes go through one thread, searches through `readers` threads. A write is in the shard's log when it returns, so
    it survives the end of the process; what an outage of the machine cuts, the retriever repairs when it opens.
    """

    def __init__(self, directory: Path, *, readers: int = 2) -> None:
        self._directory = directory
        self._readers = readers
        self._writer_pool: ThreadPoolExecutor | None = None
        self._reader_pool: ThreadPoolExecutor | None = None
        self._shard: edge.EdgeShard | None = None
        self._unflushed_points = 0
        self._tenants: frozenset[str] = frozenset()

    async def open(self, schema: IndexSchema, *, rebuild: bool = False) -> None:
        """See `Index.open`."""
        self._writer_pool = ThreadPoolExecutor(1, thread_name_prefix="index-writer")
        self._reader_pool = ThreadPoolExecutor(self._readers, thread_name_prefix="index-reader")
        try:
            await self._write(self._open, schema, rebuild)
        except BaseException:
            self._shut_down_pools()
            raise

    async def close(self) -> None:
        """See `Index.close`."""
        if self._shard is not None:
            shard, self._shard = self._shard, None
            try:
                await self._write(_close, shard)
            except IndexUnavailable as error:
                _log.warning("What the index has not flushed stays in its log until it is opened again: %s", error)
        self._shut_down_pools()

    async def check(self) -> None:
        """See `Index.check`: an open shard answers, and where it has room it also takes what is new."""
        self._opened()
        await self._read(self._require_room)

    async def upsert(self, points: Sequence[IndexPoint]) -> None:
        """See `Index.upsert`."""
        for batch in _batches(points):
            await self._write(self._upsert, batch)

    async def delete(self, ids: Sequence[int]) -> None:
        """See `Index.delete`."""
        for batch in _batches(ids):
            await self._write(self._update, edge.UpdateOperation.delete_points(list(batch)), len(batch))

    async def search(
        self, where: IndexFilter, *, dense: Vector | None, sparse: SparseVector | None, depth: int
    ) -> Legs:
        """See `Index.search`."""
        return await self._read(self._search, where, dense, sparse, depth)

    async def ids(self) -> list[int]:
        """See `Index.ids`."""
        return await self._read(self._ids)

    async def vectors(self, ids: Sequence[int]) -> dict[int, Vector]:
        """See `Index.vectors`."""
        found: dict[int, Vector] = {}
        for batch in _batches(ids):  # They come as lists of numbers, which take ten times the room of the vectors.
            found |= await self._read(self._vectors, batch)
        return found

    async def _write(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await _run(self._writer_pool, function, *arguments)

    async def _read(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await _run(self._reader_pool, function, *arguments)

    def _shut_down_pools(self) -> None:
        for pool in (self._writer_pool, self._reader_pool):
            if pool is not None:
                pool.shutdown(wait=False)
        self._writer_pool = self._reader_pool = None

    def _opened(self) -> edge.EdgeShard:
        if self._shard is None:
            raise IndexUnavailable("The index is not open.")
        return self._shard

    # What follows runs on the pools' threads.

    def _require_room(self) -> None:
        free = shutil.disk_usage(self._directory).free
        if free < _ROOM_BYTES:
            raise IndexOutOfRoom(
                f"The disk under {self._directory} has {free} bytes free and the index needs {_ROOM_BYTES}: make room."
            )

    def _open(self, schema: IndexSchema, rebuild: bool) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._require_room()
        pointer = self._directory / _POINTER
        stored = json.loads(pointer.read_text()) if pointer.exists() else None
        if stored and (difference := schema.difference(stored["schema"])):
            if not rebuild:
                raise IndexMismatch(f"The index in {self._directory} was built otherwise: {difference}.")
            stored = None
        if stored is None:
            self._create(schema, pointer)
        else:
            self._shard = edge.EdgeShard.load(str(self._directory / stored["shard"]), _config(schema))
            self._tenants = _tenants_in(self._shard)

    def _create(self, schema: IndexSchema, pointer: Path) -> None:
        """Make an empty shard under the next number, point to it, then remove the ones it replaces."""
        old = sorted(path for path in self._directory.iterdir() if path.is_dir() and path.name.isdigit())
        path = self._directory / f"{int(old[-1].name) + 1 if old else 1:04d}"
        path.mkdir()
        shard = edge.EdgeShard.create(str(path), _config(schema))
        shard.update(edge.UpdateOperation.create_field_index("tenant", edge.KeywordIndexParams(is_tenant=True)))
        shard.update(edge.UpdateOperation.create_field_index("labels", edge.KeywordIndexParams()))
        shard.update(
            edge.UpdateOperation.create_field_index("generation", edge.IntegerIndexParams(lookup=True, range=False))
        )
        shard.flush()
        replacement = pointer.with_suffix(".new")
        replacement.write_text(json.dumps({"shard": path.name, "schema": asdict(schema)}, indent=1))
        replacement.replace(pointer)
        for directory in old:
            shutil.rmtree(directory)
        self._shard = shard

    def _upsert(self, points: Sequence[IndexPoint]) -> None:
        # Before any of them can be found.
        self._tenants = self._tenants.union(point.tenant for point in points)
        self._update(edge.UpdateOperation.upsert_points([_native_point(point) for point in points]), len(points))

    def _update(self, operation: edge.UpdateOperation, points: int) -> None:
        shard = self._opened()
        self._require_room()
        shard.update(operation)
        self._unflushed_points += points
        if self._unflushed_points >= _FLUSH_POINTS:
            shard.flush()
            self._unflushed_points = 0

    def _search(self, where: IndexFilter, dense: Vector | None, sparse: SparseVector | None, depth: int) -> Legs:
        vectors: list[tuple[str, Any]] = []
        if dense is not None:
            vectors.append(("dense", dense.tolist()))
        if sparse is not None and sparse.indices:
            vectors.append(("sparse", edge.SparseVector(sparse.indices, sparse.values)))
        if not vectors:
            return Legs()
        own = frozenset((where.tenant,))
        is_alone = self._tenants <= own
        answers = self._query(vectors, _condition(where, is_alone=is_alone), depth)
        if is_alone and not self._tenants <= own:  # Another tenant's first points were written meanwhile.
            answers = self._query(vectors, _condition(where, is_alone=False), depth)
        legs = {
            name: [(int(hit.id), hit.score) for hit in hits] for (name, _), hits in zip(vectors, answers, strict=True)
        }
        return Legs(**legs)

    def _query(self, vectors: Sequence[tuple[str, Any]], condition: edge.Filter | None, depth: int) -> Any:
        requests = [
            edge.QueryRequest(
                limit=depth, query=edge.Query.Nearest(vector, using=name), filter=condition, with_payload=False
            )
            for name, vector in vectors
        ]
        return self._opened().query_batch(edge.QueryBatchRequest(requests))

    def _ids(self) -> list[int]:
        found: list[int] = []
        offset = None
        while True:
            records, offset = self._opened().scroll(
                edge.ScrollRequest(offset=offset, limit=10_000, with_payload=False, with_vector=False)
            )
            found += [int(record.id) for record in records]
            if offset is None:
                return found

    def _vectors(self, ids: Sequence[int]) -> dict[int, Vector]:
        records = self._opened().retrieve([*ids], with_payload=False, with_vector=["dense"])
        vectors: list[Any] = [record.vector for record in records]
        return {
            int(record.id): np.asarray(vector["dense"], np.float32)
            for record, vector in zip(records, vectors, strict=True)
        }


async def _run(pool: ThreadPoolExecutor | None, function: Callable[..., _T], *arguments: Any) -> _T:
    if pool is None:
        raise IndexUnavailable("The index is not open.")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)
    except (IndexMismatch, IndexUnavailable, asyncio.CancelledError):
        raise
    except Exception as error:  # qdrant-edge raises nothing more specific.
        raise _translate(error) from error


def _translate(error: Exception) -> IndexUnavailable:
    if "WouldBlock" in str(error):
        return IndexUnavailable(
            "Another process has the index open: an embedded index serves one process. "
            "Run one worker, or set a Qdrant server's URL."
        )
    return IndexUnavailable(f"The embedded index failed: {type(error).__name__}: {error}")


def _config(schema: IndexSchema) -> edge.EdgeConfig:
    return edge.EdgeConfig(
        vectors={
            # A byte a number instead of four: half the CPU a search, and room in the cache for the embedder. 985 of
            # 1,000 candidates stay the same, and nDCG@10 to three digits.
            "dense": edge.EdgeVectorParams(
                size=schema.dimension, distance=edge.Distance.Cosine, datatype=edge.VectorStorageDatatype.Turbo8
            )
        },
        sparse_vectors={"sparse": edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
        # More threads save no time below 100,000 points and cost a fifth more CPU a query.
        max_search_threads=1,
    )


def _native_point(point: IndexPoint) -> edge.Point:
    vector: dict[str, Any] = {"dense": point.dense.tolist()}
    if point.sparse.indices:
        vector["sparse"] = edge.SparseVector(point.sparse.indices, point.sparse.values)
    generation, _ = point_key(point.id)
    return edge.Point(
        point.id, vector, {"tenant": point.tenant, "generation": generation, "labels": list(point.labels)}
    )


def _tenants_in(shard: edge.EdgeShard) -> frozenset[str]:
    """Every tenant that has points; with many it is enough to know of two."""
    return frozenset(str(hit.value) for hit in shard.facet(edge.FacetRequest("tenant", limit=2, exact=True)))


def _condition(where: IndexFilter, *, is_alone: bool) -> edge.Filter | None:
    """The filter as the shard has it; that every point is the tenant's costs a third of a search to find out again."""
    must: list[Any] = [] if is_alone else [edge.FieldCondition("tenant", match=edge.MatchValue(where.tenant))]
    must += [edge.FieldCondition("labels", match=edge.MatchAny(list(group))) for group in where.groups]
    if not where.hidden:
        return edge.Filter(must=must) if must else None
    return edge.Filter(must=must, must_not=[edge.FieldCondition("generation", match=edge.MatchAny(list(where.hidden)))])


def _close(shard: edge.EdgeShard) -> None:
    try:
        shard.flush()
    finally:
        shard.close()


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (items[start : start + _BATCH_POINTS] for start in range(0, len(items), _BATCH_POINTS))
