"""A bucket of S3, or of a store that speaks as S3 does, as a place of documents.

The main rule: an object's ETag tells whether it has changed, so that what did not is never downloaded. Credentials,
region and endpoint are those of the environment, as Amazon's own tools name them.
"""

from collections.abc import Collection
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from app.errors import InvalidRequest
from app.sources.source import MOST_FILE_BYTES, Content, FileFailure, SourceFailure, is_document

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_CLIENT: "ClientConfig" = {
    "timeout": "300s",
    "connect_timeout": "10s",
    # Only an endpoint that the environment names can be http://.
    "allow_http": True,
}
_RETRIES: "RetryConfig" = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
# Some of its errors are Python's own, such as FileNotFoundError.
_ERRORS = (BaseError, OSError)


class Bucket:
    """The objects below a prefix, by their keys within it."""

    def __init__(self, address: str) -> None:
        """Open `s3://bucket/prefix`; nothing is asked yet. Raises InvalidRequest for another form."""
        parts = urlsplit(address)
        self._address = address
        self._prefix = parts.path.strip("/")
        self._bucket = parts.netloc
        if not self._bucket or "@" in self._bucket or parts.query or parts.fragment:
            raise InvalidRequest(f"{address!r} is no bucket: write s3://bucket/prefix.")
        try:
            self._store = S3Store(
                self._bucket, prefix=self._prefix or None, client_options=_CLIENT, retry_config=_RETRIES
            )
        except _ERRORS as error:
            raise self._failure(error) from error
        self._sizes: dict[str, int] = {}

    @property
    def name(self) -> str:
        """The bucket, and the prefix in it."""
        return f"{self._bucket}/{self._prefix}".rstrip("/")

    def names(self) -> list[str]:
        """The documents below the prefix."""
        return [entry["name"] for entry in self.manifest()]

    def manifest(self) -> list[dict[str, str]]:
        """The documents with their ETags."""
        entries = []
        try:
            for page in obstore.list(self._store):
                for found in page:
                    if is_document(found["path"]):
                        self._sizes[found["path"]] = found["size"]
                        entries.append({"name": found["path"], "etag": _shown(found["e_tag"])})
        except _ERRORS as error:
            raise self._failure(error) from error
        return sorted(entries, key=lambda entry: entry["name"])

    def expect(self, names: Collection[str]) -> None:
        """Nothing has to be made ready."""

    def read(self, name: str) -> Content:
        """An object's bytes, and the ETag that it had when they were read."""
        if self._sizes.get(name, 0) > MOST_FILE_BYTES:
            raise FileFailure(f"It has more than {MOST_FILE_BYTES:,} bytes.")
        try:
            got = obstore.get(self._store, name)
            return Content(bytes(got.bytes()), _shown(got.meta["e_tag"]))
        except _ERRORS as error:
            raise FileFailure(f"It cannot be read: {_reason(error)}.") from error

    def _failure(self, error: Exception) -> SourceFailure:
        return SourceFailure(
            f"{self._address} cannot be read: {_reason(error)}. Give AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_REGION and, for another store than Amazon's, AWS_ENDPOINT_URL."
        )


def _shown(etag: str | None) -> str:
    return etag if etag and len(etag) <= 256 else ""


def _reason(error: Exception) -> str:
    """The first line of what the library says, which goes on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
