"""One setting, several values: the frontier of throughput and latency, and the value to take."""

import asyncio
import contextlib
import os
import shlex
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.errors import InvalidRequest, ServiceError

_POLL_SECONDS = 0.2
_STOP_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Point:
    """What one value of the setting came to."""

    value: float
    figures: dict[str, Any]
    """As `Measures.described` gives them."""


@dataclass(frozen=True)
class Failure:
    """Why a value of the setting was not measured; the others were."""

    value: float
    error: str


def written(value: float) -> str:
    """A value as one gives it: 1048576, of which six digits would make 1.04858e+06."""
    return f"{value:.15g}"


def recommended(points: list[Point]) -> Point | None:
    """The value with the highest goodput of those that meet the objective; of equal ones the first."""
    meeting = [point for point in points if point.figures["meets_objective"]]
    return max(meeting, key=lambda point: point.figures["goodput_per_second"], default=None)


def knee(points: list[Point]) -> Point | None:
    """Where the frontier bends: the point farthest below the line from the least throughput to the most.

    Beyond it latency grows faster than throughput. None of fewer than three points, or where nothing bends.
    """
    known = [point for point in points if point.figures["ttft_seconds"]["p95"] is not None]
    known.sort(key=lambda point: point.figures["requests_per_second"])
    if len(known) < 3:
        return None
    across = [point.figures["requests_per_second"] for point in known]
    up = [point.figures["ttft_seconds"]["p95"] for point in known]
    if across[-1] <= across[0] or max(up) <= min(up):
        return None
    gains = [
        (x - across[0]) / (across[-1] - across[0]) - (y - min(up)) / (max(up) - min(up))
        for x, y in zip(across, up, strict=True)
    ]
    best = max(range(len(known)), key=gains.__getitem__)
    # At an end nothing bends: latency has not begun to grow, or has grown from the start.
    return known[best] if 0 < best < len(known) - 1 and gains[best] > 0.05 else None


@contextlib.asynccontextmanager
async def started(
    template: str, value: str, ready_url: str, *, within_seconds: float = 600.0, stop_seconds: float = 30.0
) -> AsyncIterator[None]:
    """Run the command with `{value}` filled in until the block ends; begin when `ready_url` answers with 200.

    The command is not given to a shell. It gets a process group of its own, all of which is ended, and killed where it
    is still there after `stop_seconds`.

    Raises:
        InvalidRequest: the command has no `{value}`, or cannot be read or started.
        ServiceError: it ended, or was not ready in time.
    """
    if "{value}" not in template:
        raise InvalidRequest("`--command`: has no {value} to put the setting's values in.", param="command")
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
        if await _answers(client, ready_url):
            raise InvalidRequest(
                f"`--command`: something answers at {ready_url} already; end it first.", param="command"
            )
    try:
        parts = [part.replace("{value}", value) for part in shlex.split(template)]
    except ValueError as error:
        raise InvalidRequest(f"`--command`: cannot be read: {error}.", param="command") from None
    try:
        server = await asyncio.create_subprocess_exec(*parts, start_new_session=True, stdin=asyncio.subprocess.DEVNULL)
    except OSError as error:
        raise InvalidRequest(f"`--command`: {parts[0]} cannot be started: {error.strerror}.", param="command") from None
    try:
        await _ready(server, ready_url, within_seconds)
        yield
    finally:
        await asyncio.shield(_ended(server, stop_seconds))


async def _ready(server: asyncio.subprocess.Process, url: str, within_seconds: float) -> None:
    try:
        async with asyncio.timeout(within_seconds), httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while True:
                if server.returncode is not None:
                    raise ServiceError(f"the command ended with {server.returncode} before {url} answered.")
                if await _answers(client, url):
                    return
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise ServiceError(f"{url} did not answer with 200 within {within_seconds:g} s.") from None


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.HTTPError:
        return False


async def _ended(server: asyncio.subprocess.Process, stop_seconds: float) -> None:
    """Ask the process group to end, and end what of it does not.

    A launcher may be gone at once and its engine, which holds the port and the GPU, only later.
    """
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, sign)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(stop_seconds):
                while await asyncio.to_thread(_runs, server.pid):  # noqa: ASYNC110 - nobody tells of others' children.
                    await asyncio.sleep(_STOP_POLL_SECONDS)
                await server.wait()
                return


def _runs(group: int) -> bool:
    """Whether any of a process group still runs.

    One that has ended is in its group until somebody waits for it, which the first process of a container may never do.
    """
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):  # The latter on macOS, of those that have ended.
        return False
    processes = list(Path("/proc").glob("[0-9]*/stat"))  # None where there is no such folder.
    return not processes or any(_runs_in(group, stat) for stat in processes)


def _runs_in(group: int, stat: Path) -> bool:
    """Whether a process, by its `/proc/PID/stat`, belongs to a group and has not ended."""
    try:
        state, _, of_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
    except OSError:  # It is gone.
        return False
    return int(of_group) == group and state != "Z"
