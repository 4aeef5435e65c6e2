"""The front door of ingestion: uploads and synchronisations in, jobs out.

The main rule: room is taken before an upload is written, and it is on the disk before it is acknowledged. What waits is
bounded; more is refused with the time it takes to get a place.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retrieval.documents import Ingested, Scope
from retrieval.errors import (
    DocumentNotFound,
    IndexUnavailable,
    JobEnded,
    QueueFull,
    RetrievalError,
    UnreadableDocument,
    UrlRefused,
)
from retrieval.fetching import Fetcher
from retrieval.ingesting import version_of
from retrieval.jobs import ledger, reading, syncing
from retrieval.jobs.building import Builds
from retrieval.jobs.links import LINK, Links
from retrieval.jobs.nouns import Entry, Failure, Item, Job, Limits, Plan, Tally
from retrieval.jobs.spool import Spool
from retrieval.jobs.working import Workers
from retrieval.parsers import media_type_of
from retrieval.preparing import PREPARED, Prepared
from retrieval.retriever import Retriever
from retrieval.scoping import may_see
from retrieval.sqlite_file import as_a_whole
from retrieval.versions import IndexVersion

_HOUSEKEEPING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job, and what will have become of its document: `Ingested`, or a RetrievalError."""

    job_id: str
    ended: asyncio.Future[Ingested]


class Ingestion:
    """Takes documents and works on them, `workers` at a time; open it with `async with`, above an open retriever."""

    def __init__(
        self,
        retriever: Retriever,
        directory: Path,
        *,
        limits: Limits | None = None,
        workers: int = 3,
        reserve_bytes: int = 0,
        tally: Tally | None = None,
        retry_seconds: float = 1.0,
        fetcher: Fetcher | None = None,
    ) -> None:
        """`fetcher` follows links; without one they are refused."""
        self._retriever = retriever
        self._ingester = retriever.ingester
        self._file = retriever.store.file
        self._spool = Spool(directory, reserve_bytes=reserve_bytes)
        self._limits = limits or Limits()
        self._tally = tally
        self._links = Links(retriever, fetcher)
        self._workers = Workers(
            retriever,
            self._spool,
            self._links,
            limits=self._limits,
            count=workers,
            tally=tally,
            retry_seconds=retry_seconds,
        )
        self._builds = Builds(retriever, self._workers, self._limits)
        self._arriving_documents = 0
        self._arriving_bytes = 0
        self._open_jobs: Mapping[str, int] = {}
        self._housekeeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        waiting = await self._file.write(ledger.resume, 0)
        await self._spool.sweep(waiting)
        self._workers.waiting.update(waiting)
        self._workers.start()
        self._builds.start()
        self._housekeeping = asyncio.create_task(self._keep_house(), name="ingestion housekeeping")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop: what is under way goes on at the next start."""
        if self._housekeeping:
            self._housekeeping.cancel()
            await asyncio.wait([self._housekeeping])
        await self._builds.stop()
        await self._workers.stop()

    # --- accepting ---

    async def accept(
        self,
        scope: Scope,
        *,
        name: str,
        content: bytes,
        media_type: str | None = None,
        metadata: dict[str, Any] | None = None,
        groups: Sequence[str] | None = None,
        who: str = "",
    ) -> Accepted:
        """Take one document: on return its job is listed, and survives whatever happens to this process.

        Content of the type LINK is the URL that the document is at, of the type PREPARED a document that was made ready
        elsewhere.
        Without `groups` it is for whom the one is that it replaces, and a new one for all of the tenant; without
        `metadata` it has what that one has.

        Raises:
            UrlRefused: The link is none that is followed.
            UnsupportedType: Nothing reads files of this type.
            UnreadableDocument: It is no prepared document.
            DocumentOwned: Its name is taken by a document that the scope does not see.
            QueueFull: Too much waits already.
            IndexUnavailable: The document store, or its disk, does not take it.
        """
        version = await self._admit(content, name, media_type)
        facts: dict[str, Any] = {"media_type": media_type, "metadata": metadata}
        if version and media_type != PREPARED:
            settled = await self._settle(scope, name, content, version, facts, groups, who)
            if settled is not None:
                return settled
        row = ledger.upload_row(scope.tenant, name, version, size_bytes=len(content), **facts)

        async def write(spool: str) -> str:
            return await self._file.write(ledger.accept, scope, who, {**row, "spool": spool}, groups)

        return Accepted(*await self._enqueue(content, write))

    async def deliver(
        self, scope: Scope, job_id: str, *, name: str, content: bytes, media_type: str | None = None, etag: str = ""
    ) -> Job:
        """Take a file that a synchronisation waits for, or a link to it; `etag` is what the source calls its bytes.

        Raises:
            UrlRefused: The link is none that is followed.
            JobNotFound, JobEnded, NotExpected: The job does not wait for it.
            QueueFull, IndexUnavailable: As `accept` says.
        """
        job = await self._file.read(reading.job, scope, job_id)
        await self._file.read(ledger.expected, job, name)
        version = await self._version_of(content, media_type)
        upload = {"version": version, "media_type": media_type, "size_bytes": len(content)}

        async def write(spool: str) -> str:
            return await self._file.write(ledger.deliver, job, name, etag, {**upload, "spool": spool})

        await self._enqueue(content, write)
        return await self.job(scope, job_id)

    async def _admit(self, content: bytes, name: str, media_type: str | None) -> str:
        """The version of an upload; raises what can be told before anything is read."""
        try:
            if media_type not in (LINK, PREPARED):
                media_type_of(content, name=name, media_type=media_type)
            return await self._version_of(content, media_type)
        except (UnreadableDocument, UrlRefused):
            if self._tally:
                self._tally.ingested("refused", 0.0)
            raise

    async def _version_of(self, content: bytes, media_type: str | None) -> str:
        """The version that these bytes are; a link has none before it is followed."""
        if media_type == LINK:
            self._links.check(content)
            return ""
        if media_type == PREPARED:
            return (await asyncio.to_thread(Prepared.from_bytes, content)).version
        return await asyncio.to_thread(version_of, content)

    async def _settle(
        self,
        scope: Scope,
        name: str,
        content: bytes,
        version: str,
        facts: dict[str, Any],
        groups: Sequence[str] | None,
        who: str,
    ) -> Accepted | None:
        """A document that is there as it is needs no work: its job is done before it is begun."""
        try:
            draft = self._ingester.draft(scope, name=name, content=content, version=version, **facts)
        except IndexUnavailable:
            return None
        job_id = await self._file.write(ledger.settle, scope, who, draft, groups, facts["metadata"], self._limits)
        if job_id is None:
            return None
        if self._tally:
            self._tally.ingested("unchanged", 0.0)
        ended: asyncio.Future[Ingested] = asyncio.get_running_loop().create_future()
        ended.set_result(Ingested(await self._retriever.document(scope, draft.id), "unchanged"))
        return Accepted(job_id, ended)

    async def _enqueue(
        self, content: bytes, write: Callable[[str], Awaitable[str]]
    ) -> tuple[str, asyncio.Future[Ingested]]:
        """Spool bytes and write what they are for; gives the job's id, and what will have become of them."""
        documents, size = self.waiting_documents + self._arriving_documents, len(content)
        is_too_much = documents and self.waiting_bytes + self._arriving_bytes + size > self._limits.max_bytes
        if documents >= self._limits.max_documents or is_too_much:
            wait = min(60.0, max(1.0, self._workers.seconds_per_document()))
            raise QueueFull(f"{documents} documents wait to be ingested. Try again when there is room.", wait)
        self._arriving_documents += 1
        self._arriving_bytes += size
        spool = None
        try:
            spool = await self._spool.put(content)
            ended = self._workers.ended[spool] = asyncio.get_running_loop().create_future()
            ended.add_done_callback(_look_at)
            self._workers.waiting[spool] = size
            job_id = await write(spool)
        except BaseException:
            if spool is not None:
                self._workers.waiting.pop(spool, None)
                self._workers.ended.pop(spool, None)
                await self._spool.remove([spool])
            raise
        finally:
            self._arriving_documents -= 1
            self._arriving_bytes -= size
        self._workers.wake()
        return job_id, ended

    # --- synchronising ---

    async def plan(
        self,
        scope: Scope,
        source: str,
        manifest: Sequence[Entry],
        *,
        delete: bool = True,
        retry_failed: bool = False,
        groups: Sequence[str] | None = None,
    ) -> Plan:
        """What would make the source equal to the manifest, and its documents be for `groups`; changes nothing."""
        version = self._retriever.index_version or None

        def compare(connection: Any) -> Plan:
            return syncing.plan(
                connection,
                scope,
                source,
                manifest,
                delete=delete,
                retry_failed=retry_failed,
                groups=None if groups is None else tuple(groups),
                index_version=version,
            )

        return await self._file.read(compare)

    async def begin(
        self, scope: Scope, source: str, wanted: Plan, *, who: str = "", max_deletes: int | None = None
    ) -> Job:
        """Begin what a plan says; the job then waits for the files that were added or modified.

        Raises:
            TooManyDeletions: It would delete more than `max_deletes`, or than half of the source.
        """
        syncing.check_deletions(wanted, max_deletes)

        earlier = await self._file.read(syncing.earlier, scope, source)
        async with self._workers.without(lambda item: item.job in earlier) as stopped:
            number, waited = await self._file.write(
                lambda connection: syncing.begin(connection, scope, source, wanted, self._limits, who=who)
            )
            await self._drop([*waited, *stopped], JobEnded("Another synchronisation of the source was begun."))
        self._workers.wake()
        (job,) = await self._file.read(
            lambda connection: reading.select_jobs(connection, "WHERE number = ?", (number,))
        )
        return job

    async def complete(self, scope: Scope, job_id: str) -> Job:
        """Say that no more files will come: those that did not are failures, and the deletions begin."""
        job = await self._file.read(reading.job, scope, job_id)
        await self._file.write(ledger.complete, job, self._limits)
        self._workers.wake()
        return await self.job(scope, job_id)

    # --- building index versions ---

    async def build(self, scope: Scope, *, who: str = "") -> tuple[IndexVersion, Job]:
        """Begin an index version as the settings have it, and the job that tells how far it is.

        Raises:
            IndexVersionState: There is such a version, or another is being built.
            IndexUnavailable: The index does not answer.
        """
        self._ingester.check()
        jobs: list[str] = []

        def note(connection: Any, version_id: str) -> None:
            jobs.append(ledger.insert_build(connection, scope.tenant, who, version_id))

        version = await self._retriever.indexes.build(lambda its: lambda connection: note(connection, its))
        self._builds.wake()
        return version, await self.job(scope, jobs[-1])

    # --- asking and cancelling ---

    async def job(self, scope: Scope, job_id: str) -> Job:
        """A job as it is now; raises JobNotFound."""
        return self._with_stages(await self._file.read(reading.job, scope, job_id))

    async def jobs(
        self, scope: Scope, *, limit: int = 50, before: str | None = None, is_open: bool | None = None
    ) -> list[Job]:
        """The jobs that the scope sees, the newest first; raises JobNotFound where `before` is none of them."""
        found = await self._file.read(
            lambda connection: reading.jobs(connection, scope, limit=limit, before=before, is_open=is_open)
        )
        return [self._with_stages(job) for job in found]

    def _with_stages(self, job: Job) -> Job:
        return replace(job, running=tuple(self._workers.live.get(item.key, item) for item in job.running))

    async def items(
        self, scope: Scope, job_id: str, *, state: str | None = None, after: int = 0, limit: int = 50
    ) -> list[Item]:
        """The documents of a job, in order; raises JobNotFound."""
        job = await self._file.read(reading.job, scope, job_id)
        found = await self._file.read(
            lambda connection: reading.items(connection, job, state=state, after=after, limit=limit)
        )
        return [self._workers.live.get(item.key, item) for item in found]

    async def failures(self, scope: Scope, *, after: str = "", limit: int = 50) -> list[Failure]:
        """The scope's documents that could not be taken, by id."""
        return await self._file.read(lambda connection: reading.failures(connection, scope, after=after, limit=limit))

    async def cancel(self, scope: Scope, job_id: str) -> Job:
        """End a job: what it has done stays, what it is at is left as it was; one that has ended stays as it is."""
        job = await self._file.read(reading.job, scope, job_id)
        await self._cancel(scope, job.number)
        return await self.job(scope, job_id)

    async def delete(self, scope: Scope, document_id: str) -> None:
        """Delete a document, with what waits to become it.

        Raises:
            DocumentNotFound: There is neither.
            IndexUnavailable: The index does not answer; nothing was changed.
        """
        self._ingester.check()

        def is_its(item: Item) -> bool:
            return item.document_id == document_id and may_see(scope, item.tenant, item.groups)

        waited: list[Item] = []

        def withdraw(connection: Any) -> None:
            waited.extend(ledger.withdraw(connection, scope, document_id, self._limits))

        async with self._workers.without(is_its) as stopped:
            try:
                # In one transaction: a crash between two would leave the old document and lose the new one.
                await self._ingester.delete(scope, document_id, note=withdraw)
            except DocumentNotFound:
                await self._file.write(as_a_whole, withdraw)
                if not any(item.action == "put" for item in waited):
                    raise
            await self._drop([*waited, *stopped], JobEnded("The document was deleted."))

    async def _cancel(self, scope: Scope, number: int) -> None:
        async with self._workers.without(lambda item: item.job == number) as stopped:
            waited = await self._file.write(ledger.cancel, scope, number, self._limits)
            await self._drop(waited, JobEnded("The job was cancelled."))
            # The others' ends were on the disk already: the document is there, or was refused.
            await self._drop(stopped, JobEnded("The job ended before it could be cancelled: ask it how."))
        for item in waited:
            if item.action == "build":
                await self._builds.give_up(item)

    async def _drop(self, items: Sequence[Item], why: JobEnded) -> None:
        for item in items:
            await self._workers.let_go(item, why)

    # --- what metrics ask ---

    @property
    def waiting_documents(self) -> int:
        """Uploads that are not ingested yet."""
        return len(self._workers.waiting)

    @property
    def waiting_bytes(self) -> int:
        """Their size."""
        return sum(self._workers.waiting.values())

    @property
    def open_jobs(self) -> Mapping[str, int]:
        """Jobs that have not ended, by whether they were begun; at most a few seconds old."""
        return self._open_jobs

    async def _keep_house(self) -> None:
        while True:
            with suppress(RetrievalError):
                for tenant, number in await self._file.read(ledger.stale):
                    await self._cancel(Scope.whole(tenant), number)
                self._open_jobs = await self._file.read(reading.depths)
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)


def _look_at(future: asyncio.Future[Ingested]) -> None:
    """Whether anybody waits or not, an error was seen."""
    if not future.cancelled():
        future.exception()
