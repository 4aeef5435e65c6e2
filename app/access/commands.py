"""The key store for a program without an event loop: the command line, the demo, tests.

Each takes the database as its URL, or as the path of its SQLite file, and raises Unavailable, with the reason, when
that cannot be used.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from app.access.keys import ApiKey
from app.access.store import KeyStore
from app.database import Database, MigrationFailed
from app.errors import Unavailable

T = TypeVar("T")


def create_key(database: Path | str, **facts: Any) -> tuple[ApiKey, str]:
    """Make a key: `KeyStore.create`."""
    return _with_keys(database, lambda keys: keys.create(**facts))


def list_keys(database: Path | str) -> list[ApiKey]:
    """List the keys: `KeyStore.all`."""
    return _with_keys(database, lambda keys: keys.all())


def update_key(database: Path | str, key_id: str, **changes: Any) -> ApiKey:
    """Change a key's priority or limits: `KeyStore.update`."""
    return _with_keys(database, lambda keys: keys.update(key_id, **changes))


def revoke_key(database: Path | str, key_id: str) -> ApiKey:
    """Revoke a key: `KeyStore.revoke`."""
    return _with_keys(database, lambda keys: keys.revoke(key_id))


def _with_keys(where: Path | str, work: Callable[[KeyStore], Awaitable[T]]) -> T:
    async def once() -> T:
        if isinstance(where, Path):
            where.parent.mkdir(parents=True, exist_ok=True)
            chosen = Database.of_file(where)
        else:
            chosen = Database(where)
        try:
            async with chosen as database:
                await database.prepare()
                return await work(KeyStore(database))
        except (MigrationFailed, Unavailable) as error:
            cause = error.__cause__ or error
            reason = str(cause) or type(cause).__name__
            raise Unavailable(f"The database {chosen.name!r} cannot be used: {reason}.") from error

    with ThreadPoolExecutor(1) as thread:  # Whoever calls may have a loop of their own.
        return thread.submit(asyncio.run, once()).result()
