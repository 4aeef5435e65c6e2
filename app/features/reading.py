"""The features of a release for one request: read in time or not at all, and what stands for those that are not there.

The main rule: a release says of each view whether it can do without. Whatever becomes of a feature is on record, with
the times by which it can be told what was known.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from app.errors import FeatureMissing, FeaturesUnavailable, NotFound, Unavailable
from app.features.store import FeatureStore, FeatureValue
from app.features.views import FeatureView, is_plain, reference, shown_time, value_of
from app.releases import FeatureUse, Release

READ_SECONDS = 0.25

Facts = dict[str, Any]


class Asker(msgspec.Struct, frozen=True):
    """Whom a request is about, as far as it says."""

    entity: Mapping[str, str | int] = {}
    user: str | None = None
    conversation: str | None = None
    headers: Mapping[bytes, bytes] = {}

    def key_of(self, use: FeatureUse) -> str | None:
        """The key of the entity that a release asks for; None where the request does not say."""
        if use.key == "request":
            given = self.entity.get(use.entity)
            return None if given is None else str(given)
        if use.key == "user":
            return self.user or None
        if use.key == "conversation":
            return self.conversation or None
        header = self.headers.get(use.key.partition(":")[2].encode())
        return header.decode("latin-1").strip()[:512] or None if header else None


class FeatureReader:
    """Reads the features of releases.

    Args:
        store: where they are.
        timeout_seconds: how long a request waits for all of its features.
    """

    def __init__(self, store: FeatureStore, *, timeout_seconds: float = READ_SECONDS) -> None:
        self._store = store
        self._timeout_seconds = timeout_seconds

    async def read(self, tenant: str, uses: Sequence[FeatureUse], asker: Asker) -> list[Facts]:
        """Give for each feature, in the release's order, what goes on record of it; `shown` is what of it is prompted.

        Raises:
            FeatureMissing: one that is required is not known, or too old; or the request does not say of whom.
            FeaturesUnavailable: one that is required cannot be read in time.
        """
        keys = [asker.key_of(use) for use in uses]
        read = await asyncio.gather(*map(self._values, [tenant] * len(uses), uses, keys))
        facts: list[Facts] = []
        for use, key, values in zip(uses, keys, read, strict=True):
            if use.required:
                _check(use, key, values)
            facts += [_facts(use, name, key, value) for name, value in zip(use.names, values, strict=True)]
        return facts

    async def _values(self, tenant: str, use: FeatureUse, key: str | None) -> list[FeatureValue]:
        if key is None or not is_plain(key):
            return [FeatureValue(None, "missing")] * len(use.names)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._store.read(tenant, use.view, use.names, key)
        except (Unavailable, TimeoutError):
            return [FeatureValue(None, "unavailable")] * len(use.names)
        except NotFound:
            return [FeatureValue(None, "missing")] * len(use.names)  # The view was there when the release was vetted.

    async def problems(self, release: Release) -> list[str]:
        """Say what of a release's features the store does not have.

        Raises:
            Unavailable: it cannot be asked at present.
        """
        if not release.features:
            return []
        views = {view.name: view for view in await self._store.describe()}
        return [problem for use in release.features for problem in _problems(use, views.get(use.view), sorted(views))]


def shown(facts: Sequence[Facts]) -> list[tuple[str, Any]]:
    """What of features stands in the prompt: names and values, without those of which there is nothing to say."""
    return [(each["feature"], each["value"]) for each in facts if each["value"] is not None]


def _facts(use: FeatureUse, name: str, key: str | None, read: FeatureValue) -> Facts:
    value = read.value if read.state == "read" else use.defaults.get(name)
    facts = {"feature": reference(use.view, name), "entity": key, "value": value, "state": read.state}
    times = {"event_at": read.event_at, "created_at": read.created_at}
    return facts | {at: shown_time(time) for at, time in times.items() if time is not None}


def _check(use: FeatureUse, key: str | None, values: Sequence[FeatureValue]) -> None:
    """Refuse a request that cannot be answered as the release says."""
    if key is None:
        param = f"features.entity.{use.entity}" if use.key == "request" else use.key.replace("header:", "header ")
        raise FeatureMissing(
            f"`{param}`: this release requires features of a {use.entity!r}: say which one the request is about.",
            param=param,
        )
    for name, value in zip(use.names, values, strict=True):
        if value.state == "unavailable":
            raise FeaturesUnavailable(
                "The features that this release requires cannot be read now. Try again shortly.",
                retry_after_seconds=1.0,
            )
        if value.state != "read":
            why = "is too old" if value.state == "expired" else "is not known"
            raise FeatureMissing(
                f"`features`: {reference(use.view, name)!r}, which this release requires, {why} of this {use.entity}.",
                param="features",
            )


def _problems(use: FeatureUse, view: FeatureView | None, there: Sequence[str]) -> list[str]:
    if view is None:
        return [f"`features`: there is no view {use.view!r}; there are {', '.join(there) or 'none'}."]
    if use.entity != view.entity:
        return [f"`features.entity` is {use.entity!r}; the view {use.view!r} is of {view.entity!r}."]
    problems = [
        f"`features.names`: the view {use.view!r} has no {name!r}; it has {', '.join(view.features)}."
        for name in use.names
        if name not in view.features
    ]
    return problems + [
        f"`features.defaults.{name}` is {default!r}; {reference(use.view, name)!r} is of the type {kind!r}."
        for name, default in use.defaults.items()
        if (kind := view.features.get(name)) is not None and value_of(kind, default) is None
    ]
