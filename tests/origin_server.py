"""A web site on loopback that tests fetch from: says what it is told to, and remembers what it was asked."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Page:
    """What is at a path."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stated_length: int | None = None
    """A Content-Length other than the body's."""
    stays_silent: bool = False
    """Whether the connection is kept open after what was sent."""


@dataclass
class Origin:
    """The site: its address, its pages, and each request's head."""

    port: int = 0
    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def at(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(head)
            if stated := re.search(r"(?i)^content-length: (\d+)", head, re.MULTILINE):
                await reader.readexactly(int(stated[1]))
            page = self.pages.get(head.split()[1], Page(status=404))
            etag = page.headers.get("ETag")
            if etag and f"If-None-Match: {etag}\r\n" in head:
                page = Page(status=304)
            length = len(page.body) if page.stated_length is None else page.stated_length
            lines = [f"HTTP/1.1 {page.status} So", f"Content-Length: {length}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in page.headers.items()]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + page.body)
            await writer.drain()
            if page.stays_silent:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The client left, which is its right.
        finally:
            writer.close()


@asynccontextmanager
async def origin_server(*, tls: ssl.SSLContext | None = None) -> AsyncIterator[Origin]:
    origin = Origin()
    server = await asyncio.start_server(origin._answer, "127.0.0.1", 0, ssl=tls)
    origin.port = server.sockets[0].getsockname()[1]
    async with server:
        yield origin
