"""Keep questions' embeddings with predictions, and make the tables of drift."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

_id = sa.LargeBinary(16).with_variant(sa.Uuid(as_uuid=False), "postgresql")


def upgrade() -> None:
    op.add_column("predictions", sa.Column("question_embedding", sa.LargeBinary()))
    op.create_table(
        "drift_followed",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("position_id", _id, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_drift_followed"),
    )
    op.create_table(
        "drift_streams",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("release", sa.Text(), nullable=False),
        sa.Column("reference", sa.Integer(), nullable=False),
        sa.Column("windows", sa.Integer(), nullable=False),
        sa.Column("open_window", sa.LargeBinary(), nullable=False),
        sa.Column("open_sessions", sa.Integer(), nullable=False),
        sa.Column("earlier", sa.LargeBinary(), nullable=False),
        sa.Column("recent", sa.Text(), nullable=False),
        sa.Column("alarms", sa.Text(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "release", name="pk_drift_streams"),
    )
    op.create_table(
        "drift_references",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("release", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("sessions", sa.Integer(), nullable=False),
        sa.Column("questions", sa.Integer(), nullable=False),
        sa.Column("embedded", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "release", "version", name="pk_drift_references"),
    )
    op.create_table(
        "drift_reference_rows",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("release", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("session", sa.LargeBinary(), nullable=False),
        sa.Column("prediction_id", _id),
        sa.Column("embedding", sa.LargeBinary()),
        sa.Column("outputs", sa.Text()),
        sa.PrimaryKeyConstraint("tenant", "release", "version", "number", name="pk_drift_reference_rows"),
    )
    op.create_index("ix_drift_reference_rows_tenant_prediction_id", "drift_reference_rows", ["tenant", "prediction_id"])
    op.create_table(
        "drift_windows",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("release", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("reference", sa.Integer(), nullable=False),
        sa.Column("first_id", _id, nullable=False),
        sa.Column("last_id", _id, nullable=False),
        sa.Column("sessions", sa.Integer(), nullable=False),
        sa.Column("questions", sa.Integer(), nullable=False),
        sa.Column("level", sa.Float(53), nullable=False),
        sa.Column("inputs", sa.Text()),
        sa.Column("outputs", sa.Text()),
        sa.Column("clusters", sa.Text(), nullable=False),
        sa.Column("judged_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "release", "number", name="pk_drift_windows"),
    )


def downgrade() -> None:
    for table in ("drift_windows", "drift_reference_rows", "drift_references", "drift_streams", "drift_followed"):
        op.drop_table(table)
    with op.batch_alter_table("predictions") as predictions:
        predictions.drop_column("question_embedding")
