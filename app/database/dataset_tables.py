"""The tables of datasets that are built and kept here, declared once for SQLite and PostgreSQL.

A row of a dataset is kept once, under its digest, and belongs to a range of its dataset's versions: so a version costs
what has changed, and the difference of two is found by the ends of the ranges.
"""

from sqlalchemy import BigInteger, Column, Index, Integer, Table, Text

from app.database.tables import Id, metadata

# A dataset's name. `revision` is its newest version; what is written of a later one does not count until it is raised.
# Whoever writes the next version says so here, and until when unless he says so again.
dataset_series = Table(
    "dataset_series",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text),
    Column("build_id", Id),
    Column("build_expires_at", BigInteger),
    Index("ix_dataset_series_tenant_name", "tenant", "name", unique=True),
)

dataset_versions = Table(
    "dataset_versions",
    metadata,
    Column("series_id", Id, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("rows", Integer, nullable=False),
    # What the steps of the build kept and dropped: JSON.
    Column("report", Text, nullable=False),
    # As lineage has it, and as every export of the version says it.
    Column("manifest", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text),
    Index("ix_dataset_versions_tenant_digest", "tenant", "digest"),
)

# A name for a version that may be moved to another.
dataset_tags = Table(
    "dataset_tags",
    metadata,
    Column("series_id", Id, primary_key=True),
    Column("tag", Text, primary_key=True),
    Column("number", Integer, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("updated_by", Text),
)

# The rows. One whose content was erased keeps its digests and its origin, so that whatever holds it can still be
# verified, and says so.
dataset_examples = Table(
    "dataset_examples",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("content_digest", Text, nullable=False),
    Column("prediction_id", Id),
    Column("label_id", Id),
    Column("split", Text, nullable=False),
    # Whose words they are, where somebody was named.
    Column("subject", Text),
    Column("erased_at", BigInteger),
    # Canonical JSON.
    Column("content", Text),
    Index("ix_dataset_examples_tenant_prediction_id", "tenant", "prediction_id"),
    Index("ix_dataset_examples_tenant_label_id", "tenant", "label_id"),
    Index("ix_dataset_examples_tenant_subject", "tenant", "subject"),
    sqlite_with_rowid=False,
)
Index(
    "ix_dataset_examples_erased",
    dataset_examples.c.tenant,
    dataset_examples.c.digest,
    sqlite_where=dataset_examples.c.erased_at.is_not(None),
    postgresql_where=dataset_examples.c.erased_at.is_not(None),
)

# From which version on a row belongs to a dataset, and from which on no more; a row may come again.
dataset_members = Table(
    "dataset_members",
    metadata,
    Column("series_id", Id, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("v_from", Integer, primary_key=True),
    Column("v_to", Integer),
    Index("ix_dataset_members_series_id_v_from", "series_id", "v_from"),
    Index("ix_dataset_members_series_id_v_to", "series_id", "v_to"),
    Index("ix_dataset_members_digest", "digest"),
    sqlite_with_rowid=False,
)

# What became of each build, and how far it is.
dataset_builds = Table(
    "dataset_builds",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("series_id", Id, nullable=False),
    Column("state", Text, nullable=False),
    Column("step", Text, nullable=False),
    # The recipe as it was given: JSON.
    Column("recipe", Text, nullable=False),
    Column("version", Integer),
    Column("report", Text),
    # Code, message and field: JSON.
    Column("error", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text),
    Column("expires_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Index("ix_dataset_builds_series_id", "series_id", "id"),
)
