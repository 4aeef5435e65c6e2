"""Make the tables of canaries' trials and of the work that workers share."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_id = sa.LargeBinary(16).with_variant(sa.Uuid(as_uuid=False), "postgresql")


def upgrade() -> None:
    op.create_table(
        "trials",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("stable", sa.Integer(), nullable=False),
        sa.Column("canary", sa.Integer(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("observations", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger()),
        sa.Column("position_id", _id),
        sa.Column("feedback_position", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("heard_at", sa.BigInteger(), nullable=False),
        sa.Column("alarm", sa.Text()),
        sa.Column("decision", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_trials"),
    )
    op.create_index("ix_trials_name_started_at", "trials", ["name", "started_at"])
    op.create_table(
        "trial_observations",
        sa.Column("trial", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("session", sa.LargeBinary(16), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("prediction_id", _id, nullable=False),
        sa.Column("badness", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("trial", "number", name="pk_trial_observations"),
    )
    op.create_index(
        "ix_trial_observations_trial_kind_session", "trial_observations", ["trial", "kind", "session"], unique=True
    )
    op.create_table(
        "leases",
        sa.Column("work", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("work", name="pk_leases"),
    )


def downgrade() -> None:
    for table in ("leases", "trial_observations", "trials"):
        op.drop_table(table)
