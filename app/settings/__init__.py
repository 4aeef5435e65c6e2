"""Everything that can be configured, in one frozen object: `HALLMARK_*` variables, then `hallmark.toml`, then defaults.

Only `app.main` and `app.cli` read it; every other part is handed the plain values it needs. The variables of the
OpenTelemetry SDK (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_SAMPLER`, ...) are read by that SDK itself.
"""

from app.settings.answering import EmbeddedSettings, EngineSettings, LimitSettings, ReleaseSettings
from app.settings.documents import IngestionSettings, QdrantSettings, RetrievalSettings
from app.settings.people import FeatureSettings, PrivacySettings, UserSettings
from app.settings.watching import AlertSettings, DriftSettings, TelemetrySettings
from app.settings.whole import Settings, misread_variables, unknown_variables

__all__ = [
    "AlertSettings",
    "DriftSettings",
    "EmbeddedSettings",
    "EngineSettings",
    "FeatureSettings",
    "IngestionSettings",
    "LimitSettings",
    "PrivacySettings",
    "QdrantSettings",
    "ReleaseSettings",
    "RetrievalSettings",
    "Settings",
    "TelemetrySettings",
    "UserSettings",
    "misread_variables",
    "unknown_variables",
]
