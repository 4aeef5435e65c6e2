"""The turns of a conversation as callers send them, checked and brought into the one form that engines take.

The main rule: whatever an engine might fetch is refused here. An image's URL makes TGI and vLLM ask any address for it,
from inside the network the service stands in, so that images come with the request unless a setting says otherwise.
"""

import re
from typing import Any

from app.errors import InvalidRequest
from app.messages import Message

_DEPRECATED_ID = "call_function_{}"
# Nothing may stand behind the data: TGI writes a URL into its prompt, where a bracket would end it and begin another.
_DATA_URL = re.compile(r"(?i:data:[a-z0-9.+-]+/[a-z0-9.+-]+;base64),[A-Za-z0-9+/]+={0,2}")


def check_turns(messages: list[Message], *, remote_images: bool) -> None:
    """Check the turns, mending in place what OpenAI has deprecated or leaves open.

    `function_call` and the role `function` become a tool's call and its result; an assistant's turn without content has
    an empty one; a refusal is what the assistant said.

    Raises:
        InvalidRequest: names the turn and what it should be.
    """
    for index, message in enumerate(messages):
        if message.role in ("assistant", "function"):
            _modernise(message, index)
        content = message.content
        if isinstance(content, list):
            _check_parts(content, index, remote_images=remote_images)
        elif content is None and not message.tool_calls:
            raise InvalidRequest(
                f"`messages[{index}].content` is missing: only an assistant's turn may leave it out.",
                param=f"messages[{index}].content",
            )
    last = messages[-1]
    if last.role == "assistant" and not last.text:
        raise InvalidRequest("`messages`: the last message is an empty assistant turn.", param="messages")


def _modernise(message: Message, index: int) -> None:
    if message.role == "function":
        # The call it answers stands in the turn before.
        message.role, message.tool_call_id = "tool", _DEPRECATED_ID.format(index - 1)
        message.content = message.content or ""
        return
    if message.function_call is not None and not message.tool_calls:
        call = {"id": _DEPRECATED_ID.format(index), "type": "function", "function": message.function_call}
        message.tool_calls = [call]
    message.function_call = None
    if message.content is None and not message.tool_calls:
        message.content = ""


def _check_parts(parts: list[dict[str, Any]], index: int, *, remote_images: bool) -> None:
    for at, part in enumerate(parts):
        where = f"messages[{index}].content[{at}]"
        match part:
            case {"type": "text"}:
                if not isinstance(part.get("text"), str):
                    raise InvalidRequest(f"`{where}.text` must be a string.", param=where)
            case {"type": "refusal", "refusal": str(refusal)}:
                parts[at] = {"type": "text", "text": refusal}
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                check_image(url, f"{where}.image_url.url", remote_images=remote_images)
            case {"type": "image_url"}:
                raise InvalidRequest(
                    f"`{where}.image_url` must be an object with a string `url`.", param=f"{where}.image_url"
                )
            case _:
                raise InvalidRequest(
                    f"`{where}.type` is {part.get('type')!r}; `text` and `image_url` are read.", param=where
                )


def check_image(url: str, where: str, *, remote_images: bool) -> None:
    """Check that an image came with the request, unless images may be fetched.

    Raises:
        InvalidRequest: names the field, which is `where`, and what it should be.
    """
    if not remote_images and _DATA_URL.fullmatch(url) is None:
        raise InvalidRequest(
            f"`{where}` must be a `data:` URL, as `data:image/png;base64,` and the image: images are not fetched "
            "(setting `limits.remote_images`).",
            param=where,
        )
