"""The feature store of a service: what reads it, and what may be written to it."""

from collections.abc import Callable
from dataclasses import dataclass

from app.errors import Conflict, NotFound
from app.features.reading import FeatureReader
from app.features.sql import SqlFeatures
from app.features.store import FeatureStore
from app.features.views import FeatureView


@dataclass(frozen=True, slots=True)
class Features:
    """A store, and what reads it for prompts.

    Args:
        store: where features are.
        reader: reads them in time.
        clock: milliseconds since 1970.
        sql: the same store where it is our own.
    """

    store: FeatureStore
    reader: FeatureReader
    clock: Callable[[], int]
    sql: SqlFeatures | None = None

    @property
    def own(self) -> SqlFeatures:
        """Our own store, which can be written to; raises Conflict where features are in another."""
        if self.sql is None:
            raise Conflict("Features are in a Feast repository here (setting `features.store`): write them by Feast.")
        return self.sql

    async def view(self, name: str) -> FeatureView:
        """Give one view; raises NotFound or Unavailable."""
        for view in await self.store.describe():
            if view.name == name:
                return view
        raise NotFound(f"There is no feature view {name!r}; `GET /v1/features` lists those there are.")
