"""A stand-in for a Qdrant server: the REST calls that `retrieval.qdrant` makes, answered by qdrant-client's local mode.

    async with fake_qdrant() as url:
        ...

No real server is at hand where these tests run. What is real here is the client, its bytes on a socket, and the shapes
of requests and answers, which are parsed and written with the client's own models.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel
from qdrant_client import AsyncQdrantClient, models
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.service import serving


class FakeQdrant:
    """The routes, over one database in memory."""

    def __init__(self, client: AsyncQdrantClient) -> None:
        self._client = client
        self.indexes: dict[str, dict[str, Any]] = {}
        """The fields that each collection has an index of, with the index as it was asked for."""
        self.strict: dict[str, models.StrictModeConfig] = {}
        self.app = Starlette(
            routes=[
                Route("/collections", self._list, methods=["GET"]),
                Route("/aliases", self._aliases, methods=["GET"]),
                Route("/collections/aliases", self._change_aliases, methods=["POST"]),
                Route("/collections/{name}", self._describe, methods=["GET"]),
                Route("/collections/{name}", self._create, methods=["PUT"]),
                Route("/collections/{name}", self._update, methods=["PATCH"]),
                Route("/collections/{name}", self._remove, methods=["DELETE"]),
                Route("/collections/{name}/index", self._index, methods=["PUT"]),
                Route("/collections/{name}/points", self._upsert, methods=["PUT"]),
                Route("/collections/{name}/points", self._retrieve, methods=["POST"]),
                Route("/collections/{name}/points/count", self._count, methods=["POST"]),
                Route("/collections/{name}/points/delete", self._delete, methods=["POST"]),
                Route("/collections/{name}/points/scroll", self._scroll, methods=["POST"]),
                Route("/collections/{name}/points/query/batch", self._query, methods=["POST"]),
            ],
            exception_handlers={ValueError: _refused},
        )

    async def _list(self, request: Request) -> Response:
        return _answer(await self._client.get_collections())

    async def _aliases(self, request: Request) -> Response:
        return _answer(await self._client.get_aliases())

    async def _change_aliases(self, request: Request) -> Response:
        wanted = models.ChangeAliasesOperation.model_validate_json(await request.body())
        return _answer(await self._client.update_collection_aliases(wanted.actions))

    async def _describe(self, request: Request) -> Response:
        return _answer(await self._client.get_collection(_name(request)))

    async def _create(self, request: Request) -> Response:
        wanted = models.CreateCollection.model_validate_json(await request.body())
        made = await self._client.create_collection(
            _name(request),
            vectors_config=wanted.vectors,
            sparse_vectors_config=wanted.sparse_vectors,
            metadata=wanted.metadata,
        )
        if wanted.strict_mode_config:
            self.strict[_name(request)] = wanted.strict_mode_config
        return _answer(made)

    async def _update(self, request: Request) -> Response:
        wanted = models.UpdateCollection.model_validate_json(await request.body())
        assert wanted.strict_mode_config, "nothing else is ever changed of a collection"
        self.strict[_name(request)] = wanted.strict_mode_config
        return _answer(True)

    async def _remove(self, request: Request) -> Response:
        return _answer(await self._client.delete_collection(_name(request)))

    async def _index(self, request: Request) -> Response:
        # Local mode searches without indexes, so that they are only noted.
        wanted = models.CreateFieldIndex.model_validate_json(await request.body())
        self.indexes.setdefault(_name(request), {})[wanted.field_name] = wanted.field_schema
        return _done()

    async def _upsert(self, request: Request) -> Response:
        wanted = models.PointsList.model_validate_json(await request.body())
        most = (await self._rules(request)).upsert_max_batchsize
        if most is not None and len(wanted.points) > most:
            raise ValueError(f"Strict mode: {most} points at once, not {len(wanted.points)}")
        await self._client.upsert(_name(request), wanted.points)
        return _done()

    async def _retrieve(self, request: Request) -> Response:
        wanted = models.PointRequest.model_validate_json(await request.body())
        found = await self._client.retrieve(
            _name(request), wanted.ids, with_payload=wanted.with_payload or False, with_vectors=wanted.with_vector
        )
        return _answer(found)

    async def _count(self, request: Request) -> Response:
        wanted = models.CountRequest.model_validate_json(await request.body())
        return _answer(await self._client.count(_name(request), wanted.filter))

    async def _delete(self, request: Request) -> Response:
        wanted = models.PointIdsList.model_validate_json(await request.body())
        await self._client.delete(_name(request), wanted)
        return _done()

    async def _scroll(self, request: Request) -> Response:
        wanted = models.ScrollRequest.model_validate_json(await request.body())
        await self._check(request, wanted.filter, wanted.limit)
        points, following = await self._client.scroll(
            _name(request), limit=wanted.limit or 10, offset=wanted.offset, with_payload=False
        )
        return _answer(models.ScrollResult(points=points, next_page_offset=following))

    async def _query(self, request: Request) -> Response:
        wanted = models.QueryRequestBatch.model_validate_json(await request.body())
        for search in wanted.searches:
            await self._check(request, search.filter, search.limit)
        return _answer(await self._client.query_batch_points(_name(request), wanted.searches))

    async def _rules(self, request: Request) -> models.StrictModeConfig:
        return self.strict.get(await self._collection(request)) or models.StrictModeConfig()

    async def _collection(self, request: Request) -> str:
        """The collection behind the name in a path, which may be an alias."""
        aliases = {each.alias_name: each.collection_name for each in (await self._client.get_aliases()).aliases}
        return aliases.get(_name(request), _name(request))

    async def _check(self, request: Request, condition: models.Filter | None, limit: int | None) -> None:
        """Refuse what strict mode does: a filter by a field without an index, and more than a page."""
        rules = await self._rules(request)
        if not rules.enabled:
            return
        if rules.max_query_limit is not None and (limit or 10) > rules.max_query_limit:
            raise ValueError(f"Strict mode: the limit {limit} is over {rules.max_query_limit}")
        missing = _fields(condition) - set(self.indexes.get(await self._collection(request), ()))
        if missing and rules.unindexed_filtering_retrieve is False:
            raise ValueError(f"Strict mode: there is no index of {', '.join(sorted(missing))}")


@asynccontextmanager
async def fake_qdrant() -> AsyncIterator[str]:
    """Serve an empty one on a free port of loopback; gives its address."""
    async with fake_qdrant_server() as (url, _):
        yield url


@asynccontextmanager
async def fake_qdrant_server() -> AsyncIterator[tuple[str, FakeQdrant]]:
    """The same, with the server itself to look into."""
    client = AsyncQdrantClient(":memory:")
    server = FakeQdrant(client)
    try:
        async with serving(server.app) as url:
            yield url, server
    finally:
        await client.close()


def _fields(condition: Any) -> set[str]:
    """The payload fields that a filter asks about, however deep."""
    if isinstance(condition, models.Filter):
        parts = [condition.must, condition.must_not, condition.should]
        return {
            field
            for part in parts
            if part is not None
            for each in (part if isinstance(part, list) else [part])
            for field in _fields(each)
        }
    return {condition.key} if isinstance(condition, models.FieldCondition) else set()


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _done() -> Response:
    return _answer(models.UpdateResult(operation_id=0, status=models.UpdateStatus.COMPLETED))


class _Envelope(BaseModel):
    result: Any
    status: str = "ok"
    time: float = 0.0


def _answer(result: Any) -> Response:
    return Response(_Envelope(result=result).model_dump_json(), media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    return JSONResponse({"status": {"error": str(error)}, "time": 0.0}, status_code=404)
