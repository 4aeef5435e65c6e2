"""What a place of documents can be asked."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

SUFFIXES = frozenset(
    {".md", ".markdown", ".mdown", ".mkd", ".txt", ".text", ".html", ".htm", ".xhtml", ".pdf", ".docx", ".docm"}
    | {".pptx", ".pptm", ".ppsx", ".xlsx", ".xlsm", ".csv", ".tsv", ".epub", ".eml"}
)
"""What is picked of all that is in a place.

Files of JSON Lines are more often data than documents: they are read where they are named one by one.
"""

MOST_FILE_BYTES = 500_000_000
"""Largest file that is read into this process; the service's own limit is lower unless it was raised."""


class SourceFailure(Exception):
    """The place cannot be read; the message is for the person at the terminal."""


class FileFailure(SourceFailure):
    """One file cannot be read; others may be."""


@dataclass(frozen=True, slots=True)
class Content:
    """A file's bytes, and what the place calls them, where it has a name for them."""

    data: bytes
    etag: str = ""
    media_type: str = ""
    """What they are, where their name does not say it."""


class Source(Protocol):
    """A place of documents, each by its name within it."""

    @property
    def name(self) -> str:
        """What the place goes by where nobody says."""
        ...

    def names(self) -> list[str]:
        """The documents that are there, in order; raises SourceFailure."""
        ...

    def manifest(self) -> list[dict[str, str]]:
        """The same, each with its `version` or `etag`; raises SourceFailure."""
        ...

    def expect(self, names: Collection[str]) -> None:
        """Make ready what is about to be read; raises SourceFailure."""
        ...

    def read(self, name: str) -> Content:
        """A document's bytes, from any thread; raises FileFailure."""
        ...


def is_document(name: str) -> bool:
    """Whether a file is picked, by its name."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES
