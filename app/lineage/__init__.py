"""Lineage both ways: from a prediction to all that it was made of, and from each of these to the predictions.

The main rule: nothing is believed. Every digest on the way is computed again from what it stands for, and each link of
the answer says whether that held, or what differs.
"""

from app.lineage.links import DatasetLink, DatasetPage, RowLink, Trace
from app.lineage.provenance import Dataset, DatasetRow, Provenance, TrainingRun, canonical, dataset_digest, row_digest
from app.lineage.tracing import Tracer
from app.lineage.uses import Used, UsedBy, Uses

__all__ = [
    "Dataset",
    "DatasetLink",
    "DatasetPage",
    "DatasetRow",
    "Provenance",
    "RowLink",
    "Trace",
    "Tracer",
    "TrainingRun",
    "Used",
    "UsedBy",
    "Uses",
    "canonical",
    "dataset_digest",
    "row_digest",
]
