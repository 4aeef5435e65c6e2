"""Make room for sealed content and the keys it is under, and record how much of what was said is kept."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"

_id = sa.LargeBinary(16).with_variant(sa.Uuid(as_uuid=False), "postgresql")


def upgrade() -> None:
    small: tuple[sa.Column[Any], ...] = (
        sa.Column("kept", sa.Text()),
        sa.Column("subject_key", sa.Text()),
        sa.Column("answer_characters", sa.Integer()),
        sa.Column("declines", sa.Boolean()),
        sa.Column("stuck", sa.Boolean()),
        sa.Column("called_tools", sa.Boolean()),
        sa.Column("question_digest", sa.LargeBinary()),
    )
    sealed: sa.Column[Any] = sa.Column("sealed", sa.LargeBinary())
    if op.get_bind().dialect.name == "sqlite":
        # The table is made anew, so that these small facts stand before the large content.
        with op.batch_alter_table("predictions", recreate="always") as predictions:
            for before, column in zip(("trace_id", *(each.name for each in small)), small, strict=False):
                predictions.add_column(column, insert_after=before)
            predictions.add_column(sealed)
    else:
        for column in (*small, sealed):
            op.add_column("predictions", column)
    op.create_table(
        "subject_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("master", sa.Text(), nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_subject_keys"),
    )
    op.create_index("ix_subject_keys_tenant_subject", "subject_keys", ["tenant", "subject"])
    op.create_table(
        "erasures",
        sa.Column("id", _id, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("names", sa.Text()),
        sa.Column("digests", sa.Text(), nullable=False),
        sa.Column("requested_at", sa.BigInteger(), nullable=False),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.BigInteger()),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("found", sa.Integer(), nullable=False),
        sa.Column("counts", sa.Text(), nullable=False),
        sa.Column("datasets", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
    )
    op.create_index("ix_erasures_tenant_id", "erasures", ["tenant", "id"])
    op.create_index("ix_erasures_state", "erasures", ["state"])
    op.create_table(
        "retention_positions",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_retention_positions"),
    )


def downgrade() -> None:
    op.drop_table("retention_positions")
    op.drop_table("erasures")
    op.drop_table("subject_keys")
    with op.batch_alter_table("predictions") as predictions:
        for name in (
            "sealed",
            "question_digest",
            "called_tools",
            "stuck",
            "declines",
            "answer_characters",
            "subject_key",
            "kept",
        ):
            predictions.drop_column(name)
