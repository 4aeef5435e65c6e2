"""The adapters of the engine groups: what each group takes, and loading those that releases name.

The main rule: an adapter is loaded out of its group's folder only while the folder has the digest that the release
names, and by a name that holds this digest: another adapter in the same folder is another one to the engine. Engines
forget what was loaded when they end, so whatever answers is looked after and loaded again.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from types import TracebackType
from typing import Self

import msgspec

from app.engines import EngineInfo
from app.engines.hotload import ensure_loaded, unload
from app.engines.pool import EnginePool
from app.engines.tgi import TGIEngine
from app.errors import Conflict, ServiceError
from app.releases import Release
from app.vetting import Site, folder_digest

log = logging.getLogger(__name__)

EVERY_SECONDS = 2.0


class EngineGroup(msgspec.Struct, frozen=True, kw_only=True):
    """What whoever publishes an adapter needs to know of a group."""

    name: str
    dialects: tuple[str, ...]
    loads_adapters: bool
    """Whether adapters are loaded while it runs; else it has to be started with them."""
    base_models: tuple[str, ...] = ()
    """What the base model is called: by the engine, and by the settings. None while the engine does not answer."""
    base_revision: str | None = None
    adapters: tuple[str, ...] = ()
    adapter_folder: str | None = None
    """Where its adapters lie on the service's machine, each in a folder of its name."""
    adapter_folder_on_engine: str | None = None
    problem: str | None = None
    """Why it cannot be asked at present."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Loads adapters into the engines of this service."""

    sites: Mapping[str, Site]
    pools: Mapping[str, EnginePool]

    async def load(self, release: Release, answering: Sequence[Release]) -> list[str]:
        """Load a release's adapter where it lies in the folder of its group; say which engines refuse it, and why.

        What cannot be loaded while the engine runs, or lies elsewhere, is passed over: vetting tells whether it is
        served. Where an engine is full, one that nothing of what is `answering` needs makes room.
        """
        pool = self.pools.get(release.engine)
        problems = []
        for name, engine in pool.engines.items() if pool else ():
            problems += await self.load_into(name, engine, release, answering)
        return problems

    async def load_into(
        self, name: str, engine: TGIEngine, release: Release, answering: Sequence[Release]
    ) -> list[str]:
        """Load a release's adapter as `load` does, into the engine of that name in the release's group."""
        site = self.sites.get(release.engine)
        if release.adapter is None or site is None:
            return []
        try:
            await _load(engine, release, site, answering)
        except ServiceError as error:
            return [f"`adapter`: {name} does not load {release.adapter!r}: {error.message}"]
        return []

    async def groups(self) -> list[EngineGroup]:
        """Describe every group of engines."""
        return [await self._group(site, self.pools.get(name)) for name, site in self.sites.items()]

    async def _group(self, site: Site, pool: EnginePool | None) -> EngineGroup:
        engines: Sequence[TGIEngine] = list(pool.engines.values()) if pool else []
        folder, there = site.adapter_folder, site.adapter_folder_on_engine
        facts = EngineGroup(
            name=site.engine,
            dialects=tuple(dict.fromkeys(engine.dialect.name for engine in engines)) or (site.dialect,),
            loads_adapters=bool(engines) and all(engine.dialect.load_path for engine in engines),
            adapter_folder=str(folder.absolute()) if folder else None,
            adapter_folder_on_engine=str(there) if there else None,
        )
        if pool is None:
            return facts
        try:
            info = await pool.describe()
        except ServiceError as error:
            return msgspec.structs.replace(facts, problem=error.message)
        known = tuple(dict.fromkeys(name for name in (info.model_id, site.base_model) if name))
        return msgspec.structs.replace(facts, base_models=known, base_revision=info.revision, adapters=info.adapters)


class Keeper:
    """Sees to it that the adapters of what answers are loaded, for as long as its context is open.

    An engine that comes up gets them before it is let in; what is missing at any other time is found within seconds.
    """

    def __init__(
        self, adapters: Adapters, answering: Callable[[], Sequence[Release]], *, every_seconds: float = EVERY_SECONDS
    ) -> None:
        self._adapters = adapters
        self._answering = answering
        self._every_seconds = every_seconds
        self._told: dict[str, list[str]] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        for group, pool in self._adapters.pools.items():
            pool.prepare = partial(self._prepare, group)
        self._task = asyncio.create_task(self._keep(), name="adapters")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Load what is missing, once."""
        answering = self._answering()
        for release in answering:
            self._tell(release, await self._adapters.load(release, answering))

    async def _prepare(self, group: str, name: str, engine: TGIEngine) -> None:
        answering = self._answering()
        for release in answering:
            if release.engine == group:
                self._tell(release, await self._adapters.load_into(name, engine, release, answering))

    def _tell(self, release: Release, problems: list[str]) -> None:
        if problems and problems != self._told.get(release.label):
            log.warning("An adapter of %s is not loaded: %s", release.label, "; ".join(problems))
        self._told[release.label] = problems

    async def _keep(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("Looking after adapters failed by a defect of ours; it goes on")
            await asyncio.sleep(self._every_seconds)


async def _load(engine: TGIEngine, release: Release, site: Site, answering: Sequence[Release]) -> None:
    """Have an engine that takes adapters while it runs serve a release's adapter, where it does not already."""
    name = _name_on(engine, release)
    if name is None or engine.dialect.load_path is None:
        return
    info = await engine.describe()
    if name in info.adapters or not await asyncio.to_thread(_lies_there, release, site):
        return
    names = (_name_on(engine, each) for each in answering if each.engine == site.engine)
    await _make_room(engine, info, name, {each for each in names if each is not None})
    await ensure_loaded(engine, name, _place_on_engine(release, site))
    if not await asyncio.to_thread(_lies_there, release, site):
        await unload(engine, name)  # Nobody knows which of the two was read.
        raise Conflict("its folder has changed while it was read: load it again")


async def _make_room(engine: TGIEngine, info: EngineInfo, name: str, needed: set[str]) -> None:
    """Take out adapters that nothing needs until there is room for one more; a full engine would drop any.

    Raises:
        Conflict: what answers needs all the room there is.
    """
    if info.max_adapters is None:
        return
    # What answers takes what room is left; what does not leaves room for all that does, loaded or not.
    others = sorted(needed.intersection(info.adapters) if name in needed else needed)
    if len(others) >= info.max_adapters:
        raise Conflict(
            f"it has room for {info.max_adapters} adapters, and releases that answer need {', '.join(others)}. Let it "
            "hold more (HALLMARK_EMBEDDED_MAX_ADAPTERS, `--max-adapters`)."
        )
    idle = [each for each in info.adapters if each not in others]
    for each in idle[: max(0, len(info.adapters) + 1 - info.max_adapters)]:
        await unload(engine, each)


def _name_on(engine: TGIEngine, release: Release) -> str | None:
    """What an engine is to call a release's adapter; None without one."""
    return engine.adapter_name(release.adapter, release.adapter_digest) if release.adapter else None


def _place_on_engine(release: Release, site: Site) -> PurePath:
    """The adapter's folder, as the engine finds it."""
    folder = site.adapter_folder_on_engine or (site.adapter_folder or Path()).absolute()
    return folder / (release.adapter or "")


def _lies_there(release: Release, site: Site) -> bool:
    """Whether the folder of a release's adapter is on this machine, and is the one that the release means."""
    if release.adapter is None or release.adapter_digest is None or site.adapter_folder is None:
        return False
    if release.adapter in (".", "..") or PurePath(release.adapter).name != release.adapter:
        return False
    try:
        return folder_digest(site.adapter_folder / release.adapter) == release.adapter_digest
    except OSError:
        return False
