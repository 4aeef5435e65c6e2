"""The content of a prediction under the key of its subject, and back.

The main rule: what was said goes whole into one sealed column; of passages and citations the numbers and ids stay in
the open beside it, so that figures and lineage need no key. It opens in its own row only.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from uuid import UUID

import msgspec

from app.privacy.sealing import CannotOpen, DataKey

SEALED = (
    "metadata",
    "passages",
    "citations",
    "tool_calls",
    "request",
    "messages",
    "question",
    "answer",
    "features",
)
"""The columns whose content is sealed together, as their text in the row; the embedding is sealed by itself."""

_DAY = 10  # Characters of an ISO date.


class Keys(Protocol):
    """Opens what was sealed: the keys there are of those asked for, by id."""

    async def opening(self, ids: Sequence[str]) -> Mapping[str, DataKey]:
        """Give the keys that are there; one that is not was destroyed.

        Raises:
            CannotOpen: a key is there and its master key is not.
            Unavailable: where the keys are does not answer.
        """
        ...


def subject_of(user: str | None, conversation: str | None, created_at: str) -> str:
    """Say whose a prediction is: the user's, else the conversation's; without either it shares a key with its day."""
    if user is not None:
        return user
    return f"conversation:{conversation}" if conversation else f"day:{created_at[:_DAY]}"


def seal(tenant: str, prediction_id: str, content: Mapping[str, Any], key: DataKey) -> bytes:
    """Seal the columns of a row."""
    return key.seal(msgspec.msgpack.encode(content), _context(tenant, prediction_id))


def seal_embedding(tenant: str, prediction_id: str, packed: bytes, key: DataKey) -> bytes:
    """Seal a question's embedding: apart from the rest, so that it can be let go of before that, and without a key."""
    return key.seal(packed, _EMBEDDING + _context(tenant, prediction_id))


def unseal(tenant: str, prediction_id: str, sealed: bytes, key: DataKey) -> dict[str, Any]:
    """Give the columns that `seal` was given.

    Raises:
        CannotOpen: it is another row's, or was changed.
    """
    content: dict[str, Any] = msgspec.msgpack.decode(key.open(sealed, _context(tenant, prediction_id)))
    return content


def opened(facts: dict[str, Any], keys: Mapping[str, DataKey] | None) -> dict[str, Any]:
    """A row's columns with its content in place, or `erased` where its key is gone; without keys it is `unreadable`."""
    sealed, embedding = facts["sealed"], facts.get("question_embedding")
    if sealed is None:
        return facts
    closed = facts | {"sealed": None, "question_embedding": None}
    if keys is None:
        return closed | {"kept": "unreadable"}
    key = keys.get(facts["subject_key"])
    if key is None:
        return closed | {"kept": "erased"}
    whose = (facts["tenant"], facts["id"])
    try:
        content = unseal(*whose, bytes(sealed), key)
        if embedding is not None:
            content["question_embedding"] = key.open(bytes(embedding), _EMBEDDING + _context(*whose))
    except CannotOpen:
        return closed | {"kept": "unreadable"}
    return closed | content


_EMBEDDING = b"question embedding\0"


def _context(tenant: str, prediction_id: str) -> bytes:
    return UUID(prediction_id).bytes + tenant.encode(errors="surrogatepass")
