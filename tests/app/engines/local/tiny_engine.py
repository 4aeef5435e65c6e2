"""A live embedded engine on loopback, and what its tests ask of it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from app.engines.local import EngineSettings
from app.engines.local.model import LoadedModel
from app.engines.local.reader import Reader
from app.engines.local.service import EngineService


@contextmanager
def running_service(base: LoadedModel, *, reader: Reader | None = None, **settings: Any) -> Iterator[httpx.Client]:
    """Serve on a loopback port of the system's choice; yield a client for it."""
    service = EngineService(base, EngineSettings(**settings), reader)
    server = uvicorn.Server(
        uvicorn.Config(service.app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Poll until the condition holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.rsplit(" ", 1)[0] == name), 0.0)


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 12, "temperature": 0, **fields}


def text_of(client: httpx.Client, **fields: Any) -> str:
    response = client.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])
