"""The keys in the database that all gateways share.

The main rule: whatever changes a key raises the version of the key ring first, in the same transaction. That row puts
the changes in a row, and reading it tells a gateway whether there is something new.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.access import keys
from app.access.keys import ApiKey
from app.database import Database, api_keys, key_ring
from app.errors import NotFound

_VERSION = select(key_ring.c.version)
_COLUMNS = [column for column in api_keys.c if column.name != "secret_sha256"]


class StoredKey(msgspec.Struct, frozen=True):
    """A key and what is kept of its secret."""

    secret_sha256: bytes
    key: ApiKey


class KeyStore:
    """Makes, changes and reads keys; every method raises Unavailable while the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, **facts: Any) -> tuple[ApiKey, str]:
        """Make a key; give its record and the key itself, which cannot be read again.

        `facts` are those of `keys.make_key`, which says what it raises.
        """
        key, secret = keys.make_key(**facts)
        async with self._database.writing() as connection:
            await _raise_version(connection)
            row = {**msgspec.structs.asdict(key), "scopes": " ".join(key.scopes), "groups": json.dumps(key.groups)}
            await connection.execute(api_keys.insert(), {**row, "secret_sha256": keys.digest(secret)})
        return key, keys.whole(key, secret)

    async def all(self) -> list[ApiKey]:
        """List the keys, oldest first, revoked and expired ones included."""
        query = select(*_COLUMNS).order_by(api_keys.c.created_at, api_keys.c.id)
        async with self._database.reading() as connection:
            return [_key(row) for row in await connection.execute(query)]

    async def update(
        self,
        key_id: str,
        *,
        priority: str | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> ApiKey:
        """Change what is not None; a limit of 0 lifts the limit. Running services follow within a second.

        Raises:
            NotFound: there is no such key.
            InvalidRequest: there is no such priority, or a limit is negative or absurd.
        """
        async with self._database.writing() as connection:
            await _raise_version(connection)
            key = keys.changed(await _get(connection, key_id), priority, requests_per_minute, tokens_per_minute)
            await connection.execute(
                api_keys.update()
                .where(api_keys.c.id == key_id)
                .values(
                    priority=key.priority,
                    requests_per_minute=key.requests_per_minute,
                    tokens_per_minute=key.tokens_per_minute,
                )
            )
        return key

    async def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key for good: running services refuse it within a second; a second time changes nothing.

        Raises:
            NotFound: there is no such key.
        """
        async with self._database.writing() as connection:
            await _raise_version(connection)
            valid = api_keys.update().where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            await connection.execute(valid.values(revoked_at=keys.now()))
            return await _get(connection, key_id)

    async def read(self, known: int) -> tuple[int, list[StoredKey] | None]:
        """Read the version of the key ring, and all keys unless that is the one `known`."""
        if known and await self._database.number(_VERSION) == known:
            return known, None
        async with self._database.reading() as connection:
            version: int = (await connection.execute(_VERSION)).scalar_one()
            rows = await connection.execute(select(*_COLUMNS, api_keys.c.secret_sha256))
            return version, [StoredKey(row.secret_sha256, _key(row)) for row in rows]

    async def note_uses(self, uses: Mapping[str, int]) -> None:
        """Note when keys were last used, by their ids; of several gateways' words the latest holds."""
        async with self._database.writing() as connection:
            for key_id, used_at in sorted(uses.items()):  # In one order, so that two gateways cannot block each other.
                older = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < used_at)
                noted = api_keys.update().where(api_keys.c.id == key_id, older)
                await connection.execute(noted.values(last_used_at=used_at))


async def _raise_version(connection: AsyncConnection) -> None:
    await connection.execute(key_ring.update().values(version=key_ring.c.version + 1))


async def _get(connection: AsyncConnection, key_id: str) -> ApiKey:
    row = (await connection.execute(select(*_COLUMNS).where(api_keys.c.id == key_id))).one_or_none()
    if row is None:
        raise NotFound(f"There is no API key {key_id!r}; `hallmark keys list` shows them.")
    return _key(row)


def _key(row: Any) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        scopes=tuple(row.scopes.split()),
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        priority=row.priority,
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        groups=tuple(json.loads(row.groups)),
    )
