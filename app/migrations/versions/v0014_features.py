"""Make the tables of the feature store, and record the features that were in a prompt."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"

_json = sa.Text().with_variant(sa.JSON(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "feature_views",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("entity", sa.Text(), nullable=False),
        sa.Column("features", sa.Text(), nullable=False),
        sa.Column("ttl_seconds", sa.Integer()),
        sa.Column("subject", sa.Text()),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_feature_views"),
    )
    op.create_table(
        "feature_values",
        sa.Column("row", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("view", sa.Text(), nullable=False),
        sa.Column("entity", sa.Text(), nullable=False),
        sa.Column("event_at", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("row", name="pk_feature_values"),
    )
    op.create_index(
        "ix_feature_values_known",
        "feature_values",
        ["tenant", "view", "entity", "event_at", "created_at"],
        unique=True,
    )
    # At the end, where a column costs nothing to add.
    op.add_column("predictions", sa.Column("features", _json))


def downgrade() -> None:
    with op.batch_alter_table("predictions") as predictions:
        predictions.drop_column("features")
    op.drop_table("feature_values")
    op.drop_table("feature_views")
