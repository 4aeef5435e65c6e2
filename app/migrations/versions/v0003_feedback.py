"""Make the tables of feedback and labels."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    row_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    id_ = sa.LargeBinary(16).with_variant(sa.Uuid(as_uuid=False), "postgresql")
    op.create_table(
        "feedback",
        sa.Column("row", row_number, nullable=False),
        sa.Column("id", id_, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("slot", sa.LargeBinary(16), nullable=False),
        sa.Column("prediction_id", id_),
        sa.Column("conversation", sa.Text()),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("category", sa.Text()),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("said_at", sa.BigInteger(), nullable=False),
        sa.Column("withdrawn", sa.Boolean(), nullable=False),
        sa.Column("rating", sa.Float(53)),
        sa.Column("rating_type", sa.Text()),
        sa.Column("digest", sa.LargeBinary(16), nullable=False),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("stamps", sa.Text(), nullable=False),
        sa.Column("said", sa.Text()),
        sa.Column("metadata", sa.Text()),
        sa.Column("comment", sa.Text()),
        sa.Column("correction", sa.Text()),
        sa.PrimaryKeyConstraint("row", name="pk_feedback"),
    )
    op.create_table(
        "labels",
        sa.Column("row", row_number, nullable=False),
        sa.Column("id", id_, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("slot", sa.LargeBinary(16), nullable=False),
        sa.Column("prediction_id", id_, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("said_at", sa.BigInteger(), nullable=False),
        sa.Column("withdrawn", sa.Boolean(), nullable=False),
        sa.Column("policy", sa.Text()),
        sa.Column("sampling_probability", sa.Float(53)),
        sa.Column("class", sa.Text()),
        sa.Column("digest", sa.LargeBinary(16), nullable=False),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("stamps", sa.Text(), nullable=False),
        sa.Column("said", sa.Text()),
        sa.Column("passages", sa.Text()),
        sa.Column("comment", sa.Text()),
        sa.Column("answer", sa.Text()),
        sa.PrimaryKeyConstraint("row", name="pk_labels"),
    )
    for table in ("feedback", "labels"):
        for columns in (("slot", "revision"), ("tenant", "id", "revision"), ("tenant", "idempotency_key")):
            op.create_index(f"ix_{table}_{'_'.join(columns)}", table, columns, unique=True)
        op.create_index(f"ix_{table}_tenant_prediction_id", table, ["tenant", "prediction_id"])
    op.create_index("ix_feedback_tenant_conversation", "feedback", ["tenant", "conversation"])


def downgrade() -> None:
    op.drop_table("labels")
    op.drop_table("feedback")
