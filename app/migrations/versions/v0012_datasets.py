"""Make the tables of datasets that are built and kept here."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"

_id = sa.LargeBinary(16).with_variant(sa.Uuid(as_uuid=False), "postgresql")


def upgrade() -> None:
    op.create_table(
        "dataset_series",
        sa.Column("id", _id, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text()),
        sa.Column("build_id", _id),
        sa.Column("build_expires_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_dataset_series"),
    )
    op.create_index("ix_dataset_series_tenant_name", "dataset_series", ["tenant", "name"], unique=True)
    op.create_table(
        "dataset_versions",
        sa.Column("series_id", _id, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("report", sa.Text(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text()),
        sa.PrimaryKeyConstraint("series_id", "number", name="pk_dataset_versions"),
    )
    op.create_index("ix_dataset_versions_tenant_digest", "dataset_versions", ["tenant", "digest"])
    op.create_table(
        "dataset_tags",
        sa.Column("series_id", _id, nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_by", sa.Text()),
        sa.PrimaryKeyConstraint("series_id", "tag", name="pk_dataset_tags"),
    )
    op.create_table(
        "dataset_examples",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("content_digest", sa.Text(), nullable=False),
        sa.Column("prediction_id", _id),
        sa.Column("label_id", _id),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text()),
        sa.Column("erased_at", sa.BigInteger()),
        sa.Column("content", sa.Text()),
        sa.PrimaryKeyConstraint("tenant", "digest", name="pk_dataset_examples"),
        sqlite_with_rowid=False,
    )
    for column in ("prediction_id", "label_id", "subject"):
        op.create_index(f"ix_dataset_examples_tenant_{column}", "dataset_examples", ["tenant", column])
    op.create_index(
        "ix_dataset_examples_erased",
        "dataset_examples",
        ["tenant", "digest"],
        sqlite_where=sa.text("erased_at IS NOT NULL"),
        postgresql_where=sa.text("erased_at IS NOT NULL"),
    )
    op.create_table(
        "dataset_members",
        sa.Column("series_id", _id, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("v_from", sa.Integer(), nullable=False),
        sa.Column("v_to", sa.Integer()),
        sa.PrimaryKeyConstraint("series_id", "digest", "v_from", name="pk_dataset_members"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_dataset_members_series_id_v_from", "dataset_members", ["series_id", "v_from"])
    op.create_index("ix_dataset_members_series_id_v_to", "dataset_members", ["series_id", "v_to"])
    op.create_index("ix_dataset_members_digest", "dataset_members", ["digest"])
    op.create_table(
        "dataset_builds",
        sa.Column("id", _id, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("series_id", _id, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer()),
        sa.Column("report", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text()),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_dataset_builds"),
    )
    op.create_index("ix_dataset_builds_series_id", "dataset_builds", ["series_id", "id"])


def downgrade() -> None:
    for table in (
        "dataset_builds",
        "dataset_members",
        "dataset_examples",
        "dataset_tags",
        "dataset_versions",
        "dataset_series",
    ):
        op.drop_table(table)
