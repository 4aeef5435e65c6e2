"""What a service under test says of itself, searched for what it was told: nothing of that may be in it.

    watch = Watch()
    ... a service that logs to `watch.log()`, has `watch.telemetry()` and `watch.metrics`, and is `watch.app(app)`
    watch.check()    # raises Leaked

All that tests send is a canary: messages, documents, comments, users, keys; so are the answers that they get. The log,
spans, events, the metrics of both kinds and what collectors of the test's own were sent are searched. That costs a test
nothing while it runs: bodies are put aside, read at the end, and so many only.
"""

import io
import re
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
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


@dataclass
class _Exchange:
    path: str
    body: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)


class Watch:
    """Of one service."""

    def __init__(self, version: str = "test", *, process: bool = True) -> None:
        self.metrics = Metrics(version=version, process=process)
        self._measured: list[str] = []
        self._secrets: list[str] = []
        self._spans = _Spans()
        self._events = _Events()
        self._reader = InMemoryMetricReader()
        self._log = io.BytesIO()
        self._exchanges: list[_Exchange] = []

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

    def see(self, spans: Sequence[ReadableSpan]) -> None:
        """Search these spans too."""
        self._spans.export(spans)

    def log(self, stream: BinaryIO | None = None) -> BinaryIO:
        """A stream for the log, which goes to `stream` too."""
        return self._log if stream is None else _Both(stream, self._log)

    def app(self, app: ASGIApp) -> ASGIApp:
        """The application, of whose requests and answers the first are put aside."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or len(self._exchanges) >= _MAX_BODIES or not TOLD.match(scope["path"]):
                await app(scope, receive, send)
                return
            self._exchanges.append(exchange := _Exchange(scope["path"]))

            async def receive_too() -> Message:
                message = await receive()
                _take(exchange.body, message)
                return message

            async def send_too(message: Message) -> None:
                _take(exchange.answer, message)
                await send(message)

            await app(scope, receive_too, send_too)

        return watched

    def canaries(self) -> list[str]:
        """What must be nowhere."""
        found = dict.fromkeys(self._secrets)
        for exchange in self._exchanges:
            said = _said_in(bytes(exchange.body))
            if exchange.path == "/v1/chat/completions":
                said = [*said, *_answered_in(bytes(exchange.answer))]
            for text in said:
                found.update(dict.fromkeys(_pieces(text)))
            if len(found) >= _MAX_CANARIES:
                break
        return [*found][:_MAX_CANARIES]

    def check(self) -> None:
        """Search; raises Leaked."""
        told = {
            "the log": self._log.getvalue().decode(errors="replace"),
            "spans": "\n".join(self._spans.told),
            "events": "\n".join(self._events.told),
            "metrics": "\n".join(self._measured),
            "a collector": "\n".join(map(str, _sent_to_collectors())),
        }
        canaries = self.canaries()
        leaks = [(where, each) for where, text in told.items() for each in canaries if each in text]
        if leaks:
            raise Leaked("; ".join(f"{each!r} is in {where}" for where, each in leaks[:5]))


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
            stream.flush()
