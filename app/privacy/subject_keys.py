"""The data keys of subjects, wrapped by a master key, in a file of their own.

The main rule: they lie apart from what they open. A backup of the data without this file can be read by nobody, and
one with it for as long as the keys in it are: so back them up apart, or not at all, and a key destroyed here is gone.
Used from one thread at a time; other processes may have the file open.
"""

import json
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from app.database.journal import write_ahead
from app.database.sqlite import BUSY_SECONDS, shorten_journal
from app.privacy.sealing import KEY_BYTES, DataKey, MasterKeys
from app.privacy.subjects import digest_of_keys

_CACHED = 10_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS subject_keys (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    subject TEXT NOT NULL,
    master TEXT NOT NULL,
    wrapped BLOB NOT NULL,
    created_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS ix_subject_keys_subject ON subject_keys (tenant, subject);
"""
_SELECT = "SELECT id, tenant, subject, master, wrapped, created_at FROM subject_keys"


class WrappedKey(NamedTuple):
    """A data key as it is stored; `created_at` is milliseconds since 1970."""

    id: str
    tenant: str
    subject: str
    master: str
    wrapped: bytes
    created_at: int

    def unwrapped(self, masters: MasterKeys) -> DataKey:
        """Give the key itself.

        Raises:
            CannotOpen: its master key is not configured, or it was changed.
        """
        return DataKey(self.id, masters.unwrap(self.wrapped, _context(self), by=self.master))


class SubjectKeys:
    """The file at `path`, made if absent, readable by its owner only."""

    def __init__(self, path: Path, masters: MasterKeys) -> None:
        """Open it.

        Raises:
            sqlite3.Error: the file cannot be used.
        """
        self._masters = masters
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
        self._connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=16
        )
        write_ahead(self._connection, BUSY_SECONDS)
        # What is deleted is overwritten, in the file and in its log: a destroyed key must not be found on the disk.
        for pragma in ("synchronous=FULL", "secure_delete=ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.executescript(_SCHEMA)
        self._by_subject: OrderedDict[tuple[str, str], DataKey] = OrderedDict()
        self._version = self._data_version()
        self._were_changed = False
        self._is_emptied = False  # An earlier process may have left something.

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def making(self) -> Iterator[None]:
        """Put the keys made in the block on the disk at its end, with one commit; none where it raises."""
        self._were_changed = False
        try:
            yield
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")
        except BaseException:
            # A key that is not on the disk must seal nothing. A full disk has ended the transaction by itself.
            self._by_subject.clear()
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def of_subject(self, tenant: str, subject: str) -> DataKey:
        """Give the key of a subject, made if there is none; a new one must be made inside `making`."""
        self._forget_what_others_destroyed()
        known = self._by_subject.get((tenant, subject))
        if known is None:
            known = (self._found(tenant, subject) or self._made(tenant, subject)).unwrapped(self._masters)
            self._by_subject[tenant, subject] = known
            if len(self._by_subject) > _CACHED:
                self._by_subject.popitem(last=False)
        return known

    def are_there(self, ids: Collection[str]) -> bool:
        """Whether the keys given out in the last `making` block still are, and no other process has destroyed one."""
        if not self._were_changed and self._data_version() == self._version:
            return True
        return len(self.of_ids(list(ids))) == len(ids)

    def made_for(self, tenant: str, subject: str) -> DataKey:
        """Give the key of a subject, made if there is none and on the disk then."""
        with self.making():
            return self.of_subject(tenant, subject)

    def missing_masters(self) -> list[str]:
        """List the master keys that are not configured and wrapped some of the keys, which cannot be used then."""
        masters = self._connection.execute("SELECT DISTINCT master FROM subject_keys ORDER BY master")
        return [master for (master,) in masters if master not in self._masters]

    def of_ids(self, ids: Sequence[str]) -> dict[str, WrappedKey]:
        """Find those there are of these keys; one that is not there was destroyed."""
        query = f"{_SELECT} WHERE id IN (SELECT value FROM json_each(?))"  # noqa: S608 - our own names.
        rows = self._connection.execute(query, [json.dumps(ids)])
        return {row[0]: WrappedKey(*row) for row in rows}

    def page(self, after: str, *, made_until: int, limit: int) -> list[WrappedKey]:
        """List keys made by that moment, by their ids."""
        rows = self._connection.execute(
            f"{_SELECT} WHERE id > ? AND created_at <= ? ORDER BY id LIMIT ?", (after, made_until, limit)
        )
        return [WrappedKey(*row) for row in rows]

    def opening(self, ids: Sequence[str]) -> dict[str, DataKey]:
        """Give those there are of these keys, to open what they sealed."""
        return {key_id: wrapped.unwrapped(self._masters) for key_id, wrapped in self.of_ids(ids).items()}

    def destroy_erased(self, erased: Mapping[str, int]) -> int:
        """Destroy the keys of subjects, by digest, that were made by the moment each was erased; gives how many.

        Called again, for nobody too, it empties the log where somebody was in the way of that before.
        """
        keys = self._all() if erased else []
        gone = [key for key in keys if key.created_at <= erased.get(digest_of_keys(key.tenant, key.subject), -1)]
        destroyed = sum(self.destroy(key.tenant, [key.subject], made_until=key.created_at) for key in gone)
        if not self._is_emptied:
            self.empty_log()
        return destroyed

    def empty_log(self) -> bool:
        """Empty the file's log: a destroyed key stands on the disk until then. False if somebody is in the way."""
        self._is_emptied = shorten_journal(self._connection)
        return self._is_emptied

    def _all(self) -> list[WrappedKey]:
        return [WrappedKey(*row) for row in self._connection.execute(_SELECT)]

    def destroy(self, tenant: str, subjects: Sequence[str], *, made_until: int = 1 << 62) -> int:
        """Destroy the keys of subjects that were made by that moment; gives how many.

        They are gone from the file and its log, if nobody reads it just then; else once `empty_log` says so.
        """
        mine = [(tenant, subject, made_until) for subject in subjects]
        return self._destroyed("tenant = ? AND subject = ? AND created_at <= ?", mine)

    def destroy_ids(self, ids: Sequence[str]) -> int:
        """Destroy keys, as `destroy` does; gives how many there were."""
        return self._destroyed("id = ?", [(key_id,) for key_id in ids])

    def _destroyed(self, which: str, those: Iterable[tuple[str | int, ...]]) -> int:
        self._connection.execute("BEGIN IMMEDIATE")
        found = self._connection.executemany(f"DELETE FROM subject_keys WHERE {which}", those)  # noqa: S608 - our own.
        self._connection.execute("COMMIT")
        self._by_subject.clear()
        self._is_emptied = False
        self.empty_log()
        return max(0, found.rowcount)

    def _forget_what_others_destroyed(self) -> None:
        """A key that another process destroyed must seal nothing more: nobody could ever open it."""
        if self._connection.in_transaction:
            return
        version = self._data_version()
        if version != self._version:
            self._by_subject.clear()
            self._version = version
            self._were_changed = True

    def _data_version(self) -> int:
        """A number that changes when another connection has changed the file."""
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def _found(self, tenant: str, subject: str) -> WrappedKey | None:
        row = self._connection.execute(f"{_SELECT} WHERE tenant = ? AND subject = ?", (tenant, subject)).fetchone()
        return WrappedKey(*row) if row else None

    def _made(self, tenant: str, subject: str) -> WrappedKey:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
            # Another process may have made it while this one waited for its turn.
            if found := self._found(tenant, subject):
                return found
        made = new_subject_key(tenant, subject, self._masters)
        self._connection.execute("INSERT INTO subject_keys VALUES (?, ?, ?, ?, ?, ?)", made)
        return made


def new_subject_key(tenant: str, subject: str, masters: MasterKeys) -> WrappedKey:
    """Make the key of a subject."""
    bare = WrappedKey(os.urandom(12).hex(), tenant, subject, masters.current, b"", time.time_ns() // 1_000_000)
    return bare._replace(wrapped=masters.wrap(os.urandom(KEY_BYTES), _context(bare)))


def _context(key: WrappedKey) -> bytes:
    return f"{key.id}\0{key.tenant}\0{key.subject}".encode(errors="surrogatepass")
