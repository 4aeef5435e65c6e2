"""Where uploads lie from their acceptance until they are ingested.

The main rule: a name is given only to a file that is whole and on the disk.
"""

import asyncio
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from uuid import uuid4

from retrieval.errors import IndexOutOfRoom, IndexUnavailable


class Spool:
    """A folder of uploads; `reserve_bytes` of its disk are left to others."""

    def __init__(self, directory: Path, *, reserve_bytes: int = 0) -> None:
        self._directory = directory
        self._reserve_bytes = reserve_bytes

    async def put(self, content: bytes) -> str:
        """Keep bytes, so that they outlive the process and the machine's next outage; gives their name.

        Raises:
            IndexOutOfRoom: The disk has no room for them.
            IndexUnavailable: They cannot be written.
        """
        return await asyncio.to_thread(self._put, content)

    async def get(self, name: str) -> bytes:
        """The bytes of a name; raises IndexUnavailable where they cannot be read."""
        try:
            return await asyncio.to_thread((self._directory / name).read_bytes)
        except OSError as error:
            raise IndexUnavailable(f"The spooled upload {name} cannot be read: {error.strerror}.") from error

    async def remove(self, names: Collection[str]) -> None:
        """Forget these; what is gone already is passed over."""
        if names:
            await asyncio.to_thread(self._remove, tuple(names))

    async def sweep(self, kept: Collection[str]) -> None:
        """Make the folder, and remove what nobody knows of: an upload that was cut off, or one that was ingested."""
        await asyncio.to_thread(self._sweep, frozenset(kept))

    def _put(self, content: bytes) -> str:
        try:
            free = shutil.disk_usage(self._directory).free
            if free - len(content) < self._reserve_bytes:
                raise IndexOutOfRoom(f"The disk under {self._directory} has {free} bytes free: too few for an upload.")
            name = uuid4().hex
            draft = self._directory / f"{name}.partial"
            try:
                with draft.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                draft.rename(self._directory / name)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            self._sync_folder()
        except OSError as error:
            raise IndexUnavailable(f"The upload cannot be kept in {self._directory}: {error.strerror}.") from error
        return name

    def _sync_folder(self) -> None:
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove(self, names: Collection[str]) -> None:
        for name in names:
            (self._directory / name).unlink(missing_ok=True)

    def _sweep(self, kept: Collection[str]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self._directory.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
