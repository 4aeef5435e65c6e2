"""The service as a process of its own, to be killed or measured; everything but the embedder runs in production too.

async with service_process(data_dir, tgi.url) as process:
    async with process.client() as client: ...
    process.kill()

Processes are forked from one that has loaded all code: two seconds of imports are no part of what is tested. What they
write and show is searched for what they were told (`tests/watching.py`), however they end.
"""

import asyncio
import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import uvloop

from app.main import VERSION
from retrieval.embedder import Embedder, HashingEmbedder
from tests.service import Service, live_service
from tests.watching import Watch

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload([__name__])


class DidNotStart(Exception):
    """The process ended before it took requests."""


@dataclass
class ServiceProcess:
    """A running service, and a key to it."""

    url: str
    key: str
    process: BaseProcess

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def client(self, *, connections: int = 100) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {self.key}"},
            limits=httpx.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=2.0,  # Before the service closes them, which a request could cross.
            ),
            timeout=20,
            trust_env=False,
        )

    async def metrics(self) -> str:
        """What it shows of its metrics; nothing where it was killed."""
        if not self.process.is_alive():
            return ""
        try:
            async with self.client() as client:
                return (await client.get("/metrics")).text
        except httpx.TransportError:
            return ""

    def kill(self) -> None:
        """End it at once, as the kernel does when memory runs out."""
        self.process.kill()

    async def ended(self) -> None:
        """Wait until it is gone."""
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.process.sentinel, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self.process.sentinel)


@contextlib.asynccontextmanager
async def service_process(
    data_dir: Path,
    engine_url: str,
    settings: dict[str, Any] | None = None,
    *,
    key: str | None = None,
    variables: Mapping[str, str] | None = None,
    embedder: Callable[[], Embedder] = HashingEmbedder,
) -> AsyncIterator[ServiceProcess]:
    """Run the service until the end of the block, or until it is killed.

    `key` is one that an earlier process on this data directory has made; by default another is made. `variables` are
    added to the environment: those of OpenTelemetry are read there.

    Raises:
        DidNotStart: the process ended before it took requests.
        watching.Leaked: what it was told is in what it wrote, in its metrics, or in what a collector was sent.
    """
    ours, theirs = _forking.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Watch(folder=Path(folder))) as watch, ours:
        given = (theirs, Path(folder), data_dir, engine_url, settings or {}, key, dict(variables or {}), embedder)
        process = _forking.Process(target=_run, args=given, daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()
        try:
            url, given_key = await _said(ours, process, watch)
            watch.keep_secret(given_key)
            yield (service := ServiceProcess(url, given_key, process))
            watch.see_metrics(await service.metrics())
        finally:
            process.kill()
            await asyncio.to_thread(process.join)
        watch.check()


async def _said(pipe: Connection, process: BaseProcess, watch: Watch) -> tuple[str, str]:
    try:
        return await asyncio.to_thread(pipe.recv)
    except EOFError as error:
        await asyncio.to_thread(process.join)
        raise DidNotStart(f"the service ended with {process.exitcode}:\n{watch.written()}") from error


def _run(
    pipe: Connection,
    watched_in: Path,
    data_dir: Path,
    engine_url: str,
    settings: dict[str, Any],
    key: str | None,
    variables: dict[str, str],
    embedder: Callable[[], Embedder],
) -> None:
    os.environ.update(variables)
    watch = Watch(VERSION, folder=watched_in)
    for stream in (1, 2):
        os.dup2(watch.log().fileno(), stream)
    parts: dict[str, Any] = {"engine_url": engine_url, "settings": settings, "embedder": embedder()}
    service = live_service(data_dir, key=key, watch=watch, **parts)
    uvloop.run(_serve(service, pipe))


async def _serve(service: AbstractAsyncContextManager[Service], pipe: Connection) -> None:
    """Serve; the address and a key are told once requests are taken."""
    async with service as served:
        pipe.send((served.url, served.key))
        await asyncio.Event().wait()
