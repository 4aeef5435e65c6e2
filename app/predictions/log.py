"""The log as the gateway sees it: hand over now, wait for the disk only where a promise depends on it."""

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import UUID

import msgspec

from app import database
from app.errors import RecordUnavailable
from app.predictions.keeping import Keeper
from app.predictions.prediction import Outcome, Prediction
from app.predictions.rows import BACKLOG, CLOSED, INTERRUPT_OPEN, SELECT, facts_of, from_facts
from app.predictions.sealed import Keys
from app.predictions.writer import Job, Removal, Tally, Writer

T = TypeVar("T")
log = logging.getLogger(__name__)

FASTEST_BYTES_PER_SECOND = 2e9
"""How fast room can go, whoever writes: a disk takes half of it, and what is written ahead takes room twice."""


class PredictionLog:
    """The predictions of the database at `path`: written from the event loop that opened it, read by anyone.

    Args:
        path: the SQLite file, made if absent. One log at a time may have it open.
        capacity: rows that may wait for the disk before `open` refuses more.
        linger_seconds: how long an opening row nobody waits for waits for its closing one; at most twice as long.
        commit_seconds: how long a caller waits for the disk before it is told that the record is unavailable.
        drain_seconds: how long closing the log may take to write what is left.
        max_bytes: a size the database may not outgrow, treated like a full disk.
        reserve_bytes: room on the disk below which `open` refuses more. It is for the rows of what was opened before,
            and for emptying the log, which needs some too: on a disk that is full to the last byte nothing goes on.
        room_bytes: measures that room.
        keeper: decides what of a prediction is written.
        keys: open what it sealed.
        tally: counts what becomes of records.
    """

    def __init__(
        self,
        path: Path,
        *,
        capacity: int = 4096,
        linger_seconds: float = 0.003,
        commit_seconds: float = 5.0,
        drain_seconds: float = 10.0,
        max_bytes: int | None = None,
        reserve_bytes: int = 0,
        room_bytes: Callable[[sqlite3.Connection, Path], int] = database.room_bytes,
        keeper: Keeper | None = None,
        keys: Keys | None = None,
        tally: Tally | None = None,
    ) -> None:
        self._path = path
        self._keeper = keeper
        self._keys = keys
        self._capacity = capacity
        self._linger_seconds = linger_seconds
        self._commit_seconds = commit_seconds
        self._drain_seconds = drain_seconds
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._room_bytes = room_bytes
        self._tally = tally
        self._is_open = False
        self._is_failing = False
        self._is_full = False
        self._had_room = True  # As the writer's thread measured it last.
        self._undurable: dict[str, Job] = {}  # The latest row of each id that is not yet on the disk.
        # The opening rows among them that the writer has not been given: those since the timer rang, and those before.
        self._lingering: dict[str, Job] = {}
        self._lingering_longer: dict[str, Job] = {}
        self._answering = 0  # Predictions opened and not yet closed.
        self._linger_timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        """Open the log; rows that a dead process left open become interrupted.

        Raises:
            DataDirectoryBusy: another log has this database open.
            RecordUnavailable: the database cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._resources, self._writer, self._reading = await asyncio.to_thread(self._start)
        except database.CONNECT_ERRORS as error:
            raise RecordUnavailable(f"The prediction log {str(self._path)!r} cannot be opened: {error}.") from error
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prediction-reader")
        self._is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write what is left, for at most `drain_seconds`; what is still open then is recorded as interrupted."""
        self._is_open = False
        for timer in (self._linger_timer, self._watch_timer):
            if timer:
                timer.cancel()
        self._lingering_longer |= self._lingering
        self._lingering = {}
        self._linger_over()
        self._writer.stop(self._drain_seconds)
        await asyncio.shield(asyncio.to_thread(self._finish))
        self._refuse_waiters(waiting_since=self._loop.time())

    @property
    def healthy(self) -> bool:
        """Whether records reach the disk, as far as the last commit tells, and there is room for more."""
        return self._problem() is None

    def _problem(self) -> str | None:
        """Why nothing more is taken, if so."""
        if not self._is_open:
            return "is closed"
        if self._is_failing:
            return "cannot write to its disk"
        return "has too little room on its disk" if self._is_full else None

    @property
    def backlog(self) -> int:
        """Rows that are not on the disk yet."""
        return len(self._undurable)

    def open(self, prediction: Prediction) -> None:
        """Promise the prediction a row, with the facts known so far; does not wait.

        Raises:
            RecordUnavailable: the disk refuses records, or too many wait for it. The engine must not be called.
            ValueError: the id is not a UUID.
        """
        if len(prediction.id) != 36:
            raise ValueError(f"{prediction.id!r} is not the id of a prediction: uuid7() makes one.")
        if (problem := self._problem()) is not None:
            raise _unavailable(problem)
        if len(self._undurable) >= self._capacity:
            raise _unavailable("has as many records waiting for its disk as it may")
        self._answering += 1
        # Copied only when it is handed over: most answers are closed before that.
        self._lingering[prediction.id] = self._undurable[prediction.id] = Job(prediction)
        if self._linger_timer is None:
            self._linger_timer = self._loop.call_later(self._linger_seconds, self._linger_over)

    def opened(self, prediction: Prediction) -> asyncio.Future[None]:
        """What is done when the opening row is on the disk: from then on the id may be shown.

        It fails with:
            RecordUnavailable: the row is not there after `commit_seconds`; the log goes on trying.
        """
        job = self._undurable.get(prediction.id)
        if job is not None and self._stop_lingering(prediction.id):
            self._writer.put([_opening(job)])
        return self._durable(job)

    def close_nowait(self, prediction: Prediction) -> None:
        """Hand over the closing row; a second time does nothing. An outcome still open becomes interrupted."""
        if prediction.handed_over:
            return
        prediction.handed_over = True
        self._answering -= 1
        if prediction.outcome == "open":
            prediction.outcome = "interrupted"
        # The closing row says all that an opening one would have.
        is_first = self._stop_lingering(prediction.id)
        job = self._undurable[prediction.id] = Job(msgspec.structs.replace(prediction), is_first=is_first)
        self._writer.put([job])

    def close(self, prediction: Prediction) -> asyncio.Future[None]:
        """Hand over the closing row, unless that was done; what is given is done when it is on the disk.

        It fails with:
            RecordUnavailable: the row is not there after `commit_seconds`; the log goes on trying.
        """
        self.close_nowait(prediction)
        return self._durable(self._undurable.get(prediction.id))

    async def get(self, tenant: str, prediction_id: str) -> Prediction | None:
        """Read one prediction of the tenant, open or closed; None if there is none or the id is not one."""
        try:
            key = UUID(prediction_id).bytes
        except ValueError:
            return None
        rows = await self._read(f"{SELECT} WHERE tenant = ? AND id = ?", tenant, key)
        if not rows:
            return None
        facts = facts_of(rows[0])
        keys = None
        if self._keys is not None:
            keys = await self._keys.opening([facts["subject_key"]]) if facts["sealed"] is not None else {}
        return from_facts(facts, keys)

    async def closed(self, limit: int, *, but: Collection[int] = ()) -> list[tuple[Any, ...]]:
        """Read rows that are closed, the oldest first: the row's number, then `COLUMNS`; leave out those in `but`."""
        return await self._read(CLOSED, json.dumps(sorted(but)), limit)

    async def outbox(self) -> tuple[int, str | None]:
        """Count the rows that are closed, and give the id of the oldest one."""
        ((count, first),) = await self._read(BACKLOG)
        return int(count), str(UUID(bytes=first)) if first else None

    async def remove(self, rows: Mapping[Outcome, Sequence[int]]) -> None:
        """Have rows removed that are kept elsewhere now; one whose outcome is another by now stays."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._writer.remove(Removal(rows, waiter))
        await waiter

    async def scrub(self) -> bool:
        """Leave nothing in the file of rows that are gone from it; False if that has to be tried again later."""
        waiter: asyncio.Future[bool] = self._loop.create_future()

        def tell(was_done: bool) -> None:
            if not waiter.done():
                waiter.set_result(was_done)

        self._writer.run(lambda connection: self._tell_loop(tell, database.scrubbed(connection, self._path)))
        return await waiter

    async def _read(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        def fetch() -> list[tuple[Any, ...]]:
            return self._reading.execute(sql, parameters).fetchall()

        try:
            return await self._loop.run_in_executor(self._reader, fetch)
        except sqlite3.Error as error:
            raise _unavailable("cannot be read") from error

    def _start(self) -> tuple[ExitStack, Writer, sqlite3.Connection]:
        with ExitStack() as stack:
            stack.enter_context(database.exclusive(self._path.with_name(f"{self._path.name}.lock")))
            writing = stack.enter_context(closing(database.connect(self._path)))
            reading = stack.enter_context(closing(database.connect(self._path)))
            if self._max_bytes is not None:
                (page_bytes,) = writing.execute("PRAGMA page_size").fetchone()
                writing.execute(f"PRAGMA max_page_count = {self._max_bytes // page_bytes}")
            interrupted = writing.execute(INTERRUPT_OPEN).rowcount
            if self._tally is not None and interrupted:
                self._tally.unrecorded("interrupted", interrupted)
            writer = Writer(
                writing,
                committed=lambda jobs: self._tell_loop(self._committed, jobs),
                removed=lambda removals: self._tell_loop(_removed, removals),
                failed=lambda error: self._tell_loop(self._failed, error),
                in_flight=lambda: self._answering,
                look_for_room=lambda: self._look_for_room(writing),
                keeper=self._keeper,
                tally=self._tally,
            )
            writer.thread.start()
            return stack.pop_all(), writer, reading

    def _finish(self) -> None:
        self._reader.shutdown()
        self._writer.thread.join(self._drain_seconds + 1.0)
        if self._writer.thread.is_alive():
            return  # The disk does not answer: the connection is in use, and the process's end is what releases it.
        self._resources.close()

    def _tell_loop(self, function: Callable[[T], None], argument: T) -> None:
        # The loop may be gone when the service was torn down without closing the log.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)

    def _stop_lingering(self, prediction_id: str) -> bool:
        """Take an opening row out of those that linger; say whether it was there."""
        found = self._lingering.pop(prediction_id, None) or self._lingering_longer.pop(prediction_id, None)
        return found is not None

    def _linger_over(self) -> None:
        """Hand over the rows that the timer meets for the second time: those that just came linger all their time."""
        if self._lingering_longer:
            self._writer.put([_opening(job) for job in self._lingering_longer.values()])
        self._lingering_longer, self._lingering = self._lingering, {}
        is_over = not self._lingering_longer
        self._linger_timer = None if is_over else self._loop.call_later(self._linger_seconds, self._linger_over)

    def _committed(self, jobs: list[Job]) -> None:
        if self._is_failing:
            self._is_failing = False
            log.warning("Predictions are recorded again")
        for job in jobs:
            if self._undurable.get(job.prediction.id) is job:
                del self._undurable[job.prediction.id]
            for _, waiter in job.waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _failed(self, error: Exception) -> None:
        if self._is_open and not self._is_failing:
            self._is_failing = True
            log.error("Predictions cannot be recorded and requests are refused until they can: %s", error)

    def _look_for_room(self, connection: sqlite3.Connection) -> float:
        """Measure the room on the disk, in the writer's thread; gives the seconds for which it is enough at least."""
        room = 0
        if not self._had_room:
            with suppress(sqlite3.Error):
                database.shorten_journal(connection)  # Nothing new is written now that would do it.
        with suppress(OSError, sqlite3.Error):  # A disk that does not tell will say so when it is written to.
            room = self._room_bytes(connection, self._path)
            # A little more than the reserve ends a shortage, so that it does not end with every row that goes.
            enough = self._reserve_bytes if self._had_room else self._reserve_bytes * 9 // 8
            if (room >= enough) != self._had_room:
                self._had_room = room >= enough
                self._tell_loop(self._measured, self._had_room)  # Waking it costs more than measuring: only for news.
        return (room - self._reserve_bytes) / FASTEST_BYTES_PER_SECOND

    def _measured(self, has_room: bool) -> None:
        self._is_full = not has_room
        if has_room:
            log.warning("There is room for predictions again")
        else:
            log.error("Requests are refused: the disk has less than %d bytes left", self._reserve_bytes)

    def _durable(self, job: Job | None) -> asyncio.Future[None]:
        """What is done when the row is on the disk; where there is no job it is."""
        waiter = self._loop.create_future()
        if job is None:
            waiter.set_result(None)
            return waiter
        job.waiters.append((self._loop.time(), waiter))
        if self._watch_timer is None:
            self._watch_timer = self._loop.call_later(self._commit_seconds / 4, self._watch)
        return waiter

    def _watch(self) -> None:
        """Tell those who waited too long, by one timer for all: one for each would cost more than the row."""
        self._watch_timer = None
        if self._refuse_waiters(waiting_since=self._loop.time() - self._commit_seconds):
            self._watch_timer = self._loop.call_later(self._commit_seconds / 4, self._watch)

    def _refuse_waiters(self, *, waiting_since: float) -> bool:
        """Fail whoever waits since before that moment of the loop's clock; say whether others go on waiting."""
        others = False
        for job in self._undurable.values():
            for since, waiter in job.waiters:
                if waiter.done():
                    continue
                if since <= waiting_since:
                    waiter.set_exception(_unavailable("could not put this record on its disk in time"))
                    self._failed(TimeoutError("the disk does not answer"))
                else:
                    others = True
        return others


def _removed(removals: list[Removal]) -> None:
    for removal in removals:
        if not removal.waiter.done():
            removal.waiter.set_result(None)


def _opening(job: Job) -> Job:
    """Fix an opening row as it is now: its prediction goes on changing."""
    job.prediction = msgspec.structs.replace(job.prediction)
    job.prediction.outcome = "open"
    return job


def _unavailable(what: str) -> RecordUnavailable:
    return RecordUnavailable(f"The prediction log {what}. Try again shortly.", retry_after_seconds=1.0)
