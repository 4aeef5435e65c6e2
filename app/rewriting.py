"""The last question of a conversation, made into one that can be searched by itself by the engine that answers.

The main rule: it may only help. What takes too long, fails, or does not speak of what was asked is thrown away, and the
search is made as without it. A first question is searched as it stands.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing

from app.engines import Engine
from app.errors import ServiceError
from app.messages import Generation, Message, Sampling
from app.prompts import question_of
from retrieval.terms import terms

REWRITE_TOKENS = 48
REWRITE_SECONDS = 3.0
MAX_TURNS = 6
MAX_TURN_CHARACTERS = 1_000
MAX_QUESTION_CHARACTERS = 400

TEMPLATE = (
    "Read the conversation.\n\n<conversation>\n{conversation}\n</conversation>\n\n"
    "Write the last question of the user so that it can be understood without the conversation: put the names in for "
    "words that point back. If it can be understood already, repeat it. Write the question alone.\n\nQuestion:"
)

_log = logging.getLogger(__name__)


async def rewritten(engine: Engine, messages: Sequence[Message], *, seconds: float = REWRITE_SECONDS) -> str | None:
    """Ask the engine's base model for the last question in words of its own; None where the search goes on without."""
    turns = [message for message in messages if message.role in ("user", "assistant") and message.text.strip()]
    if sum(turn.role == "user" for turn in turns) < 2:
        return None
    asked = Generation(
        messages=[Message(role="user", content=prompt_of(turns))],
        sampling=Sampling(max_tokens=REWRITE_TOKENS, temperature=0.0),
    )
    said = ""
    try:
        async with asyncio.timeout(seconds), aclosing(engine.generate(asked)) as batches:
            async for batch in batches:
                said += "".join(piece.text for piece in batch)
    except (ServiceError, TimeoutError) as error:
        # If the engine is down, the call that answers will say so.
        _log.info("A question is searched as it was asked: %s", type(error).__name__)
        return None
    return usable(said, question_of(messages))


def prompt_of(turns: Sequence[Message]) -> str:
    """The last turns of a conversation, shortened, and what is wanted of them."""
    told = "\n".join(f"{turn.role}: {_on_one_line(turn.text)[:MAX_TURN_CHARACTERS]}" for turn in turns[-MAX_TURNS:])
    return TEMPLATE.replace("{conversation}", told.replace("</conversation", "‹/conversation"))


def usable(said: str, question: str) -> str | None:
    """The question in what the engine said; None where it is none, or has lost what was asked."""
    line = next((line for line in said.splitlines() if line.strip()), "")
    line = _on_one_line(line).removeprefix("user:").removeprefix("Question:").strip().strip('"').strip()
    if not line or len(line) > MAX_QUESTION_CHARACTERS:
        return None
    own, made = set(terms(question).words), set(terms(line).words)
    return line if made and len(own & made) >= len(own) / 2 else None


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
