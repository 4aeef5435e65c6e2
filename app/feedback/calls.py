"""Pure: one call that says something, and what the state is after it.

Every column that a call may set is a register of its own: the latest word wins, by the time it was said, and of two
words of one moment the one with the larger digest. The larger of two stamps is the same in whatever order they come and
however often, and so is the state. A call without a time of its own is the latest word when it arrives.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any
from uuid import UUID

import msgspec

from app.errors import InvalidRequest
from app.predictions import uuid7

Row = dict[str, Any]
"""A revision by its columns, without the number of its row."""

Stamp = tuple[int, str]
"""When something was said, in milliseconds since 1970, and the digest of the call that said it."""

_NEVER: Stamp = (-(2**63), "")
_ALL = ""
"""Stands among the stamps for every column that has none of its own."""
_decode_stamps = msgspec.json.Decoder(dict[str, Stamp]).decode


class Speaker(msgspec.Struct, frozen=True, kw_only=True):
    """On whose behalf something is said."""

    tenant: str
    key_id: str
    user: str | None = None
    """Whom the key's owner names as the author; by default it is the key itself."""
    is_admin: bool = False
    """Whether what others said may be changed."""

    @property
    def author(self) -> str:
        """The name that an author goes by in the tables."""
        return self.user if self.user is not None else f"{KEY_PREFIX}{self.key_id}"


def canonical_id(prediction_id: str) -> str:
    """The one way to write the id of a prediction; raises InvalidRequest if it is none."""
    try:
        return str(UUID(prediction_id))
    except ValueError:
        raise InvalidRequest(f"`prediction_id`: {prediction_id[:64]!r} is no UUID.", param="prediction_id") from None


KEY_PREFIX = "key:"
"""How the author begins where nobody was named."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call, ready to be written."""

    tenant: str
    key_id: str
    identity: Mapping[str, Any]
    """The columns that never change: what it is about, and whose it is."""
    says: Mapping[str, Any]
    """The columns it sets."""
    slot: bytes
    digest: bytes
    said_at: int | None
    idempotency_key: str | None
    is_whole: bool
    """Whether it says all that can be said, so that the columns hold its words if they hold any of them."""


def call(
    speaker: Speaker,
    identity: Mapping[str, Any],
    says: Mapping[str, Any],
    *,
    said_at: int | None = None,
    idempotency_key: str | None = None,
    is_whole: bool = True,
    slot: bytes | None = None,
) -> Call:
    """Make a call; one that says when it was said is known again without an idempotency key.

    One about what is there brings that row's `slot`: it no longer follows from the identity once a name was erased.
    """
    about = [speaker.tenant, *identity.values()]
    digest = _digest([about, sorted(says.items()), said_at])
    if idempotency_key is None and said_at is not None:
        idempotency_key = own_key(digest)
    return Call(
        tenant=speaker.tenant,
        key_id=speaker.key_id,
        identity=identity,
        says=says,
        slot=_digest(about) if slot is None else slot,
        digest=digest,
        said_at=said_at,
        idempotency_key=idempotency_key,
        is_whole=is_whole,
    )


_OWN_PREFIX = "said "
"""No caller's key has a space in it."""


def own_key(digest: bytes) -> str:
    """The idempotency key of a call that has none from its caller, and is known by what it says and when."""
    return f"{_OWN_PREFIX}{digest.hex()}"


def callers_key(idempotency_key: str | None) -> str | None:
    """The idempotency key if the caller chose it."""
    return None if idempotency_key is None or idempotency_key.startswith(_OWN_PREFIX) else idempotency_key


def revised(before: Row | None, call: Call, *, blank: Row, now: int) -> Row:
    """The revision that follows `before` when `call` is taken in; `blank` is a row in which nothing is said."""
    stamps = _decode_stamps(before["stamps"]) if before else {}
    said_at = call.said_at if call.said_at is not None else max(now, newest(stamps) + 1)
    stamp = (said_at, call.digest.hex())
    all_said = stamps.get(_ALL, _NEVER)
    heard = {name: value for name, value in call.says.items() if stamp >= stamps.get(name, all_said)}
    if call.is_whole and stamp >= all_said:
        stamps = {name: each for name, each in stamps.items() if each > stamp} | {_ALL: stamp}
    else:
        stamps |= dict.fromkeys(heard, stamp)
    start = before or {**blank, "id": uuid7(), "revision": 0, "tenant": call.tenant, "slot": call.slot, **call.identity}
    is_plain = call.is_whole and len(heard) == len(call.says)
    return {
        **start,
        **heard,
        "revision": start["revision"] + 1,
        "key_id": call.key_id,
        "at": now,
        "said_at": said_at,
        "digest": call.digest,
        "idempotency_key": call.idempotency_key,
        "stamps": msgspec.json.encode(stamps).decode(),
        "said": None if is_plain else msgspec.json.encode(call.says).decode(),
    }


def newest(stamps: Mapping[str, Stamp]) -> int:
    """When the latest word was said."""
    return max((said_at for said_at, _ in stamps.values()), default=_NEVER[0])


def latest_word_at(row: Mapping[str, Any]) -> int:
    """When the latest word that a revision holds was said."""
    return newest(_decode_stamps(row["stamps"]))


def _digest(content: Any) -> bytes:
    return blake2b(msgspec.json.encode(content), digest_size=16).digest()
