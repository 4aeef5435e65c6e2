"""The index inside this process: a qdrant-edge shard in a directory, searched exactly.

The main rule: never call the shard's `optimize()` here: it holds the interpreter lock for its whole run (measured 38 s
at 25,000 points), while exact search needs 2 ms of CPU at 20,000 and 8 at 100,000.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import qdrant_edge as edge

from retrieval import shard_files
from retrieval.errors import IndexOutOfRoom, IndexUnavailable
from retrieval.index import IndexPoint, IndexSchema, Legs, SparseVector, Vector, point_key
from retrieval.scoping import RESTRICTED, IndexFilter

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
        self._schema: IndexSchema | None = None
        self._path: Path | None = None
        self._unflushed_points = 0
        self._held = _Held()

    async def open(self, schema: IndexSchema) -> None:
        """See `Index.open`."""
        self._writer_pool = ThreadPoolExecutor(1, thread_name_prefix="index-writer")
        self._reader_pool = ThreadPoolExecutor(self._readers, thread_name_prefix="index-reader")
        try:
            await self._write(self._open, schema)
        except BaseException:
            self._shut_down_pools()
            raise

    def beside(self) -> "EdgeIndex":
        """See `Index.beside`."""
        return EdgeIndex(self._directory, readers=self._readers)

    async def named(self) -> Mapping[str, Any] | None:
        """See `Index.named`."""
        pointer = await asyncio.to_thread(shard_files.read, self._directory / shard_files.POINTER)
        return pointer["schema"] if pointer else None

    async def promote(self) -> None:
        """See `Index.promote`."""
        await self._write(self._promote)

    async def drop(self) -> None:
        """See `Index.drop`."""
        path = self._path
        await self.close()
        if path is not None:
            await asyncio.to_thread(shard_files.remove, path)

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

    def _open(self, schema: IndexSchema) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._require_room()
        self._schema = schema
        kept = shard_files.shards(self._directory)
        self._path = next((path for path, its in kept.items() if its == schema), None)
        if self._path is None:
            self._create(schema, kept)
        else:
            self._shard = edge.EdgeShard.load(str(self._path), _config(schema))
            if not self._path.with_suffix(".json").exists():
                shard_files.replace(self._path.with_suffix(".json"), {"schema": asdict(schema)})
            self._held = _held_by(self._shard)

    def _create(self, schema: IndexSchema, kept: Mapping[Path, IndexSchema]) -> None:
        """Make an empty shard under the next number, after removing what never became one."""
        old = [path for path in self._directory.iterdir() if path.is_dir() and path.name.isdigit()]
        for path in set(old) - set(kept):
            shutil.rmtree(path)
        path = self._directory / f"{max([0, *(int(each.name) for each in old)]) + 1:04d}"
        path.mkdir()
        shard = edge.EdgeShard.create(str(path), _config(schema))
        shard.update(edge.UpdateOperation.create_field_index("tenant", edge.KeywordIndexParams(is_tenant=True)))
        shard.update(edge.UpdateOperation.create_field_index("labels", edge.KeywordIndexParams()))
        shard.update(
            edge.UpdateOperation.create_field_index("generation", edge.IntegerIndexParams(lookup=True, range=False))
        )
        shard.flush()
        shard_files.replace(path.with_suffix(".json"), {"schema": asdict(schema)})
        self._shard, self._path = shard, path

    def _promote(self) -> None:
        self._opened()
        assert self._path
        assert self._schema
        named = {"shard": self._path.name, "schema": asdict(self._schema)}
        shard_files.replace(self._directory / shard_files.POINTER, named)

    def _upsert(self, points: Sequence[IndexPoint]) -> None:
        # Before any of them can be found.
        self._held = self._held.with_points(points)
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
        held = self._held
        answers = self._query(vectors, where, held, depth)
        if held != self._held:  # What nobody had before was written meanwhile: another tenant's, or what is for groups.
            answers = self._query(vectors, where, self._held, depth)
        legs = {
            name: [(int(hit.id), hit.score) for hit in hits] for (name, _), hits in zip(vectors, answers, strict=True)
        }
        return Legs(**legs)

    def _query(self, vectors: Sequence[tuple[str, Any]], where: IndexFilter, held: "_Held", depth: int) -> Any:
        condition, params = _condition(where, held), _term_weights(where, held)
        requests = [
            edge.QueryRequest(
                limit=depth,
                query=edge.Query.Nearest(vector, using=name),
                filter=condition,
                with_payload=False,
                params=params if name == "sparse" else None,
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
    except (IndexUnavailable, asyncio.CancelledError):
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


@dataclass(frozen=True, slots=True)
class _Held:
    """What is true of all points of a shard, and would cost a third of a search to find out again in each."""

    tenants: frozenset[str] = frozenset()
    """Every tenant that has points; with many it is enough to know of two."""
    is_restricted: bool = False
    """Whether any point is of a document that is for groups."""

    def with_points(self, points: Sequence[IndexPoint]) -> "_Held":
        """The same with these points."""
        tenants = self.tenants.union(point.tenant for point in points)
        return _Held(tenants, self.is_restricted or any(RESTRICTED in point.labels for point in points))

    def is_all_of(self, tenant: str) -> bool:
        """Whether no other tenant has a point."""
        return self.tenants <= {tenant}


def _held_by(shard: edge.EdgeShard) -> _Held:
    tenants = shard.facet(edge.FacetRequest("tenant", limit=2, exact=True))
    restricted = shard.count(edge.CountRequest(filter=edge.Filter(must=[_is_restricted()]), exact=True))
    return _Held(frozenset(str(hit.value) for hit in tenants), restricted > 0)


def _condition(where: IndexFilter, held: _Held) -> edge.Filter | None:
    """The filter as the shard has it, without what is true of every point."""
    must: list[Any] = [] if held.is_all_of(where.tenant) else [_is_of(where.tenant)]
    must += [edge.FieldCondition("labels", match=edge.MatchAny(list(labels))) for labels in where.alternatives]
    must_not: list[Any] = []
    if where.hidden:
        must_not.append(edge.FieldCondition("generation", match=edge.MatchAny(list(where.hidden))))
    if held.is_restricted and where.readable:
        readable = edge.FieldCondition("labels", match=edge.MatchAny(list(where.readable)))
        must.append(edge.Filter(should=[readable, edge.Filter(must_not=[_is_restricted()])]))
    elif held.is_restricted and where.readable is not None:
        must_not.append(_is_restricted())
    return edge.Filter(must=must, must_not=must_not) if must or must_not else None


def _term_weights(where: IndexFilter, held: _Held) -> edge.SearchParams | None:
    """Have a term weigh by how rare it is among the tenant's own points."""
    if held.is_all_of(where.tenant):
        return None
    return edge.SearchParams(idf=edge.IdfParams(corpus=edge.Filter(must=[_is_of(where.tenant)])))


def _is_of(tenant: str) -> edge.FieldCondition:
    return edge.FieldCondition("tenant", match=edge.MatchValue(tenant))


def _is_restricted() -> edge.FieldCondition:
    return edge.FieldCondition("labels", match=edge.MatchValue(RESTRICTED))


def _close(shard: edge.EdgeShard) -> None:
    try:
        shard.flush()
    finally:
        shard.close()


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (items[start : start + _BATCH_POINTS] for start in range(0, len(items), _BATCH_POINTS))
