"""The engine's process: its environment, its parent, its signals and its port.

Main rule: the port is bound only when the first request can be answered, as TGI does; until then the progress is
on stderr. torch is imported after the environment that it reads once, at import, has been set.
"""

import logging
import os
import socket
import sys
import threading
import time

import uvicorn

from app.engines.local import EngineSettings
from app.engines.local.weights import WeightsUnavailable, find_weights, is_hub_id
from retrieval.children import usable_cores

__all__ = ["EngineSettings", "serve", "thread_environment"]

log = logging.getLogger(__name__)

PARENT_CHECK_SECONDS = 0.5
GRACEFUL_SHUTDOWN_SECONDS = 5
ABANDONED_EXIT_STATUS = 3


def serve(settings: EngineSettings) -> None:
    """Load the model and serve it until SIGTERM, SIGINT or the parent's death.

    Raises:
        WeightsUnavailable: the model or an adapter of the settings cannot be served; the message says what to do.
    """
    if settings.parent_pid is not None:
        threading.Thread(target=_end_with_parent, args=(settings.parent_pid,), name="parent", daemon=True).start()
    threads = settings.threads or max(1, usable_cores() - 1)
    _set_environment(thread_environment(threads, offline=not is_hub_id(settings.model)))
    weights = find_weights(settings.model, settings.cache_dir)

    import torch

    from app.engines.local.model import load
    from app.engines.local.protocol import Fault
    from app.engines.local.reader import Reader
    from app.engines.local.service import EngineService

    torch.set_num_threads(threads)
    base = load(weights, settings.dtype)
    try:
        service = EngineService(base, settings, Reader.of(base))
    except Fault as fault:
        raise WeightsUnavailable(f"--adapter: {fault.message}") from fault
    config = uvicorn.Config(
        service.app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
    )
    _AnnouncingServer(config).run()


def thread_environment(threads: int, *, offline: bool) -> dict[str, str]:
    """Return the variables that torch's thread pool and the hub client read at import.

    Idle OpenMP threads spin by default: on a busy machine that costs a factor of ten.
    """
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return variables | ({"HF_HUB_OFFLINE": "1"} if offline else {})


def _set_environment(variables: dict[str, str]) -> None:
    if "torch" in sys.modules:
        log.warning("torch was imported before its environment was set: expect it to be slow on a busy machine")
    os.environ.update(variables)  # noqa: TID251 - not configuration read but handed to libraries, which offer no other way.


def _end_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_CHECK_SECONDS)
    log.warning("the parent process %d is gone: ending", parent_pid)
    os._exit(ABANDONED_EXIT_STATUS)  # Nobody is left to be answered, and a thread in torch would delay a clean exit.


class _AnnouncingServer(uvicorn.Server):
    """Says when it takes requests, and on which port, which the system may have chosen."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            for bound in server.sockets:
                log.info("ready on http://%s:%d", *bound.getsockname()[:2])
