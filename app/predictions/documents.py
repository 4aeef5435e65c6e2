"""Which documents predictions rest on, in a table of its own beside them.

The main rule: what a prediction was given and cited is noted in the transaction that moves it or that says how far the
table has followed, so that a crash leaves nothing out; noting it twice changes nothing. It is done off the request's
path: with a database that replicas share by the shipper, else by a follower of the log's own file.
"""

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import msgspec
from sqlalchemy import Row, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, followed, prediction_documents, predictions
from app.errors import Unavailable
from app.predictions.history import LAST_ID

log = logging.getLogger(__name__)

MAX_ROWS_PASSED = 4_000
"""How many predictions one transaction may pass that were given no documents: some milliseconds' worth."""

MAX_BATCHES_AT_ONCE = 50
"""How far behind the table may be for a question to wait for it."""

_table = predictions.c
_looked_at = (_table.row, _table.id, _table.tenant, _table.outcome, _table.passages, _table.citations)
_decode = msgspec.json.Decoder(list[dict[str, Any]]).decode


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """That a prediction was given a version of a document, and perhaps cited it."""

    prediction_id: str
    document_id: str
    document_version: str
    cited: bool


Items = Sequence[Mapping[str, Any]]


def uses_of(prediction_id: str, passages: Items | None, citations: Items | None) -> list[Use]:
    """The documents of a prediction, each version once."""
    found: dict[tuple[str, str], bool] = {}
    for items, cited in ((passages, False), (citations, True)):
        for item in items or ():
            document, version = item.get("document_id"), item.get("document_version")
            if isinstance(document, str) and isinstance(version, str):
                key = document.replace("\0", "\ufffd"), version.replace("\0", "\ufffd")  # PostgreSQL's text has no NUL.
                found[key] = found.get(key, False) or cited
    return [
        Use(prediction_id=prediction_id, document_id=document, document_version=version, cited=cited)
        for (document, version), cited in found.items()
    ]


async def note_uses(database: Database, connection: AsyncConnection, rows: Iterable[Mapping[str, Any]]) -> None:
    """Note the documents of these predictions, in the connection's transaction."""
    uses = [
        {"tenant": facts["tenant"], **msgspec.structs.asdict(use)}
        for facts in rows
        for use in uses_of(facts["id"], _items(facts["passages"]), _items(facts["citations"]))
    ]
    if uses:
        insert = database.insert(prediction_documents)
        known = prediction_documents.c
        once = insert.on_conflict_do_update(
            index_elements=[known.tenant, known.document_id, known.prediction_id, known.document_version],
            set_={"cited": or_(known.cited, insert.excluded.cited)},
        )
        await connection.execute(once, uses)


class DocumentUses:
    """Answers which predictions used a document; follows the log where that writes into the same database.

    Args:
        database: where the predictions are.
        follows: whether the log writes there itself; with a shipper they are noted as they arrive.
        batch_rows: predictions with documents noted in one transaction, which the log's writer has to wait for.
        poll_seconds: how often new ones are looked for.
    """

    def __init__(self, database: Database, *, follows: bool, batch_rows: int = 200, poll_seconds: float = 2.0) -> None:
        self._database = database
        self._follows = follows
        self._batch_rows = batch_rows
        self._poll_seconds = poll_seconds
        self._following = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._follows:
            self._task = asyncio.create_task(self._follow(), name="document-uses")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def find(
        self,
        tenant: str,
        document_id: str,
        *,
        version: str | None = None,
        cited: bool | None = None,
        limit: int,
        before: str | None = None,
    ) -> list[Use]:
        """List the predictions that were given the document, the newest first, with all its versions of the last one.

        A page may have a few more than `limit`: versions of one prediction stay together.

        Raises:
            Unavailable: the table has yet to be made of many predictions.
        """
        if self._follows:
            await self._catch_up()
        known = prediction_documents.c
        query = select(prediction_documents).where(
            known.tenant == tenant, known.document_id == document_id, known.prediction_id < (before or LAST_ID)
        )
        if version is not None:
            query = query.where(known.document_version == version)
        if cited is not None:
            query = query.where(known.cited == cited)
        query = query.order_by(known.prediction_id.desc(), known.document_version)
        async with self._database.reading() as connection:
            found = [_use(row) for row in await connection.execute(query.limit(limit))]
            if len(found) == limit:
                rest = query.where(known.prediction_id == found[-1].prediction_id)
                found = [use for use in found if use.prediction_id != found[-1].prediction_id]
                found += [_use(row) for row in await connection.execute(rest)]
        return found

    async def _catch_up(self) -> None:
        for _ in range(MAX_BATCHES_AT_ONCE):
            if await self._step() < self._batch_rows:
                return
        raise Unavailable("Which documents were used is still being found out. Try again.", retry_after_seconds=5.0)

    async def _follow(self) -> None:
        failing = False
        while True:
            pause = self._poll_seconds
            try:
                if await self._step() == self._batch_rows:
                    pause = 0.05  # A long history is read in the background, and leaves the log its turns.
            except Unavailable as error:
                if not failing:
                    log.warning("Which documents predictions used cannot be noted for now: %s", error)
                failing = True
            except Exception:
                if not failing:
                    log.exception("Which documents predictions used cannot be noted")
                failing = True
            else:
                failing = False
            await asyncio.sleep(pause)

    async def _step(self) -> int:
        """Note what is new; give how many predictions that were, or `batch_rows` where there may be more."""
        async with self._following:
            async with self._database.reading() as connection:
                state = (await connection.execute(select(followed))).one()
                if not await self._is_new(connection, state):
                    return 0
            async with self._database.writing() as connection:
                return await self._advance(connection)

    async def _is_new(self, connection: AsyncConnection, state: Row[Any]) -> bool:
        """Whether there is anything to note: asking costs the log nothing, writing makes it wait."""
        last = select(predictions.c.row, predictions.c.id).order_by(predictions.c.row.desc()).limit(1)
        newest = (await connection.execute(last)).one_or_none()
        if newest is not None and tuple(newest) != (state.row, state.prediction_id):
            return True
        still_open = json.loads(state.still_open)
        found = await _rows(connection, still_open) if still_open else []
        return any(row.outcome != "open" for row in found)

    async def _advance(self, connection: AsyncConnection) -> int:
        state = (await connection.execute(select(followed))).one()
        after, still_open = state.row, json.loads(state.still_open)
        if after and await _id_of(connection, after) != state.prediction_id:
            after, still_open = 0, []  # It was erased, and SQLite may have given its number to another.
        fresh, end = await self._met(connection, after)
        rows = [*(await _rows(connection, still_open)), *fresh]
        await note_uses(self._database, connection, [row._asdict() for row in rows if row.outcome != "open"])
        values: dict[str, Any] = {"still_open": json.dumps([row.row for row in rows if row.outcome == "open"])}
        if end > after:
            values |= {"row": end, "prediction_id": await _id_of(connection, end)}
        await connection.execute(followed.update().values(values))
        newest = (await connection.execute(select(func.max(_table.row)))).scalar_one()
        return self._batch_rows if newest is not None and newest > end else len(fresh)

    async def _met(self, connection: AsyncConnection, after: int) -> tuple[Sequence[Any], int]:
        """The next predictions to look at, and the row up to which there are no others.

        What was given no documents is passed in the database: sqlite3 takes Python's lock anew for every row it brings,
        which costs the event loop's thread as much as an answer does. Where to stop is looked up and not counted out,
        because that would read every page of them once more.
        """
        near = select(func.max(_table.row)).where(_table.row > after, _table.row <= after + MAX_ROWS_PASSED)
        last = (await connection.execute(near)).scalar_one()
        if last is None:  # There is no later one, or so many in a row were erased.
            later = select(func.min(_table.row)).where(_table.row > after)
            if (last := (await connection.execute(later)).scalar_one()) is None:
                return [], after
        told = or_(_table.outcome == "open", _table.passages.is_not(None), _table.citations.is_not(None))
        met = select(*_looked_at).where(_table.row > after, _table.row <= last, told).order_by(_table.row)
        fresh = (await connection.execute(met.limit(self._batch_rows))).all()
        return fresh, fresh[-1].row if len(fresh) == self._batch_rows else last


async def _id_of(connection: AsyncConnection, row: int) -> str | None:
    return (await connection.execute(select(_table.id).where(_table.row == row))).scalar_one_or_none()


async def _rows(connection: AsyncConnection, numbers: Sequence[int]) -> list[Row[Any]]:
    """Those of the rows that are still there."""
    found: list[Row[Any]] = []
    for at in range(0, len(numbers), 500):
        found += await connection.execute(select(*_looked_at).where(predictions.c.row.in_(numbers[at : at + 500])))
    return found


def _use(row: Row[Any]) -> Use:
    return Use(
        prediction_id=row.prediction_id,
        document_id=row.document_id,
        document_version=row.document_version,
        cited=row.cited,
    )


def _items(written: str | None) -> Items:
    return _decode(written) if written else ()
