"""The items of a response's `input` as turns of a conversation, checked as those of a chat request are.

The main rule: an error names the field as the caller wrote it, also where the check is that of a chat request.
"""

from typing import Any

from app.errors import InvalidRequest
from app.messages import Message
from app.turns import check_image, check_turns

MAX_TURNS = 2048

_OF_CHAT = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
"""What fields of a chat request are called here."""

Item = dict[str, Any]


def turns_of(given: str | list[Item], *, remote_images: bool) -> list[Message]:
    """Make the turns of what was sent.

    Raises:
        InvalidRequest: names the item and what it should be.
    """
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    turns = [
        _turn(item, f"input[{at}]", remote_images=remote_images)
        for at, item in enumerate(given)
        # Its passages are searched for anew: clients send all that an answer had.
        if item.get("type") != "file_search_call"
    ]
    if not turns:
        raise InvalidRequest("`input` has no message.", param="input")
    return turns


def _turn(item: Item, where: str, *, remote_images: bool) -> Message:
    if item.get("type", "message") != "message":
        raise InvalidRequest(
            f"`{where}.type` is {item['type']!r}; `message` and `file_search_call` are read.", param=f"{where}.type"
        )
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise InvalidRequest(
            f"`{where}.role` must be `user`, `assistant`, `system` or `developer`.", param=f"{where}.role"
        )
    if isinstance(content, str):
        return Message(role=role, content=content)
    if not isinstance(content, list):
        raise InvalidRequest(f"`{where}.content` must be a string or a list of parts.", param=f"{where}.content")
    parts = [_part(part, f"{where}.content[{at}]", remote_images=remote_images) for at, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return Message(role=role, content="\n".join(part["text"] for part in parts))
    return Message(role=role, content=parts)


def _part(part: Any, where: str, *, remote_images: bool) -> Item:
    match part:
        case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "refusal", "refusal": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "input_image", "image_url": str(url)}:
            check_image(url, f"{where}.image_url", remote_images=remote_images)
            return {"type": "image_url", "image_url": {"url": url}}
        case {"type": "input_file"}:
            raise InvalidRequest(f"`{where}`: send files to `/v1/documents`; they are searched.", param=where)
        case _:
            raise InvalidRequest(
                f"`{where}`: a part is `input_text` with `text`, or `input_image` with `image_url`.", param=where
            )


def check_conversation(messages: list[Message], *, remote_images: bool) -> None:
    """Check the whole conversation, mending what a chat request would have mended.

    Raises:
        InvalidRequest: it is too long, or a turn is not what it should be.
    """
    if len(messages) > MAX_TURNS:
        raise InvalidRequest(f"`input`: a conversation may have {MAX_TURNS} turns.", param="input")
    try:
        check_turns(messages, remote_images=remote_images)
    except InvalidRequest as error:
        raise InvalidRequest(in_our_words(error.message), param="input") from None


def in_our_words(message: str) -> str:
    """Name in an error's message what a response calls otherwise than a chat request does."""
    for theirs, ours in _OF_CHAT.items():
        message = message.replace(f"`{theirs}`", f"`{ours}`").replace(f"`{theirs}[", f"`{ours}[")
    return message


def our_field(param: str | None) -> str | None:
    """The name that a field of a chat request has here."""
    return _OF_CHAT.get(param, param) if param else param
