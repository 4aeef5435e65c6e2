"""The tables of drift, declared once for SQLite and PostgreSQL: what is compared, with what, and what was found."""

from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, Table, Text

from app.database.tables import Id, metadata

# How far the predictions were followed: one row. Whoever takes it further raises the revision he read.
drift_followed = Table(
    "drift_followed",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("position_id", Id, nullable=False),
)

# What one tenant asks of one release, as `name@3`. `open_window` is the window being filled, in MessagePack: numbers of
# rows and digests of sessions, no content. `recent` has the last p-values by kind, `alarms` what is wrong now: JSON.
drift_streams = Table(
    "drift_streams",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("release", Text, primary_key=True),
    # The version of the reference that `recent` was found with; 0 where none was used yet.
    Column("reference", Integer, nullable=False),
    Column("windows", Integer, nullable=False),
    Column("open_window", LargeBinary, nullable=False),
    Column("open_sessions", Integer, nullable=False),
    # Digests of the sessions of the last windows, eight bytes each.
    Column("earlier", LargeBinary, nullable=False),
    Column("recent", Text, nullable=False),
    Column("alarms", Text, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)

# What windows are compared with: never changed, only followed by a higher version.
drift_references = Table(
    "drift_references",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("release", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    # Where its questions are from: JSON.
    Column("source", Text, nullable=False),
    Column("sessions", Integer, nullable=False),
    Column("questions", Integer, nullable=False),
    Column("embedded", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
)

# The questions of a reference: the embedding as predictions have it, and what was answered in figures (JSON).
drift_reference_rows = Table(
    "drift_reference_rows",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("release", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("session", LargeBinary, nullable=False),
    Column("prediction_id", Id),
    Column("embedding", LargeBinary),
    Column("outputs", Text),
    Index("ix_drift_reference_rows_tenant_prediction_id", "tenant", "prediction_id"),
)

# A window that was compared. `inputs`, `outputs` and `clusters` are JSON: p-values, effects, and ids of predictions.
drift_windows = Table(
    "drift_windows",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("release", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("reference", Integer, nullable=False),
    Column("first_id", Id, nullable=False),
    Column("last_id", Id, nullable=False),
    Column("sessions", Integer, nullable=False),
    Column("questions", Integer, nullable=False),
    Column("level", Float(53), nullable=False),
    Column("inputs", Text),
    Column("outputs", Text),
    Column("clusters", Text, nullable=False),
    Column("judged_at", BigInteger, nullable=False),
)
