"""Make the tables of datasets, training runs and documents used, and find predictions by their release."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_id = sa.LargeBinary(16).with_variant(sa.Uuid(as_uuid=False), "postgresql")


def upgrade() -> None:
    op.create_table(
        "prediction_documents",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("document_id", sa.Text(), nullable=False),
        sa.Column("prediction_id", _id, nullable=False),
        sa.Column("document_version", sa.Text(), nullable=False),
        sa.Column("cited", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint(
            "tenant", "document_id", "prediction_id", "document_version", name="pk_prediction_documents"
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "followed",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("row", sa.BigInteger(), nullable=False),
        sa.Column("prediction_id", _id),
        sa.Column("still_open", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_followed"),
    )
    op.execute("INSERT INTO followed (id, \"row\", still_open) VALUES (1, 0, '[]')")
    op.create_table(
        "datasets",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("manifest_digest", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text()),
        sa.PrimaryKeyConstraint("tenant", "digest", name="pk_datasets"),
    )
    op.create_index("ix_datasets_tenant_name", "datasets", ["tenant", "name", "version"], unique=True)
    op.create_table(
        "dataset_rows",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("dataset_digest", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("content_digest", sa.Text(), nullable=False),
        sa.Column("prediction_id", _id),
        sa.Column("label_id", _id),
        sa.PrimaryKeyConstraint("tenant", "dataset_digest", "digest", name="pk_dataset_rows"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_dataset_rows_tenant_digest", "dataset_rows", ["tenant", "digest"])
    op.create_index("ix_dataset_rows_tenant_prediction_id", "dataset_rows", ["tenant", "prediction_id"])
    op.create_table(
        "training_runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("adapter_digest", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("base_revision", sa.Text()),
        sa.Column("dataset_digest", sa.Text()),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_training_runs"),
    )
    op.create_index("ix_training_runs_adapter_digest", "training_runs", ["adapter_digest"])
    op.create_index("ix_training_runs_dataset_digest", "training_runs", ["dataset_digest"])
    op.create_index("ix_predictions_tenant_release_digest", "predictions", ["tenant", "release_digest", "id"])
    if op.get_bind().dialect.name == "postgresql":
        op.create_index(
            "ix_predictions_tenant_conversation",
            "predictions",
            ["tenant", "conversation", "id"],
            postgresql_where=sa.text("conversation IS NOT NULL"),
        )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_predictions_tenant_conversation", "predictions")
    op.drop_index("ix_predictions_tenant_release_digest", "predictions")
    for table in ("training_runs", "dataset_rows", "datasets", "followed", "prediction_documents"):
        op.drop_table(table)
