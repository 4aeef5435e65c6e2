"""The service's tables, declared once for SQLite and PostgreSQL; Alembic's migrations make them."""

from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    Uuid,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeEngine, UserDefinedType


class Id(TypeDecorator[str]):
    """An id, in Python always text: stored as those of the predictions are, so that the tables can be joined."""

    impl = LargeBinary(16)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """PostgreSQL has a type for it; in SQLite it is 16 bytes."""
        own = Uuid(as_uuid=False) if dialect.name == "postgresql" else LargeBinary(16)
        return dialect.type_descriptor(own)

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        """What the database is given."""
        if value is None or dialect.name == "postgresql":
            return value
        return bytes.fromhex(value.replace("-", ""))

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """What the database gave."""
        return value if value is None or dialect.name == "postgresql" else str(UUID(bytes=value))


class _PlainJson(UserDefinedType[str]):
    """PostgreSQL's JSON without SQLAlchemy's reading and writing of it."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "JSON"


class Json(TypeDecorator[str]):
    """JSON, in Python always its text: whoever reads it decides whether it need be parsed."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """SQLite would give a column of type JSON the affinity of a number."""
        return _PlainJson() if dialect.name == "postgresql" else dialect.type_descriptor(Text())


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite's rowid is the cheapest key there is: an id as primary key of its own costs twice the time for each row.
_row_number = BigInteger().with_variant(Integer(), "sqlite")

# Small facts stand before large content, so that counting and listing never read SQLite's overflow pages.
predictions = Table(
    "predictions",
    metadata,
    Column("row", _row_number, primary_key=True),
    Column("id", Id, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("key_id", Text),
    Column("user", Text),
    Column("conversation", Text),
    Column("model", Text),
    Column("release_name", Text),
    Column("release_digest", Text),
    Column("assignment", Text),
    Column("shadow_of", Text),
    Column("base_model", Text),
    Column("adapter", Text),
    Column("prompt_version", Text),
    Column("index_version", Text),
    Column("retrieval_mode", Text),
    Column("retrieval_outcome", Text),
    Column("stream", Boolean, nullable=False),
    Column("store", Boolean, nullable=False),
    Column("finish_reason", Text),
    Column("error_code", Text),
    Column("verdict", Text),
    Column("predicted_class", Text),
    Column("valid", Boolean),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("retrieve_seconds", Float),
    Column("queue_seconds", Float),
    Column("first_token_seconds", Float),
    Column("engine_seconds", Float),
    Column("total_seconds", Float),
    Column("trace_id", Text),
    Column("kept", Text),
    Column("subject_key", Text),
    # What figures need of content that may be sealed, made as it was written: see `app.predictions.derived`.
    Column("answer_characters", Integer),
    Column("declines", Boolean),
    Column("stuck", Boolean),
    Column("called_tools", Boolean),
    Column("question_digest", LargeBinary),
    Column("metadata", Json),
    Column("passages", Json),
    Column("citations", Json),
    Column("tool_calls", Json),
    Column("request", Json),
    Column("messages", Json),
    Column("question", Text),
    Column("answer", Text),
    # What `app.predictions.embeddings` packs: content like the question itself.
    Column("question_embedding", LargeBinary),
    # All that was said, in place of the columns it is from, where content is sealed: see `app.predictions.sealed`.
    Column("sealed", LargeBinary),
    # What the release's features were for this request, which is content like the prompt they stand in.
    Column("features", Json),
    # One index both keeps an id unique and lists a tenant's predictions by time.
    Index("ix_predictions_tenant_id", "tenant", "id", unique=True),
    # What a release has answered. Every index costs the log's one writer a twentieth of its time: this one is paid.
    Index("ix_predictions_tenant_release_digest", "tenant", "release_digest", "id"),
)
Index(
    "ix_predictions_tenant_conversation",
    predictions.c.tenant,
    predictions.c.conversation,
    predictions.c.id,
    postgresql_where=predictions.c.conversation.is_not(None),
).ddl_if(dialect="postgresql")
# Whether anything is left that a key opens; of rows that are not sealed it has none.
Index(
    "ix_predictions_subject_key",
    predictions.c.subject_key,
    sqlite_where=predictions.c.subject_key.is_not(None),
    postgresql_where=predictions.c.subject_key.is_not(None),
)
# At start the rows that a dead process left open are found without reading the table.
Index(
    "ix_predictions_open",
    predictions.c.row,
    sqlite_where=predictions.c.outcome == "open",
    postgresql_where=predictions.c.outcome == "open",
)

# The keys that sealed content of predictions is under, each wrapped by a master key. Where predictions are in a file of
# their own these are too (`app.privacy.subject_keys`), and this table is empty.
subject_keys = Table(
    "subject_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("master", Text, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    # Replicas that meet a subject at the same time make a key each.
    Index("ix_subject_keys_tenant_subject", "tenant", "subject"),
)

# Times are milliseconds since 1970 in UTC: the same integer in every database.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("secret_sha256", LargeBinary(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("scopes", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("last_used_at", BigInteger),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("priority", Text, nullable=False, server_default="normal"),
    # What the key may take of the service in a minute; without one, as much as there is.
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    # As JSON: whose documents the key sees beside those that are for all of its tenant.
    Column("groups", Text, nullable=False, server_default="[]"),
)

# One row. Every change of a key raises its version, which is how every process notices at the price of one row.
key_ring = Table(
    "key_ring",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", BigInteger, nullable=False),
)

# Which number a release's digest has under its name: given once, kept for ever.
releases = Table(
    "releases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("canonical", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text),
    # When it was found fit to serve; until then it answers nobody.
    Column("approved_at", BigInteger),
    # A release that is gone is kept all the same: predictions were made with it.
    Column("deleted_at", BigInteger),
    Index("ix_releases_name_digest", "name", "digest", unique=True),
)

# One row. Every change of releases and rollouts raises its version first: that puts the changes in a row, and tells
# every process that there is something new by the cheapest query there is.
registry = Table(
    "registry",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", BigInteger, nullable=False),
)

# The state is a Rollout as JSON, which is always read and written whole.
rollouts = Table(
    "rollouts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("state", Text, nullable=False),
)

rollout_changes = Table(
    "rollout_changes",
    metadata,
    Column("name", Text, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("before", Text),
    Column("after", Text, nullable=False),
)

# Feedback and labels are only ever appended to: a row is the state after one call, and the highest revision of an id is
# what holds now. A slot is whose it is and about what, as a digest; the row's number rises in the order of the commits.
feedback = Table(
    "feedback",
    metadata,
    Column("row", _row_number, primary_key=True),
    Column("id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("slot", LargeBinary(16), nullable=False),
    Column("prediction_id", Id),
    Column("conversation", Text),
    Column("source", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("category", Text),
    Column("key_id", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("said_at", BigInteger, nullable=False),
    Column("withdrawn", Boolean, nullable=False),
    Column("rating", Float(53)),
    Column("rating_type", Text),
    Column("digest", LargeBinary(16), nullable=False),
    Column("idempotency_key", Text),
    # By column, when what it holds was said: JSON.
    Column("stamps", Text, nullable=False),
    # What the call said, where that is not what the columns hold: JSON.
    Column("said", Text),
    Column("metadata", Text),
    Column("comment", Text),
    Column("correction", Text),
    Index("ix_feedback_slot_revision", "slot", "revision", unique=True),
    Index("ix_feedback_tenant_id_revision", "tenant", "id", "revision", unique=True),
    Index("ix_feedback_tenant_idempotency_key", "tenant", "idempotency_key", unique=True),
    Index("ix_feedback_tenant_prediction_id", "tenant", "prediction_id"),
    Index("ix_feedback_tenant_conversation", "tenant", "conversation"),
    Index("ix_feedback_tenant_author", "tenant", "author"),
)

labels = Table(
    "labels",
    metadata,
    Column("row", _row_number, primary_key=True),
    Column("id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("slot", LargeBinary(16), nullable=False),
    Column("prediction_id", Id, nullable=False),
    Column("source", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("said_at", BigInteger, nullable=False),
    Column("withdrawn", Boolean, nullable=False),
    # How the prediction came to be labelled, and how likely that was: without it no estimate from labels is right.
    Column("policy", Text),
    Column("sampling_probability", Float(53)),
    Column("class", Text),
    Column("digest", LargeBinary(16), nullable=False),
    Column("idempotency_key", Text),
    Column("stamps", Text, nullable=False),
    Column("said", Text),
    # A list of ids as JSON: empty where no passage is relevant, null where nothing is said of them.
    Column("passages", Text),
    Column("comment", Text),
    Column("answer", Text),
    Index("ix_labels_slot_revision", "slot", "revision", unique=True),
    Index("ix_labels_tenant_id_revision", "tenant", "id", "revision", unique=True),
    Index("ix_labels_tenant_idempotency_key", "tenant", "idempotency_key", unique=True),
    Index("ix_labels_tenant_prediction_id", "tenant", "prediction_id"),
    Index("ix_labels_tenant_author", "tenant", "author"),
)

# Which documents a prediction was given and cited, so that nobody has to read the predictions' JSON to find out.
prediction_documents = Table(
    "prediction_documents",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("document_id", Text, primary_key=True),
    Column("prediction_id", Id, primary_key=True),
    Column("document_version", Text, primary_key=True),
    Column("cited", Boolean, nullable=False),
    sqlite_with_rowid=False,
)

# How far `prediction_documents` has followed predictions that are in the same database: the last row looked at, whose
# it was, and the rows before it that were still open.
followed = Table(
    "followed",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("row", BigInteger, nullable=False),
    Column("prediction_id", Id),
    Column("still_open", Text, nullable=False),
)

# What a model was trained on. A row of a dataset is named by the digest of its content and its origin, the dataset by
# that of its rows.
datasets = Table(
    "datasets",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("manifest", Text, nullable=False),
    Column("manifest_digest", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text),
    Index("ix_datasets_tenant_name", "tenant", "name", "version", unique=True),
)

dataset_rows = Table(
    "dataset_rows",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("dataset_digest", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("content_digest", Text, nullable=False),
    Column("prediction_id", Id),
    Column("label_id", Id),
    Index("ix_dataset_rows_tenant_digest", "tenant", "digest"),
    Index("ix_dataset_rows_tenant_prediction_id", "tenant", "prediction_id"),
    sqlite_with_rowid=False,
)

training_runs = Table(
    "training_runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("adapter_digest", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("base_revision", Text),
    Column("dataset_digest", Text),
    Column("manifest", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text),
    Index("ix_training_runs_adapter_digest", "adapter_digest"),
    Index("ix_training_runs_dataset_digest", "dataset_digest"),
)
