"""`hallmark worker` as a process of its own, to be killed; the services beside it search what it writes."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tests.watching import hear

REPOSITORY = Path(__file__).parents[1]


@contextlib.asynccontextmanager
async def worker_process(
    data_dir: Path, database_url: str | None = None, *, settings: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a worker until the end of the block, or until it is killed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HALLMARK_")}
    given = {"HALLMARK_DATABASE_URL": database_url} if database_url else {}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", "worker", "--data-dir", str(data_dir),
        cwd=REPOSITORY, env={**own, **given, **(settings or {})}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            while b"Working on" not in (line := await process.stderr.readline()):
                assert line, f"the worker ended with {await process.wait()}"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        hear((await process.communicate())[1])
