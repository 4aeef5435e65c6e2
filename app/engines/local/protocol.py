"""What is asked of the engine and how it answers: TGI's shapes, decoded, checked and encoded.

Main rule: as TGI does, except where TGI is wrong. An unknown adapter is a 404 instead of the base model; `top_p: 1`,
a bare-string `stop` and explicit nulls are accepted; the penalties are OpenAI's; stop strings are left out of the
text; an error before the first token has its own status even when a stream was asked for; a body that cannot be read
is refused in the same JSON shape as any other error, where TGI writes plain text; what a message says is letters, also
where it looks like a control token.
"""

import time
from typing import Annotated, Any

import msgspec

from app.engines.local.sampler import Picked, SamplingOptions
from app.messages import Message

MAX_STOP_SEQUENCES = 4
MAX_TOP_LOGPROBS = 5
MAX_DOCUMENTS = 64
BASE_MODEL_NAME = "tgi"  # What TGI's clients call the base model, whatever it is.

_encode = msgspec.json.Encoder().encode


class Fault(Exception):
    """A request that gets no answer: the status, and TGI's `error_type` and message."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.message = message

    @classmethod
    def overloaded(cls) -> "Fault":
        """429: batch and queue are full."""
        return cls(429, "overloaded", "Model is overloaded")

    @classmethod
    def validation(cls, detail: str) -> "Fault":
        """422: a value breaks a rule."""
        return cls(422, "validation", f"Input validation error: {detail}")

    @classmethod
    def generation(cls, reason: str) -> "Fault":
        """424: the forward pass failed."""
        return cls(424, "generation", f"Request failed during generation: Server error: {reason}")

    def as_body(self) -> bytes:
        """Encode as the body of an error response."""
        return _encode({"error": self.message, "error_type": self.error_type})

    def as_event(self) -> bytes:
        """Encode as the error event of a stream under way."""
        return _event({"error": {"message": self.message, "http_status_code": self.status}})


class StreamOptions(msgspec.Struct, frozen=True):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`, of which there is one form: the answer is one of several texts."""

    choice: Annotated[list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1)]


class ChatBody(msgspec.Struct, frozen=True):
    """The body of a chat request; unknown fields are ignored, as TGI does."""

    messages: list[Message]
    model: str | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: Any = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def limit(self, prompt_tokens: int, max_total_tokens: int) -> int:
        """Return how many tokens may be generated; asked for nothing, the rest of the context.

        Raises:
            Fault: 422 when prompt and answer cannot fit.
        """
        asked = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        if prompt_tokens >= max_total_tokens:
            raise Fault.validation(f"`inputs` must have less than {max_total_tokens} tokens. Given: {prompt_tokens}")
        if asked is not None and prompt_tokens + asked > max_total_tokens:
            raise Fault.validation(
                f"`inputs` tokens + `max_new_tokens` must be <= {max_total_tokens}. "
                f"Given: {prompt_tokens} `inputs` tokens and {asked} `max_new_tokens`"
            )
        return asked or max_total_tokens - prompt_tokens

    def sampling(self) -> SamplingOptions:
        """Return how tokens are to be picked.

        Raises:
            Fault: 422 for a value out of range or a feature this engine lacks.
        """
        for broken, rule in self._rules():
            if broken:
                raise Fault.validation(rule)
        return SamplingOptions(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            seed=self.seed,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def _rules(self) -> list[tuple[bool, str]]:
        stops, asked = self.stops, (self.max_tokens, self.max_completion_tokens)
        return [
            (not self.messages, "`messages` cannot be empty"),
            (None not in asked, "`max_tokens` and `max_completion_tokens` are the same field: give one"),
            (0 in asked, "`max_new_tokens` must be strictly positive"),
            ((self.temperature or 0) < 0, "`temperature` must be positive or 0"),
            (self.top_p is not None and not 0 < self.top_p <= 1, "`top_p` must be > 0.0 and <= 1.0"),
            (abs(self.frequency_penalty or 0) > 2, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
            (abs(self.presence_penalty or 0) > 2, "`presence_penalty` must be >= -2.0 and <= 2.0"),
            (self.seed is not None and self.seed >= 2**64, "`seed` must be less than 2^64"),
            (
                len(stops) > MAX_STOP_SEQUENCES,
                f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(stops)}",
            ),
            ("" in stops, "`stop` must not hold an empty string"),
            (
                (self.top_logprobs or 0) > MAX_TOP_LOGPROBS,
                f"`top_n_tokens` must be >= 0 and <= {MAX_TOP_LOGPROBS}. Given: {self.top_logprobs}",
            ),
            (self.n not in (None, 1), "`n` must be 1"),
            (self._wants_grammar, "grammar is not supported"),
            (bool(self.tools) and self.tool_choice != "none", "tools are not supported by the embedded engine"),
        ]

    @property
    def _wants_grammar(self) -> bool:
        return self.response_format is not None and self.response_format != {"type": "text"}


class RerankBody(msgspec.Struct, frozen=True):
    """The body of `/v1/rerank`, which TGI has not: vLLM's shape."""

    query: Annotated[str, msgspec.Meta(min_length=1)]
    documents: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_DOCUMENTS)]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How many to give back; 0 for all."""


class TokenizeBody(msgspec.Struct, frozen=True):
    """The part of TGI's GenerateRequest that `/tokenize` reads."""

    inputs: str


class LoadAdapterBody(msgspec.Struct, frozen=True):
    """vLLM's request to load an adapter."""

    lora_name: Annotated[str, msgspec.Meta(min_length=1)]
    lora_path: Annotated[str, msgspec.Meta(min_length=1)]
    load_inplace: bool = False


class UnloadAdapterBody(msgspec.Struct, frozen=True):
    """vLLM's request to unload an adapter."""

    lora_name: Annotated[str, msgspec.Meta(min_length=1)]


class AnswerShape:
    """Encodes one answer as JSON or as stream events."""

    def __init__(self, *, model: str, fingerprint: str, prompt_tokens: int, vocabulary: Any) -> None:
        self._head = {"id": "", "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._prompt_tokens = prompt_tokens
        self._vocabulary = vocabulary

    def completion(self, text: str, picked: list[Picked], finish_reason: str, completion_tokens: int) -> bytes:
        """Encode the whole answer as one body."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": self._logprobs(picked),
            "finish_reason": finish_reason,
        }
        usage = self._usage(completion_tokens)
        return _encode({"object": "chat.completion", **self._head, "choices": [choice], "usage": usage})

    def chunk(self, text: str, picked: tuple[Picked, ...], finish_reason: str | None) -> bytes:
        """Encode a piece of the answer as an event."""
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "content": text},
            "logprobs": self._logprobs(picked),
            "finish_reason": finish_reason,
        }
        return self._chunk([choice], None)

    def usage_chunk(self, completion_tokens: int) -> bytes:
        """Encode the event that tells the tokens used."""
        return self._chunk([], self._usage(completion_tokens))

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        return _event({"object": "chat.completion.chunk", **self._head, "choices": choices, "usage": usage})

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }

    def _logprobs(self, picked: list[Picked] | tuple[Picked, ...]) -> dict[str, Any] | None:
        if not picked:
            return None
        return {
            "content": [
                {
                    "token": self._token(pick.token),
                    "logprob": pick.logprob,
                    "top_logprobs": [{"token": self._token(id_), "logprob": value} for id_, value in pick.rivals],
                }
                for pick in picked
            ]
        }

    def _token(self, id_: int) -> str:
        text: str = self._vocabulary.decode([id_], skip_special_tokens=False)
        return text


DONE = b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + _encode(content) + b"\n\n"
