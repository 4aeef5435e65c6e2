"""Features as JSON: views, rows, and values as of a moment."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from pydantic import BaseModel, Field

from app.features import FeatureValue, FeatureView
from app.features.views import MAX_FEATURES, Type
from app.releases import FEATURE_NAME_PATTERN
from app.routes.feedback_schemas import Moment
from app.routes.registry_schemas import moment
from app.routes.schemas import Wire

MAX_ASKED = 1_000

FeatureName = Annotated[str, Field(pattern=FEATURE_NAME_PATTERN)]
EntityKey = (
    Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00]*$")]
    | Annotated[int, Field(ge=-(2**63), lt=2**63)]
)
Value = str | int | float | bool


class FeatureViewRequest(Wire):
    """Features of one kind of entity, which are written together."""

    entity: FeatureName = Field(description="The kind of thing that has them, such as `customer`.")
    features: dict[FeatureName, Type] = Field(min_length=1, max_length=MAX_FEATURES, description="Types by name.")
    ttl_seconds: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        None, description="How long after its event a value holds; null is until the next."
    )
    subject: Literal["user", "conversation"] | None = Field(
        None, description="Whose its entities are where they are people or conversations: with them they are erased."
    )
    description: str = Field("", max_length=2_000)


class FeatureViewObject(BaseModel):
    """A view: what features there are of one kind of entity."""

    name: str
    object: Literal["feature_view"] = "feature_view"
    entity: str
    features: dict[str, Type]
    ttl_seconds: int | None
    subject: Literal["user", "conversation"] | None
    description: str

    @classmethod
    def of(cls, view: FeatureView) -> "FeatureViewObject":
        """The view as it is shown."""
        return cls(**msgspec.structs.asdict(view))


class FeatureViewList(BaseModel):
    """The views by name."""

    object: Literal["list"] = "list"
    data: list[FeatureViewObject]


class FeatureViewDeleted(BaseModel):
    """A view that is gone, with all that was in it."""

    id: str
    object: Literal["feature_view.deleted"] = "feature_view.deleted"
    deleted: bool = True


class FeatureRowRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an entity's features were from a moment on."""

    entity: str | int
    """The entity's key."""
    event_time: str
    """From when on the values hold, in ISO 8601; without a time zone it is UTC."""
    values: dict[str, str | int | float | bool | None]
    """By the features' names; a feature that is left out, or null, is not known from then on."""
    created_time: str | None = None
    """When that was known, for what is loaded late; by default now."""


class FeatureRowsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rows of a view; all are taken or none."""

    rows: Annotated[list[FeatureRowRequest], msgspec.Meta(min_length=1, max_length=10_000)]


class FeatureRowsWritten(BaseModel):
    """What became of rows."""

    object: Literal["feature_rows"] = "feature_rows"
    added: int
    unchanged: int = Field(description="Rows that say what was on record already.")


class AskedEntity(Wire):
    """Whose features, and as of when."""

    entity: dict[FeatureName, EntityKey] = Field(max_length=16, description="Keys by the kind of entity.")
    at: Moment | None = Field(None, description="What was known then; by default now.")


class FeatureValuesRequest(Wire):
    """Features of some entities."""

    features: list[Annotated[str, Field(max_length=129)]] = Field(
        min_length=1, max_length=MAX_FEATURES, description="As `view:feature`."
    )
    rows: list[AskedEntity] = Field(min_length=1, max_length=MAX_ASKED)


class FeatureValueObject(BaseModel):
    """What a feature was."""

    feature: str
    value: Value | None
    state: Literal["read", "missing", "expired", "unavailable"] = Field(
        description="`missing`: nobody had said. `expired`: it was said, and holds no more."
    )
    event_at: datetime | None = Field(description="From when on it held.")
    created_at: datetime | None = Field(description="When that was known.")

    @classmethod
    def of(cls, feature: str, value: FeatureValue) -> "FeatureValueObject":
        """The value as it is shown."""
        times = [None if at is None else moment(at) for at in (value.event_at, value.created_at)]
        return cls(feature=feature, value=value.value, state=value.state, event_at=times[0], created_at=times[1])


class FeatureValuesRow(BaseModel):
    """The features of one row, in the order they were asked for."""

    values: list[FeatureValueObject]


class FeatureValuesResponse(BaseModel):
    """The rows in the order they were asked for."""

    object: Literal["list"] = "list"
    data: list[FeatureValuesRow]
