"""What is looked at in every deployment without a rule: trials that cannot end, rollbacks, records that stay behind."""

from app.alerts.conditions import Finding
from app.alerts.outboxes import SILENT_SECONDS, outboxes_of
from app.alerts.states import Subject, Timing
from app.database import Database
from app.guards import Trials

DEPLOYMENT = ""
"""The tenant of what is about all of them."""

ROLLBACK_MS = 86_400_000
"""A rollback is told of for a day, unless the release is on trial again before."""

STUCK_SECONDS = 300.0
"""The age of a record in an outbox at which something is wrong."""

BUILTIN_TIMINGS = {
    "trial": Timing("trial", "ticket"),
    "rollback": Timing("rollback", "page"),
    "outbox": Timing("outbox", "page", keep_seconds=60.0),
}
"""By the name of the rule, which is its kind."""


async def trial_findings(database: Database, now: int) -> dict[Subject, Finding]:
    """Canaries whose trial cannot come to an end, and those that a guard took back."""
    found: dict[Subject, Finding] = {}
    for trial in await Trials(database).recent(now - ROLLBACK_MS):
        release = trial.label("canary")
        told = {"trial": trial.id, "observations": trial.observations}
        found.pop(Subject(DEPLOYMENT, "rollback", release), None)  # Of an earlier trial of the same release.
        if trial.status == "running":
            why = trial.alarm or "The trial goes on."
            found[Subject(DEPLOYMENT, "trial", release)] = Finding(trial.alarm is not None, why, told)
        elif trial.status == "rolled_back" and trial.decision is not None:
            decision = trial.decision
            told |= {"guard": decision.guard, "e_value": decision.e_value, "threshold": decision.threshold}
            found[Subject(DEPLOYMENT, "rollback", release)] = Finding(bad=True, why=decision.why, facts=told)
    return found


async def outbox_findings(database: Database, now: int) -> dict[Subject, Finding]:
    """Replicas whose records do not reach the shared database, or that have said nothing for long."""
    known = await outboxes_of(database)
    if not known:
        return {}
    stuck = [each for each in known if each.lag_seconds >= STUCK_SECONDS]
    silent = [each for each in known if now - each.at >= SILENT_SECONDS * 1000 and each not in stuck]
    parts = []
    if stuck:
        parts.append(f"{len(stuck)} replicas hold records that do not reach the shared database")
    if silent:
        parts.append(
            f"{len(silent)} replicas said nothing for {SILENT_SECONDS:g} s: their records may be on their disks"
        )
    why = "; ".join(parts) or "Every replica's records reach the shared database."
    facts = {"stuck": [each.replica for each in stuck], "silent": [each.replica for each in silent]} if parts else {}
    return {Subject(DEPLOYMENT, "outbox", ""): Finding(bool(parts), why, facts)}
