"""Log lines: valid JSON with the request's ids, written by a thread, bounded, and silent about content."""

import asyncio
import io
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider

from observability import logs
from tests.properties import examples

CANARY = "canary-7f3a"


class Stream(io.BytesIO):
    """Remembers the thread that wrote, and what was written before it was closed."""

    def __init__(self, tty: bool = False) -> None:
        super().__init__()
        self.tty = tty
        self.threads: set[str] = set()

    def isatty(self) -> bool:
        return self.tty

    def write(self, data: Any, /) -> int:
        self.threads.add(threading.current_thread().name)
        return super().write(data)


class FullDisk(Stream):
    """A stream that can take nothing."""

    def write(self, data: Any, /) -> int:
        raise OSError(28, "No space left on device")


class Stuck(Stream):
    """A stream whose reader has stopped reading, until released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.released = threading.Event()

    def write(self, data: Any, /) -> int:
        self.entered.set()
        self.released.wait(5)
        return super().write(data)


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def log(stream: Stream) -> Iterator[logs.Log]:
    configured = logs.configure("INFO", "json", stream=stream)
    yield configured
    configured.close()


def lines(log: logs.Log, stream: Stream) -> list[dict[str, Any]]:
    log.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_line_of_json(log: logs.Log, stream: Stream) -> None:
    logging.getLogger("app.engine").warning('engine %s\nis "slow" é', "a", extra={"engine": "a", "seconds": 1.5})
    (line,) = lines(log, stream)
    assert line["level"] == "WARNING"
    assert line["logger"] == "app.engine"
    assert line["message"] == 'engine a\nis "slow" é'
    assert (line["engine"], line["seconds"]) == ("a", 1.5)
    assert line["time"].endswith("Z")
    assert len(line["time"]) == len("2026-11-23T22:01:03.123Z")


async def test_lines_of_a_request_carry_its_ids_and_no_other_request_s(log: logs.Log, stream: Stream) -> None:
    async def request(n: int) -> None:
        logs.request_ids.set(logs.RequestIds(f"{n:032x}", f"{n:016x}", f"p-{n}"))
        await asyncio.sleep(0)
        logging.getLogger("app").info("working")

    await asyncio.gather(*(asyncio.create_task(request(n)) for n in (1, 2)))
    logging.getLogger("app").info("outside")
    first, second, outside = lines(log, stream)
    assert (first["trace_id"], first["span_id"], first["prediction_id"]) == (f"{1:032x}", f"{1:016x}", "p-1")
    assert second["prediction_id"] == "p-2"
    assert not {"trace_id", "span_id", "prediction_id"} & outside.keys()


def test_lines_inside_a_span_of_fastapi_carry_its_ids(log: logs.Log, stream: Stream) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("fastapi")
    with tracer.start_as_current_span("GET /v1/models") as span:
        logging.getLogger("app").info("working")
    (line,) = lines(log, stream)
    assert line["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert line["span_id"] == f"{span.get_span_context().span_id:016x}"


def test_lines_are_written_by_the_writer_thread_and_in_order(log: logs.Log, stream: Stream) -> None:
    for n in range(500):
        if n % 2:
            logging.getLogger("app").info("n", extra={"status": n})
        else:
            log.access("POST", "/v1/search", n, 0.1)
    assert [line["status"] for line in lines(log, stream)] == list(range(500))
    assert stream.threads == {"log-writer"}


def test_the_access_line_tells_the_request_without_its_content(log: logs.Log, stream: Stream) -> None:
    log.access(
        "POST",
        "/v1/chat/completions",
        200,
        0.0123456,
        trace_id="a" * 32,
        prediction_id="p-1",
        release="hallmark@3",
        tenant="acme",
        outcome="finished",
        prompt_tokens=11,
        completion_tokens=5,
    )
    (line,) = lines(log, stream)
    assert line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "hallmark.access",
        "message": "request",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "duration_ms": 12.346,
        "trace_id": "a" * 32,
        "prediction_id": "p-1",
        "release": "hallmark@3",
        "tenant": "acme",
        "outcome": "finished",
        "prompt_tokens": 11,
        "completion_tokens": 5,
    }


@examples(50)
@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_the_access_line_is_json_whatever_the_names_are(method: str, tenant: str, release: str) -> None:
    stream = Stream()
    log = logs.configure("INFO", "json", stream=stream)
    log.access(method, "/v1/{x}", 200, 0.1, tenant=tenant, release=release)
    (line,) = lines(log, stream)
    assert (line["method"], line["tenant"], line["release"]) == (method, tenant, release)


@examples(50)
@given(st.text(max_size=30), st.dictionaries(st.text(min_size=1, max_size=8), st.text() | st.floats() | st.binary()))
def test_a_record_is_one_line_whatever_it_holds(message: str, extra: dict[str, object]) -> None:
    stream = Stream()
    log = logs.configure("INFO", "json", stream=stream)
    logging.getLogger("app").info(message, extra={f"x_{key}": value for key, value in extra.items()})
    (line,) = lines(log, stream)
    assert line["logger"] == "app"


def test_a_line_beyond_the_queue_is_dropped_and_counted_and_the_caller_goes_on() -> None:
    stream = Stuck()
    log = logs.configure("INFO", "json", stream=stream, max_lines=10)
    log.access("GET", "/first", 200, 0.1)
    assert stream.entered.wait(5)
    for _ in range(100):
        log.access("GET", "/next", 200, 0.1)
    assert log.dropped == 90
    stream.released.set()
    assert len(lines(log, stream)) == 11


def test_a_stream_that_cannot_be_written_is_counted_and_survived() -> None:
    log = logs.configure("INFO", "json", stream=FullDisk())
    log.access("GET", "/", 200, 0.1)
    log.close()
    assert log.dropped == 1


def test_closing_waits_for_a_stuck_stream_no_longer_than_the_deadline() -> None:
    stream = Stuck()
    log = logs.configure("INFO", "json", stream=stream)
    log.access("GET", "/", 200, 0.1)
    assert stream.entered.wait(5)
    log.close(deadline_seconds=0.05)
    stream.released.set()


def test_closing_ends_the_thread_that_writes_also_while_it_gathers(stream: Stream) -> None:
    before = set(threading.enumerate())
    log = logs.configure("INFO", "json", stream=stream)
    log.access("GET", "/", 200, 0.1)
    (writer,) = set(threading.enumerate()) - before
    log.close(deadline_seconds=60.0)
    assert not writer.is_alive()
    assert stream.getvalue().count(b"\n") == 1


def test_closing_gives_logging_back_as_it_was(stream: Stream) -> None:
    before = logging.root.level, logging.root.handlers[:]
    log = logs.configure("DEBUG", "json", stream=stream)
    assert logging.root.level == logging.DEBUG
    log.close()
    log.close()
    assert (logging.root.level, logging.root.handlers) == before


def test_the_level_is_respected(log: logs.Log, stream: Stream) -> None:
    logging.getLogger("app").debug("quiet")
    logging.getLogger("httpx").info("HTTP Request: GET http://engine/health")
    assert lines(log, stream) == []


def test_uvicorn_s_errors_are_ours_and_its_access_lines_are_not(stream: Stream) -> None:
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).addHandler(logging.StreamHandler())
    log = logs.configure("INFO", "json", stream=stream)
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.access").info('"GET /v1/documents?name=%s"', CANARY)
    (line,) = lines(log, stream)
    assert (line["logger"], line["message"]) == ("uvicorn.error", "Started server process")


def test_warnings_become_log_lines(log: logs.Log, stream: Stream) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old way", UserWarning, stacklevel=1)
    (line,) = lines(log, stream)
    assert line["logger"] == "py.warnings"


def test_people_get_text_on_a_terminal_and_machines_json_elsewhere() -> None:
    shown = {}
    for tty in (True, False):
        stream = Stream(tty)
        log = logs.configure("INFO", "auto", stream=stream)
        context = copy_context()
        context.run(logs.request_ids.set, logs.RequestIds("a" * 32, "", "p-1"))
        context.run(logging.getLogger("app").info, "ready", extra={"port": 80})
        log.access("POST", "/v1/search", 200, 0.0123)
        log.access("POST", "/v1/chat/completions", 200, 0.5, prediction_id="p-1", release="r@1", outcome="finished")
        log.close()
        shown[tty] = stream.getvalue().decode()
    assert "INFO    app: ready port=80 prediction_id=p-1\n" in shown[True]
    assert "POST /v1/search 200 12.3 ms\n" in shown[True]
    assert "POST /v1/chat/completions 200 500.0 ms finished r@1 0+0 tokens p-1\n" in shown[True]
    assert all(json.loads(line) for line in shown[False].splitlines())


def broken(error: Exception, cause: Exception | None) -> None:
    raise error from cause


def fail(error: Exception, cause: Exception | None = None) -> None:
    try:
        broken(error, cause)
    except Exception:
        logging.getLogger("app").exception("request failed")


def test_an_exception_is_told_by_type_and_stack_without_its_message(log: logs.Log, stream: Stream) -> None:
    fail(ValueError(CANARY), KeyError(CANARY))
    (line,) = lines(log, stream)
    assert CANARY not in json.dumps(line)
    told = line["error"].splitlines()
    assert told[0] == "ValueError"
    assert " in fail" in told[1]
    assert " in broken" in told[2]
    assert told[3:] == ["caused by", "KeyError"]


def test_the_operating_system_s_own_words_are_kept(log: logs.Log, stream: Stream) -> None:
    fail(RuntimeError(CANARY), OSError(28, "No space left on device"))
    (line,) = lines(log, stream)
    assert CANARY not in json.dumps(line)
    assert "No space left on device" in line["error"]


def test_an_exception_that_causes_itself_is_told_once(log: logs.Log, stream: Stream) -> None:
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    logging.getLogger("app").error("loop", exc_info=first)
    (line,) = lines(log, stream)
    assert line["error"].splitlines() == ["ValueError", "caused by", "KeyError"]


@pytest.mark.parametrize("key", ["prompt", "content", "messages", "query", "text", "quote", "answer", "question"])
def test_content_passed_by_mistake_is_not_written(key: str, log: logs.Log, stream: Stream) -> None:
    logging.getLogger("app").info("searched", extra={key: CANARY})
    (line,) = lines(log, stream)
    assert line[key] == "[content off]"


def test_asyncio_s_repr_of_a_failed_task_is_cut(log: logs.Log, stream: Stream) -> None:
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task exception=%s>", CANARY)
    (line,) = lines(log, stream)
    assert line["message"] == "Task exception was never retrieved"


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_a_log_call_that_is_wrong_neither_fails_its_caller_nor_stops_the_writer(stream: Stream) -> None:
    log = logs.configure("INFO", "json", stream=stream)  # Here and not in a fixture: pytest's own handler would raise.
    logger = logging.getLogger("app")
    logger.info("%d engines", "two")
    logger.info("broken", extra={"thing": Unprintable()})
    logger.info("after")
    assert [line["message"] for line in lines(log, stream)] == ["%d engines", "broken", "after"]


def test_a_handler_beside_ours_sees_the_record_untouched(log: logs.Log, stream: Stream) -> None:
    seen: list[logging.LogRecord] = []

    class Beside(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    logging.root.addHandler(Beside())
    logging.getLogger("app").info("n %d", 1)
    assert seen[0].msg == "n %d"
    assert seen[0].args == (1,)
