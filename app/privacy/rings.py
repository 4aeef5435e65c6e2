"""Where processes that read find the keys of subjects: in the file beside the data, or in the shared database."""

import asyncio
import sqlite3
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import finalize

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, predictions, subject_keys
from app.errors import Unavailable
from app.privacy.sealing import DataKey, MasterKeys
from app.privacy.subject_keys import SubjectKeys, WrappedKey, new_subject_key

_k = subject_keys.c


class RingPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where another process finds the keys: it is a secret, and goes by a pipe only."""

    masters: str
    """The master keys, as `MasterKeys.parse` reads them."""
    path: str | None = None
    """Of the file; without one the keys are in the shared database."""

    def opened(self, database: Database) -> "FileRing | SharedRing":
        """The ring there."""
        masters = MasterKeys.parse(self.masters)
        return SharedRing(database, masters) if self.path is None else FileRing(Path(self.path), masters)

    def __repr__(self) -> str:
        return "<RingPlace>"


class FileRing:
    """The keys in the file at `path`; from any event loop, one call at a time."""

    def __init__(self, path: Path, masters: MasterKeys) -> None:
        self._path = path
        self._masters = masters
        self._lock = threading.Lock()
        self._keys: SubjectKeys | None = None

    async def opening(self, ids: Sequence[str]) -> Mapping[str, DataKey]:
        """Give those there are of these keys.

        Raises:
            CannotOpen: a master key is not configured.
            Unavailable: the file cannot be read.
        """
        return {each.id: each.unwrapped(self._masters) for each in (await self.wrapped(ids)).values()}

    async def sealing(self, tenant: str, subjects: Sequence[str]) -> Mapping[str, DataKey]:
        """Give the key of each of these subjects, made if there is none; it is on the disk then. Raises Unavailable."""
        return {subject: await asyncio.to_thread(self._call, "made_for", tenant, subject) for subject in subjects}

    async def wrapped(self, ids: Sequence[str]) -> dict[str, WrappedKey]:
        """Give those there are of these keys as they are stored; raises Unavailable where the file cannot be read."""
        found: dict[str, WrappedKey] = await asyncio.to_thread(self._call, "of_ids", ids)
        return found

    async def destroy(self, tenant: str, subjects: Sequence[str], *, made_until: int = 1 << 62) -> int:
        """Destroy the keys of subjects that were made by that moment; gives how many. Raises Unavailable."""
        return int(await asyncio.to_thread(self._call, "destroy", tenant, subjects, made_until=made_until))

    async def holding(self, _: AsyncConnection, ids: Sequence[str]) -> Collection[str]:
        """Those there are of these keys: they stay while the transaction writes, for SQLite has one writer.

        Raises:
            Unavailable: the file cannot be read.
        """
        return (await self.wrapped(ids)).keys()

    async def page(self, after: str, *, made_until: int, limit: int) -> list[WrappedKey]:
        """List keys made by that moment, by their ids; raises Unavailable where the file cannot be read."""
        found: list[WrappedKey] = await asyncio.to_thread(self._call, "page", after, made_until=made_until, limit=limit)
        return found

    async def let_go(self, _: AsyncConnection, ids: Sequence[str]) -> int:
        """Destroy keys, in a transaction that writes: nothing is sealed by them meanwhile. Raises Unavailable."""
        return int(await asyncio.to_thread(self._call, "destroy_ids", ids))

    async def alone(self, connection: AsyncConnection) -> None:
        """Nothing to wait for: the transaction has its file to itself."""

    async def destroy_erased(self, erased: Mapping[str, int]) -> int:
        """Destroy the keys of subjects, by digest, made by the moment each was erased; gives how many.

        Called again, for nobody too, it removes what stayed on the disk because somebody read the file.

        Raises:
            Unavailable: the file cannot be changed.
        """
        return int(await asyncio.to_thread(self._call, "destroy_erased", erased))

    async def empty_log(self) -> bool:
        """Empty the file's log: a destroyed key stands on the disk until then. False if somebody is in the way.

        Raises:
            Unavailable: the file cannot be changed.
        """
        return bool(await asyncio.to_thread(self._call, "empty_log"))

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            with self._lock:
                if self._keys is None:
                    self._keys = SubjectKeys(self._path, self._masters)
                    finalize(self, self._keys.close)  # A ring is let go of, and not closed.
                return getattr(self._keys, method)(*arguments, **options)
        except (sqlite3.Error, OSError) as error:
            raise Unavailable("The keys of sealed content cannot be read.", retry_after_seconds=1.0) from error


class SharedRing:
    """The keys that gateways shipped to the shared database with what they seal."""

    def __init__(self, database: Database, masters: MasterKeys) -> None:
        self._database = database
        self._masters = masters

    async def opening(self, ids: Sequence[str]) -> Mapping[str, DataKey]:
        """Give those there are of these keys.

        Raises:
            CannotOpen: a master key is not configured.
            Unavailable: the database does not answer.
        """
        async with self._database.reading() as connection:
            rows = (await connection.execute(select(*subject_keys.c).where(_k.id.in_(ids)))).all()
        return {row.id: WrappedKey(*row).unwrapped(self._masters) for row in rows}

    async def sealing(self, tenant: str, subjects: Sequence[str]) -> Mapping[str, DataKey]:
        """Give a key of each of these subjects, made if there is none and stored then. Raises Unavailable."""
        keys: dict[str, DataKey] = {}
        async with self._database.writing() as connection:
            for subject in dict.fromkeys(subjects):
                mine = (_k.tenant == tenant, _k.subject == subject)
                first = select(*subject_keys.c).where(*mine).order_by(_k.created_at, _k.id).limit(1)
                row = (await connection.execute(first)).one_or_none()
                wrapped = WrappedKey(*row) if row else new_subject_key(tenant, subject, self._masters)
                if row is None:
                    await connection.execute(subject_keys.insert(), wrapped._asdict())
                keys[subject] = wrapped.unwrapped(self._masters)
        return keys

    async def destroy(self, tenant: str, subjects: Sequence[str], *, made_until: int = 1 << 62) -> int:
        """Destroy the keys of subjects that were made by that moment; gives how many. Raises Unavailable."""
        mine = (_k.tenant == tenant, _k.subject.in_(subjects), _k.created_at <= made_until)
        async with self._database.writing() as connection:
            of_subjects = delete(subject_keys).where(*mine)
            return (await connection.execute(of_subjects)).rowcount

    async def empty_log(self) -> bool:
        """Empty the database's log, as `Database.empty_log` does. Raises Unavailable."""
        return await self._database.empty_log()

    async def holding(self, connection: AsyncConnection, ids: Sequence[str]) -> Collection[str]:
        """Those there are of these keys, which stay until the transaction ends."""
        await self._database.not_while_one(connection, subject_keys.name)
        return set((await connection.execute(select(_k.id).where(_k.id.in_(ids)))).scalars())

    async def held(self, ids: Sequence[str]) -> Collection[str]:
        """Those there are of these keys; raises Unavailable."""
        async with self._database.reading() as connection:
            return set((await connection.execute(select(_k.id).where(_k.id.in_(ids)))).scalars())

    async def page(self, after: str, *, made_until: int, limit: int) -> list[WrappedKey]:
        """List keys made by that moment, by their ids; raises Unavailable."""
        query = select(*subject_keys.c).where(_k.id > after, _k.created_at <= made_until).order_by(_k.id).limit(limit)
        async with self._database.reading() as connection:
            return [WrappedKey(*row) for row in (await connection.execute(query)).all()]

    async def alone(self, connection: AsyncConnection) -> None:
        """Wait until no transaction writes what is sealed, and keep others from it until this one ends."""
        for what in (predictions.name, subject_keys.name):
            await self._database.one_at_a_time(connection, what)

    async def let_go(self, connection: AsyncConnection, ids: Sequence[str]) -> int:
        """Destroy keys, in a transaction that is `alone`."""
        return (await connection.execute(delete(subject_keys).where(_k.id.in_(ids)))).rowcount
