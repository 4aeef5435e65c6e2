"""The forms in which questions come and answers go: what a route that answers leaves to each.

The main rule: a form reads and renders. Who may ask, what is answered, recorded and counted is the same for all.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from app.access import Caller
from app.calls import Conclusion
from app.chat import ChatRequest, CitationStyle, decode_chat_request
from app.errors import ServiceError
from app.gateway import Answering
from app.messages import Piece
from app.routes.completions import Completion, Link
from app.routes.front import CHAT_PATH

Headers = Mapping[bytes, bytes]
"""A request's headers by lower-case name; of a repeated one the last."""

_OPENWEBUI = b"\nx-openwebui-"
"""How the names of Open WebUI's own headers begin, on a line each."""

Read = tuple[ChatRequest, bytes, str | None]
"""A request, what of it goes on record, and the conversation that it goes on, where the request itself tells."""


class Rendering(Protocol):
    """One answer on the wire, whole or as a stream."""

    def opening(self) -> bytes:
        """How a stream begins."""
        ...

    def chunks(self, pieces: Sequence[Piece], /) -> bytes:
        """What a stream has for the pieces that arrived together."""
        ...

    def ending(self, conclusion: Conclusion, /) -> bytes:
        """How a stream ends."""
        ...

    def broken_off(self, error: ServiceError, request_id: str, /) -> bytes:
        """How a stream ends that failed."""
        ...

    def whole(self, pieces: Sequence[Piece], conclusion: Conclusion, /) -> bytes:
        """The body of an answer that is not streamed."""
        ...


class Form(Protocol):
    """One form of asking and answering."""

    path: str
    """The route that takes it."""

    async def read(self, body: bytes, caller: Caller, /) -> Read:
        """Read a request.

        Raises:
            ServiceError: it cannot be answered as it is.
        """
        ...

    def style(self, headers: Headers, request: ChatRequest, /) -> CitationStyle:
        """How the caller wants citations."""
        ...

    def rendering(self, answering: Answering, /, *, link: Link, style: CitationStyle) -> Rendering:
        """Begin to render an answer."""
        ...

    def explain(self, error: ServiceError, request: ChatRequest | None, /) -> None:
        """Make an error name the fields as this form does, and as the request has them if it was read."""
        ...


class ChatForm:
    """OpenAI's chat completions; without `remote_images` an image must be a `data:` URL."""

    path = CHAT_PATH

    def __init__(self, *, remote_images: bool = False) -> None:
        self._remote_images = remote_images

    async def read(self, body: bytes, _: Caller) -> Read:
        """Read a request; the body goes on record as it came."""
        return decode_chat_request(body, remote_images=self._remote_images), body, None

    def style(self, headers: Headers, request: ChatRequest) -> CitationStyle:
        """How the caller wants citations: as they said, or as Open WebUI's own headers tell."""
        options = request.retrieval
        if options is not None and options.style is not None:
            return options.style
        # In one look: a test of every name costs more than joining them.
        return "openwebui" if _OPENWEBUI in b"\n".join((b"", *headers)) else "annotations"

    def rendering(self, answering: Answering, *, link: Link, style: CitationStyle) -> Completion:
        """Begin to render an answer."""
        return Completion(answering.request, answering.prediction, link=link, style=style)

    def explain(self, error: ServiceError, request: ChatRequest | None) -> None:
        """Leave an error as it is: its fields are those of this form."""
