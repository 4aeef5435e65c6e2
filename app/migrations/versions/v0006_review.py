"""Make the tables of the review queue."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_id = sa.LargeBinary(16).with_variant(sa.Uuid(as_uuid=False), "postgresql")


def upgrade() -> None:
    op.create_table(
        "review_queues",
        sa.Column("id", _id, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("rules", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_by", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger()),
        sa.Column("position_id", _id),
        sa.Column("feedback_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_review_queues"),
    )
    op.create_index("ix_review_queues_tenant_name", "review_queues", ["tenant", "name"], unique=True)
    op.create_table(
        "review_boosts",
        sa.Column("id", _id, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("queue_id", _id, nullable=False),
        sa.Column("rate", sa.Float(53), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("slice", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.Column("position", sa.BigInteger()),
        sa.Column("position_id", _id),
        sa.PrimaryKeyConstraint("id", name="pk_review_boosts"),
    )
    op.create_index("ix_review_boosts_queue_id", "review_boosts", ["queue_id"])
    op.create_table(
        "review_items",
        sa.Column("id", _id, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("queue_id", _id, nullable=False),
        sa.Column("prediction_id", _id, nullable=False),
        sa.Column("release_name", sa.Text()),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("probability", sa.Float(53)),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("wanted", sa.Integer(), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("skipped", sa.Integer(), nullable=False),
        sa.Column("risen", sa.Boolean(), nullable=False),
        sa.Column("gold_class", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_review_items"),
    )
    op.create_index(
        "ix_review_items_queue_id_prediction_id", "review_items", ["queue_id", "prediction_id"], unique=True
    )
    op.create_index("ix_review_items_queue_id_state", "review_items", ["queue_id", "state", "id"])
    op.create_index("ix_review_items_tenant_prediction_id", "review_items", ["tenant", "prediction_id"])
    op.create_index(
        "ix_review_items_risen",
        "review_items",
        ["id"],
        sqlite_where=sa.text("risen"),
        postgresql_where=sa.text("risen"),
    )
    op.create_table(
        "reviews",
        sa.Column("id", _id, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("queue_id", _id, nullable=False),
        sa.Column("item_id", _id, nullable=False),
        sa.Column("reviewer", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("leased_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger()),
        sa.Column("reason", sa.Text()),
        sa.Column("class", sa.Text()),
        sa.Column("label_id", _id),
        sa.Column("probability", sa.Float(53)),
        sa.PrimaryKeyConstraint("id", name="pk_reviews"),
    )
    op.create_index("ix_reviews_item_id", "reviews", ["item_id"])
    op.create_index("ix_reviews_queue_id_reviewer", "reviews", ["queue_id", "reviewer"])
    op.create_index("ix_reviews_queue_id_state", "reviews", ["queue_id", "state"])


def downgrade() -> None:
    for table in ("reviews", "review_items", "review_boosts", "review_queues"):
        op.drop_table(table)
