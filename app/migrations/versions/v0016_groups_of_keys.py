"""Let API keys be in groups, which documents may be for."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("groups", sa.Text(), nullable=False, server_default="[]"))
    # Other gateways read the keys again.
    op.execute("UPDATE key_ring SET version = version + 1")


def downgrade() -> None:
    with op.batch_alter_table("api_keys") as api_keys:
        api_keys.drop_column("groups")
