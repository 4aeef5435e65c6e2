"""The tables of alerts: their rules, their states and history, what is to be told, and how full outboxes are."""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, Table, Text

from app.database.tables import Id, metadata

# Rules of a name or of one of its releases, as JSON: every revision is kept, and the highest holds. Without rules
# (null) those hold that are more general.
alert_rules = Table(
    "alert_rules",
    metadata,
    Column("target", Text, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("rules", Text),
    Column("at", BigInteger, nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
)

# Of each tenant, rule and release one at most that is not resolved. What is about the deployment has the tenant ''.
alerts = Table(
    "alerts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("rule", Text, nullable=False),
    Column("release", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("fired_at", BigInteger),
    Column("resolved_at", BigInteger),
    Column("good_since", BigInteger),
    Column("why", Text, nullable=False),
    # Figures, names and ids: JSON.
    Column("facts", Text, nullable=False),
    Column("told", Boolean, nullable=False),
    Column("acknowledged_at", BigInteger),
    Column("acknowledged_by", Text),
    Index("ix_alerts_tenant_id", "tenant", "id"),
)
Index(
    "ix_alerts_active",
    alerts.c.tenant,
    alerts.c.rule,
    alerts.c.release,
    unique=True,
    sqlite_where=alerts.c.state != "resolved",
    postgresql_where=alerts.c.state != "resolved",
)

# What happened to an alert, by its version then; only ever appended to.
alert_events = Table(
    "alert_events",
    metadata,
    Column("alert", Id, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("action", Text, nullable=False),
    Column("who", Text),
    Column("why", Text, nullable=False),
    Column("facts", Text, nullable=False),
)

alert_silences = Table(
    "alert_silences",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    # '*' is any.
    Column("rule", Text, nullable=False),
    Column("release", Text, nullable=False),
    Column("until", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("ended_at", BigInteger),
    Index("ix_alert_silences_tenant_until", "tenant", "until"),
)

# What people are to be told, written with the change that it tells of.
alert_notifications = Table(
    "alert_notifications",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("alert", Id, nullable=False),
    Column("action", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    # While it waits: when it is tried next. Whoever tries moves it ahead first, so that nobody else does meanwhile.
    Column("next_at", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("problem", Text),
    Index("ix_alert_notifications_tenant_id", "tenant", "id"),
)
Index(
    "ix_alert_notifications_waiting",
    alert_notifications.c.next_at,
    sqlite_where=alert_notifications.c.state == "waiting",
    postgresql_where=alert_notifications.c.state == "waiting",
)

# One row: when the rules were last all looked at, and how long that took.
alert_rounds = Table(
    "alert_rounds",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("seconds", Float(53), nullable=False),
)

# Each replica's outbox of predictions, as it said last; one that was stopped in good order says nothing.
outboxes = Table(
    "outboxes",
    metadata,
    Column("replica", Text, primary_key=True),
    Column("rows", BigInteger, nullable=False),
    Column("lag_seconds", Float(53), nullable=False),
    Column("at", BigInteger, nullable=False),
)
