"""The description of the API, `/openapi.json`: what FastAPI finds out itself, and what it cannot see.

The chat route answers on a lane of its own, so its schema is made here, from the very types it decodes.
"""

from typing import Any

import msgspec
from fastapi import FastAPI

from app.chat import ChatRequest
from app.routes.completions import ChatCompletion
from app.routes.dependencies import errors
from app.routes.documents import UPLOAD_SCHEMAS
from app.routes.front import CHAT_PATH, OPEN_PATHS

_REF = "#/components/schemas/{name}"


def describe(api: FastAPI) -> None:
    """Make `api` describe itself as it really behaves."""
    generate = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = _complete(generate())
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _complete(description: dict[str, Any]) -> dict[str, Any]:
    components = description.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    (request, completion), found = msgspec.json.schema_components([ChatRequest, ChatCompletion], ref_template=_REF)
    schemas.update(found)
    for model in UPLOAD_SCHEMAS:
        schemas[model.__name__] = model.model_json_schema(ref_template=_REF.replace("{name}", "{model}"))
    description["paths"][CHAT_PATH] = {"post": _chat(request, completion)}
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key: `hallmark keys create` makes one."}
    }
    for path, operations in description["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
            # A malformed request is a 400 in OpenAI's envelope; FastAPI supposes its own 422.
            unprocessable = operation["responses"].get("422", {})
            if "HTTPValidationError" in str(unprocessable):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return description


def _chat(request: dict[str, Any], completion: dict[str, Any]) -> dict[str, Any]:
    responses = {
        str(status): {
            "description": meaning["description"],
            "content": {"application/json": {"schema": {"$ref": _REF.format(name="ErrorEnvelope")}}},
        }
        for status, meaning in errors(404, 413, 429, 502, 503, 504).items()
    }
    headers = {
        "x-prediction-id": {"description": "Ask `/v1/predictions/{id}` for the record.", "schema": {"type": "string"}},
        "x-release": {"description": "The release that answered, `name@number`.", "schema": {"type": "string"}},
    }
    return {
        "operationId": "create_chat_completion",
        "tags": ["chat"],
        "summary": "Answer a conversation, from the tenant's documents where they bear on it.",
        "description": "OpenAI's chat completion with citations. With `stream` the answer is a series of server-sent "
        "events that ends with `[DONE]`; an error after the first one is an `error` event and ends the series.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": headers,
                "content": {
                    "application/json": {"schema": completion},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            },
            **responses,
        },
    }
