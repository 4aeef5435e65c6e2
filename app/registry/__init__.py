"""The registry: every release ever made and the rollout of each name, in the database that all replicas share.

The main rule: requests are answered from `Registry.releases`, a copy in memory that follows the database within a
second and outlives it. Every change is one transaction that first raises the registry's version, which puts changes in
a row, and that writes its audit row beside what it changes.
"""

from app.registry.registry import SETTINGS, Registry, Vet
from app.registry.rows import (
    Change,
    Entry,
    Step,
    all_rollouts,
    change_rollout,
    entries,
    entry_of,
    is_release,
    raise_version,
)

__all__ = [
    "SETTINGS",
    "Change",
    "Entry",
    "Registry",
    "Step",
    "Vet",
    "all_rollouts",
    "change_rollout",
    "entries",
    "entry_of",
    "is_release",
    "raise_version",
]
