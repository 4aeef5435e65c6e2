"""The tables of erasures and retention, declared once for SQLite and PostgreSQL."""

from sqlalchemy import BigInteger, Column, Index, Integer, Table, Text

from app.database.tables import Id, metadata

# What was to be erased, and how far that is. `names` are those that the subject was kept by, as JSON, and are gone when
# it is done; `digests` of them stay, so that copies which turn up later are known. Counts and datasets are JSON.
erasures = Table(
    "erasures",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("names", Text),
    Column("digests", Text, nullable=False),
    Column("requested_at", BigInteger, nullable=False),
    Column("requested_by", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("finished_at", BigInteger),
    # The last row of the predictions that was looked at, and how many were found since the first.
    Column("position", BigInteger, nullable=False),
    Column("found", Integer, nullable=False),
    Column("counts", Text, nullable=False),
    Column("datasets", Text, nullable=False),
    Index("ix_erasures_tenant_id", "tenant", "id"),
    Index("ix_erasures_state", "state"),
)

# How far each class of data was let go of: the last row, by its number or id.
retention_positions = Table(
    "retention_positions",
    metadata,
    Column("name", Text, primary_key=True),
    Column("position", Text, nullable=False),
)
