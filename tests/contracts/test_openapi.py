"""The description of the API is valid, complete, and fit to make a client from."""

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from app.routes.front import OPEN_PATHS
from tests.service import CHAT, description


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    return description()


def operations(api: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in api["paths"].items():
        for operation in methods.values():
            yield path, operation


def every(node: Any, key: str) -> Iterator[Any]:
    """Each value under `key`, however deep."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for value in node.values():
            yield from every(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from every(value, key)


def test_it_is_valid_openapi(api):
    assert api["openapi"].startswith("3.1")
    import schemathesis  # Nobody else needs it, and it takes a second.

    schemathesis.openapi.from_dict(api).validate()


def test_every_schema_in_it_is_one_of_json_schema(api):
    for schema in api["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for schema in every(api["paths"], "schema"):
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere_and_every_schema_is_used(api):
    referred = {reference.removeprefix("#/components/schemas/") for reference in every(api, "$ref")}
    assert referred == set(api["components"]["schemas"])


def test_every_operation_has_an_id_a_tag_and_a_summary_of_its_own(api):
    found = [operation for _, operation in operations(api)]
    assert len({operation["operationId"] for operation in found}) == len(found)
    tags = {tag["name"] for tag in api["tags"]}
    for operation in found:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", operation["operationId"])
        assert len(operation["tags"]) == 1
        assert operation["tags"][0] in tags
        assert re.fullmatch(r"[A-Z][^\n]+[^.]", operation["summary"])


def test_what_needs_a_key_says_so_and_says_what_happens_without(api):
    for path, operation in operations(api):
        assert bool(operation["security"]) == (path not in OPEN_PATHS)
        assert ("401" in operation["responses"]) == (path not in OPEN_PATHS)


def test_every_error_has_the_envelope(api):
    for path, operation in operations(api):
        for status, response in operation["responses"].items():
            if int(status) >= 400 and path != "/readyz":
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}, (path, status)


def test_the_chat_route_describes_what_it_decodes_and_what_it_sends(api):
    operation = api["paths"][CHAT]["post"]
    schemas = api["components"]["schemas"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"model", "messages", "stream", "retrieval"} <= set(schemas["ChatRequest"]["properties"])
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert schemas["Annotation"]["properties"]["url_citation"] == {"$ref": "#/components/schemas/UrlCitation"}


def test_optional_choices_and_objects_have_names_of_their_own(api):
    for name, schema in api["components"]["schemas"].items():
        for branches in every(schema, "anyOf"):
            for branch in branches:
                assert "enum" not in branch, name
                assert branch.get("type") != "object", name


def test_limits_are_described(api):
    schemas = api["components"]["schemas"]
    one, several = schemas["EmbeddingRequest"]["properties"]["input"]["anyOf"]
    assert one["maxLength"] == several["items"]["maxLength"] == 100_000
    assert several["maxItems"] == 256
    assert schemas["SearchRequest"]["properties"]["top_k"]["maximum"] == 100
    assert schemas["ChatRequest"]["properties"]["messages"]["maxItems"] == 2048
