"""What an API key is, how one is made, and how a request shows it; pure.

A key reads `hm_<id>_<secret>`. Only the SHA-256 of the secret is stored: a slow hash protects secrets that people
choose, and does nothing for 256 random bits.
"""

import time
from base64 import b32encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from secrets import token_bytes
from typing import Any, get_args

import msgspec

from app.errors import Forbidden, InvalidRequest, Unauthenticated
from app.messages import Priority
from retrieval.documents import Scope
from retrieval.scoping import may_see

SCOPES = frozenset(
    {
        "chat",
        "documents:read",
        "documents:write",
        "documents:manage",
        "users:act-as",
        "predictions:read",
        "releases:read",
        "releases:write",
        "metrics",
    }
    | {"feedback:read", "feedback:write", "labels:read", "labels:write", "admin"}
    | {"review:read", "review:write", "review:manage", "quality:read", "privacy:manage"}
    | {"alerts:read", "alerts:write", "datasets:read", "datasets:write", "features:read", "features:write"}
    | {"indexes:manage"}
)
"""What a key may be allowed; `admin` includes all the others."""

HOW = "Send it as 'Authorization: Bearer hm_...'; `hallmark keys create` makes one."

LARGEST_LIMIT = 1_000_000_000

LONGEST_GROUP = 128


class Caller(msgspec.Struct, frozen=True):
    """Who sent a request, as their key proves."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    name: str = ""
    priority: Priority = "normal"
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    groups: frozenset[str] = frozenset()
    user: str | None = None
    """For whom the key acts, as was verified; None is for itself."""

    @property
    def is_limited(self) -> bool:
        """Whether what it sends is counted."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def may(self, scope: str) -> bool:
        """Whether the key has `scope`."""
        return scope in self.scopes or "admin" in self.scopes

    def sees(self, filter: Mapping[str, Any] | None = None) -> Scope:  # noqa: A002 - what requests call it.
        """Which documents the caller sees: all of their tenant's, or those for it and for their groups."""
        groups = None if self.user is None and self.may("documents:manage") else self.groups
        return Scope(self.tenant, dict(filter or {}), groups)

    def require_may_give_to(self, groups: Sequence[str] | None) -> None:
        """Raise Forbidden where a document for these groups would not be seen by who writes it."""
        if groups is not None and not may_see(self.sees(), self.tenant, groups):
            own = f"one of {', '.join(sorted(self.groups))}" if self.groups else "none, which is all of the tenant"
            raise Forbidden(
                f"`groups`: a document is to be seen by who writes it: name {own}, or use a key with the scope "
                "'documents:manage', which gives documents to any groups.",
                param="groups",
            )

    def for_user(self, user: str, groups: Iterable[str]) -> "Caller":
        """Act for a user, who sees what is for these groups: of a key with groups of its own no others."""
        own = self.groups.intersection(groups) if self.groups else frozenset(groups)
        return msgspec.structs.replace(self, user=user, groups=own)

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
    groups: tuple[str, ...] = ()
    """Whose documents it sees beside those that are for all of the tenant."""

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
            groups=frozenset(self.groups),
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
    groups: Iterable[str] = (),
) -> tuple[ApiKey, str]:
    """Make a key that is not stored yet: its record, and its secret.

    Raises:
        InvalidRequest: a scope or the priority is unknown, there is no scope, the name, the tenant or a group is empty
            or a group too long, or a limit is negative or absurd.
    """
    chosen = tuple(sorted(set(groups)))
    for group in chosen:
        if not group.strip() or len(group) > LONGEST_GROUP:
            raise InvalidRequest(f"A group has 1 to {LONGEST_GROUP} characters.", param="groups")
    granted = tuple(sorted(set(scopes)))
    unknown = sorted(set(granted) - SCOPES)
    if unknown or not granted:
        problem = f"There is no scope {unknown[0]!r}" if unknown else "A key needs a scope"
        raise InvalidRequest(f"{problem}; the scopes are {', '.join(sorted(SCOPES))}.", param="scopes")
    for field, value in (("name", name), ("tenant", tenant)):
        if not value.strip():
            raise InvalidRequest(f"A key's {field} must not be empty.", param=field)
    facts = {"scopes": granted, "groups": chosen, "created_at": now(), "expires_at": expires_at}
    key = ApiKey(id=_random_text(5), name=name, tenant=tenant, **facts)  # type: ignore[arg-type]
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
    return sha256(secret.encode(errors="surrogatepass") if isinstance(secret, str) else secret).digest()


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
