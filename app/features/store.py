"""What the service needs of a feature store, and nothing of any of them.

The main rule: what a feature was at a moment is what was known then: the last value whose event was not later, among
those that were there by then. Reading now and joining the past are the same question, so that a model is trained on
what it will be given.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from app.features.views import FeatureView, Value

State = Literal["read", "missing", "expired", "unavailable"]
"""`missing`: nobody had said. `expired`: what was said holds no more. `unavailable`: the store was away."""


class FeatureValue(msgspec.Struct, frozen=True):
    """What a feature was; times are milliseconds since 1970, and None where the store does not tell."""

    value: Value
    state: State
    event_at: int | None = None
    created_at: int | None = None


class Point(msgspec.Struct, frozen=True):
    """An entity at a moment, in milliseconds since 1970."""

    entity: str
    at: int


class FeatureStore(Protocol):
    """Where features are; no method blocks the event loop.

    What they raise is NotFound, for a view or a feature that there is not, and Unavailable while the store is away.
    """

    async def read(self, tenant: str, view: str, names: Sequence[str], entity: str) -> list[FeatureValue]:
        """Give what an entity's features are now, in the order of their names."""
        ...

    async def join(
        self, tenant: str, view: str, names: Sequence[str], points: Sequence[Point]
    ) -> list[list[FeatureValue]]:
        """Give for each point what the features were known to be then."""
        ...

    async def describe(self) -> list[FeatureView]:
        """Give the views that there are, by name; tenants have values of their own in each."""
        ...
