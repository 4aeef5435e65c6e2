"""Vectors of texts that were embedded before, in memory only.

The main rule: no text is kept. A vector is found by a digest of its text under a key that this process made up, so what
is here says nothing about what was asked to whoever cannot ask it again.
"""

import secrets
from collections import OrderedDict
from hashlib import blake2b
from typing import Literal

from retrieval.index import Vector

TextKind = Literal["query", "document"]
_DIGEST_BYTES = 16


class VectorCache:
    """The vectors of one model, up to `size` of them; the one that was not asked for the longest goes first.

    `hits` and `misses` count texts. It belongs to the event loop's thread.
    """

    def __init__(self, size: int) -> None:
        self.hits = 0
        self.misses = 0
        self._size = size
        self._key = secrets.token_bytes(32)
        self._vectors: OrderedDict[bytes, Vector] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, kind: TextKind, text: str) -> Vector | None:
        """Find a text's vector."""
        if not self._size:
            return None
        digest = self._digest(kind, text)
        vector = self._vectors.get(digest)
        if vector is None:
            self.misses += 1
        else:
            self.hits += 1
            self._vectors.move_to_end(digest)
        return vector

    def put(self, kind: TextKind, text: str, vector: Vector) -> None:
        """Keep a text's vector, a copy: what it is a row of may be large."""
        if not self._size:
            return
        self._vectors[self._digest(kind, text)] = vector.copy()
        while len(self._vectors) > self._size:
            self._vectors.popitem(last=False)

    def _digest(self, kind: TextKind, text: str) -> bytes:
        content = kind.encode() + text.encode("utf-8", "surrogatepass")
        return blake2b(content, digest_size=_DIGEST_BYTES, key=self._key).digest()
