"""The table of what is computed of quality, declared once for SQLite and PostgreSQL."""

from sqlalchemy import BigInteger, Column, Table, Text

from app.database.tables import metadata

# The last report of each kind, as JSON behind the times that are asked for often: when it was computed, and when the
# next is due.
quality_reports = Table(
    "quality_reports",
    metadata,
    Column("name", Text, primary_key=True),
    Column("computed_at", BigInteger, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("report", Text, nullable=False),
)
