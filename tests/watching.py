"""What a service under test says of itself, searched for what it was told: nothing of that may be in it.

    watch = Watch()
    ... a service that logs to `watch.log()`, has `watch.telemetry()` and `watch.metrics`, and is `watch.app(app)`
    watch.check()    # raises Leaked

All that tests send is a canary: messages, documents, comments, users, keys; so are the answers that they get. The log,
spans, events, the metrics of both kinds, what collectors of the test's own were sent and what workers wrote are
searched. That costs a test little while it runs: bodies are put aside, read at the end, and so many only.

A service that is a process of its own has a `Watch(folder=...)`, and who started it another of the same folder: what
was put there is left when the process is killed.
"""

import io
import re
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from observability.exporting import wants_export
from observability.metrics import Metrics
from observability.telemetry import Telemetry
from tests.collector import Collector

TOLD = re.compile(r"/v1/(chat/completions|embeddings|search|documents|feedback|labels|erasures|review/reviews)")
"""Where callers say what is content."""

_NAMES = frozenset(
    (
        "model",
        "role",
        "type",
        "name",
        "id",
        "release",
        "mode",
        "class",
        "category",
        "source",
        "kind",
        "status",
        "code",
        "param",
        "object",
        "outcome",
        "verdict",
        "finish_reason",
        "media_type",
        "retrieval",
        "policy",
        "split",
        "task",
    )
)
"""Fields whose values may be told."""
_WHO = frozenset(("user", "safety_identifier", "conversation", "author"))

_MAX_BODIES = 200
_MAX_BODY_BYTES = 200_000
_MAX_CANARIES = 2_000
_MIN_CHARACTERS = 12
_PIECE_CHARACTERS = 32
_BROKEN = re.compile(r"[^ -~]|[\"'\\]")
"""What is written otherwise in JSON, in labels and in protobuf's text."""


_ID = re.compile(r"[0-9a-f-]{16,}")
"""Of these there are as many as requests, and they say nothing."""


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Leaked(AssertionError):
    """Something that a service was told is in what it says of itself."""


class _Exchange(msgspec.Struct, omit_defaults=True):
    path: str
    body: bytes = b""
    answer: bytes = b""


_heard: list[str] = []
"""What workers wrote, in the order in which they ended."""


def hear(written: bytes) -> None:
    """Have what a worker wrote searched by the services that it worked beside."""
    _heard.append(written.decode(errors="replace"))


class Watch:
    """Of one service."""

    def __init__(self, version: str = "test", *, process: bool = True, folder: Path | None = None) -> None:
        self.metrics = Metrics(version=version, process=process)
        self._heard_before = len(_heard)
        self._measured: list[str] = []
        self._secrets: list[str] = []
        self._spans = _Spans()
        self._events = _Events()
        self._reader = InMemoryMetricReader()
        self._log = _kept(folder, "log")
        self._exchanges = _kept(folder, "exchanges")
        self._exchanges_begun = 0

    def keep_secret(self, *secrets: str) -> None:
        """Look for these too."""
        self._secrets += secrets

    def telemetry(self, **options: Any) -> Telemetry | None:
        """Telemetry that is searched; None where the environment has a collector of the test's own."""
        if any(map(wants_export, ("TRACES", "METRICS", "LOGS"))):
            return None
        return Telemetry(
            **options,
            span_processor=SimpleSpanProcessor(self._spans),
            event_processor=SimpleLogRecordProcessor(self._events),
            metric_reader=self._reader,
        )

    def measure(self) -> None:
        """Take the metrics down, before the parts close that they are of."""
        self._measured = [self.metrics.render()[0].decode(), str(self._reader.get_metrics_data())]

    def see_metrics(self, shown: str) -> None:
        """Search the metrics that a process of its own has shown."""
        self._measured = [shown]

    def see(self, spans: Sequence[ReadableSpan]) -> None:
        """Search these spans too."""
        self._spans.export(spans)

    def log(self, stream: BinaryIO | None = None) -> BinaryIO:
        """A stream for the log, which goes to `stream` too."""
        return self._log if stream is None else _Both(stream, self._log)

    def written(self) -> str:
        """What is in the log."""
        return _all_of(self._log).decode(errors="replace")

    def app(self, app: ASGIApp) -> ASGIApp:
        """The application, of whose requests and answers the first are put aside."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or self._exchanges_begun >= _MAX_BODIES or not TOLD.match(scope["path"]):
                await app(scope, receive, send)
                return
            self._exchanges_begun += 1
            body, answer = bytearray(), bytearray()

            async def receive_too() -> Message:
                message = await receive()
                _take(body, message)
                return message

            async def send_too(message: Message) -> None:
                if message["type"] == "http.response.start":  # Now, since a process may be killed before the end.
                    self._put_aside(_Exchange(scope["path"], bytes(body)))
                _take(answer, message)
                await send(message)

            try:
                await app(scope, receive_too, send_too)
            finally:
                self._put_aside(_Exchange(scope["path"], bytes(body), bytes(answer)))

        return watched

    def _put_aside(self, exchange: _Exchange) -> None:
        self._exchanges.write(msgspec.json.encode(exchange) + b"\n")

    def canaries(self) -> list[str]:
        """What must be nowhere."""
        found = dict.fromkeys(self._secrets)
        for line in _all_of(self._exchanges).splitlines():
            exchange = msgspec.json.decode(line, type=_Exchange)
            said = _said_in(exchange.body)
            if exchange.path == "/v1/chat/completions":
                said = [*said, *_answered_in(exchange.answer)]
            for text in said:
                found.update(dict.fromkeys(_pieces(text)))
            if len(found) >= _MAX_CANARIES:
                break
        return [*found][:_MAX_CANARIES]

    def close(self) -> None:
        """Let go of the files of its folder."""
        self._log.close()
        self._exchanges.close()

    def check(self) -> None:
        """Search; raises Leaked."""
        told = {
            "the log": self.written(),
            "spans": "\n".join(self._spans.told),
            "events": "\n".join(self._events.told),
            "metrics": "\n".join(self._measured),
            "a collector": "\n".join(map(str, _sent_to_collectors())),
            "what a worker wrote": "\n".join(_heard[self._heard_before :]),
        }
        canaries = self.canaries()
        leaks = [(where, each) for where, text in told.items() for each in canaries if each in text]
        if leaks:
            raise Leaked("; ".join(f"{each!r} is in {where}" for where, each in leaks[:5]))


def _kept(folder: Path | None, name: str) -> BinaryIO:
    return io.BytesIO() if folder is None else (folder / name).open("a+b", buffering=0)


def _all_of(stream: BinaryIO) -> bytes:
    stream.seek(0)
    return stream.read()


def _take(into: bytearray, message: MutableMapping[str, Any]) -> None:
    if len(into) < _MAX_BODY_BYTES:
        into += message.get("body") or b""


def _said_in(body: bytes) -> list[str]:
    """The texts in a JSON body; a form's or a broken one's are not looked for."""
    try:
        return list(_strings(msgspec.json.decode(body)))
    except _UNREADABLE:
        return []


def _answered_in(body: bytes) -> list[str]:
    """The texts of an answer, whole or streamed."""
    blocks = [body] if body.startswith(b"{") else re.findall(rb"^data: (\{.*\})$", body, re.MULTILINE)
    whole: dict[int, str] = {}
    for block in blocks:
        try:
            choices = msgspec.json.decode(block).get("choices") or []
        except _UNREADABLE:
            continue
        for choice in choices:
            part = choice.get("message") or choice.get("delta") or {}
            whole[choice.get("index", 0)] = whole.get(choice.get("index", 0), "") + (part.get("content") or "")
    return list(whole.values())


def _strings(content: Any, name: str = "") -> Iterator[str]:
    if isinstance(content, str):
        # One word may be a name that is told; of who it is, never.
        if name in _WHO or (name not in _NAMES and (" " in content or "canary" in content)):
            yield content
    elif isinstance(content, list):
        for each in content:
            yield from _strings(each, name)
    elif isinstance(content, dict):
        for key, each in content.items():
            yield from _strings(each, key)


def _pieces(text: str) -> list[str]:
    """The beginnings and ends of what is written the same everywhere: a part of a text is a leak as well."""
    parts = [part.strip() for part in _BROKEN.split(text[:4000])]
    long = [part for part in parts if len(part) >= _MIN_CHARACTERS]
    return [piece for part in long[:4] for piece in (part[:_PIECE_CHARACTERS], part[-_PIECE_CHARACTERS:])]


class _Spans(SpanExporter):
    """Keeps the words of spans."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            self.told.update((span.name, span.status.description or ""))
            self.told.update(_words(span.attributes))
            for event in (*span.events, *span.links):
                self.told.add(getattr(event, "name", ""))
                self.told.update(_words(event.attributes))
        return SpanExportResult.SUCCESS


class _Events(LogRecordExporter):
    """Keeps the words of events."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        for each in batch:
            self.told.update((str(each.log_record.body), str(each.log_record.event_name)))
            self.told.update(_words(each.log_record.attributes))
        return LogRecordExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True

    def shutdown(self) -> None:
        pass


def _words(attributes: Any) -> Iterable[str]:
    for name, value in (attributes or {}).items():
        yield name
        if not isinstance(value, int | float) and not _ID.fullmatch(text := str(value)):
            yield text


def _sent_to_collectors() -> Iterator[Any]:
    for collector in tuple(Collector.running):
        yield from (*collector.traces, *collector.metrics, *collector.logs)


class _Both(io.RawIOBase):
    """Writes to two streams."""

    def __init__(self, *streams: BinaryIO) -> None:
        self._streams = streams

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        for stream in self._streams:
            stream.write(content)
        return len(content)

    def flush(self) -> None:
        for stream in self._streams:
            if not stream.closed:  # It is flushed once more when it is let go of.
                stream.flush()
