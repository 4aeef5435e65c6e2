"""Turns uploaded files into text with structure: Markdown, plain text, HTML, PDF and DOCX.

The main rule: nothing reads a file in the service's own process. A `Parser` keeps child processes that limit their
memory and time and read one file after another; one that hangs, crashes or exceeds a limit is ended, its file is
refused with the reason, and the next file gets a fresh process.
"""

import asyncio
import re
import signal
import sys
from collections.abc import Callable
from pathlib import PurePosixPath
from types import TracebackType
from typing import Final, Self

import msgspec

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument, UnsupportedType
from retrieval.parsing.child import LENGTH_BYTES, READERS, Failure, Request, Success

DOCX: Final = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
_EXTENSIONS: Final = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".mdown": "text/markdown",
    ".mkd": "text/markdown",
    ".txt": "text/plain",
    ".text": "text/plain",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
    ".docx": DOCX,
}
_ALIASES: Final = {
    "text/x-markdown": "text/markdown",
    "application/xhtml+xml": "text/html",
    "application/x-pdf": "application/pdf",
}
# What upload tools say when they do not know.
_UNKNOWN_TYPES: Final = frozenset(("", "application/octet-stream", "binary/octet-stream", "application/zip"))
_KNOWN_BINARIES: Final = (
    b"PK\x03\x04",
    b"\xd0\xcf\x11\xe0",
    b"{\\rtf",
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"\x1f\x8b",
    b"%!PS",
)
_HTML: Final = re.compile(
    rb"\s*(?:<!--.{0,2000}?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
_BYTE_ORDER_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_READS: Final = "Markdown (.md), plain text (.txt), HTML (.html), PDF (.pdf) and Word (.docx) are read"
# A character takes at most four bytes in UTF-8, and blocks need some room beside the text.
_ANSWER_BYTES_PER_CHARACTER: Final = 100
# Memory that a library leaks or fragments goes back with its process.
_DOCUMENTS_PER_PROCESS: Final = 200


def media_type_of(content: bytes, *, name: str, media_type: str | None = None) -> str:
    """Return the media type a file is read as: what is stated, else what its name ends in, else what it looks like.

    Raises:
        UnsupportedType: Nothing reads files of this type.
    """
    stated = (media_type or "").partition(";")[0].strip().lower()
    stated = _ALIASES.get(stated, stated)
    if stated in READERS:
        return stated
    if stated not in _UNKNOWN_TYPES and not stated.startswith("text/"):
        raise UnsupportedType(f"{name!r} is {stated}: {_READS}")
    return _EXTENSIONS.get(PurePosixPath(name).suffix.lower()) or _sniff(content, name)


def _sniff(content: bytes, name: str) -> str:
    if b"%PDF-" in content[:1024]:
        return "application/pdf"
    # An archive names its parts at its start, and all of them again at its end.
    if content.startswith(b"PK\x03\x04") and (b"word/" in content[:4096] or b"word/document" in content[-65536:]):
        return DOCX
    if _HTML.match(content[:4096]):
        return "text/html"
    is_binary = content.startswith(_KNOWN_BINARIES)
    if is_binary or (b"\x00" in content[:65536] and not content.startswith(_BYTE_ORDER_MARKS)):
        raise UnsupportedType(f"{name!r} is of no type that is read: {_READS}")
    return "text/plain"


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
        self._idle: list[_Child] = []
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
            raise LimitExceeded(f"{name!r} has {len(content):,} bytes; at most {self.limits.max_bytes:,} are read")
        kind = media_type_of(content, name=name, media_type=media_type)
        request = msgspec.msgpack.encode(Request(content, kind, _charset(media_type), self.limits))
        async with self._turns:
            result = await self._exchange(request, name)
        if isinstance(result, Success):
            return result.document
        raise _FAILURES[result.kind](f"{name!r}: {result.message}")

    async def _exchange(self, request: bytes, name: str) -> Success | Failure:
        child = self._idle.pop() if self._idle else await _Child.start()
        healthy = False
        try:
            async with asyncio.timeout(self.limits.max_seconds):
                message = await child.exchange(request, self.limits.max_characters * _ANSWER_BYTES_PER_CHARACTER)
            result = msgspec.msgpack.decode(message, type=Success | Failure)
            healthy = child.exchanges < _DOCUMENTS_PER_PROCESS and not (
                isinstance(result, Failure) and result.kind == "limit"
            )
        except TimeoutError as error:
            raise LimitExceeded(f"{name!r} took more than {self.limits.max_seconds:g} s to read") from error
        except (EOFError, OSError, msgspec.DecodeError) as error:
            raise await self._cause_of_death(child, name) from error
        finally:
            if healthy:
                self._idle.append(child)
            else:
                self._end(child)
        return result

    async def _cause_of_death(self, child: "_Child", name: str) -> UnreadableDocument:
        status = await child.end()
        if status == -signal.SIGXCPU:
            return LimitExceeded(f"{name!r} took more than {self.limits.max_seconds:g} s to read")
        if status == -signal.SIGKILL:
            return LimitExceeded(f"{name!r} takes more memory to read than there is")
        return UnreadableDocument(f"{name!r} made its parser crash (status {status}): the file is damaged or hostile")

    def _end(self, child: "_Child") -> None:
        """End a process in a task of its own, so that a cancelled caller leaves nothing behind."""
        task = asyncio.create_task(child.kill())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


_FAILURES: Final[dict[str, Callable[[str], UnreadableDocument]]] = {
    "unreadable": UnreadableDocument,
    "limit": LimitExceeded,
}


class _Child:
    """A child process with one exchange at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.exchanges = 0

    @classmethod
    async def start(cls) -> "_Child":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-B",
            "-m",
            "retrieval.parsing.child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"LANG": "C.UTF-8"},
        )
        return cls(process)

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


def _charset(media_type: str | None) -> str | None:
    found = re.search(r";\s*charset\s*=\s*\"?([A-Za-z0-9_.:-]{1,40})", media_type or "", re.IGNORECASE)
    return found[1] if found else None
