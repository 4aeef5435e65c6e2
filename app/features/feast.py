"""The adapter of Feast: features of a Feast repository, read by Feast in this process.

The main rule: Feast's calls block, so they run in threads of their own, and never more of them than there are threads:
one too many finds the store away. A join leaves out what was learnt later, as ours does, or is refused.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import msgspec

from app.errors import Conflict, NotFound, ServiceError, Unavailable
from app.features.store import FeatureValue, Point
from app.features.views import FeatureView, Type, Value, value_of

log = logging.getLogger(__name__)

T = TypeVar("T")

REFRESH_SECONDS = 30.0
"""How long what there is in the repository is taken as it was."""

_TYPES: Mapping[str, Type] = {
    "STRING": "string",
    "INT32": "integer",
    "INT64": "integer",
    "FLOAT": "number",
    "DOUBLE": "number",
    "BOOL": "boolean",
}
"""Feast's types whose values can stand in a prompt; features of others are not offered."""


class CannotUseFeast(Exception):
    """Feast is not installed, or its repository cannot be opened."""


class _Known(NamedTuple):
    view: FeatureView
    is_number: bool
    """Whether the entity's keys are numbers there."""


class FeastFeatures:
    """A Feast repository; use it in an `async with` block, which raises CannotUseFeast.

    Args:
        repo: the folder with `feature_store.yaml`.
        tenants: whom its features are for; to others there is nothing in it.
        threads: how many reads run at once.
        clock: seconds since 1970.
    """

    def __init__(
        self, repo: Path, *, tenants: Sequence[str], threads: int = 4, clock: Callable[[], float] = time.time
    ) -> None:
        self._repo = repo
        self._tenants = frozenset(tenants)
        self._clock = clock
        self._reads = ThreadPoolExecutor(threads, thread_name_prefix="feast")
        self._free = threading.Semaphore(threads)
        # Joins and the registry take seconds: they wait for one another, and reads do not wait for them.
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="feast-slow")
        self._known: dict[str, _Known] = {}
        self._known_at = 0.0
        self._listing: Future[None] | None = None
        self._store: Any = None

    async def __aenter__(self) -> Self:
        try:
            self._store = await asyncio.wrap_future(self._slow.submit(self._opened))
        except BaseException:
            self._shut()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Begin no further call; one that hangs is not waited for."""
        self._shut()

    def _shut(self) -> None:
        for pool in (self._reads, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)

    def _opened(self) -> Any:
        try:
            import feast
        except ModuleNotFoundError as error:
            raise CannotUseFeast("Feast is not installed: pip install 'hallmark[feast]'.") from error
        if not (self._repo / "feature_store.yaml").is_file():
            raise CannotUseFeast(f"{str(self._repo)!r} has no `feature_store.yaml`.")
        try:
            store = feast.FeatureStore(repo_path=str(self._repo))
            store.refresh_registry()
        except Exception as error:
            raise CannotUseFeast(f"the repository {str(self._repo)!r} cannot be opened: {error}") from error
        return store

    async def read(self, tenant: str, view: str, names: Sequence[str], entity: str) -> list[FeatureValue]:
        """Give what an entity's features are now; raises NotFound or Unavailable."""
        if tenant not in self._tenants:
            return [FeatureValue(None, "missing")] * len(names)
        known = await self._find(view, names)
        row = {known.view.entity: _key(known, entity)}
        if row[known.view.entity] is None:
            return [FeatureValue(None, "missing")] * len(names)

        def get() -> dict[str, list[Any]]:
            try:
                asked = [f"{view}:{name}" for name in names]
                response = self._store.get_online_features(features=asked, entity_rows=[row])
                found: dict[str, list[Any]] = response.to_dict(include_event_timestamps=True)
                return found
            finally:
                self._free.release()

        if not self._free.acquire(blocking=False):
            raise Unavailable("The feature store is busy.", retry_after_seconds=1.0)
        found = await self._run(self._reads, get)
        now = self._clock()
        return [_online(known.view, name, found[name][0], found[f"{name}__ts"][0], now) for name in names]

    async def join(
        self, tenant: str, view: str, names: Sequence[str], points: Sequence[Point]
    ) -> list[list[FeatureValue]]:
        """Give for each point what the features were known to be then, as far as Feast's sources say when that was.

        Raises:
            NotFound: there is no such view or feature.
            Conflict: its offline store cannot leave out what was learnt later.
            Unavailable: Feast does not answer.
        """
        known = await self._find(view, names)
        keys = {each: _key(known, each.entity) for each in points} if tenant in self._tenants else {}
        asked = {each: key for each, key in keys.items() if key is not None}
        found = await self._run(self._slow, lambda: self._joined(known.view, names, asked)) if asked else {}
        missing = [FeatureValue(None, "missing")] * len(names)
        return [found.get((asked.get(each), each.at), missing) for each in points]

    def _joined(
        self, view: FeatureView, names: Sequence[str], asked: Mapping[Point, Any]
    ) -> dict[tuple[Any, int], list[FeatureValue]]:
        import pandas

        moments = [datetime.fromtimestamp(point.at / 1000, UTC) for point in asked]
        frame = pandas.DataFrame({view.entity: list(asked.values()), "event_timestamp": pandas.to_datetime(moments)})
        try:
            job = self._store.get_historical_features(
                entity_df=frame.drop_duplicates(),
                features=[f"{view.name}:{name}" for name in names],
                filter_by_created_timestamp=True,
            )
        except NotImplementedError as error:
            raise Conflict("Feast's offline store cannot leave out what was learnt later: choose another.") from error
        found = {}
        for row in job.to_df().to_dict("records"):
            values = [_plain(view.features[name], row[name]) for name in names]
            at = round(row["event_timestamp"].timestamp() * 1000)
            found[_item(row[view.entity]), at] = [
                FeatureValue(value, "missing" if value is None else "read") for value in values
            ]
        return found

    async def describe(self) -> list[FeatureView]:
        """Give the views with one entity, and of them the features that are text, numbers or truths."""
        return [known.view for _, known in sorted((await self._views(is_fresh=True)).items())]

    async def _find(self, view: str, names: Sequence[str]) -> _Known:
        known = (await self._views()).get(view)
        if known is None:
            known = (await self._views(is_fresh=True)).get(view)
        if known is None:
            raise NotFound(f"There is no feature view {view!r}; `GET /v1/features` lists those there are.")
        for name in names:
            if name not in known.view.features:
                raise NotFound(f"The feature view {view!r} has no feature {name[:100]!r}.")
        return known

    async def _views(self, *, is_fresh: bool = False) -> dict[str, _Known]:
        """What there is. A read does not wait for a newer list than the last one, which may stand behind a join."""
        if self._listing is None or (
            self._listing.done() and (is_fresh or self._clock() - self._known_at > REFRESH_SECONDS)
        ):
            self._listing = self._slow.submit(self._list)
        if is_fresh or not self._known_at:
            await self._told(self._listing)
        return self._known

    def _list(self) -> None:
        known = (_view_of(each) for each in self._store.list_feature_views())
        self._known = {each.view.name: each for each in known if each is not None}
        self._known_at = self._clock()

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        """Do it in a thread; raises Unavailable, whatever Feast or what it rests on raises."""
        return await self._told(pool.submit(call))

    async def _told(self, future: Future[T]) -> T:
        try:
            # Who leaves does not end what others may wait for.
            return await asyncio.shield(asyncio.wrap_future(future))
        except ServiceError:
            raise
        except Exception as error:
            # Each of Feast's stores raises what its own library does, with words that may quote what was read.
            log.error("Feast does not answer (%s)", type(error).__name__)  # noqa: TRY400
            raise Unavailable("The feature store does not answer.", retry_after_seconds=1.0) from error


def _view_of(view: Any) -> _Known | None:
    """A view of Feast's as one of ours; None where its entity has several keys, or none of its features can be told."""
    columns = list(view.entity_columns)
    types = {field.name: _TYPES.get(field.dtype.to_value_type().name) for field in view.features}
    facts = {
        "name": view.name,
        "entity": columns[0].name if len(columns) == 1 else None,
        "features": {name: kind for name, kind in types.items() if kind is not None},
        "ttl_seconds": round(view.ttl.total_seconds()) or None if view.ttl else None,
        "description": view.description or "",
    }
    try:
        ours = msgspec.convert(facts, FeatureView)
    except msgspec.ValidationError:
        return None
    return _Known(ours, columns[0].dtype.to_value_type().name in ("INT32", "INT64"))


def _key(known: _Known, entity: str) -> str | int | None:
    """An entity's key as Feast has it; None for one that cannot be there."""
    if not known.is_number:
        return entity
    return int(entity) if entity.lstrip("-").isdecimal() and len(entity) < 19 else None


def _online(view: FeatureView, name: str, value: Any, event_seconds: int, now: float) -> FeatureValue:
    """What Feast's online store had. How old it may be is looked at here: not every store of Feast's does."""
    read = _plain(view.features[name], value)
    event_at = event_seconds * 1000 if event_seconds else None
    if read is None:
        return FeatureValue(None, "missing", event_at)
    if view.ttl_seconds is not None and event_at is not None and event_seconds < now - view.ttl_seconds:
        return FeatureValue(None, "expired", event_at)
    return FeatureValue(read, "read", event_at)


def _plain(kind: Type, value: Any) -> Value:
    """A value as JSON has it; pandas' holes, and what is not of its type, are None."""
    return value_of(kind, _item(value))


def _item(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
