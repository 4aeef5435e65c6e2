"""One line per log record and per request, as JSON or for people, written by a thread and never by the event loop.

A line is queued and the writer gathers what came in a few hundredths of a second into one write, so a busy service
wakes it some twenty times a second and not once a request; `QueueHandler` and its listener, one wake-up per record,
cost more than the rest of a request's telemetry. The queue is bounded: when stderr cannot keep up lines are dropped and
counted. Content never belongs in a line: an exception is told by its types and stack, its message is left out unless it
is the operating system's, because libraries quote what they were given.
"""

import atexit
import copy
import json
import logging
import sys
import threading
import traceback
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from queue import Empty, SimpleQueue
from time import gmtime, sleep, strftime, time
from typing import Any, BinaryIO, Final, Literal

import msgspec
from opentelemetry import trace

Format = Literal["auto", "json", "text"]

MAX_LINES: Final = 20_000
_GATHER_SECONDS: Final = 0.05
# What these say at INFO is one line per call they make.
_CHATTY: Final = ("httpx", "httpx2", "huggingface_hub", "sentence_transformers", "qdrant_client", "multipart")
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
# Keys that would carry content: their values never reach a line, whoever passes them.
_CONTENT: Final = frozenset({"answer", "content", "messages", "prompt", "query", "question", "quote", "text"})


class RequestIds(msgspec.Struct, frozen=True):
    """What ties a log line to its request."""

    trace_id: str = ""
    span_id: str = ""
    prediction_id: str = ""
    request_id: str = ""
    """Where the request makes no prediction, whose id it has otherwise."""


request_ids: ContextVar[RequestIds] = ContextVar("request_ids", default=RequestIds())  # noqa: B039 - immutable.
"""Set it once per request; each request runs in a task, and so in a context, of its own."""


def _ids() -> RequestIds:
    """The ids of the current request: ours, or those of the span that FastAPI made current."""
    ids = request_ids.get()
    if not ids.trace_id:
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            return msgspec.structs.replace(ids, trace_id=f"{context.trace_id:032x}", span_id=f"{context.span_id:016x}")
    return ids


@lru_cache(maxsize=4096)
def _quoted(value: str) -> str:
    return json.dumps(value)


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return strftime("%Y-%m-%dT%H:%M:%S", gmtime(seconds))


def _instant(at: float) -> str:
    """Format a Unix time as RFC 3339 in UTC with milliseconds."""
    seconds = int(at)
    return f"{_second(seconds)}.{int((at - seconds) * 1000):03d}Z"


def _may_say(error: BaseException) -> bool:
    """Whether an exception's message is known to quote no content: the system's and SQLite's, which are fixed texts."""
    module = type(error).__module__
    return module == "sqlite3" or (isinstance(error, OSError) and module in {"builtins", "socket", "ssl"})


def describe_error(error: BaseException) -> str:
    """Give an exception's chain as type and stack, with the message where it is known to quote no content."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and not any(current is told for told in chain):
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\ncaused by\n".join(_describe_one(link) for link in chain)


def _describe_one(error: BaseException) -> str:
    name = type(error).__qualname__
    stack = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    frames = [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in stack]
    return "\n".join([f"{name}: {error}" if _may_say(error) else name, *frames])


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {
        key: "[content off]" if key in _CONTENT else value
        for key, value in vars(record).items()
        if key not in _STANDARD and key != "request_ids"
    }


def _json_line(record: logging.LogRecord) -> bytes:
    ids: RequestIds = vars(record).get("request_ids") or RequestIds()
    line: dict[str, Any] = {
        "time": _instant(record.created),
        "level": record.levelname,
        "logger": record.name,
        "message": record.msg,
    }
    line |= {key: value for key, value in msgspec.structs.asdict(ids).items() if value}
    if record.exc_text:
        line["error"] = record.exc_text
    line |= {key: value for key, value in _extra(record).items() if key not in line}
    return json.dumps(line, default=str, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _text_line(record: logging.LogRecord) -> bytes:
    ids: RequestIds = vars(record).get("request_ids") or RequestIds()
    named = {"prediction_id": ids.prediction_id, "request_id": ids.request_id}
    fields = _extra(record) | {key: value for key, value in named.items() if value}
    tail = "".join(f" {key}={value}" for key, value in fields.items())
    line = f"{_instant(record.created)[11:23]} {record.levelname:<7} {record.name}: {record.msg}{tail}\n"
    if record.exc_text:
        line += f"{record.exc_text}\n"
    return line.encode("utf-8", "replace")


class _Writer:
    """A bounded queue of lines and the thread that writes them, many to a write."""

    def __init__(self, stream: BinaryIO, max_lines: int, json_lines: bool) -> None:
        self.dropped = 0
        self._stream = stream
        self._max_lines = max_lines
        self._render = _json_line if json_lines else _text_line
        # Its thread waits and sleeps without a line of Python: each takes Python's lock from the requests.
        self._queue: SimpleQueue[bytes | logging.LogRecord | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, line: bytes | logging.LogRecord) -> None:
        """Queue a line; drop and count it when the queue is full."""
        if self._queue.qsize() < self._max_lines:
            self._queue.put(line)
        else:
            self.dropped += 1

    def close(self, deadline_seconds: float) -> None:
        self._queue.put(None)
        self._thread.join(deadline_seconds)

    def _run(self) -> None:
        is_over = False
        while not is_over:
            lines: list[bytes] = []
            is_over = self._take(self._queue.get(), lines)
            sleep(0.0 if is_over else _GATHER_SECONDS)
            with suppress(Empty):
                while True:
                    is_over |= self._take(self._queue.get_nowait(), lines)
            self._write(lines)

    def _take(self, line: bytes | logging.LogRecord | None, lines: list[bytes]) -> bool:
        """Add a line to those that are written next; say whether it is the mark of the end instead."""
        if line is not None:
            lines.append(line if isinstance(line, bytes) else self._rendered(line))
        return line is None

    def _write(self, lines: list[bytes]) -> None:
        if lines:
            try:
                self._stream.write(b"".join(lines))
                self._stream.flush()
            except (OSError, ValueError):  # Closed, or a full disk behind it: the service goes on.
                self.dropped += len(lines)

    def _rendered(self, record: logging.LogRecord) -> bytes:
        try:
            return self._render(record)
        except Exception:  # noqa: BLE001 - an extra whose __str__ fails must not end the thread that writes all lines.
            bare = logging.makeLogRecord({key: vars(record)[key] for key in ("name", "levelname", "created", "msg")})
            return self._render(bare)


class _Handler(logging.Handler):
    """Takes a record as it is on the caller's thread: formatted, with the request's ids, holding no frame alive."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        taken = copy.copy(record)
        try:
            taken.msg = record.getMessage()
        except (TypeError, ValueError, KeyError):
            taken.msg = str(record.msg)  # The arguments do not fit: the message as it was written says which call.
        if record.name == "asyncio":
            taken.msg = taken.msg.partition("\n")[0]  # What follows is a task's repr, its exception's message included.
        taken.args = None
        vars(taken)["request_ids"] = _ids()
        if record.exc_info and record.exc_info[1] is not None:
            taken.exc_text = describe_error(record.exc_info[1])
        taken.exc_info = None
        self._writer.put(taken)


class Log:
    """The process's log while it is configured."""

    def __init__(self, writer: _Writer, json_lines: bool) -> None:
        self._writer = writer
        self._json = json_lines
        self._closed = False
        self._root_was: tuple[int, list[logging.Handler]] = (logging.root.level, logging.root.handlers[:])
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        """Lines lost because the queue was full or the stream could not be written."""
        return self._writer.dropped

    def access(
        self,
        method: str,
        route: str,
        status: int,
        duration_seconds: float,
        *,
        trace_id: str = "",
        prediction_id: str = "",
        request_id: str = "",
        release: str = "",
        tenant: str = "",
        outcome: str = "",
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        """Write a request's one line; `route` is the template."""
        at = time()
        milliseconds = duration_seconds * 1000
        if self._json:
            named = f'"request_id":"{request_id}",' if request_id else ""
            line = (
                f'{{"time":"{_instant(at)}","level":"INFO","logger":"hallmark.access","message":"request",'
                f'"method":{_quoted(method)},"route":{_quoted(route)},"status":{status},"duration_ms":{milliseconds:.3f},'
                f'{named}"trace_id":"{trace_id}","prediction_id":"{prediction_id}","release":{_quoted(release)},'
                f'"tenant":{_quoted(tenant)},"outcome":{_quoted(outcome)},'
                f'"prompt_tokens":{prompt_tokens},"completion_tokens":{completion_tokens}}}\n'
            )
        else:
            answered = (
                f" {outcome} {release} {prompt_tokens}+{completion_tokens} tokens {prediction_id}" if release else ""
            )
            named = f" request_id={request_id}" if request_id and status >= 400 else ""
            line = f"{_instant(at)[11:23]} INFO    {method} {route} {status} {milliseconds:.1f} ms{answered}{named}\n"
        self._writer.put(line.encode("utf-8", "replace"))

    def close(self, deadline_seconds: float = 2.0) -> None:
        """Write what is queued, within the deadline, and give logging back as it was; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        logging.captureWarnings(False)
        logging.root.setLevel(self._root_was[0])
        logging.root.handlers[:] = self._root_was[1]
        self._writer.close(deadline_seconds)


def configure(
    level: str = "INFO", line_format: Format = "auto", *, stream: BinaryIO | None = None, max_lines: int = MAX_LINES
) -> Log:
    """Send every logger of the process, uvicorn's included, to stderr or `stream`; the caller closes what it gets.

    `auto` writes for people when the stream is a terminal and JSON otherwise. Start uvicorn with `log_config=None` and
    `access_log=False`, or it sets its own handlers afterwards.
    """
    stream = stream or sys.stderr.buffer
    json_lines = line_format == "json" or (line_format == "auto" and not stream.isatty())
    log = Log(writer := _Writer(stream, max_lines, json_lines), json_lines)
    logging.root.handlers[:] = [_Handler(writer)]
    logging.root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    # A request's line is ours to write, with its route and prediction instead of its path and query.
    logging.getLogger("uvicorn.access").handlers.clear()
    logging.getLogger("uvicorn.access").propagate = False
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))
    return log
