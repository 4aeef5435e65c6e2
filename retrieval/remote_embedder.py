"""The embedder on a server: Text Embeddings Inference by `/embed`, or anything with OpenAI's `/v1/embeddings`.

The main rule: what a server answers is looked at before it counts - as many vectors as texts, of the dimension it began
with, each of them finite and not zero - since a wrong vector in the index is found by nobody.
"""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
import numpy as np

from retrieval.caching import TextKind, VectorCache
from retrieval.embedder import count_packaged_tokens
from retrieval.errors import IndexUnavailable
from retrieval.index import Vector
from retrieval.remote import RemoteModel

Dialect = Literal["tei", "openai"]

_BATCH_TEXTS = 32
"""What TEI takes in a call unless told otherwise (`--max-client-batch-size`)."""
_BULK_CALLS = 4
MAX_WAITING_TEXTS = 4096


class _Info(msgspec.Struct):
    """What TEI says of itself; a router that serves a reranker has another `model_type`."""

    model_id: str
    max_client_batch_size: int = _BATCH_TEXTS


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


class RemoteEmbedder:
    """An `Embedder` on a server. `model` must be given for OpenAI's API; TEI is asked, and refused if it has another.

    Tokens are counted by the packaged model's tokenizer, as a guess: passages are cut by it.
    """

    def __init__(
        self,
        url: str,
        *,
        dialect: Dialect = "tei",
        model: str | None = None,
        token: str | None = None,
        timeout_seconds: float = 5.0,
        retries: int = 2,
        cache_size: int = 4096,
        max_waiting_texts: int = MAX_WAITING_TEXTS,
    ) -> None:
        self.model_id = model or ""
        self.cache = VectorCache(cache_size)
        self._dialect = dialect
        self._server = RemoteModel(
            url, what="embedding server", token=token, timeout_seconds=timeout_seconds, retries=retries
        )
        self._bulk = asyncio.Semaphore(_BULK_CALLS)
        self._batch_texts = _BATCH_TEXTS
        self._max_waiting_texts = max_waiting_texts
        self._waiting_texts = 0
        self._dimension = 0

    @property
    def dimension(self) -> int:
        """Numbers per vector; 0 until open."""
        return self._dimension

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        try:
            await self._meet()
        except BaseException:
            await self._server.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.__aexit__(kind, error, trace)

    async def _meet(self) -> None:
        """Ask the server which model it has, and for a first vector."""
        if self._dialect == "tei":
            info = await self._server.call("/info", None, _Info)
            if self.model_id and self.model_id != info.model_id:
                raise self._server.wrong(f"it serves {info.model_id!r} and the settings say {self.model_id!r}")
            self.model_id = info.model_id
            self._batch_texts = max(1, min(_BATCH_TEXTS, info.max_client_batch_size))
        elif not self.model_id:
            raise self._server.wrong("OpenAI's API needs the name of an embedding model")
        self._dimension = (await self._embed(["a first text"])).shape[1]

    async def embed(self, texts: Sequence[str], kind: TextKind, *, bulk: bool = False) -> Vector:
        """See `Embedder.embed`. Vectors of texts that are not bulk are cached."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        found = {} if bulk else {text: vector for text in texts if (vector := self.cache.get(kind, text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if self._waiting_texts + len(missing) > self._max_waiting_texts and self._waiting_texts:
            raise IndexUnavailable(f"The embedder has {self._waiting_texts} texts waiting; try again in a moment.")
        self._waiting_texts += len(missing)
        try:
            starts = range(0, len(missing), self._batch_texts)
            work = [self._one(missing[start : start + self._batch_texts], bulk) for start in starts]
            made = [vector for vectors in await asyncio.gather(*work) for vector in vectors]
        finally:
            self._waiting_texts -= len(missing)
        for text, vector in zip(missing, made, strict=True):
            found[text] = vector
            if not bulk:
                self.cache.put(kind, text, vector)
        return np.stack([found[text] for text in texts])

    async def _one(self, texts: list[str], bulk: bool) -> Vector:
        if not bulk:
            return await self._embed(texts)
        async with self._bulk:
            return await self._embed(texts)

    async def _embed(self, texts: list[str]) -> Vector:
        rows: list[list[float]]
        if self._dialect == "tei":
            body: dict[str, Any] = {"inputs": texts, "normalize": True, "truncate": True}
            rows = await self._server.call("/embed", body, list[list[float]])
        else:
            body = {"model": self.model_id, "input": texts, "encoding_format": "float"}
            answer = await self._server.call("/v1/embeddings", body, _Embeddings)
            rows = [each.embedding for each in sorted(answer.data, key=lambda each: each.index)]
        return self._checked(rows, len(texts))

    def _checked(self, rows: list[list[float]], count: int) -> Vector:
        if len(rows) != count:
            raise self._server.wrong(f"it made {len(rows)} vectors of {count} texts")
        sizes = {len(row) for row in rows}
        if len(sizes) != 1 or 0 in sizes or (self._dimension and sizes != {self._dimension}):
            raise self._server.wrong(
                f"its vectors have {sorted(sizes)} numbers, and had {self._dimension or 'as many'}"
            )
        vectors = np.asarray(rows, np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise self._server.wrong("a vector of it has no length")
        normalised: Vector = vectors / lengths
        return normalised

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the packaged model's tokens per text, special tokens left out; safe on any thread."""
        return count_packaged_tokens(texts)
