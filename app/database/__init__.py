"""The service's tables, how to reach them, and who may own them.

The tables are declared here once, and a database is brought to the current schema when it is opened. Several processes
may use one database; the data directory around it has one owner.
"""

from app.database.migrating import SCHEMA_VERSION, MigrationFailed, SchemaTooNew, migrate
from app.database.ownership import DataDirectoryBusy, exclusive, own_directory
from app.database.shared import Database
from app.database.sqlite import BUSY_SECONDS, CONNECT_ERRORS, connect
from app.database.tables import (
    Id,
    api_keys,
    feedback,
    labels,
    metadata,
    predictions,
    registry,
    releases,
    rollout_changes,
    rollouts,
)

__all__ = [
    "BUSY_SECONDS",
    "CONNECT_ERRORS",
    "SCHEMA_VERSION",
    "DataDirectoryBusy",
    "Database",
    "Id",
    "MigrationFailed",
    "SchemaTooNew",
    "api_keys",
    "connect",
    "exclusive",
    "feedback",
    "labels",
    "metadata",
    "migrate",
    "own_directory",
    "predictions",
    "registry",
    "releases",
    "rollout_changes",
    "rollouts",
]
