"""OpenAI's newer form of a chat, `/v1/responses`: what callers send, made into the chat request that is answered."""

from app.responses.items import in_our_words, our_field
from app.responses.request import (
    AskedResponse,
    Extras,
    ResponseRequest,
    as_chat,
    decode_response_request,
    recorded,
    turns_after,
)

__all__ = [
    "AskedResponse",
    "Extras",
    "ResponseRequest",
    "as_chat",
    "decode_response_request",
    "in_our_words",
    "our_field",
    "recorded",
    "turns_after",
]
