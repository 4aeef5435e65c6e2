"""Makes reports in a process of its own, which gives way to everything else on the machine.

The main rule: what is asked, with the database's password, goes in by a pipe and the report comes out by one; nothing
of the statistics, nor of scipy and scikit-learn, is loaded where requests are served or canaries are watched.
"""

import asyncio
import sys
from contextlib import suppress

import msgspec

from app.errors import InvalidRequest, ServiceError, Unavailable
from app.privacy.rings import RingPlace
from app.quality.figures import Asked, Report

LONGEST_SECONDS = 1_800.0
MAX_REPORT_BYTES = 64 << 20


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is to do; it reads one line of JSON."""

    url: str
    """Of the database."""
    asked: Asked
    rest: float
    """Seconds of rest for each second of work."""
    keys: RingPlace | None = None
    """Where the keys are that sealed content opens with."""
    idle: bool = False
    """Whether it runs only while nothing else wants to; else it gives way, and somebody waits for it."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What it says: a report, or why there is none."""

    report: Report | None = None
    refused: str | None = None
    param: str | None = None
    unavailable: str | None = None
    failed: str | None = None
    """The type of what was raised, since a message may quote content."""


class Apart:
    """Makes reports of the database at `url`, each in a process of its own.

    Args:
        url: of the database that all replicas share, with its password.
        rest: for each second of work so many seconds of rest.
        idle: whether it runs only while nothing else on the machine wants to, since nobody waits.
        keys: where the keys are that sealed content opens with.
        longest_seconds: a report that takes longer is given up.
    """

    def __init__(
        self,
        url: str,
        *,
        rest: float = 0.0,
        idle: bool = False,
        keys: RingPlace | None = None,
        longest_seconds: float = LONGEST_SECONDS,
    ) -> None:
        self._url = url
        self._rest = rest
        self._idle = idle
        self._keys = keys
        self._longest_seconds = longest_seconds

    async def make(self, asked: Asked) -> Report:
        """Make a report.

        Raises:
            InvalidRequest: the window has answers of too many releases.
            Unavailable: the database does not answer, or the report takes too long.
            ServiceError: the process broke.
        """
        order = msgspec.json.encode(
            Order(url=self._url, asked=asked, rest=self._rest, idle=self._idle, keys=self._keys)
        )
        try:
            async with asyncio.timeout(self._longest_seconds):
                reply = await _exchange(order)
        except TimeoutError as error:
            raise Unavailable(
                f"The report took more than {self._longest_seconds:g} s: choose a shorter window.",
                retry_after_seconds=60.0,
            ) from error
        if reply.refused is not None:
            raise InvalidRequest(reply.refused, param=reply.param)
        if reply.unavailable is not None:
            raise Unavailable(reply.unavailable, retry_after_seconds=1.0)
        if reply.report is None:
            raise ServiceError(f"The report could not be made ({reply.failed}).")
        return reply.report


async def _exchange(order: bytes) -> Reply:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "app.quality",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin
    assert process.stdout
    try:
        with suppress(OSError):  # It ended at once: what it did not say tells that.
            process.stdin.write(order + b"\n")
            await process.stdin.drain()
        # The pipe to it stays open: the process ends when it closes, which happens also where this one is killed.
        said = bytearray()
        while part := await process.stdout.read(1 << 20):
            said += part
            if len(said) > MAX_REPORT_BYTES:
                return Reply(failed="too long")
        try:
            return msgspec.json.decode(said, type=Reply)
        except msgspec.DecodeError:
            return Reply(failed=f"ended with {await process.wait()}")
    finally:
        await asyncio.shield(_end(process))


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin
    assert process.stdout
    with suppress(ProcessLookupError):
        process.kill()
    process.stdin.close()
    # Without reading what is left its end is not noticed.
    while await process.stdout.read(1 << 20):
        pass
    await process.wait()
