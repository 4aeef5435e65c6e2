"""Features of several views for several entities, now or at moments that have passed: what the API and a join ask."""

from collections.abc import Mapping, Sequence

import msgspec

from app.errors import InvalidRequest
from app.features.store import FeatureStore, FeatureValue, Point
from app.features.views import reference
from app.releases import FEATURE_NAME_PATTERN, FeatureName


class Asked(msgspec.Struct, frozen=True):
    """Whose features, and as of when: by kind of entity its key, and milliseconds since 1970; None is now."""

    entity: Mapping[str, str | int]
    at: int | None = None


async def ask(
    store: FeatureStore, tenant: str, references: Sequence[str], rows: Sequence[Asked]
) -> list[list[FeatureValue]]:
    """Give for each row the features in the order they were named.

    Raises:
        InvalidRequest: a feature is named otherwise than `view:feature`, or a row does not say of whom.
        NotFound: there is no such view or feature.
        Unavailable: the store is away.
    """
    entities = {view.name: view.entity for view in await store.describe()}
    found: list[dict[str, FeatureValue]] = [{} for _ in rows]
    for view, names in _by_view(references).items():
        entity = entities.get(view)
        keys = [_key_of(row, n, entity) for n, row in enumerate(rows)] if entity else [""] * len(rows)
        past = [(n, Point(keys[n], row.at)) for n, row in enumerate(rows) if row.at is not None]
        joined = await store.join(tenant, view, names, [point for _, point in past]) if past else []
        for (n, _), values in zip(past, joined, strict=True):
            found[n] |= {reference(view, name): value for name, value in zip(names, values, strict=True)}
        for n, row in enumerate(rows):
            if row.at is None:
                values = await store.read(tenant, view, names, keys[n])
                found[n] |= {reference(view, name): value for name, value in zip(names, values, strict=True)}
    return [[values[each] for each in references] for values in found]


def _by_view(references: Sequence[str]) -> dict[str, list[str]]:
    """The names of features by their view; raises InvalidRequest."""
    named: dict[str, list[str]] = {}
    for text in references:
        view, _, name = text.partition(":")
        if not (_is_name(view) and _is_name(name)):
            raise InvalidRequest(
                f"`features`: a feature is written `view:feature`, unlike {text[:100]!r}; names are of the form "
                f"{FEATURE_NAME_PATTERN}.",
                param="features",
            )
        if name not in named.setdefault(view, []):
            named[view].append(name)
    return named


def _key_of(row: Asked, n: int, entity: str) -> str:
    key = row.entity.get(entity)
    if key is None:
        param = f"rows[{n}].entity.{entity}"
        raise InvalidRequest(f"`{param}` is missing: say which {entity} the row is about.", param=param)
    return str(key)


def _is_name(text: str) -> bool:
    try:
        msgspec.convert(text, FeatureName)
    except msgspec.ValidationError:
        return False
    return True
