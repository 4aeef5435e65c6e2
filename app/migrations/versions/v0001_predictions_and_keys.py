"""Make the tables of predictions, API keys and releases."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# A migration is frozen: it says again what the tables were then, whatever app.database says later.
_row_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_id = sa.LargeBinary(16).with_variant(sa.Uuid(as_uuid=False), "postgresql")
_json = sa.Text().with_variant(sa.JSON(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "predictions",
        sa.Column("row", _row_number, nullable=False),
        sa.Column("id", _id, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text()),
        sa.Column("user", sa.Text()),
        sa.Column("conversation", sa.Text()),
        sa.Column("model", sa.Text()),
        sa.Column("release_name", sa.Text()),
        sa.Column("release_digest", sa.Text()),
        sa.Column("base_model", sa.Text()),
        sa.Column("adapter", sa.Text()),
        sa.Column("prompt_version", sa.Text()),
        sa.Column("index_version", sa.Text()),
        sa.Column("retrieval_mode", sa.Text()),
        sa.Column("retrieval_outcome", sa.Text()),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("store", sa.Boolean(), nullable=False),
        sa.Column("finish_reason", sa.Text()),
        sa.Column("error_code", sa.Text()),
        sa.Column("verdict", sa.Text()),
        sa.Column("prompt_tokens", sa.Integer()),
        sa.Column("completion_tokens", sa.Integer()),
        sa.Column("retrieve_seconds", sa.Float()),
        sa.Column("queue_seconds", sa.Float()),
        sa.Column("first_token_seconds", sa.Float()),
        sa.Column("engine_seconds", sa.Float()),
        sa.Column("total_seconds", sa.Float()),
        sa.Column("trace_id", sa.Text()),
        sa.Column("metadata", _json),
        sa.Column("passages", _json),
        sa.Column("citations", _json),
        sa.Column("tool_calls", _json),
        sa.Column("request", _json),
        sa.Column("messages", _json),
        sa.Column("question", sa.Text()),
        sa.Column("answer", sa.Text()),
        sa.PrimaryKeyConstraint("row", name="pk_predictions"),
    )
    op.create_index("ix_predictions_tenant_id", "predictions", ["tenant", "id"], unique=True)
    is_open = sa.text("outcome = 'open'")
    op.create_index("ix_predictions_open", "predictions", ["row"], sqlite_where=is_open, postgresql_where=is_open)
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_used_at", sa.BigInteger()),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_table(
        "releases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("canonical", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "number", name="pk_releases"),
    )
    op.create_index("ix_releases_name_digest", "releases", ["name", "digest"], unique=True)


def downgrade() -> None:
    op.drop_table("releases")
    op.drop_table("api_keys")
    op.drop_table("predictions")
