"""The keys as they were known last, in a file: for a start while the database is down.

It holds what the database's table does: hashes of secrets, and no secret.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from app.access.store import StoredKey

log = logging.getLogger(__name__)


class Memory:
    """The file at `path`; its methods wait for the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, keys: Sequence[StoredKey]) -> None:
        """Write the keys, whole or not at all; a disk that refuses is told and no more."""
        draft = self._path.with_name(f"{self._path.name}.new")
        try:
            draft.write_bytes(msgspec.json.encode(keys))
            draft.replace(self._path)
        except OSError as error:
            log.warning("The API keys cannot be kept for a start without the database: %s", error)

    def recall(self) -> list[StoredKey]:
        """Read what was kept last; nothing where there is none, or it cannot be read."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[StoredKey])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError) as error:
            log.error("The API keys known last cannot be read from %s: %s", self._path, error)  # noqa: TRY400
            return []
