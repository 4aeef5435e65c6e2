"""What huggingface-hub's AsyncInferenceClient would send to an engine: its URL rules and headers, asked once.

The main rule: the hub token stored on this machine never reaches an engine. The client falls back to it whenever it
is given none, so it is always given one, and a stand-in is taken out again.
"""

from typing import Any

_NO_TOKEN = "none"  # noqa: S105 - It stands for the absence of a token.
_USER_AGENT = "hallmark"


def chat_request(base_url: str, token: str | None) -> tuple[str, dict[str, str]]:
    """Return the chat URL and the headers for a base URL (with or without `/v1`) and the engine's own token."""
    prepared = prepare(base_url, token, [], {})
    return prepared.url, dict(prepared.headers)


def prepare(base_url: str, token: str | None, messages: list[dict[str, Any]], parameters: dict[str, Any]) -> Any:
    """Return the client's `RequestParameters` (url, headers, json) of one chat request."""
    # Imported here: it takes a fifth of a second, which commands that reach no engine need not pay.
    from huggingface_hub import AsyncInferenceClient
    from huggingface_hub.inference._providers import get_provider_helper

    client = AsyncInferenceClient(base_url=base_url, token=token or _NO_TOKEN, headers={"user-agent": _USER_AGENT})
    prepared = get_provider_helper(client.provider, task="conversational", model=client.model).prepare_request(
        inputs=messages,
        parameters=parameters,
        headers=client.headers,
        model=client.model,
        api_key=client.token,
    )
    if not token:
        prepared.headers.pop("authorization", None)
    return prepared
