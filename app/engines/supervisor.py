"""Keeps an embedded engine running beside the gateway: starts it, starts it again when it dies, stops it.

Main rule: the engine may die at any time and the gateway never waits for it, except where it asks to with `ready`.
The address stays the same over restarts, so that whoever holds it need not be told.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from app.engines.local import EngineSettings
from app.errors import EngineUnavailable

log = logging.getLogger(__name__)
engine_log = logging.getLogger("hallmark.engine")

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
STABLE_AFTER_SECONDS = 60.0
TERMINATE_SECONDS = 8.0  # Longer than the engine gives its own requests to finish.
READY_LINE = "ready on "
LONGEST_LINE_BYTES = 64 * 1024


class LocalEngineSupervisor:
    """Runs one embedded engine as a child process for as long as its context is open.

    Entering starts the child and returns at once; `ready` waits until it answers. The child's lines go to the log
    `hallmark.engine`, and to `on_progress` while it starts. `settings` are the engine's; host, port, token and parent
    are chosen here.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        on_progress: Callable[[str], None] | None = None,
        command: tuple[str, ...] = (sys.executable, "-m", "app.engines.local"),
        first_backoff_seconds: float = FIRST_BACKOFF_SECONDS,
        stable_after_seconds: float = STABLE_AFTER_SECONDS,
        terminate_seconds: float = TERMINATE_SECONDS,
    ) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self._command = command
        self._first_backoff_seconds = first_backoff_seconds
        self._stable_after_seconds = stable_after_seconds
        self._terminate_seconds = terminate_seconds
        self._port = 0
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._is_ready = asyncio.Event()
        self.token = secrets.token_urlsafe(32)
        self.restarts = 0
        self.last_exit: str | None = None

    @property
    def base_url(self) -> str:
        """Where the engine answers; the same over restarts. Known once the context is entered."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """The running child's process id."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def __aenter__(self) -> Self:
        self._port = _free_port()
        self._keeper = asyncio.create_task(self._keep_running(), name="local-engine")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is None:
            return
        keeper, self._keeper = self._keeper, None
        keeper.cancel()
        # Even when the closing task is cancelled itself, the child must not outlive the context.
        await asyncio.shield(asyncio.gather(keeper, return_exceptions=True))

    async def ready(self, timeout_seconds: float) -> None:
        """Wait until the engine takes requests.

        Raises:
            EngineUnavailable: it does not within `timeout_seconds`; the message tells how it last ended.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._is_ready.wait()
        except TimeoutError as error:
            why = f"; it last ended with {self.last_exit}" if self.last_exit else ""
            raise EngineUnavailable(
                f"the local engine was not ready after {timeout_seconds:g} s{why}: see its lines in the log"
            ) from error

    async def _keep_running(self) -> None:
        backoff_seconds = self._first_backoff_seconds
        while True:
            started = time.monotonic()
            try:
                self.last_exit = await self._run_once()
            finally:
                self._is_ready.clear()
            if time.monotonic() - started > self._stable_after_seconds:
                backoff_seconds = self._first_backoff_seconds
            log.error("the local engine ended with %s; starting it again in %.1f s", self.last_exit, backoff_seconds)
            await asyncio.sleep(backoff_seconds)
            backoff_seconds = min(backoff_seconds * 2, LONGEST_BACKOFF_SECONDS)
            self.restarts += 1

    async def _run_once(self) -> str:
        """Run the child to its end and say how it ended; cancelled, stop it first."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *self._arguments(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=LONGEST_LINE_BYTES,
            )
        except OSError as error:
            return f"no start: {error}"
        self._process = process
        try:
            await self._hand_over_token(process)
            await self._pass_lines_on(process)
            return _describe_exit(await process.wait())
        finally:
            await _stop(process, self._terminate_seconds)

    def _arguments(self) -> list[str]:
        settings = self._settings
        options = {
            "--model": settings.model,
            "--host": "127.0.0.1",
            "--port": self._port,
            "--dtype": settings.dtype,
            "--threads": settings.threads,
            "--max-queue": settings.max_queue,
            "--max-batch": settings.max_batch,
            "--max-total-tokens": settings.max_total_tokens,
            "--max-adapters": settings.max_adapters,
            "--cache-dir": settings.cache_dir,
            "--parent-pid": os.getpid(),
            "--token": "-",  # From stdin: a command line can be read by everyone on the machine.
        }
        given = [text for option, value in options.items() if value is not None for text in (option, str(value))]
        return given + [text for name, folder in settings.adapters for text in ("--adapter", f"{name}={folder}")]

    async def _hand_over_token(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # It has died already, which its exit status tells better.
            process.stdin.write(self.token.encode() + b"\n")
            await process.stdin.drain()

    async def _pass_lines_on(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                raw = await process.stderr.readline()
            except ValueError:  # A line over the limit, which the reader has dropped.
                continue
            if not raw:
                return
            # A progress bar redraws its line by carriage returns: its last state is the line.
            line = raw.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]
            level, _, text = line.partition(" ")
            number = logging.getLevelNamesMapping().get(level)
            text = line if number is None else text
            engine_log.log(number or logging.INFO, "%s", text)
            if self._on_progress and not self._is_ready.is_set():
                self._on_progress(text)
            if text.startswith(READY_LINE):
                self._is_ready.set()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"


async def _stop(process: asyncio.subprocess.Process, patience_seconds: float) -> None:
    """End the process: ask, then insist; returns when it is gone. Cancelled meanwhile, it kills at once."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(patience_seconds):
            await _drained(process)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if not isinstance(error, TimeoutError):
            raise
        log.warning("the local engine did not end within %.1f s of being asked: killed it", patience_seconds)
        await _drained(process)


async def _drained(process: asyncio.subprocess.Process) -> None:
    """Wait for the end while reading what is still written: a full pipe would keep the process from ending."""
    if process.stderr is not None:
        while await process.stderr.read(LONGEST_LINE_BYTES):
            pass
    await process.wait()
