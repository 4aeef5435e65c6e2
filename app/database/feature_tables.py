"""The tables of the feature store, declared once for SQLite and PostgreSQL."""

from sqlalchemy import BigInteger, Column, Index, Integer, Table, Text

from app.database.tables import metadata

# What features there may be: those of one kind of entity, written together. Like releases they are the service's; only
# values belong to tenants. Which features and of which types is JSON.
feature_views = Table(
    "feature_views",
    metadata,
    Column("name", Text, primary_key=True),
    Column("entity", Text, nullable=False),
    Column("features", Text, nullable=False),
    Column("ttl_seconds", Integer),
    # Whose its entities are where they are people or conversations: by that they are erased.
    Column("subject", Text),
    Column("description", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
)

# What an entity's features were from one moment on, and when that was known. Rows are only ever added, so that what was
# known at any time can be told; a correction has the event's time and a later one at which it was known.
feature_values = Table(
    "feature_values",
    metadata,
    Column("row", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("view", Text, nullable=False),
    Column("entity", Text, nullable=False),
    Column("event_at", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    # JSON by the features' names, or an envelope that has it where content is sealed.
    Column("content", Text, nullable=False),
    Index("ix_feature_values_known", "tenant", "view", "entity", "event_at", "created_at", unique=True),
)
