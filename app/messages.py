"""The words the app's parts share: what is asked of an engine, and what comes back.

They are msgspec structs because a streamed answer makes one per token: decoding or building one costs a
fraction of a microsecond, where a pydantic model costs tens.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

CHARACTERS_A_TOKEN = 4
"""In English, on average: a guess at a prompt's tokens, where the engine has not counted them."""

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

Priority = Literal["low", "normal", "high"]
"""How much a key's requests matter when there is not room for all of them."""


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens as the engine counted them, or about so many where its answer was cut before it told."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Piece(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one engine event adds to an answer; the last piece carries the finish reason and, if known, the usage.

    `tool_calls` are OpenAI's streaming deltas (`index`, `id`, `type`, `function`); `logprobs` is OpenAI's
    `{"content": [...]}` object, untouched.
    """

    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Message(msgspec.Struct, omit_defaults=True):
    """One turn of a conversation in OpenAI's shape.

    `content` is a string, a list of typed parts, or absent (an assistant turn that only calls tools).
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    """Deprecated, as the role `function` is: no engine is sent either (see `app.turns`)."""

    @property
    def text(self) -> str:
        """The text of the content, with the text parts of a list joined by newlines."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(
            str(part["text"]) for part in self.content or () if part.get("type") == "text" and "text" in part
        )


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the engine picks tokens; None leaves the choice to the engine."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int | None = None


class Generation(msgspec.Struct, frozen=True):
    """One call of an engine: the messages to answer and how.

    `adapter` is the LoRA adapter's name; None asks for the base model. `adapter_digest` is what has to answer by that
    name, as far as an engine can be asked for it.
    `tools`, `tool_choice` and `response_format` are OpenAI's shapes; each dialect translates them.
    `labels`, or the JSON `schema`, are what the answer is to be one of, or to fit: the engine is held to it if it can
    be, and the caller looks at the answer all the same.
    `traceparent` is the W3C header to send along, when the request is traced.
    """

    messages: list[Message]
    adapter: str | None = None
    adapter_digest: str | None = None
    sampling: Sampling = Sampling()
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    labels: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    stream: bool = False
    traceparent: str | None = None


def about_tokens(messages: Sequence[Message]) -> int:
    """How many tokens the messages have, guessed by their length."""
    return sum(len(message.text) for message in messages) // CHARACTERS_A_TOKEN + 1


def whole_tool_calls(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put OpenAI's streamed fragments of tool calls together: one entry a call, its arguments in one string."""
    calls: dict[int, dict[str, Any]] = {}
    for position, delta in enumerate(deltas):
        index = delta.get("index", position)
        function = delta.get("function") or {}
        call = calls.get(index)
        if call is None:
            calls[index] = {
                **{key: value for key, value in delta.items() if key != "index"},
                "function": {**function, "arguments": function.get("arguments") or ""},
            }
        else:
            call["function"]["arguments"] += function.get("arguments") or ""
    return [calls[index] for index in sorted(calls)]
