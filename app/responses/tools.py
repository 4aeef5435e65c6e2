"""The tool `file_search` as what a search here can do; whatever it cannot is refused by name."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from app.errors import InvalidRequest, invalid_field

MAX_NESTED_FILTERS = 8

Item = dict[str, Any]


class FileSearch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's tool `file_search`: where to search, for how many passages, of which documents."""

    type: Literal["file_search"]
    vector_store_ids: Annotated[list[str], msgspec.Meta(min_length=1, max_length=16)]
    max_num_results: Annotated[int, msgspec.Meta(ge=1, le=50)] | None = None
    filters: Item | None = None
    ranking_options: Item | None = None


def file_search_of(tools: Sequence[Item], collection: str) -> FileSearch:
    """Read the one tool there is; `collection` is what may be searched.

    Raises:
        InvalidRequest: names the field and what it should be.
    """
    for at, each in enumerate(tools):
        if each.get("type") != "file_search":
            raise InvalidRequest(
                f"`tools[{at}].type` is {each.get('type')!r}; `file_search` is the tool there is here. For functions "
                "ask `/v1/chat/completions`.",
                param=f"tools[{at}].type",
            )
    if len(tools) > 1:
        raise InvalidRequest("`tools`: send `file_search` once.", param="tools")
    (tool,) = tools
    try:
        search = msgspec.convert(tool, FileSearch)
    except msgspec.ValidationError as error:
        found = invalid_field(error)
        field = f"tools[0].{found.param}" if found.param else "tools[0]"
        raise InvalidRequest(f"`{field}`: {found.message.partition('`: ')[2] or found.message}", param=field) from error
    for at, name in enumerate(search.vector_store_ids):
        if name != collection:
            field = f"tools[0].vector_store_ids[{at}]"
            raise InvalidRequest(
                f"`{field}`: there is no {name!r}; what is searched is {collection!r}, of which you see your own "
                "documents.",
                param=field,
            )
    _check_ranking(search.ranking_options or {})
    return search


def _check_ranking(options: Mapping[str, Any]) -> None:
    """Refuse what ranks otherwise than a release does; its default values may be sent."""
    if options.get("score_threshold") not in (None, 0) or options.get("hybrid_search") is not None:
        raise InvalidRequest(
            "`tools[0].ranking_options`: the release judges what is relevant, and `retrieval.search` chooses the legs.",
            param="tools[0].ranking_options",
        )


def equality_of(filters: Any, depth: int = 0) -> dict[str, Any]:
    """Make of OpenAI's filter what a search here can filter by: metadata that is equal to a value, or to one of some.

    Raises:
        InvalidRequest: it asks for something else.
    """
    if depth > MAX_NESTED_FILTERS:
        raise _no_filter(f"more than {MAX_NESTED_FILTERS} filters inside each other")
    match filters:
        case {"type": "eq", "key": str(key), "value": str() | int() | float() | bool() as value}:
            return {key: value}
        case {"type": "in", "key": str(key), "value": [_, *_] as values}:
            return {key: values}
        case {"type": "and", "filters": [_, *_] as parts}:
            found: dict[str, Any] = {}
            for part in (equality_of(part, depth + 1) for part in parts):
                if found.keys() & part.keys():
                    raise _no_filter("two conditions on one key")
                found |= part
            return found
        case {"type": "or", "filters": [_, *_] as parts}:
            each = [equality_of(part, depth + 1) for part in parts]
            keys = {key for part in each for key in part}
            if len(keys) > 1 or any(len(part) > 1 for part in each):
                raise _no_filter("`or` over several keys")
            (key,) = keys
            values = [part[key] for part in each]
            return {key: [one for value in values for one in (value if isinstance(value, list) else [value])]}
    kind = filters.get("type") if isinstance(filters, dict) else None
    raise _no_filter(f"{kind!r}")


def _no_filter(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"`tools[0].filters`: {what} cannot be searched by. There are `eq`, `in`, `and` over different keys, and `or` "
        "over one.",
        param="tools[0].filters",
    )
