"""How it is watched whether answers get worse, and who is told."""

from typing import Literal

from pydantic import Field, SecretStr

from app.settings.forms import Section


class TelemetrySettings(Section):
    """What telemetry says beyond what OpenTelemetry's own variables (`OTEL_*`) decide."""

    genai_profile: Literal["1.37", "genai-0.1", "both"] = Field(
        "1.37",
        description="Whose names the GenAI signals have: those of 1.37 to 1.41, those of the conventions' own "
        "repository, or both while dashboards move.",
    )
    keep_failures: bool = Field(
        True, description="Export requests that failed although the sampler left them out, as those of a canary are."
    )


class AlertSettings(Section):
    """Who is told when a release gets worse; read by the worker."""

    webhook_url: SecretStr | None = Field(None, description="Where alerts are sent; unset: they are in the log alone.")
    webhook_secret: SecretStr | None = Field(
        None, description="What they are signed with: `whsec_` and Base64; `hallmark alerts secret` makes one."
    )
    webhook_allow: tuple[str, ...] = Field(
        (), description="Hosts and networks the webhook may lead to although they are not public, or not https."
    )
    webhook_timeout_seconds: float = Field(10.0, gt=0, le=60)
    every_seconds: float = Field(30.0, gt=0, description="From one look at all rules to the next.")


class DriftSettings(Section):
    """How `hallmark worker` looks for drift."""

    reference_sessions: int = Field(
        1_000, ge=400, le=4_000, description="First sessions of a release that later ones are compared with."
    )
    window_sessions: int = Field(500, ge=200, le=4_000, description="Distinct sessions of a window.")
    false_alarms: float = Field(
        1.0, gt=0, le=1_000, description="False alarms in 90 days that a tenant puts up with, over all its releases."
    )
    label_rate: float = Field(
        0.2, ge=0, le=1, description="Share of a drifted release's answers that its review queues take; 0 raises none."
    )
    label_days: float = Field(7.0, gt=0, le=365, description="How long they do.")
    embed_questions: bool = Field(
        False, description="Have the worker embed kept questions that were searched for nothing: it loads the embedder."
    )
