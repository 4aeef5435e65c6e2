"""A Redis server for tests, on a free port of loopback; where none is installed, the test that wants it is skipped."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

PROGRAM = shutil.which("redis-server")


class Redis:
    """A server that keeps nothing; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if PROGRAM is None:
            pytest.skip("redis-server is not installed")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, always on the same port, and return when it takes connections."""
        assert PROGRAM is not None
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        options = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self.process = subprocess.Popen([PROGRAM, *options], cwd=self._folder, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.01)

    def stop(self) -> None:
        """End it at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
