"""Child processes of the service, as it sees them: started, asked one thing at a time, and ended.

The main rule: whatever a child does, its end is noticed and nothing of it is left. `retrieval.pipes` is the other end.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from retrieval.pipes import LENGTH_BYTES


class Child:
    """A child process with one exchange at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.exchanges = 0

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str] | None = None) -> "Child":
        """Start a process, in the session of this one; without an `environment` it has this one's."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    async def exchange(self, request: bytes, longest_answer_bytes: int) -> bytes:
        """Send a request and return the answer.

        Raises:
            EOFError: The process ended instead, or answered too much.
            OSError: The process ended before it had read the request.
        """
        assert self._process.stdin
        assert self._process.stdout
        self.exchanges += 1
        self._process.stdin.write(len(request).to_bytes(LENGTH_BYTES, "big"))
        self._process.stdin.write(request)
        await self._process.stdin.drain()
        length = int.from_bytes(await self._process.stdout.readexactly(LENGTH_BYTES), "big")
        if length > longest_answer_bytes:
            raise EOFError
        return await self._process.stdout.readexactly(length)

    async def end(self) -> int:
        """Wait a moment for the process to end by itself, then end it; return its exit status."""
        try:
            async with asyncio.timeout(1):
                return await self._drained()
        except TimeoutError:
            await self.kill()
            return self._process.returncode or 0

    async def kill(self) -> None:
        """End the process at once."""
        if self._process.returncode is None:
            self._process.kill()
        await self._drained()

    async def _drained(self) -> int:
        """Read what is left of the output, without which the end of the process is not noticed, and wait for it."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        while await self._process.stdout.read(1 << 20):
            pass
        return await self._process.wait()


def module_command(module: str) -> tuple[str, ...]:
    """The command that runs a module of ours, with nothing of the working directory or of the user's on its path."""
    return sys.executable, "-I", "-B", "-m", module


def usable_cores() -> int:
    """Count the cores this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period))  # The word "max" is no number: there is no quota.
    return max(1, cores)
