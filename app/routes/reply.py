"""What goes over the wire of one answer: its request's body read, its response sent."""

from collections.abc import Awaitable, Callable, Sequence

import msgspec
from starlette.types import Receive, Send

from app.errors import InvalidRequest, PayloadTooLarge, ServiceError
from app.routes.completions import broken_off
from app.routes.forms import Headers
from app.routes.front import respond


class Reply(msgspec.Struct, eq=False):
    """What has been sent of a response."""

    _send: Send
    status: int | None = None
    also: Sequence[tuple[bytes, bytes]] = ()
    """Headers that the response has in any case."""
    broken_off: Callable[[ServiceError, str], bytes] = broken_off
    """Makes the last events of a stream that an error ends."""
    _done: bool = False

    def start(self, headers: list[tuple[bytes, bytes]]) -> Awaitable[None]:
        """Send the head; it and the parts are no coroutines of their own, of which a stream would make many."""
        self.status = 200
        return self._send({"type": "http.response.start", "status": 200, "headers": [*headers, *self.also]})

    def send(self, body: bytes, *, more: bool = True) -> Awaitable[None]:
        """Send a part of the body."""
        self._done = not more
        return self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def whole(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Send head and body."""
        await self.start([*headers, (b"content-length", b"%d" % len(body))])
        await self.send(body, more=False)

    async def fail(self, error: ServiceError, request_id: str) -> None:
        """Send an error: as the response, or, once that has begun, as the end of the stream."""
        if self.status is None:
            self.status = error.status
            await respond(self._send, error, request_id, also=self.also)
        elif not self._done:
            await self.send(self.broken_off(error, request_id), more=False)


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """Read a request's body.

    Raises:
        PayloadTooLarge: it has more than `max_bytes`, by its own word or in fact.
        InvalidRequest: the client left while sending it.
    """
    length = headers.get(b"content-length")
    if length is not None and length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("The client left before its request was read.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body"):
            return b"".join(parts)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The body may have {max_bytes} bytes (setting `limits.max_body_bytes`). Send documents to `/v1/documents`."
    )
