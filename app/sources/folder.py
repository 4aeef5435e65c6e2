"""A folder of this machine, or a single file, as a place of documents."""

import hashlib
from collections.abc import Collection
from pathlib import Path

from app.sources.source import Content, FileFailure, is_document

_READ_BYTES = 1_000_000


class Folder:
    """A folder's documents by their paths within it; a file is picked whatever its suffix."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self._path.resolve().name

    def names(self) -> list[str]:
        """The documents below the folder, but for hidden ones: `.git`, `.venv` and trash hold what nobody means."""
        if self._path.is_file():
            return [self._path.name]
        found = (path for path in self._path.rglob("*") if path.is_file() and is_document(path.name))
        within = (path.relative_to(self._path) for path in sorted(found))
        return [path.as_posix() for path in within if not any(part.startswith(".") for part in path.parts)]

    def manifest(self) -> list[dict[str, str]]:
        """The documents with their SHA-256."""
        return [{"name": name, "version": self._digest(name)} for name in self.names()]

    def expect(self, names: Collection[str]) -> None:
        """Nothing has to be made ready."""

    def read(self, name: str) -> Content:
        """A document's bytes."""
        try:
            return Content(self._file(name).read_bytes())
        except OSError as error:
            raise FileFailure(f"It cannot be read: {error.strerror}.") from error

    def _file(self, name: str) -> Path:
        return self._path if self._path.is_file() else self._path / name

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._file(name).open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
        return digest.hexdigest()
