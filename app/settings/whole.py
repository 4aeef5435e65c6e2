"""The whole configuration of one process, and what looks like a variable of it and is none."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from app.settings.answering import EmbeddedSettings, EngineSettings, LimitSettings, ReleaseSettings
from app.settings.documents import IngestionSettings, QdrantSettings, RetrievalSettings
from app.settings.forms import DatabaseUrl, GroupName, HttpUrl, Origin, Section
from app.settings.people import FeatureSettings, PrivacySettings, UserSettings
from app.settings.watching import AlertSettings, DriftSettings, TelemetrySettings


class Settings(BaseSettings):
    """The whole configuration of one process."""

    model_config = SettingsConfigDict(
        env_prefix="HALLMARK_",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        toml_file="hallmark.toml",
        frozen=True,
        extra="forbid",
    )

    data_dir: Path = Field(Path(".hallmark"), description="Everything kept on disk: records, keys, documents, index.")
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8080, ge=0, le=65535)
    public_url: HttpUrl | None = Field(
        None, description="How clients reach the service; citation links start with it. Default: the request's Host."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "text"] = Field("auto", description="`auto` is text on a terminal, else JSON.")
    database_url: DatabaseUrl | None = Field(
        None, description="The database that several replicas share, postgresql://...; unset: SQLite in `data_dir`."
    )
    record: Literal["required", "best_effort"] = Field(
        "required", description="`required`: an answer that cannot be recorded is not given."
    )
    open_metrics: bool = Field(False, description="Serve `/metrics` without a key.")
    cors_origins: tuple[Origin, ...] = Field(
        (), description="Web pages that may call the API from a browser, by origin; `*` is any."
    )

    engine: EngineSettings = EngineSettings()
    engines: dict[GroupName, EngineSettings] = Field(
        {}, description="Further engine groups, which releases name as their `engine`: `[engines.big]` in the file."
    )
    embedded: EmbeddedSettings = EmbeddedSettings()
    qdrant: QdrantSettings = QdrantSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    ingestion: IngestionSettings = IngestionSettings()
    release: ReleaseSettings = ReleaseSettings()
    drift: DriftSettings = DriftSettings()
    features: FeatureSettings = FeatureSettings()
    limits: LimitSettings = LimitSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    users: UserSettings = UserSettings()
    privacy: PrivacySettings = PrivacySettings()
    alerts: AlertSettings = AlertSettings()

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.main_engine in self.engines:
            raise ValueError(f"engines.{self.main_engine}: `[engine]` goes by this name already; choose another")
        for name, group in self.engines.items():
            if not group.members:
                raise ValueError(f"engines.{name}.urls: name at least one engine")
        return self

    @property
    def main_adapter_folder(self) -> Path | None:
        """Where the main engine's adapters lie on this machine."""
        own = self.data_dir / "adapters" if self.embedded.enabled else None
        return self.engine.adapter_folder or own

    @property
    def main_engine(self) -> str:
        """What releases call the group `[engine]`, or the embedded engine in its place."""
        return "embedded" if self.embedded.enabled else self.engine.dialect

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings passes it by name.
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise.
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment before the file, so that one run can override it."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


_NOT_SETTINGS = frozenset({"HALLMARK_URL", "HALLMARK_API_KEY"})
"""What the command line reads as a client."""


def misread_variables(error: ValueError) -> Iterator[tuple[str, str]]:
    """Give each variable that is no JSON, as this error of the settings says, with an example of what it takes."""
    text = getattr(error.__cause__, "doc", None)
    examples = {
        f"HALLMARK_{name}".upper(): f'{{"name": "value"}}; HALLMARK_{name.upper()}_NAME is one setting of it'
        for name, field in Settings.model_fields.items()
        if isinstance(field.default, Section)
    }
    for variable, field in _variables().items():
        kind = str(field.annotation)
        if kind.startswith(("tuple[", "dict[")):
            examples[variable] = '["first", "second"]' if kind.startswith("tuple[") else '{"name": "value"}'
    for variable, value in sorted(os.environ.items()):  # noqa: TID251 - as below.
        if value == text and variable.upper() in examples:
            yield variable, examples[variable.upper()]


def _variables() -> dict[str, FieldInfo]:
    """Each variable that is one setting."""
    found: dict[str, FieldInfo] = {}
    for name, field in Settings.model_fields.items():
        inner = type(field.default).model_fields if isinstance(field.default, Section) else {}
        found |= {f"HALLMARK_{name}_{each}".upper(): of for each, of in inner.items()}
        if not inner:
            found[f"HALLMARK_{name}".upper()] = field
    return found


def unknown_variables() -> Iterator[tuple[str, str | None]]:
    """Give each variable of the environment that looks like a setting and is none, with the one that may be meant."""
    known = _NOT_SETTINGS | _variables().keys()
    for variable in sorted(os.environ):  # noqa: TID251 - this module is where the environment is read.
        is_group = variable.startswith("HALLMARK_ENGINES_")  # One of them, as JSON.
        if variable.startswith("HALLMARK_") and variable not in known and not is_group:
            near = get_close_matches(variable[9:], [name[9:] for name in known], n=1, cutoff=0.7)
            yield variable, f"HALLMARK_{near[0]}" if near else None
