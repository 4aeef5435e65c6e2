"""The chat request as callers send it: OpenAI's body with extras: `retrieval`, `features`, `metadata`, `store`, `user`.

Decoded once, strictly typed and bounded by msgspec, straight from the request's bytes. What OpenAI has deprecated is
brought into its present form. A field that is not listed here is ignored: SDKs send some that only OpenAI's servers
have a use for. One that asks for another answer than the caller would get is refused by name.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from app.errors import InvalidRequest, invalid_field
from app.messages import Message, Sampling
from app.tasks import Task
from app.turns import check_turns

T = TypeVar("T")

CheckMode = Literal["sentence", "end", "off"]
CitationStyle = Literal["annotations", "markdown", "openwebui"]
RetrievalMode = Literal["off", "auto", "required"]

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
# PostgreSQL's text has no NUL, and an erasure takes the same names.
Identifier = Annotated[str, msgspec.Meta(max_length=512, pattern=r"^[^\x00]*$")]
EntityKey = Annotated[str, msgspec.Meta(min_length=1, max_length=512)] | int


class RetrievalOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a request may choose about retrieval and citations; None leaves it to the release.

    Made into a dict by msgspec it is what was chosen and no more, which `app.grounding.plan_for` rests on.
    """

    mode: RetrievalMode | None = None
    top_k: Annotated[int, msgspec.Meta(ge=1, le=50)] | None = None
    per_document: Annotated[int, msgspec.Meta(ge=1, le=50)] | None = None
    mmr: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    rewrite: bool | None = None
    filter: dict[str, Any] | None = None
    search: Literal["hybrid", "dense", "sparse"] | None = None
    check: CheckMode | None = None
    fallback: Literal["extract", "abstain", "keep"] | None = None
    style: CitationStyle | None = None


class FeatureOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whom a request is about, for a release that knows more of them; other releases pass it over."""

    entity: Annotated[dict[Name, EntityKey], msgspec.Meta(max_length=16)] = {}
    """Keys by the kind of entity, as in `{"customer": "c-17"}`."""


class StreamOptions(msgspec.Struct, frozen=True):
    """OpenAI's options of a stream."""

    include_usage: bool | None = None


class ChatRequest(msgspec.Struct, frozen=True):
    """`POST /v1/chat/completions`."""

    model: Name
    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=2048)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=4)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Identifier | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    retrieval: RetrievalOptions | None = None
    features: FeatureOptions | None = None

    def sampling(self, *, max_tokens: int, temperature: float | None) -> Sampling:
        """What the caller chose, with the release's defaults where they chose nothing."""
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or max_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=self.top_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            seed=self.seed,
            stop=tuple(filter(None, stops)),
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs,
        )

    def check_for(self, task: Task) -> None:
        """Refuse what asks a release with a task for something else; a plain answer may be asked for anything.

        Raises:
            InvalidRequest: names the field.
        """
        if task.is_answer:
            return
        form = (self.response_format or {}).get("type", "text")
        asked = {
            "tools": self.tools,
            "response_format": form != "text" and not (form == "json_object" and task.kind == "extract"),
            **{f"retrieval.{name}": getattr(self.retrieval, name, None) for name in ("mode", "check", "fallback")},
        }
        for field, value in asked.items():
            if value:
                raise InvalidRequest(
                    f"`{field}`: the task {task.kind!r} of this release leaves no choice.", param=field
                )


class _Sent(ChatRequest, frozen=True):
    """What a caller may send beside it, to be refused: an answer that ignores it is not the one that was asked for."""

    functions: Any = None
    logit_bias: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None


_DECODE = msgspec.json.Decoder(_Sent).decode


def decode_body(decode: Callable[[bytes], T], body: bytes) -> T:
    """Decode a request's body by its own decoder.

    Raises:
        InvalidRequest: names the field, or says that it is not JSON.
    """
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error}. Send an object as OpenAI's API describes it."
        ) from None


def decode_chat_request(body: bytes, *, remote_images: bool = False) -> ChatRequest:
    """Decode and check a request's body; without `remote_images` its images must be `data:` URLs.

    Raises:
        InvalidRequest: names the field and what it should be.
    """
    request = decode_body(_DECODE, body)
    _check(request, remote_images=remote_images)
    return request


def _check(request: _Sent, *, remote_images: bool) -> None:
    """Check what a type cannot say."""
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise InvalidRequest("Send `max_completion_tokens` or `max_tokens`, not both.", param="max_tokens")
    check_turns(request.messages, remote_images=remote_images)
    _refuse_unsupported(request)
    if request.metadata:
        check_metadata(request.metadata)


def _refuse_unsupported(request: _Sent) -> None:
    if request.functions:
        raise InvalidRequest("`functions` is not supported: send them as `tools`.", param="functions")
    if request.logit_bias:
        raise InvalidRequest("`logit_bias` is not supported: leave it out.", param="logit_bias")
    if request.modalities not in (None, [], ["text"]):
        raise InvalidRequest("`modalities`: answers are text; leave it out.", param="modalities")
    if request.audio is not None:
        raise InvalidRequest("`audio` is not supported: answers are text.", param="audio")
    if request.web_search_options is not None:
        raise InvalidRequest(
            "`web_search_options` is not supported: answers rest on your own documents.", param="web_search_options"
        )


def check_metadata(metadata: dict[str, Any]) -> None:
    """Check what a caller sends along, and take out what is null.

    Raises:
        InvalidRequest: there is too much of it.
    """
    for key in [key for key, value in metadata.items() if value is None]:
        del metadata[key]
    if len(metadata) > 16:
        raise InvalidRequest("`metadata` may hold 16 keys at most.", param="metadata")
    for key, value in metadata.items():
        if len(key) > 64 or not isinstance(value, str | int | float | bool) or len(str(value)) > 512:
            raise InvalidRequest(
                f"`metadata.{key[:64]}`: keys have at most 64 characters, values are strings, numbers or booleans "
                "of at most 512.",
                param="metadata",
            )
