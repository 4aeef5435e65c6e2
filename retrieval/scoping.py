"""Who may see a document: one rule, in the words of an index, of the store's tables, and of Python.

The main rule: a document is seen within its tenant only: by everybody there if it is for no groups, else by who is in
one of them. What reads, writes or deletes a document asks here, with the scope of whoever it is done for.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrieval.documents import Scope
from retrieval.errors import InvalidFilter

MAX_FILTER_VALUES = 100

RESTRICTED = json.dumps([])
"""The label of a point whose document is for groups. No metadata makes it: their labels have two parts."""


@dataclass(frozen=True, slots=True)
class IndexFilter:
    """Which points a query may see: the tenant's, with any label of each alternative, of no hidden generation.

    Made by `tenant_filter` only.
    """

    tenant: str
    alternatives: tuple[tuple[str, ...], ...] = ()
    hidden: tuple[int, ...] = ()
    readable: tuple[str, ...] | None = None
    """Of points that have the label RESTRICTED only those that have one of these too; None is every point."""


def tenant_filter(scope: Scope, hidden: Collection[int] = ()) -> IndexFilter:
    """Turn a scope into the one filter an index understands; `hidden` generations are never found.

    Raises:
        InvalidFilter: The filter names a key whose value is neither a string, number, boolean nor a list of those.
    """
    alternatives = tuple(_alternatives(key, value) for key, value in sorted(scope.filter.items()))
    readable = None if scope.groups is None else tuple(_group_label(group) for group in sorted(scope.groups))
    return IndexFilter(_tenant(scope), alternatives, tuple(sorted(hidden)), readable)


def visible(scope: Scope, row: str = "documents") -> tuple[str, dict[str, Any]]:
    """The condition that a row is of a document that the scope sees, and its parameters.

    `row` is the name of a table, or its alias, that has the columns `tenant` and `for_groups`.
    """
    parameters: dict[str, Any] = {"tenant": _tenant(scope)}
    if scope.groups is None:
        return f"{row}.tenant = :tenant", parameters
    shares = (
        f"EXISTS (SELECT 1 FROM json_each({row}.for_groups) g WHERE g.value IN"  # noqa: S608
        " (SELECT value FROM json_each(:its_groups)))"
    )
    condition = f"{row}.tenant = :tenant AND ({row}.for_groups = '[]' OR {shares})"
    return condition, {**parameters, "its_groups": json.dumps(sorted(scope.groups))}


def visible_jobs(scope: Scope, row: str = "jobs") -> tuple[str, dict[str, Any]]:
    """The condition that a row is of a job all of whose documents the scope sees, and its parameters."""
    condition, parameters = visible(scope, "of_job")
    if scope.groups is None:
        return f"{row}.tenant = :tenant", parameters
    hidden = f"SELECT 1 FROM job_items of_job WHERE of_job.job = {row}.number AND NOT ({condition})"  # noqa: S608
    return f"{row}.tenant = :tenant AND NOT EXISTS ({hidden})", parameters


def may_see(scope: Scope, tenant: str, groups: Collection[str]) -> bool:
    """Whether the scope sees a document of this tenant that is for these groups."""
    if tenant != scope.tenant:
        return False
    return scope.groups is None or not groups or not scope.groups.isdisjoint(groups)


def labels(metadata: Mapping[str, Any], groups: Sequence[str] = ()) -> tuple[str, ...]:
    """What a filter may ask of a document: its metadata's scalars and lists of scalars, and whom it is for."""
    found: dict[str, None] = {}
    for key, value in metadata.items():
        for item in value if isinstance(value, list) else [value]:
            if _is_scalar(item):
                found[_label(key, item)] = None
    if groups:
        found |= dict.fromkeys((RESTRICTED, *map(_group_label, groups)))
    return tuple(found)


def _tenant(scope: Scope) -> str:
    if not scope.tenant:
        raise InvalidFilter("A scope needs a tenant.")
    return scope.tenant


def _alternatives(key: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not isinstance(key, str) or not key:
        raise InvalidFilter(f"Filter key {key!r}: use the name of a metadata field.")
    if not 1 <= len(values) <= MAX_FILTER_VALUES:
        raise InvalidFilter(f"Filter {key!r}: give 1 to {MAX_FILTER_VALUES} values, not {len(values)}.")
    for item in values:
        if not _is_scalar(item):
            raise InvalidFilter(
                f"Filter {key!r}: a {type(item).__name__} cannot be matched; "
                "use a string, number or boolean, or a list of them for any-of."
            )
    return tuple(_label(key, item) for item in values)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return isinstance(value, str | int | bool)


def _label(key: str, value: str | float | bool) -> str:
    # JSON tells 1 from "1" and from true; 2024.0 is written 2024, since JSON knows one kind of number.
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps([key, number], ensure_ascii=False)


def _group_label(group: str) -> str:
    return json.dumps([group], ensure_ascii=False)
