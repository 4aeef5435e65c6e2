"""A proxy on loopback that can fail in four ways, put between the service and something it depends on.

async with FaultyProxy("127.0.0.1:6333") as proxy:
    ...                             # the service is given proxy.port
    await proxy.become("hang")
    await proxy.become(None)        # well again
"""

import asyncio
import contextlib
from typing import Literal, Self

Fault = Literal["refuse", "hang", "slow", "corrupt"]

SLOW_SECONDS = 0.1
"""How much later than it came each piece goes on while the proxy is slow."""

_INTACT_BYTES = 16
_PIECE_BYTES = 65_536


class FaultyProxy:
    """Passes bytes to `target`, a `host:port` or the path of a Unix socket, and back.

    refuse: nobody listens, and connections there were are reset. hang: connections are taken, and nothing that comes
    goes on. slow: every piece goes on after `SLOW_SECONDS`. corrupt: of every piece of an answer all but its first
    bytes are turned into others.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self.fault: Fault | None = None
        self.port = 0
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._moving = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._moving.set()
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def become(self, fault: Fault | None) -> None:
        """Fail like this from now on, on connections there are too; None is well."""
        if self.fault == "refuse" != fault:
            await self._listen()
        if fault == "refuse" != self.fault:
            await self._close()
        self.fault = fault
        if fault == "hang":
            self._moving.clear()
        else:
            self._moving.set()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        links = list(self._links)
        for writers in self._links.values():
            for writer in writers:
                writer.transport.abort()
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        writers = self._links[task] = [writer]
        try:
            if "/" in self._target:
                upstream, to_upstream = await asyncio.open_unix_connection(self._target)
            else:
                host, _, port = self._target.rpartition(":")
                upstream, to_upstream = await asyncio.open_connection(host, int(port))
            writers.append(to_upstream)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, to_upstream, is_answer=False))
                pumps.create_task(self._pump(upstream, writer, is_answer=True))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            return  # What one side loses, the other is to lose too.
        finally:
            for each in writers:
                each.transport.abort()
            del self._links[task]

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_answer: bool) -> None:
        while piece := await source.read(_PIECE_BYTES):
            await self._moving.wait()
            if self.fault == "slow":
                await asyncio.sleep(SLOW_SECONDS)
            if self.fault == "corrupt" and is_answer:
                piece = corrupted(piece)
            sink.write(piece)
            await sink.drain()
        with contextlib.suppress(OSError):
            sink.write_eof()


def corrupted(piece: bytes) -> bytes:
    """Turn all but the first bytes into others."""
    return piece[:_INTACT_BYTES] + bytes(byte ^ 0x15 for byte in piece[_INTACT_BYTES:])
