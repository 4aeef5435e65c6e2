"""The service's tables, how to reach them, and who may own them.

The tables are declared here once, and a database is brought to the current schema when it is opened. Several processes
may use one database; the data directory around it has one owner.
"""

from app.database.alert_tables import (
    alert_events,
    alert_notifications,
    alert_rounds,
    alert_rules,
    alert_silences,
    alerts,
    outboxes,
)
from app.database.dataset_tables import (
    dataset_builds,
    dataset_examples,
    dataset_members,
    dataset_series,
    dataset_tags,
    dataset_versions,
)
from app.database.drift_tables import (
    drift_followed,
    drift_reference_rows,
    drift_references,
    drift_streams,
    drift_windows,
)
from app.database.erasure_tables import erasures, retention_positions
from app.database.feature_tables import feature_values, feature_views
from app.database.migrating import SCHEMA_VERSION, MigrationFailed, SchemaTooNew, migrate
from app.database.ownership import (
    DataDirectoryBusy,
    DataDirectoryUnusable,
    exclusive,
    make_directory,
    own_directory,
)
from app.database.quality_tables import quality_reports
from app.database.review_tables import review_boosts, review_items, review_queues, reviews
from app.database.revisions import is_latest
from app.database.shared import Database
from app.database.sqlite import BUSY_SECONDS, CONNECT_ERRORS, connect, room_bytes, scrubbed, shorten_journal
from app.database.tables import (
    Id,
    api_keys,
    dataset_rows,
    datasets,
    feedback,
    followed,
    key_ring,
    labels,
    metadata,
    prediction_documents,
    predictions,
    registry,
    releases,
    rollout_changes,
    rollouts,
    subject_keys,
    training_runs,
)
from app.database.trial_tables import leases, trial_observations, trials

__all__ = [
    "BUSY_SECONDS",
    "CONNECT_ERRORS",
    "SCHEMA_VERSION",
    "DataDirectoryBusy",
    "DataDirectoryUnusable",
    "Database",
    "Id",
    "MigrationFailed",
    "SchemaTooNew",
    "alert_events",
    "alert_notifications",
    "alert_rounds",
    "alert_rules",
    "alert_silences",
    "alerts",
    "api_keys",
    "connect",
    "dataset_builds",
    "dataset_examples",
    "dataset_members",
    "dataset_rows",
    "dataset_series",
    "dataset_tags",
    "dataset_versions",
    "datasets",
    "drift_followed",
    "drift_reference_rows",
    "drift_references",
    "drift_streams",
    "drift_windows",
    "erasures",
    "exclusive",
    "feature_values",
    "feature_views",
    "feedback",
    "followed",
    "is_latest",
    "key_ring",
    "labels",
    "leases",
    "make_directory",
    "metadata",
    "migrate",
    "outboxes",
    "own_directory",
    "prediction_documents",
    "predictions",
    "quality_reports",
    "registry",
    "releases",
    "retention_positions",
    "review_boosts",
    "review_items",
    "review_queues",
    "reviews",
    "rollout_changes",
    "rollouts",
    "room_bytes",
    "scrubbed",
    "shorten_journal",
    "subject_keys",
    "training_runs",
    "trial_observations",
    "trials",
]
