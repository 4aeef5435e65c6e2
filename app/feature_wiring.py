"""How the feature settings become parts: the store, and what reads it for prompts."""

from collections.abc import Callable
from contextlib import AsyncExitStack

from app.database import Database
from app.features import FeatureReader, Features, SqlFeatures
from app.privacy.envelopes import Ring
from app.settings import FeatureSettings


class BadFeatures(ValueError):
    """The feature settings cannot be used as they are."""


async def open_features(
    settings: FeatureSettings,
    database: Database,
    clock: Callable[[], int],
    parts: AsyncExitStack,
    *,
    ring: Ring | None = None,
    pseudonym: Callable[[str, str], str] | None = None,
) -> Features:
    """Open the store that the settings name.

    Raises:
        BadFeatures: names the setting.
    """
    seconds = settings.read_timeout_seconds
    if settings.store == "sql":
        sql = SqlFeatures(database, clock, ring=ring, pseudonym=pseudonym)
        return Features(sql, FeatureReader(sql, timeout_seconds=seconds), clock, sql)
    if settings.feast_repo is None:
        raise BadFeatures("`features.feast_repo` is missing: name the folder with Feast's `feature_store.yaml`.")
    from app.features.feast import CannotUseFeast, FeastFeatures  # Feast is seconds of import, and mostly not there.

    try:
        feast = FeastFeatures(settings.feast_repo, tenants=settings.feast_tenants, threads=settings.feast_threads)
        await parts.enter_async_context(feast)
    except CannotUseFeast as error:
        raise BadFeatures(f"`features.store`: {error}") from error
    return Features(feast, FeatureReader(feast, timeout_seconds=seconds), clock)
