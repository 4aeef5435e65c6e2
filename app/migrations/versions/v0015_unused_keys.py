"""Find by index what a subject's key has sealed, and let go of copies of embeddings whose content went before."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    is_sealed = sa.text("subject_key IS NOT NULL")
    op.create_index(
        "ix_predictions_subject_key",
        "predictions",
        ["subject_key"],
        sqlite_where=is_sealed,
        postgresql_where=is_sealed,
    )
    op.create_index("ix_feedback_tenant_author", "feedback", ["tenant", "author"])
    op.create_index("ix_labels_tenant_author", "labels", ["tenant", "author"])
    op.execute("DELETE FROM retention_positions WHERE name = 'content'")


def downgrade() -> None:
    op.drop_index("ix_labels_tenant_author", "labels")
    op.drop_index("ix_feedback_tenant_author", "feedback")
    op.drop_index("ix_predictions_subject_key", "predictions")
