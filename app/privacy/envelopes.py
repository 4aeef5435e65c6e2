"""Short content sealed in its own column, in an envelope that names the key it opens with.

The main rule: an envelope stands where the content would, so that whether there is any can be asked without a key, and
it can be copied from row to row. It opens in its own context only.
"""

import base64
import binascii
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from app.privacy.sealing import CannotOpen, DataKey

_MARK = "\x1fsealed:"
"""No text that people write begins with a control character."""


class Ring(Protocol):
    """Gives the keys of subjects, to seal by and to open with."""

    async def sealing(self, tenant: str, subjects: Sequence[str]) -> Mapping[str, DataKey]:
        """Give the key of each of these subjects, made if there is none; it is on the disk then. Raises Unavailable."""
        ...

    async def opening(self, ids: Sequence[str]) -> Mapping[str, DataKey]:
        """Give those there are of these keys; raises CannotOpen or Unavailable."""
        ...

    async def holding(self, connection: AsyncConnection, ids: Sequence[str]) -> Collection[str]:
        """Those there are of these keys, which stay until the transaction that writes ends. Raises Unavailable."""
        ...


def enclose(content: bytes, key: DataKey, context: bytes) -> str:
    """Seal content."""
    return f"{_MARK}{key.id}:{base64.b64encode(key.seal(content, context)).decode()}"


def is_sealed(held: str | bytes | None) -> bool:
    """Whether what a column holds is an envelope."""
    if held is None:
        return False
    return held.startswith(_MARK) if isinstance(held, str) else bytes(held[: len(_MARK)]) == _MARK.encode()


def disclose(held: str, keys: Mapping[str, DataKey], context: bytes) -> bytes | None:
    """What an envelope has in it; None where its key was destroyed, or it is of another place."""
    key_id, _, sealed = held.removeprefix(_MARK).partition(":")
    key = keys.get(key_id)
    try:
        return key.open(base64.b64decode(sealed, validate=True), context) if key is not None else None
    except (CannotOpen, binascii.Error):
        return None


async def keys_for(ring: Ring | None, held: Iterable[str | bytes | None]) -> Mapping[str, DataKey]:
    """The keys there are for these columns; none where the process has no keys.

    Raises:
        Unavailable: where the keys are does not answer.
    """
    ids = _key_ids(held)
    if ring is None or not ids:
        return {}
    try:
        return await ring.opening(ids)
    except CannotOpen:
        return {}


async def can_open(ring: Ring | None, connection: AsyncConnection, held: Iterable[str | bytes | None]) -> bool:
    """Whether the keys of these columns are still there; then, and then only, they may be written by the transaction.

    If not, they are to be sealed again, in the same transaction: no key goes before it ends.

    Raises:
        Unavailable: where the keys are does not answer.
    """
    return await are_there(ring, connection, _key_ids(held))


async def are_there(ring: Ring | None, connection: AsyncConnection, ids: Sequence[str]) -> bool:
    """Whether these keys still are, so that the transaction may write what they seal; says and raises as `can_open`."""
    return ring is None or not ids or len(await ring.holding(connection, ids)) == len(ids)


def key_mark(key_id: str) -> str:
    """What an envelope that a key opens has in it, wherever it is written, in JSON too."""
    return f"sealed:{key_id}:"


def _key_ids(held: Iterable[str | bytes | None]) -> list[str]:
    texts = (
        each if isinstance(each, str) else bytes(each).decode("ascii") for each in held if each and is_sealed(each)
    )
    return sorted({text.removeprefix(_MARK).partition(":")[0] for text in texts})
