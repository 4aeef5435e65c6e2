"""The parser's child process: takes files on its standard input, answers on its standard output, and is expendable.

The main rule: it limits itself before it touches a file, so that whatever a file does ends this process and nothing
else. Run as `python -I -B -m retrieval.parsing.child`; each message is eight bytes of length and then MessagePack.
"""

import importlib
import math
import os
import resource
from typing import BinaryIO, Literal

import msgspec

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument

# Imported when first needed: a folder of Markdown never pays for lxml.
READERS = {
    "text/plain": "retrieval.parsing.plain",
    "text/markdown": "retrieval.parsing.markdown",
    "text/html": "retrieval.parsing.webpage",
    "application/pdf": "retrieval.parsing.pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "retrieval.parsing.word",
}
LENGTH_BYTES = 8


class Request(msgspec.Struct, frozen=True):
    """A file to read."""

    content: bytes
    media_type: str
    charset: str | None
    limits: ParseLimits


class Failure(msgspec.Struct, frozen=True, tag=True):
    """Why a file was not read."""

    kind: Literal["unreadable", "limit"]
    message: str


class Success(msgspec.Struct, frozen=True, tag=True):
    """What a file said."""

    document: ParsedDocument


def answer(request: Request) -> Success | Failure:
    """Read one file; every way in which a reader fails becomes a failure that says what to do."""
    try:
        return Success(_read(request))
    except LimitExceeded as error:
        return Failure("limit", str(error))
    except UnreadableDocument as error:
        return Failure("unreadable", str(error))
    except MemoryError:
        return Failure("limit", f"reading it takes more than {request.limits.max_memory_bytes:,} bytes of memory")
    except RecursionError:
        return Failure("limit", "it is nested too deeply")
    except Exception as error:  # noqa: BLE001 - Readers raise whatever a damaged file makes them stumble over.
        return Failure("unreadable", f"the file is damaged, or not {request.media_type} ({type(error).__name__})")


def _read(request: Request) -> ParsedDocument:
    reader = importlib.import_module(READERS[request.media_type])
    if request.media_type.startswith("text/"):
        document = reader.read(request.content, request.limits, request.charset)
    else:
        document = reader.read(request.content, request.limits)
    assert isinstance(document, ParsedDocument)
    return document


def main() -> None:
    """Answer requests until the standard input ends."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # What a library prints must not get between the answers.
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while (message := _receive(requests)) is not None:
        request = msgspec.msgpack.decode(message, type=Request)
        del message
        _limit(request.limits)
        result = answer(request)
        _send(answers, result)
        if isinstance(result, Failure) and result.kind == "limit":
            # Memory may be spent and caches poisoned: the next file deserves a fresh process.
            return


def _limit(limits: ParseLimits) -> None:
    """Bound this process's memory, and its processor time by what it has used so far and `max_seconds` more."""
    _lower(resource.RLIMIT_AS, limits.max_memory_bytes)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + limits.max_seconds))


def _lower(kind: int, limit: int) -> None:
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _receive(stream: BinaryIO) -> bytes | None:
    length = stream.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    message = stream.read(int.from_bytes(length, "big"))
    return message if len(message) == int.from_bytes(length, "big") else None


def _send(stream: BinaryIO, result: Success | Failure) -> None:
    try:
        message = msgspec.msgpack.encode(result)
    except MemoryError:
        message = msgspec.msgpack.encode(Failure("limit", "what it contains does not fit the memory allowed"))
    stream.write(len(message).to_bytes(LENGTH_BYTES, "big") + message)
    stream.flush()


if __name__ == "__main__":
    main()
