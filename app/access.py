"""API keys: who calls, for which tenant, and what they may do.

A key reads `hm_<id>_<secret>`. Only the SHA-256 of the secret is stored: a slow hash protects secrets that people
choose, and does nothing for 256 random bits. Requests are checked against a copy of the table in memory, renewed
within a second of any change, so that a database that is down never turns a valid key away.
"""

import asyncio
import hmac
import logging
import sqlite3
import time
from base64 import b32encode
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_bytes
from typing import Any, Self

import msgspec

from app import database
from app.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated, Unavailable

SCOPES = frozenset(
    {"chat", "documents:read", "documents:write", "predictions:read", "releases:read", "releases:write", "metrics"}
    | {"feedback:read", "feedback:write", "labels:read", "labels:write", "admin"}
    | {"review:read", "review:write", "review:manage"}
)
"""What a key may be allowed; `admin` includes all the others."""

log = logging.getLogger(__name__)

_HOW = "Send it as 'Authorization: Bearer hm_...'; `hallmark keys create` makes one."


class Caller(msgspec.Struct, frozen=True):
    """Who sent a request, as their key proves."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    name: str = ""

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


Keys = dict[str, tuple[bytes, ApiKey, Caller]]

_COLUMNS = "id, name, tenant, scopes, created_at, last_used_at, expires_at, revoked_at"
_SELECT_WITH_SECRET = f"SELECT secret_sha256, {_COLUMNS} FROM api_keys"  # noqa: S608
_SELECT = f"SELECT {_COLUMNS} FROM api_keys"  # noqa: S608 - our own column names.


def create_key(
    path: Path,
    *,
    name: str,
    tenant: str = "default",
    scopes: Iterable[str] = ("chat",),
    expires_at: int | None = None,
) -> tuple[ApiKey, str]:
    """Make a key in the database at `path`; give its record and the key itself, which cannot be read again.

    Raises:
        InvalidRequest: a scope is unknown, or there is none; the name or the tenant is empty.
    """
    granted = tuple(sorted(set(scopes)))
    unknown = sorted(set(granted) - SCOPES)
    if unknown or not granted:
        problem = f"There is no scope {unknown[0]!r}" if unknown else "A key needs a scope"
        raise InvalidRequest(f"{problem}; the scopes are {', '.join(sorted(SCOPES))}.", param="scopes")
    for field, value in (("name", name), ("tenant", tenant)):
        if not value.strip():
            raise InvalidRequest(f"A key's {field} must not be empty.", param=field)
    key_id, secret = _random_text(5), _random_text(32)
    key = ApiKey(id=key_id, name=name, tenant=tenant, scopes=granted, created_at=_now(), expires_at=expires_at)
    with _connected(path) as connection:
        connection.execute(
            "INSERT INTO api_keys (id, secret_sha256, name, tenant, scopes, created_at, expires_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key_id, sha256(secret.encode()).digest(), name, tenant, " ".join(granted), key.created_at, expires_at),
        )
    return key, f"hm_{key_id}_{secret}"


def list_keys(path: Path) -> list[ApiKey]:
    """List the keys of the database at `path`, oldest first, revoked and expired ones included."""
    with _connected(path) as connection:
        return [_key(row) for row in connection.execute(f"{_SELECT} ORDER BY created_at, id")]


def revoke_key(path: Path, key_id: str) -> ApiKey:
    """Revoke a key for good: a running service refuses it within about a second; a second time changes nothing.

    Raises:
        NotFound: there is no such key.
    """
    with _connected(path) as connection:
        connection.execute("UPDATE api_keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (_now(), key_id))
        row = connection.execute(f"{_SELECT} WHERE id = ?", (key_id,)).fetchone()
    if row is None:
        raise NotFound(f"There is no API key {key_id!r}; `hallmark keys list` shows them.")
    return _key(row)


class Access:
    """Knows the keys of the database at `path`.

    Args:
        path: the SQLite file.
        refresh_seconds: how soon a change made by another process is seen.
        impatient_seconds: the shortest time between two looks, however many unknown keys come.
    """

    def __init__(self, path: Path, *, refresh_seconds: float = 1.0, impatient_seconds: float = 0.25) -> None:
        self._path = path
        self._refresh_seconds = refresh_seconds
        self._impatient_seconds = impatient_seconds
        self._keys: Keys = {}
        self._stale = False
        self._data_version = -1
        self._used: dict[str, int] = {}
        self._uses_saved_at = _now()
        self._wanted = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []

    async def __aenter__(self) -> Self:
        """Read the keys and keep them current until the end of the block; raises Unavailable if they cannot be read."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="access")
        loop = asyncio.get_running_loop()
        try:
            self._connection = await loop.run_in_executor(self._thread, database.connect, self._path)
            self._keys = await loop.run_in_executor(self._thread, self._read)
        except database.CONNECT_ERRORS as error:
            self._thread.shutdown(wait=False)
            raise Unavailable(f"The API keys in {str(self._path)!r} cannot be read: {error}.") from error
        self._refresher = asyncio.create_task(self._refresh_for_ever(), name="access-refresh")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._refresher.cancel()
        with suppress(asyncio.CancelledError):
            await self._refresher
        loop = asyncio.get_running_loop()
        await asyncio.shield(loop.run_in_executor(self._thread, self._close))
        self._thread.shutdown()

    def authenticate(self, authorization: str | bytes | None) -> Caller:
        """Say who calls, from the value of the Authorization header; costs about a microsecond and waits for nothing.

        Raises:
            Unauthenticated: there is no key, or it is unknown, wrong, expired or revoked.
            Unavailable: the key is unknown and the table cannot be read at present, so it may be a new one.
        """
        return self._check(*_parse(authorization))

    def _check(self, key_id: str, secret: bytes) -> Caller:
        known = self._keys.get(key_id)
        if known is None:
            self._wanted.set()
            if self._stale:
                raise Unavailable("API keys cannot be looked up at present.", retry_after_seconds=1.0)
            raise Unauthenticated(f"There is no such API key. {_HOW}")
        digest, key, caller = known
        if not hmac.compare_digest(sha256(secret).digest(), digest):
            raise Unauthenticated(f"There is no such API key. {_HOW}")
        now = _now()
        if key.revoked_at is not None:
            raise Unauthenticated(f"The API key {key_id!r} was revoked. {_HOW}")
        if key.expires_at is not None and key.expires_at <= now:
            raise Unauthenticated(f"The API key {key_id!r} has expired. {_HOW}")
        self._used[key_id] = now
        return caller

    async def admit(self, authorization: str | bytes | None) -> Caller:
        """Authenticate; a key that is not known yet is looked up in the database before it is refused."""
        key_id, secret = _parse(authorization)
        if key_id not in self._keys:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            self._wanted.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(database.BUSY_SECONDS + 1.0):
                    await waiter
        return self._check(key_id, secret)

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._impatient_seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_seconds - self._impatient_seconds):
                    await self._wanted.wait()
            self._wanted.clear()
            # Who comes while the table is being read waits for the next time: their key may be newer than this look.
            waiters, self._waiters = self._waiters, []
            try:
                await self._refresh()
            finally:
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(None)

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        if _now() - self._uses_saved_at >= 60_000:
            self._uses_saved_at = _now()
            uses, self._used = self._used, {}
            await loop.run_in_executor(self._thread, self._save, uses)
        try:
            self._keys = await loop.run_in_executor(self._thread, self._read)
        except sqlite3.Error as error:
            if not self._stale:
                log.error("API keys cannot be read; those known so far stay valid: %s", error)  # noqa: TRY400
            self._stale = True
        else:
            self._stale = False

    def _read(self) -> Keys:
        """Give the keys as they are now; costs one pragma when no other connection has written anything."""
        (data_version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if data_version == self._data_version:
            return self._keys
        keys: Keys = {}
        for digest, *row in self._connection.execute(_SELECT_WITH_SECRET):
            key = _key(row)
            caller = Caller(key_id=key.id, tenant=key.tenant, scopes=frozenset(key.scopes), name=key.name)
            keys[key.id] = (digest, key, caller)
        self._data_version = data_version
        return keys

    def _save(self, uses: dict[str, int]) -> None:
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(
                    "UPDATE api_keys SET last_used_at = ? WHERE id = ?",
                    [(used_at - used_at % 60_000, key_id) for key_id, used_at in uses.items()],
                )
        except sqlite3.Error as error:
            log.warning("When keys were last used could not be saved: %s", error)

    def _close(self) -> None:
        self._save(self._used)
        self._connection.close()


def _parse(authorization: str | bytes | None) -> tuple[str, bytes]:
    """Split `Bearer hm_<id>_<secret>` into id and secret; raises Unauthenticated if it is something else."""
    if not authorization:
        raise Unauthenticated(f"This needs an API key. {_HOW}")
    if isinstance(authorization, bytes):
        authorization = authorization.decode("latin-1")
    scheme, _, token = authorization.partition(" ")
    prefix, _, rest = token.strip().partition("_")
    key_id, _, secret = rest.partition("_")
    if scheme.lower() != "bearer" or prefix != "hm" or not secret:
        raise Unauthenticated(f"The Authorization header holds no API key. {_HOW}")
    return key_id, secret.encode(errors="replace")


def _key(row: Sequence[Any]) -> ApiKey:
    key_id, name, tenant, scopes, created_at, last_used_at, expires_at, revoked_at = row
    return ApiKey(
        id=key_id,
        name=name,
        tenant=tenant,
        scopes=tuple(scopes.split()),
        created_at=created_at,
        last_used_at=last_used_at,
        expires_at=expires_at,
        revoked_at=revoked_at,
    )


def _random_text(size_bytes: int) -> str:
    # Lower-case base 32: a double click selects all of it, and it survives being read aloud.
    return b32encode(token_bytes(size_bytes)).decode().rstrip("=").lower()


def _now() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database for one command, beside the service that may be running on it."""
    try:
        with closing(database.connect(path)) as connection:
            yield connection
    except database.CONNECT_ERRORS as error:
        raise Unavailable(f"The database {str(path)!r} cannot be used: {error}.") from error
