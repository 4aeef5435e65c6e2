"""Datasets: built by a recipe from predictions and what was said of them, or imported from files; kept as versions.

The main rule: a version is never changed, and is named by the digest of its rows, which lineage verifies. A row is kept
once and belongs to a range of versions. What is trained on and what is measured by are different datasets, and a build
keeps them apart.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app.database import Database
from app.datasets.builder import Builder
from app.datasets.builds import Build, Builds
from app.datasets.changes import Change, Changes, Difference, Erased, Place
from app.datasets.exports import Exports, Format
from app.datasets.files import KINDS
from app.datasets.imports import MAX_FILES, Upload
from app.datasets.passages import Documents, DocumentTexts
from app.datasets.reading import Reading
from app.datasets.recipes import Kind, Purpose, Recipe, read_recipe
from app.datasets.store import Series, Store, Version
from app.predictions import History
from app.privacy.envelopes import Ring

__all__ = [
    "KINDS",
    "MAX_FILES",
    "Build",
    "Builder",
    "Builds",
    "Change",
    "Changes",
    "Datasets",
    "Difference",
    "Erased",
    "Exports",
    "Format",
    "Kind",
    "Place",
    "Purpose",
    "Recipe",
    "Series",
    "Store",
    "Upload",
    "Version",
    "open_datasets",
    "read_recipe",
]

REST = 1.0
"""Seconds of rest for each second of a build's work: answers go first."""


@dataclass(frozen=True, slots=True)
class Datasets:
    """The parts of datasets that routes call."""

    store: Store
    changes: Changes
    exports: Exports
    builds: Builds


@asynccontextmanager
async def open_datasets(
    database: Database,
    history: History,
    *,
    documents: Documents | None = None,
    ring: Ring | None = None,
    rest: float = REST,
) -> AsyncIterator[Datasets]:
    """Open the datasets of a database; `documents` is where passages' text is looked up, `ring` has the keys."""
    store = Store(database, ring=ring)
    passages = DocumentTexts(documents) if documents is not None else None
    builder = Builder(store, Reading(database, history, ring=ring), passages=passages, rest=rest)
    async with Builds(store, builder) as builds:
        yield Datasets(store=store, changes=Changes(store), exports=Exports(store), builds=builds)
