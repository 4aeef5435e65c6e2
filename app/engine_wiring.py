"""How the engines of the settings become parts: groups that are watched, what each must agree with, and how they stand.

`app.main` opens the rest of the service around them.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from app.adapters import Adapters
from app.engines import Engine
from app.engines.groups import EngineGroups
from app.engines.local import EngineSettings as LocalEngineSettings
from app.engines.pool import EnginePool
from app.engines.startup import Startup
from app.engines.supervisor import LocalEngineSupervisor
from app.engines.tgi import TGIEngine, Timeouts
from app.errors import ServiceError
from app.fallback import stand_in
from app.readiness import Problem
from app.registry import Registry
from app.releases import Release
from app.settings import EmbeddedSettings, EngineSettings, Settings
from app.vetting import Site, disagreements, vet
from observability.collectors import EngineSample, GroupSample


@dataclass(frozen=True, slots=True)
class Engines:
    """The engine groups of this service, and what the releases on each must agree with."""

    main: str
    """The group of a release that names none."""
    groups: EngineGroups
    sites: Mapping[str, Site]
    pools: Mapping[str, EnginePool]
    adapters: Adapters
    supervisor: LocalEngineSupervisor | None = None

    async def vet(self, release: Release, answering: Sequence[Release]) -> list[str]:
        """Say what keeps a release from serving here, on any engine of its group that is up; loads its adapter first.

        No adapter of those `answering` makes room for it.

        Raises:
            ServiceError: no engine can be asked at present.
        """
        site = self.sites.get(release.engine)
        if site is None:
            return [f"`engine` is {release.engine!r}; this service has {', '.join(map(repr, self.sites))}."]
        engines = self._of(release.engine)
        problems = await self.adapters.load(release, answering)
        for name, engine in engines.items():
            where = f"{name}: " if len(engines) > 1 else ""
            problems += [where + problem for problem in await vet(release, engine, _site_of(engine, site))]
        return problems

    async def problem(self, registry: Registry) -> Problem | None:
        """What is wrong with the engines: it blocks where a release that answers has nothing left to answer by."""
        answering = registry.releases.answering
        names = sorted({release.engine for release in answering})
        healthy = await asyncio.gather(*(self.groups.of(name).healthy() for name in names))
        away = {name for name, is_healthy in zip(names, healthy, strict=True) if not is_healthy}
        out = [
            f"{each.name} of {name!r} is out: {each.reason or 'being tried'}"
            for name, pool in self.pools.items()
            for each in pool.members
            if each.state != "closed"
        ]
        stuck = [release for release in answering if release.engine in away]
        if all(stand_in(release, registry.releases, self.groups) for release in stuck):
            return Problem(f"ok, but {'; '.join(out)}", blocks=False) if out else None
        if self.supervisor is not None and self.main in away:
            last = self.supervisor.last_exit
            return Problem(f"the embedded engine ended with {last}" if last else "starting")
        return Problem("; ".join(out) or "the engine does not answer, or says that it is not healthy")

    async def release_problem(self, registry: Registry) -> Problem | None:
        """What an engine serves otherwise than a release that answers says it does."""
        for release in registry.releases.answering:
            site = self.sites.get(release.engine)
            if site is None:
                return Problem(f"{release.label}: this service has no engine {release.engine!r}")
            if not self.groups.of(release.engine).is_up:
                continue  # The engines' own check says so; one that hangs would keep this one waiting.
            for engine in self._of(release.engine).values():
                try:
                    info = await engine.describe()
                except ServiceError:
                    continue
                if problems := disagreements(release, info, _site_of(engine, site)):
                    return Problem(f"{release.label}: {problems[0]}", " ".join(problems))
        return None

    def _of(self, name: str) -> Mapping[str, Engine]:
        """The engines of a group that are up, each of which has to serve what the others do."""
        pool = self.pools.get(name)
        return pool.engines if pool else {"": self.groups.of(name)}

    def samples(self) -> list[GroupSample]:
        """How the engines stand, for the metrics."""
        return [
            GroupSample(
                name,
                pool.failovers,
                pool.startup.usual_seconds,
                pool.startup.waiting,
                [
                    EngineSample(name, each.name, each.state, each.in_flight, each.waiting, each.ejections)
                    for each in pool.members
                ],
            )
            for name, pool in self.pools.items()
        ]


async def open_engines(settings: Settings, parts: AsyncExitStack, *, instead: Engine | None = None) -> Engines:
    """Open every group of the settings; `instead` takes the place of the main one."""
    main = settings.main_engine
    groups: dict[str, Engine] = {}
    pools: dict[str, EnginePool] = {}
    sites = {main: _site(settings, main, settings.engine)}
    supervisor = None
    if instead is not None:
        groups[main] = instead
    else:
        members = _members(settings, settings.engine)
        if settings.embedded.enabled:
            supervisor = await _supervise(settings, parts)
            engine = _engine(settings, settings.engine, "embedded", supervisor.base_url, token=supervisor.token)
            members = {"embedded": engine}
        groups[main] = pools[main] = await _pool(settings, main, settings.engine, members, parts)
    for name, given in settings.engines.items():
        groups[name] = pools[name] = await _pool(settings, name, given, _members(settings, given), parts)
        sites[name] = _site(settings, name, given)
    return Engines(main, EngineGroups(groups), sites, pools, Adapters(sites, pools), supervisor)


def release_defaults(settings: Settings) -> dict[str, Any]:
    """What a release has where its file leaves it out, and under `engines` what those on a further group have."""
    retrieval = {"collection": settings.qdrant.collection, "fusion": settings.retrieval.fusion}
    context = "sentences" if settings.embedded.enabled else "passages"
    return {
        "engine": settings.main_engine,
        "served_model": settings.engine.model,
        "retrieval": {**retrieval, "context": context},
        "engines": {
            name: {"served_model": given.model, "retrieval": {**retrieval, "context": "passages"}}
            for name, given in settings.engines.items()
        },
    }


def embedded_engine(given: EmbeddedSettings) -> LocalEngineSettings:
    """What the settings say of the embedded engine, as it takes it: each by the same name."""
    return LocalEngineSettings(**given.model_dump(exclude={"enabled"}))


async def _supervise(settings: Settings, parts: AsyncExitStack) -> LocalEngineSupervisor:
    return await parts.enter_async_context(LocalEngineSupervisor(embedded_engine(settings.embedded)))


async def _pool(
    settings: Settings, name: str, given: EngineSettings, members: Mapping[str, TGIEngine], parts: AsyncExitStack
) -> EnginePool:
    pool = EnginePool(
        name,
        members,
        startup=Startup(wait_seconds=given.start_wait_seconds, room=given.start_wait_requests),
        warmups=given.warmup_requests,
        patience_seconds=settings.limits.request_timeout_seconds,
    )
    return await parts.enter_async_context(pool)


def _members(settings: Settings, given: EngineSettings) -> dict[str, TGIEngine]:
    """The engines by host and port, which may be shown; with the path where two share them."""
    found = given.members or [(given.dialect, "http://127.0.0.1:3000")]
    token = given.token.get_secret_value().strip() if given.token else None
    members: dict[str, TGIEngine] = {}
    for dialect, url in found:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
        name = place if place not in members else f"{place}{parts.path}"
        members[name] = _engine(settings, given, dialect, url, token=token)
    return members


def _engine(settings: Settings, given: EngineSettings, dialect: str, url: str, *, token: str | None) -> TGIEngine:
    return TGIEngine(
        url,
        dialect=dialect,
        token=token,
        adapters=given.adapters,
        model=given.model,
        timeouts=Timeouts(
            connect_seconds=given.connect_timeout_seconds,
            first_token_seconds=given.first_token_timeout_seconds,
            between_tokens_seconds=given.between_tokens_timeout_seconds,
            answer_seconds=settings.limits.request_timeout_seconds,
        ),
        max_connections=given.max_connections,
    )


def _site(settings: Settings, name: str, given: EngineSettings) -> Site:
    return Site(
        engine=name,
        dialect="embedded" if name == "embedded" else given.dialect,
        served_model=given.model,
        collection=settings.qdrant.collection,
        fusion=settings.retrieval.fusion,
        passage_tokens=settings.retrieval.passage_tokens,
        base_model=settings.embedded.model if name == "embedded" and settings.embedded.enabled else given.model,
        adapter_folder=settings.main_adapter_folder if given is settings.engine else given.adapter_folder,
        adapter_folder_on_engine=given.adapter_folder_on_engine,
    )


def _site_of(engine: Engine, site: Site) -> Site:
    """The site with the dialect of this engine, which may differ from its group's."""
    return replace(site, dialect=engine.dialect.name) if isinstance(engine, TGIEngine) else site
