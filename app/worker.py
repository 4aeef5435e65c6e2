"""`hallmark worker`: the periodic work, in a process of its own, so that no request ever waits for it.

Any number of workers share the work through the database that the replicas share: each kind has a lease, which its
holder renews while it works. When a worker is killed another takes over as soon as the lease has expired.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from pathlib import Path

from app.alerts import Evaluator, Notifier, Webhook
from app.alerts.evaluating import EVERY_SECONDS
from app.database import Database
from app.datasets import Changes, Store
from app.drift import Drift, DriftPlan
from app.drift.facts import QuestionEmbedder
from app.drift.watching import DriftWatcher
from app.erasure import Eraser, Retention, UnusedKeys
from app.errors import Unavailable
from app.guards import Watcher
from app.leases import Leases
from app.predictions import History
from app.predictions import Keeper as PredictionKeeper
from app.privacy_wiring import Privacy
from app.quality import Apart, Keeper
from app.quality.keeping import REST
from app.quality.making import Maker
from app.review import Raising
from observability import logs

log = logging.getLogger(__name__)

LEASE_SECONDS = 3.0
"""How long a killed worker's work waits for another. A rollback is due within five seconds."""

RENEW_SECONDS = 1.0
POLL_SECONDS = 0.5

REST_PER_WORK = 1.0
"""Seconds of rest for each second in which alerts read pages of rows, so that others get at the database."""

Step = Callable[[], Awaitable[bool]]
"""Does a piece of the work; tells whether there may be more at once."""


class Worker:
    """Does each kind of work while it has the lease on it.

    Args:
        leases: of this process.
        work: the step of each kind, by its name.
        poll_seconds: the pause where there is nothing to do.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        leases: Leases,
        work: Mapping[str, Step],
        *,
        poll_seconds: float = POLL_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._work = work
        self._poll_seconds = poll_seconds
        self._lease_seconds = lease_seconds
        self._renew_seconds = min(RENEW_SECONDS, lease_seconds / 3)
        self._clock = clock
        self._renewed: dict[str, float] = {}
        self._failing: set[str] = set()

    async def run(self) -> None:
        """Work until cancelled, and give back what is held."""
        try:
            async with asyncio.TaskGroup() as kinds:
                for name in self._work:
                    kinds.create_task(self._keep(name), name=name)
        finally:
            for name in self._renewed:
                with suppress(Unavailable):
                    await asyncio.shield(self._leases.give_back(name))

    async def turn(self, name: str) -> bool:
        """Do a step of one kind of work, if this process has the lease on it; whatever fails is tried again later."""
        try:
            more = await self._holds(name) and await self._step(name)
        except Unavailable as error:
            self._failed(name, str(error))
        except Exception as error:  # noqa: BLE001 - what a driver says may quote content.
            self._failed(name, type(error).__name__)
        else:
            self._failing.discard(name)
            return more
        return False

    async def _step(self, name: str) -> bool:
        """Do a step, and renew the lease while it lasts; without the lease it is another process's."""
        step = asyncio.ensure_future(self._work[name]())
        try:
            while not (await asyncio.wait([step], timeout=self._renew_seconds))[0]:
                if not await self._holds(name):
                    return False
            return await step
        finally:
            step.cancel()
            await asyncio.shield(asyncio.wait([step]))

    async def _keep(self, name: str) -> None:
        while True:
            more = await self.turn(name)
            await asyncio.sleep(0 if more else self._poll_seconds)

    async def _holds(self, name: str) -> bool:
        now = self._clock()
        if name in self._renewed and now - self._renewed[name] < self._renew_seconds:
            return True
        if not await self._leases.take(name, seconds=self._lease_seconds):
            self._renewed.pop(name, None)
            return False
        self._renewed[name] = now
        return True

    def _failed(self, name: str, why: str) -> None:
        self._renewed.pop(name, None)
        if name not in self._failing:
            log.error("The work %r is not done for now: %s", name, why)
        self._failing.add(name)


def run(
    database: Path | str,
    *,
    adapter_folders: Mapping[str, Path],
    webhook: Webhook | None = None,
    alerts_every_seconds: float = EVERY_SECONDS,
    drift: DriftPlan | None = None,
    embedding_model: str | None = None,
    embedding_threads: int = 1,
    privacy: Privacy | None = None,
    longest_wait_seconds: float = 0.0,
    log_level: str = "info",
    log_format: logs.Format = "auto",
) -> None:
    """Work until SIGTERM or SIGINT; `database` is the one that the replicas share, by its path or URL.

    With an embedding model, kept questions that were searched for nothing are embedded here.
    Without a `webhook` alerts are in the log and in the database alone.

    Raises:
        MigrationFailed: the database can never be used as it is.
    """
    lines = logs.configure(log_level.upper(), log_format)
    try:
        embedder = _embedder(embedding_model, embedding_threads) if embedding_model else nullcontext()
        asyncio.run(
            _work_until_stopped(
                database,
                adapter_folders,
                drift,
                embedder,
                webhook,
                alerts_every_seconds,
                privacy or Privacy(PredictionKeeper()),
                longest_wait_seconds,
            )
        )
    finally:
        lines.close()


def kinds_of_work(
    database: Database,
    *,
    adapter_folders: Mapping[str, Path],
    drift: DriftPlan | None,
    embedder: QuestionEmbedder | None,
    webhook: Webhook | None,
    alerts_every_seconds: float,
    privacy: Privacy,
    longest_wait_seconds: float,
    is_local: bool,
) -> dict[str, Step]:
    """All that a worker does, by the names of the leases; alerts are sent only where there is a webhook.

    `longest_wait_seconds`: of a request for its place, which an erasure waits for.
    `is_local`: the database is the gateway's own file, and the keys of sealed content lie beside it.
    """
    ring = privacy.keys_of(database, is_local=is_local)
    history = History(database, keys=ring, pseudonym=privacy.pseudonym)
    watcher = Watcher(database, history, now, adapter_folders=adapter_folders)
    drifts = DriftWatcher(
        database, history, now, plan=drift, embedder=embedder, on_alarm=Raising(database, now), ring=ring
    )
    evaluator = Evaluator(
        database,
        Maker(database, rest=REST_PER_WORK, keys=ring, drifted=Drift(database).drifted).make,
        now,
        tells=webhook is not None,
        drift=Drift(database),
        every_seconds=alerts_every_seconds,
    )
    apart = Apart(database.secret_url, rest=REST, idle=True, keys=privacy.place(is_local=is_local))
    work: dict[str, Step] = {
        "guards": watcher.step,
        "drift": drifts.step,
        "quality": Keeper(database, apart.make, now).step,
        "alerts": evaluator.step,
        "erasure": Eraser(
            database,
            now,
            shredder=ring,
            datasets=Changes(Store(database)),
            longest_wait_seconds=longest_wait_seconds,
        ).step,
        "retention": Retention(database, now, privacy.terms).step,
    }
    if ring is not None:
        work["subject keys"] = UnusedKeys(database, ring, now).step
    if webhook is not None:
        work["notifications"] = Notifier(database, webhook, now).step
    return work


async def _work_until_stopped(
    where: Path | str,
    adapter_folders: Mapping[str, Path],
    drift: DriftPlan | None,
    embedding: AbstractAsyncContextManager[QuestionEmbedder | None],
    webhook: Webhook | None,
    alerts_every_seconds: float,
    privacy: Privacy,
    longest_wait_seconds: float,
) -> None:
    holder = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
    async with (
        Database.of_file(where) if isinstance(where, Path) else Database(where) as database,
        embedding as embedder,
    ):
        with suppress(Unavailable):
            await database.prepare()
        work = kinds_of_work(
            database,
            adapter_folders=adapter_folders,
            drift=drift,
            embedder=embedder,
            webhook=webhook,
            alerts_every_seconds=alerts_every_seconds,
            privacy=privacy,
            longest_wait_seconds=longest_wait_seconds,
            is_local=isinstance(where, Path),
        )
        worker = Worker(Leases(database, holder, now), work)
        working = asyncio.create_task(worker.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, working.cancel)
        log.info("Working on %s", database.name)
        with suppress(asyncio.CancelledError):
            await working


def _embedder(model: str, threads: int) -> AbstractAsyncContextManager[QuestionEmbedder]:
    from retrieval.embedder import SentenceTransformerEmbedder  # Torch, which a worker mostly does without.

    return SentenceTransformerEmbedder(model, threads=threads)


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
