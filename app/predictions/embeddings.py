"""A question's embedding as it is kept with its prediction: written here and read here, and nowhere else.

The main rule: an embedding tells nearly as much as the question it was made of, and so is kept, dropped and guarded as
the question is. Vectors of different models cannot be compared, so that each says which model made it: eight bytes of
its id's digest, and then the numbers in half precision.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_MODEL_BYTES = 8
_HALF = np.dtype("<f2")

Vectors = NDArray[np.float32]


@lru_cache(maxsize=16)
def model_digest(model_id: str) -> bytes:
    """What vectors of a model begin with."""
    return blake2b(model_id.encode(), digest_size=_MODEL_BYTES).digest()


def pack(vector: Vectors, model_id: str) -> bytes:
    """Make bytes of a vector; two microseconds for one of 384 numbers, which become 776 bytes."""
    return model_digest(model_id) + vector.astype(_HALF).tobytes()


def model_of(packed: bytes) -> bytes:
    """The digest of the model that made a vector."""
    return packed[:_MODEL_BYTES]


def unpack(packed: Sequence[bytes]) -> Vectors:
    """Read vectors of one model, a row each; raises ValueError where they are of several, or no vectors."""
    if len({(model_of(each), len(each)) for each in packed}) > 1:
        raise ValueError("These embeddings are of several models: they cannot be compared.")
    joined = b"".join(each[_MODEL_BYTES:] for each in packed)
    return np.frombuffer(joined, _HALF).reshape(len(packed), -1).astype(np.float32)
