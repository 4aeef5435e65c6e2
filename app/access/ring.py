"""The keys in memory, against which every request is checked, and how they follow the database."""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from app.access.keys import HOW, ApiKey, Caller, digest, now, parse
from app.access.memory import Memory
from app.access.store import KeyStore, StoredKey
from app.access.users import UserTokens
from app.database import Database
from app.errors import ServiceError, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

_MINUTE = 60_000  # Milliseconds.
_MOST_SHOWN = 10_000
_UNKNOWN = f"There is no such API key. {HOW}"


class Access:
    """Knows the keys of a database; use it in an `async with` block inside that of the database.

    Args:
        database: shared by all gateways.
        memory: a file that keeps the keys known last, for a start while the database is down.
        refresh_seconds: how soon a change made by another process is seen.
        users: verifies for whom a key acts; without, no header says that.
        impatient_seconds: the shortest time between two looks, however many unknown keys come.
        patience_seconds: how long an unknown key may wait for a look, and the start for the first one.
    """

    def __init__(
        self,
        database: Database,
        *,
        memory: Path | None = None,
        users: UserTokens | None = None,
        refresh_seconds: float = 0.5,
        impatient_seconds: float = 0.1,
        patience_seconds: float = 2.0,
    ) -> None:
        self._store = KeyStore(database)
        self._memory = Memory(memory) if memory else None
        self._users = users
        self._refresh_seconds = refresh_seconds
        self._impatient_seconds = impatient_seconds
        self._patience_seconds = patience_seconds
        self._keys: dict[str, tuple[bytes, ApiKey, Caller]] = {}
        self._shown: dict[bytes, tuple[ApiKey, Caller]] = {}
        """Keys of `_keys` by the digest of a whole header that has proved them: it need not be taken apart again."""
        self._version = 0
        self._is_stale = False
        self._used: dict[str, int] = {}
        self._uses_saved_at = now()
        self._wanted = asyncio.Event()
        self._waiters: list[asyncio.Future[bool]] = []

    async def __aenter__(self) -> Self:
        """Know the keys: those of the database if it answers soon, else those known last."""
        if self._memory is not None:
            self._hold(await asyncio.to_thread(self._memory.recall))
        first_look = self._look_awaited()
        self._refresher = asyncio.create_task(self._refresh_for_ever(), name="access")
        await self._within_patience(first_look)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._refresher.cancel()
        with suppress(asyncio.CancelledError):
            await self._refresher
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience_seconds):
                await self._save_uses()

    def identify(self, headers: Mapping[bytes, bytes]) -> Awaitable[Caller]:
        """Say who calls, and for whom, from a request's headers by lower-case name; nothing else of it is asked.

        Raises, where it is awaited:
            Unauthenticated, Unavailable: as `admit` says; and where the token of a user is not valid.
            Forbidden: the key may not act for users.
        """
        admitted = self.admit(headers.get(b"authorization"))
        return admitted if self._users is None else _for_user(admitted, self._users, headers)

    async def admit(self, authorization: str | bytes | None) -> Caller:
        """Say who calls, from the value of the Authorization header; a known key costs a hash and waits for nothing.

        A key that is not known yet is looked up in the database before it is refused.

        Raises:
            Unauthenticated: there is no key, or it is unknown, wrong, expired or revoked.
            Unavailable: the key is unknown, and may be a new one: the database cannot be asked at present.
        """
        shown = digest(authorization or b"")
        found = self._shown.get(shown)
        if found is None:
            found = await self._verified(authorization)
            if len(self._shown) >= _MOST_SHOWN:
                self._shown.clear()
            self._shown[shown] = found
        key, caller = found
        at = now()
        if key.revoked_at is not None:
            raise Unauthenticated(f"The API key {key.id!r} was revoked. {HOW}")
        if key.expires_at is not None and key.expires_at <= at:
            raise Unauthenticated(f"The API key {key.id!r} has expired. {HOW}")
        self._used[key.id] = at
        return caller

    async def _verified(self, authorization: str | bytes | None) -> tuple[ApiKey, Caller]:
        """Give the key that a header proves; raises as `admit` says."""
        key_id, secret = parse(authorization)
        known = self._keys.get(key_id)
        if known is None:
            if not await self._within_patience(self._look_awaited()):
                raise Unavailable("This API key cannot be looked up at present.", retry_after_seconds=1.0)
            known = self._keys.get(key_id)
            if known is None:
                raise Unauthenticated(_UNKNOWN)
        expected, key, caller = known
        if not hmac.compare_digest(digest(secret), expected):
            raise Unauthenticated(_UNKNOWN)
        return key, caller

    def _look_awaited(self) -> asyncio.Future[bool]:
        """Ask for a look at the database; its future says whether that worked."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wanted.set()
        return waiter

    async def _within_patience(self, look: asyncio.Future[bool]) -> bool:
        """Wait for a look, but not for a database that hangs."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience_seconds):
                return await look
        return False

    async def _refresh_for_ever(self) -> None:
        while True:
            self._wanted.clear()
            # Who comes while the table is being read waits for the next time: their key may be newer than this look.
            waiters, self._waiters = self._waiters, []
            has_worked = await self._refresh()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(has_worked)
            # A write may wait for others' writes: nobody's look does.
            if has_worked and now() - self._uses_saved_at >= _MINUTE:
                await self._save_uses()
            await asyncio.sleep(self._impatient_seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_seconds - self._impatient_seconds):
                    await self._wanted.wait()

    async def _refresh(self) -> bool:
        """Take over what has changed; whatever keeps that from working, the next look may find it mended."""
        try:
            version, found = await self._store.read(self._version)
            if found is not None:
                self._hold(found)
                self._version = version
                if self._memory is not None:
                    await asyncio.to_thread(self._memory.keep, found)
        except ServiceError as error:
            self._tell(str(error))
        except Exception as error:  # noqa: BLE001 - a defect here must not end what keeps the keys current.
            self._tell(type(error).__name__)
        else:
            if self._is_stale:
                log.warning("API keys are read again")
            self._is_stale = False
        return not self._is_stale

    def _tell(self, reason: str) -> None:
        if not self._is_stale:
            log.error("API keys cannot be read; those known so far stay valid: %s", reason)
        self._is_stale = True

    def _hold(self, keys: Sequence[StoredKey]) -> None:
        self._keys = {each.key.id: (each.secret_sha256, each.key, each.key.caller) for each in keys}
        self._shown = {}

    async def _save_uses(self) -> None:
        """Save when keys were used, to the minute; what cannot be saved is told and forgotten."""
        self._uses_saved_at = now()
        uses, self._used = self._used, {}
        if not uses:
            return
        try:
            await self._store.note_uses({key_id: used_at - used_at % _MINUTE for key_id, used_at in uses.items()})
        except ServiceError as error:
            log.warning("When keys were last used could not be saved: %s", error)


async def _for_user(admitted: Awaitable[Caller], users: UserTokens, headers: Mapping[bytes, bytes]) -> Caller:
    """Have the key act for the user that its headers name, if they do."""
    return users.caller(await admitted, headers)
