"""Give API keys a priority and limits, and tell of their changes by a version."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    for column in (
        sa.Column("priority", sa.Text(), nullable=False, server_default="normal"),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("tokens_per_minute", sa.Integer()),
    ):
        op.add_column("api_keys", column)
    op.create_table(
        "key_ring",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_key_ring"),
    )
    op.execute("INSERT INTO key_ring (id, version) VALUES (1, 1)")


def downgrade() -> None:
    op.drop_table("key_ring")
    with op.batch_alter_table("api_keys") as api_keys:
        for column in ("tokens_per_minute", "requests_per_minute", "priority"):
            api_keys.drop_column(column)
