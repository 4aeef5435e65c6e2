"""Embedding what is ingested, in a process of its own that gives way to everything else on the machine.

The main rule: the process costs nothing while there is nothing to ingest. It is started when enough texts have come to
be worth loading a model for, and ended when none have come for a while. In the serving process the same work would hold
the interpreter's lock, and a core that questions wait for.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from time import monotonic

import msgspec
import numpy as np

from retrieval.caching import TextKind
from retrieval.children import Child, module_command
from retrieval.errors import EmbeddingFailed, IndexUnavailable
from retrieval.index import Vector
from retrieval.packing import Backend, Precision

_log = logging.getLogger(__name__)
WORTHWHILE_TEXTS = 32
"""Loading a model takes as long as embedding some hundred passages, but holds up nothing that is served."""
_PIECE_TEXTS = 64
"""Sent at once: about a second of MiniLM's, in which nothing else of the process's gets its turn."""
_ANSWER_SECONDS = 3600.0
"""Only what hangs takes as long: on a machine that is busy throughout, work of the lowest priority hardly gets on."""
_ENVELOPE_BYTES = 1024
_TRIES = 2
LEAST_COSINE = 0.99
"""Of one text's vectors by the same model in two processes; rounding, of eight bits too, leaves more."""
PROBE = "What is embedded in both processes must come out alike."


class Recipe(msgspec.Struct, frozen=True):
    """The first message: what the process is to embed with."""

    model: str
    threads: int
    precision: Precision = "auto"
    backend: Backend = "torch"


class Texts(msgspec.Struct, frozen=True):
    """Each further message."""

    texts: list[str]
    kind: TextKind


class Vectors(msgspec.Struct, frozen=True, tag=True):
    """The answer to either, to a recipe with the vector of `PROBE`: float32, one row after the other."""

    numbers: bytes


class Failure(msgspec.Struct, frozen=True, tag=True):
    """Why there are none."""

    message: str


class _Piece:
    """Texts that are embedded together, for one caller."""

    def __init__(self, texts: Sequence[str], kind: TextKind) -> None:
        self.count = len(texts)
        self.request = msgspec.msgpack.encode(Texts(list(texts), kind))
        self.done: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()


class EmbeddingProcess:
    """The process, and what waits for it; use it between `open` and `close`. The caller bounds what waits."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        idle_seconds: float = 60.0,
        command: Sequence[str] = module_command("retrieval.embedding_child"),
    ) -> None:
        self._recipe = recipe
        self._idle_seconds = idle_seconds
        self._command = command
        self._child: Child | None = None
        self._expected = np.empty(0, np.float32)
        self._waiting: deque[_Piece] = deque()
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._recent_texts = 0.0
        self._asked_at = 0.0

    @property
    def pid(self) -> int | None:
        """The process's id, while there is one."""
        return self._child.pid if self._child else None

    def open(self, expected: Vector) -> None:
        """Begin to take texts; the process is started by the first, and must make `expected` of `PROBE`."""
        self._expected = expected
        self._worker = asyncio.create_task(self._work(), name="embedding process")

    async def close(self) -> None:
        """End the process; what waits for it fails."""
        worker, self._worker = self._worker, None
        if worker:
            worker.cancel()
            await asyncio.wait([worker])
        while self._waiting:
            _fail(self._waiting.popleft(), IndexUnavailable("The embedder is closed."))

    def takes(self, texts: int) -> bool:
        """Whether so many more are worth a process, with those that came lately.

        Of these, half are forgotten in the time after which an idle process ends.
        """
        now = monotonic()
        self._recent_texts *= 0.5 ** ((now - self._asked_at) / self._idle_seconds)
        self._recent_texts += texts
        self._asked_at = now
        return self._recent_texts >= WORTHWHILE_TEXTS

    async def embed(self, texts: Sequence[str], kind: TextKind) -> Vector:
        """Embed at least one text; (n, dimension) float32, L2-normalised.

        Raises:
            IndexUnavailable: The process cannot load its model, or does not answer in time.
            EmbeddingFailed: It ended over these texts, and once more when it was started again.
        """
        if self._worker is None or self._worker.done():
            raise IndexUnavailable("The embedder is not open.")
        vectors = []
        for start in range(0, len(texts), _PIECE_TEXTS):
            piece = _Piece(texts[start : start + _PIECE_TEXTS], kind)
            self._waiting.append(piece)
            self._wake.set()
            vectors.append(await piece.done)
        return np.concatenate(vectors)

    async def _work(self) -> None:
        """Have piece after piece embedded; without any for a while, end the process."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._idle_seconds if self._child else None):
                        piece = await self._next()
                except TimeoutError:
                    _log.info("The process that embeds is idle and ends.")
                    await self._end()
                else:
                    await self._settle(piece)
        finally:
            await self._end()

    async def _next(self) -> _Piece:
        """The next piece whose caller still waits."""
        while True:
            while self._waiting:
                piece = self._waiting.popleft()
                if not piece.done.done():
                    return piece
            self._wake.clear()
            await self._wake.wait()

    async def _settle(self, piece: _Piece) -> None:
        try:
            vectors = await self._embedded(piece)
        except asyncio.CancelledError:
            _fail(piece, IndexUnavailable("The embedder is closed."))
            raise
        except (IndexUnavailable, EmbeddingFailed) as error:
            _fail(piece, error)
        else:
            if not piece.done.done():  # Its caller may have left meanwhile.
                piece.done.set_result(vectors)

    async def _embedded(self, piece: _Piece) -> Vector:
        for _ in range(_TRIES):
            try:
                if self._child is None:
                    await self._start()
                return await self._ask(piece.request, piece.count)
            except (EOFError, OSError, ValueError, msgspec.MsgspecError) as error:
                status = await self._end()
                _log.warning("The process that embeds ended with status %s (%s).", status, type(error).__name__)
        raise EmbeddingFailed(
            f"The process that embeds ended {_TRIES} times over the same {piece.count} passages: "
            "see that it has memory enough, then try the document again."
        )

    async def _start(self) -> None:
        self._child = await Child.start(self._command)
        _log.info("A process that embeds was started: %d.", self._child.pid)
        try:
            (made,) = await self._ask(msgspec.msgpack.encode(self._recipe), 1)
        except IndexUnavailable:
            await self._end()
            raise
        if made @ self._expected < LEAST_COSINE:
            await self._end()
            raise IndexUnavailable("The embedding model has changed since the service started: start it again.")

    async def _ask(self, request: bytes, count: int) -> Vector:
        """Exchange a message for so many vectors."""
        assert self._child
        dimension = len(self._expected)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                message = await self._child.exchange(request, count * dimension * 4 + _ENVELOPE_BYTES)
        except TimeoutError:
            await self._end()
            raise IndexUnavailable(f"The process that embeds did not answer within {_ANSWER_SECONDS:g} s.") from None
        answer = msgspec.msgpack.decode(message, type=Vectors | Failure)
        if isinstance(answer, Failure):
            raise IndexUnavailable(answer.message)
        return np.frombuffer(answer.numbers, np.float32).reshape(count, dimension)

    async def _end(self) -> int | None:
        child, self._child = self._child, None
        return await child.end() if child else None


def _fail(piece: _Piece, error: IndexUnavailable | EmbeddingFailed) -> None:
    if not piece.done.done():
        piece.done.set_exception(error)
