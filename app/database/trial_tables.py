"""The tables of canaries' trials and of the work that workers share, declared once for SQLite and PostgreSQL."""

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Table, Text

from app.database.tables import Id, metadata

# A canary's trial, by the seed of its rollout. `state` is all that its guards know, as JSON, and `position` the last
# row of the predictions that they know of, with the prediction there; `feedback_position` that of the feedback.
trials = Table(
    "trials",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("stable", Integer, nullable=False),
    Column("canary", Integer, nullable=False),
    Column("plan", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("observations", BigInteger, nullable=False),
    Column("position", BigInteger),
    Column("position_id", Id),
    Column("feedback_position", BigInteger, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    # When the canary was last heard of.
    Column("heard_at", BigInteger, nullable=False),
    Column("alarm", Text),
    # Why it was ended, where a guard did: JSON.
    Column("decision", Text),
    Index("ix_trials_name_started_at", "name", "started_at"),
)

# What the guards heard, in the order in which they did: from these rows every decision follows again.
trial_observations = Table(
    "trial_observations",
    metadata,
    Column("trial", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("kind", Text, nullable=False),
    # A digest of the conversation, the user or the prediction; it is observed once.
    Column("session", LargeBinary(16), nullable=False),
    Column("arm", Text, nullable=False),
    Column("prediction_id", Id, nullable=False),
    # By guard, 0 (good) to 1 (bad): JSON.
    Column("badness", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("ix_trial_observations_trial_kind_session", "trial", "kind", "session", unique=True),
)

# Who does a kind of work at present, and until when unless he says so again.
leases = Table(
    "leases",
    metadata,
    Column("work", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)
