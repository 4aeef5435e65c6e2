"""A Redis server for tests, on a free port of loopback; where none is installed, the test that wants it is skipped."""

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
        """Start it, on the port that it had before, and return when it takes connections."""
        assert PROGRAM is not None
        deadline, port = time.monotonic() + 20, self.port
        while not (self._is_running and self._takes_connections()):
            assert time.monotonic() < deadline, "redis-server does not start"
            if not self._is_running:  # At first, or somebody else was faster to take the port.
                self.port = port or _free_port()
                options = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
                self.process = subprocess.Popen([PROGRAM, *options], cwd=self._folder, stdout=subprocess.DEVNULL)
            time.sleep(0.01)

    @property
    def _is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _takes_connections(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """End it at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
