"""Moves predictions from the log's file, which is their outbox, into the database that all replicas share.

The main rule: a row leaves the outbox when it is in the database, and not before; one that a crash ships a second time
changes nothing there. No request waits for any of this: while the database is away, the outbox grows.
"""

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self
from uuid import UUID

import msgspec
from sqlalchemy import or_, select
from sqlalchemy.exc import SQLAlchemyError

from app.database import Database, predictions, subject_keys
from app.errors import ServiceError
from app.predictions.documents import note_uses
from app.predictions.erased import blank, erased_since, is_erased
from app.predictions.log import PredictionLog
from app.predictions.prediction import Outcome, created_at
from app.predictions.rows import COLUMNS
from app.privacy.subject_keys import WrappedKey
from app.privacy.subjects import digest_of_keys

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0
REFUSED_SECONDS = 600.0
"""How long a row that the database did not take is left where it is."""

_JSON = frozenset({"metadata", "passages", "citations", "tool_calls", "messages", "request", "features"})
_INTEGERS = frozenset({"prompt_tokens", "completion_tokens", "answer_characters"})
_TRUTHS = frozenset({"stream", "store", "valid", "declines", "stuck", "called_tools"})
_LARGEST_INTEGER = (1 << 31) - 1

Facts = dict[str, Any]


class WrappedKeys(Protocol):
    """The keys that this replica seals by."""

    async def wrapped(self, ids: Sequence[str]) -> Mapping[str, WrappedKey]:
        """Give those there are of these keys as they are stored; raises Unavailable."""
        ...


class Shipper:
    """Empties the outbox; use it in an `async with` block inside those of the log and the database.

    Args:
        source: the log whose file is the outbox.
        database: where the rows go.
        batch_rows: how many go in one transaction.
        poll_seconds: how often an empty outbox is looked into.
        drain_seconds: how long the end of the block may take to ship what is left; the rest goes at the next start.
        keys: those that rows are sealed by, which go with them.
    """

    def __init__(
        self,
        source: PredictionLog,
        database: Database,
        *,
        batch_rows: int = 200,
        poll_seconds: float = 0.25,
        drain_seconds: float = 5.0,
        keys: WrappedKeys | None = None,
    ) -> None:
        self._source = source
        self._database = database
        self._batch_rows = batch_rows
        self._poll_seconds = poll_seconds
        self._drain_seconds = drain_seconds
        self._keys = keys
        self._refused: dict[int, float] = {}
        """Rows that the database did not take, and when they are tried again."""
        self._failures = 0
        self._oldest: str | None = None
        self.rows = 0
        """Predictions that wait to be shipped, as far as was last seen."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="shipper")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ship what is left, for at most `drain_seconds`."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                await self._drain()
        if self.rows:
            log.warning("%d predictions wait in the outbox for the next start", self.rows)

    @property
    def lag_seconds(self) -> float:
        """The age of the oldest prediction that waits; 0 where none does."""
        return max(0.0, time.time() - created_at(self._oldest).timestamp()) if self._oldest else 0.0

    async def _run(self) -> None:
        while True:
            pause = await self._attempt()
            await asyncio.sleep(pause)

    async def _drain(self) -> None:
        while not self._failures:
            pause = await self._attempt()
            if pause and not self._source.backlog:
                return
            await asyncio.sleep(min(pause, 0.02))

    async def _attempt(self) -> float:
        """Ship a batch, and give the pause until the next; whatever fails, that one may find it mended."""
        try:
            shipped = await self._ship()
        except Exception as error:  # noqa: BLE001 - told by `_tell`, without words that may quote content.
            if not self._failures:
                self._tell(error)
            self._failures += 1
            longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self._failures, 10))
            with suppress(ServiceError):
                self.rows, self._oldest = await self._source.outbox()
            return random.uniform(longest / 2, longest)  # noqa: S311 - so that replicas do not come back all at once.
        if self._failures:
            log.warning("Predictions are shipped to the database again")
        self._failures = 0
        return 0.0 if shipped == self._batch_rows else self._poll_seconds

    def _tell(self, error: Exception) -> None:
        if isinstance(error, ServiceError):
            log.error("Predictions stay in the outbox until the database takes them: %s", error)
        else:
            # What a driver says may quote what it was given.
            log.error("Predictions stay in the outbox: shipping them failed (%s)", type(error).__name__)

    async def _ship(self) -> int:
        now = time.monotonic()
        self._refused = {row: until for row, until in self._refused.items() if until > now}
        rows = await self._source.closed(self._batch_rows, but=self._refused)
        if rows:
            numbers = [row[0] for row in rows]
            facts = await asyncio.to_thread(lambda: [shippable(row[1:]) for row in rows])
            stored = await self._store(numbers, facts)
            await self._source.remove(_by_outcome(numbers, rows, stored))
        if len(rows) == self._batch_rows:
            self.rows, self._oldest = await self._source.outbox()
        else:
            self.rows, self._oldest = len(self._refused), None
        return len(rows)

    async def _store(self, numbers: Sequence[int], facts: Sequence[Facts]) -> set[int]:
        """Put rows into the database; give the numbers of those that it took.

        Raises:
            Unavailable: it takes nothing at present.
        """
        try:
            await self._upsert(facts)
        except (ServiceError, SQLAlchemyError):
            await self._answers()  # So it is one of the rows: the others need not wait for it.
        else:
            return set(numbers)
        stored = set()
        for number, row in zip(numbers, facts, strict=True):
            try:
                await self._upsert([row])
            except (ServiceError, SQLAlchemyError) as error:
                await self._answers()
                self._refused[number] = time.monotonic() + REFUSED_SECONDS
                log.error(  # noqa: TRY400 - a traceback could show content.
                    "The database does not take prediction %s (%s): it stays in the outbox of this replica",
                    row["id"],
                    type(error.__cause__ or error).__name__,
                )
            else:
                stored.add(number)
        return stored

    async def _answers(self) -> None:
        async with self._database.reading() as connection:
            await connection.execute(select(1))

    async def _upsert(self, facts: Sequence[Facts]) -> None:
        """Write rows and note their documents; one that is finished there stays as it is."""
        insert = self._database.insert(predictions)
        over_open = insert.on_conflict_do_update(
            index_elements=[predictions.c.tenant, predictions.c.id],
            set_={name: insert.excluded[name] for name in COLUMNS},
            where=or_(predictions.c.outcome == "open", predictions.c.outcome == "interrupted"),
        )
        sealed_by = sorted({row["subject_key"] for row in facts if row["subject_key"] is not None})
        keys = await self._keys.wrapped(sealed_by) if self._keys is not None and sealed_by else {}
        async with self._database.writing() as connection:
            # Replicas ship beside each other, so a row may appear before one with a lower number: who has to know that
            # none is missing asks for its turn (`History.settled`).
            await self._database.not_while_one(connection, predictions.name)
            erased = await erased_since(connection)
            facts = [{**row, **blank(row)} if is_erased(row, erased) else row for row in facts]
            new = [key._asdict() for key in keys.values() if not _is_gone(key, erased)]
            if new:
                await connection.execute(self._database.insert(subject_keys).on_conflict_do_nothing(), new)
            await connection.execute(over_open, facts)
            await note_uses(self._database, connection, facts)


def _is_gone(key: WrappedKey, erased: Mapping[str, int]) -> bool:
    """Whether a key was destroyed everywhere but here: it must not come back, whatever it sealed since."""
    return key.created_at <= erased.get(digest_of_keys(key.tenant, key.subject), -1)


def shippable(row: Sequence[Any]) -> Facts:
    """Give a row's columns by name as any database takes them.

    PostgreSQL's text has no NUL, its integers are small, and its JSON is read: what it would refuse is replaced by
    U+FFFD, left out, or kept as a string.
    """
    facts = dict(zip(COLUMNS, row, strict=True))
    facts["id"] = str(UUID(bytes=facts["id"]))
    for name, value in facts.items():
        if name in _JSON:
            facts[name] = _valid_json(value)
        elif name in _TRUTHS:
            facts[name] = None if value is None else bool(value)
        elif name in _INTEGERS:
            facts[name] = value if isinstance(value, int) and abs(value) <= _LARGEST_INTEGER else None
        elif isinstance(value, str) and "\0" in value:
            facts[name] = value.replace("\0", "\ufffd")
    return facts


def _valid_json(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return msgspec.json.encode(text).decode()
    return text


def _by_outcome(numbers: Sequence[int], rows: Sequence[Sequence[Any]], stored: set[int]) -> dict[Outcome, list[int]]:
    """The numbers of the rows that were stored, by the outcome they were read with."""
    at = 1 + COLUMNS.index("outcome")
    found: dict[Outcome, list[int]] = {}
    for number, row in zip(numbers, rows, strict=True):
        if number in stored:
            found.setdefault(row[at], []).append(number)
    return found
