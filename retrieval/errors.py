"""What can go wrong in retrieval; the app turns each into its own error.

RetrievalError
├── UnreadableDocument        the file cannot be turned into text; the message says why and what would help
│   ├── UnsupportedType       no parser for this media type
│   └── LimitExceeded         too large, too many pages, too slow or too hungry
├── DocumentNotFound          no such document or passage for this tenant
├── DocumentChanged           the document exists, but not in the version asked for
├── InvalidFilter             the metadata filter is not of the supported form
├── IndexMismatch             the collection was built with another embedder or schema
└── IndexUnavailable          the index or the embedder does not answer
    └── IndexOutOfRoom        the index's disk is too full for it to work
"""

from typing import Literal

Limit = Literal["bytes", "unpacked", "pages", "characters", "seconds", "memory", "depth"]


class RetrievalError(Exception):
    """The root."""


class UnreadableDocument(RetrievalError):
    """The file cannot be turned into text."""


class UnsupportedType(UnreadableDocument):
    """No parser reads this media type."""


class LimitExceeded(UnreadableDocument):
    """The file costs more than a document may; `limit` is which of the limits it is over."""

    def __init__(self, message: str, limit: Limit) -> None:
        super().__init__(message)
        self.limit = limit


class DocumentNotFound(RetrievalError):
    """No such document or passage for this tenant."""


class DocumentChanged(RetrievalError):
    """The document is there, but not in the version asked for."""


class InvalidFilter(RetrievalError):
    """The metadata filter is not of the supported form."""


class IndexMismatch(RetrievalError):
    """The collection was built with another embedder or schema than the settings name."""


class IndexUnavailable(RetrievalError):
    """The index or the embedder does not answer."""


class IndexOutOfRoom(IndexUnavailable):
    """The index's disk is too full for it to work; it does again when there is room."""
