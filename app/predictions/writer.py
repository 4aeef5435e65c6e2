"""The thread that puts predictions on the disk, with one commit for all that gathered during the last one."""

import asyncio
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

import msgspec

from app import database
from app.predictions.keeping import Keeper
from app.predictions.prediction import Outcome, Prediction
from app.predictions.rows import INTERRUPT_OPEN, MAX_ROWS, REMOVE, Row, insert, salvaged_row, upsert
from app.privacy.sealing import CannotOpen

log = logging.getLogger(__name__)


class Tally(Protocol):
    """Counts what becomes of records; called in the writer's thread."""

    def recorded(self, rows: int, seconds: float) -> None:
        """One commit put `rows` closed predictions on the disk."""
        ...

    def unrecorded(self, result: Literal["failed", "dropped", "interrupted"], rows: int = 1) -> None:
        """So many rows were refused by the disk for now, given up, or found open after a crash."""
        ...


GATHER_SECONDS = 0.001
"""How long a commit waits for others when answers are in flight: two rows a commit cost twice what ten do."""

ROOM_SECONDS = 0.5
"""How often the room on the disk is looked at while nothing is written: others may take it, or give it back."""

WRITTEN_ROOM_SECONDS = 0.02
"""How often while rows are written and there is little left: after every commit it would be dearer than a row. What a
disk can take in that time is a part of the reserve: 20 MB at a gigabyte a second, and as much to put them in place."""


class Job(msgspec.Struct, eq=False):
    """A row on its way to the disk, and who waits for it there."""

    prediction: Prediction
    is_first: bool = False
    """Whether no other row of its id was ever handed over: then there is none to look for."""
    waiters: list[tuple[float, asyncio.Future[None]]] = []


class Removal:
    """Rows that may go from the disk, each with the outcome it was read with, and who waits for that."""

    __slots__ = ("rows", "waiter")

    def __init__(self, rows: Mapping[Outcome, Sequence[int]], waiter: asyncio.Future[None]) -> None:
        self.rows = rows
        self.waiter = waiter


Errand = Callable[[sqlite3.Connection], None]
"""Something to be done between two commits; it raises nothing."""


class Writer:
    """The one thread that writes: it commits what has gathered and tries again for as long as the disk refuses."""

    # What a value or its subject's key, not the disk, is to blame for.
    UNWRITABLE = (
        CannotOpen,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
        sqlite3.ProgrammingError,
        sqlite3.InterfaceError,
        sqlite3.DataError,
        sqlite3.IntegrityError,
    )

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        committed: Callable[[list[Job]], None],
        removed: Callable[[list[Removal]], None] = lambda _: None,
        failed: Callable[[Exception], None],
        in_flight: Callable[[], int] = lambda: 0,
        look_for_room: Callable[[], float] = lambda: 0.0,
        keeper: Keeper | None = None,
        tally: Tally | None = None,
    ) -> None:
        """All callbacks are called in the writer's thread; `in_flight` counts the predictions open.

        `look_for_room` is called every `ROOM_SECONDS`, and after commits every `WRITTEN_ROOM_SECONDS`, or as much later
        as it says: it gives the seconds for which there is room whatever is written.
        """
        self._connection = connection
        self._committed = committed
        self._removed = removed
        self._failed = failed
        self._in_flight = in_flight
        self._look_for_room = look_for_room
        self._keeper = keeper or Keeper()
        self._tally = tally
        self._mailbox: SimpleQueue[list[Job] | Removal | Errand | None] = SimpleQueue()
        self._removals: list[Removal] = []
        self._errands: list[Errand] = []
        self._give_up_at = float("inf")
        # A daemon, so that a disk which never answers cannot keep the process alive.
        self.thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)

    def put(self, jobs: list[Job]) -> None:
        """Have `jobs` written; a later job of the same id supersedes an earlier one."""
        self._mailbox.put(jobs)

    def remove(self, removal: Removal) -> None:
        """Have rows removed along with the next commit: a writer beside this one would make it wait."""
        self._mailbox.put(removal)

    def run(self, errand: Errand) -> None:
        """Have an errand done by the thread that has the connection."""
        self._mailbox.put(errand)

    def stop(self, drain_seconds: float) -> None:
        """Have the thread end when everything is written, or after `drain_seconds` of trying."""
        self._give_up_at = time.monotonic() + drain_seconds
        self._mailbox.put(None)

    def _run(self) -> None:
        try:
            self._write_until_stopped()
        except Exception as error:
            log.exception("The prediction log's writer ended: nothing is recorded until the service is restarted")
            self._failed(error)

    def _write_until_stopped(self) -> None:
        batch: list[Job] = []
        retry_at, pause, refused = 0.0, 0.05, 0
        looked_at = look_at = lasts = 0.0
        stopped = False
        while not stopped or (batch and time.monotonic() < self._give_up_at):
            wake_at = retry_at if batch or self._removals else look_at
            stopped |= self._receive(batch, max(0.0, wake_at - time.monotonic()))
            if time.monotonic() >= look_at:
                lasts = self._look_for_room()
                looked_at = time.monotonic()
                look_at = looked_at + ROOM_SECONDS
            while self._errands:
                self._errands.pop()(self._connection)
            if not (batch or self._removals) or time.monotonic() < retry_at:
                continue
            opening = sum(job.prediction.outcome == "open" for job in batch)
            if self._in_flight() > opening and not stopped:
                time.sleep(GATHER_SECONDS)
                stopped |= self._receive(batch, 0.0)
            started = time.perf_counter()
            try:
                self._commit(batch)
            except sqlite3.Error as error:
                self._failed(error)
                self._count_unrecorded("failed", len(batch) - refused)
                refused = len(batch)
                retry_at, pause = time.monotonic() + pause, min(2 * pause, 1.0)
                with suppress(sqlite3.Error):
                    database.shorten_journal(self._connection)  # If that is what filled the disk, nothing else will.
            else:
                self._tell(batch, time.perf_counter() - started)
                batch, retry_at, pause, refused = [], 0.0, 0.05, 0
                look_at = looked_at + min(ROOM_SECONDS, max(WRITTEN_ROOM_SECONDS, lasts))
        if batch:
            self._count_unrecorded("dropped", len(batch))
            log.critical("The prediction log was closed with %d records not on the disk", len(batch))
        else:
            self._connection.execute(INTERRUPT_OPEN)

    def _tell(self, batch: list[Job], seconds: float) -> None:
        """Tell whoever waits that it is on the disk, or gone from it."""
        self._committed(batch)
        if self._removals:
            self._removed(self._removals)
            self._removals = []
            self._connection.execute("PRAGMA secure_delete=ON")
        if self._tally is not None and batch:
            self._tally.recorded(sum(job.prediction.outcome != "open" for job in batch), seconds)

    def _count_unrecorded(self, result: Literal["failed", "dropped"], rows: int) -> None:
        if self._tally is not None and rows:
            self._tally.unrecorded(result, rows)

    def _receive(self, batch: list[Job], wait_seconds: float) -> bool:
        """Add all that is queued to `batch`, waiting for the first of it; say whether the end of the queue was met."""
        try:
            jobs = self._mailbox.get(timeout=wait_seconds)
            while jobs is not None:
                if isinstance(jobs, Removal):
                    self._removals.append(jobs)
                elif isinstance(jobs, list):
                    batch += jobs
                else:
                    self._errands.append(jobs)
                jobs = self._mailbox.get_nowait()
        except Empty:
            return False
        return True

    def _commit(self, batch: list[Job]) -> None:
        jobs = {job.prediction.id: job for job in batch}.values()
        rows = self._rows(jobs)
        if self._is_one_statement(jobs):
            with suppress(*self.UNWRITABLE):
                self._connection.execute(*insert(rows))
                return
        if self._removals:
            # Overwriting what goes takes room, which a full disk has not: that it goes comes first.
            self._connection.execute("PRAGMA secure_delete=FAST")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._keeper.can_open(rows):
                rows = self._rows(jobs)
            try:
                self._write([row for job, row in zip(jobs, rows, strict=True) if job.is_first], insert)
                self._write([row for job, row in zip(jobs, rows, strict=True) if not job.is_first], upsert)
            except self.UNWRITABLE:
                for job, row in zip(jobs, rows, strict=True):
                    self._write_salvaging(job.prediction, row)
            for removal in self._removals:
                for outcome, numbers in removal.rows.items():
                    self._connection.execute(REMOVE, (outcome, json.dumps(numbers)))
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _is_one_statement(self, jobs: Collection[Job]) -> bool:
        """Whether all that is to be written is new rows that one statement writes, which is a transaction by itself.

        Beginning and ending one are two more statements, and each takes Python's lock from the requests twice.
        """
        if not 0 < len(jobs) <= MAX_ROWS or self._removals or self._keeper.seals:
            return False
        return all(job.is_first for job in jobs)

    def _write(self, rows: list[Row], statement: Callable[[list[Row]], tuple[str, list[Any]]]) -> None:
        for at in range(0, len(rows), MAX_ROWS):
            self._connection.execute(*statement(rows[at : at + MAX_ROWS]))

    def _rows(self, jobs: Collection[Job]) -> list[Row]:
        """Make the rows; what their content is sealed by is on the disk before they are."""
        with self._keeper.making():
            return [self._row(job.prediction) for job in jobs]

    def _row(self, prediction: Prediction) -> Row:
        try:
            return self._keeper.row(prediction)
        except self.UNWRITABLE as error:
            return self._salvaged(prediction, error)

    def _write_salvaging(self, prediction: Prediction, row: Row) -> None:
        try:
            self._connection.execute(*upsert([row]))
        except self.UNWRITABLE as error:
            self._connection.execute(*upsert([self._salvaged(prediction, error)]))

    def _salvaged(self, prediction: Prediction, error: Exception) -> Row:
        log.error(
            "Prediction %s is recorded without its content, which cannot be written (%s)",
            prediction.id,
            type(error).__name__,
        )
        return salvaged_row(self._keeper.named(prediction))
