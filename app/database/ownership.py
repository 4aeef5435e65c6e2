"""Who may own a data directory: one process, until it ends, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataDirectoryUnusable(OSError):
    """The data directory cannot be made; the message says which setting names it."""


class DataDirectoryBusy(Exception):
    """Another process owns the data directory."""


def make_directory(directory: Path) -> None:
    """Make the data directory if it is absent.

    Raises:
        DataDirectoryUnusable: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        why = "there is a file of that name, or above it" if is_file else error.strerror
        raise DataDirectoryUnusable(
            f"the data directory {str(directory)!r} cannot be made: {why}. "
            "Name another by HALLMARK_DATA_DIR or --data-dir."
        ) from error


@contextmanager
def own_directory(directory: Path) -> Iterator[Path]:
    """Own `directory`, made if absent, until the block ends or the process dies, however it dies.

    Raises:
        DataDirectoryBusy: another process owns it.
        DataDirectoryUnusable: it cannot be made.
    """
    make_directory(directory)
    with exclusive(directory / "hallmark.lock"):
        yield directory


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Hold the lock that `lock_file` stands for; raises DataDirectoryBusy at once if somebody else does."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
            raise DataDirectoryBusy(
                f"{str(lock_file.parent)!r} belongs to a running Hallmark (process {owner}). "
                "Stop that process, or give this one a data directory of its own."
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # Closing releases the lock. The file stays: removing it would let two processes lock two files of one name.
        os.close(descriptor)
