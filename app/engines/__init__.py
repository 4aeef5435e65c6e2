"""Text-generation servers behind one small protocol: TGI and the servers that speak OpenAI's dialect of it."""

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from app.messages import Generation, Piece


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine says of itself; a limit it does not state is None."""

    model_id: str
    revision: str | None = None
    version: str | None = None
    max_total_tokens: int | None = None
    max_input_tokens: int | None = None
    adapters: tuple[str, ...] = ()
    """An engine that has room for so many lists them by their use, the one that rested longest first."""
    max_adapters: int | None = None


class Engine(Protocol):
    """One server that generates text, or several that serve the same model."""

    @property
    def is_up(self) -> bool:
        """Whether it takes requests, as far as is known; asking costs nothing."""
        ...

    async def wait_until_up(self) -> bool:
        """Wait for an engine that is away to come up: True if it then has, False if it is not away at all.

        Raises:
            EngineUnavailable: it is not worth the wait, or too many wait; says when to retry.
        """
        ...

    def generate(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        """Answer; each item holds the pieces that arrived together, so a consumer can send them together.

        The first item is awaited before anything is promised: an engine that is down, full or unwilling raises
        there, with the error the caller should see (`app.errors`), whatever disguise the wire gave it. Closing
        the generator, or cancelling its consumer, stops the engine's work at once. The last piece of a finished
        answer, and no other, has the finish reason and the usage; an answer that broke off raises instead.
        """
        ...

    async def describe(self) -> EngineInfo:
        """Ask the engine what it serves; raises EngineUnavailable when it does not answer."""
        ...

    async def count_tokens(self, text: str) -> int:
        """Count the tokens of `text` as the engine's tokenizer does, or estimate high where the engine has no route."""
        ...

    async def rate(self, question: str, texts: list[str]) -> list[float] | None:
        """Say how likely each text answers the question, 0 to 1; None from an engine that cannot tell.

        Raises as `generate` does.
        """
        ...

    async def healthy(self) -> bool:
        """Say whether the engine would take work now; never raises."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...
