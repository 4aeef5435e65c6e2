"""Record with each prediction the class it gave, and whether it is what its release's task asks for."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    added: tuple[sa.Column[Any], ...] = (sa.Column("predicted_class", sa.Text()), sa.Column("valid", sa.Boolean()))
    if op.get_bind().dialect.name == "sqlite":
        # The table is made anew, so that these small facts stand before the large content.
        with op.batch_alter_table("predictions", recreate="always") as predictions:
            predictions.add_column(added[0], insert_after="verdict")
            predictions.add_column(added[1], insert_after="predicted_class")
    else:
        for column in added:
            op.add_column("predictions", column)


def downgrade() -> None:
    with op.batch_alter_table("predictions") as predictions:
        predictions.drop_column("valid")
        predictions.drop_column("predicted_class")
