"""The service as a process of its own, to be killed or measured; everything but the embedder runs in production too.

async with service_process(data_dir, tgi.url) as process:
    async with process.client() as client: ...
    process.kill()
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import uvloop

from tests.service import live_service

REPOSITORY = Path(__file__).parents[1]


@dataclass
class ServiceProcess:
    """A running service, and a key to it."""

    url: str
    key: str
    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self, *, connections: int = 100) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {self.key}"},
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            timeout=20,
            trust_env=False,
        )

    def kill(self) -> None:
        """End it at once, as the kernel does when memory runs out."""
        self.process.send_signal(signal.SIGKILL)


@contextlib.asynccontextmanager
async def service_process(
    data_dir: Path, engine_url: str, settings: dict[str, Any] | None = None, *, key: str = ""
) -> AsyncIterator[ServiceProcess]:
    """Run the service until the end of the block, or until it is killed; with a `key` it makes none of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.service_process", str(data_dir), engine_url, json.dumps(settings or {}), key),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        url, key = (await process.stdout.readline()).decode().split()
        yield ServiceProcess(url, key, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def main(data_dir: Path, engine_url: str, settings: dict[str, Any], key: str, log_stream: BinaryIO) -> None:
    """Serve; the address and a key are printed once it takes requests."""
    async with live_service(
        data_dir, engine_url=engine_url, settings=settings, key=key or None, log_stream=log_stream
    ) as service:
        print(service.url, service.key, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with Path(os.devnull).open("wb") as nowhere:
        uvloop.run(main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4], nowhere))
