"""The process that embeds what is ingested: takes texts on its standard input, answers vectors on its standard output.

The main rule: it has the processor only while nothing else wants it. Run as `python -I -B -m
retrieval.embedding_child`; messages are MessagePack, the first a `Recipe`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np

from retrieval.batching import MAX_BATCH_TEXTS, MAX_BATCH_TOKENS, about_tokens
from retrieval.caching import TextKind
from retrieval.embedder import SentenceTransformerEmbedder
from retrieval.embedding_process import PROBE, Failure, Recipe, Texts, Vectors
from retrieval.errors import IndexUnavailable
from retrieval.index import Vector
from retrieval.pipes import end_with_parent, receive, send, take_pipes

_LOWEST_PRIORITY = 19


class Encoder(Protocol):
    """A model: `SentenceTransformerEmbedder`, or a test's stand-in."""

    def encode(self, texts: list[str], kind: TextKind) -> Vector:
        """Embed one batch."""
        ...


def serve(load: Callable[[Recipe], Encoder]) -> None:
    """Load the model that is asked for, and answer until the standard input ends."""
    end_with_parent()
    requests, answers = take_pipes()
    if (recipe := receive(requests)) is None:
        return
    try:
        encoder = load(msgspec.msgpack.decode(recipe, type=Recipe))
    except IndexUnavailable as error:
        send(answers, msgspec.msgpack.encode(Failure(str(error))))
        return
    message: bytes | None = msgspec.msgpack.encode(Texts([PROBE], "document"))
    while message is not None:
        send(answers, msgspec.msgpack.encode(_answer(encoder, msgspec.msgpack.decode(message, type=Texts))))
        message = receive(requests)


def give_way() -> None:
    """Run when nothing else does, where the system has such a thing; else with the least share there is."""
    os.nice(_LOWEST_PRIORITY)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _answer(encoder: Encoder, asked: Texts) -> Vectors | Failure:
    vectors: dict[int, Vector] = {}
    try:
        for batch in _batches(asked.texts):
            made = encoder.encode([asked.texts[i] for i in batch], asked.kind)
            vectors |= zip(batch, made, strict=True)
    except Exception as error:  # noqa: BLE001 - the process's outermost edge: a model may raise anything over a text.
        return Failure(f"The embedding model failed: {type(error).__name__}.")
    rows = np.stack([vectors[i] for i in range(len(asked.texts))])
    return Vectors(np.ascontiguousarray(rows, np.float32).tobytes())


def _batches(texts: list[str]) -> Iterator[list[int]]:
    """Texts of like length in batches that fit the processor's caches, so that little of each is padding."""
    batch: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if batch and (len(batch) == MAX_BATCH_TEXTS or about_tokens(texts[i]) * (len(batch) + 1) > MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    yield batch


def load(recipe: Recipe) -> SentenceTransformerEmbedder:
    """Load the service's model in a process that has imported no torch yet."""
    # What the libraries read when they are imported: threads that spin while they wait take the time that we leave.
    os.environ.update(  # noqa: TID251 - not configuration read but handed to libraries, which offer no other way.
        OMP_NUM_THREADS=str(recipe.threads),
        OMP_WAIT_POLICY="PASSIVE",
        GOMP_SPINCOUNT="0",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",  # The service has just loaded the same.
    )
    embedder = SentenceTransformerEmbedder(
        recipe.model, threads=recipe.threads, precision=recipe.precision, backend=recipe.backend
    )
    embedder.load()
    return embedder


if __name__ == "__main__":
    give_way()
    serve(load)
