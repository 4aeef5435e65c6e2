"""The parser's child process: takes files on its standard input, answers on its standard output, and is expendable.

The main rule: it limits itself before it touches a file, so that whatever a file does ends this process and nothing
else. Run as `python -I -B -m retrieval.parsing.child`; messages are MessagePack.
"""

import contextlib
import ctypes
import importlib
import math
import os
import resource
import sys
from typing import BinaryIO

import msgspec

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import Limit, LimitExceeded, UnreadableDocument
from retrieval.pipes import end_with_parent, receive, send, take_pipes

DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
EPUB = "application/epub+zip"
# Imported when first needed: a folder of Markdown never pays for lxml.
READERS = {
    "text/plain": "retrieval.parsing.plain",
    "text/markdown": "retrieval.parsing.markdown",
    "text/html": "retrieval.parsing.webpage",
    "text/csv": "retrieval.parsing.delimited",
    "application/jsonl": "retrieval.parsing.records",
    "application/pdf": "retrieval.parsing.pdf",
    "message/rfc822": "retrieval.parsing.mail",
    DOCX: "retrieval.parsing.word",
    PPTX: "retrieval.parsing.slides",
    XLSX: "retrieval.parsing.workbook",
    EPUB: "retrieval.parsing.book",
}
_NICENESS = 10
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


class Request(msgspec.Struct, frozen=True):
    """A file to read."""

    content: bytes
    media_type: str
    charset: str | None
    limits: ParseLimits


class Failure(msgspec.Struct, frozen=True, tag=True):
    """Why a file was not read."""

    message: str
    limit: Limit | None = None
    """Which limit the file is over, if that is the reason."""


class Success(msgspec.Struct, frozen=True, tag=True):
    """What a file said."""

    document: ParsedDocument


def answer(request: Request) -> Success | Failure:
    """Read one file; every way in which a reader fails becomes a failure that says what to do."""
    try:
        return Success(_read(request))
    except LimitExceeded as error:
        return Failure(str(error), error.limit)
    except UnreadableDocument as error:
        return Failure(str(error))
    except MemoryError:
        return Failure(_too_much_memory(request.limits), "memory")
    except RecursionError:
        return Failure("it is nested too deeply: simplify it", "depth")
    except Exception as error:  # noqa: BLE001 - Readers raise whatever a damaged file makes them stumble over.
        return Failure(f"the file is damaged, or not {request.media_type} ({type(error).__name__})")


def _too_much_memory(limits: ParseLimits) -> str:
    return f"reading it takes more than {limits.max_memory_bytes:,} bytes of memory: split it"


def _read(request: Request) -> ParsedDocument:
    reader = importlib.import_module(READERS[request.media_type])
    if request.media_type.startswith("text/") or request.media_type == "application/jsonl":
        document = reader.read(request.content, request.limits, request.charset)
    else:
        document = reader.read(request.content, request.limits)
    assert isinstance(document, ParsedDocument)
    return document


def main() -> None:
    """Answer requests until the standard input ends."""
    _part_with_the_world()
    requests, answers = take_pipes()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while (message := receive(requests)) is not None:
        request = msgspec.msgpack.decode(message, type=Request)
        del message
        _limit(request)
        result = answer(request)
        _send(answers, result, request.limits)
        if isinstance(result, Failure) and result.limit:
            # Memory may be spent and caches poisoned: the next file deserves a fresh process.
            return


def _part_with_the_world() -> None:
    """Die with the parent, let it go first, start nothing, and have no network where the system allows that."""
    os.nice(_NICENESS)
    with contextlib.suppress(ValueError, OSError):  # Not every system counts processes.
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if sys.platform != "linux":
        return
    end_with_parent()
    # Refused in many containers; the file's limits do not depend on it.
    ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit(request: Request) -> None:
    """Bound this process's memory, and its processor time by what it has used so far and what the file may take."""
    _lower(resource.RLIMIT_AS, request.limits.max_memory_bytes)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = request.limits.seconds_for(len(request.content))
    _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds))


def _lower(kind: int, limit: int) -> None:
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _send(stream: BinaryIO, result: Success | Failure, limits: ParseLimits) -> None:
    try:
        message = msgspec.msgpack.encode(result)
    except MemoryError:
        message = msgspec.msgpack.encode(Failure(_too_much_memory(limits), "memory"))
    send(stream, message)


if __name__ == "__main__":
    main()
