"""Follows what is asked and answered, and compares each window with its reference: a kind of work of `hallmark worker`.

The main rule: a step reads what came behind the common position, and ends where a window does. What was found, the
position, and what follows from an alarm are written in one transaction, which does nothing if another worker was
quicker. So a worker may be killed at any moment, and a step that is done again changes nothing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any

import msgspec
from sqlalchemy import Row, Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, drift_followed, drift_streams, drift_windows, predictions
from app.drift.facts import SESSION, Question, QuestionEmbedder, counted, questions_of
from app.drift.following import DriftPlan, Noticed, OpenWindow, Stream, stream_of, values_of, windows_in_90_days
from app.drift.references import MIN_REFERENCE_SESSIONS, keep, newest, questions_in, sealing_keys
from app.drift.states import Alarm, Judged
from app.predictions import History, Settled, created_at
from app.privacy.envelopes import Ring
from app.privacy.sealing import DataKey
from observability.windows import level_for

log = logging.getLogger(__name__)

KEPT_WINDOWS = 200
"""Windows of a stream that are kept."""

IDLE_DAYS = 90
"""How long nothing may be asked of a release before another may be followed in its place."""

_p, _s, _w, _f = predictions.c, drift_streams.c, drift_windows.c, drift_followed.c
_Key = tuple[str, str]


OnAlarm = Callable[[AsyncConnection, Noticed], Awaitable[None]]
"""Has more of a slice labelled, in the connection's transaction."""


class _Batch(msgspec.Struct):
    """What a step has read: the streams it touched, the one whose window is full, and how far it came."""

    revision: int
    end: Settled
    streams: dict[_Key, Stream]
    full: Stream | None
    is_last: bool


class DriftWatcher:
    """Looks for drift; whoever calls `step` again and again is the worker.

    Args:
        database: shared by all replicas and workers.
        history: the predictions there.
        clock: milliseconds since 1970.
        plan: how drift is looked for.
        embedder: embeds kept questions that were searched for nothing, where it is given.
        on_alarm: has more answers labelled.
        ring: opens sealed predictions, and seals the copies of their embeddings.
        batch_rows: answers that are read in one step.
        pace_seconds: from one look at an idle service to the next; each writes a few kilobytes for every release.
    """

    def __init__(
        self,
        database: Database,
        history: History,
        clock: Callable[[], int],
        *,
        plan: DriftPlan | None = None,
        embedder: QuestionEmbedder | None = None,
        on_alarm: OnAlarm | None = None,
        ring: Ring | None = None,
        batch_rows: int = 1_000,
        pace_seconds: float = 15.0,
    ) -> None:
        self._database = database
        self._history = history
        self._clock = clock
        self._plan = plan or DriftPlan()
        self._embedder = embedder
        self._on_alarm = on_alarm
        self._ring = ring
        self._batch_rows = batch_rows
        self._pace_ms = round(pace_seconds * 1000)
        self._looked_at: int | None = None
        self._has_refused = False

    async def step(self) -> bool:
        """Follow a batch of answers, and compare the window that it fills; tells whether there may be more at once.

        Raises:
            Unavailable: the database does not answer.
        """
        now = self._clock()
        if self._looked_at is not None and 0 <= now - self._looked_at < self._pace_ms:
            return False
        self._looked_at = now
        settled = await self._history.settled()
        if settled is None:
            return False
        batch = await self._read(settled)
        if batch is None:
            return False
        if batch.full is None:
            await self._write(batch)
        else:
            await self._compare(batch, batch.full)
        if batch.is_last and batch.full is None:
            return False
        self._looked_at = None
        return True

    # --- reading ---

    async def _read(self, settled: Settled) -> _Batch | None:
        async with self._database.reading() as connection:
            followed = (await connection.execute(select(drift_followed))).one_or_none()
            if followed is not None:
                at = Settled(followed.position, followed.position_id)
                if at == settled:
                    return None
                after = await self._start(connection, at)
                wanted = (*counted(), _p.row > after, _p.row <= settled.row)
                query: Select[Any] = select(_p.row, _p.tenant, _p.release_name, *SESSION).where(*wanted)
                rows = (await connection.execute(query.order_by(_p.row).limit(self._batch_rows))).all()
                streams, references = await self._streams(connection, {(row.tenant, row.release_name) for row in rows})
        if followed is None:
            # What was asked before anybody looked is no concern: a reference can be set from it.
            await self._begin(settled)
            return None
        batch = _Batch(followed.revision, settled, streams, None, len(rows) < self._batch_rows)
        self._follow(batch, at, rows, references)
        return batch

    async def _begin(self, settled: Settled) -> None:
        row = {"id": 1, "revision": 0, "position": settled.row, "position_id": settled.id}
        async with self._database.writing() as connection:
            await connection.execute(self._database.insert(drift_followed).values(row).on_conflict_do_nothing())

    async def _start(self, connection: AsyncConnection, at: Settled) -> int:
        """The row after which to go on."""
        if self._database.kind == "sqlite":
            there = (await connection.execute(select(_p.id).where(_p.row == at.row))).scalar_one_or_none()
            if there != at.id:
                # It was erased, and SQLite may have given its number to another: those before it were looked at.
                last = select(func.max(_p.row)).where(_p.id <= at.id)
                return (await connection.execute(last)).scalar_one() or 0
        return at.row

    async def _streams(
        self, connection: AsyncConnection, keys: set[_Key]
    ) -> tuple[dict[_Key, Stream], dict[_Key, int]]:
        """The streams of these tenants' releases, new ones where there is room, and which reference each has."""
        streams: dict[_Key, Stream] = {}
        for tenant, release in sorted(keys):
            mine = select(drift_streams).where(_s.tenant == tenant, _s.release == release)
            row = (await connection.execute(mine)).one_or_none()
            if row is not None:
                streams[tenant, release] = stream_of(row)
        new = keys - streams.keys()
        if new:
            count = (await connection.execute(select(func.count()).select_from(drift_streams))).scalar_one()
            room = self._plan.max_streams - count
            if room < len(new):
                room += await self._idle(connection)
            for tenant, release in sorted(new)[: max(0, room)]:
                streams[tenant, release] = Stream(tenant, release, self._clock())
            self._tell_refused(len(new) - max(0, room))
        return streams, {key: await newest(connection, *key) for key in streams}

    async def _idle(self, connection: AsyncConnection) -> int:
        """How many streams may go."""
        query = select(func.count()).select_from(drift_streams).where(_s.updated_at < self._idle_since())
        return int((await connection.execute(query)).scalar_one())

    def _idle_since(self) -> int:
        return self._clock() - IDLE_DAYS * 24 * 3600 * 1000

    def _tell_refused(self, refused: int) -> None:
        if refused > 0 and not self._has_refused:
            log.warning("Drift is looked for in %d releases of tenants at most: others wait", self._plan.max_streams)
        self._has_refused = refused > 0

    def _follow(self, batch: _Batch, at: Settled, rows: Sequence[Row[Any]], references: dict[_Key, int]) -> None:
        """Count answers up to the one with which a window is full, which is left for the next step."""
        if not batch.is_last:
            batch.end = Settled(rows[-1].row, rows[-1].id)
        for row in rows:
            key = (row.tenant, row.release_name)
            stream = batch.streams.get(key)
            if stream is not None:
                size = self._plan.window_sessions if references[key] else self._plan.reference_sessions
                if not stream.take(row, size):
                    batch.full, batch.end = stream, at
                    return
            at = Settled(row.row, row.id)

    # --- comparing ---

    async def _compare(self, batch: _Batch, stream: Stream) -> None:
        """Judge a full window, or make it the reference where there is none, and write what follows."""
        window = stream.next_window()
        questions = await questions_of(
            self._database, stream.tenant, stream.release, window.rows, embedder=self._embedder, ring=self._ring
        )
        async with self._database.reading() as connection:
            version = await newest(connection, stream.tenant, stream.release)
            known = []
            if version:
                known = await questions_in(connection, stream.tenant, stream.release, version, ring=self._ring)
            others = select(_s.windows, _s.started_at).where(_s.tenant == stream.tenant, _s.release != stream.release)
            mine = [(row.windows, row.started_at) for row in await connection.execute(others)]
        if not version:
            keys = await sealing_keys(self._ring, questions)
            await self._write(batch, lambda connection: self._hold(connection, stream, window, questions, keys))
            return
        level = level_for(
            windows_in_90_days([*mine, (stream.windows, stream.started_at)], now=self._clock()), self._plan.false_alarms
        )
        seed = int.from_bytes(blake2b(f"{stream.release}/{stream.windows}".encode(), digest_size=4).digest())
        try:
            judged = await asyncio.to_thread(_judge, known, questions, level=level, seed=seed)
        except ValueError:
            # What one tenant has must not keep the worker from all others'.
            log.error("Window %d of %s cannot be compared with its reference", stream.windows + 1, stream.release)  # noqa: TRY400 - a traceback could show content.
            judged = Judged.nothing()
        raised = stream.hear(judged.p_values, version, level, now=self._clock())
        row = _row(stream, window, questions, judged, level, now=self._clock())

        async def note(connection: AsyncConnection) -> None:
            await connection.execute(drift_windows.insert(), row)
            old = (_w.tenant == stream.tenant, _w.release == stream.release)
            await connection.execute(drift_windows.delete().where(*old, _w.number <= stream.windows - KEPT_WINDOWS))
            if raised and self._on_alarm and self._plan.label_rate:
                await self._on_alarm(connection, self._noticed(stream, window, raised))

        if await self._write(batch, note):
            for alarm in raised:
                log.error("The %s of %s have drifted since two windows", alarm.kind, stream.release)

    async def _hold(
        self,
        connection: AsyncConnection,
        stream: Stream,
        window: OpenWindow,
        questions: Sequence[Question],
        keys: Mapping[str, DataKey],
    ) -> None:
        """Keep the first sessions of a release as its reference, unless most of them were erased meanwhile."""
        if len({each.session for each in questions}) < min(MIN_REFERENCE_SESSIONS, self._plan.reference_sessions):
            return
        source = {"kind": "first_traffic", "first_id": window.first_id, "last_id": window.last_id}
        await keep(
            self._database,
            connection,
            stream.tenant,
            stream.release,
            1,
            questions,
            source,
            who="worker:drift",
            now=self._clock(),
            keys=keys,
        )

    def _noticed(self, stream: Stream, window: OpenWindow, raised: Sequence[Alarm]) -> Noticed:
        now = datetime.fromtimestamp(self._clock() / 1000, UTC)
        return Noticed(
            tenant=stream.tenant,
            release=stream.release,
            rate=self._plan.label_rate,
            since=created_at(window.first_id),
            until=now + timedelta(days=self._plan.label_days),
            reason=f"{' and '.join(each.kind for each in raised)} have drifted: window {stream.windows}, which begins "
            f"with {window.first_id}",
        )

    # --- writing ---

    async def _write(self, batch: _Batch, also: Callable[[AsyncConnection], Awaitable[None]] | None = None) -> bool:
        """Write how far a step came, with what was found; nothing, and False, where another worker was quicker."""
        now, to = self._clock(), {"position": batch.end.row, "position_id": batch.end.id}
        async with self._database.writing() as connection:
            mine = drift_followed.update().where(_f.id == 1, _f.revision == batch.revision)
            if not (await connection.execute(mine.values(revision=batch.revision + 1, **to))).rowcount:
                return False
            for stream in batch.streams.values():
                values = values_of(stream, now=now)
                insert = self._database.insert(drift_streams).values(values)
                again = insert.on_conflict_do_update(index_elements=[_s.tenant, _s.release], set_=values)
                await connection.execute(again)
            if any(not stream.windows and not stream.reference for stream in batch.streams.values()):
                await self._make_room(connection)
            if also is not None:
                await also(connection)
        return True

    async def _make_room(self, connection: AsyncConnection) -> None:
        """Forget streams in which nothing was asked for long, where there are too many."""
        count = (await connection.execute(select(func.count()).select_from(drift_streams))).scalar_one()
        if count > self._plan.max_streams:
            idle = select(_s.tenant, _s.release).where(_s.updated_at < self._idle_since())
            for tenant, release in (await connection.execute(idle)).all():
                for table in (drift_windows, drift_streams):
                    mine = (table.c.tenant == tenant, table.c.release == release)
                    await connection.execute(table.delete().where(*mine))


def _judge(known: Sequence[Question], questions: Sequence[Question], *, level: float, seed: int) -> Judged:
    from app.drift.judging import judge  # With scipy, which a worker does without until a window is full.

    return judge(known, questions, level=level, seed=seed)


def _row(
    stream: Stream, window: OpenWindow, questions: Sequence[Question], judged: Judged, level: float, *, now: int
) -> dict[str, Any]:
    return {
        "tenant": stream.tenant,
        "release": stream.release,
        "number": stream.windows,
        "reference": stream.reference,
        "first_id": window.first_id,
        "last_id": window.last_id,
        "sessions": len({each.session for each in questions}),
        "questions": len(questions),
        "level": level,
        "inputs": msgspec.json.encode(judged.inputs).decode() if judged.inputs else None,
        "outputs": msgspec.json.encode(judged.outputs).decode() if judged.outputs else None,
        "clusters": msgspec.json.encode(judged.clusters).decode(),
        "judged_at": now,
    }
