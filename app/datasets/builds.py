"""Builds in the background, one at a time in a process: started, followed, cancelled.

The main rule: a build is a row that says what became of it. It holds the claim on its dataset from the first moment to
the last, and renews it; one whose process died says so as soon as its claim has run out, and leaves nothing to be seen.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Self

import msgspec
from sqlalchemy import Row, select, update

from app.database import Database, dataset_builds, dataset_series
from app.datasets.builder import Builder
from app.datasets.candidates import Candidates, Step
from app.datasets.imports import Upload, take_files
from app.datasets.recipes import Purpose, Recipe, written
from app.datasets.store import CLAIM_SECONDS, Series, Store
from app.errors import Conflict, InvalidRequest, NotFound, Overloaded, ServiceError, Unavailable
from app.predictions import uuid7

log = logging.getLogger(__name__)

MAX_WAITING = 8
"""Builds that may wait for the one that runs."""

RENEW_SECONDS = CLAIM_SECONDS / 4

State = Literal["waiting", "running", "done", "failed", "cancelled"]

_b, _s = dataset_builds.c, dataset_series.c


@contextmanager
def _closed_unless_begun(found: Candidates) -> Iterator[None]:
    """Forget the rows where a build does not begin; else that is for when it ends."""
    try:
        yield
    except BaseException:
        found.close()
        raise


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a build; times are milliseconds since 1970."""

    id: str
    dataset: str
    state: State
    step: str
    """What it does, or did last."""
    recipe: Any
    version: int | None
    report: Any
    """What each step kept and dropped, and what the version has."""
    error: Any
    """Why it failed: `code`, `message`, `param`."""
    created_at: int
    created_by: str | None
    finished_at: int | None


class Builds:
    """The builds of this process; use it in an `async with` block."""

    def __init__(self, store: Store, builder: Builder, *, renew_seconds: float = RENEW_SECONDS) -> None:
        self._store = store
        self._database: Database = store.database
        self._builder = builder
        self._renew_seconds = renew_seconds
        self._turn = asyncio.Semaphore(1)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """End every build; each says that it was interrupted."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def from_predictions(self, tenant: str, name: str, recipe: Recipe, *, purpose: Purpose, who: str) -> Build:
        """Begin to build the next version of a dataset of predictions.

        Raises:
            Conflict: a version of it is being built, or it is of another task or purpose.
            InvalidRequest: the recipe is for files.
            Overloaded: too many builds wait.
        """
        for field in ("columns", "files", "template"):
            if getattr(recipe, field):
                raise InvalidRequest(f"`{field}` is for imported files alone.", param=field)
        found = Candidates()

        async def gather(series: Series) -> tuple[Recipe, list[Step]]:
            fixed, step = await self._builder.gather(series, recipe, found)
            return fixed, [step]

        with _closed_unless_begun(found):
            return await self._begin(tenant, name, recipe, purpose, who, found, gather)

    async def from_files(
        self, tenant: str, name: str, recipe: Recipe, uploads: Sequence[Upload], *, purpose: Purpose, who: str
    ) -> Build:
        """Read files, whole, and begin to build the next version of a dataset of their rows.

        Raises:
            InvalidRequest: a row cannot be taken: the first of those are told, and nothing was taken.
            Conflict, Overloaded: as `from_predictions` does.
        """
        self._check_room()
        found = Candidates()

        async def gather(_: Series) -> tuple[Recipe, list[Step]]:
            return noted, [found.keep("files", found.facts, +found.dropped)]

        with _closed_unless_begun(found):
            noted = await asyncio.to_thread(take_files, tenant, purpose, recipe, uploads, found)
            return await self._begin(tenant, name, noted, purpose, who, found, gather)

    async def get(self, tenant: str, name: str, build_id: str) -> Build:
        """What became of a build; raises NotFound."""
        query = self._query(tenant, name).where(_b.id == build_id)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"There is no build {build_id!r} of {name!r}.", param="build_id")
        return self._build(row)

    async def find(self, tenant: str, name: str, *, limit: int = 50) -> list[Build]:
        """The builds of a dataset, the newest first."""
        async with self._database.reading() as connection:
            rows = await connection.execute(self._query(tenant, name).order_by(_b.id.desc()).limit(limit))
            return [self._build(row) for row in rows]

    async def cancel(self, tenant: str, name: str, build_id: str) -> Build:
        """End a build, whichever process it runs in; one that has ended stays as it is."""
        build = await self.get(tenant, name, build_id)
        if build.state in ("waiting", "running"):
            async with self._database.writing() as connection:
                await self._store.finish(connection, build_id, "cancelled")
            if task := self._tasks.get(build_id):
                task.cancel()
                await asyncio.wait({task})  # It removes what it has written.
            # Where it runs in another process, its next page finds the claim gone.
            async with self._database.writing() as connection:
                free = {"build_id": None, "build_expires_at": None}
                await connection.execute(update(dataset_series).where(_s.build_id == build_id).values(**free))
        return await self.get(tenant, name, build_id)

    # --- running ---

    def _check_room(self) -> None:
        if len(self._tasks) > MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} builds wait already. Try again when one is done.", retry_after_seconds=30)

    async def _begin(
        self,
        tenant: str,
        name: str,
        recipe: Recipe,
        purpose: Purpose,
        who: str,
        found: Candidates,
        gather: Callable[[Series], Any],
    ) -> Build:
        self._check_room()
        build, now = uuid7(), self._store.clock()
        async with self._database.writing() as connection:
            series = await self._store.claim(
                connection, tenant, name, task=recipe.task, purpose=purpose, build=build, who=who
            )
            row = {
                "id": build,
                "tenant": tenant,
                "series_id": series.id,
                "state": "waiting",
                "step": "waiting",
                "recipe": written(recipe),
                "created_at": now,
                "created_by": who,
                "expires_at": now + round(CLAIM_SECONDS * 1000),
            }
            await connection.execute(dataset_builds.insert().values(**row))
        running = self._run(build, series, found, gather, who)
        self._tasks[build] = asyncio.create_task(running, name=f"dataset build {build}")
        self._tasks[build].add_done_callback(lambda _: self._forget(build, found))
        return await self.get(tenant, name, build)

    def _forget(self, build: str, found: Candidates) -> None:
        found.close()
        self._tasks.pop(build, None)

    async def _run(
        self, build: str, series: Series, found: Candidates, gather: Callable[[Series], Any], who: str
    ) -> None:
        steps: list[Step] = []
        holding = asyncio.create_task(self._hold(series.id, build, asyncio.current_task()))
        try:
            async with self._turn:
                await self._tell(build, "gathering")
                recipe, gathered = await gather(series)
                steps += gathered
                await self._builder.build(
                    series, build, recipe, found, steps, who=who, tell=lambda step: self._tell(build, step)
                )
        except asyncio.CancelledError:
            await self._failed(series, build, steps, Conflict("The build was interrupted. Start it again."))
            raise
        except ServiceError as error:
            await self._failed(series, build, steps, error)
        except Exception as error:  # noqa: BLE001 - what it says may quote content.
            log.error("A build failed: %s", type(error).__name__)  # noqa: TRY400
            await self._failed(series, build, steps, ServiceError("The build failed: a fault of ours."))
        finally:
            holding.cancel()

    async def _hold(self, series_id: str, build: str, task: asyncio.Task[Any] | None) -> None:
        """Renew the claim; a build that has lost it is ended."""
        while True:
            await asyncio.sleep(self._renew_seconds)
            with suppress(Unavailable):
                if not await self._store.renew(series_id, build) and task is not None:
                    task.cancel()
                    return

    async def _tell(self, build: str, step: str) -> None:
        async with self._database.writing() as connection:
            live = (_b.id == build, _b.state.in_(("waiting", "running")))
            said = await connection.execute(update(dataset_builds).where(*live).values(state="running", step=step))
            if not said.rowcount:
                raise Conflict("The build was cancelled.")

    async def _failed(self, series: Series, build: str, steps: Sequence[Step], error: ServiceError) -> None:
        """Say why a build failed, and let others build; where the database is away the claim runs out."""
        told = {"code": error.code, "message": error.message, "param": error.param}
        report = {"steps": [msgspec.to_builtins(step) for step in steps]}
        facts = {"error": msgspec.json.encode(told).decode(), "report": msgspec.json.encode(report).decode()}

        async def say() -> None:
            with suppress(Conflict):
                await self._store.sweep(series.id, build=build)
            await self._store.release(series.id, build, "failed", **facts)

        with suppress(Unavailable):
            await asyncio.shield(say())

    # --- reading ---

    def _query(self, tenant: str, name: str) -> Any:
        query = select(dataset_builds, _s.name).join(dataset_series, _s.id == _b.series_id)
        return query.where(_b.tenant == tenant, _s.name == name)

    def _build(self, row: Row[Any]) -> Build:
        is_lost = row.state in ("waiting", "running") and row.expires_at < self._store.clock()
        error = msgspec.json.decode(row.error) if row.error else None
        if is_lost:
            error = {
                "code": "conflict",
                "message": "The process that built it has died. Start it again.",
                "param": None,
            }
        return Build(
            id=row.id,
            dataset=row.name,
            state="failed" if is_lost else row.state,
            step=row.step,
            recipe=msgspec.json.decode(row.recipe),
            version=row.version,
            report=msgspec.json.decode(row.report) if row.report else None,
            error=error,
            created_at=row.created_at,
            created_by=row.created_by,
            finished_at=row.finished_at,
        )
