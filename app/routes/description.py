"""The description of the API, `/openapi.json`: what FastAPI finds out itself, and what it cannot see.

The routes that answer have a lane of their own, so their schema is made here, from the very types they decode. What is
nested inside an optional field becomes a named schema: a generated client then has `RetrievalOptionsMode`, not
`...Type0`.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
from fastapi import FastAPI

from app.chat import ChatRequest
from app.lineage import Dataset, DatasetPage, Trace, TrainingRun, UsedBy
from app.privacy.policies import LEVELS
from app.releases import Release
from app.responses import ResponseRequest
from app.routes.completions import ChatCompletion, ChatCompletionChunk
from app.routes.datasets import BuildRequest, ImportRequest
from app.routes.dependencies import errors
from app.routes.documents import UPLOAD_SCHEMAS
from app.routes.drift import REFERENCE_SCHEMAS
from app.routes.feature_schemas import FeatureRowsRequest
from app.routes.front import CHAT_PATH, OPEN_PATHS, RESPONSES_PATH
from app.routes.jobs import SYNC_SCHEMAS
from app.routes.lineage import Registered
from app.routes.response_objects import ResponseEvent, ResponseObject

_REF = "#/components/schemas/{name}"

_TAGS = {
    "chat": "Answers with citations, as OpenAI's SDKs ask for them.",
    "documents": "What answers rest on: add, synchronise, list, read and delete documents, and follow the jobs.",
    "search": "Find passages without asking a model.",
    "indexes": "Index versions: what is built beside the one that answers, compared with it, and switched to.",
    "models": "What can be asked, and the embedding model of the index.",
    "predictions": "The record: every answer with its release, passages and timings.",
    "feedback": "What people and programs think of answers.",
    "labels": "What is true of an answer, as those state who can know.",
    "review": "People look at some of the answers, chosen by chance with known probability, and what they find.",
    "quality": "How good each release's answers are, every figure with its interval, and whether questions drift.",
    "alerts": "What got worse, the rules that say so, and who was told.",
    "features": "Facts of those whom requests are about, now and as they were known at any time.",
    "datasets": "Examples to train on and to measure by, built from predictions or imported, kept as versions.",
    "lineage": "What a prediction was made of, and what was made with it, every digest verified anew.",
    "privacy": "Have a person or a conversation erased from all that is kept.",
    "releases": "What answers: immutable bundles of model, adapter, prompt, retrieval and defaults.",
    "rollouts": "Which release of a name answers whom.",
    "access": "Whose key this is.",
    "health": "Liveness, readiness, metrics.",
}

Schema = dict[str, Any]


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
    schemas: dict[str, Schema] = components.setdefault("schemas", {})
    (chat, completion, chunk, asked, response, event), found = msgspec.json.schema_components(
        [ChatRequest, ChatCompletion, ChatCompletionChunk, ResponseRequest, ResponseObject, ResponseEvent],
        ref_template=_REF,
    )
    schemas.update(found, **_release_schemas(), **_lineage_schemas())
    for model in (*UPLOAD_SCHEMAS, *SYNC_SCHEMAS, *REFERENCE_SCHEMAS):
        schema = model.model_json_schema(ref_template=_REF.replace("{name}", "{model}"))
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    description["paths"][CHAT_PATH] = {"post": _answering(_CHAT, chat, completion, _chat_event(chunk))}
    description["paths"][RESPONSES_PATH] = {"post": _answering(_RESPONSES, asked, response, _response_event(event))}
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key: `hallmark keys create` makes one."}
    }
    description["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items()]
    for path, operations in description["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
            _mend(operation)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _name_nested(schemas)
    return description


def _release_schemas() -> dict[str, Schema]:
    """What describes a release: all but its name may be left out, and its number is given."""
    _, schemas = msgspec.json.schema_components([Release], ref_template=_REF)
    schemas["Release"]["required"] = ["name"]
    del schemas["Release"]["properties"]["number"]
    rules = {"type": "array", "items": {"$ref": _REF.format(name="RuleObject")}}
    # Kept beside the release, and no part of its digest.
    schemas["Release"]["properties"]["alerts"] = {"description": "The rules of its alerts.", **rules}
    plain: dict[str, Schema] = msgspec.json.decode(msgspec.json.encode(schemas))  # A default may be a tuple.
    return plain


def _lineage_schemas() -> dict[str, Schema]:
    """What goes into and comes out of the routes of lineage, and into those of datasets and features."""
    _, schemas = msgspec.json.schema_components(
        [Dataset, DatasetPage, Registered, Trace, TrainingRun, UsedBy, BuildRequest, ImportRequest, FeatureRowsRequest],
        ref_template=_REF,
    )
    for each in schemas["ImportRequest"]["properties"]["files"].values():
        if isinstance(each, dict):
            each["format"] = "binary"
    plain: dict[str, Schema] = msgspec.json.decode(msgspec.json.encode(schemas))
    return plain


def _mend(operation: dict[str, Any]) -> None:
    """Take out what FastAPI supposes, and make the first sentence of a route's docstring its summary."""
    # A malformed request is a 400 in OpenAI's envelope.
    if "HTTPValidationError" in str(operation["responses"].get("422", {})):
        del operation["responses"]["422"]
    operation["responses"] = dict(sorted(operation["responses"].items()))
    summary, _, rest = operation.pop("description").partition("\n\n")
    operation["summary"] = summary.replace("\n", " ").rstrip(".")
    if rest:
        operation["description"] = rest
    for parameter in operation.get("parameters", ()):
        parameter["schema"].pop("title", None)
        # What may be left out cannot be null there, and a choice that could be gets no plain name in a client.
        branches = [branch for branch in parameter["schema"].get("anyOf", ()) if branch != {"type": "null"}]
        if len(branches) == 1:
            del parameter["schema"]["anyOf"]
            parameter["schema"] = branches[0] | parameter["schema"]
    for response in operation["responses"].values():
        for content in response.get("content", {}).values():
            content["schema"].pop("title", None)


def _name_nested(schemas: dict[str, Schema]) -> None:
    """Make a component of every choice or object that a property may hold beside null, and drop made-up titles."""
    named: dict[str, Schema] = {}
    for owner, schema in schemas.items():
        schema["description"] = " ".join(schema["description"].split())
        schema.pop("title", None)
        for property_name, given in schema.get("properties", {}).items():
            given.pop("title", None)
            name = owner + "".join(part.capitalize() for part in property_name.split("_"))
            for nested, inner_name in _nested(given, name):
                if "enum" in nested or nested.get("type") == "object":
                    named[inner_name] = dict(nested)
                    nested.clear()
                    nested["$ref"] = _REF.format(name=inner_name)
            if len(given.get("enum", ())) == 1:
                given["const"] = given.pop("enum")[0]
                given["type"] = "string"
    schemas.update(named)


def _nested(given: Schema, name: str) -> Iterator[tuple[Schema, str]]:
    for branch in given.get("anyOf", ()):
        yield branch, name
        if "items" in branch:
            yield branch["items"], f"{name}Item"


def _event(content: Schema, **fields: Schema) -> Schema:
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    return {"type": "object", "properties": {"data": data, **fields}, "required": ["data", *fields]}


_CHAT = {
    "operationId": "create_chat_completion",
    "tags": ["chat"],
    "description": "Answer a conversation, from the tenant's documents where they bear on it.\n\n"
    "OpenAI's chat completion with citations. With `stream` the answer is a series of server-sent events that "
    "ends with `[DONE]`; an error after the first one is an `error` event and ends the series.",
}
_RESPONSES = {
    "operationId": "create_response",
    "tags": ["chat"],
    "description": "Answer a conversation in the form of OpenAI's responses.\n\n"
    "The search and the answer are items of the output, citations are annotations of its text. With `stream` it is a "
    "series of OpenAI's typed events; an error after the first one is a `response.failed` event and ends the series.",
}


def _chat_event(chunk: Schema) -> Schema:
    error = {"$ref": _REF.format(name="ErrorEnvelope")}
    return {
        "description": "One server-sent event: a chunk, an error when the answer broke off, or the end mark `[DONE]`.",
        "anyOf": [
            {"type": "object", "properties": {"data": {"const": "[DONE]"}}, "required": ["data"]},
            _event(chunk),
            _event(error, event={"const": "error"}),
        ],
    }


def _response_event(event: Schema) -> Schema:
    described = _event(event, event={"type": "string", "description": "The type that the data has too."})
    return {"description": "One server-sent event, as OpenAI's API has them.", **described}


def _answering(operation: dict[str, Any], request: Schema, answer: Schema, event: Schema) -> dict[str, Any]:
    """A route that answers, whole or as a stream of events."""
    responses = {
        str(status): {
            "description": meaning["description"],
            "content": {"application/json": {"schema": {"$ref": _REF.format(name="ErrorEnvelope")}}},
        }
        for status, meaning in errors(404, 413, 422, 429, 502, 503, 504).items()
    }
    headers = {
        "x-prediction-id": {"description": "Ask `/v1/predictions/{id}` for the record.", "schema": {"type": "string"}},
        "x-release": {"description": "The release that answered, `name@number`.", "schema": {"type": "string"}},
    }
    return {
        **operation,
        "parameters": [
            {
                "name": "x-hallmark-keep",
                "in": "header",
                "required": False,
                "description": "How much of what is said is kept at most; the service's policy may keep less.",
                "schema": {"type": "string", "enum": list(LEVELS)},
            }
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": headers,
                "content": {"application/json": {"schema": answer}, "text/event-stream": {"schema": event}},
            },
            **responses,
        },
    }
