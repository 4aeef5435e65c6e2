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
        self.app = Starlette(
            routes=[
                Route("/aliases", self._aliases, methods=["GET"]),
                Route("/collections/aliases", self._change_aliases, methods=["POST"]),
                Route("/collections/{name}", self._describe, methods=["GET"]),
                Route("/collections/{name}", self._create, methods=["PUT"]),
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
        return _answer(made)

    async def _remove(self, request: Request) -> Response:
        return _answer(await self._client.delete_collection(_name(request)))

    async def _index(self, request: Request) -> Response:
        models.CreateFieldIndex.model_validate_json(await request.body())  # Local mode searches without indexes.
        return _done()

    async def _upsert(self, request: Request) -> Response:
        wanted = models.PointsList.model_validate_json(await request.body())
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
        points, following = await self._client.scroll(
            _name(request), limit=wanted.limit or 10, offset=wanted.offset, with_payload=False
        )
        return _answer(models.ScrollResult(points=points, next_page_offset=following))

    async def _query(self, request: Request) -> Response:
        wanted = models.QueryRequestBatch.model_validate_json(await request.body())
        return _answer(await self._client.query_batch_points(_name(request), wanted.searches))


@asynccontextmanager
async def fake_qdrant() -> AsyncIterator[str]:
    """Serve an empty one on a free port of loopback; gives its address."""
    client = AsyncQdrantClient(":memory:")
    try:
        async with serving(FakeQdrant(client).app) as url:
            yield url
    finally:
        await client.close()


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
