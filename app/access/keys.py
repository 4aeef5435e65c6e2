"""What an API key is, how one is made, and how a request shows it; pure.

A key reads `hm_<id>_<secret>`. Only the SHA-256 of the secret is stored: a slow hash protects secrets that people
choose, and does nothing for 256 random bits.
"""

import time
from base64 import b32encode
from collections.abc import Iterable
from hashlib import sha256
from secrets import token_bytes
from typing import get_args

import msgspec

from app.errors import Forbidden, InvalidRequest, Unauthenticated
from app.messages import Priority

SCOPES = frozenset(
    {"chat", "documents:read", "documents:write", "predictions:read", "releases:read", "releases:write", "metrics"}
    | {"feedback:read", "feedback:write", "labels:read", "labels:write", "admin"}
    | {"review:read", "review:write", "review:manage", "quality:read", "privacy:manage"}
    | {"alerts:read", "alerts:write", "datasets:read", "datasets:write", "features:read", "features:write"}
)
"""What a key may be allowed; `admin` includes all the others."""

HOW = "Send it as 'Authorization: Bearer hm_...'; `hallmark keys create` makes one."

LARGEST_LIMIT = 1_000_000_000


class Caller(msgspec.Struct, frozen=True):
    """Who sent a request, as their key proves."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    name: str = ""
    priority: Priority = "normal"
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether what it sends is counted."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def may(self, scope: str) -> bool:
        """Whether the key has `scope`."""
        return scope in self.scopes or "admin" in self.scopes

    def require(self, scope: str) -> None:
        """Raise Forbidden unless the key has `scope`."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise Forbidden(
                f"The API key {self.key_id!r} lacks the scope {scope!r}; it has {', '.join(sorted(self.scopes))}. "
                f"Make a key with `hallmark keys create --scope {scope}`."
            )


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is stored, without its secret; times are milliseconds since 1970."""

    id: str
    name: str
    tenant: str
    scopes: tuple[str, ...]
    created_at: int
    last_used_at: int | None = None
    """To the minute."""
    expires_at: int | None = None
    revoked_at: int | None = None
    priority: Priority = "normal"
    requests_per_minute: int | None = None
    """None is no limit."""
    tokens_per_minute: int | None = None
    """Of prompts and answers together; None is no limit."""

    @property
    def caller(self) -> Caller:
        """Who sends it."""
        return Caller(
            key_id=self.id,
            tenant=self.tenant,
            scopes=frozenset(self.scopes),
            name=self.name,
            priority=self.priority,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
        )


def make_key(
    *,
    name: str,
    tenant: str = "default",
    scopes: Iterable[str] = ("chat",),
    expires_at: int | None = None,
    priority: str = "normal",
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> tuple[ApiKey, str]:
    """Make a key that is not stored yet: its record, and its secret.

    Raises:
        InvalidRequest: a scope or the priority is unknown, there is no scope, the name or the tenant is empty, or a
            limit is negative or absurd.
    """
    granted = tuple(sorted(set(scopes)))
    unknown = sorted(set(granted) - SCOPES)
    if unknown or not granted:
        problem = f"There is no scope {unknown[0]!r}" if unknown else "A key needs a scope"
        raise InvalidRequest(f"{problem}; the scopes are {', '.join(sorted(SCOPES))}.", param="scopes")
    for field, value in (("name", name), ("tenant", tenant)):
        if not value.strip():
            raise InvalidRequest(f"A key's {field} must not be empty.", param=field)
    key = ApiKey(id=_random_text(5), name=name, tenant=tenant, scopes=granted, created_at=now(), expires_at=expires_at)
    return changed(key, priority, requests_per_minute, tokens_per_minute), _random_text(32)


def changed(
    key: ApiKey, priority: str | None, requests_per_minute: int | None, tokens_per_minute: int | None
) -> ApiKey:
    """Give a key what is not None of these; a limit of 0 lifts the limit.

    Raises:
        InvalidRequest: there is no such priority, or a limit is negative or absurd.
    """
    if priority is not None and priority not in get_args(Priority):
        raise InvalidRequest(
            f"There is no priority {priority!r}; it is {', '.join(get_args(Priority))}.", param="priority"
        )
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    for field, limit in limits.items():
        if limit is not None and not 0 <= limit <= LARGEST_LIMIT:
            raise InvalidRequest(f"`{field}` is from 1 to {LARGEST_LIMIT:_}; 0 is no limit.", param=field)
    given = {field: limit or None for field, limit in limits.items() if limit is not None}
    return msgspec.structs.replace(key, priority=priority or key.priority, **given)


def whole(key: ApiKey, secret: str) -> str:
    """The key as its owner sends it."""
    return f"hm_{key.id}_{secret}"


def digest(secret: str | bytes) -> bytes:
    """What is kept of a secret."""
    return sha256(secret.encode() if isinstance(secret, str) else secret).digest()


def parse(authorization: str | bytes | None) -> tuple[str, bytes]:
    """Split `Bearer hm_<id>_<secret>` into id and secret; raises Unauthenticated if it is something else."""
    if not authorization:
        raise Unauthenticated(f"This needs an API key. {HOW}")
    if isinstance(authorization, bytes):
        authorization = authorization.decode("latin-1")
    scheme, _, token = authorization.partition(" ")
    prefix, _, rest = token.strip().partition("_")
    key_id, _, secret = rest.partition("_")
    if scheme.lower() != "bearer" or prefix != "hm" or not secret:
        raise Unauthenticated(f"The Authorization header holds no API key. {HOW}")
    return key_id, secret.encode(errors="replace")


def now() -> int:
    """Milliseconds since 1970, as keys count."""
    return time.time_ns() // 1_000_000


def _random_text(size_bytes: int) -> str:
    # Lower-case base 32: a double click selects all of it, and it survives being read aloud.
    return b32encode(token_bytes(size_bytes)).decode().rstrip("=").lower()
