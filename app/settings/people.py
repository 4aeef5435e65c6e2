"""Whom requests are about, and what is kept of what they said."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr

from app.privacy.names import Name
from app.privacy.policies import Level
from app.privacy.redaction import KINDS, Kind
from app.settings.forms import LongSecret, Section

Days = Annotated[float, Field(gt=0, le=36_500)]
"""A term of up to a hundred years, so that every moment that far back is one that there was."""


class UserSettings(Section):
    """For whom API keys act, as Open WebUI says of each request."""

    jwt_secret: LongSecret | None = Field(
        None,
        description="Open WebUI's FORWARD_USER_INFO_HEADER_JWT_SECRET; unset: `X-OpenWebUI-User-Jwt` is ignored.",
    )
    groups_header: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9-]{1,64}$",
        description="A header of the connection that Open WebUI fills with `{{USER_GROUPS}}` or `{{USER_GROUP_IDS}}`.",
    )


class FeatureSettings(Section):
    """Where the features are that releases name."""

    store: Literal["sql", "feast"] = Field("sql", description="The service's own database, or a Feast repository.")
    read_timeout_seconds: float = Field(0.25, gt=0, le=30, description="Longest wait of a request for its features.")
    feast_repo: Path | None = Field(None, description="The folder with Feast's `feature_store.yaml`.")
    feast_tenants: tuple[str, ...] = Field(
        ("default",), description="Tenants that Feast's features are for: it does not know of any itself."
    )
    feast_threads: int = Field(4, ge=1, le=64, description="Reads of Feast at once; one more finds the store away.")


class PrivacySettings(Section):
    """How much of what was said is kept, and how."""

    content: Level = Field(
        "full",
        description="`full` as it was said, `redacted` without personal data and secrets, `metadata` nothing of it.",
    )
    tenants: dict[str, Level] = Field({}, description="For tenants that are not to have `content`.")
    redact: tuple[Kind | Name, ...] = Field(
        KINDS,
        description="What is taken out of redacted content; `person` and `place` need the extra `presidio`.",
    )
    names_model: str = Field("en_core_web_sm", description="The spaCy model that finds names; its folder, or package.")
    share: float = Field(1.0, ge=0, le=1, description="Of conversations whose content is kept at all, by chance.")
    master_key: SecretStr | None = Field(
        None, description="Seals content, each subject's by a key of its own: `id:base64`, several with commas."
    )
    master_key_file: Path | None = Field(
        None, description="The same, a key a line; `hallmark privacy new-key` makes one."
    )
    pseudonyms: bool = Field(True, description="With a master key: users are kept by a keyed hash of their name.")
    content_days: Days | None = Field(None, description="How long what was said is kept; unset: for ever.")
    predictions_days: Days | None = Field(None, description="How long whole records of predictions are kept.")
    feedback_days: Days | None = Field(None, description="How long words of feedback and labels are kept.")
    embeddings_days: Days | None = Field(None, description="How long questions' embeddings are kept.")
    review_days: Days | None = Field(None, description="How long items of review queues are kept.")
    features_days: Days | None = Field(None, description="How long features are kept that newer ones replaced.")
