"""Items whose bytes are elsewhere: what waits in the spool for them is a URL, followed when their turn comes."""

import asyncio
from dataclasses import replace
from typing import Final

from retrieval.errors import UrlRefused
from retrieval.fetching import Fetcher
from retrieval.ingesting import version_of
from retrieval.jobs import ledger, origins
from retrieval.jobs.nouns import Item
from retrieval.retriever import Retriever

LINK: Final = "message/external-body; access-type=url"
"""The media type of an upload that is a URL, as RFC 2017 has it for mail whose body is elsewhere."""


class Links:
    """Follows links by a fetcher; without one there are none."""

    def __init__(self, retriever: Retriever, fetcher: Fetcher | None) -> None:
        self._retriever = retriever
        self._file = retriever.store.file
        self._fetcher = fetcher

    def check(self, url: bytes) -> None:
        """Raise UrlRefused for what can be refused by its looks."""
        self._following().check(url.decode())

    async def follow(self, item: Item, url: bytes) -> tuple[Item, bytes] | None:
        """The item with what its link leads to, and the bytes; None where they are those of its document.

        Raises:
            UrlRefused, UrlUnreachable, UnsupportedType, LimitExceeded: As `Fetcher.fetch` says.
        """
        address, fetcher = url.decode(), self._following()
        validator = await self._file.read(origins.validator, item, address, self._retriever.index_version)
        fetched = await fetcher.fetch(address, validator=validator)
        if fetched is None:
            return None
        content = fetched.content
        version = await asyncio.to_thread(version_of, content)
        item = replace(item, version=version, size_bytes=len(content), media_type=fetched.media_type)
        await self._file.write(ledger.followed, item, address, fetched.validator)
        return item, content

    def _following(self) -> Fetcher:
        if self._fetcher is None:
            raise UrlRefused("`url`: this service fetches nothing (setting `ingestion.fetch_urls`); upload the file")
        return self._fetcher
