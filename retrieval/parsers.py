"""Turns uploaded files into text with structure, each by the reader of its format in `retrieval.parsing`.

The main rule: nothing reads a file in the service's own process. A `Parser` keeps child processes that limit their
memory and time and read one file after another; one that hangs, crashes or exceeds a limit is ended, its file is
refused with the reason, and the next file gets a fresh process.
"""

import asyncio
import re
import signal
from collections.abc import Coroutine
from types import TracebackType
from typing import Final, Self

import msgspec

from retrieval.children import Child, module_command
from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.media_types import media_type_of
from retrieval.parsing.child import Failure, Request, Success

__all__ = ["Parser", "media_type_of", "parse"]

_COMMAND: Final = module_command("retrieval.parsing.child")
# A child cannot hold an answer of more than this part of its memory beside what it is made of.
_ANSWER_PART_OF_MEMORY: Final = 2
# The clock runs on while a child waits for a processor, which is not the file's fault.
_PATIENCE: Final = 4
# Memory that a library leaks or fragments goes back with its process.
_DOCUMENTS_PER_PROCESS: Final = 200


async def parse(
    content: bytes, *, name: str, media_type: str | None = None, limits: ParseLimits | None = None
) -> ParsedDocument:
    """Read one file in a process of its own; for many, keep a `Parser`."""
    async with Parser(limits or ParseLimits()) as parser:
        return await parser.parse(content, name=name, media_type=media_type)


class Parser:
    """Reads files in at most `processes` child processes at a time; further files wait for their turn.

    Use as an async context manager, or call `close`; a process is started when it is first needed.
    """

    def __init__(self, limits: ParseLimits | None = None, processes: int = 1) -> None:
        self.limits = limits or ParseLimits()
        self._turns = asyncio.Semaphore(processes)
        self._idle: list[Child] = []
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the child processes."""
        while self._idle:
            self._end(self._idle.pop())
        if self._ending:
            await asyncio.wait(self._ending)

    async def parse(self, content: bytes, *, name: str, media_type: str | None = None) -> ParsedDocument:
        """Return the text and structure of a file.

        `media_type` may carry a charset; `name` serves to find the type and to name the file in errors.

        Raises:
            UnsupportedType: Nothing reads files of this type.
            LimitExceeded: The file is too large, or costs more time or memory than `limits` allow.
            UnreadableDocument: The file is empty, damaged, encrypted, or has no text.
        """
        if not content:
            raise UnreadableDocument(f"{name!r} is empty")
        if len(content) > self.limits.max_bytes:
            message = f"{name!r} has {len(content):,} bytes; at most {self.limits.max_bytes:,} are read: split it"
            raise LimitExceeded(message, "bytes")
        kind = media_type_of(content, name=name, media_type=media_type)
        request = msgspec.msgpack.encode(Request(content, kind, _charset(media_type), self.limits))
        async with self._turns:
            result = await self._exchange(request, name, self.limits.seconds_for(len(content)))
        if isinstance(result, Success):
            return result.document
        message = f"{name!r}: {result.message}"
        raise LimitExceeded(message, result.limit) if result.limit else UnreadableDocument(message)

    async def _exchange(self, request: bytes, name: str, seconds: float) -> Success | Failure:
        child = self._idle.pop() if self._idle else await self._started()
        healthy = False
        try:
            async with asyncio.timeout(_PATIENCE * seconds):
                message = await child.exchange(request, self.limits.max_memory_bytes // _ANSWER_PART_OF_MEMORY)
            result = msgspec.msgpack.decode(message, type=Success | Failure)
            healthy = child.exchanges < _DOCUMENTS_PER_PROCESS and not (isinstance(result, Failure) and result.limit)
        except TimeoutError as error:
            raise _too_slow(name, seconds) from error
        except (EOFError, OSError, msgspec.DecodeError) as error:
            raise await self._cause_of_death(child, name, seconds) from error
        finally:
            if healthy:
                self._idle.append(child)
            else:
                self._end(child)
        return result

    async def _started(self) -> Child:
        """Start a process; one whose caller leaves meanwhile is ended as soon as it is there."""
        starting = asyncio.create_task(Child.start(_COMMAND, {"LANG": "C.UTF-8"}))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._own(_end_started(starting))
            raise

    async def _cause_of_death(self, child: Child, name: str, seconds: float) -> UnreadableDocument:
        status = await child.end()
        if status == -signal.SIGXCPU:
            return _too_slow(name, seconds)
        if status == -signal.SIGKILL:
            message = f"{name!r} takes more memory to read than there is: split it, or give the service more"
            return LimitExceeded(message, "memory")
        return UnreadableDocument(
            f"{name!r} made its parser crash (status {status}): it is damaged or hostile; save it anew or convert it"
        )

    def _end(self, child: Child) -> None:
        """End a process in a task of its own, so that a cancelled caller leaves nothing behind."""
        self._own(child.kill())

    def _own(self, ending: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(ending)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _end_started(starting: "asyncio.Task[Child]") -> None:
    child = await starting
    await child.kill()


def _too_slow(name: str, seconds: float) -> LimitExceeded:
    return LimitExceeded(f"{name!r} took more than {seconds:g} s to read: split it", "seconds")


def _charset(media_type: str | None) -> str | None:
    found = re.search(r";\s*charset\s*=\s*\"?([A-Za-z0-9_.:-]{1,40})", media_type or "", re.IGNORECASE)
    return found[1] if found else None
