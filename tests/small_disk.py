"""A disk of a few megabytes that can be filled to the last byte, as a file system of its own in memory.

with SmallDisk(tmp_path / "disk", megabytes=32) as disk:
    disk.fill()         # from here on every write fails with ENOSPC
    disk.free()
"""

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

import pytest

_CHUNK = bytes(1 << 16)


class SmallDisk:
    """Mounted at `folder` for as long as its context is open; a test that may not mount is skipped."""

    def __init__(self, folder: Path, *, megabytes: int) -> None:
        self.folder = folder
        self._megabytes = megabytes
        self._ballast = folder / "ballast"

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            pytest.skip("only root may mount a small disk to be filled")
        self.folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._megabytes}m", "hallmark-test", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        # Lazily: a process that is just ending may still have a file open.
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    @property
    def free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, *, but_bytes: int = 0) -> None:
        """Take all room there is, or leave so much."""
        with self._ballast.open("ab", buffering=0) as ballast:
            try:
                while (room := self.free_bytes - but_bytes) > 0:
                    ballast.write(_CHUNK[:room])
            except OSError:
                return  # Somebody else took the rest of it.

    def free(self) -> None:
        """Give back what `fill` took."""
        self._ballast.unlink()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read a SQLite database for as long as the block lasts: what is written to it meanwhile stays in its journal."""
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
        yield
