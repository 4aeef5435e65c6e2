"""An address becomes a place of documents."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import InvalidRequest
from app.sources.folder import Folder
from app.sources.repository import Repository
from app.sources.source import Source, SourceFailure


@contextmanager
def open_source(address: str) -> Iterator[Source]:
    """Open a folder or file, `s3://bucket/prefix`, or `git+https://host/repository.git@ref#folder`.

    Raises:
        InvalidRequest: The address names no place.
        SourceFailure: The place cannot be read.
    """
    if address.startswith("git+"):
        with Repository(address) as repository:
            yield repository
    elif address.startswith("s3://"):
        try:
            from app.sources.bucket import Bucket  # An extra, which most do without.
        except ImportError as error:
            raise SourceFailure("Buckets need the extra `s3`: pip install 'hallmark[s3]'.") from error
        yield Bucket(address)
    elif not Path(address).exists():
        raise InvalidRequest(f"There is no file or folder {address!r}.")
    else:
        yield Folder(Path(address))
