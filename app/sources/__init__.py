"""Where documents are kept that a command brings into a service: a folder, a bucket, a Git repository.

The main rule: they are read here, by who runs the command and with what that person may read; the service never sees a
credential, nor goes anywhere by itself.
"""

from app.sources.opening import open_source
from app.sources.source import SUFFIXES, Content, FileFailure, Source, SourceFailure

__all__ = ["SUFFIXES", "Content", "FileFailure", "Source", "SourceFailure", "open_source"]
