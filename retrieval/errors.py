"""What can go wrong in retrieval; the app turns each into its own error.

RetrievalError
├── UnreadableDocument        the file cannot be turned into text; the message says why and what would help
│   ├── UnsupportedType       no parser for this media type
│   ├── UrlUnreachable        what is at the URL cannot be had
│   └── LimitExceeded         too large, too many pages, too slow or too hungry
├── UrlRefused                the URL is not one that may be fetched
├── DocumentNotFound          no such document or passage for this tenant
├── DocumentChanged           the document exists, but not in the version asked for
├── DocumentOwned             the document belongs to another source, or to groups of others
├── JobNotFound               no such job for this tenant
├── JobEnded                  the job takes nothing any more
├── NotExpected               the job's manifest does not name this document
├── TooManyDeletions          a synchronisation would delete more than it may
├── QueueFull                 too much waits to be ingested
├── EmbeddingFailed           the process that embeds passages ended over them, twice
├── InvalidFilter             the metadata filter is not of the supported form
├── IndexVersionNotFound      no such index version
├── IndexVersionState         the index version is not in a state in which this can be done
├── IndexMismatch             the collection was built with another embedder or schema
└── IndexUnavailable          the index or the embedder does not answer
    └── IndexOutOfRoom        the index's disk is too full for it to work
"""

from typing import Literal

Limit = Literal["bytes", "unpacked", "pages", "characters", "seconds", "memory", "depth", "passages"]


class RetrievalError(Exception):
    """The root."""


class UnreadableDocument(RetrievalError):
    """The file cannot be turned into text."""


class UnsupportedType(UnreadableDocument):
    """No parser reads this media type."""


class UrlUnreachable(UnreadableDocument):
    """What is at the URL cannot be had: no answer, another answer than a file, or too slow a one."""


class LimitExceeded(UnreadableDocument):
    """The file costs more than a document may; `limit` is which of the limits it is over."""

    def __init__(self, message: str, limit: Limit) -> None:
        super().__init__(message)
        self.limit = limit


class UrlRefused(RetrievalError):
    """The URL is not one that may be fetched: its form, where it leads, or because none may be."""


class DocumentNotFound(RetrievalError):
    """No such document or passage for this tenant."""


class DocumentChanged(RetrievalError):
    """The document is there, but not in the version asked for."""


class DocumentOwned(RetrievalError):
    """The document belongs to another source, or is for groups that whoever writes is in none of."""


class JobNotFound(RetrievalError):
    """No such job for this tenant."""


class JobEnded(RetrievalError):
    """The job takes nothing any more."""


class NotExpected(RetrievalError):
    """The job's manifest does not name this document, or it has come already."""


class TooManyDeletions(RetrievalError):
    """A synchronisation would delete more documents than it may."""


class QueueFull(RetrievalError):
    """Too much waits to be ingested; `retry_after_seconds` is when there should be room."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EmbeddingFailed(RetrievalError):
    """The process that embeds passages ended over these, and again when it was started anew."""


class InvalidFilter(RetrievalError):
    """The metadata filter is not of the supported form."""


class IndexVersionNotFound(RetrievalError):
    """No such index version."""


class IndexVersionState(RetrievalError):
    """The index version is not in a state in which this can be done; the message says what would help."""


class IndexMismatch(RetrievalError):
    """The collection was built with another embedder or schema than the settings name."""


class IndexUnavailable(RetrievalError):
    """The index or the embedder does not answer."""


class IndexOutOfRoom(IndexUnavailable):
    """The index's disk is too full for it to work; it does again when there is room."""
