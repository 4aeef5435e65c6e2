"""Make the tables of rollouts and their changes, and record with each prediction why its release answered."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "registry",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_registry"),
    )
    op.execute("INSERT INTO registry (id, version) VALUES (1, 1)")
    for column in (
        sa.Column("created_by", sa.Text()),
        sa.Column("approved_at", sa.BigInteger()),
        sa.Column("deleted_at", sa.BigInteger()),
    ):
        op.add_column("releases", column)
    op.create_table(
        "rollouts",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_rollouts"),
    )
    op.create_table(
        "rollout_changes",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("before", sa.Text()),
        sa.Column("after", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", "revision", name="pk_rollout_changes"),
    )
    added = (sa.Column("assignment", sa.Text()), sa.Column("shadow_of", sa.Text()))
    if op.get_bind().dialect.name == "sqlite":
        # The table is made anew, so that these small facts stand before the large content.
        with op.batch_alter_table("predictions", recreate="always") as predictions:
            predictions.add_column(added[0], insert_after="release_digest")
            predictions.add_column(added[1], insert_after="assignment")
    else:
        for column in added:
            op.add_column("predictions", column)


def downgrade() -> None:
    with op.batch_alter_table("predictions") as predictions:
        predictions.drop_column("shadow_of")
        predictions.drop_column("assignment")
    op.drop_table("rollout_changes")
    op.drop_table("rollouts")
    for column in ("deleted_at", "approved_at", "created_by"):
        op.drop_column("releases", column)
    op.drop_table("registry")
