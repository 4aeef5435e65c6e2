"""`POST /v1/responses` as callers send it, made into the chat request that the gateway answers.

The main rule: there is one kind of request behind the door. What a response was asked for becomes a chat request, which
is answered, checked and recorded as any other; what only a response has stands beside it, in `responses`. A field or a
value that asks for another answer than the caller would get is refused by name.
"""

from typing import Annotated, Any

import msgspec

from app.chat import ChatRequest, FeatureOptions, Identifier, Name, RetrievalOptions, check_metadata, decode_body
from app.errors import InvalidRequest, NotFound
from app.messages import Message
from app.predictions import Prediction
from app.responses.items import MAX_TURNS, Item, check_conversation, turns_of
from app.responses.tools import equality_of, file_search_of

RESULTS = "file_search_call.results"
"""What `include` names to have the passages that were found beside the answer."""

_INCLUDES_NOTHING = frozenset(
    {
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
        "reasoning.encrypted_content",
    }
)
"""What clients name by habit, of items that no answer here has."""


class TextOptions(msgspec.Struct, frozen=True):
    """What form the answer's text has."""

    format: dict[str, Any] | None = None


class ResponseRequest(msgspec.Struct, frozen=True):
    """`POST /v1/responses`: OpenAI's body with the extras `retrieval` and `features` of a chat request."""

    model: Name
    input: str | Annotated[list[Item], msgspec.Meta(min_length=1, max_length=MAX_TURNS)]
    instructions: str | None = None
    previous_response_id: Identifier | None = None
    tools: Annotated[list[Item], msgspec.Meta(max_length=128)] | None = None
    tool_choice: str | Item | None = None
    include: Annotated[list[str], msgspec.Meta(max_length=32)] | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    user: Identifier | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    retrieval: RetrievalOptions | None = None
    features: FeatureOptions | None = None


class _Sent(ResponseRequest, frozen=True):
    """What a caller may send beside it, to be refused."""

    background: Any = None
    conversation: Any = None
    context_management: Any = None
    moderation: Any = None
    prompt: Any = None
    top_logprobs: Any = None
    truncation: Any = None


def _plain_text() -> Item:
    return {"type": "text"}


class Extras(msgspec.Struct, frozen=True, omit_defaults=True):
    """What only a response was asked for: it is told with it, and kept on record for the one that follows."""

    instructed: bool = False
    """Whether the first turn is the instructions, which do not go over to the next response."""
    previous_response_id: str | None = None
    tools: list[Item] = []
    tool_choice: str | Item = "auto"
    format: Item = msgspec.field(default_factory=_plain_text)
    with_results: bool = False


class AskedResponse(ChatRequest, frozen=True, omit_defaults=True):
    """The chat request that a response is answered as, with what only a response has."""

    responses: Extras | None = None


_DECODE = msgspec.json.Decoder(_Sent).decode
_RECORDED = msgspec.json.Decoder(AskedResponse).decode


def decode_response_request(body: bytes) -> ResponseRequest:
    """Decode a request's body and refuse what is not to be had here.

    Raises:
        InvalidRequest: names the field and what it should be.
    """
    request = decode_body(_DECODE, body)
    _refuse_unsupported(request)
    return request


def as_chat(
    request: ResponseRequest, before: list[Message], *, collection: str, remote_images: bool = False
) -> AskedResponse:
    """Make the chat request of a response that goes on from the turns `before`; `collection` is what may be searched.

    Raises:
        InvalidRequest: names the field and what it should be.
    """
    instructed = request.instructions is not None
    opening = [Message(role="system", content=request.instructions)] if instructed else []
    messages = [*opening, *before, *turns_of(request.input, remote_images=remote_images)]
    check_conversation(messages, remote_images=remote_images)
    if request.metadata:
        check_metadata(request.metadata)
    form = _form(request.text)
    return AskedResponse(
        model=request.model,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        response_format=_response_format(form),
        stream=request.stream,
        user=request.user,
        store=request.store,
        metadata=request.metadata,
        retrieval=_retrieval(request, collection),
        features=request.features,
        responses=Extras(
            instructed=instructed,
            previous_response_id=request.previous_response_id,
            tools=request.tools or [],
            tool_choice=request.tool_choice if request.tool_choice is not None else "auto",
            format=form,
            with_results=RESULTS in (request.include or ()),
        ),
    )


def recorded(prediction: Prediction) -> AskedResponse:
    """Read what a prediction was asked, be it by a response or by a chat request.

    Raises:
        NotFound: it is not kept, or its answer is the call of a tool, which a response here has no item for.
    """
    if prediction.tool_calls:
        raise NotFound(
            f"{prediction.id!r} called tools of the caller's, which no response here tells: read "
            f"`/v1/predictions/{prediction.id}`."
        )
    if prediction.request is None or prediction.kept not in (None, "full", "redacted"):
        raise NotFound(
            f"The content of {prediction.id!r} is not kept, by `store`, by the service's policy, or no longer: "
            f"`/v1/predictions/{prediction.id}` tells its figures."
        )
    try:
        return _RECORDED(prediction.request)
    except msgspec.DecodeError:
        raise NotFound(f"{prediction.id!r} was not asked in a form that can be told as a response.") from None


def turns_after(prediction: Prediction) -> list[Message]:
    """Give the turns that a response goes on from: those that a prediction was asked with, and its answer.

    Raises:
        InvalidRequest: it has no whole answer, or waits for what tools return, or is not kept as it was said.
        NotFound: its content is not kept.
    """
    field = "previous_response_id"
    if prediction.outcome != "finished":
        raise InvalidRequest(
            f"`{field}`: that response is {prediction.outcome}, and has no whole answer to go on from.", param=field
        )
    if prediction.tool_calls:
        raise InvalidRequest(
            f"`{field}`: that answer called tools, and what they return is taken by `/v1/chat/completions` alone.",
            param=field,
        )
    if prediction.kept == "redacted":
        raise InvalidRequest(
            f"`{field}`: that response is kept redacted, which is not what was said. Send the turns in `input`.",
            param=field,
        )
    try:
        asked = recorded(prediction)
    except NotFound as error:
        raise NotFound(f"`{field}`: {error.message} Send the turns in `input`.", param=field) from None
    is_instructed = asked.responses is not None and asked.responses.instructed
    answer = Message(role="assistant", content=prediction.answer or "")
    return [*asked.messages[is_instructed:], answer]


def _refuse_unsupported(request: _Sent) -> None:
    if request.background:
        raise InvalidRequest("`background` is not supported: leave it out, or send `stream`.", param="background")
    if request.truncation not in (None, "disabled"):
        raise InvalidRequest("`truncation` must be `disabled`: no turn is left out unseen.", param="truncation")
    hints = {
        "conversation": "send `previous_response_id`, or the turns in `input`",
        "prompt": "a release has its prompt; choose it by `model`",
        "context_management": "leave it out",
        "moderation": "leave it out",
        "top_logprobs": "ask `/v1/chat/completions` for `logprobs`",
    }
    for field, hint in hints.items():
        if getattr(request, field) is not None:
            raise InvalidRequest(f"`{field}` is not supported: {hint}.", param=field)
    for at, name in enumerate(request.include or ()):
        if name != RESULTS and name not in _INCLUDES_NOTHING:
            raise InvalidRequest(f"`include[{at}]`: `{RESULTS}` is what can be included.", param=f"include[{at}]")
    style = request.retrieval and request.retrieval.style
    if style == "openwebui":
        raise InvalidRequest("`retrieval.style` is `annotations` or `markdown` here.", param="retrieval.style")


def _form(text: TextOptions | None) -> Item:
    form = (text and text.format) or _plain_text()
    match form:
        case {"type": "text" | "json_object"} | {"type": "json_schema", "name": str(), "schema": dict()}:
            return form
    raise InvalidRequest(
        "`text.format` is `text`, `json_object`, or `json_schema` with a `name` and a `schema`.", param="text.format"
    )


def _response_format(form: Item) -> Item | None:
    if form["type"] == "json_schema":
        return {"type": "json_schema", "json_schema": {key: form[key] for key in form if key != "type"}}
    return None if form["type"] == "text" else {"type": form["type"]}


def _retrieval(request: ResponseRequest, collection: str) -> RetrievalOptions | None:
    """What the tool and the choice of it say about retrieval, over what `retrieval` says."""
    chosen: dict[str, Any] = {}
    if request.tools:
        tool = file_search_of(request.tools, collection)
        chosen = {"top_k": tool.max_num_results, "filter": tool.filters and equality_of(tool.filters)}
    match request.tool_choice:
        case None | "auto":
            pass
        case "none":
            chosen["mode"] = "off"
        case "required" | {"type": "file_search"} if request.tools:
            chosen["mode"] = "required"
        case _:
            raise InvalidRequest(
                "`tool_choice` is `auto`, `none`, or, with the tool `file_search`, `required`.", param="tool_choice"
            )
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if not chosen:
        return request.retrieval
    return msgspec.structs.replace(request.retrieval or RetrievalOptions(), **chosen)
