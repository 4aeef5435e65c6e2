"""A stand-in for servers of models: Text Embeddings Inference's `/info`, `/embed` and `/rerank`, and `/v1/embeddings`.

    async with fake_models() as (fake, url):
        fake.failures = [503, 503]

Vectors are those of the hashing embedder, a text's rank the share of the question's words it holds: so what comes over
the socket can be told to be right. The next answers are `failures` while there are any: a status, or what else to say.
"""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from retrieval.embedder import HashingEmbedder
from tests.service import serving


class FakeModels:
    """What it is asked, and what goes wrong."""

    def __init__(self, dimension: int = 16) -> None:
        self.model_id = "acme/embedder"
        self.max_batch = 32
        self.failures: list[int | Any] = []
        self.retry_after: str | None = None
        self.asked: list[tuple[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.hold: asyncio.Event | None = None
        self.most_at_once = 0
        self._at_once = 0
        self._embedder = HashingEmbedder(dimension)
        self.app = Starlette(
            routes=[
                Route("/info", self._info),
                Route("/embed", self._embed, methods=["POST"]),
                Route("/v1/embeddings", self._openai, methods=["POST"]),
                Route("/rerank", self._rerank, methods=["POST"]),
            ]
        )

    async def _info(self, request: Request) -> Response:
        return self._failed(request) or JSONResponse(
            {"model_id": self.model_id, "max_client_batch_size": self.max_batch, "version": "1.9"}
        )

    async def _embed(self, request: Request) -> Response:
        body = await self._begin(request)
        return self._failed(request) or JSONResponse(self._embedder.encode(body["inputs"], "query").tolist())

    async def _openai(self, request: Request) -> Response:
        body = await self._begin(request)
        rows = list(enumerate(self._embedder.encode(body["input"], "query").tolist()))
        # In whatever order: what counts is the index.
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in reversed(rows)]
        return self._failed(request) or JSONResponse({"object": "list", "data": data, "model": body["model"]})

    async def _rerank(self, request: Request) -> Response:
        body = await self._begin(request)
        words = set(re.findall(r"\w+", body["query"].lower()))
        ranks = [
            {"index": index, "score": len(words & set(re.findall(r"\w+", text.lower()))) / len(words)}
            for index, text in enumerate(body["texts"])
        ]
        return self._failed(request) or JSONResponse(sorted(ranks, key=lambda rank: -rank["score"]))

    async def _begin(self, request: Request) -> Any:
        body = await request.json()
        self.asked.append((request.url.path, body))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.hold is not None:
                await self.hold.wait()
        finally:
            self._at_once -= 1
        return body

    def _failed(self, request: Request) -> Response | None:
        self.tokens.add(request.headers.get("authorization"))
        if not self.failures:
            return None
        failure = self.failures.pop(0)
        if not isinstance(failure, int):
            return JSONResponse(failure)
        headers = {"retry-after": self.retry_after} if self.retry_after else None
        return JSONResponse({"error": "a secret text"}, failure, headers)


@asynccontextmanager
async def fake_models(dimension: int = 16) -> AsyncIterator[tuple[FakeModels, str]]:
    """Serve it on a free port of loopback until the block ends."""
    fake = FakeModels(dimension)
    async with serving(fake.app) as url:
        yield fake, url


@contextmanager
def fake_models_beside(dimension: int) -> Iterator[str]:
    """Serve it from a thread of its own, for what runs a loop in this one; gives the address."""
    started = threading.Event()
    facts: dict[str, Any] = {}

    async def serve() -> None:
        async with fake_models(dimension) as (_, url):
            facts.update(url=url, loop=asyncio.get_running_loop(), over=asyncio.Event())
            started.set()
            await facts["over"].wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(30)
    try:
        yield facts["url"]
    finally:
        facts["loop"].call_soon_threadsafe(facts["over"].set)
        thread.join()
