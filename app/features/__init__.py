"""Features: facts of those whom requests are about, for the prompt of now and the training rows of then.

The main rule: what a model is trained on was known when it says it was. So a store is asked for a moment, and what a
prompt was given is on the prediction's record.
"""

from app.features.features import Features
from app.features.reading import Asker, FeatureReader, shown
from app.features.sql import Put, SqlFeatures
from app.features.store import FeatureStore, FeatureValue, Point
from app.features.views import BadRow, FeatureRow, FeatureView, rows_of

__all__ = [
    "Asker",
    "BadRow",
    "FeatureReader",
    "FeatureRow",
    "FeatureStore",
    "FeatureValue",
    "FeatureView",
    "Features",
    "Point",
    "Put",
    "SqlFeatures",
    "rows_of",
    "shown",
]
