"""The tables of the review queue, declared once for SQLite and PostgreSQL as those in `app.database.tables` are."""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, Table, Text

from app.database.tables import Id, metadata

# A queue of predictions that people review. `position` is the last row of the predictions that it has considered, with
# the prediction there; `feedback_position` that of the feedback. How it is filled and reviewed is its rules, as JSON.
review_queues = Table(
    "review_queues",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("rules", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("updated_by", Text, nullable=False),
    Column("position", BigInteger),
    Column("position_id", Id),
    Column("feedback_position", BigInteger, nullable=False),
    Index("ix_review_queues_tenant_name", "tenant", "name", unique=True),
)

# A share of a slice of the predictions that a queue takes on top, because something was noticed there.
review_boosts = Table(
    "review_boosts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("queue_id", Id, nullable=False),
    Column("rate", Float(53), nullable=False),
    Column("reason", Text, nullable=False),
    # Which predictions, as JSON: a slice that is followed, or null where they were named one by one.
    Column("slice", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("ended_at", BigInteger),
    Column("position", BigInteger),
    Column("position_id", Id),
    Index("ix_review_boosts_queue_id", "queue_id"),
)

# A prediction in a queue. Its probability is that with which chance put it there; null if it was put there on purpose.
review_items = Table(
    "review_items",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("queue_id", Id, nullable=False),
    Column("prediction_id", Id, nullable=False),
    Column("release_name", Text),
    Column("policy", Text, nullable=False),
    Column("probability", Float(53)),
    Column("state", Text, nullable=False),
    Column("wanted", Integer, nullable=False),
    Column("done", Integer, nullable=False),
    Column("skipped", Integer, nullable=False),
    # Whether its probability has risen, and labels may have to be told.
    Column("risen", Boolean, nullable=False),
    # The right class, where the item is there to see whether reviewers find it.
    Column("gold_class", Text),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_review_items_queue_id_prediction_id", "queue_id", "prediction_id", unique=True),
    Index("ix_review_items_queue_id_state", "queue_id", "state", "id"),
    Index("ix_review_items_tenant_prediction_id", "tenant", "prediction_id"),
)
Index(
    "ix_review_items_risen", review_items.c.id, sqlite_where=review_items.c.risen, postgresql_where=review_items.c.risen
)

# A reviewer's turn at an item: a lease first, and then what became of it. What was found is in the label.
reviews = Table(
    "reviews",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("queue_id", Id, nullable=False),
    Column("item_id", Id, nullable=False),
    Column("reviewer", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("leased_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Column("reason", Text),
    Column("class", Text),
    Column("label_id", Id),
    # The item's probability as the label has it.
    Column("probability", Float(53)),
    Index("ix_reviews_item_id", "item_id"),
    Index("ix_reviews_queue_id_reviewer", "queue_id", "reviewer"),
    Index("ix_reviews_queue_id_state", "queue_id", "state"),
)
