"""The same index on a Qdrant server.

The main rule: a collection belongs to one schema, kept in its metadata, and is written and searched by its own name, so
that no search meets another one's vectors. The alias names the live one, and is moved in one step. A server that hangs
costs some callers a moment, and the others nothing.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from time import monotonic
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from retrieval.errors import IndexUnavailable
from retrieval.index import IndexPoint, IndexSchema, Legs, SparseVector, Vector, point_key
from retrieval.scoping import RESTRICTED, IndexFilter

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_BATCH_POINTS = 128
_PAUSE_SECONDS = 1.0
_PAGE_POINTS = 10_000
MEMORY = ":memory:"

_STRICT = models.StrictModeConfig(
    enabled=True,
    unindexed_filtering_retrieve=False,
    unindexed_filtering_update=False,
    max_query_limit=_PAGE_POINTS,
    upsert_max_batchsize=_BATCH_POINTS,
)
"""Has the server refuse what this never asks: a collection that has lost the index by which tenants are told apart
would be searched point by point without anybody noticing."""


class QdrantIndex:
    """An `Index` on the server at `url`; `:memory:` is qdrant-client's own imitation of one, for tests.

    A client that is passed in is used as it is and left open. `search_seconds` is the longest wait for a search,
    `timeout_seconds` for a step of any other call.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        alias: str = "hallmark",
        timeout_seconds: int = 10,
        search_seconds: float = 2.0,
        client: AsyncQdrantClient | None = None,
    ) -> None:
        self._url = url
        self._api_key = api_key
        self._alias = alias
        self._timeout_seconds = timeout_seconds
        self._search_seconds = search_seconds
        self._breaker = _Breaker(url)
        self._given = client
        self._client: AsyncQdrantClient | None = None
        self._collection: str | None = None

    async def open(self, schema: IndexSchema) -> None:
        """See `Index.open`."""
        async with self._calling(connect=True) as client:
            self._collection = await self._find(client, schema) or await self._create(client, schema)
            if self._url != MEMORY:
                await self._create_payload_indexes(client, self._collection)
                await client.update_collection(self._collection, strict_mode_config=_STRICT)  # Older ones have none.

    def beside(self) -> "QdrantIndex":
        """See `Index.beside`."""
        return QdrantIndex(
            self._url,
            api_key=self._api_key,
            alias=self._alias,
            timeout_seconds=self._timeout_seconds,
            search_seconds=self._search_seconds,
            client=self._given,
        )

    async def named(self) -> Mapping[str, Any] | None:
        """See `Index.named`."""
        async with self._calling(connect=True) as client:
            current = await self._current(client)
            return await _stored_schema(client, current) if current else None

    async def promote(self) -> None:
        """See `Index.promote`."""
        async with self._calling() as client:
            current = await self._current(client)
            if current == self._collection:
                return
            create = models.CreateAlias(collection_name=self._opened(), alias_name=self._alias)
            actions: list[Any] = [models.CreateAliasOperation(create_alias=create)]
            if current:
                delete = models.DeleteAlias(alias_name=self._alias)
                actions.insert(0, models.DeleteAliasOperation(delete_alias=delete))
            await client.update_collection_aliases(actions)

    async def drop(self) -> None:
        """See `Index.drop`."""
        async with self._calling() as client:
            await client.delete_collection(self._opened())
        await self.close()

    async def close(self) -> None:
        """See `Index.close`."""
        client, self._client, self._collection = self._client, None, None
        if client is not None and client is not self._given:
            await client.close()

    async def check(self) -> None:
        """See `Index.check`."""
        async with self._calling() as client:
            await client.count(self._opened(), exact=False)

    async def upsert(self, points: Sequence[IndexPoint]) -> None:
        """See `Index.upsert`."""
        async with self._calling() as client:
            for batch in _batches(points):
                await client.upsert(self._opened(), [_native_point(point) for point in batch], wait=True)

    async def delete(self, ids: Sequence[int]) -> None:
        """See `Index.delete`."""
        async with self._calling() as client:
            for batch in _batches(ids):
                await client.delete(self._opened(), models.PointIdsList(points=[*batch]), wait=True)

    async def search(
        self, where: IndexFilter, *, dense: Vector | None, sparse: SparseVector | None, depth: int
    ) -> Legs:
        """See `Index.search`."""
        vectors: list[tuple[str, Any]] = []
        if dense is not None:
            vectors.append(("dense", dense.tolist()))
        if sparse is not None and sparse.indices:
            vectors.append(("sparse", models.SparseVector(indices=sparse.indices, values=sparse.values)))
        if not vectors:
            return Legs()
        condition = _condition(where)
        # A term weighs by how rare it is among the tenant's own points.
        own = models.SearchParams(idf=models.IdfCorpusParams(corpus=models.Filter(must=[_is_of(where.tenant)])))
        requests = [
            models.QueryRequest(
                query=vector,
                using=name,
                filter=condition,
                limit=depth,
                with_payload=False,
                params=own if name == "sparse" else None,
            )
            for name, vector in vectors
        ]
        async with self._calling() as client, asyncio.timeout(self._search_seconds):
            answers = await client.query_batch_points(self._opened(), requests)
        legs = {
            name: [(int(point.id), point.score) for point in answer.points]
            for (name, _), answer in zip(vectors, answers, strict=True)
        }
        return Legs(**legs)

    async def ids(self) -> list[int]:
        """See `Index.ids`."""
        found: list[int] = []
        offset: Any = None
        async with self._calling() as client:
            while True:
                records, offset = await client.scroll(
                    self._opened(), limit=_PAGE_POINTS, offset=offset, with_payload=False, with_vectors=False
                )
                found += [int(record.id) for record in records]
                if offset is None:
                    return found

    async def vectors(self, ids: Sequence[int]) -> dict[int, Vector]:
        """See `Index.vectors`."""
        found: dict[int, Vector] = {}
        async with self._calling() as client:
            for batch in _batches(ids):
                for record in await client.retrieve(
                    self._opened(), [*batch], with_payload=False, with_vectors=["dense"]
                ):
                    vector: Any = record.vector
                    found[int(record.id)] = np.asarray(vector["dense"], np.float32)
        return found

    def _connect(self) -> AsyncQdrantClient:
        if self._url == MEMORY:
            return AsyncQdrantClient(MEMORY)
        # The version check would be a blocking request on the event loop.
        return AsyncQdrantClient(
            url=self._url, api_key=self._api_key, timeout=self._timeout_seconds, check_compatibility=False
        )

    @asynccontextmanager
    async def _calling(self, *, connect: bool = False) -> AsyncIterator[AsyncQdrantClient]:
        """Give the client, and turn what it raises into our errors."""
        if self._client is None and connect:
            self._client = self._given or self._connect()
        if self._client is None:
            raise IndexUnavailable("The index is not open.")
        self._breaker.admit()
        try:
            yield self._client
        except (ApiException, QdrantException, OSError, ValueError) as error:
            if not _is_refusal(error):
                self._breaker.failed(error)
            raise IndexUnavailable(f"The Qdrant server at {self._url} failed: {type(error).__name__}.") from error
        self._breaker.answered()

    def _opened(self) -> str:
        if self._collection is None:
            raise IndexUnavailable("The index is not open.")
        return self._collection

    async def _current(self, client: AsyncQdrantClient) -> str | None:
        aliases = (await client.get_aliases()).aliases
        return next((alias.collection_name for alias in aliases if alias.alias_name == self._alias), None)

    async def _find(self, client: AsyncQdrantClient, schema: IndexSchema) -> str | None:
        """The collection of a schema, if there is one."""
        for each in (await client.get_collections()).collections:
            if each.name.startswith(f"{self._alias}-"):
                stored = await _stored_schema(client, each.name)
                if stored and IndexSchema.of(stored) == schema:
                    return each.name
        return None

    async def _create(self, client: AsyncQdrantClient, schema: IndexSchema) -> str:
        name = f"{self._alias}-{schema.index_version}-{uuid4().hex[:4]}"
        await client.create_collection(
            name,
            vectors_config={
                "dense": models.VectorParams(
                    size=schema.dimension, distance=models.Distance.COSINE, datatype=models.Datatype.FLOAT16
                )
            },
            sparse_vectors_config={"sparse": models.SparseVectorParams(modifier=models.Modifier.IDF)},
            metadata={"schema": asdict(schema)},
            strict_mode_config=_STRICT if self._url != MEMORY else None,
        )
        return name

    async def _create_payload_indexes(self, client: AsyncQdrantClient, name: str) -> None:
        keyword, integer = models.KeywordIndexType.KEYWORD, models.IntegerIndexType.INTEGER
        tenant = models.KeywordIndexParams(type=keyword, is_tenant=True)
        generation = models.IntegerIndexParams(type=integer, lookup=True, range=False)
        await client.create_payload_index(name, "tenant", tenant, wait=True)
        await client.create_payload_index(name, "labels", models.KeywordIndexParams(type=keyword), wait=True)
        await client.create_payload_index(name, "generation", generation, wait=True)


class _Breaker:
    """Keeps callers from waiting, one by one, for a server that just did not answer: one a second is let through."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_open = False
        self._next_at = 0.0

    def admit(self) -> None:
        """Let a call through, or raise IndexUnavailable at once."""
        now = monotonic()
        if self._is_open:
            if now < self._next_at:
                raise IndexUnavailable(f"The Qdrant server at {self._url} did not answer a moment ago.")
            self._next_at = now + _PAUSE_SECONDS

    def failed(self, error: Exception) -> None:
        """A call was not answered, or not by a Qdrant server that is well."""
        if not self._is_open:
            _log.warning("The Qdrant server at %s does not answer: %s: %s", self._url, type(error).__name__, error)
        self._is_open = True
        self._next_at = monotonic() + _PAUSE_SECONDS

    def answered(self) -> None:
        """A call was answered."""
        if self._is_open:
            _log.warning("The Qdrant server at %s answers again", self._url)
        self._is_open = False


def _is_refusal(error: Exception) -> bool:
    """Whether this is the answer of a server that is well: to a call that it finds wrong."""
    return isinstance(error, UnexpectedResponse) and error.status_code is not None and error.status_code < 500


async def _stored_schema(client: AsyncQdrantClient, collection: str) -> dict[str, Any]:
    config = (await client.get_collection(collection)).config
    schema: dict[str, Any] = (config.metadata or {}).get("schema", {})
    return schema


def _native_point(point: IndexPoint) -> models.PointStruct:
    vector: dict[str, Any] = {"dense": point.dense.tolist()}
    if point.sparse.indices:
        vector["sparse"] = models.SparseVector(indices=point.sparse.indices, values=point.sparse.values)
    generation, _ = point_key(point.id)
    payload = {"tenant": point.tenant, "generation": generation, "labels": list(point.labels)}
    return models.PointStruct(id=point.id, vector=vector, payload=payload)


def _condition(where: IndexFilter) -> models.Filter:
    must: list[Any] = [_is_of(where.tenant)]
    must += [
        models.FieldCondition(key="labels", match=models.MatchAny(any=list(labels))) for labels in where.alternatives
    ]
    must_not: list[Any] = []
    if where.hidden:
        must_not.append(models.FieldCondition(key="generation", match=models.MatchAny(any=list(where.hidden))))
    restricted = models.FieldCondition(key="labels", match=models.MatchValue(value=RESTRICTED))
    if where.readable:
        readable = models.FieldCondition(key="labels", match=models.MatchAny(any=list(where.readable)))
        must.append(models.Filter(should=[readable, models.Filter(must_not=[restricted])]))
    elif where.readable is not None:
        must_not.append(restricted)
    return models.Filter(must=must, must_not=must_not or None)


def _is_of(tenant: str) -> models.FieldCondition:
    return models.FieldCondition(key="tenant", match=models.MatchValue(value=tenant))


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (items[start : start + _BATCH_POINTS] for start in range(0, len(items), _BATCH_POINTS))
