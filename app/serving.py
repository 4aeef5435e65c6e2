"""Running the service under uvicorn: open its parts, listen, stop cleanly."""

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
import uvloop
from starlette.types import ASGIApp

from app.connections import ClientConnection
from app.database import CONNECT_ERRORS, DataDirectoryBusy
from app.errors import ServiceError
from app.main import open_service
from app.privacy_wiring import BadPrivacy
from app.releases import BadRelease
from app.settings import Settings
from observability import logs
from observability.exporting import ExporterMisconfigured
from retrieval.errors import RetrievalError

GRACE_SECONDS = 20
"""How long answers in flight may go on after a stop was asked for."""

KEEP_ALIVE_SECONDS = 75
"""How long a connection may lie idle: longer than load balancers and clients let theirs, so that none of them sends a
request into one that closes at that moment."""

GC_THRESHOLD = 10_000
"""Objects made before the youngest are collected: a hundred requests' worth, whose cycles are few."""


class StartFailure(Exception):
    """The service cannot start; the message says why and what would help."""


class _Server(uvicorn.Server):
    """uvicorn, but a signal stops it and no more: uvicorn itself raises it again and so ends the process at once."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def run(settings: Settings) -> None:
    """Serve until stopped, on uvloop: it halves what a request costs the event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_until_stopped(settings))


async def serve_until_stopped(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        StartFailure: the port is taken, the data directory is in use, or the collection does not fit the settings.
    """
    log = logs.configure(settings.log_level.upper(), settings.log_format)
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
    try:
        listener = _listen(settings.host, settings.port)
        try:
            async with open_service(settings, log) as app:
                await serve(app, listener)
        finally:
            listener.close()
    except (
        BadPrivacy,
        BadRelease,
        DataDirectoryBusy,
        ServiceError,
        RetrievalError,
        ExporterMisconfigured,
        *CONNECT_ERRORS,
    ) as error:
        raise StartFailure(str(error)) from error
    finally:
        await asyncio.to_thread(log.close)


def server_config(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves `app`, wherever it listens."""
    return uvicorn.Config(
        app,
        http=ClientConnection,
        interface="asgi3",  # What is no coroutine function uvicorn would take for an application of ASGI 2.
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # Citation links take `public_url`, and nothing else asks who the peer is.
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )


async def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Serve an opened service on a bound socket until SIGTERM or SIGINT."""
    listener.listen()  # From here on connections are taken, though not yet served.
    logging.getLogger(__name__).info("Serving on %s", _address(listener))
    keep_what_is_there()
    # The loop notes every asynchronous generator that begins, to close what is left of them at its end: a weak
    # reference and two calls for each of the three that a request has, and closes. One that is dropped is closed too.
    sys.set_asyncgen_hooks(firstiter=None)
    await _Server(server_config(app)).serve(sockets=[listener])


def keep_what_is_there() -> None:
    """Have no request pay for looking through what the start built."""
    # What the start built stays: walking all of torch in every full collection cost a request 7 % of its CPU.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything is opened, so that a taken port costs nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartFailure(f"cannot listen on {host}:{port}: {error.strerror}. Choose another with --port.") from error
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
